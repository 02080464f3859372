//! The checksum kernel: CRC-64/NVME of chunks of device memory, computed by the device.

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUfunction, CUmodule};

use super::device::Context;
use super::memory::DeviceMemory;
use super::stream::Stream;
use super::{CudaError, check, invalid};

/// What `crc64.cu` compiles to, with the zero that the driver wants at the end.
const PTX: &str = concat!(include_str!("crc64.ptx"), "\0");
/// Threads of a block: part of the kernel's contract (crc64.cu).
const THREADS: u32 = 128;

/// Checksums of the memory of one device, computed by the device. The kernel is loaded when it is first needed.
#[derive(Debug)]
pub struct Checksums {
    context: Arc<Context>,
    kernel: Mutex<Option<Kernel>>,
}

impl Checksums {
    /// Nothing is loaded yet.
    pub fn new(context: &Arc<Context>) -> Checksums {
        Checksums { context: Arc::clone(context), kernel: Mutex::default() }
    }

    /// The checksum of each `chunk_bytes` of `memory` from `offset` on; the last chunk may be shorter. Blocks.
    pub fn chunks(
        &self,
        memory: &DeviceMemory,
        offset: u64,
        bytes: u64,
        chunk_bytes: u64,
    ) -> Result<Vec<u64>, CudaError> {
        // A panic while it was locked cannot have left it half-made.
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = match kernel.take() {
            Some(loaded) => loaded,
            None => Kernel::load(&self.context)?,
        };
        kernel.insert(loaded).run(memory, offset..offset.saturating_add(bytes), chunk_bytes)
    }
}

/// The kernel, loaded into the context of one device.
struct Kernel {
    stream: Stream,
    module: CUmodule,
    function: CUfunction,
}

// SAFETY: handles that the driver lets any thread use; all calls are made with the context current.
unsafe impl Send for Kernel {}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kernel").field(&self.stream).finish()
    }
}

impl Kernel {
    /// The driver translates it for the device.
    fn load(context: &Arc<Context>) -> Result<Kernel, CudaError> {
        let stream = Stream::new(context)?;
        let mut module = std::ptr::null_mut();
        // SAFETY: `PTX` is a text with a zero at its end; `module` lives through the call.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, PTX.as_ptr().cast()) })?;
        let mut loaded = Kernel { stream, module, function: std::ptr::null_mut() };
        let name = c"lodestream_crc64_chunks";
        // SAFETY: the module was loaded above; both others live through the call.
        let result = unsafe { sys::cuModuleGetFunction(&mut loaded.function, module, name.as_ptr()) };
        check("cuModuleGetFunction", result)?;
        Ok(loaded)
    }

    fn run(&self, memory: &DeviceMemory, range: Range<u64>, chunk_bytes: u64) -> Result<Vec<u64>, CudaError> {
        const CALL: &str = "cuLaunchKernel";
        let bytes = range.end - range.start;
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let context = self.stream.context();
        if chunk_bytes == 0 || !Arc::ptr_eq(memory.context(), context) {
            return Err(invalid(CALL));
        }
        let data = memory.address_of(range.start, bytes).ok_or(invalid(CALL))?;
        let count = bytes.div_ceil(chunk_bytes);
        let blocks = u32::try_from(count).map_err(|_| invalid(CALL))?;
        let room = DeviceMemory::rounded(context, count * 8)?.ok_or(invalid(CALL))?;
        let sums = DeviceMemory::new(context, room)?;
        let target = sums.address_of(0, count * 8).ok_or(invalid(CALL))?;
        let mut arguments = [data, bytes, chunk_bytes, target];
        let mut places = arguments.each_mut().map(|argument| std::ptr::from_mut(argument).cast::<c_void>());
        context.bind()?;
        // SAFETY: the arguments are those of the kernel, and live through the call, which copies them; both memories are
        // kept until `finish` below.
        let result = unsafe {
            sys::cuLaunchKernel(
                self.function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                self.stream.raw(),
                places.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(CALL, result)?;
        self.stream.finish()?;
        let mut bytes = vec![0u8; count as usize * 8];
        sums.read(0, &mut bytes)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|sum| u64::from_le_bytes(*sum)).collect())
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if self.stream.context().bind().is_ok() {
            // SAFETY: loaded by `load`; nothing of it runs any more.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}
