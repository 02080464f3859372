//! Any bytes as a manifest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lodestream::catalog::manifest::{CHUNK_BYTES, Manifest};
use lodestream_fuzz::{check_tensors, limits};

fuzz_target!(|bytes: &[u8]| {
    let Ok(manifest) = Manifest::parse(bytes, &limits()) else { return };
    assert_eq!(manifest.to_bytes().expect("it was read"), bytes, "two ways to write it");
    let description = manifest.description();
    assert_eq!(description.files.len(), manifest.chunks().len());
    for (number, (file, chunks)) in description.files.iter().zip(manifest.chunks()).enumerate() {
        assert_eq!(chunks.len() as u64, file.bytes.div_ceil(CHUNK_BYTES));
        let own = description.tensors.iter().filter(|tensor| tensor.file as usize == number);
        check_tensors(&own.cloned().collect::<Vec<_>>(), file.bytes);
    }
    let files = description.files.len();
    assert!(description.tensors.iter().all(|tensor| (tensor.file as usize) < files));
});
