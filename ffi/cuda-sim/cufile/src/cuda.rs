//! CUDA's driver API as this library calls it: as any client does, by whatever `libcuda.so.1` the loader finds.
//!
//! Device addresses and handles are numbers that the driver checks; nothing here touches what they stand for.

use std::ffi::c_void;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;

use cudarc::driver::sys::{
    self, CUcontext, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationHandleType, CUmemAllocationProp,
    CUmemAllocationType, CUmemLocation, CUmemLocationType, CUpointer_attribute, CUresult, CUstream, CUuuid,
};

use crate::failure::{Answer, Failure};

const FD: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;

/// Calls the driver. Results go to local variables, and host memory comes as slices, so that every pointer that is handed
/// in is good for the call.
macro_rules! cu {
    ($name:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: libcuda is there (`init` looks first). Pointers are to locals and to memory that is borrowed here;
        // handles and device addresses are the driver's to check; that memory which is used after the call stays is
        // said with the function.
        let code: CUresult = unsafe { sys::$name($($argument),*) };
        if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Failure::Cuda(code as u32)) }
    }};
}

/// Loads the driver and initialises it.
pub(crate) fn init() -> Answer {
    // SAFETY: loads libcuda, whose initialisers are trusted like those of any installed library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Failure::Cuda(CUresult::CUDA_ERROR_NO_DEVICE as u32));
    }
    cu!(cuInit(0))
}

pub(crate) fn device_count() -> Answer<i32> {
    let mut count = 0;
    cu!(cuDeviceGetCount(&mut count)).map(|()| count)
}

pub(crate) fn device_uuid(device: i32) -> Answer<[u8; 16]> {
    let mut uuid = CUuuid { bytes: [0; 16] };
    cu!(cuDeviceGetUuid_v2(&mut uuid, device)).map(|()| uuid.bytes.map(|byte| byte as u8))
}

fn pointer<T: Copy>(attribute: CUpointer_attribute, address: u64, mut value: T) -> Answer<T> {
    cu!(cuPointerGetAttribute((&raw mut value).cast(), attribute, address)).map(|()| value)
}

/// One mapping of device memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapping {
    pub(crate) device: i32,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// The mapping that an address lies in. It fails where the address is none of device memory.
pub(crate) fn mapping(address: u64) -> Answer<Mapping> {
    Ok(Mapping {
        device: pointer(CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address, -1)?,
        start: pointer(CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address, 0)?,
        bytes: pointer(CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, address, 0)?,
    })
}

fn properties(device: i32) -> CUmemAllocationProp {
    // SAFETY: integers and a pointer, for which zeros are valid.
    let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = FD;
    properties.location = location(device);
    properties
}

fn location(device: i32) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

/// Whether drives may reach what is mapped here: memory of the old kind always, other memory if it was made so.
pub(crate) fn is_reachable(address: u64) -> Answer<bool> {
    let mut handle = 0;
    let place: *mut c_void = ptr::without_provenance_mut(address as usize);
    if cu!(cuMemRetainAllocationHandle(&mut handle, place)).is_err() {
        return Ok(true);
    }
    let mut found = properties(-1);
    let asked = cu!(cuMemGetAllocationPropertiesFromHandle(&mut found, handle));
    cu!(cuMemRelease(handle))?;
    asked.map(|()| found.allocFlags.gpuDirectRDMACapable != 0)
}

/// The device's primary context, current on this thread until this is dropped, and a stream of it.
#[derive(Debug)]
pub(crate) struct Current {
    device: i32,
    before: CUcontext,
    stream: CUstream,
}

impl Current {
    pub(crate) fn on(device: i32) -> Answer<Current> {
        let (mut context, mut before) = (ptr::null_mut(), ptr::null_mut());
        cu!(cuCtxGetCurrent(&mut before))?;
        cu!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        // From here on what was done is undone when something fails.
        let mut current = Current { device, before, stream: ptr::null_mut() };
        cu!(cuCtxSetCurrent(context))?;
        cu!(cuStreamCreate(&mut current.stream, NON_BLOCKING))?;
        Ok(current)
    }

    /// Copies from host to device, and waits for it.
    pub(crate) fn upload(&self, target: u64, source: &[u8]) -> Answer {
        let copied = cu!(cuMemcpyHtoDAsync_v2(target, source.as_ptr().cast(), source.len(), self.stream));
        // Waited for also where it was not submitted, which costs nothing: the bytes are borrowed until here.
        copied.and(self.wait())
    }

    /// Copies from device to host, and waits for it.
    pub(crate) fn download(&self, target: &mut [u8], source: u64) -> Answer {
        let copied = cu!(cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), source, target.len(), self.stream));
        copied.and(self.wait())
    }

    /// Copies inside the device, and waits for it.
    pub(crate) fn copy(&self, target: u64, source: u64, bytes: usize) -> Answer {
        cu!(cuMemcpyDtoDAsync_v2(target, source, bytes, self.stream)).and(self.wait())
    }

    fn wait(&self) -> Answer {
        cu!(cuStreamSynchronize(self.stream))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // What fails here fails in the context that this leaves, whose owner is told by the driver.
        if !self.stream.is_null() {
            let _ = cu!(cuStreamDestroy_v2(self.stream));
        }
        let _ = cu!(cuCtxSetCurrent(self.before));
        let _ = cu!(cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

/// Device memory that is mapped, and can be exported.
#[derive(Debug)]
pub(crate) struct Memory {
    handle: u64,
    /// 0 as long as there is none.
    address: u64,
    is_mapped: bool,
    bytes: usize,
}

impl Memory {
    /// Makes it. `bytes` is a whole number of the device's units.
    pub(crate) fn new(device: i32, bytes: usize) -> Answer<Memory> {
        let mut handle = 0;
        cu!(cuMemCreate(&mut handle, bytes, &properties(device), 0))?;
        // From here on what was done is undone when something fails.
        let mut memory = Memory { handle, address: 0, is_mapped: false, bytes };
        cu!(cuMemAddressReserve(&mut memory.address, bytes, 0, 0, 0))?;
        cu!(cuMemMap(memory.address, bytes, 0, handle, 0))?;
        memory.is_mapped = true;
        let flags = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let description = CUmemAccessDesc { location: location(device), flags };
        cu!(cuMemSetAccess(memory.address, bytes, &description, 1))?;
        Ok(memory)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn export(&self) -> Answer<OwnedFd> {
        let mut fd = -1i32;
        cu!(cuMemExportToShareableHandle((&raw mut fd).cast(), self.handle, FD, 0))?;
        // SAFETY: the driver has made the descriptor for the caller.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // What cannot be given back now is the driver's when the process ends.
        if self.is_mapped {
            let _ = cu!(cuMemUnmap(self.address, self.bytes));
        }
        if self.address != 0 {
            let _ = cu!(cuMemAddressFree(self.address, self.bytes));
        }
        let _ = cu!(cuMemRelease(self.handle));
    }
}
