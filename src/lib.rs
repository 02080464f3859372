//! Lodestream: a node daemon that keeps models resident in memory and hands them to processes without a copy.
#![deny(unsafe_code)]

pub mod api;
pub mod config;
pub mod catalog;
pub mod checksum;
pub mod error;
pub mod plan;
pub mod shard;
pub mod source;
pub mod staging;
pub mod sys;
pub mod tier;
pub use error::{Code, Error, Result};
