//! Lodestream: a node daemon that keeps models resident in memory and hands them to processes without a copy.
//!
//! # Invariants
//!
//! A test that defends one cites it as `Invariant` and its number (`tests/tidy.rs` sees to it).
//!
//! 1. `unsafe` only in `src/sys/*` and `ffi/*`; every block states the invariant and who upholds it. No safe function
//!    takes an address.
//! 2. An operation owns its buffer from submission to completion. A dropped or cancelled job frees memory only when the
//!    kernel and the GPU have said that they are done. A shard that cannot drain leaks and counts.
//! 3. All staging is allocated, pinned and registered at start. The hot loop allocates nothing and takes no lock (but for
//!    one moment a chunk, if peers may have what is loaded: docs/decisions/0011-peers.md).
//! 4. Every queue, retry, frame, header and loop has a named limit in `Config`; going past it is an error with a code.
//! 5. A short read, a short write, EAGAIN and a misaligned tail are handled in one place each, with a test each.
//! 6. No byte reaches a client, a peer or a commit before its checksum was verified or computed.
//! 7. A path from a tenant is opened once, below a configured root, with the tenant's own rights; after that only the
//!    descriptor is used.
//! 8. A shared host region is sealed before it is shared. Memory that changes tenant is cleared.
//! 9. The daemon dying costs its clients nothing that they had attached. A client dying costs the daemon nothing.
//! 10. Each reported path is observed, not assumed: it comes from counters of the transfer that happened.
//! 11. Gauges return to zero when the work is done; a test checks it.
#![deny(unsafe_code)]

pub mod api;
pub mod catalog;
pub mod checksum;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod error;
pub mod in_process;
mod json;
pub mod measure;
pub mod node;
pub mod peer;
pub mod plan;
pub mod probe;
pub mod rdma;
pub mod shard;
pub mod source;
pub mod staging;
pub mod sys;
pub mod telemetry;
pub mod tier;
pub mod topology;
pub mod transfer;
pub use error::{Code, Error, Result};
