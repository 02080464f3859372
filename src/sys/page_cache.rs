//! What the page cache holds of a file, and making it hold less.

use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct cachestat_range` of the kernel.
#[repr(C)]
struct Range {
    offset: u64,
    bytes: u64,
}

/// `struct cachestat` of the kernel; all counts in pages.
#[repr(C)]
#[derive(Default)]
struct Counts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// System call number of cachestat(2), Linux 6.5; the same on every architecture.
const CACHESTAT: libc::c_long = 451;

/// Small pages of `bytes` from `offset` on that the page cache holds. 0 where the kernel cannot tell (before 6.5).
pub fn cached_pages(file: BorrowedFd<'_>, offset: u64, bytes: u64) -> u64 {
    let range = Range { offset, bytes };
    let mut counts = Counts::default();
    // SAFETY: both structures are laid out as the kernel's and outlive the call; it reads one and writes the other.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &range, &mut counts, 0) };
    if result == 0 { counts.cached } else { 0 }
}

/// Drops clean pages of `bytes` from `offset` on from the page cache.
pub fn drop_pages(file: BorrowedFd<'_>, offset: u64, bytes: u64) {
    // A refusal leaves the cache as it is; nothing depends on it.
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(bytes), rustix::fs::Advice::DontNeed);
}
