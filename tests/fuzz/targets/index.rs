//! Any bytes as a `*.safetensors.index.json`.
#![no_main]

use std::collections::HashSet;
use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use lodestream::source::file::index::parse;
use lodestream_fuzz::limits;

fuzz_target!(|text: &[u8]| {
    let Ok(shards) = parse(text, limits().tensors_max) else { return };
    assert!(!shards.is_empty());
    let mut tensors = HashSet::new();
    for (shard, names) in &shards {
        let parts: Vec<Component<'_>> = Path::new(shard).components().collect();
        assert!(matches!(parts[..], [Component::Normal(name)] if name == shard.as_str()), "{shard:?}");
        assert!(!shard.contains('\0'));
        assert!(!names.is_empty() && names.is_sorted());
        assert!(names.iter().all(|name| tensors.insert(name)), "a tensor in two shards");
    }
});
