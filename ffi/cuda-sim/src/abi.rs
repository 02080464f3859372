//! What crosses the C boundary: result codes, structures, and pointers that a caller hands in.
//!
//! Enumerations of the C API are integers here: a caller may pass any value, and a Rust enum may not hold any value.

use std::ffi::{CStr, c_char, c_void};

/// `CUresult`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) u32);

/// The end of a call that failed.
pub(crate) type Answer<T = ()> = Result<T, Code>;

const fn text(bytes: &'static [u8]) -> &'static CStr {
    match CStr::from_bytes_with_nul(bytes) {
        Ok(text) => text,
        Err(_) => panic!("the macro ends each text with one zero"),
    }
}

macro_rules! codes {
    ($($name:ident = $number:literal, $description:literal;)*) => {
        impl Code {
            $(#[allow(dead_code, reason = "most codes are given by fault injection only")]
            pub(crate) const $name: Code = Code($number);)*
        }

        /// Code, its name without `CUDA_ERROR_`, its full name, its description.
        const CODES: &[(Code, &str, &CStr, &CStr)] = &[
            (Code::SUCCESS, "SUCCESS", c"CUDA_SUCCESS", c"no error"),
            $((
                Code::$name,
                stringify!($name),
                text(concat!("CUDA_ERROR_", stringify!($name), "\0").as_bytes()),
                text(concat!($description, "\0").as_bytes()),
            ),)*
        ];
    };
}

codes! {
    INVALID_VALUE = 1, "invalid argument";
    OUT_OF_MEMORY = 2, "out of memory";
    NOT_INITIALIZED = 3, "initialization error";
    DEINITIALIZED = 4, "driver shutting down";
    STUB_LIBRARY = 34, "CUDA driver is a stub library";
    DEVICE_UNAVAILABLE = 46, "CUDA-capable device(s) is/are busy or unavailable";
    NO_DEVICE = 100, "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "invalid device ordinal";
    INVALID_IMAGE = 200, "device kernel image is invalid";
    INVALID_CONTEXT = 201, "invalid device context";
    MAP_FAILED = 205, "mapping of buffer object failed";
    UNMAP_FAILED = 206, "unmapping of buffer object failed";
    NO_BINARY_FOR_GPU = 209, "no kernel image is available for execution on the device";
    ECC_UNCORRECTABLE = 214, "uncorrectable ECC error encountered";
    INVALID_PTX = 218, "a PTX JIT compilation failed";
    NVLINK_UNCORRECTABLE = 220, "uncorrectable NVLink error detected during the execution";
    FILE_NOT_FOUND = 301, "file not found";
    OPERATING_SYSTEM = 304, "OS call failed or operation not supported on this OS";
    INVALID_HANDLE = 400, "invalid resource handle";
    ILLEGAL_STATE = 401, "the operation cannot be performed in the present state";
    NOT_FOUND = 500, "named symbol not found";
    NOT_READY = 600, "device not ready";
    ILLEGAL_ADDRESS = 700, "an illegal memory access was encountered";
    LAUNCH_OUT_OF_RESOURCES = 701, "too many resources requested for launch";
    LAUNCH_TIMEOUT = 702, "the launch timed out and was terminated";
    CONTEXT_IS_DESTROYED = 709, "context is destroyed";
    ASSERT = 710, "device-side assert triggered";
    HOST_MEMORY_ALREADY_REGISTERED = 712, "part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED = 713, "pointer does not correspond to a registered memory region";
    HARDWARE_STACK_ERROR = 714, "hardware stack error";
    ILLEGAL_INSTRUCTION = 715, "an illegal instruction was encountered";
    MISALIGNED_ADDRESS = 716, "misaligned address";
    INVALID_ADDRESS_SPACE = 717, "operation not supported on global/shared address space";
    INVALID_PC = 718, "invalid program counter";
    LAUNCH_FAILED = 719, "unspecified launch failure";
    NOT_PERMITTED = 800, "operation not permitted";
    NOT_SUPPORTED = 801, "operation not supported";
    SYSTEM_NOT_READY = 802, "system not yet initialized";
    SYSTEM_DRIVER_MISMATCH = 803, "system has unsupported display driver / cuda driver combination";
    TIMEOUT = 909, "wait operation timed out";
    EXTERNAL_DEVICE = 911, "an async error has occurred in external entity outside of CUDA";
    UNKNOWN = 999, "unknown error";
}

impl Code {
    pub(crate) const SUCCESS: Code = Code(0);

    /// The code of a name without its `CUDA_ERROR_`; or of `LOST`, which is what a lost device answers.
    pub(crate) fn named(name: &str) -> Option<Code> {
        if name == "LOST" {
            return Some(Code::DEVICE_UNAVAILABLE);
        }
        CODES.iter().find(|entry| entry.1 == name).map(|entry| entry.0)
    }

    pub(crate) fn name(self) -> Option<&'static CStr> {
        CODES.iter().find(|entry| entry.0 == self).map(|entry| entry.2)
    }

    pub(crate) fn description(self) -> Option<&'static CStr> {
        CODES.iter().find(|entry| entry.0 == self).map(|entry| entry.3)
    }

    /// Whether it leaves the context unusable, so that every later call in it answers the same.
    pub(crate) fn is_sticky(self) -> bool {
        matches!(
            self,
            Code::DEVICE_UNAVAILABLE
                | Code::ECC_UNCORRECTABLE
                | Code::NVLINK_UNCORRECTABLE
                | Code::ILLEGAL_ADDRESS
                | Code::LAUNCH_TIMEOUT
                | Code::ASSERT
                | Code::HARDWARE_STACK_ERROR
                | Code::ILLEGAL_INSTRUCTION
                | Code::MISALIGNED_ADDRESS
                | Code::INVALID_ADDRESS_SPACE
                | Code::INVALID_PC
                | Code::LAUNCH_FAILED
                | Code::EXTERNAL_DEVICE
        )
    }
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Location {
    pub(crate) kind: u32,
    pub(crate) id: i32,
}

