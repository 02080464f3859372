//! Memory of a device that is shared by descriptor, and host memory that the device may read.

use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType, CUmemLocation, CUmemLocationType,
};

use super::device::Context;
use super::{CudaError, check, invalid};
use crate::sys::map::ReadMap;
use crate::sys::mem::Memory;

/// Host memory is registered for the contexts of all devices.
const REGISTER_PORTABLE: u32 = 1;
/// The device only reads it: needed for mappings that this process itself may only read.
const REGISTER_READ_ONLY: u32 = 8;

/// What is asked of the driver for memory that is shared by descriptor.
fn properties(context: &Context) -> CUmemAllocationProp {
    // SAFETY: a plain struct of integers and a pointer, for which zeros are valid and mean "nothing special".
    let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    properties.location = location(context);
    properties.allocFlags.gpuDirectRDMACapable = u8::from(context.direct_rdma());
    properties
}

fn location(context: &Context) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.ordinal() }
}

/// Unit of sizes of device memory, bytes.
fn granularity(context: &Context) -> Result<u64, CudaError> {
    context.bind()?;
    let properties = properties(context);
    let mut unit = 0usize;
    let recommended = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // SAFETY: both live through the call.
    let result = unsafe { sys::cuMemGetAllocationGranularity(&mut unit, &properties, recommended) };
    check("cuMemGetAllocationGranularity", result)?;
    Ok(unit.max(1) as u64)
}

/// Allocations, mapped one behind the other into one range of device addresses. Takes itself apart on drop.
struct Mapped {
    context: Arc<Context>,
    address: CUdeviceptr,
    bytes: u64,
    /// Allocations with their sizes; the first `mapped` of them are mapped.
    handles: Vec<(u64, u64)>,
    mapped: usize,
}

impl Mapped {
    /// Reserves addresses. Nothing is mapped yet.
    fn reserve(context: &Arc<Context>, bytes: u64) -> Result<Mapped, CudaError> {
        context.bind()?;
        let mut address = 0;
        let length = usize::try_from(bytes).map_err(|_| invalid("cuMemAddressReserve"))?;
        // SAFETY: `address` lives through the call; addresses of the driver's choice.
        check("cuMemAddressReserve", unsafe { sys::cuMemAddressReserve(&mut address, length, 0, 0, 0) })?;
        Ok(Mapped { context: Arc::clone(context), address, bytes, handles: Vec::new(), mapped: 0 })
    }

    /// Maps the allocations, which fill the range, with the given access.
    fn map(&mut self, access: CUmemAccess_flags) -> Result<(), CudaError> {
        self.context.bind()?;
        let mut at = self.address;
        for (handle, bytes) in self.handles.clone() {
            // SAFETY: the handles add up to the reserved range, and none of it is mapped yet.
            check("cuMemMap", unsafe { sys::cuMemMap(at, bytes as usize, 0, handle, 0) })?;
            self.mapped += 1;
            at += bytes;
        }
        let access = CUmemAccessDesc { location: location(&self.context), flags: access };
        // SAFETY: the whole range is mapped; `access` lives through the call.
        check("cuMemSetAccess", unsafe { sys::cuMemSetAccess(self.address, self.bytes as usize, &access, 1) })
    }

    /// Takes the mappings and the allocations out; the addresses stay reserved.
    fn empty(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        let mut at = self.address;
        for (number, (handle, bytes)) in std::mem::take(&mut self.handles).into_iter().enumerate() {
            if number < self.mapped {
                // SAFETY: mapped by `map` at this address. The driver waits for work that uses it.
                let _ = unsafe { sys::cuMemUnmap(at, bytes as usize) };
            }
            // SAFETY: created or imported by us, released once.
            let _ = unsafe { sys::cuMemRelease(handle) };
            at += bytes;
        }
        self.mapped = 0;
    }

    fn address_of(&self, offset: u64, bytes: u64) -> Option<CUdeviceptr> {
        offset.checked_add(bytes).filter(|end| *end <= self.bytes)?;
        (self.mapped > 0).then_some(self.address + offset)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.empty();
        // SAFETY: reserved by `reserve`; nothing is mapped there any more.
        let _ = unsafe { sys::cuMemAddressFree(self.address, self.bytes as usize) };
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped").field("context", &self.context).field("bytes", &self.bytes).finish()
    }
}

/// Memory of a device, mapped writable by this process, that can be shared by descriptor.
///
/// It lives until every descriptor, handle and mapping of it, in any process, is gone.
#[derive(Debug)]
pub struct DeviceMemory {
    mapped: Mapped,
}

