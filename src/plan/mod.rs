//! Pure planning: from what is wanted of an artifact to where it lies in a region, and to the reads that fill it.
//!
//! No I/O, no clock, no randomness. Two steps: [`layout`] decides where each byte will lie, before any memory is
//! taken; [`moves()`] cuts that into reads once the parts of the region are known.
//!
//! A read lands *directly* in its final place where file offset and region offset agree modulo 4 KiB, as O_DIRECT
//! demands. So whole files and contiguous pieces are placed to agree, at the price of a few unused bytes around
//! them. What cannot agree (rows of a slice along an inner dimension, data that would lie misaligned for its type)
//! goes by way of a slot and is copied to its place.

use crate::catalog::Tensor;
use crate::catalog::select::{Pick, Runs};
use crate::checksum::CHUNK_BYTES;

mod direct;
mod moves;
mod scatter;
pub mod spread;
pub use direct::{DIRECT_BYTES_MAX, DIRECT_BYTES_MIN, Direct, DirectPiece, DirectRead, direct};
pub use moves::{Copy, MOVES_MAX, Move, Plan, Target, moves};
pub use scatter::scatter;

/// O_DIRECT's unit: offsets and lengths of reads are multiples of it, bytes.
pub const BLOCK_ALIGN: u64 = 4096;

/// Alignment of tensors in the memory of a GPU, bytes: what its copy engines and kernels want, and what allocators of
/// frameworks give.
pub const TENSOR_ALIGN: u64 = 512;

/// Alignment that a file's data gets when its own header leaves it misaligned for its types, bytes.
const DATA_ALIGN: u64 = 64;

/// Where everything lies in a region.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Length of the region before rounding up to pages, bytes.
    pub bytes: u64,
    /// For each file, where it lies if it is resident whole.
    pub files: Vec<Option<u64>>,
    /// Where the wanted tensors lie.
    pub tensors: Vec<Placed>,
    /// Everything of the artifact is wanted, so all bytes of its files are read.
    pub whole: bool,
    /// Contiguous pieces to be filled.
    extents: Vec<Extent>,
}

/// A tensor, or a slice of one, in a region.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// Index into the artifact's tensors.
    pub tensor: usize,
    /// Shape of what is resident.
    pub shape: Vec<u64>,
    /// Byte offset in the region.
    pub offset: u64,
    /// Bytes.
    pub nbytes: u64,
}

/// Bytes of one file and where they go.
#[derive(Debug, Clone, PartialEq)]
struct Extent {
    file: u32,
    runs: Runs,
    /// Region offset of the first byte; the runs lie there one behind the other.
    place: u64,
}

impl Extent {
    /// Whether reads of this extent can land in place.
    fn direct(&self) -> bool {
        self.runs.count == 1 && self.place % BLOCK_ALIGN == self.runs.offset % BLOCK_ALIGN
    }
}

/// Lays out whole files (`picks` is `None`) or the picked tensors. `None` if offsets would overflow.
///
/// `files` are the sizes in bytes.
pub fn layout(files: &[u64], tensors: &[Tensor], picks: Option<&[Pick]>) -> Option<Layout> {
    match picks {
        None => whole(files, tensors),
        Some(picks) => picked(files, tensors, picks),
    }
}

