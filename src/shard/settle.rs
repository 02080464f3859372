//! What becomes of the bytes of a read: which way they come, what checksum they must have, where they go on the host tier.

use std::os::fd::AsFd;
use std::time::Instant;

use super::batch::{Batch, BatchFile, Handles};
use crate::checksum::{self, CHUNK_BYTES};
use crate::error::{Code, Error};
use crate::plan::{BLOCK_ALIGN, Copy, Move};
use crate::sys::copy;
use crate::sys::mem::SPAN_ALIGN;
use crate::sys::page_cache;

/// Bytes that are checksummed and then copied while they are in the CPU's nearest cache.
const COPY_STEP_BYTES: usize = 16 << 10;

/// How a read goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the page cache, without waiting for the drive.
    Cached,
    /// Past the page cache.
    Direct,
    /// Through the page cache, which held all of it before.
    Buffered,
    /// Through the page cache and out of it again.
    BufferedTidy,
}

/// Nanoseconds since `clock`, which is set to now.
pub(super) fn lap(clock: &mut Instant) -> u64 {
    let now = Instant::now();
    let nanos = now.duration_since(*clock).as_nanos();
    *clock = now;
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

/// From the page cache if it holds all of the bytes, else past it if the file system allows.
pub(super) fn way(file: &Handles, step: &Move, use_cache: bool) -> Way {
    let bytes = u64::from(step.expect_bytes);
    let all = bytes.div_ceil(BLOCK_ALIGN);
    match file.direct {
        Some(_) if !use_cache => Way::Direct,
        Some(_) if page_cache::cached_pages(file.file.as_fd(), step.offset, bytes) < all => Way::Direct,
        Some(_) => Way::Cached,
        None if page_cache::cached_pages(file.file.as_fd(), step.offset, bytes) < all => Way::BufferedTidy,
        None => Way::Buffered,
    }
}

/// The checksum that a piece must have: known only for whole chunks of files that were read before.
pub(super) fn expected(file: &BatchFile, piece: &std::ops::Range<u64>) -> Option<u64> {
    let whole = piece.start.is_multiple_of(CHUNK_BYTES)
        && (piece.end.is_multiple_of(CHUNK_BYTES) || piece.end == file.bytes);
    let sums = file.expected.as_ref().filter(|_| whole)?;
    sums.get((piece.start / CHUNK_BYTES) as usize).copied()
}

/// Bytes of a file that are not what they were.
pub fn mismatch(file: &str, piece: &std::ops::Range<u64>, sum: u64, expected: u64) -> Error {
    let message = format!(
        "{}: bytes {}..{} have checksum {sum:016x}, but had {expected:016x} when this unchanged file was first read: \
         the drive or the memory is at fault",
        file, piece.start, piece.end
    );
    Error::new(Code::CatalogChecksumMismatch, message)
}

/// Copies a chunk to its place in a part and gives its checksum: in steps that stay in the CPU's nearest cache, so that
/// the bytes are fetched once for both.
pub(super) fn copy_chunk(batch: &Batch, part: u32, offset: u64, bytes: &[u8]) -> Option<u64> {
    let memory = &batch.regions.parts().get(part as usize)?.memory;
    let mut span = memory.claim(offset, bytes.len() as u64)?;
    let mut sum = checksum::Running::new();
    let steps = bytes.chunks(COPY_STEP_BYTES).zip(span.as_mut_slice().chunks_mut(COPY_STEP_BYTES));
    for (from, to) in steps {
        sum.update(from);
        copy::streaming(from, to);
    }
    Some(sum.finish())
}

pub(super) fn truncated(file: &BatchFile, step: &Move, arrived: u32) -> Error {
    let message = format!(
        "{}: the file ends at {} of {} bytes: it was truncated while it was read",
        file.name,
        step.offset + u64::from(arrived),
        file.bytes
    );
    Error::new(Code::SourceFileShortRead, message)
}

/// Copies what a staged move has brought into a slot, from its first byte on, to its places in a region of the host tier.
/// `None`: it has no place there.
pub fn copy_out(batch: &Batch, step: &Move, slot: &[u8]) -> Option<()> {
    batch.plan.copies_of(step).iter().try_for_each(|copy| copy_rows(batch, copy, slot))
}

/// Copies the rows that `slot` holds to their place in the region.
fn copy_rows(batch: &Batch, copy: &Copy, slot: &[u8]) -> Option<()> {
    for row in 0..copy.count {
        let start = usize::try_from(u64::from(copy.slot_offset) + row * copy.stride).ok()?;
        let bytes = slot.get(start..start.checked_add(usize::try_from(copy.bytes).ok()?)?)?;
        write(batch, copy.region_offset + row * copy.bytes, bytes)?;
    }
    Some(())
}

/// Writes to a region, across its parts.
fn write(batch: &Batch, mut offset: u64, mut bytes: &[u8]) -> Option<()> {
    for part in batch.regions.parts() {
        if offset >= part.memory.bytes() {
            offset -= part.memory.bytes();
            continue;
        }
        let here = bytes.len().min(usize::try_from(part.memory.bytes() - offset).ok()?);
        let lead = offset % SPAN_ALIGN;
        let mut span = part.memory.claim(offset - lead, lead + here as u64)?;
        span.as_mut_slice()[lead as usize..].copy_from_slice(&bytes[..here]);
        bytes = &bytes[here..];
        if bytes.is_empty() {
            return Some(());
        }
        offset = 0;
    }
    bytes.is_empty().then_some(())
}
