//! How fast this machine's memory is copied, checksummed and made ready: on one thread, as a shard thread does it.

use std::io;
use std::sync::Arc;

use serde::Serialize;

use super::{Run, Watch};
use crate::checksum;
use crate::sys::copy;
use crate::sys::mem::{HUGE_PAGE_BYTES, Memory, Span};
use crate::sys::pages::{self, PageKind};

/// Bytes that one step handles: a slot's worth, as a load does it.
const STEP_BYTES: usize = 1 << 20;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// An ordinary copy of what is not in the CPU's caches.
    Copy,
    /// The same past the caches of the target.
    StreamingCopy,
    /// CRC-64/NVME of what is not in the CPU's caches.
    Checksum,
    /// Making memory in reserved huge pages ready.
    PopulateHugetlb,
    /// Making memory in transparent huge pages ready.
    PopulateThp,
    /// Making memory in 4 KiB pages ready.
    PopulateSmall,
}

impl Work {
    /// All of them.
    pub const ALL: [Work; 6] = [
        Work::Copy,
        Work::StreamingCopy,
        Work::Checksum,
        Work::PopulateHugetlb,
        Work::PopulateThp,
        Work::PopulateSmall,
    ];

    /// How it is called.
    pub fn as_str(self) -> &'static str {
        match self {
            Work::Copy => "copy",
            Work::StreamingCopy => "streaming copy",
            Work::Checksum => "checksum",
            Work::PopulateHugetlb => "populate, hugetlb",
            Work::PopulateThp => "populate, thp",
            Work::PopulateSmall => "populate, 4k",
        }
    }

    /// The kind of pages that it makes ready, if it is that.
    fn populates(self) -> Option<PageKind> {
        match self {
            Work::PopulateHugetlb => Some(PageKind::Hugetlb),
            Work::PopulateThp => Some(PageKind::Thp),
            Work::PopulateSmall => Some(PageKind::Small),
            Work::Copy | Work::StreamingCopy | Work::Checksum => None,
        }
    }
}

/// Memory to work on.
#[derive(Debug)]
pub struct Bench {
    source: Span,
    target: Span,
    bytes: u64,
    /// Kind of pages that the copies and the checksum work on.
    pub pages: PageKind,
}

impl Bench {
    /// Takes two ranges of `bytes`, rounded up to 2 MiB, in the best pages that can be had, all of them touched.
    pub fn new(bytes: u64) -> io::Result<Bench> {
        let bytes =
            bytes.max(1).checked_next_multiple_of(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let kinds = [PageKind::Hugetlb, PageKind::Thp, PageKind::Small].into_iter();
        let mut last = io::Error::from(io::ErrorKind::OutOfMemory);
        for pages in kinds.filter(|kind| pages::probe(*kind).is_ok()) {
            match ready(bytes, pages).and_then(|source| Ok((source, ready(bytes, pages)?))) {
                Ok((mut source, target)) => {
                    for (place, step) in source.as_mut_slice().chunks_mut(STEP_BYTES).enumerate() {
                        step.fill(place as u8);
                    }
                    return Ok(Bench { source, target, bytes, pages });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Does the work once over all of the memory.
    ///
    /// # Errors
    /// `Unsupported` with the reason if this machine has no such pages.
    pub fn run(&mut self, work: Work) -> io::Result<Run> {
        if let Some(kind) = work.populates() {
            pages::probe(kind).map_err(|why| io::Error::new(io::ErrorKind::Unsupported, why))?;
            let watch = Watch::start();
            let memory = Memory::new(self.bytes, kind)?;
            memory.populate(0, self.bytes)?;
            let run = watch.run(self.bytes);
            drop(memory);
            return Ok(run);
        }
        let (source, target) = (self.source.as_slice(), self.target.as_mut_slice());
        let watch = Watch::start();
        for (from, to) in source.chunks(STEP_BYTES).zip(target.chunks_mut(STEP_BYTES)) {
            match work {
                Work::StreamingCopy => copy::streaming(from, to),
                Work::Checksum => drop(std::hint::black_box(checksum::chunk(from))),
                _ => to.copy_from_slice(std::hint::black_box(from)),
            }
        }
        Ok(watch.run(self.bytes))
    }
}

fn ready(bytes: u64, pages: PageKind) -> io::Result<Span> {
    let memory = Memory::new(bytes, pages)?;
    memory.populate(0, bytes)?;
    Arc::new(memory).claim(0, bytes).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_work_does_all_of_its_bytes_or_says_why_not() {
        let mut bench = Bench::new(3 << 20).unwrap();
        for work in Work::ALL {
            match bench.run(work) {
                Ok(run) => assert_eq!(run.bytes, 4 << 20, "{work:?}"),
                Err(error) => {
                    assert_eq!((error.kind(), work.populates().is_some()), (io::ErrorKind::Unsupported, true))
                }
            }
        }
        for (from, to) in [(Work::Copy, 7), (Work::StreamingCopy, 9)] {
            bench.source.as_mut_slice().fill(to);
            bench.run(from).unwrap();
            assert!(bench.target.as_slice().iter().all(|byte| *byte == to), "{from:?}");
        }
    }
}
