//! Devices and contexts.

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use crate::check::{Checked, Gpu, Wrong, ensure, fails};
use crate::driver::{self, Code};

/// CUDA 12.2, of which Lodestream uses what there is.
const VERSION_MIN: i32 = 12_020;

pub(crate) fn calls_before_init_are_refused() -> Checked {
    fails("a count of devices", driver::device_count(), &[Code::CUDA_ERROR_NOT_INITIALIZED])
}

pub(crate) fn version_is_new_enough() -> Checked {
    let version = driver::version()?;
    ensure!(version >= VERSION_MIN, "the driver has CUDA {version}");
    Ok(())
}

pub(crate) fn devices_are_described() -> Checked {
    driver::init()?;
    let count = driver::device_count()?;
    ensure!(count > 0, "there are {count} devices");
    let mut uuids = Vec::new();
    for ordinal in 0..count {
        let device = driver::device(ordinal)?;
        ensure!(!driver::device_name(device)?.is_empty(), "device {ordinal} has no name");
        ensure!(driver::device_memory(device)? > 0, "device {ordinal} has no memory");
        let uuid = driver::device_uuid(device)?;
        ensure!(uuid != [0; 16] && !uuids.contains(&uuid), "the UUID of device {ordinal} is {uuid:?}");
        uuids.push(uuid);
        let pci = driver::device_pci(device, 32)?;
        let parts = pci.split([':', '.']).filter(|part| u32::from_str_radix(part, 16).is_ok()).count();
        ensure!(parts == 4, "the PCI address of device {ordinal} is {pci:?}");
    }
    fails("a device past the last", driver::device(count), &[Code::CUDA_ERROR_INVALID_DEVICE])?;
    fails("device -1", driver::device(-1), &[Code::CUDA_ERROR_INVALID_DEVICE])
}

pub(crate) fn memory_can_be_shared_by_descriptor() -> Checked {
    driver::init()?;
    for attribute in [
        Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED,
        Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING,
    ] {
        ensure!(driver::attribute(attribute, 0)? == 1, "{attribute:?} is not 1");
    }
    Ok(())
}

pub(crate) fn errors_have_names() -> Checked {
    driver::init()?;
    for (code, name) in [
        (Code::CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"),
        (Code::CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"),
        (Code::CUDA_SUCCESS, "CUDA_SUCCESS"),
    ] {
        let found = driver::error_name(code)?;
        ensure!(found == name, "{code:?} is called {found}");
    }
    Ok(())
}

pub(crate) fn contexts_are_current_on_their_thread() -> Checked {
    let gpu = Gpu::open()?;
    ensure!(driver::current()? == gpu.context, "the context that was made current is not");
    ensure!(driver::current_device()? == gpu.device, "the current context is of another device");
    ensure!(driver::retain(gpu.device)? == gpu.context, "a device has one primary context");
    driver::release_context(gpu.device)?;
    let elsewhere = std::thread::spawn(|| driver::current().map(|context| context.is_null()));
    let elsewhere = elsewhere.join().map_err(|_| Wrong("the thread has panicked".to_owned()))??;
    ensure!(elsewhere, "a new thread has a context");
    Ok(())
}

pub(crate) fn streams_need_a_context() -> Checked {
    driver::init()?;
    fails("memory information", driver::memory_info(), &[Code::CUDA_ERROR_INVALID_CONTEXT])?;
    fails("a stream", driver::stream(0), &[Code::CUDA_ERROR_INVALID_CONTEXT])?;
    fails("an allocation", driver::allocate(1024), &[Code::CUDA_ERROR_INVALID_CONTEXT])
}
