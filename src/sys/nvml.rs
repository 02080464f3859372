//! What NVML knows and its safe wrapper does not ask for.

use nvml_wrapper::Device;

/// The number of the GPU instance (MIG) that `device` is; nothing if it is none, or the driver does not say.
pub fn gpu_instance(device: &Device<'_>) -> Option<u32> {
    let call = device.nvml().lib().nvmlDeviceGetGpuInstanceId.as_ref().ok()?;
    let mut id = 0;
    // SAFETY: the handle is only passed on in the next call, while `device` lives.
    let handle = unsafe { device.handle() };
    // SAFETY: the function is NVML's, which is loaded as long as `device` borrows it; `id` lives through the call.
    let result = unsafe { call(handle, &mut id) };
    nvml_wrapper::error::nvml_try(result).ok()?;
    Some(id)
}

/// Whether both are handles of the same device. Asks no driver: a lost device can still be told by it.
pub fn same(one: &Device<'_>, other: &Device<'_>) -> bool {
    // SAFETY: the handle is compared and not used.
    let one = unsafe { one.handle() };
    // SAFETY: as above.
    let other = unsafe { other.handle() };
    one == other
}
