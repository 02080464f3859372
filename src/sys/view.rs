//! Reading from a region of this daemon while it is still being filled.
//!
//! A [`View`] maps the parts of a region a second time, read-only, and lets bytes be read piece by piece: a piece can be
//! read once it was frozen, and it can be frozen only while no [`Span`](super::mem::Span) reaches into it. From then on
//! nobody can claim a span of it, so nobody writes to it, for as long as the view is there. A view of sealed memory is
//! frozen from the start.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::map;
use super::mem::{Claims, Memory, SPAN_ALIGN, Sealed};

/// The parts of a region, to be read piece by piece.
#[derive(Debug)]
pub struct View {
    map: map::Range,
    /// Offset and bytes of each piece.
    pieces: Box<[(u64, u32)]>,
    /// One bit for each piece: set once it is frozen.
    frozen: Box<[AtomicU64]>,
    /// Of each part: where it lies in the region, and its claims. None of sealed memory, which nobody writes to.
    claims: Vec<(Range<u64>, Arc<Claims>)>,
}

impl View {
    /// A view of memory that is being filled. No piece can be read yet.
    ///
    /// `pieces` are offsets in the region, which the parts make up one behind the other, and bytes. The region is not in use
    /// by others than its spans: memory that is viewed cannot be shrunk, and can be sealed.
    ///
    /// # Errors
    /// `InvalidInput` if a piece is not inside the region, does not begin on a multiple of [`SPAN_ALIGN`], or shares such a
    /// unit with the one before it; else what `mmap` gives.
    pub fn filling(parts: &[&Memory], pieces: Vec<(u64, u32)>) -> io::Result<View> {
        let fds: Vec<_> = parts.iter().map(|part| (part.fd(), part.bytes())).collect();
        let mut at = 0;
        let claims = parts.iter().map(|part| {
            let place = at..at + part.bytes();
            at = place.end;
            (place, Arc::clone(part.claims()))
        });
        // Taken before anything is mapped: from here on the memory cannot be shrunk.
        let claims = claims.collect();
        View::of(map::Range::of(&fds)?, pieces, claims)
    }

    /// A view of sealed memory: every piece can be read.
    ///
    /// # Errors
    /// As [`View::filling`].
    pub fn sealed(parts: &[&Sealed], pieces: Vec<(u64, u32)>) -> io::Result<View> {
        let fds: Vec<_> = parts.iter().map(|part| (part.as_fd(), part.bytes())).collect();
        let view = View::of(map::Range::of(&fds)?, pieces, Vec::new())?;
        for word in &view.frozen {
            word.store(u64::MAX, Ordering::Release);
        }
        Ok(view)
    }

    fn of(
        map: map::Range,
        pieces: Vec<(u64, u32)>,
        claims: Vec<(Range<u64>, Arc<Claims>)>,
    ) -> io::Result<View> {
        let mut end = 0;
        for (offset, bytes) in &pieces {
            let apart = offset.is_multiple_of(SPAN_ALIGN) && *offset >= end;
            end = offset
                .checked_add(u64::from(*bytes))
                .filter(|end| apart && *end <= map.bytes() as u64)
                .ok_or(io::ErrorKind::InvalidInput)?
                .next_multiple_of(SPAN_ALIGN);
        }
        let frozen = (0..pieces.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(View { map, pieces: pieces.into(), frozen, claims })
    }

    /// Lets a piece be read, for good. False if there is no such piece, or if a span reaches into it.
    pub fn freeze(&self, piece: usize) -> bool {
        let Some((offset, bytes)) = self.pieces.get(piece).copied() else { return false };
        if self.is_frozen(piece) {
            return true;
        }
        let units = || self.units(offset, bytes);
        for (number, (claims, range)) in units().enumerate() {
            if !claims.take(range) {
                for (claims, range) in units().take(number) {
                    claims.release(range);
                }
                // Or else another thread has just frozen it.
                return self.is_frozen(piece);
            }
        }
        self.frozen[piece / 64].fetch_or(1 << (piece % 64), Ordering::Release);
        true
    }

    /// Whether a piece can be read.
    pub fn is_frozen(&self, piece: usize) -> bool {
        let word = self.frozen.get(piece / 64).filter(|_| piece < self.pieces.len());
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (piece % 64) & 1 == 1)
    }

    /// The bytes of a piece, once it is frozen.
    pub fn piece(&self, piece: usize) -> Option<&[u8]> {
        if !self.is_frozen(piece) {
            return None;
        }
        let (offset, bytes) = self.pieces[piece];
        // SAFETY: `of` checked that the piece is inside the mapping.
        let start = unsafe { self.map.address().add(offset as usize) };
        // SAFETY: the bytes are mapped for as long as `self`; they are inside their memory, which cannot be shrunk (`filling`,
        // or its seals). Nobody writes to them: writes go through spans, and the claims of this piece, which are given back
        // only when `self` is dropped, keep spans away; sealed memory has no spans. What spans wrote before is visible:
        // `Claims::take` and `is_frozen` acquire what their release published.
        Some(unsafe { std::slice::from_raw_parts(start, bytes as usize) })
    }

