//! A simulated NVML for tests: `libnvidia-ml.so.1` with the functions that Lodestream asks for.
//!
//! Its devices are those of the simulated CUDA driver (`cuda-sim-devices`). Their health is what `health.json` in the
//! directory of the simulated machine says at each call, see `README.md`. Every name says `Simulated`, and so does the
//! version of the driver. Handles are numbers and are never followed, so a wrong one is an error and no crash.
#![allow(non_snake_case, reason = "the names are NVML's")]

mod machine;

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_ulonglong};
use std::time::Duration;

use machine::{Events, Target, ask, handle};
use nvml_wrapper_sys::bindings::{
    field_id, nvmlBAR1Memory_t, nvmlDevice_t, nvmlDeviceAttributes_t, nvmlEventData_t, nvmlEventSet_t,
    nvmlFieldValue_t, nvmlMemory_v2_t, nvmlPciInfo_t,
    nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE as INSUFFICIENT_SIZE,
    nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT as INVALID_ARGUMENT,
    nvmlReturn_enum_NVML_ERROR_NOT_FOUND as NOT_FOUND,
    nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED as NOT_SUPPORTED, nvmlReturn_enum_NVML_ERROR_TIMEOUT as TIMEOUT,
    nvmlReturn_enum_NVML_SUCCESS as SUCCESS, nvmlReturn_t, nvmlUtilization_t, nvmlValue_t,
    nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG_LONG as UNSIGNED_LONG_LONG,
};

/// What the simulated driver calls itself.
const DRIVER_VERSION: &str = "550.0-Simulated";
/// CUDA 12.4, the CUDA of that driver.
const CUDA_VERSION: c_int = 12_040;
/// The link of every simulated GPU: PCIe 5, 16 lanes.
const LINK_GENERATION: c_uint = 5;
const LINK_WIDTH: c_uint = 16;
/// BAR1 of every simulated GPU is as large as the smallest of real ones that can map all their memory.
const BAR1_BYTES: u64 = 128 << 30;
/// `nvmlEventTypeXidCriticalError`.
const XID_CRITICAL: c_ulonglong = 8;

/// # Safety
/// `out` is null or may be written to.
unsafe fn give<T>(out: *mut T, value: Result<T, nvmlReturn_t>) -> nvmlReturn_t {
    match value {
        Err(error) => error,
        Ok(_) if out.is_null() => INVALID_ARGUMENT,
        Ok(value) => {
            // SAFETY: not null, and the caller's promise.
            unsafe { out.write(value) };
            SUCCESS
        }
    }
}

/// # Safety
/// `out` is null or has `length` bytes that may be written to.
unsafe fn give_text(out: *mut c_char, length: c_uint, text: Result<&str, nvmlReturn_t>) -> nvmlReturn_t {
    let text = match text {
        Ok(text) => text.as_bytes(),
        Err(error) => return error,
    };
    if out.is_null() {
        return INVALID_ARGUMENT;
    }
    if text.len() >= length as usize {
        return INSUFFICIENT_SIZE;
    }
    // SAFETY: `out` has `length` bytes by the caller's promise, which is more than the text has.
    unsafe { out.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len()) };
    // SAFETY: as above: there is room for one more byte.
    let end = unsafe { out.add(text.len()) };
    // SAFETY: as above.
    unsafe { end.write(0) };
    SUCCESS
}

fn done(result: Result<(), nvmlReturn_t>) -> nvmlReturn_t {
    result.err().unwrap_or(SUCCESS)
}

/// Functions that are asked with nothing but a device, and answer with one value.
macro_rules! of_device {
    ($($name:ident: $type:ty = $answer:expr;)*) => {$(
        /// As NVML documents it.
        ///
        /// # Safety
        /// `out` is null or may be written to.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(device: nvmlDevice_t, out: *mut $type) -> nvmlReturn_t {
            let answer: fn(&Target) -> Result<$type, nvmlReturn_t> = $answer;
            // SAFETY: the caller's promise.
            unsafe { give(out, ask(device).and_then(|target| answer(&target))) }
        }
    )*};
}

