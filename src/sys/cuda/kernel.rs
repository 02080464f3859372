//! The checksum kernel: CRC-64/NVME of chunks of device memory, computed by the device.

use std::ffi::c_void;
use std::fmt;
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
/// The call that launches it.
const CALL: &str = "cuLaunchKernel";

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
        kernel.insert(loaded).chunks(memory, offset, bytes, chunk_bytes)
    }
}

/// The kernel, loaded into the context of one device. Waits for the device: for one thread at a time.
pub struct Kernel {
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
    pub fn load(context: &Arc<Context>) -> Result<Kernel, CudaError> {
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

    fn chunks(
        &self,
        memory: &DeviceMemory,
        offset: u64,
        bytes: u64,
        chunk_bytes: u64,
    ) -> Result<Vec<u64>, CudaError> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let context = self.stream.context();
        if chunk_bytes == 0 {
            return Err(invalid(CALL));
        }
        let count = bytes.div_ceil(chunk_bytes);
        let room = DeviceMemory::rounded(context, count * 8)?.ok_or(invalid(CALL))?;
        let sums = DeviceMemory::new(context, room)?;
        self.launch(memory, (offset, bytes), chunk_bytes, (&sums, 0))?;
        self.stream.finish()?;
        read_sums(&sums, count)
    }

    /// The checksum of each of `pieces` (offset and bytes, none empty) of `memory`, by way of `room`, which has 8 bytes for
    /// each of them. The context of all three is the same.
    pub fn pieces(
        &self,
        memory: &DeviceMemory,
        pieces: impl Iterator<Item = (u64, u64)>,
        room: &DeviceMemory,
    ) -> Result<Vec<u64>, CudaError> {
        let mut count = 0;
        let launched = pieces.into_iter().try_for_each(|piece| {
            count += 1;
            self.launch(memory, piece, piece.1, (room, (count - 1) * 8))
        });
        // Also after a failure: what was launched before it uses both memories.
        self.stream.finish()?;
        launched?;
        read_sums(room, count)
    }

    /// Starts the kernel on `piece` (offset and bytes) of `memory`; the sums go to a memory from an offset on. Both are kept
    /// by the caller until the stream has finished.
    fn launch(
        &self,
        memory: &DeviceMemory,
        (offset, bytes): (u64, u64),
        chunk_bytes: u64,
        (sums, place): (&DeviceMemory, u64),
    ) -> Result<(), CudaError> {
        let context = self.stream.context();
        let own = [memory, sums].iter().all(|memory| Arc::ptr_eq(memory.context(), context));
        if !own || bytes == 0 || chunk_bytes == 0 {
            return Err(invalid(CALL));
        }
        let count = bytes.div_ceil(chunk_bytes);
        let blocks = u32::try_from(count).map_err(|_| invalid(CALL))?;
        let data = memory.address_of(offset, bytes).ok_or(invalid(CALL))?;
        let target = sums.address_of(place, count * 8).ok_or(invalid(CALL))?;
        let mut arguments = [data, bytes, chunk_bytes, target];
        let mut places = arguments.each_mut().map(|argument| std::ptr::from_mut(argument).cast::<c_void>());
        context.bind()?;
        // SAFETY: the arguments are those of the kernel, and live through the call, which copies them; both memories are
        // kept until the stream has finished (the caller's promise).
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
        check(CALL, result)
    }
}

/// The first `count` sums that the kernel has left.
fn read_sums(sums: &DeviceMemory, count: u64) -> Result<Vec<u64>, CudaError> {
    let mut bytes = vec![0u8; usize::try_from(count * 8).unwrap_or_default()];
    sums.read(0, &mut bytes)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|sum| u64::from_le_bytes(*sum)).collect())
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if self.stream.context().bind().is_ok() {
            // SAFETY: loaded by `load`; nothing of it runs any more.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}
