//! RDMA verbs, as far as Lodestream uses them: reliable connected queue pairs that READ (and WRITE) registered memory of a peer.
//!
//! libibverbs is reached by way of `liblodestream_verbs.so` (`ffi/verbs`), which is opened at run time: a node without either has
//! no RDMA, and [`Library::open`] says why. Everything raw stays behind the table of that library.
//!
//! Upholds invariant 2 for the NIC: a queue pair owns the span of an operation from [`QueuePair::post`] until its completion is
//! handed back; one that is dropped goes to the error state and drains first, or leaks the spans and counts their bytes. An object
//! holds what it was made of, so nothing is given back under it.
//!
//! Not for: who may read what. Keys and numbers of queue pairs are secrets that travel inside an authenticated session only
//! (`docs/rdma.md`).

mod channel;
mod device;
mod gid;
mod library;
mod memory;
mod pair;
mod work;

#[cfg(test)]
mod tests;

pub use channel::Channel;
pub use device::{Context, Event, LinkLayer, NoRoute, Port, PortState, Route, Transport};
pub use gid::{Choice, Gid, GidEntry, GidKind, NoGid, Reason, choose};
pub use library::{Absent, Library};
pub use memory::{Backing, ProtectionDomain, Registered, Remote, Window};
pub use pair::{Endpoint, QueuePair, Role};
pub use work::{Done, Kind, Transfer, WORK_BYTES_MAX, WorkError};

use std::fmt;
use std::io;

/// A call to libibverbs that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct VerbsError {
    /// What was to be done.
    pub call: &'static str,
    /// Number of errno.
    pub errno: i32,
}

impl VerbsError {
    /// The device, its driver or the kernel has no such thing, and will not have it on a second try.
    pub fn is_unsupported(&self) -> bool {
        [libc::EOPNOTSUPP, libc::ENOSYS].contains(&self.errno)
    }
}

impl fmt::Display for VerbsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "verbs: {}: {}", self.call, io::Error::from_raw_os_error(self.errno))
    }
}

fn check(call: &'static str, answer: i32) -> Result<(), VerbsError> {
    if answer == 0 { Ok(()) } else { Err(VerbsError { call, errno: answer }) }
}

/// An argument that the device would refuse, or worse, take.
fn invalid(call: &'static str) -> VerbsError {
    VerbsError { call, errno: libc::EINVAL }
}
