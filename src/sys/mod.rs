//! Safe wrappers around the kernel's interfaces: the only `unsafe` code of `src/` (invariant 1).
#![allow(unsafe_code)]

pub mod identity;
