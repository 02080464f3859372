//! A simulated CUDA driver: `libcuda.so.1` over shared memory, for machines without a GPU. README.md says what it does
//! like a real driver, what it does not, and how it is configured.
//!
//! The way of a call: `api` (what the C functions are, and what of their arguments is checked) → `sim` (devices, contexts
//! and handles) → `memory` (allocations, addresses, host registrations) and `stream` (work in order, on threads of its own).
//!
//! Nothing here is meant to be called from Rust: the crate has no public items, only exported C symbols.

mod abi;
mod api;
mod config;
mod context;
mod fault;
mod host;
mod kernels;
mod memory;
mod sim;
mod space;
mod store;
mod stream;
mod work;
