//! CUDA's driver API as the checks call it: results as `Result`, memory of the host as slices.
//!
//! Device addresses and handles are numbers that the driver checks; nothing here touches what they stand for.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use cudarc::driver::sys::{
    self, CUDA_MEMCPY2D, CUcontext, CUdevice_attribute, CUevent, CUfunction, CUmemAccess_flags,
    CUmemAccessDesc, CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUmemAllocationProp,
    CUmemAllocationType, CUmemLocation, CUmemLocationType, CUmemorytype, CUmodule, CUpointer_attribute,
    CUresult, CUstream, CUuuid,
};

pub(crate) use cudarc::driver::sys::CUresult as Code;

/// A call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) call: &'static str,
    pub(crate) code: Code,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered {:?}", self.call, self.code)
    }
}

pub(crate) type Answer<T = ()> = Result<T, Failure>;

const FD: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
const NO_SHARING: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE;
/// What a mapping is for.
pub(crate) const READ: CUmemAccess_flags = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ;
pub(crate) const READ_WRITE: CUmemAccess_flags = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
/// `CU_STREAM_NON_BLOCKING`, `CU_EVENT_DISABLE_TIMING`.
pub(crate) const NON_BLOCKING: u32 = 1;
pub(crate) const DISABLE_TIMING: u32 = 2;
/// The NULL stream.
pub(crate) const NULL: CUstream = ptr::null_mut();

/// Calls the driver. Results go to local variables, and host memory comes as slices or as `Pinned`, so that every
/// pointer that is handed in is good for the call.
macro_rules! cu {
    ($name:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: libcuda is there (main.rs looks first). Pointers are to locals and to memory that is borrowed here;
        // handles and device addresses are the driver's to check; that memory which is used after the call stays is
        // said with the function.
        let code: CUresult = unsafe { sys::$name($($argument),*) };
        if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Failure { call: stringify!($name), code }) }
    }};
}

/// Whether a libcuda can be loaded.
pub(crate) fn is_present() -> bool {
    // SAFETY: loads libcuda, whose initialisers are trusted like those of any installed library.
    unsafe { sys::is_culib_present() }
}

pub(crate) fn init() -> Answer {
    cu!(cuInit(0))
}

pub(crate) fn version() -> Answer<i32> {
    let mut version = 0;
    cu!(cuDriverGetVersion(&mut version)).map(|()| version)
}

pub(crate) fn device_count() -> Answer<i32> {
    let mut count = 0;
    cu!(cuDeviceGetCount(&mut count)).map(|()| count)
}

pub(crate) fn device(ordinal: i32) -> Answer<i32> {
    let mut device = 0;
    cu!(cuDeviceGet(&mut device, ordinal)).map(|()| device)
}

fn text(buffer: &[u8]) -> String {
    CStr::from_bytes_until_nul(buffer).map_or(String::new(), |text| text.to_string_lossy().into_owned())
}

pub(crate) fn device_name(device: i32) -> Answer<String> {
    let mut buffer = [0u8; 256];
    cu!(cuDeviceGetName(buffer.as_mut_ptr().cast(), buffer.len() as i32, device)).map(|()| text(&buffer))
}

pub(crate) fn device_pci(device: i32, room: usize) -> Answer<String> {
    let mut buffer = vec![0u8; room];
    cu!(cuDeviceGetPCIBusId(buffer.as_mut_ptr().cast(), buffer.len() as i32, device)).map(|()| text(&buffer))
}

pub(crate) fn device_uuid(device: i32) -> Answer<[std::ffi::c_char; 16]> {
    let mut uuid = CUuuid { bytes: [0; 16] };
    cu!(cuDeviceGetUuid_v2(&mut uuid, device)).map(|()| uuid.bytes)
}

pub(crate) fn device_memory(device: i32) -> Answer<u64> {
    let mut bytes = 0;
    cu!(cuDeviceTotalMem_v2(&mut bytes, device)).map(|()| bytes as u64)
}

pub(crate) fn attribute(attribute: CUdevice_attribute, device: i32) -> Answer<i32> {
    let mut value = 0;
    cu!(cuDeviceGetAttribute(&mut value, attribute, device)).map(|()| value)
}

