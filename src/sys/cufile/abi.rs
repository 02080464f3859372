//! libcufile's functions and structures, as `cufile.h` of 1.14 and of 1.20 declares them.
//!
//! Every code is an `i32`: a library that is newer than this file may answer with codes that it does not know.

use std::ffi::{c_int, c_void};

use libloading::Library;

/// The name by which the library is installed.
const NAME: &str = "libcufile.so.0";

/// What most functions answer.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer {
    pub(super) code: i32,
    /// The driver's result, where `code` is 5011.
    pub(super) cuda: i32,
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
pub(super) const OPAQUE_FD: i32 = 1;

/// What a file is registered by: a descriptor, in the place that a pointer may have.
#[repr(C)]
pub(super) union FileName {
    pub(super) fd: c_int,
    pub(super) handle: *mut c_void,
}

/// `CUfileDescr_t`.
#[repr(C)]
pub(super) struct Description {
    pub(super) kind: i32,
    pub(super) name: FileName,
    pub(super) operations: *const c_void,
}

/// `CUFILE_PARAM_USE_PCIP2PDMA` of `CUFileBoolConfigParameter_t`.
pub(super) const USE_PCIP2PDMA: i32 = 7;
/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE`.
pub(super) const ALLOW_COMPAT_MODE: i32 = 1;

/// Why libcufile cannot be called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Absent {
    /// The library is not there, or it cannot be loaded.
    #[error("{NAME} cannot be loaded: {0}")]
    Library(String),
    /// It is there, and older than what is needed.
    #[error(
        "{NAME} has no {0}: a newer one is needed (1.20 will do), which can tell by which path bytes came"
    )]
    Function(&'static str),
}

macro_rules! functions {
    ($($field:ident: $name:literal, fn($($argument:ty),*) $(-> $answer:ty)?;)*) => {
        /// The functions that are used. They can be called as long as the library is loaded, which is as long as this lives.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) $(-> $answer)?,)*
            _library: Library,
        }

        impl Functions {
            pub(super) fn load() -> Result<Functions, Absent> {
                // SAFETY: loads libcufile, whose initialisers are trusted like those of any installed library.
                let library = unsafe { Library::new(NAME) };
                let library = library.map_err(|error| Absent::Library(error.to_string()))?;
                $(
                    // SAFETY: the type is that of `cufile.h`.
                    let found = unsafe { library.get(concat!($name, "\0").as_bytes()) };
                    let $field = *found.map_err(|_| Absent::Function($name))?;
                )*
                Ok(Functions { $($field,)* _library: library })
            }
        }
    };
}

functions! {
    driver_open: "cuFileDriverOpen", fn() -> Answer;
    driver_close: "cuFileDriverClose_v2", fn() -> Answer;
    version: "cuFileGetVersion", fn(*mut c_int) -> Answer;
    set_bool: "cuFileSetParameterBool", fn(i32, bool) -> Answer;
    set_stats_level: "cuFileSetStatsLevel", fn(c_int) -> Answer;
    stats_start: "cuFileStatsStart", fn() -> Answer;
    stats_l3: "cuFileGetStatsL3", fn(*mut c_void) -> Answer;
    handle_register: "cuFileHandleRegister", fn(*mut *mut c_void, *mut Description) -> Answer;
    handle_deregister: "cuFileHandleDeregister", fn(*mut c_void);
    buf_register: "cuFileBufRegister", fn(*const c_void, usize, c_int) -> Answer;
    buf_deregister: "cuFileBufDeregister", fn(*const c_void) -> Answer;
    read: "cuFileRead", fn(*mut c_void, *mut c_void, usize, libc::off_t, libc::off_t) -> isize;
}
