//! Invariant 3: the data plane allocates nothing while it moves bytes.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::alloc::System;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use lodestream::plan;
use lodestream::shard::{
    Assignment, Batch, BatchFile, Handles, Landing, Options, Part, ReaderKind, Regions, Shard,
};
use lodestream::sys::mem::Memory;
use lodestream::sys::pages::PageKind;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::sync::mpsc;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const MIB: u64 = 1 << 20;

/// Allocations of the whole process from handing a batch of `mib` MiB to a shard thread until it comes back.
fn allocations(shard: &Shard, path: &std::path::Path, mib: u64) -> usize {
    let bytes = mib * MIB;
    let direct = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
    let file = BatchFile { name: "model".into(), bytes, expected: None };
    let handles = Handles {
        file: Arc::new(std::fs::File::open(path).unwrap().into()),
        direct: Some(Arc::new(direct.into())),
        landing: Landing::Slot,
    };
    let layout = plan::layout(&[bytes], &[], None).unwrap();
    let plan = plan::moves(&layout, &[bytes], &[bytes], MIB).unwrap();
    assert_eq!(plan.moves.len() as u64, mib);
    let memory = Arc::new(Memory::new(bytes, PageKind::Small).unwrap());
    let parts = Regions::Host(vec![Part { memory, populated: false }]);
    let batch = Arc::new(Batch::new(plan, (vec![file], vec![handles]), parts, Arc::default()));
    let (home, mut back) = mpsc::channel(1);
    let moves = std::iter::once(0..mib as u32).collect();
    let assignment = Assignment { batch, moves, priority: 0, home };
    let region = Region::new(ALLOCATOR);
    assert!(shard.send(assignment).is_ok());
    let batch = back.blocking_recv().unwrap();
    let allocations = region.change().allocations;
    assert!(batch.progress.failure().is_none());
    assert_eq!(batch.progress.bytes_total(), bytes);
    allocations
}

#[test]
fn more_bytes_take_no_more_allocations() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("model");
    std::fs::write(&path, vec![7u8; 256 * MIB as usize]).unwrap();
    let shard = Shard::start(Options {
        index: 0,
        reader: ReaderKind::IoUring,
        block_bytes: MIB,
        depth: 8,
        slots: 16,
        cpus: Vec::new(),
        numa_node: None,
        page_cache: false,
        devices: Vec::new(),
    });
    let shard = shard.unwrap();
    allocations(&shard, &path, 8);
    let (few, many) = (allocations(&shard, &path, 16), allocations(&shard, &path, 256));
    assert!(many <= few + 4, "{few} allocations for 16 reads, {many} for 256");
}
