//! Who is at the other end of a Unix socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Supplementary groups that one process may have: the kernel's NGROUPS_MAX.
const GROUPS_MAX: usize = 65_536;
/// The kernel's number for this option, which libc does not have yet.
const SO_PEERPIDFD: libc::c_int = 77;

/// User, group and supplementary groups of the process that connected, as the kernel recorded them then.
pub fn credentials(socket: BorrowedFd<'_>) -> io::Result<(u32, u32, Vec<u32>)> {
    let peer = rustix::net::sockopt::socket_peercred(socket)?;
    Ok((peer.uid.as_raw(), peer.gid.as_raw(), groups(socket)?))
}

/// The process that connected, as this one sees it; it may have ended since.
pub fn process(socket: BorrowedFd<'_>) -> io::Result<i32> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.pid.as_raw_pid())
}

/// A descriptor of the process that connected, readable once that has ended. Needs Linux 6.5.
pub fn pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut bytes = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes` bytes to `fd`, which has that many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut bytes,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that is ours; the kernel has made it close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups = vec![0u32; 32];
    loop {
        let mut bytes = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `bytes` bytes to the vector, which has that many, and updates `bytes`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = bytes as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // ERANGE: `bytes` says how much is needed.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > GROUPS_MAX {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    #[test]
    fn both_ends_of_a_pair_are_this_process() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let (uid, gid, _) = super::credentials(one.as_fd()).unwrap();
        assert_eq!(uid, rustix::process::geteuid().as_raw());
        assert_eq!(gid, rustix::process::getegid().as_raw());
        assert_eq!(super::process(one.as_fd()).unwrap(), rustix::process::getpid().as_raw_pid());
    }
}
