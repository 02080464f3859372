//! What a check is made of.

use lodestream::rdma::Fault;
use lodestream::sys::verbs::{Absent, NoRoute, VerbsError, WorkError};

/// Why a check has failed.
#[derive(Debug)]
pub(crate) struct Wrong(pub(crate) String);

pub(crate) type Checked<T = ()> = Result<T, Wrong>;

macro_rules! wrong_from {
    ($($error:ty)*) => {
        $(impl From<$error> for Wrong {
            fn from(error: $error) -> Wrong {
                Wrong(error.to_string())
            }
        })*
    };
}

wrong_from! { std::io::Error serde_json::Error Absent NoRoute VerbsError WorkError Fault rustix::io::Errno }

/// Fails with a text unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            return Err($crate::check::Wrong(format!($($text)*)));
        }
    };
}
pub(crate) use ensure;
