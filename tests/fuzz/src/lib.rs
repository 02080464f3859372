//! What must hold of everything that a reader of untrusted bytes accepts.
//!
//! Run a target with
//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz safetensors tests/fuzz/corpus/safetensors tests/fuzz/seeds/safetensors`.

use std::collections::HashSet;

use lodestream::catalog::Tensor;
use lodestream::config::{Config, Limits};

/// The default limits.
pub fn limits() -> Limits {
    Config::default().limits
}

/// Tensors lie within their file of `file_bytes`, apart from each other, aligned, and have the size of
/// type and shape; names are unique. Panics otherwise.
pub fn check_tensors(tensors: &[Tensor], file_bytes: u64) {
    let mut names = HashSet::new();
    let mut ranges = Vec::new();
    for tensor in tensors {
        assert!(names.insert(&tensor.name), "a name twice");
        let end = tensor.offset.checked_add(tensor.nbytes).expect("an end that can be counted");
        assert!(end <= file_bytes, "past the end");
        // In wide numbers, and not by the library's own function.
        let elements =
            tensor.shape.iter().try_fold(1u128, |product, size| product.checked_mul(u128::from(*size)));
        let elements = elements.expect("elements that can be counted");
        let blocks = elements / u128::from(tensor.dtype.block_elements());
        assert_eq!(elements % u128::from(tensor.dtype.block_elements()), 0, "a torn block");
        assert_eq!(
            blocks * u128::from(tensor.dtype.block_bytes()),
            u128::from(tensor.nbytes),
            "another size"
        );
        if tensor.nbytes > 0 {
            ranges.push((tensor.offset, end));
        }
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "an overlap");
}
