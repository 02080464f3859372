//! Devices and contexts.

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::Ordering;

use super::{CURRENT, STREAMS, current, export, give, healthy};
use crate::code::{self, Outcome};
use crate::machine::{init, machine};

/// The CUDA version that is simulated: 12.2.
const VERSION: c_int = 12020;

/// Attributes that are not zero: compute capability 9.0, unified addressing, memory by descriptor, async engines.
const ATTRIBUTES: &[(c_int, c_int)] = &[
    (1, 1024),
    (10, 32),
    (16, 132),
    (40, 3),
    (41, 1),
    (75, 9),
    (76, 0),
    (83, 0),
    (99, 1),
    (102, 1),
    (103, 1),
    (113, 1),
];
/// `CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID`.
const HOST_NUMA_ID: c_int = 134;

/// Writes a text with its zero into the caller's buffer; cut if that is too short.
fn give_text(buffer: *mut c_char, length: c_int, text: &str) -> Outcome {
    let length = usize::try_from(length).ok().filter(|length| *length > 0).ok_or(code::INVALID_VALUE)?;
    if buffer.is_null() {
        return Err(code::INVALID_VALUE);
    }
    let bytes = &text.as_bytes()[..text.len().min(length - 1)];
    // SAFETY: the buffer has `length` bytes by the API's contract, and `bytes` is shorter.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), buffer, bytes.len()) };
    // SAFETY: as above.
    let end = unsafe { buffer.add(bytes.len()) };
    give(end, 0)
}

fn uuid_bytes(uuid: &str) -> [u8; 16] {
    let digits: Vec<u32> = uuid.chars().skip(4).filter_map(|digit| digit.to_digit(16)).collect();
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = pair.iter().fold(0, |value, digit| value << 4 | *digit as u8);
    }
    bytes
}

fn uuid(place: *mut [u8; 16], ordinal: c_int) -> Outcome {
    let (_, device) = machine()?.device(ordinal)?;
    give(place, uuid_bytes(&device.device.uuid))
}

export! {
    fn cuInit(flags: u32) {
        if flags == 0 { init() } else { Err(code::INVALID_VALUE) }
    }

    fn cuDriverGetVersion(version: *mut c_int) { give(version, VERSION) }

    fn cuDeviceGetCount(count: *mut c_int) { give(count, machine()?.devices.len() as c_int) }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        machine()?.device(ordinal)?;
        give(device, ordinal)
    }

    fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) {
        let (_, device) = machine()?.device(device)?;
        give_text(name, length, &device.device.name)
    }

    fn cuDeviceGetUuid(place: *mut [u8; 16], device: c_int) { uuid(place, device) }

    fn cuDeviceGetUuid_v2(place: *mut [u8; 16], device: c_int) { uuid(place, device) }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) {
        let (_, device) = machine()?.device(device)?;
        give(bytes, device.device.memory_bytes as usize)
    }

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) {
        let (_, state) = machine()?.device(device)?;
        let usual = ATTRIBUTES.iter().find(|(known, _)| *known == attribute).map_or(0, |(_, value)| *value);
        let usual = if attribute == HOST_NUMA_ID { state.device.numa.unwrap_or(-1) } else { usual };
        give(value, state.device.attributes.get(&attribute).copied().unwrap_or(usual))
    }

    fn cuDeviceGetPCIBusId(text: *mut c_char, length: c_int, device: c_int) {
        let (index, state) = machine()?.device(device)?;
        let own = format!("0000:{:02X}:00.0", 0xa0 + index);
        give_text(text, length, state.device.pci.as_deref().unwrap_or(&own))
    }

    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) {
        let (index, state) = machine()?.device(device)?;
        give(context, std::ptr::without_provenance_mut(index + 1))?;
        state.retained.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        let (_, state) = machine()?.device(device)?;
        let lower = |count: u32| count.checked_sub(1);
        state.retained.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lower).map_err(|_| code::INVALID_CONTEXT)?;
        Ok(())
    }

    fn cuCtxSetCurrent(context: *mut c_void) {
        let number = context.addr();
        if number > machine()?.devices.len() {
            return Err(code::INVALID_CONTEXT);
        }
        CURRENT.set(number);
        Ok(())
    }

    fn cuCtxGetCurrent(context: *mut *mut c_void) { give(context, std::ptr::without_provenance_mut(CURRENT.get())) }

    fn cuCtxGetDevice(device: *mut c_int) { give(device, current()?.0 as c_int) }

    fn cuCtxSynchronize() {
        let (machine, index, _) = healthy()?;
        machine.default_stream(index).wait();
        for stream in STREAMS.all().into_iter().filter(|stream| stream.device == index) {
            stream.wait();
        }
        healthy().map(|_| ())
    }

    fn cuGetErrorName(error: u32, text: *mut *const c_char) { error_text(error, text) }

    fn cuGetErrorString(error: u32, text: *mut *const c_char) { error_text(error, text) }
}

fn error_text(error: u32, text: *mut *const c_char) -> Outcome {
    give(text, code::name(error).ok_or(code::INVALID_VALUE)?.as_ptr().cast())
}
