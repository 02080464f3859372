//! Physical memory and addresses, in one process.

use crate::check::{Checked, Gpu, ensure, fails, fails_somehow, pattern, same};
use crate::driver::{self, Code, READ, READ_WRITE};

const INVALID: &[Code] = &[Code::CUDA_ERROR_INVALID_VALUE];

pub(crate) fn granularity_is_a_power_of_two() -> Checked {
    let gpu = Gpu::open()?;
    let (minimum, recommended) = driver::granularities(gpu.device)?;
    ensure!(minimum.is_power_of_two() && recommended.is_power_of_two(), "{minimum} and {recommended}");
    ensure!(minimum <= recommended, "the least is {minimum}, and {recommended} is recommended");
    Ok(())
}

pub(crate) fn sizes_are_whole_units() -> Checked {
    let gpu = Gpu::open()?;
    let (minimum, _) = driver::granularities(gpu.device)?;
    fails("half a unit", driver::create(gpu.device, minimum / 2), INVALID)?;
    fails("a unit and a half", driver::create(gpu.device, minimum + minimum / 2), INVALID)?;
    fails("no bytes", driver::create(gpu.device, 0), INVALID)
}

pub(crate) fn memory_on_no_device_is_refused() -> Checked {
    let gpu = Gpu::open()?;
    let device = driver::device_count()?;
    fails_somehow("memory on a device past the last", driver::create(device, gpu.unit))
}

pub(crate) fn more_than_there_is_is_out_of_memory() -> Checked {
    let gpu = Gpu::open()?;
    let total = driver::device_memory(gpu.device)?.next_multiple_of(gpu.unit);
    let answer = driver::create(gpu.device, total + gpu.unit);
    fails("more than all memory", answer, &[Code::CUDA_ERROR_OUT_OF_MEMORY])?;
    // Nothing is lost by it.
    gpu.memory(1, READ_WRITE)?.close()
}

pub(crate) fn free_memory_is_counted() -> Checked {
    /// Other processes may use the device meanwhile: it must be right once.
    const ATTEMPTS: usize = 5;
    let gpu = Gpu::open()?;
    let bytes = (64u64 << 20).next_multiple_of(gpu.unit);
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let (before, total) = driver::memory_info()?;
        let handle = driver::create(gpu.device, bytes)?;
        let (during, _) = driver::memory_info()?;
        driver::release(handle)?;
        let (after, _) = driver::memory_info()?;
        ensure!(before <= total, "{before} bytes of {total} are free");
        if before.saturating_sub(during) >= bytes && after.saturating_sub(during) >= bytes {
            return Ok(());
        }
        seen.push((before, during, after));
    }
    ensure!(false, "free before, during and after an allocation of {bytes} bytes: {seen:?}");
    Ok(())
}

pub(crate) fn bytes_come_back() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(2, READ_WRITE)?;
    let bytes = pattern(1, memory.bytes);
    driver::write(memory.address, &bytes)?;
    same("all", &driver::read(memory.address, memory.bytes)?, &bytes)?;
    same("some", &driver::read(memory.address + 777, 1001)?, &bytes[777..1778])?;
    memory.close()
}

pub(crate) fn allocations_lie_side_by_side() -> Checked {
    let gpu = Gpu::open()?;
    let address = driver::reserve(3 * gpu.unit, 0)?;
    let handles = [driver::create(gpu.device, gpu.unit)?, driver::create(gpu.device, 2 * gpu.unit)?];
    driver::map(address, gpu.unit, handles[0])?;
    driver::map(address + gpu.unit, 2 * gpu.unit, handles[1])?;
    driver::set_access(address, 3 * gpu.unit, gpu.device, READ_WRITE)?;
    let bytes = pattern(2, 3 * gpu.unit);
    driver::write(address, &bytes)?;
    let (start, length) = (gpu.unit - 100, 200);
    let across = &bytes[start as usize..(start + length) as usize];
    same("across the border", &driver::read(address + start, length)?, across)?;
    driver::unmap(address, 3 * gpu.unit)?;
    handles.iter().try_for_each(|handle| driver::release(*handle))?;
    driver::free_address(address, 3 * gpu.unit)?;
    Ok(())
}

pub(crate) fn addresses_are_aligned_as_asked() -> Checked {
    let gpu = Gpu::open()?;
    for alignment in [0, gpu.unit, 16 * gpu.unit] {
        let address = driver::reserve(gpu.unit, alignment)?;
        ensure!(address % alignment.max(gpu.unit) == 0, "{address:#x} for an alignment of {alignment}");
        driver::free_address(address, gpu.unit)?;
    }
    fails("no addresses", driver::reserve(0, 0), INVALID)
}

