//! cuFile as the checks call it: whichever `libcufile.so.0` the loader finds. What a version of it may lack is looked for
//! first.

use std::cell::Cell;
use std::ffi::c_void;
use std::fmt;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use libloading::Library;

use crate::cufile_abi::{
    BatchEntry, BatchEvent, Code, Descriptor, DescriptorHandle, OPAQUE_FD, PerGpu, Properties, Statistics,
    Status, Timespec,
};

/// The first version whose statistics have the vector calls, in front of the GPUs.
const VERSION_OF_VECTORS: i32 = 1190;
/// Codes of cuFile are above this, numbers of the system below.
const CODE_BASE: i32 = 5000;
/// By so many bytes.
const VECTOR_BYTES: usize = 112;

macro_rules! functions {
    ($($field:ident = $name:ident($($type:ty),*) $(-> $result:ty)?;)*) => {
        /// cuFile's functions, those that there are.
        struct Functions {
            $($field: Option<unsafe extern "C" fn($($type),*) $(-> $result)?>,)*
        }

        impl Functions {
            fn find(library: &Library) -> Functions {
                Functions {
                    $($field: {
                        // SAFETY: the type is that of cuFile's header.
                        unsafe { library.get(concat!(stringify!($name), "\0")) }.ok().map(|symbol| *symbol)
                    },)*
                }
            }
        }
    };
}

functions! {
    driver_open = cuFileDriverOpen() -> Status;
    driver_close = cuFileDriverClose_v2() -> Status;
    use_count = cuFileUseCount() -> i64;
    version = cuFileGetVersion(*mut i32) -> Status;
    properties = cuFileDriverGetProperties(*mut Properties) -> Status;
    simulated = cuFileSimulated() -> *const c_void;
    handle_register = cuFileHandleRegister(*mut usize, *const Descriptor) -> Status;
    handle_deregister = cuFileHandleDeregister(usize);
    buffer_register = cuFileBufRegister(u64, usize, i32) -> Status;
    buffer_deregister = cuFileBufDeregister(u64) -> Status;
    read = cuFileRead(usize, u64, usize, i64, i64) -> isize;
    write = cuFileWrite(usize, u64, usize, i64, i64) -> isize;
    set_size = cuFileSetParameterSizeT(i32, usize) -> Status;
    size = cuFileGetParameterSizeT(i32, *mut usize) -> Status;
    set_boolean = cuFileSetParameterBool(i32, bool) -> Status;
    boolean = cuFileGetParameterBool(i32, *mut bool) -> Status;
    set_level = cuFileSetStatsLevel(i32) -> Status;
    level = cuFileGetStatsLevel(*mut i32) -> Status;
    statistics_start = cuFileStatsStart() -> Status;
    statistics_stop = cuFileStatsStop() -> Status;
    statistics = cuFileGetStatsL3(*mut Statistics) -> Status;
    batch_set_up = cuFileBatchIOSetUp(*mut usize, u32) -> Status;
    batch_submit = cuFileBatchIOSubmit(usize, u32, *const BatchEntry, u32) -> Status;
    batch_events = cuFileBatchIOGetStatus(usize, u32, *mut u32, *mut BatchEvent, *const Timespec) -> Status;
    batch_cancel = cuFileBatchIOCancel(usize) -> Status;
    batch_destroy = cuFileBatchIODestroy(usize);
    set_slabs = cuFileSetParameterPosixPoolSlabArray(*const usize, *const usize, i32) -> Status;
}

