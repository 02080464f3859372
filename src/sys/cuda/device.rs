//! Devices and their contexts.

use std::ffi::c_char;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUdevice_attribute as Attribute, CUuuid};

use super::{CudaError, check, library_present};

/// Longest name that is asked for, bytes.
const NAME_BYTES: usize = 256;

/// What a search for devices came to.
#[derive(Debug)]
pub enum Found {
    /// There is no libcuda.
    NoLibrary,
    /// There is one, but it cannot be used: no driver, no device, no permission.
    Unusable(CudaError),
    /// Devices, in the driver's order.
    Devices(Vec<Device>),
}

/// A GPU, or an instance of one (MIG), as this process sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The driver's number for it in this process.
    ordinal: i32,
    /// `GPU-…`, or `MIG-…` for an instance.
    pub uuid: String,
    /// The same as the driver gives it.
    uuid_bytes: [u8; 16],
    /// Name of the model. A simulated device says so here.
    pub name: String,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// PCI address (`0000:3b:00.0`).
    pub pci_address: Option<String>,
    /// Whether its memory can be shared by descriptor.
    pub shareable: bool,
    /// Whether memory of its own kind can be registered with RDMA NICs.
    direct_rdma: bool,
    /// Whether host memory that may only be read can be registered.
    read_only_register: bool,
}

impl Device {
    /// Whether it is simulated.
    pub fn simulated(&self) -> bool {
        self.name.contains("Simulated")
    }

    /// The UUID without what makes it readable.
    pub(in crate::sys) fn uuid_bytes(&self) -> [u8; 16] {
        self.uuid_bytes
    }
}

/// Looks for devices. Initialises the driver.
pub fn find() -> Found {
    if !library_present() {
        return Found::NoLibrary;
    }
    match all() {
        Ok(devices) => Found::Devices(devices),
        Err(error) => Found::Unusable(error),
    }
}

fn all() -> Result<Vec<Device>, CudaError> {
    // SAFETY: libcuda is there (checked by the caller); initialising it twice is allowed.
    check("cuInit", unsafe { sys::cuInit(0) })?;
    let mut count = 0;
    // SAFETY: `count` lives through the call.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    (0..count).map(device).collect()
}

fn device(index: i32) -> Result<Device, CudaError> {
    let mut ordinal = 0;
    // SAFETY: `ordinal` lives through the call.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut ordinal, index) })?;
    let mut uuid = CUuuid { bytes: [0; 16] };
    // SAFETY: `uuid` lives through the call.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, ordinal) })?;
    let mut memory = 0usize;
    // SAFETY: `memory` lives through the call.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut memory, ordinal) })?;
    // SAFETY: `text` hands over a buffer and its length.
    let name =
        text("cuDeviceGetName", |buffer, length| unsafe { sys::cuDeviceGetName(buffer, length, ordinal) })?;
    // SAFETY: as above.
    let pci = text("cuDeviceGetPCIBusId", |buffer, length| unsafe {
        sys::cuDeviceGetPCIBusId(buffer, length, ordinal)
    });
    // The driver gives the UUID without its prefix, and marks an instance in its name only.
    let prefix = if name.contains("MIG ") { "MIG" } else { "GPU" };
    let vmm = attribute(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED, ordinal)?;
    let fds = attribute(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, ordinal)?;
    let rdma = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, ordinal)?;
    let read_only = attribute(Attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED, ordinal)?;
    Ok(Device {
        ordinal,
        uuid: format!("{prefix}-{}", hyphenated(uuid)),
        uuid_bytes: uuid.bytes.map(|byte| byte as u8),
        name,
        memory_bytes: memory as u64,
        pci_address: pci.ok().map(|address| address.to_ascii_lowercase()),
        shareable: vmm != 0 && fds != 0,
        direct_rdma: rdma != 0,
        read_only_register: read_only != 0,
    })
}

fn attribute(attribute: Attribute, ordinal: i32) -> Result<i32, CudaError> {
    let mut value = 0;
    // SAFETY: `value` lives through the call.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, ordinal) })?;
    Ok(value)
}

/// A text that the driver writes into a buffer.
fn text(
    call: &'static str,
    ask: impl FnOnce(*mut c_char, i32) -> sys::CUresult,
) -> Result<String, CudaError> {
    let mut buffer = [0u8; NAME_BYTES];
    check(call, ask(buffer.as_mut_ptr().cast(), NAME_BYTES as i32))?;
    let length = buffer.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn hyphenated(uuid: CUuuid) -> String {
    let hex: String = uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// The primary context of a device, kept alive.
pub struct Context {
    device: Device,
    raw: CUcontext,
}

// SAFETY: a context is a handle that the driver lets any thread make current; it is never changed here.
unsafe impl Send for Context {}
// SAFETY: as above: the driver's calls on a context are safe from several threads.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.device.uuid).finish()
    }
}

impl Context {
    /// Retains the primary context of `device`: takes some of its memory.
    pub fn new(device: Device) -> Result<Arc<Context>, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` lives through the call; the device was given by the driver.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device.ordinal) };
        check("cuDevicePrimaryCtxRetain", result)?;
        Ok(Arc::new(Context { device, raw }))
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether memory may be made so that RDMA NICs can register it.
    pub(super) fn direct_rdma(&self) -> bool {
        self.device.direct_rdma
    }

    pub(super) fn read_only_register(&self) -> bool {
        self.device.read_only_register
    }

    pub(super) fn ordinal(&self) -> i32 {
        self.device.ordinal
    }

    /// Free and total memory of the device, bytes, as the driver sees it: all processes counted.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: both live through the call; the context is current.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Makes it current on this thread.
    pub(in crate::sys) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `new`; all that was made in it holds an `Arc` of this and is gone.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device.ordinal) };
    }
}