    /// The claims of the parts that a piece lies in, each with the units of its memory that the piece touches.
    fn units(&self, offset: u64, bytes: u32) -> impl Iterator<Item = (&Claims, Range<u64>)> {
        let end = offset + u64::from(bytes);
        self.claims.iter().filter_map(move |(place, claims)| {
            let (from, to) = (offset.max(place.start), end.min(place.end));
            let range =
                (from - place.start.min(from)) / SPAN_ALIGN..(to - place.start.min(to)).div_ceil(SPAN_ALIGN);
            (from < to).then_some((claims.as_ref(), range))
        })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        for (piece, (offset, bytes)) in self.pieces.iter().enumerate() {
            if self.is_frozen(piece) {
                self.units(*offset, *bytes).for_each(|(claims, range)| claims.release(range));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mem::HUGE_PAGE_BYTES;
    use super::super::pages::PageKind;
    use super::*;

    fn memory() -> Arc<Memory> {
        Arc::new(Memory::new(HUGE_PAGE_BYTES, PageKind::Small).unwrap())
    }

    fn write(memory: &Arc<Memory>, offset: u64, bytes: &[u8]) {
        memory.claim(offset, bytes.len() as u64).unwrap().as_mut_slice().copy_from_slice(bytes);
    }

    #[test]
    fn a_piece_is_read_once_it_is_frozen_and_is_not_written_again_invariant_2() {
        let memory = memory();
        let view = View::filling(&[&memory], vec![(4096, 5000), (16384, 3)]).unwrap();
        write(&memory, 4096, &[7; 5000]);
        assert_eq!(view.piece(0), None);
        let span = memory.claim(8192, 1).unwrap();
        assert!(!view.freeze(0), "a span reaches into it");
        drop(span);
        assert!(view.freeze(0) && view.freeze(0));
        assert_eq!(view.piece(0), Some(&[7; 5000][..]));
        assert_eq!((view.piece(1), view.piece(2), view.freeze(2)), (None, None, false));
        assert!(memory.claim(8192, 1).is_none() && memory.claim(0, HUGE_PAGE_BYTES).is_none());
        assert!(memory.claim(12288, 1).is_some(), "behind its last unit");
        drop(view);
        assert!(memory.claim(0, HUGE_PAGE_BYTES).is_some(), "claims are given back with the view");
    }

    #[test]
    fn a_piece_that_straddles_parts_is_one() {
        let (one, two) = (memory(), memory());
        let view = View::filling(&[&one, &two], vec![(HUGE_PAGE_BYTES - 4096, 8192)]).unwrap();
        write(&one, HUGE_PAGE_BYTES - 4096, &[1; 4096]);
        write(&two, 0, &[2; 4096]);
        let span = two.claim(0, 1).unwrap();
        assert!(!view.freeze(0));
        assert!(
            one.claim(HUGE_PAGE_BYTES - 4096, 1).is_some(),
            "what was taken of the first part is given back"
        );
        drop(span);
        assert!(view.freeze(0));
        let piece = view.piece(0).unwrap();
        assert!(piece[..4096].iter().all(|byte| *byte == 1) && piece[4096..].iter().all(|byte| *byte == 2));
        assert!(one.claim(HUGE_PAGE_BYTES - 4096, 1).is_none() && two.claim(0, 1).is_none());
    }

    #[test]
    fn viewed_memory_is_not_shrunk_and_can_be_sealed() {
        let memory = Memory::new(2 * HUGE_PAGE_BYTES, PageKind::Small).unwrap();
        let view = View::filling(&[&memory], vec![(2 * HUGE_PAGE_BYTES - 4096, 4096)]).unwrap();
        assert!(memory.shrink(HUGE_PAGE_BYTES).is_err());
        assert!(view.freeze(0));
        assert_eq!(view.piece(0), Some(&[0; 4096][..]), "there is no page that was cut off");

        let memory = self::memory();
        write(&memory, 0, b"lode");
        let view = View::filling(&[&memory], vec![(0, 4)]).unwrap();
        assert!(view.freeze(0));
        let (sealed, retired) = Arc::into_inner(memory).unwrap().seal().unwrap();
        let second = View::sealed(&[&sealed], vec![(0, 4)]).unwrap();
        drop((retired, sealed));
        assert_eq!((view.piece(0), second.piece(0)), (Some(&b"lode"[..]), Some(&b"lode"[..])));
    }

    #[test]
    fn pieces_that_are_not_apart_or_not_inside_are_refused() {
        let memory = memory();
        for pieces in [
            vec![(1, 1)],
            vec![(0, 4097), (4096, 1)],
            vec![(4096, 1), (0, 1)],
            vec![(HUGE_PAGE_BYTES, 1)],
            vec![(HUGE_PAGE_BYTES - 4096, 4097)],
            vec![(u64::MAX - 4095, 4096)],
        ] {
            let error = View::filling(&[&memory], pieces).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
