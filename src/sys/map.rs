//! Read-only mappings of shared regions, as a client of the daemon makes them, and what they have in common with the
//! views of regions that the daemon itself reads from ([`super::view`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// A region begins on a multiple of this, bytes: what hugetlb parts need, and what lets the kernel use huge pages.
const ALIGN: usize = 2 << 20;

/// Parts are whole pages, bytes.
const PAGE_BYTES: u64 = 4096;

/// Parts of memory, mapped read-only one behind the other into one range of addresses, until it is dropped.
#[derive(Debug)]
pub(super) struct Range {
    /// The reserved range; the parts lie from `start` on.
    reserved: NonNull<u8>,
    reserved_bytes: usize,
    start: usize,
    bytes: usize,
}

// SAFETY: plain memory that any thread may map and unmap; who may read which of its bytes is the business of those who
// own a range.
unsafe impl Send for Range {}
// SAFETY: as above; `&Range` alone gives access to no byte.
unsafe impl Sync for Range {}

impl Range {
    /// Maps parts, each with the number of bytes to map of it: whole pages of which the descriptor has that many.
    pub(super) fn of(parts: &[(BorrowedFd<'_>, u64)]) -> io::Result<Range> {
        let total = parts.iter().try_fold(0u64, |total, (_, bytes)| total.checked_add(*bytes));
        let total = total.ok_or_else(|| invalid("the parts are too long"))?;
        let bytes = usize::try_from(total).map_err(|_| invalid("the parts are too long"))?;
        if bytes == 0 {
            return Ok(Range { reserved: NonNull::dangling(), reserved_bytes: 0, start: 0, bytes: 0 });
        }
        let reserved_bytes = bytes.checked_next_multiple_of(ALIGN).and_then(|bytes| bytes.checked_add(ALIGN));
        let reserved_bytes = reserved_bytes.ok_or_else(|| invalid("the parts are too long"))?;
        let map = Self::reserve(reserved_bytes, bytes)?;
        let mut offset = map.start;
        for (fd, bytes) in parts {
            let bytes = *bytes as usize; // no more than `total`, which is a usize
            // SAFETY: `offset` is below the end of the reserved range: the parts add up to `map.bytes`, and
            // `reserve` left room for that from `map.start` on.
            let address = unsafe { map.reserved.as_ptr().add(offset) };
            // SAFETY: MAP_FIXED replaces only pages of the range that `map` reserved and nobody else knows of.
            let mapped = unsafe {
                rustix::mm::mmap(
                    address.cast(),
                    bytes,
                    ProtFlags::READ,
                    MapFlags::SHARED | MapFlags::FIXED,
                    fd,
                    0,
                )
            };
            if let Err(error) = mapped {
                // The kernel may have left a hole, which another thread can map something into: addresses are
                // leaked rather than that mapping unmapped.
                std::mem::forget(map);
                return Err(error.into());
            }
            offset += bytes;
        }
        Ok(map)
    }

    /// Takes a range of addresses that nothing can be read from yet.
    fn reserve(reserved_bytes: usize, bytes: usize) -> io::Result<Range> {
        // SAFETY: the kernel chooses the address; nothing that exists is replaced.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                reserved_bytes,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let reserved = NonNull::new(reserved.cast::<u8>())
            .ok_or_else(|| io::Error::other("the kernel mapped address 0"))?;
        let start = reserved.as_ptr().align_offset(ALIGN);
        Ok(Range { reserved, reserved_bytes, start, bytes })
    }

    /// Bytes of all parts.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where the first part begins; [`Range::bytes`] can be read from there on. Dangling if there are none.
    pub(super) fn address(&self) -> *const u8 {
        // SAFETY: `start` is below ALIGN, and the range is longer than that, or both are 0 (`of`).
        unsafe { self.reserved.as_ptr().add(self.start) }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        if self.reserved_bytes != 0 {
            // SAFETY: the range is ours, and slices of it borrow from whoever owns it.
            let _ = unsafe { rustix::mm::munmap(self.reserved.as_ptr().cast(), self.reserved_bytes) };
        }
    }
}

/// The parts of a region, mapped one behind the other into one range of addresses.
///
/// The mapping is independent of the descriptors and of the process that made them: its bytes stay as they are
/// until it is dropped.
#[derive(Debug)]
pub struct ReadMap(Range);

impl ReadMap {
    /// Maps descriptors of sealed memory, each with the number of bytes to map of it, and closes them.
    ///
    /// Without parts, the map is empty.
    ///
    /// # Errors
    /// `InvalidInput` if a size is not a positive multiple of 4096, if the sizes do not add up to an address range, if
    /// a descriptor is shorter than its size, or if it is not memory that is sealed against shrinking and writing:
    /// reading a page that was cut off kills the process. Else what `mmap` gives.
    pub fn from_parts(parts: Vec<(OwnedFd, u64)>) -> io::Result<ReadMap> {
        for (fd, bytes) in &parts {
            check_part(fd, *bytes)?;
        }
        let parts: Vec<_> = parts.iter().map(|(fd, bytes)| (fd.as_fd(), *bytes)).collect();
        Ok(ReadMap(Range::of(&parts)?))
    }

    /// The bytes of all parts, one behind the other.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `Range::of` mapped that many readable bytes there, which stay mapped for as long as `self`. They
        // do not change: the descriptors are sealed against writing and shrinking (`check_part`), and the one who
        // sealed them, the daemon, shares a region only when it is complete and does not write to it again.
        unsafe { std::slice::from_raw_parts(self.0.address(), self.0.bytes()) }
    }
}

fn check_part(fd: &OwnedFd, bytes: u64) -> io::Result<()> {
    if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(invalid("a part is not a positive multiple of 4096 bytes"));
    }
    let seals = rustix::fs::fcntl_get_seals(fd)
        .map_err(|_| invalid("a descriptor is not memory that can be sealed"))?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(invalid("a descriptor is not sealed against shrinking"));
    }
    if !seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(invalid("a descriptor is not sealed against writing"));
    }
    // After the seals: only now the size cannot get smaller any more.
    let size = u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0);
    if size < bytes {
        return Err(invalid("a descriptor is shorter than was said"));
    }
    Ok(())
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    const GOOD: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE);

    fn memory(bytes: u64, fill: u8, seals: SealFlags) -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes).unwrap();
        rustix::io::pwrite(&fd, &vec![fill; bytes as usize], 0).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    #[test]
    fn parts_lie_one_behind_the_other_on_a_huge_page_boundary() {
        let parts = (1..=5u8).map(|n| (memory(4096 * u64::from(n), n, GOOD), 4096 * u64::from(n))).collect();
        let map = ReadMap::from_parts(parts).unwrap();
        let expected: Vec<u8> = (1..=5u8).flat_map(|n| vec![n; 4096 * usize::from(n)]).collect();
        assert!(map.as_slice() == expected);
        assert_eq!(map.as_slice().as_ptr().addr() % ALIGN, 0);
    }

    #[test]
    fn only_the_named_bytes_of_a_part_are_mapped() {
        let parts = vec![(memory(8192, 1, GOOD), 4096), (memory(4096, 2, GOOD), 4096)];
        let map = ReadMap::from_parts(parts).unwrap();
        assert_eq!((map.as_slice().len(), map.as_slice()[4095], map.as_slice()[4096]), (8192, 1, 2));
    }

    #[test]
    fn a_map_without_parts_is_empty() {
        assert!(ReadMap::from_parts(Vec::new()).unwrap().as_slice().is_empty());
    }

    #[test]
    fn what_could_kill_or_change_the_reader_is_refused() {
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        for (fd, bytes, reason) in [
            (memory(4096, 0, SealFlags::FUTURE_WRITE), 4096, "shrinking"),
            (memory(4096, 0, SealFlags::SHRINK), 4096, "writing"),
            (file(), 4096, "sealed"),
            (memory(4096, 0, GOOD), 8192, "shorter"),
            (memory(4096, 0, GOOD), 0, "multiple"),
            (memory(4096, 0, GOOD), 4095, "multiple"),
            (memory(4096, 0, GOOD), u64::MAX - 4095, "shorter"),
        ] {
            let error = ReadMap::from_parts(vec![(fd, bytes)]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(error.to_string().contains(reason), "{error} does not say {reason}");
        }
    }

    #[test]
    fn the_range_is_given_back() {
        let map = ReadMap::from_parts(vec![(memory(4096, 1, GOOD), 4096)]).unwrap();
        let address = format!("{:x}-", map.as_slice().as_ptr().addr());
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        let entry =
            |maps: &str| maps.lines().any(|line| line.starts_with(&address) && line.contains("memfd:"));
        assert!(entry(&maps()));
        drop(map);
        assert!(!entry(&maps()));
    }
}
