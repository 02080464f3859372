//! What the simulated CUDA driver and the simulated cuFile have in common: faults on demand, and the time that transfers take.
#![deny(unsafe_code)]

mod fault;
mod link;

pub use fault::{Faults, entries};
pub use link::{Link, wait_until};