fn whole(files: &[u64], tensors: &[Tensor]) -> Option<Layout> {
    let mut layout =
        Layout { bytes: 0, files: Vec::new(), tensors: Vec::new(), whole: true, extents: Vec::new() };
    for (file, bytes) in files.iter().copied().enumerate() {
        // Chunks do not straddle parts (multiples of 2 MiB): a large file begins on a chunk boundary, a small one
        // does not cross any.
        let crosses =
            layout.bytes / CHUNK_BYTES != layout.bytes.checked_add(bytes)?.div_ceil(CHUNK_BYTES).max(1) - 1;
        let align = if bytes >= CHUNK_BYTES || crosses { CHUNK_BYTES } else { BLOCK_ALIGN };
        let aligned = layout.bytes.checked_next_multiple_of(align)?;
        let place = aligned.checked_add(shift(file as u32, tensors))?;
        layout.files.push(Some(place));
        layout.bytes = place.checked_add(bytes)?.checked_next_multiple_of(BLOCK_ALIGN)?;
        if bytes > 0 {
            let runs = Runs { offset: 0, bytes, stride: bytes, count: 1 };
            layout.extents.push(Extent { file: file as u32, runs, place });
        }
    }
    for (index, tensor) in tensors.iter().enumerate() {
        let offset = layout.files.get(tensor.file as usize).copied().flatten()?.checked_add(tensor.offset)?;
        layout.tensors.push(Placed {
            tensor: index,
            shape: tensor.shape.clone(),
            offset,
            nbytes: tensor.nbytes,
        });
    }
    Some(layout)
}

/// How far a file is moved off its block boundary so that its tensors are aligned for their types: 0 for nearly
/// every file, as writers pad the header.
fn shift(file: u32, tensors: &[Tensor]) -> u64 {
    let mut own = tensors.iter().filter(|tensor| tensor.file == file);
    if own.clone().all(|tensor| tensor.offset.is_multiple_of(tensor.element_align)) {
        return 0;
    }
    let start = own.by_ref().map(|tensor| tensor.offset).min().unwrap_or(0);
    (DATA_ALIGN - start % DATA_ALIGN) % DATA_ALIGN
}

fn picked(files: &[u64], tensors: &[Tensor], picks: &[Pick]) -> Option<Layout> {
    let mut layout = Layout::nothing_of(files.len());
    for pick in picks {
        let tensor = tensors.get(pick.tensor)?;
        let runs = pick.runs.clone();
        let nbytes = runs.bytes.checked_mul(runs.count)?;
        let straight = runs.count == 1 && runs.offset.is_multiple_of(tensor.element_align);
        let place = if straight {
            layout.place_straight(tensor.file, &runs)?
        } else {
            let place = layout.bytes;
            layout.bytes = place.checked_add(nbytes)?.checked_next_multiple_of(BLOCK_ALIGN)?;
            if nbytes > 0 {
                layout.extents.push(Extent { file: tensor.file, runs, place });
            }
            place
        };
        layout.tensors.push(Placed { tensor: pick.tensor, shape: pick.shape.clone(), offset: place, nbytes });
    }
    Some(layout)
}

impl Layout {
    /// Places contiguous bytes of a file so that they can be read in place; joins them to the extent before if they
    /// touch a block of it, so that no block is read twice.
    fn place_straight(&mut self, file: u32, runs: &Runs) -> Option<u64> {
        let end = runs.offset.checked_add(runs.bytes)?;
        if let Some(last) = self.extents.last_mut().filter(|last| last.file == file && last.direct()) {
            let last_end = last.runs.offset + last.runs.bytes;
            let touches = last_end.next_multiple_of(BLOCK_ALIGN) >= runs.offset - runs.offset % BLOCK_ALIGN;
            if runs.offset >= last_end && touches {
                last.runs.bytes = end - last.runs.offset;
                last.runs.stride = last.runs.bytes;
                let place = last.place + (runs.offset - last.runs.offset);
                self.bytes = place.checked_add(runs.bytes)?.checked_next_multiple_of(BLOCK_ALIGN)?;
                return Some(place);
            }
        }
        let place = self.bytes.checked_add(runs.offset % BLOCK_ALIGN)?;
        self.bytes = place.checked_add(runs.bytes)?.checked_next_multiple_of(BLOCK_ALIGN)?;
        if runs.bytes > 0 {
            self.extents.push(Extent { file, runs: runs.clone(), place });
        }
        Some(place)
    }
}