pub(crate) fn retain(device: i32) -> Answer<CUcontext> {
    let mut context = ptr::null_mut();
    cu!(cuDevicePrimaryCtxRetain(&mut context, device)).map(|()| context)
}

pub(crate) fn release_context(device: i32) -> Answer {
    cu!(cuDevicePrimaryCtxRelease_v2(device))
}

pub(crate) fn set_current(context: CUcontext) -> Answer {
    cu!(cuCtxSetCurrent(context))
}

pub(crate) fn current() -> Answer<CUcontext> {
    let mut context = ptr::null_mut();
    cu!(cuCtxGetCurrent(&mut context)).map(|()| context)
}

pub(crate) fn current_device() -> Answer<i32> {
    let mut device = -1;
    cu!(cuCtxGetDevice(&mut device)).map(|()| device)
}

pub(crate) fn synchronize() -> Answer {
    cu!(cuCtxSynchronize())
}

/// Free and total bytes of the current context's device.
pub(crate) fn memory_info() -> Answer<(u64, u64)> {
    let (mut free, mut total) = (0, 0);
    cu!(cuMemGetInfo_v2(&mut free, &mut total)).map(|()| (free as u64, total as u64))
}

fn location(device: i32) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

fn properties(device: i32, sharing: CUmemAllocationHandleType) -> CUmemAllocationProp {
    // SAFETY: integers and a pointer, for which zeros are valid.
    let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = sharing;
    properties.location = location(device);
    properties
}

/// The minimum and the recommended one.
pub(crate) fn granularities(device: i32) -> Answer<(u64, u64)> {
    let (mut minimum, mut recommended) = (0, 0);
    let properties = properties(device, FD);
    let options = [
        CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM,
        CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
    ];
    cu!(cuMemGetAllocationGranularity(&mut minimum, &properties, options[0]))?;
    cu!(cuMemGetAllocationGranularity(&mut recommended, &properties, options[1]))?;
    Ok((minimum as u64, recommended as u64))
}

/// Memory that can be shared.
pub(crate) fn create(device: i32, bytes: u64) -> Answer<u64> {
    let mut handle = 0;
    let properties = properties(device, FD);
    cu!(cuMemCreate(&mut handle, bytes as usize, &properties, 0)).map(|()| handle)
}

/// Memory that cannot.
pub(crate) fn create_private(device: i32, bytes: u64) -> Answer<u64> {
    let mut handle = 0;
    let properties = properties(device, NO_SHARING);
    cu!(cuMemCreate(&mut handle, bytes as usize, &properties, 0)).map(|()| handle)
}

pub(crate) fn release(handle: u64) -> Answer {
    cu!(cuMemRelease(handle))
}

pub(crate) fn export(handle: u64) -> Answer<OwnedFd> {
    let mut fd = -1i32;
    cu!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, FD, 0))?;
    // SAFETY: the driver has made the descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn import(fd: BorrowedFd<'_>) -> Answer<u64> {
    let mut handle = 0;
    // For this kind the descriptor stands in place of a pointer.
    let number = ptr::without_provenance_mut(fd.as_raw_fd() as usize);
    cu!(cuMemImportFromShareableHandle(&mut handle, number, FD)).map(|()| handle)
}

pub(crate) fn reserve(bytes: u64, alignment: u64) -> Answer<u64> {
    let mut address = 0;
    cu!(cuMemAddressReserve(&mut address, bytes as usize, alignment as usize, 0, 0)).map(|()| address)
}

pub(crate) fn free_address(address: u64, bytes: u64) -> Answer {
    cu!(cuMemAddressFree(address, bytes as usize))
}

pub(crate) fn map(address: u64, bytes: u64, handle: u64) -> Answer {
    cu!(cuMemMap(address, bytes as usize, 0, handle, 0))
}

pub(crate) fn unmap(address: u64, bytes: u64) -> Answer {
    cu!(cuMemUnmap(address, bytes as usize))
}

pub(crate) fn set_access(address: u64, bytes: u64, device: i32, flags: CUmemAccess_flags) -> Answer {
    let description = CUmemAccessDesc { location: location(device), flags };
    cu!(cuMemSetAccess(address, bytes as usize, &description, 1))
}

pub(crate) fn access(address: u64, device: i32) -> Answer<u64> {
    let mut flags = 0;
    let location = location(device);
    cu!(cuMemGetAccess(&mut flags, &location, address)).map(|()| flags)
}