impl DeviceMemory {
    /// How much memory is taken for `bytes`: rounded up to the device's unit. `None` if that overflows.
    pub fn rounded(context: &Context, bytes: u64) -> Result<Option<u64>, CudaError> {
        Ok(bytes.max(1).checked_next_multiple_of(granularity(context)?))
    }

    /// New memory of `bytes`, a positive multiple of the device's unit, all zeros.
    pub fn new(context: &Arc<Context>, bytes: u64) -> Result<DeviceMemory, CudaError> {
        let length = usize::try_from(bytes).map_err(|_| invalid("cuMemCreate"))?;
        let mut mapped = Mapped::reserve(context, bytes)?;
        let properties = properties(context);
        let mut handle = 0;
        // SAFETY: both live through the call.
        check("cuMemCreate", unsafe { sys::cuMemCreate(&mut handle, length, &properties, 0) })?;
        mapped.handles.push((handle, bytes));
        mapped.map(CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE)?;
        // What it held before may be another tenant's (invariant 8).
        // SAFETY: the whole range is mapped and writable. On the default stream, and waited for.
        check("cuMemsetD8", unsafe { sys::cuMemsetD8_v2(mapped.address, 0, length) })?;
        // SAFETY: the context is current.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })?;
        Ok(DeviceMemory { mapped })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapped.bytes
    }

    /// The device's context.
    pub fn context(&self) -> &Arc<Context> {
        &self.mapped.context
    }

    /// A descriptor by which another process can import it.
    pub fn export(&self) -> Result<OwnedFd, CudaError> {
        self.mapped.context.bind()?;
        let (handle, _) = *self.mapped.handles.first().ok_or(invalid("cuMemExportToShareableHandle"))?;
        let mut fd: i32 = -1;
        let kind = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        // SAFETY: for this kind of handle the driver writes an `int` to where it is told; `fd` is one.
        let result = unsafe { sys::cuMemExportToShareableHandle((&raw mut fd).cast(), handle, kind, 0) };
        check("cuMemExportToShareableHandle", result)?;
        // SAFETY: a new descriptor that is ours.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Whether the driver opens it close-on-exec is not documented.
        let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
        Ok(fd)
    }

    pub(in crate::sys) fn address_of(&self, offset: u64, bytes: u64) -> Option<CUdeviceptr> {
        self.mapped.address_of(offset, bytes)
    }

    /// Copies what it holds from `offset` on, and waits for it.
    pub fn read(&self, offset: u64, target: &mut [u8]) -> Result<(), CudaError> {
        read(&self.mapped, offset, target)
    }
}

fn read(mapped: &Mapped, offset: u64, target: &mut [u8]) -> Result<(), CudaError> {
    mapped.context.bind()?;
    let address = mapped.address_of(offset, target.len() as u64).ok_or(invalid("cuMemcpyDtoH"))?;
    // SAFETY: the range is inside the mapping (checked above); `target` lives through the call, which waits.
    check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(target.as_mut_ptr().cast(), address, target.len()) })
}

/// Memory that another process exported, mapped read-only.
///
/// It can be given up and taken back at the same addresses ([`Imported::sleep`], [`Imported::wake`]).
#[derive(Debug)]
pub struct Imported {
    mapped: Mapped,
}

impl Imported {
    /// Imports descriptors, each with the bytes of its allocation, and maps them one behind the other.
    pub fn new(context: &Arc<Context>, parts: Vec<(OwnedFd, u64)>) -> Result<Imported, CudaError> {
        let total = parts.iter().try_fold(0u64, |total, (_, bytes)| total.checked_add(*bytes));
        let total = total.filter(|total| *total > 0).ok_or(invalid("cuMemAddressReserve"))?;
        let mut imported = Imported { mapped: Mapped::reserve(context, total)? };
        imported.fill(parts)?;
        Ok(imported)
    }

    fn fill(&mut self, parts: Vec<(OwnedFd, u64)>) -> Result<(), CudaError> {
        self.mapped.context.bind()?;
        for (fd, bytes) in parts {
            let mut handle = 0;
            let kind = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
            let number = fd.as_raw_fd() as usize;
            // SAFETY: for this kind of handle the driver takes the descriptor itself in place of a pointer.
            let result = unsafe { sys::cuMemImportFromShareableHandle(&mut handle, number as *mut _, kind) };
            check("cuMemImportFromShareableHandle", result)?;
            self.mapped.handles.push((handle, bytes));
        }
        self.mapped.map(CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ)
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapped.bytes
    }

