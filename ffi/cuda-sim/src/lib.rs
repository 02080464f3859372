//! A simulated CUDA driver: `libcuda.so.1` for machines without a GPU.
//!
//! What Lodestream calls of the driver API, over files in shared memory, so that several processes see the same devices:
//! allocations are exported and imported by descriptor, live as long as anybody has them, and are counted against the
//! device's memory whoever made them. Its devices say that they are simulated in their names. See README.md for the
//! environment variables that configure devices and inject faults.
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | devices and faults, from the environment |
//! | [`machine`] | devices, their memory and its account across processes |
//! | [`space`] | device addresses of this process, and access to what is mapped there |
//! | [`stream`] | streams, events, modelled links |
//! | [`kernels`] | what stands in for known kernels |
//! | [`api`] | the exported functions |
#![allow(unsafe_code, reason = "a C library")]

mod api;
mod code;
mod config;
mod kernels;
mod machine;
mod space;
mod stream;
