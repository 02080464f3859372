//! Safe wrappers around memory mappings, io_uring and per-thread credentials: the only `unsafe` code of `src/`.
//!
//! Upholds invariants 1 and 2: no safe function here takes an address, and an operation owns its buffer from
//! submission to completion.
#![allow(unsafe_code)]

pub mod copy;
pub mod cuda;
pub mod cufile;
pub mod identity;
pub mod lease;
pub mod map;
pub mod mem;
pub mod numa;
pub mod nvml;
pub mod page_cache;
pub mod pages;
pub mod peer;
pub mod uring;
pub mod verbs;
pub mod view;
pub mod warm;
