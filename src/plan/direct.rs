//! What of a layout for GPUs a drive can write to its place by itself, and what is left for slots.
//!
//! A drive writes to a GPU where file offset, length and place agree modulo 4 KiB. So the inner blocks of tensors go
//! directly, of tensors that lie one behind the other in file and region in one piece; the edges go by slots
//! ([`super::scatter()`]), like all that does not agree, or that several ranks want.

use std::ops::Range;

use super::moves::{Copy, MOVES_MAX, Plan, Target};
use super::{BLOCK_ALIGN, Extent, Layout};
use crate::checksum::CHUNK_BYTES;

/// Fewer bytes than this are not worth a read of their own: they go by slots, with their neighbours.
pub const DIRECT_BYTES_MIN: u64 = 64 << 10;

/// Most bytes of one read, a multiple of [`CHUNK_BYTES`]. What cuFile hands to the drive at a time by default is 16 MiB.
pub const DIRECT_BYTES_MAX: u64 = 8 << 20;

/// Reads by which drives write to GPUs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Direct {
    /// In file order.
    pub reads: Vec<DirectRead>,
    /// What gets a checksum of its own, in the order of the reads.
    pub pieces: Vec<DirectPiece>,
}

/// One read. File offset, place and length are multiples of [`BLOCK_ALIGN`].
#[derive(Debug, Clone, PartialEq)]
pub struct DirectRead {
    /// Which region.
    pub region: u32,
    /// Index of the file.
    pub file: u32,
    /// Offset in the file.
    pub offset: u64,
    /// Offset in the region.
    pub place: u64,
    /// Length.
    pub bytes: u64,
    /// Which of the pieces.
    pub pieces: Range<u32>,
}

/// Bytes of one chunk of the file and of one tensor: a read is cut where either ends.
#[derive(Debug, Clone, PartialEq)]
pub struct DirectPiece {
    /// Offset in the file.
    pub offset: u64,
    /// Offset in the region.
    pub place: u64,
    /// Length.
    pub bytes: u64,
}

impl DirectRead {
    /// Where it lies in the file.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes
    }
}

impl Direct {
    /// Sum of the reads, bytes.
    pub fn bytes(&self) -> u64 {
        self.reads.iter().map(|read| read.bytes).sum()
    }

    /// What a read consists of.
    pub fn pieces_of(&self, read: &DirectRead) -> &[DirectPiece] {
        self.pieces.get(read.pieces.start as usize..read.pieces.end as usize).unwrap_or_default()
    }

    /// The parts of `ranges` of a file that are not read directly.
    pub(super) fn holes(&self, file: u32, ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
        let mut reads = self.reads.iter().filter(|read| read.file == file).map(DirectRead::range).peekable();
        let mut left = Vec::with_capacity(ranges.len());
        for range in ranges {
            let mut at = range.start;
            while let Some(read) = reads.next_if(|read| read.start < range.end) {
                if at < read.start {
                    left.push(at..read.start);
                }
                at = read.end;
            }
            if at < range.end {
                left.push(at..range.end);
            }
        }
        left
    }

    /// Cuts reads that could not be carried out into reads of at most `block_bytes` by way of slots. Their copies are the
    /// pieces, in order. `None` if there are more than [`MOVES_MAX`].
    pub fn by_slots(&self, missed: &[u32], files: &[u64], block_bytes: u64) -> Option<Plan> {
        let mut plan = Plan::default();
        for read in missed.iter().map(|index| self.reads.get(*index as usize)) {
            let read = read?;
            let mut pieces = self.pieces_of(read).iter().peekable();
            let mut at = read.offset;
            while at < read.range().end {
                let next = read.range().end.min((at / block_bytes + 1).checked_mul(block_bytes)?);
                let first = u32::try_from(plan.copies.len()).ok()?;
                // None crosses the end of a block: blocks are whole chunks.
                while let Some(piece) = pieces.next_if(|piece| piece.offset < next) {
                    plan.copies.push(Copy {
                        region: read.region,
                        slot_offset: u32::try_from(piece.offset - at).ok()?,
                        region_offset: piece.place,
                        bytes: piece.bytes,
                        stride: piece.bytes,
                        count: 1,
                    });
                }
                let copies = first..u32::try_from(plan.copies.len()).ok()?;
                let file_bytes = *files.get(read.file as usize)?;
                plan.push(read.file, file_bytes, at, next, Target::Staged(copies))?;
                at = next;
            }
        }
        Some(plan)
    }
}