    /// Where the device sees it, for kernels of a framework. Not readable by the CPU. Stays the same through
    /// [`Imported::sleep`] and [`Imported::wake`].
    pub fn device_address(&self) -> u64 {
        self.mapped.address
    }

    /// The device's context.
    pub fn context(&self) -> &Arc<Context> {
        &self.mapped.context
    }

    /// Copies what it holds from `offset` on, and waits for it.
    pub fn read(&self, offset: u64, target: &mut [u8]) -> Result<(), CudaError> {
        read(&self.mapped, offset, target)
    }

    /// Gives the memory up, and keeps the addresses.
    pub fn sleep(&mut self) {
        self.mapped.empty();
    }

    /// Takes memory of the same size in at the same addresses.
    pub fn wake(&mut self, parts: Vec<(OwnedFd, u64)>) -> Result<(), CudaError> {
        let total = parts.iter().try_fold(0u64, |total, (_, bytes)| total.checked_add(*bytes));
        if total != Some(self.mapped.bytes) || !self.mapped.handles.is_empty() {
            return Err(invalid("cuMemMap"));
        }
        self.fill(parts).inspect_err(|_| self.mapped.empty())
    }
}

/// Host memory that the devices copy from by themselves: page-locked and known to the driver.
#[derive(Debug)]
pub struct Pinned {
    memory: Arc<Memory>,
    context: Arc<Context>,
}

impl Pinned {
    /// Registers memory, whose pages have been touched, for the devices of all contexts.
    pub fn new(context: &Arc<Context>, memory: &Arc<Memory>) -> Result<Pinned, CudaError> {
        context.bind()?;
        let start = memory.address().as_ptr().cast();
        // SAFETY: the range is mapped as long as `memory` lives, and `Pinned` keeps it alive and takes it out on drop.
        let result = unsafe { sys::cuMemHostRegister_v2(start, memory.bytes() as usize, REGISTER_PORTABLE) };
        check("cuMemHostRegister", result)?;
        Ok(Pinned { memory: Arc::clone(memory), context: Arc::clone(context) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: registered by `new`, and still mapped.
            let _ = unsafe { sys::cuMemHostUnregister(self.memory.address().as_ptr().cast()) };
        }
    }
}

/// Sealed memory of the host tier, mapped read-only and known to the driver, so that the devices copy from it by
/// themselves.
#[derive(Debug)]
pub struct PinnedMap {
    map: ReadMap,
    /// Where each part begins and ends: a copy that crosses a border is two.
    parts: Vec<std::ops::Range<u64>>,
    registered: usize,
    context: Arc<Context>,
}

impl PinnedMap {
    /// Maps and registers the parts of a region.
    ///
    /// # Errors
    /// In words; the region can be read in other ways then.
    pub fn new(context: &Arc<Context>, parts: Vec<(OwnedFd, u64)>) -> Result<PinnedMap, String> {
        let mut at = 0u64;
        let ranges = parts.iter().map(|(_, bytes)| {
            at += bytes;
            at - bytes..at
        });
        let ranges: Vec<_> = ranges.collect();
        let map = ReadMap::from_parts(parts).map_err(|error| error.to_string())?;
        let mut pinned = PinnedMap { map, parts: ranges, registered: 0, context: Arc::clone(context) };
        pinned.register().map_err(|error| error.to_string())?;
        Ok(pinned)
    }

    fn register(&mut self) -> Result<(), CudaError> {
        self.context.bind()?;
        let read_only = if self.context.read_only_register() { REGISTER_READ_ONLY } else { 0 };
        for part in &self.parts {
            let bytes = &self.map.as_slice()[part.start as usize..part.end as usize];
            let start = bytes.as_ptr().cast_mut().cast();
            // SAFETY: mapped as long as `map` lives, and taken out on drop before it goes. The device only reads it.
            let result =
                unsafe { sys::cuMemHostRegister_v2(start, bytes.len(), REGISTER_PORTABLE | read_only) };
            check("cuMemHostRegister", result)?;
            self.registered += 1;
        }
        Ok(())
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.map.as_slice()
    }

    /// Where the part ends that holds the byte at `offset`.
    pub fn part_end(&self, offset: u64) -> Option<u64> {
        self.parts.iter().find(|part| part.contains(&offset)).map(|part| part.end)
    }
}

impl Drop for PinnedMap {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        for part in &self.parts[..self.registered] {
            let start = self.map.as_slice()[part.start as usize..].as_ptr().cast_mut().cast();
            // SAFETY: registered by `register`, and still mapped.
            let _ = unsafe { sys::cuMemHostUnregister(start) };
        }
    }
}
