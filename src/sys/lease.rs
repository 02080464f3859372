//! Whether any process still holds sealed memory: observed with a file lease.
//!
//! A write lease (`F_SETLEASE`, `F_WRLCK`) is granted only when the asker's own open file description is the only
//! one of that file. Clients receive a read-only description that is not ours; it lives as long as they have it
//! open *or mapped*. So: give up our copy of the shared description, keep a private one, and ask for a lease. It is
//! granted exactly when the last importer has let go. Checked on memfd and hugetlb memfd, Linux 6.18
//! (docs/decisions/0004-held-memory.md).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Sealed memory that the daemon no longer shares, but that importers may still hold.
#[derive(Debug)]
pub struct Importers {
    private: OwnedFd,
    bytes: u64,
}

impl Importers {
    /// `private` is a description of the memory that no importer shares. The daemon has given up its copy of the one that
    /// they do.
    pub(super) fn of(private: OwnedFd, bytes: u64) -> Importers {
        Importers { private, bytes }
    }

    /// Length of the memory, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether some process still has the memory open or mapped.
    pub fn hold(&self) -> bool {
        // SAFETY: a plain fcntl on a descriptor that we own; no memory is involved.
        let granted = unsafe { libc::fcntl(self.private.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
        if granted == 0 {
            // SAFETY: as above; gives the lease back.
            unsafe { libc::fcntl(self.private.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
            return false;
        }
        // EAGAIN: somebody holds it. Anything else: this kernel cannot tell, and memory is taken for free as soon
        // as no lease is left, as it would be without this check.
        io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)
    }
}

#[cfg(test)]
mod tests {
    use crate::sys::mem::{HUGE_PAGE_BYTES, Memory};
    use crate::sys::pages::PageKind;
    use std::os::fd::AsFd;

    #[test]
    fn importers_are_seen_until_they_let_go() {
        let (sealed, retired) = Memory::new(HUGE_PAGE_BYTES, PageKind::Small).unwrap().seal().unwrap();
        let client = sealed.as_fd().try_clone_to_owned().unwrap();
        drop(retired);
        let importers = sealed.retire();
        assert!(importers.hold());
        drop(client);
        assert!(!importers.hold());
        assert!(!importers.hold(), "asking takes nothing");
    }
}
