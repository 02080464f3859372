//! Acting with a tenant's own rights: the calling thread takes on its user, group and supplementary groups
//! for the length of one closure.
//!
//! Upholds invariant 7: what the daemon opens for a tenant, the kernel checks against that tenant. It is for
//! opening files only, on a thread that may block; it is never used on a shard thread.
//!
//! The rights of the kernel belong to the thread, not the process, as long as the raw system calls are used
//! (the C library's `setgroups` would change all threads). A side effect of any such change is that the kernel
//! marks the process as not dumpable by its own user (`proc(5)`, `suid_dumpable`).

use std::fmt;

use rustix::io::Errno;
use rustix::process::{Gid, geteuid, getgroups};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups};

use crate::error::Code;

/// The value that `setfsuid` and `setfsgid` refuse, and by which they are asked for the present one.
const NO_ID: u32 = u32::MAX;

/// What lets a thread read files whatever their mode. A tenant's rights must not include it.
const READ_ANYTHING: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::DAC_READ_SEARCH);

/// Who a connection acts for, as the kernel names the peer of its socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tenant {
    /// User id, in the daemon's user namespace.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid:{}", self.uid)
    }
}

/// Why the daemon cannot act as a tenant.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The daemon lacks CAP_SETUID or CAP_SETGID.
    #[error(
        "the daemon may not open files as {tenant} (it lacks CAP_SETUID or CAP_SETGID): open the files yourself \
         and send their descriptors"
    )]
    CannotActAs {
        /// Whom.
        tenant: Tenant,
    },
    /// The kernel refused the change, for instance because an id is not mapped here.
    #[error(
        "the kernel does not let the daemon act as {tenant}: open the files yourself and send their descriptors"
    )]
    Refused {
        /// Whom.
        tenant: Tenant,
    },
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        crate::Error::new(Code::IdentityCannotActAs, error.to_string())
    }
}

/// Whether this thread can take on another user's rights (CAP_SETUID and CAP_SETGID are effective).
pub fn can_act_as() -> bool {
    capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SETUID | CapabilitySet::SETGID))
}

/// Runs `act` on this thread with the tenant's rights on files, then takes the daemon's own back.
///
/// A tenant with the daemon's own user id needs no change. If the daemon's own rights cannot be restored, the
/// process is aborted: a thread must never go on with foreign ones.
///
/// # Errors
/// [`Error`] if the change is not possible; `act` has then not run.
pub fn act_as<T>(tenant: &Tenant, act: impl FnOnce() -> T) -> Result<T, Error> {
    if tenant.uid == geteuid().as_raw() {
        return Ok(act());
    }
    if !can_act_as() {
        return Err(Error::CannotActAs { tenant: tenant.clone() });
    }
    let own = Own::of_this_thread().map_err(|_| Error::Refused { tenant: tenant.clone() })?;
    // From here on `own` is dropped on every way out, also when `act` panics.
    own.leave_for(tenant).map_err(|_| Error::Refused { tenant: tenant.clone() })?;
    Ok(act())
}

/// The daemon's own rights, restored on drop.
struct Own {
    uid: u32,
    gid: u32,
    groups: Vec<Gid>,
    capabilities: CapabilitySets,
}

impl Own {
    fn of_this_thread() -> Result<Own, Errno> {
        Ok(Own {
            uid: set_fs_uid(NO_ID),
            gid: set_fs_gid(NO_ID),
            groups: getgroups()?,
            capabilities: capabilities(None)?,
        })
    }

    fn leave_for(&self, tenant: &Tenant) -> Result<(), Errno> {
        if tenant.uid == NO_ID || tenant.gid == NO_ID || tenant.groups.contains(&NO_ID) {
            return Err(Errno::INVAL);
        }
        let groups: Vec<Gid> = tenant.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        // The user comes last: leaving user 0 gives up capabilities.
        set_thread_groups(&groups)?;
        change_group(tenant.gid)?;
        change_user(tenant.uid)?;
        // The kernel drops these when user 0 is left; a daemon that is not user 0 has to do it itself.
        let mut sets = capabilities(None)?;
        if sets.effective.intersects(READ_ANYTHING) {
            sets.effective.remove(READ_ANYTHING);
            set_capabilities(None, sets)?;
        }
        Ok(())
    }

