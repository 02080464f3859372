//! What is resident: the bytes of an artifact, or of a selection of one, and where they lie.

use std::sync::Arc;

use crate::catalog::Description;
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
    /// Digest of the manifest, if all bytes were read.
    pub digest: Option<String>,
    /// Checksums of what is resident. On the host tier: of the ranges in `chunks`. On a GPU: of the tensors, then of what
    /// is resident as whole files, in their order.
    pub checks: Box<[u64]>,
    /// On the host tier, the ranges of the region that `checks` are of: offset and bytes. No bytes: the range was put
    /// together from parts of what was read, and cannot be checked by itself.
    pub chunks: Box<[(u64, u32)]>,
    /// The memory.
    pub region: Region,
}

impl Content {
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
