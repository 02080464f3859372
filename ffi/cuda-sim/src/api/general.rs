//! Initialisation, errors in words, functions by name.

use std::ffi::{c_char, c_void};

use super::{early, exported};
use crate::abi::{Code, InText, Out};
use crate::sim;

/// The version of CUDA that the simulated driver says it has: 12.2.
const VERSION: i32 = 12_020;

exported! {
    fn cuInit(flags: u32) {
        early("cuInit", || if flags == 0 { sim::init() } else { Err(Code::INVALID_VALUE) })
    }

    fn cuDriverGetVersion(version: Out<i32>) {
        early("cuDriverGetVersion", || version.put(VERSION))
    }

    fn cuGetErrorName(error: u32, text: Out<*const c_char>) {
        early("cuGetErrorName", || match Code(error).name() {
            Some(name) => text.put(name.as_ptr()),
            None => text.put(std::ptr::null()).and(Err(Code::INVALID_VALUE)),
        })
    }

    fn cuGetErrorString(error: u32, text: Out<*const c_char>) {
        early("cuGetErrorString", || match Code(error).description() {
            Some(description) => text.put(description.as_ptr()),
            None => text.put(std::ptr::null()).and(Err(Code::INVALID_VALUE)),
        })
    }

    fn cuGetProcAddress_v2(
        symbol: InText,
        function: Out<*const c_void>,
        _version: i32,
        _flags: u64,
        status: Out<u32>,
    ) {
        /// `CU_GET_PROC_ADDRESS_SUCCESS`, `…_SYMBOL_NOT_FOUND`.
        const FOUND: u32 = 0;
        const NOT_FOUND: u32 = 1;
        early("cuGetProcAddress_v2", || {
            let name = symbol.get()?;
            let table = super::table();
            // A name without its version means the newest.
            let newest = format!("{name}_v2");
            let find = |wanted: &str| table.iter().find(|entry| entry.0 == wanted);
            match find(&newest).or_else(|| find(name)) {
                Some((_, address)) => status.put_if_wanted(FOUND).and_then(|()| function.put(*address)),
                None => {
                    status.put_if_wanted(NOT_FOUND)?;
                    function.put(std::ptr::null()).and(Err(Code::NOT_FOUND))
                }
            }
        })
    }
}