/// Functions that answer with a text.
macro_rules! text_of_device {
    ($($name:ident = $answer:expr;)*) => {$(
        /// As NVML documents it.
        ///
        /// # Safety
        /// `out` is null or has `length` bytes that may be written to.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(device: nvmlDevice_t, out: *mut c_char, length: c_uint) -> nvmlReturn_t {
            let answer: fn(&Target) -> &str = $answer;
            let target = ask(device);
            // SAFETY: the caller's promise.
            unsafe { give_text(out, length, target.as_ref().map(answer).map_err(|error| *error)) }
        }
    )*};
}

/// What only a whole GPU answers.
fn whole<T>(target: &Target, value: T) -> Result<T, nvmlReturn_t> {
    if target.instance.is_some() { Err(NOT_SUPPORTED) } else { Ok(value) }
}

of_device! {
    nvmlDeviceGetIndex: c_uint = |target| whole(target, target.gpu.index);
    nvmlDeviceGetMinorNumber: c_uint = |target| whole(target, target.gpu.index);
    nvmlDeviceGetPciInfo_v3: nvmlPciInfo_t = |target| Ok(pci_info(target));
    nvmlDeviceGetBAR1MemoryInfo: nvmlBAR1Memory_t =
        |target| whole(target, nvmlBAR1Memory_t { bar1Total: BAR1_BYTES, bar1Free: BAR1_BYTES, bar1Used: 0 });
    nvmlDeviceGetUtilizationRates: nvmlUtilization_t =
        |target| whole(target, nvmlUtilization_t { gpu: target.health.utilization, memory: 0 });
    nvmlDeviceGetCurrPcieLinkGeneration: c_uint = |target| whole(target, LINK_GENERATION);
    nvmlDeviceGetMaxPcieLinkGeneration: c_uint = |target| whole(target, LINK_GENERATION);
    nvmlDeviceGetCurrPcieLinkWidth: c_uint = |target| whole(target, target.health.link_width.unwrap_or(LINK_WIDTH));
    nvmlDeviceGetMaxPcieLinkWidth: c_uint = |target| whole(target, LINK_WIDTH);
    nvmlDeviceGetPowerUsage: c_uint = |target| whole(target, target.health.power_milliwatts.unwrap_or(70_000));
    nvmlDeviceGetCurrentClocksThrottleReasons: c_ulonglong = |target| whole(target, target.health.throttle);
    nvmlDeviceGetMaxMigDeviceCount: c_uint = |target| whole(target, target.gpu.instances.len() as c_uint);
    nvmlDeviceIsMigDeviceHandle: c_uint = |target| Ok(c_uint::from(target.instance.is_some()));
    nvmlDeviceGetGpuInstanceId: c_uint = |target| target.instance.map(|instance| instance as c_uint + 1).ok_or(NOT_SUPPORTED);
    nvmlDeviceGetDeviceHandleFromMigDeviceHandle: nvmlDevice_t =
        |target| target.instance.map(|_| handle(target.gpu.index, None)).ok_or(INVALID_ARGUMENT);
    nvmlDeviceGetAttributes_v2: nvmlDeviceAttributes_t = attributes;
    nvmlDeviceGetSupportedEventTypes: c_ulonglong = |target| whole(target, XID_CRITICAL);
}

text_of_device! {
    nvmlDeviceGetName = Target::name;
    nvmlDeviceGetUUID = Target::uuid;
}

