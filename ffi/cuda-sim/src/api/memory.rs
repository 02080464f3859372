//! Device memory: made, shared by descriptor, mapped; and host memory that is registered.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd};
use std::sync::{Arc, Mutex};

use super::{export, give, healthy, take};
use crate::code::{self, Outcome};
use crate::machine::{Allocation, GRANULARITY, POISON, lock, machine};
use crate::space::{self, Access};

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const POSIX_FD: u32 = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const LOCATION_DEVICE: u32 = 1;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
const TYPE_PINNED: u32 = 1;
/// Pages of registered host memory, bytes.
const PAGE_BYTES: usize = 4096;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "as in the driver's header")]
pub(super) struct Properties {
    kind: u32,
    handle_types: u32,
    location_kind: u32,
    location: c_int,
    win32: *mut c_void,
    flags: [u8; 8],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "as in the driver's header")]
pub(super) struct AccessDescription {
    location_kind: u32,
    location: c_int,
    flags: u32,
}

/// Ranges of host memory that are registered: start → bytes.
static REGISTERED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// Whether all of a range is registered.
pub(super) fn is_registered(start: usize, bytes: usize) -> bool {
    let registered = lock(&REGISTERED);
    let below = registered.range(..=start).next_back();
    below.is_some_and(|(from, length)| start.saturating_add(bytes) <= from + length)
}

fn checked(properties: *const Properties) -> Outcome<Properties> {
    let properties = take(properties)?;
    let usual = properties.kind == TYPE_PINNED && properties.location_kind == LOCATION_DEVICE;
    if !usual || properties.handle_types & !POSIX_FD != 0 {
        return Err(code::INVALID_VALUE);
    }
    machine()?.device(properties.location)?;
    Ok(properties)
}

fn allocation(handle: u64) -> Outcome<Arc<Allocation>> {
    lock(&machine()?.allocations).get(&handle).cloned().ok_or(code::INVALID_VALUE)
}

fn keep(allocation: Arc<Allocation>) -> Outcome<u64> {
    let machine = machine()?;
    let handle = machine.number() << 8 | 0x51;
    lock(&machine.allocations).insert(handle, allocation);
    Ok(handle)
}

fn allocate(device: usize, bytes: u64) -> Outcome<Arc<Allocation>> {
    let made = machine()?.allocate(device, bytes)?;
    space::fill(&made, POISON)?;
    Ok(made)
}

