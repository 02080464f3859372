//! Device addresses: reserved, mapped, made accessible; allocations of the old kind; registered host memory.

use super::physical::{allocation, located};
use super::{call, exported};
use crate::abi::{AccessDescription, Code, Host, In, Location, Out, OutAny};
use crate::config::GRANULARITY;
use crate::sim::Sim;
use crate::space::Access;
use crate::store::Wanted;

/// Descriptions of access in one call: more than there can be devices is a mistake.
const DESCRIPTIONS_MAX: usize = 1024;

fn is_aligned(value: u64) -> bool {
    value.is_multiple_of(GRANULARITY)
}

/// `CU_POINTER_ATTRIBUTE_*`, as far as they are answered.
mod attribute {
    pub(super) const CONTEXT: u32 = 1;
    pub(super) const MEMORY_TYPE: u32 = 2;
    pub(super) const DEVICE_POINTER: u32 = 3;
    pub(super) const IS_MANAGED: u32 = 8;
    pub(super) const DEVICE_ORDINAL: u32 = 9;
    pub(super) const RANGE_START: u32 = 11;
    pub(super) const RANGE_SIZE: u32 = 12;
    pub(super) const MAPPED: u32 = 13;
}

/// `CU_MEMORYTYPE_DEVICE`.
const MEMORY_DEVICE: u32 = 2;

fn allocate(sim: &Sim, bytes: u64) -> Result<u64, Code> {
    let context = sim.usable()?;
    let bytes = bytes.checked_next_multiple_of(GRANULARITY).filter(|bytes| *bytes > 0);
    let bytes = bytes.ok_or(Code::INVALID_VALUE)?;
    let device = context.device.index;
    let wanted = Wanted { id: sim.handle(), device, bytes, exportable: false, rdma: false };
    let allocation = context.device.store.create(wanted)?;
    let mut space = sim.space_mut();
    let start = space.reserve(bytes, GRANULARITY, 0)?;
    space.map(start, bytes, allocation)?;
    space.set_access(start, bytes, device, Access::ReadWrite)?;
    space.note_plain(start, device);
    Ok(start)
}

exported! {
    fn cuMemAddressReserve(address: Out<u64>, size: usize, alignment: usize, hint: u64, flags: u64) {
        call("cuMemAddressReserve", |sim| {
            let (bytes, alignment) = (size as u64, alignment as u64);
            let known = flags == 0 && (alignment == 0 || alignment.is_power_of_two());
            if address.is_null() || !known || bytes == 0 || !is_aligned(bytes) {
                return Err(Code::INVALID_VALUE);
            }
            sim.healthy()?;
            let start = sim.space_mut().reserve(bytes, alignment.max(GRANULARITY), hint)?;
            address.put(start)
        })
    }

    fn cuMemAddressFree(address: u64, size: usize) {
        call("cuMemAddressFree", |sim| {
            let mut space = sim.space_mut();
            if space.is_plain(address) { Err(Code::INVALID_VALUE) } else { space.free(address, size as u64) }
        })
    }

    fn cuMemMap(address: u64, size: usize, offset: usize, handle: u64, flags: u64) {
        call("cuMemMap", |sim| {
            let bytes = size as u64;
            let allocation = allocation(sim, handle)?;
            // An offset is reserved for later versions of the C API.
            if flags != 0 || offset != 0 || !is_aligned(address) || !is_aligned(bytes) {
                return Err(Code::INVALID_VALUE);
            }
            sim.healthy()?;
            sim.devices[allocation.device].touch()?;
            sim.space_mut().map(address, bytes, allocation)
        })
    }

    fn cuMemUnmap(address: u64, size: usize) {
        call("cuMemUnmap", |sim| {
            // Work that was submitted before may use it.
            sim.settle();
            let mut space = sim.space_mut();
            if space.is_plain(address) {
                return Err(Code::INVALID_VALUE);
            }
            let held = space.unmap(address, size as u64)?;
            drop(space);
            drop(held);
            Ok(())
        })
    }

    fn cuMemSetAccess(address: u64, size: usize, descriptions: In<AccessDescription>, count: usize) {
        call("cuMemSetAccess", |sim| {
            if count == 0 || count > DESCRIPTIONS_MAX || descriptions.is_null() {
                return Err(Code::INVALID_VALUE);
            }
            sim.healthy()?;
            for index in 0..count {
                let description = descriptions.at(index)?;
                let device = located(sim, description.location)?;
                let access = Access::from_flags(description.flags)?;
                device.touch()?;
                if access < Access::ReadWrite {
                    // What was submitted before was allowed to write.
                    sim.settle();
                }
                sim.space_mut().set_access(address, size as u64, device.index, access)?;
            }
            Ok(())
        })
    }

    fn cuMemGetAccess(flags: Out<u64>, location: In<Location>, address: u64) {
        call("cuMemGetAccess", |sim| {
            let device = located(sim, location.get()?)?;
            let found = sim.space().find(address).ok_or(Code::INVALID_VALUE)?;
            let own = found.allocation.device == device.index;
            flags.put(if own { found.access } else { Access::None }.flags())
        })
    }

    fn cuMemAlloc_v2(address: Out<u64>, size: usize) {
        call("cuMemAlloc_v2", |sim| {
            if address.is_null() {
                return Err(Code::INVALID_VALUE);
            }
            address.put(allocate(sim, size as u64)?)
        })
    }

    fn cuMemFree_v2(address: u64) {
        call("cuMemFree_v2", |sim| {
            if address == 0 {
                return Ok(());
            }
            sim.settle();
            let freed = sim.space_mut().free_plain(address)?;
            drop(freed);
            Ok(())
        })
    }

    fn cuMemHostRegister_v2(start: Host, size: usize, flags: u32) {
        call("cuMemHostRegister_v2", |sim| {
            let device = sim.usable()?.device.index;
            sim.registrations().register(start, size as u64, flags, device)
        })
    }

    fn cuMemHostUnregister(start: Host) {
        call("cuMemHostUnregister", |sim| {
            if !sim.registrations().contains(start) {
                return Err(Code::HOST_MEMORY_NOT_REGISTERED);
            }
            // Copies that were submitted before may use it.
            sim.settle();
            sim.registrations().unregister(start)
        })
    }

    fn cuPointerGetAttribute(data: OutAny, number: u32, address: u64) {
        call("cuPointerGetAttribute", |sim| {
            let found = sim.space().find(address).ok_or(Code::INVALID_VALUE)?;
            let device = found.allocation.device;
            match number {
                attribute::CONTEXT => {
                    // Memory that is mapped by hand belongs to no context.
                    let plain = sim.space().is_plain(found.start);
                    data.of().put(if plain { sim.handle_of_device(device) } else { 0 })
                }
                attribute::MEMORY_TYPE => data.of().put(MEMORY_DEVICE),
                attribute::DEVICE_POINTER => data.of().put(address),
                attribute::IS_MANAGED => data.of().put(0u32),
                attribute::DEVICE_ORDINAL => data.of().put(device as i32),
                attribute::RANGE_START => data.of().put(found.start),
                attribute::RANGE_SIZE => data.of().put(found.bytes as usize),
                attribute::MAPPED => data.of().put(1u32),
                _ => Err(Code::NOT_SUPPORTED),
            }
        })
    }
}