/// What of `layouts` can go directly; `wanted` says of a region and a file whether it should.
///
/// `None` if a count overflows, or there are more than [`MOVES_MAX`] pieces.
pub fn direct(layouts: &[Layout], files: usize, wanted: impl Fn(u32, u32) -> bool) -> Option<Direct> {
    let mut direct = Direct::default();
    for file in 0..u32::try_from(files).ok()? {
        let mut extents: Vec<(u32, &Extent)> = (0u32..)
            .zip(layouts)
            .flat_map(|(region, layout)| layout.extents.iter().map(move |extent| (region, extent)))
            .filter(|(_, extent)| extent.file == file)
            .collect();
        extents.sort_by_key(|(_, extent)| extent.runs.offset);
        let mut reached = 0;
        // Extents one behind the other in both, and the region of all of them.
        let mut span: Vec<&Extent> = Vec::new();
        let mut owner = 0;
        for (place, (region, extent)) in extents.iter().enumerate() {
            let end = end_of(extent)?;
            let next = extents.get(place + 1).map(|(_, next)| next.runs.offset);
            // What several regions want is read once, and copied to each.
            let alone = reached <= extent.runs.offset && next.is_none_or(|next| end <= next);
            reached = reached.max(end);
            let goes = alone && extent.direct() && wanted(*region, file);
            let joins = span.last().is_some_and(|last| {
                owner == *region
                    && end_of(last) == Some(extent.runs.offset)
                    && last.place + last.runs.bytes == extent.place
            });
            if !(goes && joins) {
                direct.cut(owner, &std::mem::take(&mut span))?;
            }
            if goes {
                owner = *region;
                span.push(extent);
            }
        }
        direct.cut(owner, &span)?;
    }
    Some(direct)
}

/// Where the last row of an extent ends in its file.
fn end_of(extent: &Extent) -> Option<u64> {
    let runs = &extent.runs;
    runs.offset.checked_add((runs.count - 1).checked_mul(runs.stride)?)?.checked_add(runs.bytes)
}

impl Direct {
    /// Adds the reads of one span.
    fn cut(&mut self, region: u32, span: &[&Extent]) -> Option<()> {
        let (Some(first), Some(last)) = (span.first(), span.last()) else { return Some(()) };
        let start = first.runs.offset.checked_next_multiple_of(BLOCK_ALIGN)?;
        let end = end_of(last)?;
        let end = end - end % BLOCK_ALIGN;
        if end < start.checked_add(DIRECT_BYTES_MIN)? {
            return Some(());
        }
        let place_of = |offset: u64| first.place + (offset - first.runs.offset);
        let mut borders = span.iter().filter_map(|extent| end_of(extent)).peekable();
        let mut at = start;
        while at < end {
            let next = end.min((at / DIRECT_BYTES_MAX + 1).checked_mul(DIRECT_BYTES_MAX)?);
            let begun = u32::try_from(self.pieces.len()).ok()?;
            let mut from = at;
            while from < next {
                while borders.next_if(|border| *border <= from).is_some() {}
                let border = borders.peek().copied().unwrap_or(next);
                let to = next.min(border).min((from / CHUNK_BYTES + 1) * CHUNK_BYTES);
                self.pieces.push(DirectPiece { offset: from, place: place_of(from), bytes: to - from });
                from = to;
            }
            let pieces = begun..u32::try_from(self.pieces.len()).ok()?;
            if self.pieces.len() > MOVES_MAX {
                return None;
            }
            self.reads.push(DirectRead {
                region,
                file: first.file,
                offset: at,
                place: place_of(at),
                bytes: next - at,
                pieces,
            });
            at = next;
        }
        Some(())
    }
}