export! {
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let (machine, index, device) = healthy()?;
        give(free, machine.free(index)? as usize)?;
        give(total, device.device.memory_bytes as usize)
    }

    fn cuMemGetAllocationGranularity(bytes: *mut usize, properties: *const Properties, option: u32) {
        checked(properties)?;
        if option > 1 {
            return Err(code::INVALID_VALUE);
        }
        give(bytes, GRANULARITY as usize)
    }

    fn cuMemCreate(handle: *mut u64, bytes: usize, properties: *const Properties, flags: u64) {
        healthy()?;
        let properties = checked(properties)?;
        let bytes = bytes as u64;
        if flags != 0 || bytes == 0 || !bytes.is_multiple_of(GRANULARITY) || handle.is_null() {
            return Err(code::INVALID_VALUE);
        }
        give(handle, keep(allocate(properties.location as usize, bytes)?)?)
    }

    fn cuMemRelease(handle: u64) {
        lock(&machine()?.allocations).remove(&handle).map(drop).ok_or(code::INVALID_VALUE)
    }

    fn cuMemExportToShareableHandle(target: *mut c_void, handle: u64, kind: u32, flags: u64) {
        healthy()?;
        let allocation = allocation(handle)?;
        if kind != POSIX_FD || flags != 0 || target.is_null() {
            return Err(code::INVALID_VALUE);
        }
        let fd = allocation.file.as_fd().try_clone_to_owned().map_err(|_| code::UNKNOWN)?;
        give(target.cast::<c_int>(), fd.into_raw_fd())
    }

    fn cuMemImportFromShareableHandle(handle: *mut u64, os_handle: *mut c_void, kind: u32) {
        let (machine, index, _) = healthy()?;
        let number = c_int::try_from(os_handle.addr()).map_err(|_| code::INVALID_VALUE)?;
        if kind != POSIX_FD || handle.is_null() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: the caller owns the descriptor and keeps it through the call; one that is closed fails below.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let fd = fd.try_clone_to_owned().map_err(|_| code::INVALID_VALUE)?;
        give(handle, keep(machine.import(fd, index)?)?)
    }

    fn cuMemGetAllocationPropertiesFromHandle(properties: *mut Properties, handle: u64) {
        let allocation = allocation(handle)?;
        give(properties, Properties {
            kind: TYPE_PINNED,
            handle_types: POSIX_FD,
            location_kind: LOCATION_DEVICE,
            location: allocation.device as c_int,
            win32: std::ptr::null_mut(),
            flags: [0; 8],
        })
    }

    fn cuMemAddressReserve(address: *mut u64, bytes: usize, alignment: usize, wanted: u64, flags: u64) {
        healthy()?;
        let usual = flags == 0 && wanted == 0 && (alignment == 0 || (GRANULARITY as usize).is_multiple_of(alignment));
        if !usual || address.is_null() {
            return Err(code::INVALID_VALUE);
        }
        give(address, space::reserve(bytes as u64)?)
    }

    fn cuMemAddressFree(address: u64, bytes: usize) { space::free(address, bytes as u64) }

    fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, flags: u64) {
        healthy()?;
        if offset != 0 || flags != 0 {
            return Err(code::INVALID_VALUE);
        }
        space::map(address, bytes as u64, &allocation(handle)?)
    }

    fn cuMemUnmap(address: u64, bytes: usize) {
        // What is under way keeps its pieces mapped.
        space::unmap(address, bytes as u64)
    }

    fn cuMemSetAccess(address: u64, bytes: usize, description: *const AccessDescription, count: usize) {
        healthy()?;
        let description = take(description)?;
        let access = match description.flags {
            0 => Access::None,
            1 => Access::Read,
            3 => Access::ReadWrite,
            _ => return Err(code::INVALID_VALUE),
        };
        if count != 1 || description.location_kind != LOCATION_DEVICE {
            return Err(code::INVALID_VALUE);
        }
        let (index, _) = machine()?.device(description.location)?;
        space::set_access(address, bytes as u64, index, access)
    }

    fn cuMemGetAccess(flags: *mut u64, _location: *const c_void, address: u64) {
        let access = match space::access(address)? {
            Access::None => 0,
            Access::Read => 1,
            Access::ReadWrite => 3,
        };
        give(flags, access)
    }

    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        let (_, index, _) = healthy()?;
        let bytes = (bytes.max(1) as u64).checked_next_multiple_of(GRANULARITY).ok_or(code::OUT_OF_MEMORY)?;
        let made = allocate(index, bytes)?;
        let at = space::reserve(bytes)?;
        space::map(at, bytes, &made)?;
        space::set_access(at, bytes, index, Access::ReadWrite)?;
        give(address, at)
    }

    fn cuMemFree_v2(address: u64) {
        let bytes = space::mapped_bytes(address).ok_or(code::INVALID_VALUE)?;
        space::unmap(address, bytes)?;
        space::free(address, bytes)
    }

    fn cuMemHostRegister_v2(start: *mut c_void, bytes: usize, _flags: u32) {
        healthy()?;
        let at = start.addr();
        let end = at.checked_add(bytes).filter(|_| bytes > 0 && at != 0).ok_or(code::INVALID_VALUE)?;
        let first = at - at % PAGE_BYTES;
        let mut resident = vec![0u8; (end - first).div_ceil(PAGE_BYTES)];
        // SAFETY: asks about pages and touches none of them; the answer has one byte for each.
        let asked = unsafe {
            libc::mincore(std::ptr::without_provenance_mut(first), end - first, resident.as_mut_ptr())
        };
        if asked != 0 {
            return Err(code::INVALID_VALUE);
        }
        let mut registered = lock(&REGISTERED);
        if registered.range(..end).next_back().is_some_and(|(start, length)| start + length > at) {
            return Err(code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        registered.insert(at, bytes);
        Ok(())
    }

    fn cuMemHostUnregister(start: *mut c_void) {
        lock(&REGISTERED).remove(&start.addr()).map(drop).ok_or(code::HOST_MEMORY_NOT_REGISTERED)
    }

    fn cuMemGetHandleForAddressRange(_handle: *mut c_void, _address: u64, _bytes: usize, _kind: u32, _flags: u64) {
        Err(code::NOT_SUPPORTED)
    }
}
