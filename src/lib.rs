//! Lodestream: a node daemon that keeps models resident in memory and hands them to processes without a copy.
#![deny(unsafe_code)]

pub mod api;
pub mod catalog;
pub mod checksum;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod error;
mod json;
pub mod node;
pub mod plan;
pub mod shard;
pub mod source;
pub mod staging;
pub mod sys;
pub mod telemetry;
pub mod tier;
pub mod topology;
pub mod transfer;
pub use error::{Code, Error, Result};