    fn take_back(&self) -> Result<(), Errno> {
        change_user(self.uid)?;
        change_group(self.gid)?;
        set_thread_groups(&self.groups)?;
        set_capabilities(None, self.capabilities)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Err(errno) = self.take_back() {
            tracing::error!(%errno, "cannot take back the daemon's own rights");
            std::process::abort();
        }
    }
}

/// Changes the user and verifies it, for the system call itself reports no failure.
fn change_user(uid: u32) -> Result<(), Errno> {
    set_fs_uid(uid);
    if set_fs_uid(NO_ID) == uid { Ok(()) } else { Err(Errno::PERM) }
}

/// Changes the group and verifies it, for the system call itself reports no failure.
fn change_group(gid: u32) -> Result<(), Errno> {
    set_fs_gid(gid);
    if set_fs_gid(NO_ID) == gid { Ok(()) } else { Err(Errno::PERM) }
}

/// Sets this thread's user for file access; returns the one before.
fn set_fs_uid(uid: u32) -> u32 {
    // SAFETY: the call takes a number and touches no memory; it changes rights of this thread alone.
    let before = unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
    before as u32
}

/// Sets this thread's group for file access; returns the one before.
fn set_fs_gid(gid: u32) -> u32 {
    // SAFETY: the call takes a number and touches no memory; it changes rights of this thread alone.
    let before = unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
    before as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    /// A user that owns nothing.
    fn nobody() -> Tenant {
        Tenant { uid: 65534, gid: 65534, groups: vec![] }
    }

    /// A file that only its owner, the user of the tests, may read.
    fn private_file() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = dir.path().join("private");
        std::fs::write(&path, b"secret").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        (dir, path)
    }

    #[test]
    fn own_user_needs_no_rights() {
        let own = Tenant { uid: geteuid().as_raw(), gid: 0, groups: vec![] };
        assert_eq!(act_as(&own, || 7).unwrap(), 7);
    }

    #[test]
    fn another_user_sees_only_what_is_his_or_an_error_says_how_to_go_on() {
        let (_dir, path) = private_file();
        match act_as(&nobody(), || std::fs::read(&path)) {
            Ok(read) => assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied),
            Err(error) => {
                assert!(!can_act_as());
                assert!(error.to_string().contains("descriptors"), "{error}");
            }
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"secret", "the own rights are back");
    }

    #[test]
    fn groups_of_the_tenant_count_and_those_of_the_daemon_do_not() {
        if !can_act_as() {
            return;
        }
        let (_dir, path) = private_file();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(&path, None, Some(4711)).unwrap();
        assert!(act_as(&nobody(), || std::fs::read(&path)).unwrap().is_err());
        let member = Tenant { groups: vec![4711], ..nobody() };
        assert_eq!(act_as(&member, || std::fs::read(&path)).unwrap().unwrap(), b"secret");
    }

    #[test]
    fn rights_come_back_after_a_panic() {
        let (_dir, path) = private_file();
        let before =
            (set_fs_uid(NO_ID), set_fs_gid(NO_ID), getgroups().unwrap(), capabilities(None).unwrap());
        let member = Tenant { groups: vec![4711], ..nobody() };
        let _ = std::panic::catch_unwind(|| act_as(&member, || panic!("in the closure")));
        let after = (set_fs_uid(NO_ID), set_fs_gid(NO_ID), getgroups().unwrap(), capabilities(None).unwrap());
        assert_eq!(before, after);
        assert!(std::fs::read(&path).is_ok());
    }

    #[test]
    fn ids_that_do_not_exist_are_refused() {
        for tenant in [
            Tenant { uid: NO_ID, ..nobody() },
            Tenant { gid: NO_ID, ..nobody() },
            Tenant { groups: vec![NO_ID], ..nobody() },
        ] {
            assert!(act_as(&tenant, || ()).is_err());
        }
    }

    #[test]
    fn displays_as_in_the_api() {
        assert_eq!(nobody().to_string(), "uid:65534");
    }
}
