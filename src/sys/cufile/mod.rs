//! cuFile (GPUDirect Storage), as far as Lodestream uses it: reads of files into the memory of a GPU, and the counters
//! that prove by which path the bytes came.
//!
//! libcufile is loaded at run time: a node without it has no direct path, and that is all. Opening it was seen to spin for
//! ever where the driver is not in order, so the first open on a node belongs into a process that can be killed
//! (`direct::probe`).

mod abi;
mod counters;

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

pub use abi::Absent;
use abi::{ALLOW_COMPAT_MODE, Answer, Description, FileName, Functions, OPAQUE_FD, USE_PCIP2PDMA};
pub use counters::Counters;

use super::cuda::{CudaError, Device, DeviceMemory};

/// There as long as the module nvidia-fs is loaded.
const NVIDIA_FS: &str = "/proc/driver/nvidia-fs";
/// Per-GPU counters.
const STATS_LEVEL: i32 = 3;
/// `CU_FILE_SUCCESS`.
const SUCCESS: i32 = 0;
/// Codes of `CUfileOpError` begin behind this; smaller ones are none.
const CODES_BEGIN: i32 = 5000;

/// A call to cuFile that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct CufileError {
    /// The function.
    pub call: &'static str,
    /// Its code (`CUfileOpError`), or a number of errno.
    code: i32,
    /// The driver's result, if `code` says that there is one.
    cuda: i32,
}

impl fmt::Display for CufileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.cuda) {
            (code, _) if code < CODES_BEGIN => {
                write!(f, "{}: {}", self.call, io::Error::from_raw_os_error(code))
            }
            (code, 0) => write!(f, "{} answered {code}", self.call),
            (code, cuda) => write!(f, "{} answered {code} (CUDA: {cuda})", self.call),
        }
    }
}