pub(crate) fn a_reservation_is_freed_whole_and_empty() -> Checked {
    let gpu = Gpu::open()?;
    let address = driver::reserve(2 * gpu.unit, 0)?;
    fails("a part of it", driver::free_address(address, gpu.unit), INVALID)?;
    let handle = driver::create(gpu.device, gpu.unit)?;
    driver::map(address, gpu.unit, handle)?;
    fails_somehow("one that is mapped", driver::free_address(address, 2 * gpu.unit))?;
    driver::unmap(address, gpu.unit)?;
    driver::release(handle)?;
    driver::free_address(address, 2 * gpu.unit)?;
    Ok(())
}

pub(crate) fn nothing_is_mapped_twice() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    let other = driver::create(gpu.device, gpu.unit)?;
    fails_somehow("over a mapping", driver::map(memory.address, gpu.unit, other))?;
    driver::release(other)?;
    memory.close()
}

pub(crate) fn what_is_not_reserved_is_not_mapped() -> Checked {
    let gpu = Gpu::open()?;
    let handle = driver::create(gpu.device, 2 * gpu.unit)?;
    let address = driver::reserve(gpu.unit, 0)?;
    fails_somehow("past the reservation", driver::map(address, 2 * gpu.unit, handle))?;
    driver::free_address(address, gpu.unit)?;
    fails_somehow("a reservation that was freed", driver::map(address, gpu.unit, handle))?;
    driver::release(handle)?;
    Ok(())
}

pub(crate) fn a_mapping_is_taken_out_whole() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(2, READ_WRITE)?;
    fails("half of it", driver::unmap(memory.address, gpu.unit), INVALID)?;
    driver::unmap(memory.address, memory.bytes)?;
    fails_somehow("once more", driver::unmap(memory.address, memory.bytes))?;
    driver::release(memory.handle)?;
    driver::free_address(memory.address, memory.bytes)?;
    Ok(())
}

pub(crate) fn mappings_outlive_their_handle() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    driver::release(memory.handle)?;
    let bytes = pattern(3, memory.bytes);
    driver::write(memory.address, &bytes)?;
    same("after the release", &driver::read(memory.address, memory.bytes)?, &bytes)?;
    driver::unmap(memory.address, memory.bytes)?;
    driver::free_address(memory.address, memory.bytes)?;
    Ok(())
}

pub(crate) fn a_handle_is_had_from_an_address() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    let handle = driver::retain_handle(memory.address)?;
    let (device, shareable) = driver::properties_of(handle)?;
    ensure!(device == gpu.device && shareable, "it is on device {device}; shareable: {shareable}");
    driver::release(memory.handle)?;
    // The one that was retained still holds it.
    driver::export(handle)?;
    driver::release(handle)?;
    driver::unmap(memory.address, memory.bytes)?;
    driver::free_address(memory.address, memory.bytes)?;
    fails_somehow("of no mapping", driver::retain_handle(memory.address))
}

pub(crate) fn access_is_told() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    let found = driver::access(memory.address, gpu.device)?;
    ensure!(found == READ_WRITE as u64, "it is {found}");
    driver::set_access(memory.address, memory.bytes, gpu.device, READ)?;
    let found = driver::access(memory.address, gpu.device)?;
    ensure!(found == READ as u64, "after a change to reading only it is {found}");
    memory.close()
}

/// Memory can be given up and taken back at the same addresses.
pub(crate) fn addresses_are_used_again() -> Checked {
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    driver::write(memory.address, &pattern(4, memory.bytes))?;
    driver::unmap(memory.address, memory.bytes)?;
    driver::release(memory.handle)?;
    let other = gpu.memory(1, READ_WRITE)?;
    let bytes = pattern(5, other.bytes);
    driver::write(other.address, &bytes)?;
    driver::map(memory.address, memory.bytes, other.handle)?;
    driver::set_access(memory.address, memory.bytes, gpu.device, READ)?;
    same("at the old address", &driver::read(memory.address, memory.bytes)?, &bytes)?;
    driver::unmap(memory.address, memory.bytes)?;
    driver::free_address(memory.address, memory.bytes)?;
    other.close()
}

pub(crate) fn plain_allocations_work() -> Checked {
    let _gpu = Gpu::open()?;
    let address = driver::allocate(100_000)?;
    let bytes = pattern(6, 100_000);
    driver::write(address, &bytes)?;
    same("all", &driver::read(address, 100_000)?, &bytes)?;
    driver::free(address)?;
    fails("freed twice", driver::free(address), INVALID)?;
    fails("no bytes", driver::allocate(0), INVALID)
}

pub(crate) fn pointers_are_told_apart() -> Checked {
    /// `CU_MEMORYTYPE_DEVICE`.
    const DEVICE: u32 = 2;
    let gpu = Gpu::open()?;
    let memory = gpu.memory(1, READ_WRITE)?;
    let (kind, device) = driver::pointer(memory.address + 12)?;
    ensure!(kind == DEVICE && device == gpu.device, "kind {kind} on device {device}");
    memory.close()?;
    fails("an address of nothing", driver::pointer(memory.address), INVALID)
}
