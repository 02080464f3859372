//! Shared memory of the host tier: one memfd, mapped writable by the daemon until it is sealed.
//!
//! [`Memory`] is one such mapping. Bytes are reached only through a [`Span`], an exclusive claim on a range:
//! two spans never overlap, which is checked at run time, so a span can be handed to the kernel as the target
//! of a read and be lent as a slice without `unsafe` at the call site.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::pages::PageKind;

/// Spans begin on multiples of this, bytes: the unit of O_DIRECT and of a small page.
pub const SPAN_ALIGN: u64 = 4096;

/// Sizes of memory are multiples of this, bytes: one huge page.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// One memfd, mapped writable by this process and by nobody else.
#[derive(Debug)]
pub struct Memory {
    fd: OwnedFd,
    mapping: Mapping,
    pages: PageKind,
    /// Shared with the views of this memory.
    claims: Arc<Claims>,
}

/// Which units of [`SPAN_ALIGN`] bytes of a memory are claimed: each by one span, or by the view that lets them be read.
#[derive(Debug)]
pub(super) struct Claims(Box<[AtomicU64]>);

impl Claims {
    fn new(bytes: u64) -> Claims {
        let words = (bytes / SPAN_ALIGN).div_ceil(64);
        Claims((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// Claims `units`, which lie inside the memory; false, and nothing is claimed, if one of them is claimed already.
    pub(super) fn take(&self, units: std::ops::Range<u64>) -> bool {
        let mut taken = units.start;
        for (word, mask) in masks(units.clone()) {
            let before = self.0[word].fetch_or(mask, Ordering::Acquire);
            if before & mask != 0 {
                // Another has some of these units: give back exactly what this call has set.
                self.0[word].fetch_and(!(mask & !before), Ordering::Release);
                self.release(units.start..taken);
                return false;
            }
            taken = (word as u64 + 1) * 64;
        }
        true
    }

    /// Gives back what was claimed.
    pub(super) fn release(&self, units: std::ops::Range<u64>) {
        for (word, mask) in masks(units) {
            self.0[word].fetch_and(!mask, Ordering::Release);
        }
    }
}

/// An address range of this process, unmapped on drop.
#[derive(Debug)]
struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is plain memory that any thread may use; exclusive use of its bytes is the business of `Span`.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` alone gives access to no byte.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `Memory::new`, and every span, which keeps the mapping alive, is gone.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

impl Memory {
    /// New zeroed memory of `bytes`, a positive multiple of [`HUGE_PAGE_BYTES`], in pages of the given kind.
    ///
    /// hugetlb pages are reserved here, so that touching them later cannot fail; the others are faulted in by
    /// their first use, or by [`Memory::populate`].
    pub fn new(bytes: u64, pages: PageKind) -> io::Result<Memory> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        if bytes == 0 || !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return Err(invalid());
        }
        let length = usize::try_from(bytes).map_err(|_| invalid())?;
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if pages == PageKind::Hugetlb {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = rustix::fs::memfd_create("lodestream", flags)?;
        rustix::fs::ftruncate(&fd, bytes)?;
        let mapping = Mapping::writable(&fd, length, pages)?;
        if pages == PageKind::Thp {
            // SAFETY: advice on a range that `mapping` owns; it changes no content.
            unsafe { rustix::mm::madvise(mapping.address.as_ptr().cast(), length, Advice::LinuxHugepage) }?;
        }
        Ok(Memory { fd, mapping, pages, claims: Arc::new(Claims::new(bytes)) })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.bytes as u64
    }

    /// Kind of pages.
    pub fn pages(&self) -> PageKind {
        self.pages
    }

    /// Faults in `bytes` from `offset` on, zeroed, so that later use costs no page fault.
    pub fn populate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let end = offset.checked_add(bytes).filter(|end| *end <= self.bytes());
        if end.is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the offset is inside the mapping (checked above).
        let start = unsafe { self.mapping.address.as_ptr().add(offset as usize) };
        // SAFETY: MADV_POPULATE_WRITE faults pages in and changes no content; the range is inside the mapping.
        let result = unsafe { libc::madvise(start.cast(), bytes as usize, libc::MADV_POPULATE_WRITE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Claims `bytes` from `offset` on. `None` if that is out of range, misaligned or (in part) claimed already.
    ///
    /// `offset` is a multiple of [`SPAN_ALIGN`]; the claim covers whole units, the span only `bytes`.
    pub fn claim(self: &Arc<Self>, offset: u64, bytes: u64) -> Option<Span> {
        let end = offset.checked_add(bytes).filter(|end| *end <= self.bytes())?;
        if bytes == 0 || !offset.is_multiple_of(SPAN_ALIGN) {
            return None;
        }
        let units = offset / SPAN_ALIGN..end.div_ceil(SPAN_ALIGN);
        self.claims.take(units).then(|| Span { memory: Arc::clone(self), offset, bytes })
    }

    /// Makes the memory immutable for everyone but this mapping, and gives back what may be shared.
    ///
    /// Upholds invariant 8. After this no process can map it writable, write to it or change its length, also
    /// not by re-opening the descriptor. No span may be left: the caller hands over the last reference.
    ///
    /// # Errors
    /// With the memory, which was not shared.
    pub fn seal(self) -> Result<(Sealed, Retired), Box<(Memory, io::Error)>> {
        match self.shareable() {
            Ok([readable, private]) => {
                let sealed = Sealed { readable, private, bytes: self.bytes(), pages: self.pages };
                Ok((sealed, Retired { memory: self }))
            }
            Err(error) => Err(Box::new((self, error))),
        }
    }

    /// Seals, and opens two read-only descriptions: the one that is shared, and the one by which importers are observed
    /// later, when there may be no descriptor left to open it.
    fn shareable(&self) -> io::Result<[OwnedFd; 2]> {
        use rustix::fs::{Mode, OFlags};
        // FUTURE_WRITE and not WRITE: our own writable mapping is still there and is retired by the caller later.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&self.fd, seals)?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.fd));
        let open = || rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        Ok([open()?, open()?])
    }

    /// Gives the tail from `bytes` on back to the kernel. `bytes` is a positive multiple of [`HUGE_PAGE_BYTES`].
    ///
    /// Takes the memory by value: no span can be left that reaches into the tail. `InvalidInput` if there is a view of the
    /// memory, which may reach into it.
    pub fn shrink(mut self, bytes: u64) -> io::Result<Memory> {
        if bytes == 0 || bytes > self.bytes() || !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if bytes == self.bytes() {
            return Ok(self);
        }
        if Arc::strong_count(&self.claims) > 1 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let keep = bytes as usize;
        // SAFETY: `keep` is inside the mapping (checked above).
        let tail = unsafe { self.mapping.address.as_ptr().add(keep) };
        // SAFETY: the tail belongs to this mapping and no span reaches it, as `self` is held by value.
        unsafe { rustix::mm::munmap(tail.cast(), self.mapping.bytes - keep) }?;
        self.mapping.bytes = keep;
        rustix::fs::ftruncate(&self.fd, bytes)?;
        Ok(self)
    }

    pub(super) fn address(&self) -> NonNull<u8> {
        self.mapping.address
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }
}

impl Mapping {
    /// Maps `fd` whole, writable and shared, at an address that is a multiple of [`HUGE_PAGE_BYTES`].
    fn writable(fd: &OwnedFd, bytes: usize, pages: PageKind) -> io::Result<Mapping> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        if pages == PageKind::Hugetlb {
            // The kernel aligns it by itself.
            // SAFETY: a new mapping at an address of the kernel's choice; nothing else is there.
            let mapped =
                unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, fd, 0) }?;
            let address = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
            return Ok(Mapping { address, bytes });
        }
        let slack = HUGE_PAGE_BYTES as usize;
        let reserve = bytes.checked_add(slack).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new reservation at an address of the kernel's choice; nothing else is there.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                reserve,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let head = (slack - reserved as usize % slack) % slack;
        let base = reserved.cast::<u8>();
        let aligned = base.wrapping_add(head);
        for (start, length) in [(base, head), (aligned.wrapping_add(bytes), slack - head)] {
            if length > 0 {
                // SAFETY: the ends of our own reservation, which nothing uses.
                unsafe { rustix::mm::munmap(start.cast(), length) }?;
            }
        }
        // SAFETY: MAP_FIXED replaces the rest of our own reservation, and nothing else. If it fails, the range is left
        // alone for good: the kernel may have unmapped it already, and another thread may have mapped something there.
        unsafe {
            rustix::mm::mmap(aligned.cast(), bytes, access, MapFlags::SHARED | MapFlags::FIXED, fd, 0)
        }?;
        let address = NonNull::new(aligned).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { address, bytes })
    }
}

/// The words and masks of the claim map that cover `units`.
fn masks(units: std::ops::Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = units.start / 64..units.end.div_ceil(64);
    words.map(move |word| {
        let from = units.start.max(word * 64) - word * 64;
        let to = units.end.min((word + 1) * 64) - word * 64;
        let mask = if to - from == 64 { u64::MAX } else { ((1 << (to - from)) - 1) << from };
        (word as usize, mask)
    })
}

/// An exclusive, move-only claim on a range of a [`Memory`]: idle → operation → in flight → completion.
#[derive(Debug)]
pub struct Span {
    memory: Arc<Memory>,
    offset: u64,
    bytes: u64,
}

impl Span {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Offset in its memory.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The memory that it is a range of.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the range is inside the mapping (checked by `claim`), the mapping lives as long as `memory`, and
        // nobody else writes to it: the claim is exclusive and no other process has the descriptor yet.
        unsafe { std::slice::from_raw_parts(self.address().as_ptr(), self.bytes as usize) }
    }

    /// The bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the borrow of `self` is exclusive as well.
        unsafe { std::slice::from_raw_parts_mut(self.address().as_ptr(), self.bytes as usize) }
    }

    pub(super) fn address(&self) -> NonNull<u8> {
        // SAFETY: `claim` checked that the offset is inside the mapping.
        unsafe { self.memory.mapping.address.add(self.offset as usize) }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let end = (self.offset + self.bytes).div_ceil(SPAN_ALIGN);
        self.memory.claims.release(self.offset / SPAN_ALIGN..end);
    }
}

/// Sealed memory: what clients map. Holds the descriptor that is sent to them.
#[derive(Debug)]
pub struct Sealed {
    readable: OwnedFd,
    private: OwnedFd,
    bytes: u64,
    pages: PageKind,
}

impl Sealed {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Kind of pages.
    pub fn pages(&self) -> PageKind {
        self.pages
    }

    /// Gives up the descriptor that is shared, and keeps one by which importers can be observed.
    pub fn retire(self) -> super::lease::Importers {
        drop(self.readable);
        super::lease::Importers::of(self.private, self.bytes)
    }
}

impl AsFd for Sealed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }
}

/// The daemon's own mapping of sealed memory. Dropping it can take long (4 KiB pages): do it off the control thread.
#[derive(Debug)]
pub struct Retired {
    memory: Memory,
}

impl Retired {
    /// For a device that reads from it: some kernels let it read from no other mapping of sealed memory.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spans_never_overlap_invariant_2() {
        let memory = Arc::new(Memory::new(HUGE_PAGE_BYTES, PageKind::Small).unwrap());
        let first = memory.claim(4096, 8192).unwrap();
        assert!(memory.claim(3, 10).is_none(), "misaligned");
        assert!(memory.claim(HUGE_PAGE_BYTES, 1).is_none(), "out of range");
        assert!(memory.claim(u64::MAX - 4095, 4096).is_none(), "overflow");
        let second = memory.claim(12288, 10).unwrap();
        drop(first);
        assert!(memory.claim(4096, 8192).is_some());
        drop(second);
        assert!(memory.claim(0, HUGE_PAGE_BYTES).is_some());
    }

    proptest! {
        #[test]
        fn masks_cover_exactly_the_units(start in 0u64..300, length in 1u64..300) {
            let mut seen = Vec::new();
            for (word, mask) in masks(start..start + length) {
                for bit in 0..64 {
                    if mask >> bit & 1 == 1 { seen.push(word as u64 * 64 + bit); }
                }
            }
            prop_assert_eq!(seen, (start..start + length).collect::<Vec<_>>());
        }
    }

    #[test]
    fn sealed_memory_cannot_be_written_invariant_8() {
        use rustix::fs::{Mode, OFlags};
        use std::os::fd::AsRawFd;
        let memory = Arc::new(Memory::new(HUGE_PAGE_BYTES, PageKind::Small).unwrap());
        memory.claim(0, 4).unwrap().as_mut_slice().copy_from_slice(b"lode");
        let (sealed, _retired) = Arc::into_inner(memory).unwrap().seal().unwrap();
        let path = format!("/proc/self/fd/{}", sealed.as_fd().as_raw_fd());
        let again = rustix::fs::open(path, OFlags::RDWR, Mode::empty()).unwrap();
        assert!(rustix::io::pwrite(&again, b"x", 0).is_err());
        assert!(rustix::fs::ftruncate(&again, 0).is_err());
        assert!(Mapping::writable(&again, HUGE_PAGE_BYTES as usize, PageKind::Small).is_err());
        let mut head = [0; 4];
        rustix::io::pread(&sealed, &mut head, 0).unwrap();
        assert_eq!(&head, b"lode");
    }

    #[test]
    fn shrunk_memory_keeps_its_head() {
        let memory = Arc::new(Memory::new(2 * HUGE_PAGE_BYTES, PageKind::Small).unwrap());
        memory.claim(0, 4).unwrap().as_mut_slice().copy_from_slice(b"lode");
        let memory = Arc::new(Arc::into_inner(memory).unwrap().shrink(HUGE_PAGE_BYTES).unwrap());
        assert_eq!(memory.bytes(), HUGE_PAGE_BYTES);
        assert_eq!(memory.claim(0, 4).unwrap().as_slice(), b"lode");
        assert!(memory.claim(HUGE_PAGE_BYTES, 4096).is_none());
    }
}