pub(crate) const LOCATION_DEVICE: u32 = 1;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Properties {
    pub(crate) kind: u32,
    pub(crate) handle_types: u32,
    pub(crate) location: Location,
    pub(crate) win32: *mut c_void,
    pub(crate) compression: u8,
    pub(crate) rdma: u8,
    pub(crate) usage: u16,
    pub(crate) reserved: [u8; 4],
}

pub(crate) const ALLOCATION_PINNED: u32 = 1;
pub(crate) const HANDLE_POSIX_FD: u32 = 1;

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct AccessDescription {
    pub(crate) location: Location,
    pub(crate) flags: u32,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memcpy2D {
    pub(crate) source: Plane,
    pub(crate) target: Plane,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

/// One side of a `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plane {
    pub(crate) x_bytes: usize,
    pub(crate) y: usize,
    pub(crate) memory: u32,
    pub(crate) host: Host,
    pub(crate) device: u64,
    pub(crate) array: *mut c_void,
    pub(crate) pitch: usize,
}

pub(crate) const MEMORY_HOST: u32 = 1;
pub(crate) const MEMORY_DEVICE: u32 = 2;
pub(crate) const MEMORY_UNIFIED: u32 = 4;

/// `CUuuid`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Uuid(pub(crate) [u8; 16]);

/// An address of host memory that a caller of the C API handed in. Such a caller promises that the range which goes
/// with it may be accessed until the call, or the work that it submits, has ended.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Host(*mut u8);

// SAFETY: only an address; who accesses memory by it relies on the promise of the caller of the C API, whose words
// ("until the work has ended") include the threads of streams.
unsafe impl Send for Host {}

impl Host {
    pub(crate) fn number(self) -> u64 {
        self.0 as u64
    }

    pub(crate) fn pointer(self) -> *mut u8 {
        self.0
    }

    /// The address so many bytes on.
    pub(crate) fn offset(self, bytes: usize) -> Host {
        Host(self.0.wrapping_add(bytes))
    }

    #[cfg(test)]
    pub(crate) fn of(bytes: &mut [u8]) -> Host {
        Host(bytes.as_mut_ptr())
    }
}

/// A pointer of the C API through which a result goes out: null, or to a place for a `T`.
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Writes the result. A null pointer is `INVALID_VALUE`.
    pub(crate) fn put(self, value: T) -> Answer {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: only a caller of the C API makes an `Out`, and promises that it points to a place for a `T`.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Writes the result if the caller wants it.
    pub(crate) fn put_if_wanted(self, value: T) -> Answer {
        if self.0.is_null() { Ok(()) } else { self.put(value) }
    }
}

/// An untyped pointer of the C API, to a place whose type another argument says.
#[repr(transparent)]
pub(crate) struct OutAny(*mut c_void);

impl OutAny {
    /// The same, for a place of the type that the C API documents for the call.
    pub(crate) fn of<T>(self) -> Out<T> {
        Out(self.0.cast())
    }
}

/// A pointer of the C API to an argument: null, or to so many `T` as the call says.
#[repr(transparent)]
pub(crate) struct In<T>(*const T);

impl<T> In<T> {
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }
}

