//! What is resident: the bytes of an artifact, or of a selection of one, and where they lie.

use std::sync::Arc;

use crate::catalog::Description;
use crate::catalog::manifest::Manifest;
use crate::checksum;
use crate::peer::offered::Offered;
use crate::plan::Placed;
use crate::sys::cuda::DeviceMemory;
use crate::sys::mem::Sealed;

/// Content of a resident entry; immutable.
#[derive(Debug)]
pub struct Content {
    /// Files, tensors, metadata.
    pub description: Description,
    /// Where each file lies that is resident whole.
    pub files: Vec<Option<u64>>,
    /// Where the tensors lie.
    pub tensors: Vec<Placed>,
    /// The manifest, if all bytes were read once.
    pub manifest: Option<Arc<Manifest>>,
    /// Checksums of what is resident. As in its files: of the ranges in `chunks`. Packed: of the tensors, then of what is
    /// resident as whole files, in their order.
    pub checks: Box<[u64]>,
    /// As in its files, the ranges of the region that `checks` are of: offset and bytes. No bytes: the range was put
    /// together from parts of what was read, and cannot be checked by itself.
    pub chunks: Box<[(u64, u32)]>,
    /// The memory.
    pub region: Region,
    /// Peers may have it, until this is dropped.
    pub offered: Option<Offered>,
}

/// A range of a region, and the checksum that it must have.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Offset in the region.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// The checksum.
    pub sum: u64,
}

impl Content {
    /// Digest of the manifest, if all bytes were read once.
    pub fn digest(&self) -> Option<&str> {
        self.manifest.as_ref().map(|manifest| manifest.digest())
    }

    /// What lies where in a packed region: its tensors, then what is resident as whole files.
    pub fn packed(&self) -> Vec<Piece> {
        let tensors = self.tensors.iter().map(|tensor| (tensor.offset, tensor.nbytes));
        let files = self.files.iter().zip(&self.description.files);
        let files = files.filter_map(|(place, file)| Some(((*place)?, file.bytes)));
        let places = tensors.chain(files).zip(self.checks.iter().copied());
        places.map(|((offset, bytes), sum)| Piece { offset, bytes, sum }).collect()
    }

    /// The checksum of all of a packed region: what lies between its pieces is zeros.
    pub fn packed_sum(&self) -> u64 {
        let mut pieces = self.packed();
        pieces.retain(|piece| piece.bytes > 0);
        pieces.sort_by_key(|piece| piece.offset);
        let zeros = |count: u64| checksum::chunk(&vec![0; usize::try_from(count).unwrap_or_default()]);
        let (mut at, mut sum) = (0, checksum::EMPTY);
        for piece in pieces {
            let gap = piece.offset - at;
            sum = checksum::combine(sum, zeros(gap), gap);
            sum = checksum::combine(sum, piece.sum, piece.bytes);
            at = piece.offset + piece.bytes;
        }
        let rest = self.bytes() - at;
        checksum::combine(sum, zeros(rest), rest)
    }

    /// Length of the region, bytes.
    pub fn bytes(&self) -> u64 {
        match &self.region {
            Region::Host(parts) => parts.iter().map(Sealed::bytes).sum(),
            Region::Gpu(memory) => memory.bytes(),
        }
    }

    /// `hugetlb`, `thp`, `4k`, or `mixed`; `device` for the memory of a GPU.
    pub fn pages(&self) -> &'static str {
        let Region::Host(parts) = &self.region else { return "device" };
        let mut kinds = parts.iter().map(Sealed::pages);
        match kinds.next() {
            Some(first) if kinds.all(|kind| kind == first) => first.as_str(),
            Some(_) => "mixed",
            None => "4k",
        }
    }
}

/// The memory of a resident entry.
#[derive(Debug)]
pub enum Region {
    /// Sealed parts on the host tier.
    Host(Vec<Sealed>),
    /// One allocation of a GPU.
    Gpu(Arc<DeviceMemory>),
}
