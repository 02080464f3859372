//! Physical memory: made, exported, imported, released.

use std::os::fd::{BorrowedFd, IntoRawFd};
use std::sync::Arc;

use super::{call, exported};
use crate::abi::{
    ALLOCATION_PINNED, Answer, Code, HANDLE_POSIX_FD, Host, In, LOCATION_DEVICE, Location, Out, OutAny,
    Properties,
};
use crate::config::GRANULARITY;
use crate::sim::{Device, Sim};
use crate::store::{Allocation, Wanted};

/// `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED`.
const RDMA_ATTRIBUTE: i32 = 110;

/// The device that memory with these properties lies on.
fn checked<'a>(sim: &'a Sim, properties: &Properties) -> Answer<&'a Arc<Device>> {
    if properties.kind != ALLOCATION_PINNED {
        return Err(Code::INVALID_VALUE);
    }
    let device = located(sim, properties.location)?;
    if properties.handle_types & !HANDLE_POSIX_FD != 0 || properties.compression != 0 {
        return Err(Code::NOT_SUPPORTED);
    }
    let rdma_supported = device.spec.attributes.get(&RDMA_ATTRIBUTE).is_some_and(|value| *value != 0);
    if properties.rdma != 0 && !rdma_supported {
        return Err(Code::NOT_SUPPORTED);
    }
    Ok(device)
}

/// The device of a location.
pub(super) fn located(sim: &Sim, location: Location) -> Answer<&Arc<Device>> {
    if location.kind != LOCATION_DEVICE {
        return Err(Code::INVALID_VALUE);
    }
    sim.device(location.id)
}

/// The allocation of a handle.
pub(super) fn allocation(sim: &Sim, handle: u64) -> Answer<Arc<Allocation>> {
    let handles = sim.handles();
    handles.allocations.get(&handle).map(|(found, _)| Arc::clone(found)).ok_or(Code::INVALID_VALUE)
}

/// Gives out one more handle of an allocation.
fn give(sim: &Sim, allocation: Arc<Allocation>) -> u64 {
    let id = allocation.id;
    sim.handles().allocations.entry(id).or_insert((allocation, 0)).1 += 1;
    id
}

exported! {
    fn cuMemGetAllocationGranularity(granularity: Out<usize>, properties: In<Properties>, option: u32) {
        call("cuMemGetAllocationGranularity", |sim| {
            checked(sim, &properties.get()?)?;
            // Minimum and recommended.
            if option > 1 { Err(Code::INVALID_VALUE) } else { granularity.put(GRANULARITY as usize) }
        })
    }

    fn cuMemCreate(handle: Out<u64>, size: usize, properties: In<Properties>, flags: u64) {
        call("cuMemCreate", |sim| {
            let properties = properties.get()?;
            let device = checked(sim, &properties)?;
            let bytes = size as u64;
            if handle.is_null() || flags != 0 || bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
                return Err(Code::INVALID_VALUE);
            }
            sim.healthy()?;
            device.touch()?;
            let allocation = device.store.create(Wanted {
                id: sim.handle(),
                device: device.index,
                bytes,
                exportable: properties.handle_types == HANDLE_POSIX_FD,
                rdma: properties.rdma != 0,
            })?;
            handle.put(give(sim, allocation))
        })
    }

    fn cuMemRelease(handle: u64) {
        call("cuMemRelease", |sim| {
            let mut handles = sim.handles();
            let (_, given) = handles.allocations.get_mut(&handle).ok_or(Code::INVALID_VALUE)?;
            *given -= 1;
            let last = if *given == 0 { handles.allocations.remove(&handle) } else { None };
            drop(handles);
            // Mappings keep the memory.
            drop(last);
            Ok(())
        })
    }

    fn cuMemExportToShareableHandle(shareable: OutAny, handle: u64, kind: u32, flags: u64) {
        call("cuMemExportToShareableHandle", |sim| {
            let shareable = shareable.of::<i32>();
            let allocation = allocation(sim, handle)?;
            if shareable.is_null() || flags != 0 || kind != HANDLE_POSIX_FD || !allocation.exportable {
                return Err(Code::INVALID_VALUE);
            }
            sim.healthy()?;
            shareable.put(allocation.export()?.into_raw_fd())
        })
    }

    fn cuMemImportFromShareableHandle(handle: Out<u64>, shareable: usize, kind: u32) {
        call("cuMemImportFromShareableHandle", |sim| {
            let number = i32::try_from(shareable).map_err(|_| Code::INVALID_VALUE)?;
            if handle.is_null() || kind != HANDLE_POSIX_FD {
                return Err(Code::INVALID_VALUE);
            }
            sim.healthy()?;
            // SAFETY: not -1 (checked above); the caller keeps it open during the call, and if it does not, what is
            // done with it is to ask the kernel, which says that it is not open.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            let device = |uuid: &str| sim.devices.iter().position(|device| device.spec.uuid_text() == uuid);
            let allocation = Allocation::import(sim.handle(), fd, sim.directory()?, device)?;
            sim.devices[allocation.device].touch()?;
            handle.put(give(sim, allocation))
        })
    }

    fn cuMemRetainAllocationHandle(handle: Out<u64>, address: Host) {
        call("cuMemRetainAllocationHandle", |sim| {
            let space = sim.space();
            let found = space.find(address.number()).filter(|found| !space.is_plain(found.start));
            drop(space);
            let found = found.ok_or(Code::INVALID_VALUE)?;
            if handle.is_null() {
                return Err(Code::INVALID_VALUE);
            }
            handle.put(give(sim, found.allocation))
        })
    }

    fn cuMemGetAllocationPropertiesFromHandle(properties: Out<Properties>, handle: u64) {
        call("cuMemGetAllocationPropertiesFromHandle", |sim| {
            let allocation = allocation(sim, handle)?;
            properties.put(Properties {
                kind: ALLOCATION_PINNED,
                handle_types: if allocation.exportable { HANDLE_POSIX_FD } else { 0 },
                location: Location { kind: LOCATION_DEVICE, id: allocation.device as i32 },
                win32: std::ptr::null_mut(),
                compression: 0,
                rdma: u8::from(allocation.rdma),
                usage: 0,
                reserved: [0; 4],
            })
        })
    }

    fn cuMemGetHandleForAddressRange(_handle: OutAny, _address: u64, _size: usize, _kind: u32, _flags: u64) {
        // No dma-buf: there is nothing that an RDMA device could reach.
        call("cuMemGetHandleForAddressRange", |_| Err(Code::NOT_SUPPORTED))
    }
}
