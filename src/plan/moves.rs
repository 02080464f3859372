//! Cuts a layout into reads.

use std::ops::Range;

use super::{BLOCK_ALIGN, Extent, Layout};
use crate::checksum::CHUNK_BYTES;

/// Gaps between the rows of a slice up to this many bytes are read through rather than skipped: one more read costs
/// about as much time as these bytes.
pub(super) const GAP_BYTES_MAX: u64 = 16 << 10;

/// Reads of one plan at most: 4 TiB in reads of 1 MiB. Slices with more rows than this are refused.
pub const MOVES_MAX: usize = 4 << 20;

/// The reads that fill a region.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// In file order.
    pub moves: Vec<Move>,
    /// What is copied from slots, in the order of the moves.
    pub copies: Vec<Copy>,
    /// Number of checksums that the moves produce.
    pub checks: u32,
    /// Bytes that have to arrive.
    pub bytes: u64,
}

/// One read of one file.
#[derive(Debug, Clone, PartialEq)]
pub struct Move {
    /// Index of the file.
    pub file: u32,
    /// Where the read begins, a multiple of [`BLOCK_ALIGN`].
    pub offset: u64,
    /// Bytes to ask for, a multiple of [`BLOCK_ALIGN`]; at the end of a file more than there is.
    pub read_bytes: u32,
    /// Bytes that must arrive; fewer means that the file was truncated.
    pub expect_bytes: u32,
    /// Index of the first checksum; one for each chunk of the file that the read touches.
    pub first_check: u32,
    /// Where the bytes go.
    pub target: Target,
}

/// Where the bytes of a read go.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// In place.
    Direct {
        /// Part of the region.
        part: u32,
        /// Offset in that part, a multiple of [`BLOCK_ALIGN`].
        offset: u64,
    },
    /// Into a slot, and from there to their places: which of the plan's copies. None if only the checksum is wanted.
    Staged(Range<u32>),
}

/// Rows that lie in a slot at a distance and go to a region one behind the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Copy {
    /// Which region.
    pub region: u32,
    /// Offset of the first row in the slot.
    pub slot_offset: u32,
    /// Offset in the region.
    pub region_offset: u64,
    /// Bytes of a row.
    pub bytes: u64,
    /// Distance of rows in the slot, bytes.
    pub stride: u64,
    /// Number of rows.
    pub count: u64,
}

impl Move {
    /// The pieces of this read that get a checksum of their own, as ranges of the file: it is cut at the chunk
    /// boundaries of the file.
    pub fn pieces(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let end = self.offset + u64::from(self.expect_bytes);
        let mut at = self.offset;
        std::iter::from_fn(move || {
            let next = ((at / CHUNK_BYTES + 1) * CHUNK_BYTES).min(end);
            let piece = at..next;
            at = next;
            (piece.start < piece.end).then_some(piece)
        })
    }
}

/// Cuts `layout` into reads of at most `block_bytes` for a region whose parts have the given sizes in bytes.
///
/// `files` are the sizes in bytes. `None` if the parts are too small, a count overflows, or there are more than
/// [`MOVES_MAX`] reads.
pub fn moves(layout: &Layout, files: &[u64], parts: &[u64], block_bytes: u64) -> Option<Plan> {
    let mut plan = Plan::default();
    for extent in &layout.extents {
        let file_bytes = *files.get(extent.file as usize)?;
        if extent.direct() {
            direct(&mut plan, extent, file_bytes, parts, block_bytes)?;
        } else {
            staged(&mut plan, extent, file_bytes, block_bytes)?;
        }
    }
    Some(plan)
}

impl Plan {
    /// Bytes that the moves with these numbers have to bring.
    pub fn bytes_of(&self, moves: &[u32]) -> u64 {
        let steps = moves.iter().filter_map(|number| self.moves.get(*number as usize));
        steps.map(|step| u64::from(step.expect_bytes)).sum()
    }

    /// Adds a copy; → its place, as a target takes it. There are never more copies than moves here.
    fn copy(&mut self, copy: Copy) -> Option<Range<u32>> {
        let first = u32::try_from(self.copies.len()).ok()?;
        self.copies.push(copy);
        Some(first..first + 1)
    }