fn pci_info(target: &Target) -> nvmlPciInfo_t {
    let pci = target.gpu.pci;
    let mut info = nvmlPciInfo_t {
        busIdLegacy: [0; 16],
        domain: pci.domain,
        bus: c_uint::from(pci.bus),
        device: c_uint::from(pci.device),
        pciDeviceId: 0x2330_10de,
        pciSubSystemId: 0,
        busId: [0; 32],
    };
    let long = format!("{:08X}:{:02X}:{:02X}.0", pci.domain, pci.bus, pci.device);
    // Shorter than the field, so that it ends with a zero.
    for (place, byte) in info.busId.iter_mut().take(31).zip(long.bytes()) {
        *place = byte as c_char;
    }
    info
}

fn attributes(target: &Target) -> Result<nvmlDeviceAttributes_t, nvmlReturn_t> {
    let instance = target.instance().ok_or(NOT_SUPPORTED)?;
    Ok(nvmlDeviceAttributes_t {
        multiprocessorCount: 14,
        sharedCopyEngineCount: 1,
        sharedDecoderCount: 0,
        sharedEncoderCount: 0,
        sharedJpegCount: 0,
        sharedOfaCount: 0,
        gpuInstanceSliceCount: 1,
        computeInstanceSliceCount: 1,
        memorySizeMB: instance.memory_bytes >> 20,
    })
}

/// As NVML documents it.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> nvmlReturn_t {
    done(machine::start())
}

/// As NVML documents it; the flags ask for what is so anyway.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> nvmlReturn_t {
    done(machine::start())
}

