//! Device addresses of this process.
//!
//! Addresses are reserved without any access, so the CPU faults when it touches one, as it does on a real GPU. What is
//! mapped there is mapped a second time elsewhere, and only the simulated engines use that.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::code::{self, Outcome};
use crate::machine::{Allocation, GRANULARITY, lock};

/// What a mapping allows the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    None,
    Read,
    ReadWrite,
}

/// A range of this process, unmapped on drop.
#[derive(Debug)]
struct Range {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory that any thread may use.
unsafe impl Send for Range {}
// SAFETY: as above; who reads and writes it is decided by streams, as on a device.
unsafe impl Sync for Range {}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: mapped by this module, and nothing refers to it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[derive(Debug)]
struct Mapping {
    bytes: u64,
    shadow: Arc<Range>,
    access: Access,
    allocation: Arc<Allocation>,
}

#[derive(Debug, Default)]
struct Space {
    reserved: BTreeMap<u64, Range>,
    mapped: BTreeMap<u64, Mapping>,
}

static SPACE: Mutex<Space> = Mutex::new(Space { reserved: BTreeMap::new(), mapped: BTreeMap::new() });

/// A piece of device memory, kept mapped while an engine works on it.
#[derive(Debug)]
pub(crate) struct Piece {
    shadow: Arc<Range>,
    offset: usize,
    pub(crate) bytes: usize,
}

impl Piece {
    pub(crate) fn start(&self) -> *mut u8 {
        // SAFETY: `pieces` checked that the offset is inside.
        unsafe { self.shadow.start.as_ptr().add(self.offset) }
    }
}

fn aligned(bytes: u64) -> bool {
    bytes > 0 && bytes.is_multiple_of(GRANULARITY)
}

/// Reserves addresses.
pub(crate) fn reserve(bytes: u64) -> Outcome<u64> {
    if !aligned(bytes) {
        return Err(code::INVALID_VALUE);
    }
    let length = usize::try_from(bytes).map_err(|_| code::OUT_OF_MEMORY)?;
    let slack = GRANULARITY as usize;
    let whole = length.checked_add(slack).ok_or(code::OUT_OF_MEMORY)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), flags) };
    let start = NonNull::new(start.map_err(|_| code::OUT_OF_MEMORY)?.cast()).ok_or(code::OUT_OF_MEMORY)?;
    let range = Range { start, bytes: whole };
    let address = (start.as_ptr() as u64).next_multiple_of(GRANULARITY);
    lock(&SPACE).reserved.insert(address, range);
    Ok(address)
}

/// Gives addresses back. Nothing may be mapped there.
pub(crate) fn free(address: u64, bytes: u64) -> Outcome {
    let mut space = lock(&SPACE);
    let known = space.reserved.get(&address).is_some_and(|range| range.bytes as u64 == bytes + GRANULARITY);
    if !known || space.mapped.range(address..address.saturating_add(bytes)).next().is_some() {
        return Err(code::INVALID_VALUE);
    }
    space.reserved.remove(&address);
    Ok(())
}

/// Maps an allocation at reserved addresses, without any access yet.
pub(crate) fn map(address: u64, bytes: u64, allocation: &Arc<Allocation>) -> Outcome {
    let end = address.checked_add(bytes).filter(|_| aligned(bytes) && bytes == allocation.bytes);
    let end = end.ok_or(code::INVALID_VALUE)?;
    let mut space = lock(&SPACE);
    let inside = space
        .reserved
        .range(..=address)
        .next_back()
        .is_some_and(|(start, range)| end <= start + (range.bytes as u64 - GRANULARITY));
    let before = space.mapped.range(..end).next_back();
    let free = before.is_none_or(|(start, mapping)| start + mapping.bytes <= address);
    if !inside || !address.is_multiple_of(GRANULARITY) || !free {
        return Err(code::INVALID_VALUE);
    }
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that nobody shortens.
    let start =
        unsafe { mmap(std::ptr::null_mut(), bytes as usize, access, MapFlags::SHARED, &allocation.file, 0) };
    let start = NonNull::new(start.map_err(|_| code::OUT_OF_MEMORY)?.cast()).ok_or(code::OUT_OF_MEMORY)?;
    let shadow = Arc::new(Range { start, bytes: bytes as usize });
    let mapping = Mapping { bytes, shadow, access: Access::None, allocation: Arc::clone(allocation) };
    space.mapped.insert(address, mapping);
    Ok(())
}

