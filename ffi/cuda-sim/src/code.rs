//! Results of the driver API (`CUresult`), as numbers: a caller may be built for a driver that knows others.

/// What a call came to.
pub(crate) type Outcome<T = ()> = Result<T, u32>;

macro_rules! codes {
    ($($name:ident = $value:literal;)*) => {
        $(#[allow(dead_code, reason = "some are only ever injected")] pub(crate) const $name: u32 = $value;)*

        /// The code with this name, without its prefix `CUDA_ERROR_`.
        pub(crate) fn parse(name: &str) -> Option<u32> {
            match name { $(stringify!($name) => Some($value),)* "LOST" => Some(DEVICE_UNAVAILABLE), _ => None }
        }

        /// The name of a code, with a zero at its end.
        pub(crate) fn name(code: u32) -> Option<&'static str> {
            match code {
                0 => Some("CUDA_SUCCESS\0"),
                $($value => Some(concat!("CUDA_ERROR_", stringify!($name), "\0")),)*
                _ => None,
            }
        }
    };
}

codes! {
    INVALID_VALUE = 1;
    OUT_OF_MEMORY = 2;
    NOT_INITIALIZED = 3;
    DEINITIALIZED = 4;
    DEVICE_UNAVAILABLE = 46;
    NO_DEVICE = 100;
    INVALID_DEVICE = 101;
    INVALID_IMAGE = 200;
    INVALID_CONTEXT = 201;
    ECC_UNCORRECTABLE = 214;
    INVALID_HANDLE = 400;
    NOT_FOUND = 500;
    NOT_READY = 600;
    ILLEGAL_ADDRESS = 700;
    HOST_MEMORY_ALREADY_REGISTERED = 712;
    HOST_MEMORY_NOT_REGISTERED = 713;
    LAUNCH_FAILED = 719;
    NOT_PERMITTED = 800;
    NOT_SUPPORTED = 801;
    UNKNOWN = 999;
}

/// Whether a context that has met this error answers every later call with it.
pub(crate) fn is_sticky(code: u32) -> bool {
    matches!(code, DEVICE_UNAVAILABLE | ECC_UNCORRECTABLE | ILLEGAL_ADDRESS | LAUNCH_FAILED)
}
