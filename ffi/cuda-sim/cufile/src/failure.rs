//! How a call ends that has failed.

use rustix::io::Errno;

use crate::abi::{Code, Status};

/// Why a call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    Code(Code),
    /// The driver answered a `CUresult`.
    Cuda(u32),
    /// Of a transfer: the file system said so.
    Errno(i32),
}

pub(crate) type Answer<T = ()> = Result<T, Failure>;

impl From<Code> for Failure {
    fn from(code: Code) -> Failure {
        Failure::Code(code)
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure::Errno(errno.raw_os_error())
    }
}

impl Failure {
    /// What a call that returns a `CUfileError_t` returns.
    pub(crate) fn status(self) -> Status {
        match self {
            Failure::Code(code) => Status { error: code.0, cuda: 0 },
            Failure::Cuda(code) => Status { error: Code::CUDA_DRIVER_ERROR.0, cuda: code },
            Failure::Errno(_) => Status { error: Code::INTERNAL_ERROR.0, cuda: 0 },
        }
    }

    /// What `errno` says after a transfer: an error of the file system, or a code of cuFile, as real libraries have it.
    pub(crate) fn errno(self) -> i32 {
        match self {
            Failure::Errno(errno) => errno,
            other => other.status().error,
        }
    }
}
