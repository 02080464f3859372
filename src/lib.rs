//! Lodestream: a node daemon that keeps models resident in memory and hands them to processes without a copy.
#![deny(unsafe_code)]
pub mod api;
pub mod config;
pub mod error;
pub mod telemetry;
pub mod topology;
pub use error::{Code, Error, Result};
