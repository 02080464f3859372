//! CUDA's driver API, as far as Lodestream uses it: devices, memory that is shared by descriptor, asynchronous copies
//! out of pinned slots.
//!
//! libcuda is loaded at run time: a node without it has no devices, and that is all. A simulated libcuda
//! (`ffi/cuda-sim`) is used like a real one; its devices say so in their names.
//!
//! Every object keeps the primary context of its device alive, and makes it current on the calling thread before each
//! call, so objects can move between threads.

mod demotion;
mod device;
mod kernel;
mod memory;
mod promotion;
mod stream;

use std::fmt;

use cudarc::driver::sys::{self, CUresult};

pub use demotion::Demotion;
pub use device::{Context, Device, Found, find};
pub use kernel::{Checksums, Kernel};
pub use memory::{DeviceMemory, Imported, Pinned, PinnedMap};
pub use promotion::Promotion;
pub use stream::{Rows, Stream, Upload};

/// A call to the driver that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct CudaError {
    /// The function.
    pub call: &'static str,
    /// What it answered.
    result: CUresult,
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered {:?}", self.call, self.result)
    }
}

impl CudaError {
    /// The driver's number for it.
    pub(super) fn code(self) -> i32 {
        self.result as i32
    }

    /// The device has no memory left.
    pub fn is_out_of_memory(self) -> bool {
        self.result == CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }

    /// The context, and all that it had on the device, is lost: no later call can succeed.
    pub fn is_fatal(self) -> bool {
        matches!(
            self.result,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
                | CUresult::CUDA_ERROR_LAUNCH_FAILED
                | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
                | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
                | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUresult::CUDA_ERROR_INVALID_PC
                | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
                | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
                | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
                | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
                | CUresult::CUDA_ERROR_DEINITIALIZED
                | CUresult::CUDA_ERROR_UNKNOWN
        )
    }
}

/// The answer of `call` as a result.
fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(CudaError { call, result }) }
}

/// An argument that the driver would refuse.
fn invalid(call: &'static str) -> CudaError {
    CudaError { call, result: CUresult::CUDA_ERROR_INVALID_VALUE }
}

/// Whether a libcuda can be loaded. Before anything else: cudarc panics on the first call without one.
fn library_present() -> bool {
    // SAFETY: loads libcuda, whose initialisers are trusted like those of any installed library.
    unsafe { sys::is_culib_present() }
}