impl<T: Copy> In<T> {
    /// The argument. A null pointer is `INVALID_VALUE`.
    pub(crate) fn get(&self) -> Answer<T> {
        self.at(0)
    }

    /// One of several.
    pub(crate) fn at(&self, index: usize) -> Answer<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let place = self.0.wrapping_add(index);
        // SAFETY: only a caller of the C API makes an `In`, and promises that it points to as many `T` as the call
        // documents; callers of this stay below that number.
        Ok(unsafe { place.read_unaligned() })
    }
}

/// A pointer of the C API to a text that ends with a zero, or null.
#[repr(transparent)]
pub(crate) struct InText(*const c_char);

impl InText {
    /// The text. Null, and bytes that are not UTF-8, are `INVALID_VALUE`.
    pub(crate) fn get(&self) -> Answer<&str> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: only a caller of the C API makes an `InText`, and promises that a zero ends what it points to.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map_err(|_| Code::INVALID_VALUE)
    }
}

/// A pointer of the C API to a buffer for a text.
#[repr(transparent)]
pub(crate) struct OutText(*mut c_char);

impl OutText {
    /// Writes as much of the text as fits, and a zero.
    pub(crate) fn put(self, length: i32, text: &str) -> Answer {
        let length = usize::try_from(length).map_err(|_| Code::INVALID_VALUE)?;
        if self.0.is_null() || length == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let mut bytes = text.as_bytes()[..text.len().min(length - 1)].to_vec();
        bytes.push(0);
        // SAFETY: only a caller of the C API makes an `OutText`, with room for `length` bytes; no more are written.
        unsafe { self.0.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }
}

/// `void**` of a kernel launch: pointers to the arguments.
#[repr(transparent)]
pub(crate) struct Arguments(In<In<u64>>);

impl Arguments {
    /// The arguments of a kernel that takes `count`, each of 64 bits.
    pub(crate) fn get(&self, count: usize) -> Answer<Vec<u64>> {
        (0..count)
            .map(|index| {
                let place = self.0.0.wrapping_add(index);
                if self.0.is_null() {
                    return Err(Code::INVALID_VALUE);
                }
                // SAFETY: only a caller of the C API makes an `Arguments`, and promises as many pointers as the kernel
                // takes arguments; `count` is that number.
                let argument = unsafe { place.read_unaligned() };
                argument.get()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_c_api() {
        assert_eq!(size_of::<Location>(), 8);
        assert_eq!(size_of::<Properties>(), 32);
        assert_eq!(size_of::<AccessDescription>(), 12);
        assert_eq!(size_of::<Memcpy2D>(), 128);
        assert_eq!(size_of::<Uuid>(), 16);
    }

    #[test]
    fn codes_are_found_by_name() {
        assert_eq!(Code::named("OUT_OF_MEMORY"), Some(Code(2)));
        assert_eq!(Code::named("CUDA_ERROR_OUT_OF_MEMORY"), None);
        assert_eq!(Code(700).name(), Some(c"CUDA_ERROR_ILLEGAL_ADDRESS"));
        assert_eq!(Code(12345).name(), None);
    }
}
