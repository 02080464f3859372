//! Cuts layouts for GPUs into reads: every read lands in a slot, and is copied from there to where its bytes belong.
//!
//! Several layouts of one artifact, one for each rank of a tensor-parallel group, share their reads: each block of
//! storage is read once, whatever number of regions wants bytes of it.

use super::moves::{GAP_BYTES_MAX, MOVES_MAX, Plan};
use super::{BLOCK_ALIGN, Copy, Direct, Extent, Layout, Target};
use crate::catalog::select::Runs;

/// A range of a file that is read.
type Range = std::ops::Range<u64>;

/// Cuts `layouts` into reads of at most `block_bytes`; copies name a region by its place among `layouts`.
///
/// `files` are the sizes in bytes; what is in `direct` is left out. `None` if a count overflows, or there are more than
/// [`MOVES_MAX`] reads or copies.
pub fn scatter(layouts: &[Layout], files: &[u64], direct: &Direct, block_bytes: u64) -> Option<Plan> {
    let mut plan = Plan::default();
    let whole = layouts.iter().any(|layout| layout.whole);
    for (file, file_bytes) in (0u32..).zip(files.iter().copied()) {
        let mut extents: Vec<(u32, &Extent)> = (0u32..)
            .zip(layouts)
            .flat_map(|(region, layout)| layout.extents.iter().map(move |extent| (region, extent)))
            .filter(|(_, extent)| extent.file == file)
            .collect();
        extents.sort_by_key(|(_, extent)| extent.runs.offset);
        // All of a file is read even if nobody wants its header: the digest is taken over every byte.
        let ranges = if whole { std::iter::once(0..file_bytes).collect() } else { cover(&extents)? };
        let ranges = direct.holes(file, ranges);
        let mut coming = extents.into_iter().peekable();
        let mut active: Vec<(u32, &Extent)> = Vec::new();
        for range in ranges {
            let end = range.end.checked_next_multiple_of(BLOCK_ALIGN)?;
            let mut at = range.start - range.start % BLOCK_ALIGN;
            while at < end {
                let next = end.min((at / block_bytes + 1).checked_mul(block_bytes)?);
                while let Some(extent) = coming.next_if(|(_, extent)| extent.runs.offset < next) {
                    active.push(extent);
                }
                active.retain(|(_, extent)| last_end(&extent.runs).is_some_and(|end| end > at));
                let first = u32::try_from(plan.copies.len()).ok()?;
                for (region, extent) in &active {
                    pieces(&mut plan.copies, *region, extent, at..next)?;
                }
                let copies = first..u32::try_from(plan.copies.len()).ok()?;
                plan.push(file, file_bytes, at, next, Target::Staged(copies))?;
                at = next;
            }
        }
    }
    Some(plan)
}

/// Where the last of the runs ends.
fn last_end(runs: &Runs) -> Option<u64> {
    runs.offset.checked_add((runs.count - 1).checked_mul(runs.stride)?)?.checked_add(runs.bytes)
}

/// The blocks that the extents touch, in order, none twice; rows close to each other are read in one piece.
fn cover(extents: &[(u32, &Extent)]) -> Option<Vec<Range>> {
    let mut ranges = Vec::new();
    for Extent { runs, .. } in extents.iter().map(|(_, extent)| *extent) {
        if runs.count == 1 || runs.stride - runs.bytes <= GAP_BYTES_MAX {
            ranges.push(runs.offset..last_end(runs)?);
            continue;
        }
        if usize::try_from(runs.count).ok()?.checked_add(ranges.len())? > MOVES_MAX {
            return None;
        }
        last_end(runs)?;
        ranges.extend((0..runs.count).map(|row| {
            let start = runs.offset + row * runs.stride;
            start..start + runs.bytes
        }));
    }
    for range in &mut ranges {
        range.start -= range.start % BLOCK_ALIGN;
        range.end = range.end.checked_next_multiple_of(BLOCK_ALIGN)?;
    }
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    Some(joined)
}

/// The copies from a slot that holds `slot` of the file to the region of one extent: a row that is cut at the front,
/// whole rows, a row that is cut at the back.
fn pieces(copies: &mut Vec<Copy>, region: u32, extent: &Extent, slot: Range) -> Option<()> {
    let runs = &extent.runs;
    if runs.offset >= slot.end {
        return Some(());
    }
    // The first row that ends behind the start of the slot, and the last one that begins before its end.
    let skipped = slot.start.saturating_sub(runs.offset);
    let first = if skipped < runs.bytes { 0 } else { (skipped - runs.bytes) / runs.stride + 1 };
    let last = ((slot.end - 1 - runs.offset) / runs.stride).min(runs.count - 1);
    let mut row = first;
    while row <= last {
        let start = runs.offset + row * runs.stride;
        let end = start + runs.bytes;
        let from = start.max(slot.start);
        let cut = from > start || end > slot.end;
        // Whole rows go as one copy; the last one may be cut.
        let count = match () {
            () if cut => 1,
            () if last > row && runs.offset + last * runs.stride + runs.bytes > slot.end => last - row,
            () => last - row + 1,
        };
        if copies.len() >= MOVES_MAX {
            return None;
        }
        copies.push(Copy {
            region,
            slot_offset: u32::try_from(from - slot.start).ok()?,
            region_offset: extent.place + row * runs.bytes + (from - start),
            bytes: end.min(slot.end) - from,
            stride: runs.stride,
            count,
        });
        row += count;
    }
    Some(())
}