/// Why cuFile cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The library.
    #[error(transparent)]
    Absent(#[from] Absent),
    /// It does not open.
    #[error(transparent)]
    Failed(#[from] CufileError),
}

fn check(call: &'static str, answer: Answer) -> Result<(), CufileError> {
    match answer.code {
        SUCCESS => Ok(()),
        code => Err(CufileError { call, code, cuda: answer.cuda }),
    }
}

/// Memory that libcufile would refuse, or the context of a device that is lost.
fn unusable(call: &'static str, error: CudaError) -> CufileError {
    // CU_FILE_CUDA_DRIVER_ERROR.
    CufileError { call, code: CODES_BEGIN + 11, cuda: error.code() }
}

/// The library, opened. One for the process; closed when the last that uses it has gone.
pub struct Driver {
    functions: Functions,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl Driver {
    /// Loads and opens the library, with counters per GPU. CUDA must have been initialised, with success.
    ///
    /// May never come back: see above.
    pub fn open() -> Result<Arc<Driver>, OpenError> {
        let functions = Functions::load()?;
        // PCI P2PDMA serves where nvidia-fs is not loaded. If neither can, bytes come by way of host memory instead of
        // not at all; the counters tell.
        let peer = !Path::new(NVIDIA_FS).exists();
        for (parameter, value) in [(USE_PCIP2PDMA, peer), (ALLOW_COMPAT_MODE, true)] {
            // SAFETY: before the library is opened, as it demands; an unknown parameter is refused.
            check("cuFileSetParameterBool", unsafe { (functions.set_bool)(parameter, value) })?;
        }
        // SAFETY: takes a number.
        check("cuFileSetStatsLevel", unsafe { (functions.set_stats_level)(STATS_LEVEL) })?;
        // SAFETY: CUDA was initialised (the caller's promise).
        check("cuFileDriverOpen", unsafe { (functions.driver_open)() })?;
        let driver = Arc::new(Driver { functions });
        // SAFETY: the library is open.
        check("cuFileStatsStart", unsafe { (driver.functions.stats_start)() })?;
        Ok(driver)
    }

    /// Version of the library: `1.15`.
    pub fn version(&self) -> Result<String, CufileError> {
        let mut version = 0;
        // SAFETY: `version` lives through the call.
        check("cuFileGetVersion", unsafe { (self.functions.version)(&mut version) })?;
        Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
    }

    /// What was read into the memory of `device` by this process so far. `None`: the library does not name the device.
    pub fn counters(&self, device: &Device) -> Result<Option<Counters>, CufileError> {
        let mut buffer = counters::buffer();
        // SAFETY: the buffer is several times as long as the longest version of the structure.
        check("cuFileGetStatsL3", unsafe { (self.functions.stats_l3)(buffer.as_mut_ptr().cast()) })?;
        Ok(counters::of(&buffer, device.uuid_bytes()))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: opened by `open`; files and memory that are registered hold an `Arc` of this and are gone.
        let _ = unsafe { (self.functions.driver_close)() };
    }
}

/// Memory of a GPU that drives may write to. It is taken out of the registration before it is freed.
#[derive(Debug)]
pub struct Registered {
    driver: Arc<Driver>,
    memory: Arc<DeviceMemory>,
    base: *mut c_void,
}

// SAFETY: `base` is an address on the device, which is only handed to the library.
unsafe impl Send for Registered {}
// SAFETY: as above; the library takes calls from several threads.
unsafe impl Sync for Registered {}

impl Registered {
    /// Registers all of `memory`: slow, so once for the life of a region.
    pub fn new(driver: &Arc<Driver>, memory: &Arc<DeviceMemory>) -> Result<Registered, CufileError> {
        const CALL: &str = "cuFileBufRegister";
        memory.context().bind().map_err(|error| unusable(CALL, error))?;
        let bytes = memory.bytes();
        let address = memory.address_of(0, bytes);
        let (Some(address), Ok(length)) = (address, usize::try_from(bytes)) else {
            return Err(CufileError { call: CALL, code: libc::EINVAL, cuda: 0 });
        };
        let base = address as *mut c_void;
        // SAFETY: the range is mapped as long as `memory` lives, and `Registered` keeps it and takes it out on drop.
        check(CALL, unsafe { (driver.functions.buf_register)(base, length, 0) })?;
        Ok(Registered { driver: Arc::clone(driver), memory: Arc::clone(memory), base })
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<DeviceMemory> {
        &self.memory
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _ = self.memory.context().bind();
        // SAFETY: registered by `new`; reads into it borrow `self`, so none is under way.
        let _ = unsafe { (self.driver.functions.buf_deregister)(self.base) };
    }
}

/// A file that the library knows.
#[derive(Debug)]
pub struct Handle {
    driver: Arc<Driver>,
    _file: Arc<OwnedFd>,
    raw: *mut c_void,
}

// SAFETY: a handle that the library lets any thread use.
unsafe impl Send for Handle {}
// SAFETY: as above, several at a time.
unsafe impl Sync for Handle {}

impl Handle {
    /// Makes a file known that was opened past the page cache. A descriptor can be known only once.
    pub fn new(driver: &Arc<Driver>, file: &Arc<OwnedFd>) -> Result<Handle, CufileError> {
        let mut raw = std::ptr::null_mut();
        let name = FileName { fd: file.as_raw_fd() };
        let mut description = Description { kind: OPAQUE_FD, name, operations: std::ptr::null() };
        // SAFETY: both live through the call; the descriptor is open as long as `Handle` keeps it.
        let answer = unsafe { (driver.functions.handle_register)(&mut raw, &mut description) };
        check("cuFileHandleRegister", answer)?;
        Ok(Handle { driver: Arc::clone(driver), _file: Arc::clone(file), raw })
    }

    /// Reads `bytes` at `offset` of the file to `place` of `target`, and waits for them. → how many have come: fewer at
    /// the end of the file, or for no reason.
    ///
    /// All three on multiples of 4 KiB, or the library goes by way of memory of its own.
    pub fn read(&self, target: &Registered, place: u64, bytes: u64, offset: u64) -> Result<u64, CufileError> {
        const CALL: &str = "cuFileRead";
        target.memory.context().bind().map_err(|error| unusable(CALL, error))?;
        let inside = place.checked_add(bytes).is_some_and(|end| end <= target.memory.bytes());
        let numbers = (usize::try_from(bytes), i64::try_from(offset), i64::try_from(place));
        let (Ok(length), Ok(offset), Ok(place)) = numbers else {
            return Err(CufileError { call: CALL, code: libc::EINVAL, cuda: 0 });
        };
        if !inside {
            return Err(CufileError { call: CALL, code: libc::EINVAL, cuda: 0 });
        }
        // SAFETY: the range is inside the memory (checked above), which `target` keeps until the call has ended.
        let read = unsafe { (self.driver.functions.read)(self.raw, target.base, length, offset, place) };
        match u64::try_from(read) {
            Ok(read) if read <= bytes => Ok(read),
            Ok(_) => Err(CufileError { call: CALL, code: libc::EIO, cuda: 0 }),
            Err(_) if read == -1 => {
                let code = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
                Err(CufileError { call: CALL, code, cuda: 0 })
            }
            Err(_) => {
                let code = i32::try_from(read.unsigned_abs()).unwrap_or(libc::EIO);
                Err(CufileError { call: CALL, code, cuda: 0 })
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `new`; reads of it borrow `self`, so none is under way.
        unsafe { (self.driver.functions.handle_deregister)(self.raw) };
    }
}