/// Lays out tensors for a GPU: each begins on a multiple of [`TENSOR_ALIGN`], in file order. What has no tensors is laid
/// out whole. What begins on such a multiple in its file agrees with it modulo [`BLOCK_ALIGN`], for the sake of
/// [`direct()`]. `None` if offsets would overflow.
///
/// `files` are the sizes in bytes. Headers are not part of the region.
pub fn packed(files: &[u64], tensors: &[Tensor], picks: Option<&[Pick]>) -> Option<Layout> {
    let mut layout = Layout::nothing_of(files.len());
    if let Some(picks) = picks {
        for pick in picks {
            let file = tensors.get(pick.tensor)?.file;
            layout.pack(pick.tensor, file, pick.shape.clone(), pick.runs.clone())?;
        }
        return Some(layout);
    }
    layout.whole = true;
    let mut with_tensors = vec![false; files.len()];
    for (index, tensor) in tensors.iter().enumerate() {
        *with_tensors.get_mut(tensor.file as usize)? = true;
        let runs = Runs { offset: tensor.offset, bytes: tensor.nbytes, stride: tensor.nbytes, count: 1 };
        layout.pack(index, tensor.file, tensor.shape.clone(), runs)?;
    }
    for (file, bytes) in (0u32..).zip(files.iter().copied()) {
        if !with_tensors[file as usize] {
            let runs = Runs { offset: 0, bytes, stride: bytes, count: 1 };
            layout.files[file as usize] = Some(layout.place_packed(file, runs)?);
        }
    }
    Some(layout)
}

impl Layout {
    /// What is placed where: file, bytes of it, region offset.
    pub fn runs(&self) -> impl Iterator<Item = (u32, &Runs, u64)> {
        self.extents.iter().map(|extent| (extent.file, &extent.runs, extent.place))
    }

    /// What can be checked by itself: the tensors, then what is resident as whole files; region offset and bytes.
    /// `files` are the sizes in bytes.
    pub fn pieces(&self, files: &[u64]) -> Vec<(u64, u64)> {
        let whole = self.files.iter().zip(files).filter_map(|(place, bytes)| Some(((*place)?, *bytes)));
        self.tensors.iter().map(|tensor| (tensor.offset, tensor.nbytes)).chain(whole).collect()
    }

    /// Sum of what is placed, bytes.
    pub fn wanted_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.runs.bytes * extent.runs.count).sum()
    }

    fn nothing_of(files: usize) -> Layout {
        Layout { bytes: 0, files: vec![None; files], tensors: Vec::new(), whole: false, extents: Vec::new() }
    }

    fn pack(&mut self, tensor: usize, file: u32, shape: Vec<u64>, runs: Runs) -> Option<()> {
        let nbytes = runs.bytes.checked_mul(runs.count)?;
        let offset = self.place_packed(file, runs)?;
        self.tensors.push(Placed { tensor, shape, offset, nbytes });
        Some(())
    }

    fn place_packed(&mut self, file: u32, mut runs: Runs) -> Option<u64> {
        let nbytes = runs.bytes.checked_mul(runs.count)?;
        if runs.stride == runs.bytes {
            runs = Runs { offset: runs.offset, bytes: nbytes, stride: nbytes, count: 1 };
        }
        let could_agree = runs.count == 1 && runs.offset.is_multiple_of(TENSOR_ALIGN);
        let gap = if could_agree && nbytes >= DIRECT_BYTES_MIN {
            (runs.offset % BLOCK_ALIGN + BLOCK_ALIGN - self.bytes % BLOCK_ALIGN) % BLOCK_ALIGN
        } else {
            0
        };
        let place = self.bytes.checked_add(gap)?;
        self.bytes = place.checked_add(nbytes)?.checked_next_multiple_of(TENSOR_ALIGN)?;
        if nbytes > 0 {
            self.extents.push(Extent { file, runs, place });
        }
        Some(place)
    }
}

#[cfg(test)]
mod tests;