/// A call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// This version does not have the function.
    Missing {
        call: &'static str,
    },
    Code {
        call: &'static str,
        code: Code,
        cuda: u32,
    },
    /// Of a read or a write: `errno`.
    Errno {
        call: &'static str,
        errno: i32,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Missing { call } => write!(f, "this libcufile has no {call}"),
            Failure::Code { call, code, cuda } => write!(f, "{call} answered {} (CUDA {cuda})", code.0),
            Failure::Errno { call, errno } => {
                write!(f, "{call}: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

pub(crate) type Answer<T = ()> = Result<T, Failure>;

/// A loaded library.
pub(crate) struct CuFile {
    functions: Functions,
    /// A function that was to be called and that it does not have.
    missing: Cell<Option<&'static str>>,
}

/// Calls a function. Results go to local variables, whose pointers are good for the call.
macro_rules! cufile {
    ($self:ident.$field:ident($($argument:expr),* $(,)?)) => {{
        let call = stringify!($field);
        let function = $self.have(call, $self.functions.$field)?;
        // SAFETY: the function of the library, with the arguments of cuFile's header. Pointers are to locals; handles come
        // from the library, and device addresses are its to check.
        let status: Status = unsafe { function($($argument),*) };
        match status.error {
            0 => Ok(()),
            error => Err(Failure::Code { call, code: Code(error), cuda: status.cuda }),
        }
    }};
}

impl CuFile {
    /// Loads the library, for good: it may have threads of its own. An error says why it cannot be.
    pub(crate) fn load() -> Result<CuFile, String> {
        // SAFETY: loads libcufile, whose initialisers are trusted like those of any installed library.
        let library = unsafe { Library::new("libcufile.so.0") };
        let library = library.map_err(|error| format!("no libcufile.so.0 can be loaded: {error}"))?;
        let functions = Functions::find(&library);
        std::mem::forget(library);
        Ok(CuFile { functions, missing: Cell::new(None) })
    }

    /// What was to be called and is missing.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        self.missing.get()
    }

    fn have<F>(&self, call: &'static str, function: Option<F>) -> Answer<F> {
        function.ok_or_else(|| {
            self.missing.set(Some(call));
            Failure::Missing { call }
        })
    }

    pub(crate) fn is_simulated(&self) -> bool {
        self.functions.simulated.is_some()
    }

    /// Only after `cuInit` has succeeded: real libraries have been seen to hang without a driver.
    pub(crate) fn driver_open(&self) -> Answer {
        cufile!(self.driver_open())
    }

    pub(crate) fn driver_close(&self) -> Answer {
        cufile!(self.driver_close())
    }

    pub(crate) fn use_count(&self) -> Answer<i64> {
        let function = self.have("use_count", self.functions.use_count)?;
        // SAFETY: takes nothing.
        Ok(unsafe { function() })
    }

    pub(crate) fn version(&self) -> Answer<i32> {
        let mut version = 0;
        cufile!(self.version(&mut version)).map(|()| version)
    }

    pub(crate) fn properties(&self) -> Answer<Properties> {
        let mut properties = Properties::default();
        cufile!(self.properties(&mut properties)).map(|()| properties)
    }

    pub(crate) fn handle_register(&self, file: BorrowedFd<'_>) -> Answer<usize> {
        let mut handle = 0;
        let descriptor = Descriptor {
            kind: OPAQUE_FD,
            handle: DescriptorHandle { fd: file.as_raw_fd() },
            operations: std::ptr::null(),
        };
        cufile!(self.handle_register(&mut handle, &descriptor)).map(|()| handle)
    }

    pub(crate) fn handle_deregister(&self, handle: usize) -> Answer {
        let function = self.have("handle_deregister", self.functions.handle_deregister)?;
        // SAFETY: the handle comes from the library, and is not used afterwards.
        unsafe { function(handle) };
        Ok(())
    }

    pub(crate) fn buffer_register(&self, base: u64, bytes: u64) -> Answer {
        cufile!(self.buffer_register(base, bytes as usize, 0))
    }

    pub(crate) fn buffer_deregister(&self, base: u64) -> Answer {
        cufile!(self.buffer_deregister(base))
    }

    fn moved(call: &'static str, result: isize) -> Answer<u64> {
        match result {
            // Which of both `errno` says is told by its size.
            -1 => match std::io::Error::last_os_error().raw_os_error().unwrap_or(0) {
                code if code > CODE_BASE => Err(Failure::Code { call, code: Code(code), cuda: 0 }),
                errno => Err(Failure::Errno { call, errno }),
            },
            code if code < 0 => Err(Failure::Code { call, code: Code(-code as i32), cuda: 0 }),
            bytes => Ok(bytes as u64),
        }
    }

    /// Reads `bytes` of the file from `at` on to `base + offset`; how many there were.
    pub(crate) fn read(&self, handle: usize, base: u64, bytes: u64, at: i64, offset: i64) -> Answer<u64> {
        let function = self.have("read", self.functions.read)?;
        // SAFETY: the handle comes from the library; the device address is its to check.
        CuFile::moved("read", unsafe { function(handle, base, bytes as usize, at, offset) })
    }

    /// Writes `bytes` from `base + offset` to the file from `at` on.
    pub(crate) fn write(&self, handle: usize, base: u64, bytes: u64, at: i64, offset: i64) -> Answer<u64> {
        let function = self.have("write", self.functions.write)?;
        // SAFETY: as for `read`.
        CuFile::moved("write", unsafe { function(handle, base, bytes as usize, at, offset) })
    }

    pub(crate) fn set_size(&self, which: usize, value: usize) -> Answer {
        cufile!(self.set_size(which as i32, value))
    }

    pub(crate) fn size(&self, which: usize) -> Answer<usize> {
        let mut value = 0;
        cufile!(self.size(which as i32, &mut value)).map(|()| value)
    }

    pub(crate) fn set_boolean(&self, which: usize, value: bool) -> Answer {
        cufile!(self.set_boolean(which as i32, value))
    }

    pub(crate) fn boolean(&self, which: usize) -> Answer<bool> {
        let mut value = false;
        cufile!(self.boolean(which as i32, &mut value)).map(|()| value)
    }

    pub(crate) fn set_level(&self, level: i32) -> Answer {
        cufile!(self.set_level(level))
    }

    pub(crate) fn level(&self) -> Answer<i32> {
        let mut level = -1;
        cufile!(self.level(&mut level)).map(|()| level)
    }

    pub(crate) fn statistics_start(&self) -> Answer {
        cufile!(self.statistics_start())
    }

    pub(crate) fn statistics_stop(&self) -> Answer {
        cufile!(self.statistics_stop())
    }

    /// Statistics by GPU.
    pub(crate) fn statistics(&self) -> Answer<Vec<PerGpu>> {
        let mut found = Statistics::default();
        cufile!(self.statistics(&mut found))?;
        let shorter = if self.version()? < VERSION_OF_VECTORS { VECTOR_BYTES } else { 0 };
        let start = (&raw const found).cast::<u8>();
        let place = |bytes: usize| start.wrapping_add(bytes - shorter);
        let count = place(offset_of!(Statistics, gpu_count)).cast::<u32>();
        // SAFETY: in `found`, whose integers may hold anything.
        let count = unsafe { count.read_unaligned() } as usize;
        let gpus = place(offset_of!(Statistics, gpus)).cast::<PerGpu>();
        // SAFETY: as above: one of an array in `found`.
        let gpu = |index| unsafe { gpus.wrapping_add(index).read_unaligned() };
        Ok((0..count.min(found.gpus.len())).map(gpu).collect())
    }

    /// A batch of up to so many entries.
    pub(crate) fn batch_set_up(&self, capacity: u32) -> Answer<usize> {
        let mut batch = 0;
        cufile!(self.batch_set_up(&mut batch, capacity)).map(|()| batch)
    }

    pub(crate) fn batch_submit(&self, batch: usize, entries: &[BatchEntry]) -> Answer {
        cufile!(self.batch_submit(batch, entries.len() as u32, entries.as_ptr(), 0))
    }

    /// Waits for `min` entries, so long at most; what has ended then, of `max` at most.
    pub(crate) fn batch_events(
        &self,
        batch: usize,
        min: u32,
        max: u32,
        timeout: Duration,
    ) -> Answer<Vec<BatchEvent>> {
        let (answer, events) = self.batch_end(batch, min, max, timeout);
        answer.map(|()| events)
    }

    /// The same, with what was told although the call failed.
    pub(crate) fn batch_end(
        &self,
        batch: usize,
        min: u32,
        max: u32,
        timeout: Duration,
    ) -> (Answer, Vec<BatchEvent>) {
        let mut events = vec![BatchEvent { cookie: 0, status: 0, result: 0 }; max as usize];
        let mut count = max;
        let timeout =
            Timespec { seconds: timeout.as_secs() as i64, nanoseconds: timeout.subsec_nanos().into() };
        let mut call = || cufile!(self.batch_events(batch, min, &mut count, events.as_mut_ptr(), &timeout));
        let answer = call();
        events.truncate(count as usize);
        (answer, events)
    }

    pub(crate) fn batch_cancel(&self, batch: usize) -> Answer {
        cufile!(self.batch_cancel(batch))
    }

    pub(crate) fn batch_destroy(&self, batch: usize) -> Answer {
        let function = self.have("batch_destroy", self.functions.batch_destroy)?;
        // SAFETY: the handle comes from the library, and is not used afterwards.
        unsafe { function(batch) };
        Ok(())
    }

    /// Slabs of compatibility mode: their sizes in KiB, and how many of each.
    pub(crate) fn set_slabs(&self, sizes: &[usize], counts: &[usize]) -> Answer {
        let kinds = sizes.len().min(counts.len()) as i32;
        cufile!(self.set_slabs(sizes.as_ptr(), counts.as_ptr(), kinds))
    }
}