/// As NVML documents it.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> nvmlReturn_t {
    done(machine::stop())
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or has `length` bytes that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(out: *mut c_char, length: c_uint) -> nvmlReturn_t {
    // SAFETY: the caller's promise.
    unsafe { give_text(out, length, machine::all().map(|_| DRIVER_VERSION)) }
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or has `length` bytes that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetNVMLVersion(out: *mut c_char, length: c_uint) -> nvmlReturn_t {
    // SAFETY: the caller's promise.
    unsafe { give_text(out, length, machine::all().map(|_| "12.550.0-Simulated")) }
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(out: *mut c_int) -> nvmlReturn_t {
    // SAFETY: the caller's promise.
    unsafe { give(out, machine::all().map(|_| CUDA_VERSION)) }
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(out: *mut c_uint) -> nvmlReturn_t {
    // SAFETY: the caller's promise.
    unsafe { give(out, machine::all().map(|gpus| gpus.len() as c_uint)) }
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(
    index: c_uint,
    out: *mut nvmlDevice_t,
) -> nvmlReturn_t {
    let found = machine::all()
        .and_then(|gpus| gpus.get(index as usize).map(|gpu| handle(gpu.index, None)).ok_or(INVALID_ARGUMENT));
    // SAFETY: the caller's promise.
    unsafe { give(out, found) }
}

/// As NVML documents it.
///
/// # Safety
/// `uuid` is null or a text that ends with a zero; `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByUUID(
    uuid: *const c_char,
    out: *mut nvmlDevice_t,
) -> nvmlReturn_t {
    if uuid.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and the caller's promise.
    let uuid = unsafe { CStr::from_ptr(uuid) }.to_bytes();
    let found = machine::all().and_then(|gpus| {
        gpus.iter()
            .find_map(|gpu| {
                if gpu.uuid.as_bytes() == uuid {
                    return Some(handle(gpu.index, None));
                }
                let instance = gpu.instances.iter().position(|instance| instance.uuid.as_bytes() == uuid)?;
                Some(handle(gpu.index, Some(instance)))
            })
            .ok_or(NOT_FOUND)
    });
    // SAFETY: the caller's promise.
    unsafe { give(out, found) }
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or is a structure whose `version` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(
    device: nvmlDevice_t,
    out: *mut nvmlMemory_v2_t,
) -> nvmlReturn_t {
    let answer = ask(device).map(|target| {
        let total = target.memory_bytes();
        // Who uses what of an instance is not simulated.
        let used = if target.instance.is_some() { 0 } else { target.health.memory_used_bytes.min(total) };
        nvmlMemory_v2_t {
            version: size_of::<nvmlMemory_v2_t>() as c_uint | 2 << 24,
            total,
            reserved: 0,
            free: total - used,
            used,
        }
    });
    // SAFETY: the caller's promise.
    unsafe { give(out, answer) }
}

/// As NVML documents it. The throughput is always 0.
///
/// # Safety
/// `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPcieThroughput(
    device: nvmlDevice_t,
    counter: c_uint,
    out: *mut c_uint,
) -> nvmlReturn_t {
    let answer =
        ask(device).and_then(|target| if counter > 1 { Err(INVALID_ARGUMENT) } else { whole(&target, 0) });
    // SAFETY: the caller's promise.
    unsafe { give(out, answer) }
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(
    device: nvmlDevice_t,
    sensor: c_uint,
    out: *mut c_uint,
) -> nvmlReturn_t {
    let answer = ask(device).and_then(|target| {
        let temperature = target.health.temperature.unwrap_or(35);
        if sensor == 0 { whole(&target, temperature) } else { Err(INVALID_ARGUMENT) }
    });
    // SAFETY: the caller's promise.
    unsafe { give(out, answer) }
}

/// As NVML documents it. What happened since the driver was loaded is all that ever happened.
///
/// # Safety
/// `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    device: nvmlDevice_t,
    error: c_uint,
    counter: c_uint,
    out: *mut c_ulonglong,
) -> nvmlReturn_t {
    let answer = ask(device).and_then(|target| match (error, counter) {
        (0, 0..=1) => whole(&target, target.health.ecc_corrected),
        (1, 0..=1) => whole(&target, target.health.ecc_uncorrected),
        _ => Err(INVALID_ARGUMENT),
    });
    // SAFETY: the caller's promise.
    unsafe { give(out, answer) }
}

/// As NVML documents it, for the fields of remapped rows.
///
/// # Safety
/// `values` is null or has `count` elements whose fields are set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(
    device: nvmlDevice_t,
    count: c_int,
    values: *mut nvmlFieldValue_t,
) -> nvmlReturn_t {
    let target = match ask(device) {
        Ok(target) => target,
        Err(error) => return error,
    };
    let Some(count) = usize::try_from(count).ok().filter(|count| *count > 0 && !values.is_null()) else {
        return INVALID_ARGUMENT;
    };
    // SAFETY: not null, and the caller's promise.
    let values = unsafe { std::slice::from_raw_parts_mut(values, count) };
    let health = &target.health;
    for value in values {
        let known = match value.fieldId {
            field_id::NVML_FI_DEV_REMAPPED_COR => Some(health.remapped_rows_corrected),
            field_id::NVML_FI_DEV_REMAPPED_UNC => Some(health.remapped_rows),
            field_id::NVML_FI_DEV_REMAPPED_PENDING => Some(health.remap_pending.into()),
            field_id::NVML_FI_DEV_REMAPPED_FAILURE => Some(health.remap_failed.into()),
            _ => None,
        };
        value.valueType = UNSIGNED_LONG_LONG;
        value.nvmlReturn = if known.is_some() { SUCCESS } else { NOT_SUPPORTED };
        value.value = nvmlValue_t { ullVal: known.unwrap_or_default() };
    }
    SUCCESS
}

/// As NVML documents it.
///
/// # Safety
/// `current` and `pending` are null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(
    device: nvmlDevice_t,
    current: *mut c_uint,
    pending: *mut c_uint,
) -> nvmlReturn_t {
    let mode = ask(device).and_then(|target| whole(&target, c_uint::from(!target.gpu.instances.is_empty())));
    // SAFETY: the caller's promise.
    let first = unsafe { give(current, mode) };
    // SAFETY: the caller's promise.
    let second = unsafe { give(pending, mode) };
    if first == SUCCESS { second } else { first }
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    device: nvmlDevice_t,
    index: c_uint,
    out: *mut nvmlDevice_t,
) -> nvmlReturn_t {
    let found = ask(device).and_then(|target| whole(&target, ()).map(|()| target)).and_then(|target| {
        let place = index as usize;
        target.gpu.instances.get(place).map(|_| handle(target.gpu.index, Some(place))).ok_or(NOT_FOUND)
    });
    // SAFETY: the caller's promise.
    unsafe { give(out, found) }
}

/// As NVML documents it.
///
/// # Safety
/// `set` is null or has `words` elements that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryAffinity(
    device: nvmlDevice_t,
    words: c_uint,
    set: *mut c_ulong,
    _scope: c_uint,
) -> nvmlReturn_t {
    let node = match ask(device).and_then(|target| target.gpu.numa.ok_or(NOT_SUPPORTED)) {
        Ok(node) => node,
        Err(error) => return error,
    };
    if set.is_null() || words == 0 {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and the caller's promise.
    let set = unsafe { std::slice::from_raw_parts_mut(set, words as usize) };
    set.fill(0);
    match set.get_mut((node / c_ulong::BITS) as usize) {
        Some(word) => *word = 1 << (node % c_ulong::BITS),
        None => return INSUFFICIENT_SIZE,
    }
    SUCCESS
}

/// As NVML documents it.
///
/// # Safety
/// `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetCreate(out: *mut nvmlEventSet_t) -> nvmlReturn_t {
    if out.is_null() {
        return INVALID_ARGUMENT;
    }
    let set = machine::all().and_then(|_| Events::new()).map(|events| Box::into_raw(Box::new(events)).cast());
    // SAFETY: the caller's promise.
    unsafe { give(out, set) }
}

