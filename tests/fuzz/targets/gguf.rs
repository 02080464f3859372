//! Any bytes as a GGUF file, and as the start of a longer one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lodestream::catalog::formats::gguf::parse;
use lodestream_fuzz::{check_tensors, limits};

fuzz_target!(|prefix: &[u8]| {
    for more in [0, 4096] {
        let file_bytes = prefix.len() as u64 + more;
        let Ok(header) = parse(prefix, file_bytes, limits().tensors_max) else { continue };
        check_tensors(&header.tensors, file_bytes);
        for tensor in &header.tensors {
            assert_eq!(tensor.offset % tensor.element_align, 0);
        }
    }
});
