//! Mapped memory: what a device's memory is made of, and addresses at which nothing is.

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags};

use crate::abi::{Answer, Code, Host};

/// The bytes of one physical allocation, as only the simulated device sees them.
#[derive(Debug)]
pub(crate) struct Shadow {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: an owned mapping; accesses go through raw pointers, and races between them are races of the simulated device's
// users, as on a real device. No reference into the mapping is ever made.
unsafe impl Send for Shadow {}
// SAFETY: as above.
unsafe impl Sync for Shadow {}

impl Shadow {
    /// Maps the first `bytes` of a file.
    pub(crate) fn map(file: BorrowedFd<'_>, bytes: u64) -> Answer<Shadow> {
        let bytes = usize::try_from(bytes).map_err(|_| Code::INVALID_VALUE)?;
        // SAFETY: a new mapping at an address of the kernel's choice: no memory that exists is touched.
        let start = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        };
        let start = start.ok().and_then(|start| NonNull::new(start.cast())).ok_or(Code::MAP_FAILED)?;
        Ok(Shadow { start, bytes })
    }

    /// Where a range starts, if it lies inside.
    fn place(&self, offset: usize, length: usize) -> Answer<*mut u8> {
        let end = offset.checked_add(length).ok_or(Code::ILLEGAL_ADDRESS)?;
        if end > self.bytes {
            return Err(Code::ILLEGAL_ADDRESS);
        }
        Ok(self.start.as_ptr().wrapping_add(offset))
    }

    pub(crate) fn write(&self, offset: usize, source: &[u8]) -> Answer {
        let target = self.place(offset, source.len())?;
        // SAFETY: `place` has checked that the range is inside the mapping, which lives as long as `self`.
        unsafe { ptr::copy_nonoverlapping(source.as_ptr(), target, source.len()) };
        Ok(())
    }

    pub(crate) fn read(&self, offset: usize, target: &mut [u8]) -> Answer {
        let source = self.place(offset, target.len())?;
        // SAFETY: as in `write`.
        unsafe { ptr::copy_nonoverlapping(source, target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    /// Copies from memory of a caller of the C API.
    pub(crate) fn write_from(&self, offset: usize, source: Host, length: usize) -> Answer {
        let target = self.place(offset, length)?;
        // SAFETY: the target as in `write`; the source by the promise that goes with a `Host`.
        unsafe { ptr::copy(source.pointer(), target, length) };
        Ok(())
    }

    /// Copies to memory of a caller of the C API.
    pub(crate) fn read_into(&self, offset: usize, target: Host, length: usize) -> Answer {
        let source = self.place(offset, length)?;
        // SAFETY: as in `write_from`, the other way.
        unsafe { ptr::copy(source, target.pointer(), length) };
        Ok(())
    }

    pub(crate) fn fill(&self, offset: usize, length: usize, byte: u8) -> Answer {
        let target = self.place(offset, length)?;
        // SAFETY: as in `write`.
        unsafe { target.write_bytes(byte, length) };
        Ok(())
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        // SAFETY: made by `map`, taken out once; who uses it holds the allocation that owns it.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Copies from host memory that a caller handed in, before the call returns.
pub(crate) fn stage(source: Host, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    // SAFETY: the source by the promise that goes with a `Host`; the target is that long.
    unsafe { ptr::copy_nonoverlapping(source.pointer(), bytes.as_mut_ptr(), length) };
    bytes
}

/// Copies between two places in host memory that a caller handed in.
pub(crate) fn move_host(source: Host, target: Host, length: usize) {
    // SAFETY: both by the promise that goes with a `Host`.
    unsafe { ptr::copy(source.pointer(), target.pointer(), length) };
}

/// Addresses of a device: reserved, and nothing that the CPU could touch is there.
#[derive(Debug)]
pub(crate) struct Area {
    start: u64,
    bytes: u64,
}

impl Area {
    /// Reserves addresses at a multiple of `alignment`, which is a power of two and at least a page; near `hint` if the
    /// kernel has room there.
    pub(crate) fn reserve(bytes: u64, alignment: u64, hint: u64) -> Answer<Area> {
        let wanted = bytes.checked_add(alignment).ok_or(Code::OUT_OF_MEMORY)?;
        let length = usize::try_from(wanted).map_err(|_| Code::OUT_OF_MEMORY)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let near = ptr::without_provenance_mut(hint as usize);
        // SAFETY: not fixed: the kernel takes the hint only where nothing is mapped.
        let found = unsafe { rustix::mm::mmap_anonymous(near, length, ProtFlags::empty(), flags) };
        let found = found.map_err(|_| Code::OUT_OF_MEMORY)? as u64;
        let start = found.next_multiple_of(alignment);
        // What alignment has cost is given back on both sides.
        drop(Area { start: found, bytes: start - found });
        drop(Area { start: start + bytes, bytes: found + wanted - (start + bytes) });
        Ok(Area { start, bytes })
    }

    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let start = ptr::without_provenance_mut(self.start as usize);
            // SAFETY: part of a mapping made by `reserve`, which nobody can access, and taken out once.
            let _ = unsafe { rustix::mm::munmap(start, self.bytes as usize) };
        }
    }
}

/// Whether something is mapped in all pages of a range. `start` is a multiple of the page size.
pub(crate) fn is_mapped(start: u64, bytes: u64) -> bool {
    /// Pages asked about at a time.
    const PAGES: usize = 4096;
    let page = rustix::param::page_size();
    let mut resident = [0u8; PAGES];
    (0..bytes).step_by(PAGES * page).all(|offset| {
        let length = (bytes - offset).min((PAGES * page) as u64) as usize;
        let at = ptr::without_provenance_mut((start + offset) as usize);
        // SAFETY: asks the kernel about addresses and touches none of them; one byte a page comes back, for which there
        // is room.
        unsafe { libc::mincore(at, length, resident.as_mut_ptr()) == 0 }
    })
}
