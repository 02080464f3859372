//! A second process: it makes memory, sends its descriptor, and looks at it when it is asked.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::check::{Checked, Gpu, Wrong, ensure, pattern};
use crate::driver::{self, READ_WRITE};

/// Seed of what the exporter writes into its memory.
pub(crate) const SEED: u8 = 21;

/// An exporter, seen from the other process. Dropped: killed.
pub(crate) struct Exporter {
    child: Child,
    socket: UnixStream,
}

impl Exporter {
    /// Starts it with so many units of memory; what it exports.
    pub(crate) fn start(units: u64) -> Checked<(Exporter, OwnedFd)> {
        let (socket, other) = UnixStream::pair()?;
        let child = Command::new(std::env::current_exe()?)
            .args(["--export", &units.to_string()])
            .stdin(Stdio::from(OwnedFd::from(other)))
            .spawn()?;
        let exporter = Exporter { child, socket };
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let bytes = [IoSliceMut::new(&mut byte)];
        let received = recvmsg(&exporter.socket, &mut { bytes }, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        ensure!(received.bytes == 1, "the exporter has ended");
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        Ok((exporter, fd.ok_or_else(|| Wrong("no descriptor came".to_owned()))?))
    }

    /// Whether it sees the pattern with this seed in its memory.
    pub(crate) fn sees(&mut self, seed: u8) -> Checked<bool> {
        self.socket.write_all(&[seed])?;
        let mut answer = [0];
        self.socket.read_exact(&mut answer)?;
        Ok(answer == [1])
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(mut self) -> Checked {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The exporter itself: its socket is its standard input.
pub(crate) fn export(units: u64) -> Checked {
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let gpu = Gpu::open()?;
    let memory = gpu.memory(units, READ_WRITE)?;
    driver::write(memory.address, &pattern(SEED.into(), memory.bytes))?;
    let fd = driver::export(memory.handle)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "no room for a descriptor");
    sendmsg(&socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    drop(fd);
    let mut seed = [0];
    while socket.read(&mut seed)? == 1 {
        let seen = driver::read(memory.address, memory.bytes)? == pattern(seed[0].into(), memory.bytes);
        socket.write_all(&[u8::from(seen)])?;
    }
    memory.close()
}
