//! Any bytes as a safetensors file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lodestream::catalog::formats::safetensors::{LENGTH_BYTES, header_bytes, parse};
use lodestream_fuzz::{check_tensors, limits};

fuzz_target!(|file: &[u8]| {
    let (limits, file_bytes) = (limits(), file.len() as u64);
    let start = &file[..file.len().min(LENGTH_BYTES)];
    let Ok(length) = header_bytes(start, file_bytes, limits.header_bytes_max) else { return };
    let header = &file[LENGTH_BYTES..LENGTH_BYTES + length];
    let Ok(header) = parse(header, file_bytes, limits.tensors_max) else { return };
    check_tensors(&header.tensors, file_bytes);
    // No hole and no rest: together they have every byte behind the header.
    let data_start = (LENGTH_BYTES + length) as u64;
    let covered: u64 = header.tensors.iter().map(|tensor| tensor.nbytes).sum();
    assert_eq!(data_start + covered, file_bytes);
    for tensor in &header.tensors {
        assert_eq!((tensor.offset - data_start) % tensor.element_align, 0);
    }
});