pub(crate) fn retain_handle(address: u64) -> Answer<u64> {
    let mut handle = 0;
    let address: *mut c_void = ptr::without_provenance_mut(address as usize);
    cu!(cuMemRetainAllocationHandle(&mut handle, address)).map(|()| handle)
}

/// Device, and whether it was made to be shared by descriptor.
pub(crate) fn properties_of(handle: u64) -> Answer<(i32, bool)> {
    let mut found = properties(-1, NO_SHARING);
    cu!(cuMemGetAllocationPropertiesFromHandle(&mut found, handle))
        .map(|()| (found.location.id, found.requestedHandleTypes == FD))
}

pub(crate) fn allocate(bytes: u64) -> Answer<u64> {
    let mut address = 0;
    cu!(cuMemAlloc_v2(&mut address, bytes as usize)).map(|()| address)
}

pub(crate) fn free(address: u64) -> Answer {
    cu!(cuMemFree_v2(address))
}

pub(crate) fn write(address: u64, source: &[u8]) -> Answer {
    cu!(cuMemcpyHtoD_v2(address, source.as_ptr().cast(), source.len()))
}

pub(crate) fn read(address: u64, bytes: u64) -> Answer<Vec<u8>> {
    let mut target = vec![0; bytes as usize];
    cu!(cuMemcpyDtoH_v2(target.as_mut_ptr().cast(), address, target.len())).map(|()| target)
}

/// From memory that is not registered: the driver is done with it when this returns.
pub(crate) fn write_pageable(address: u64, source: &[u8], stream: CUstream) -> Answer {
    cu!(cuMemcpyHtoDAsync_v2(address, source.as_ptr().cast(), source.len(), stream))
}

pub(crate) fn copy(target: u64, source: u64, bytes: u64, stream: CUstream) -> Answer {
    cu!(cuMemcpyDtoDAsync_v2(target, source, bytes as usize, stream))
}

pub(crate) fn fill(address: u64, value: u8, count: u64, stream: CUstream) -> Answer {
    cu!(cuMemsetD8Async(address, value, count as usize, stream))
}

pub(crate) fn fill_words(address: u64, value: u32, count: u64, stream: CUstream) -> Answer {
    cu!(cuMemsetD32Async(address, value, count as usize, stream))
}

pub(crate) fn stream(flags: u32) -> Answer<CUstream> {
    let mut stream = ptr::null_mut();
    cu!(cuStreamCreate(&mut stream, flags)).map(|()| stream)
}

pub(crate) fn destroy_stream(stream: CUstream) -> Answer {
    cu!(cuStreamDestroy_v2(stream))
}

pub(crate) fn wait(stream: CUstream) -> Answer {
    cu!(cuStreamSynchronize(stream))
}

pub(crate) fn query_stream(stream: CUstream) -> Answer {
    cu!(cuStreamQuery(stream))
}

pub(crate) fn wait_event(stream: CUstream, event: CUevent) -> Answer {
    cu!(cuStreamWaitEvent(stream, event, 0))
}

pub(crate) fn event(flags: u32) -> Answer<CUevent> {
    let mut event = ptr::null_mut();
    cu!(cuEventCreate(&mut event, flags)).map(|()| event)
}

pub(crate) fn destroy_event(event: CUevent) -> Answer {
    cu!(cuEventDestroy_v2(event))
}

pub(crate) fn record(event: CUevent, stream: CUstream) -> Answer {
    cu!(cuEventRecord(event, stream))
}

pub(crate) fn query(event: CUevent) -> Answer {
    cu!(cuEventQuery(event))
}

pub(crate) fn wait_for(event: CUevent) -> Answer {
    cu!(cuEventSynchronize(event))
}

pub(crate) fn elapsed_ms(start: CUevent, end: CUevent) -> Answer<f32> {
    let mut milliseconds = f32::NAN;
    cu!(cuEventElapsedTime(&mut milliseconds, start, end)).map(|()| milliseconds)
}

/// A module of PTX.
pub(crate) fn load(ptx: &CStr) -> Answer<CUmodule> {
    let mut module = ptr::null_mut();
    cu!(cuModuleLoadData(&mut module, ptx.as_ptr().cast())).map(|()| module)
}

