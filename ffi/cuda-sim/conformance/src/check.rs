//! What a check is made of: a device with its context, mapped memory, and ways to say what was expected.

use cudarc::driver::sys::{CUcontext, CUmemAccess_flags};

use crate::driver::{self, Answer, Code, Failure};

/// Why a check has failed.
#[derive(Debug)]
pub(crate) struct Wrong(pub(crate) String);

impl From<Failure> for Wrong {
    fn from(failure: Failure) -> Wrong {
        Wrong(failure.to_string())
    }
}

impl From<std::io::Error> for Wrong {
    fn from(error: std::io::Error) -> Wrong {
        Wrong(error.to_string())
    }
}

impl From<rustix::io::Errno> for Wrong {
    fn from(error: rustix::io::Errno) -> Wrong {
        Wrong(error.to_string())
    }
}

pub(crate) type Checked<T = ()> = Result<T, Wrong>;

/// Fails with a text unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            return Err($crate::check::Wrong(format!($($text)*)));
        }
    };
}
pub(crate) use ensure;

/// The call must fail with one of these codes.
pub(crate) fn fails<T>(what: &str, answer: Answer<T>, codes: &[Code]) -> Checked {
    match answer {
        Err(Failure { code, .. }) if codes.contains(&code) => Ok(()),
        Err(failure) => Err(Wrong(format!("{what}: {failure}, not one of {codes:?}"))),
        Ok(_) => Err(Wrong(format!("{what}: succeeded, and should have failed with one of {codes:?}"))),
    }
}

/// The call must fail; with what is not documented.
pub(crate) fn fails_somehow<T>(what: &str, answer: Answer<T>) -> Checked {
    match answer {
        Err(_) => Ok(()),
        Ok(_) => Err(Wrong(format!("{what}: succeeded, and should have failed"))),
    }
}

/// The bytes must be these.
pub(crate) fn same(what: &str, found: &[u8], expected: &[u8]) -> Checked {
    ensure!(found.len() == expected.len(), "{what}: {} bytes, not {}", found.len(), expected.len());
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => Err(Wrong(format!("{what}: byte {at} is {}, not {}", found[at], expected[at]))),
    }
}

/// The first device with its context current.
pub(crate) struct Gpu {
    pub(crate) device: i32,
    pub(crate) context: CUcontext,
    /// Unit of device memory, bytes.
    pub(crate) unit: u64,
}

impl Gpu {
    pub(crate) fn open() -> Checked<Gpu> {
        driver::init()?;
        let device = driver::device(0)?;
        let context = driver::retain(device)?;
        driver::set_current(context)?;
        let (_, unit) = driver::granularities(device)?;
        Ok(Gpu { device, context, unit })
    }

    /// Fresh memory, mapped.
    pub(crate) fn memory(&self, units: u64, access: CUmemAccess_flags) -> Checked<Mapped> {
        let bytes = units * self.unit;
        let handle = driver::create(self.device, bytes)?;
        self.map(handle, bytes, access)
    }

    /// Maps memory.
    pub(crate) fn map(&self, handle: u64, bytes: u64, access: CUmemAccess_flags) -> Checked<Mapped> {
        let address = driver::reserve(bytes, 0)?;
        driver::map(address, bytes, handle)?;
        driver::set_access(address, bytes, self.device, access)?;
        Ok(Mapped { address, bytes, handle })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // The process ends with the check: what is left then is the driver's to clear.
        let _ = driver::release_context(self.device);
    }
}

/// An allocation and where it is mapped.
#[derive(Clone, Copy)]
pub(crate) struct Mapped {
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    pub(crate) handle: u64,
}

impl Mapped {
    /// Takes it apart, each step of which must succeed.
    pub(crate) fn close(self) -> Checked {
        driver::unmap(self.address, self.bytes)?;
        driver::release(self.handle)?;
        driver::free_address(self.address, self.bytes)?;
        Ok(())
    }
}

/// Bytes that tell their place.
pub(crate) fn pattern(seed: u64, bytes: u64) -> Vec<u8> {
    (0..bytes)
        .map(|at| {
            let mixed = (at ^ seed.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed >> 56) as u8
        })
        .collect()
}
