//! Memory that is touched to be given back: what a measurement on a virtual machine finds warm then.

use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::mem::HUGE_PAGE_BYTES;

/// Private memory of this process, all of it touched; given back to the kernel when it is dropped.
#[derive(Debug)]
pub struct Warm {
    address: NonNull<u8>,
    bytes: usize,
}

impl Warm {
    /// Touches `bytes`, a positive multiple of [`HUGE_PAGE_BYTES`], in huge pages where they can be had.
    ///
    /// # Errors
    /// `InvalidInput` for another size; `OutOfMemory` if there is not as much.
    pub fn new(bytes: u64) -> io::Result<Warm> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        if bytes == 0 || !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return Err(invalid());
        }
        let bytes = usize::try_from(bytes).map_err(|_| invalid())?;
        // SAFETY: the kernel chooses the address; nothing that exists is replaced.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let address = NonNull::new(address.cast::<u8>())
            .ok_or_else(|| io::Error::other("the kernel mapped address 0"))?;
        let warm = Warm { address, bytes };
        // Refused where the kernel has no transparent huge pages: then it takes longer.
        // SAFETY: advice on a range that `warm` owns; it changes no content.
        let _ = unsafe { rustix::mm::madvise(address.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
        // SAFETY: MADV_POPULATE_WRITE faults pages in and changes no content; the range is that of `warm`.
        let touched = unsafe { libc::madvise(address.as_ptr().cast(), bytes, libc::MADV_POPULATE_WRITE) };
        if touched == 0 { Ok(warm) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and nothing refers to it.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident KiB of the mappings that have this address.
    fn resident_kib(address: usize) -> Option<u64> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let has = |line: &&str| {
            let bounds = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bounds =
                bounds.map(|(from, to)| (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)));
            matches!(bounds, Some((Ok(from), Ok(to))) if (from..to).contains(&address))
        };
        let rss = smaps.lines().skip_while(|line| !has(line)).find(|line| line.starts_with("Rss:"))?;
        rss.split_whitespace().nth(1)?.parse().ok()
    }

    #[test]
    fn all_of_it_is_touched_and_given_back() {
        let warm = Warm::new(8 * HUGE_PAGE_BYTES).unwrap();
        let address = warm.address.as_ptr().addr();
        assert!(resident_kib(address).unwrap() >= 8 * HUGE_PAGE_BYTES / 1024);
        drop(warm);
        // Somebody else may have got the address since: with less in it.
        assert!(resident_kib(address).unwrap_or(0) < 8 * HUGE_PAGE_BYTES / 1024);
    }

    #[test]
    fn what_is_no_size_or_cannot_be_had_is_an_error() {
        for bytes in [0, 1, HUGE_PAGE_BYTES + 4096] {
            assert_eq!(Warm::new(bytes).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert!(Warm::new(1 << 56).is_err());
    }
}