/// # Safety
/// `set` is null or was given by `nvmlEventSetCreate`, not freed, and is used by one thread at a time.
unsafe fn events<'a>(set: nvmlEventSet_t) -> Result<&'a mut Events, nvmlReturn_t> {
    // SAFETY: the caller's promise.
    unsafe { set.cast::<Events>().as_mut() }.ok_or(INVALID_ARGUMENT)
}

/// As NVML documents it, for XIDs only.
///
/// # Safety
/// `set` is null or a set that is not freed, used by one thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceRegisterEvents(
    device: nvmlDevice_t,
    types: c_ulonglong,
    set: nvmlEventSet_t,
) -> nvmlReturn_t {
    if types & !XID_CRITICAL != 0 {
        return NOT_SUPPORTED;
    }
    // SAFETY: the caller's promise.
    let events = unsafe { events(set) };
    done(events.and_then(|events| ask(device).map(|target| events.register(&target.gpu))))
}

/// As NVML documents it.
///
/// # Safety
/// `set` is null or a set that is not freed, used by one thread at a time; `out` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetWait_v2(
    set: nvmlEventSet_t,
    out: *mut nvmlEventData_t,
    timeout_ms: c_uint,
) -> nvmlReturn_t {
    // SAFETY: the caller's promise.
    let events = match unsafe { events(set) } {
        Ok(events) => events,
        Err(error) => return error,
    };
    let event = events.wait(Duration::from_millis(timeout_ms.into())).and_then(|event| event.ok_or(TIMEOUT));
    let event = event.map(|(gpu, xid)| nvmlEventData_t {
        device: handle(gpu, None),
        eventType: XID_CRITICAL,
        eventData: xid,
        gpuInstanceId: c_uint::MAX,
        computeInstanceId: c_uint::MAX,
    });
    // SAFETY: the caller's promise.
    unsafe { give(out, event) }
}

/// As NVML documents it.
///
/// # Safety
/// `set` is null or a set that is not freed, and is not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetFree(set: nvmlEventSet_t) -> nvmlReturn_t {
    if set.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: made by `Box::into_raw` in `nvmlEventSetCreate`; the caller gives it up.
    drop(unsafe { Box::from_raw(set.cast::<Events>()) });
    SUCCESS
}