pub(crate) fn unload(module: CUmodule) -> Answer {
    cu!(cuModuleUnload(module))
}

pub(crate) fn function(module: CUmodule, name: &str) -> Answer<CUfunction> {
    let mut function = ptr::null_mut();
    let name = CString::new(name).unwrap_or_default();
    cu!(cuModuleGetFunction(&mut function, module, name.as_ptr())).map(|()| function)
}

/// Launches a kernel whose arguments are all of 64 bits. It takes as many as are handed in.
pub(crate) fn launch(
    function: CUfunction,
    blocks: u32,
    threads: u32,
    stream: CUstream,
    arguments: &mut [u64],
) -> Answer {
    let mut places: Vec<*mut c_void> =
        arguments.iter_mut().map(|argument| (&raw mut *argument).cast()).collect();
    let none = ptr::null_mut();
    cu!(cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, places.as_mut_ptr(), none))
}

/// `CU_POINTER_ATTRIBUTE_MEMORY_TYPE` and `…_DEVICE_ORDINAL`.
pub(crate) fn pointer(address: u64) -> Answer<(u32, i32)> {
    let (mut memory, mut device) = (0u32, -1i32);
    let (kind, ordinal) = (
        CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
        CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
    );
    cu!(cuPointerGetAttribute((&raw mut memory).cast(), kind, address))?;
    cu!(cuPointerGetAttribute((&raw mut device).cast(), ordinal, address))?;
    Ok((memory, device))
}

pub(crate) fn error_name(code: Code) -> Answer<String> {
    let mut name = ptr::null();
    cu!(cuGetErrorName(code, &mut name))?;
    // SAFETY: on success the driver gives a constant text of its own.
    Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
}

/// Host memory on whole pages, which stays where it is, so that it can be registered.
pub(crate) struct Pages {
    start: *mut u8,
    layout: Layout,
}

impl Pages {
    pub(crate) const PAGE: usize = 4096;

    pub(crate) fn new(bytes: usize) -> Pages {
        let Ok(layout) = Layout::from_size_align(bytes.max(1), Pages::PAGE) else {
            std::alloc::handle_alloc_error(Layout::new::<u8>())
        };
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Pages { start, layout }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size, initialised with zeros, borrowed like `self`. Checks touch no bytes while the
        // device uses them.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }

    pub(crate) fn register(&self, offset: usize, bytes: usize, flags: u32) -> Answer {
        cu!(cuMemHostRegister_v2(self.start.wrapping_add(offset).cast(), bytes, flags))
    }

    pub(crate) fn unregister(&self, offset: usize) -> Answer {
        cu!(cuMemHostUnregister(self.start.wrapping_add(offset).cast()))
    }

    /// Submits a copy from here. The caller waits for it before it touches the bytes or drops them.
    pub(crate) fn upload(&self, target: u64, offset: usize, bytes: usize, stream: CUstream) -> Answer {
        assert!(offset + bytes <= self.layout.size());
        cu!(cuMemcpyHtoDAsync_v2(target, self.start.wrapping_add(offset).cast(), bytes, stream))
    }

    /// Submits a copy to here. The caller waits for it as for [`Pages::upload`].
    pub(crate) fn download(&self, source: u64, offset: usize, bytes: usize, stream: CUstream) -> Answer {
        assert!(offset + bytes <= self.layout.size());
        cu!(cuMemcpyDtoHAsync_v2(self.start.wrapping_add(offset).cast(), source, bytes, stream))
    }

    /// Submits a copy of rows that lie `stride` apart here, one behind the other there. Waited for as the others.
    pub(crate) fn upload_rows(
        &self,
        target: u64,
        stride: usize,
        row: usize,
        rows: usize,
        stream: CUstream,
    ) -> Answer {
        assert!(stride * (rows - 1) + row <= self.layout.size());
        // Not zeroed: its kinds of memory have no zero.
        let copy = CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: self.start.cast(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: stride,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: target,
            dstArray: ptr::null_mut(),
            dstPitch: row,
            WidthInBytes: row,
            Height: rows,
        };
        cu!(cuMemcpy2DAsync_v2(&copy, stream))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, once.
        unsafe { dealloc(self.start, self.layout) };
    }
}