/// Takes mappings out that fill exactly this range.
pub(crate) fn unmap(address: u64, bytes: u64) -> Outcome {
    let mut space = lock(&SPACE);
    for start in covering(&space, address, bytes)? {
        space.mapped.remove(&start);
    }
    Ok(())
}

/// Sets what the device may do in a range that is mapped whole.
pub(crate) fn set_access(address: u64, bytes: u64, device: usize, access: Access) -> Outcome {
    let mut space = lock(&SPACE);
    for start in covering(&space, address, bytes)? {
        let Some(mapping) = space.mapped.get_mut(&start) else { continue };
        if mapping.allocation.device != device {
            return Err(code::INVALID_DEVICE);
        }
        mapping.access = access;
    }
    Ok(())
}

/// What the device may do at an address.
pub(crate) fn access(address: u64) -> Outcome<Access> {
    let space = lock(&SPACE);
    let (start, mapping) = space.mapped.range(..=address).next_back().ok_or(code::INVALID_VALUE)?;
    if address < start + mapping.bytes { Ok(mapping.access) } else { Err(code::INVALID_VALUE) }
}

/// Where the mappings start that fill exactly this range.
fn covering(space: &Space, address: u64, bytes: u64) -> Outcome<Vec<u64>> {
    let end = address.checked_add(bytes).ok_or(code::INVALID_VALUE)?;
    let mut at = address;
    let mut starts = Vec::new();
    for (start, mapping) in space.mapped.range(address..end) {
        if *start != at {
            return Err(code::INVALID_VALUE);
        }
        starts.push(*start);
        at += mapping.bytes;
    }
    if at == end && !starts.is_empty() { Ok(starts) } else { Err(code::INVALID_VALUE) }
}

/// The memory behind a range, in pieces. `ILLEGAL_ADDRESS` if some of it is not mapped with at least `wanted` access.
pub(crate) fn pieces(address: u64, bytes: u64, wanted: Access) -> Outcome<Vec<Piece>> {
    let end = address.checked_add(bytes).ok_or(code::ILLEGAL_ADDRESS)?;
    let space = lock(&SPACE);
    let mut pieces = Vec::new();
    let mut at = address;
    while at < end {
        let (start, mapping) = space.mapped.range(..=at).next_back().ok_or(code::ILLEGAL_ADDRESS)?;
        let mapped_end = start + mapping.bytes;
        if at >= mapped_end || mapping.access < wanted {
            return Err(code::ILLEGAL_ADDRESS);
        }
        let next = end.min(mapped_end);
        pieces.push(Piece {
            shadow: Arc::clone(&mapping.shadow),
            offset: (at - start) as usize,
            bytes: (next - at) as usize,
        });
        at = next;
    }
    Ok(pieces)
}

/// Fills new memory with `value`, through a mapping of its own.
pub(crate) fn fill(allocation: &Allocation, value: u8) -> Outcome {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let bytes = allocation.bytes as usize;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, &allocation.file, 0) };
    let start = NonNull::new(start.map_err(|_| code::OUT_OF_MEMORY)?.cast()).ok_or(code::OUT_OF_MEMORY)?;
    let range = Range { start, bytes };
    // SAFETY: the range is ours and as long as that.
    unsafe { std::ptr::write_bytes(range.start.as_ptr(), value, bytes) };
    Ok(())
}

/// Length of the mapping that starts at an address.
pub(crate) fn mapped_bytes(address: u64) -> Option<u64> {
    lock(&SPACE).mapped.get(&address).map(|mapping| mapping.bytes)
}
