//! Lodestream: a node daemon that keeps models resident in memory and hands them to processes without a copy.
#![deny(unsafe_code)]
pub mod api;
pub mod catalog;
pub mod config;
pub mod error;
mod json;
pub mod source;
pub mod sys;
pub use error::{Code, Error, Result};