    /// What is copied from the slot of a move. Nothing for one that lands in place.
    pub fn copies_of(&self, step: &Move) -> &[Copy] {
        match &step.target {
            Target::Staged(range) => &self.copies[range.start as usize..range.end as usize],
            Target::Direct { .. } => &[],
        }
    }

    pub(super) fn push(
        &mut self,
        file: u32,
        file_bytes: u64,
        offset: u64,
        read_end: u64,
        target: Target,
    ) -> Option<()> {
        if self.moves.len() >= MOVES_MAX {
            return None;
        }
        let expect = read_end.min(file_bytes).checked_sub(offset)?;
        let new = Move {
            file,
            offset,
            read_bytes: u32::try_from(read_end - offset).ok()?,
            expect_bytes: u32::try_from(expect).ok()?,
            first_check: self.checks,
            target,
        };
        self.checks = self.checks.checked_add(u32::try_from(new.pieces().count()).ok()?)?;
        self.bytes += expect;
        self.moves.push(new);
        Some(())
    }
}

fn direct(plan: &mut Plan, extent: &Extent, file_bytes: u64, parts: &[u64], block_bytes: u64) -> Option<()> {
    let end = (extent.runs.offset + extent.runs.bytes).checked_next_multiple_of(BLOCK_ALIGN)?;
    let mut at = extent.runs.offset - extent.runs.offset % BLOCK_ALIGN;
    let mut place = extent.place - extent.place % BLOCK_ALIGN;
    let mut part_start = 0;
    let mut part = 0;
    while at < end {
        while place >= part_start + parts.get(part)? {
            part_start += parts[part];
            part += 1;
        }
        // Up to the next multiple of the block size, so that reads of whole files fall on chunk boundaries.
        let block_end = (at / block_bytes + 1) * block_bytes;
        let next = end.min(block_end).min(at + (part_start + parts[part] - place));
        let target = Target::Direct { part: part as u32, offset: place - part_start };
        plan.push(extent.file, file_bytes, at, next, target)?;
        place += next - at;
        at = next;
    }
    Some(())
}

fn staged(plan: &mut Plan, extent: &Extent, file_bytes: u64, block_bytes: u64) -> Option<()> {
    let runs = &extent.runs;
    let mut row = 0;
    let mut place = extent.place;
    while row < runs.count {
        let start = runs.offset.checked_add(row.checked_mul(runs.stride)?)?;
        let offset = start - start % BLOCK_ALIGN;
        if start + runs.bytes > offset + block_bytes {
            // A row that no slot can hold: piece by piece.
            one_row(plan, extent, file_bytes, block_bytes, start, place)?;
            place += runs.bytes;
            row += 1;
            continue;
        }
        let close = runs.stride - runs.bytes <= GAP_BYTES_MAX;
        let fitting = if close { 1 + (offset + block_bytes - start - runs.bytes) / runs.stride } else { 1 };
        let count = fitting.min(runs.count - row);
        let last_end = start + (count - 1) * runs.stride + runs.bytes;
        let read_end = last_end.checked_next_multiple_of(BLOCK_ALIGN)?;
        let slot_offset = u32::try_from(start - offset).ok()?;
        let copy = Copy {
            region: 0,
            slot_offset,
            region_offset: place,
            bytes: runs.bytes,
            stride: runs.stride,
            count,
        };
        let copies = plan.copy(copy)?;
        plan.push(extent.file, file_bytes, offset, read_end, Target::Staged(copies))?;
        place += count * runs.bytes;
        row += count;
    }
    Some(())
}

fn one_row(
    plan: &mut Plan,
    extent: &Extent,
    file_bytes: u64,
    block_bytes: u64,
    start: u64,
    place: u64,
) -> Option<()> {
    let end = start + extent.runs.bytes;
    let mut at = start;
    while at < end {
        let offset = at - at % BLOCK_ALIGN;
        let next = end.min((at / block_bytes + 1) * block_bytes);
        let bytes = next - at;
        let slot_offset = u32::try_from(at - offset).ok()?;
        let region_offset = place + (at - start);
        let copies =
            plan.copy(Copy { region: 0, slot_offset, region_offset, bytes, stride: bytes, count: 1 })?;
        let read_end = next.checked_next_multiple_of(BLOCK_ALIGN)?;
        plan.push(extent.file, file_bytes, offset, read_end, Target::Staged(copies))?;
        at = next;
    }
    Some(())
}
