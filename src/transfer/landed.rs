//! What has arrived: the checksums of the pieces that the two ways have left, put together to those of the files' chunks
//! and of what lies in a region.

use std::sync::atomic::Ordering;

use crate::checksum::{self, CHUNK_BYTES};
use crate::plan::Direct;
use crate::shard::{Batch, DirectShare};

/// Bytes that lie together in a file or in a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    /// Which file, or which region.
    of: u32,
    offset: u64,
    bytes: u64,
    sum: u64,
}

/// What has arrived of one load, by whatever way.
#[derive(Debug, Default)]
pub(super) struct Landed {
    in_files: Vec<Piece>,
    in_regions: Vec<Piece>,
}

/// A chunk of a file that has arrived whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) file: u32,
    /// Number of the chunk in its file.
    pub(super) number: u64,
    pub(super) sum: u64,
}

impl Landed {
    /// Takes in what came by slots.
    pub(super) fn by_slots(&mut self, batch: &Batch) {
        let plan = &batch.plan;
        for step in &plan.moves {
            let sums = batch.checks.get(step.first_check as usize..).unwrap_or_default();
            self.in_files.extend(step.pieces().zip(sums).map(|(piece, sum)| Piece {
                of: step.file,
                offset: piece.start,
                bytes: piece.end - piece.start,
                sum: sum.load(Ordering::Acquire),
            }));
        }
        self.in_regions.extend(plan.copies.iter().zip(&batch.copy_checks).map(|(copy, sum)| Piece {
            of: copy.region,
            offset: copy.region_offset,
            bytes: copy.bytes * copy.count,
            sum: sum.load(Ordering::Acquire),
        }));
    }

    /// Takes in what came directly.
    pub(super) fn directly(&mut self, share: &DirectShare) {
        let sums = share.sums();
        let plan: &Direct = &share.plan;
        for read in share.carried_out() {
            let own = sums.get(read.pieces.start as usize..).unwrap_or_default();
            for (piece, sum) in plan.pieces_of(read).iter().zip(own) {
                let (bytes, sum) = (piece.bytes, *sum);
                self.in_files.push(Piece { of: read.file, offset: piece.offset, bytes, sum });
                self.in_regions.push(Piece { of: read.region, offset: piece.place, bytes, sum });
            }
        }
    }

    /// Nothing more comes.
    pub(super) fn sort(&mut self) {
        self.in_files.sort_unstable();
        self.in_regions.sort_unstable();
    }

    /// The chunks that have arrived whole, in order. `files` are the sizes in bytes.
    pub(super) fn chunks(&self, files: &[u64]) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        let mut open: Option<Piece> = None;
        for piece in &self.in_files {
            let joined = match open {
                Some(Piece { of, offset, bytes, sum })
                    if of == piece.of && offset + bytes == piece.offset =>
                {
                    let sum = checksum::combine(sum, piece.sum, piece.bytes);
                    Some(Piece { of, offset, bytes: bytes + piece.bytes, sum })
                }
                _ => piece.offset.is_multiple_of(CHUNK_BYTES).then_some(*piece),
            };
            let whole = |chunk: &Piece| {
                let end = chunk.offset + chunk.bytes;
                end.is_multiple_of(CHUNK_BYTES) || files.get(chunk.of as usize) == Some(&end)
            };
            open = joined.filter(|chunk| !whole(chunk));
            if let Some(chunk) = joined.filter(whole) {
                chunks.push(Chunk { file: chunk.of, number: chunk.offset / CHUNK_BYTES, sum: chunk.sum });
            }
        }
        chunks
    }

    /// The checksum of each of `pieces` (offset and bytes) of a region.
    pub(super) fn of_region(&self, region: u32, pieces: &[(u64, u64)]) -> Box<[u64]> {
        let checks = pieces.iter().map(|(offset, bytes)| {
            let first = self.in_regions.partition_point(|piece| (piece.of, piece.offset) < (region, *offset));
            let inside = self.in_regions[first..]
                .iter()
                .take_while(|piece| piece.of == region && piece.offset < offset + bytes);
            inside.fold(checksum::EMPTY, |sum, piece| checksum::combine(sum, piece.sum, piece.bytes))
        });
        checks.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_put_together_from_both_ways_or_not_at_all() {
        const CHUNK: usize = CHUNK_BYTES as usize;
        let file: Vec<u8> = (0..2 * CHUNK + 77).map(|at| ((at * 31) >> 3) as u8).collect();
        let mut landed = Landed::default();
        // The second chunk lacks its middle.
        for range in [0..4096, 4096..70_000, 70_000..CHUNK, CHUNK..CHUNK + 9, CHUNK + 10..2 * CHUNK] {
            landed.in_files.push(Piece {
                of: 0,
                offset: range.start as u64,
                bytes: range.len() as u64,
                sum: checksum::chunk(&file[range]),
            });
        }
        let sum = checksum::chunk(&file[2 * CHUNK..]);
        landed.in_files.push(Piece { of: 0, offset: 2 * CHUNK_BYTES, bytes: 77, sum });
        landed.in_files.reverse();
        landed.sort();
        let first = Chunk { file: 0, number: 0, sum: checksum::chunk(&file[..CHUNK]) };
        assert_eq!(landed.chunks(&[file.len() as u64]), [first, Chunk { file: 0, number: 2, sum }]);
    }
}
