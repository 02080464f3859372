//! A simulated cuFile: `libcufile.so.0` on top of the simulated CUDA driver. README.md says what it does like the real
//! library, what it does not, and how it is configured.
//!
//! The way of a call: `api` (what the C functions are, and what of their arguments is checked) → `session` (the open
//! driver: files, buffers, which way bytes go) → `transfer` (one read or write) → `device` (memory that bytes pass through)
//! → `cuda` (the driver, as any client calls it).
//! `batch` has many of them done by threads.
//!
//! Nothing here is meant to be called from Rust: the crate has no public items, only exported C symbols.

mod abi;
mod api;
mod batch;
mod config;
mod cuda;
mod device;
mod failure;
mod fault;
mod parameters;
mod pointers;
mod session;
mod statistics;
mod transfer;
