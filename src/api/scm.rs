//! Bytes and file descriptors over a Unix stream socket, for blocking and for non-blocking sockets.
//!
//! A descriptor arrives with the first byte of the message that it was sent with, so after a message's last byte
//! all its descriptors are there. They arrive in order; which message takes how many is decided by the messages.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::error::{Code, Error};

/// Most descriptors that the kernel carries in one message (`SCM_MAX_FD`).
pub const FDS_MAX: usize = 253;

const SPACE: usize = rustix::cmsg_space!(ScmRights(FDS_MAX));

/// More descriptors came than the receiver takes. Carried inside an [`io::Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {fds_max} file descriptors came with one message")]
pub struct TooManyFds {
    /// The limit.
    pub fds_max: usize,
}

impl From<TooManyFds> for Error {
    fn from(error: TooManyFds) -> Self {
        Error::new(Code::ApiTooManyFds, error.to_string())
    }
}

/// The [`TooManyFds`] inside an error of [`recv`], if it is one.
pub fn too_many_fds(error: &io::Error) -> Option<TooManyFds> {
    error.get_ref()?.downcast_ref::<TooManyFds>().copied()
}

/// Receives bytes into `buffer`, and descriptors (close-on-exec) onto the end of `fds`. Gives the number of bytes;
/// 0 is the end of the stream.
///
/// # Errors
/// What `recvmsg` gives (`WouldBlock` on an empty non-blocking socket), or [`TooManyFds`] if `fds` would grow past
/// `fds_max` or the kernel had to drop some. Then every descriptor that came with this message is closed, and the
/// stream cannot be followed further: its bytes are lost.
pub fn recv(
    socket: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    fds_max: usize,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::<u8>::uninit(); SPACE];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let held = fds.len();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > fds_max {
        fds.truncate(held);
        return Err(io::Error::new(io::ErrorKind::InvalidData, TooManyFds { fds_max }));
    }
    Ok(received.bytes)
}

/// Sends bytes, with descriptors that travel with the first of them. Gives the number of bytes sent, which may be
/// fewer; the descriptors are then on their way already, and the rest is sent without them.
///
/// # Errors
/// What `sendmsg` gives; `BrokenPipe` without a signal; `InvalidInput` for more than [`FDS_MAX`] descriptors, or for
/// descriptors without a byte to go with.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > FDS_MAX || (bytes.is_empty() && !fds.is_empty()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::<u8>::uninit(); SPACE];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent =
        retry_on_intr(|| sendmsg(&socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL))?;
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    fn open_files(count: usize) -> Vec<std::fs::File> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap()).collect()
    }

    fn borrowed(files: &[std::fs::File]) -> Vec<BorrowedFd<'_>> {
        files.iter().map(AsFd::as_fd).collect()
    }

    #[test]
    fn descriptors_arrive_in_order_with_their_message_and_close_on_exec() {
        let (one, two) = UnixStream::pair().unwrap();
        let (mut written, read) = io::pipe().map(|(read, write)| (write, read)).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        (&one).write_all(b"before\n").unwrap();
        assert_eq!(send(&one, b"with\n", &[read.as_fd(), null.as_fd()]).unwrap(), 5);
        (&one).write_all(b"after\n").unwrap();
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        while bytes.len() < 18 {
            let mut buffer = [0; 64];
            let count = recv(&two, &mut buffer, &mut fds, FDS_MAX).unwrap();
            bytes.extend_from_slice(&buffer[..count]);
            if bytes.len() >= 12 {
                assert_eq!(fds.len(), 2);
            }
        }
        assert_eq!(bytes, b"before\nwith\nafter\n");
        assert!(fds.iter().all(|fd| fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC)));
        written.write_all(b"x").unwrap();
        let mut byte = [0];
        std::fs::File::from(fds.swap_remove(0)).read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn as_many_descriptors_as_the_kernel_carries() {
        let (one, two) = UnixStream::pair().unwrap();
        let files = open_files(FDS_MAX + 1);
        let sent = send(&one, b"x", &borrowed(&files)).unwrap_err();
        assert_eq!(sent.kind(), io::ErrorKind::InvalidInput);
        send(&one, b"x", &borrowed(&files[..FDS_MAX])).unwrap();
        let mut fds = Vec::new();
        recv(&two, &mut [0; 8], &mut fds, FDS_MAX).unwrap();
        assert_eq!(fds.len(), FDS_MAX);
    }

    #[test]
    fn too_many_descriptors_are_an_error_and_all_of_them_are_closed() {
        let (one, two) = UnixStream::pair().unwrap();
        let (read, write) = io::pipe().unwrap();
        send(&one, b"x", &[write.as_fd(), write.as_fd(), write.as_fd()]).unwrap();
        drop(write);
        let mut fds = vec![OwnedFd::from(std::fs::File::open("/dev/null").unwrap())];
        let error = recv(&two, &mut [0; 8], &mut fds, 3).unwrap_err();
        assert_eq!(too_many_fds(&error), Some(TooManyFds { fds_max: 3 }));
        assert_eq!(fds.len(), 1, "what was held before stays");
        // The pipe ends only when every copy of its write end is closed.
        assert_eq!((&read).read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_non_blocking_socket_says_so_and_a_closed_one_raises_no_signal() {
        let (one, two) = UnixStream::pair().unwrap();
        two.set_nonblocking(true).unwrap();
        let mut fds = Vec::new();
        assert_eq!(recv(&two, &mut [0; 8], &mut fds, 1).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(one);
        assert_eq!(recv(&two, &mut [0; 8], &mut fds, 1).unwrap(), 0);
        assert_eq!(send(&two, b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn descriptors_need_a_byte() {
        let (one, _two) = UnixStream::pair().unwrap();
        let files = open_files(1);
        assert_eq!(send(&one, b"", &borrowed(&files)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
