//! One request at a time over the socket: send, follow notifications, take the reply and its descriptors.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::{ClientError, Progress, refusal};
use crate::api::scm;
use crate::api::wire::{self, FrameReader, Id, JOB_PROGRESS, Message};
use crate::sys::peer;

/// Longest line that is taken from a daemon: four times its default for replies.
const REPLY_BYTES_MAX: usize = 256 << 20;

/// Bytes of one receive: more than the table of a model of 300 tensors.
const RECEIVE_BYTES: usize = 128 << 10;

/// How often a call that waits for its reply asks whether it should go on.
const ASK_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Says whether a call that waits for its reply should be given up.
pub type Interrupt = Box<dyn FnMut() -> bool + Send>;

pub(super) struct Connection {
    stream: UnixStream,
    /// The process that opened it. After a fork, two processes would talk over one stream.
    process: u32,
    frames: FrameReader,
    /// Descriptors that came and that no reply has taken.
    fds: Vec<OwnedFd>,
    buffer: Box<[u8]>,
    id: u64,
    /// Requests whose replies nobody waits for.
    unawaited: BTreeSet<u64>,
    /// Set when the stream cannot be followed further.
    broken: bool,
    interrupt: Option<Interrupt>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("stream", &self.stream).field("broken", &self.broken).finish()
    }
}

impl Connection {
    pub(super) fn open(path: &Path) -> Result<Connection, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Self::over(stream))
    }

    pub(super) fn over(stream: UnixStream) -> Connection {
        Connection {
            stream,
            process: std::process::id(),
            frames: FrameReader::new(REPLY_BYTES_MAX),
            fds: Vec::new(),
            buffer: vec![0; RECEIVE_BYTES].into_boxed_slice(),
            id: 0,
            unawaited: BTreeSet::new(),
            broken: false,
            interrupt: None,
        }
    }

    pub(super) fn interrupt_with(&mut self, interrupt: Interrupt) {
        self.interrupt = Some(interrupt);
    }

    /// Whether this process, and no parent of it, opened the connection.
    pub(super) fn is_own(&self) -> bool {
        self.process == std::process::id()
    }

    /// Whether requests can be made still.
    pub(super) fn is_usable(&self) -> bool {
        self.is_own() && !self.broken
    }

    pub(super) fn process(&self) -> Option<i32> {
        peer::process(self.stream.as_fd()).ok().filter(|process| *process > 0)
    }

    /// Sends a request with descriptors, and gives its reply with the descriptors that came with it.
    pub(super) fn call<R: DeserializeOwned>(
        &mut self,
        method: &str,
        params: &impl Serialize,
        files: &[BorrowedFd<'_>],
        progress: Progress<'_>,
    ) -> Result<(R, Vec<OwnedFd>), ClientError> {
        if !self.is_own() {
            return Err(ClientError::Forked);
        }
        if self.broken {
            return Err(ClientError::Disconnected("an earlier request failed".to_owned()));
        }
        self.id += 1;
        let line = wire::request(self.id, method, params).map_err(protocol)?;
        self.broken = true;
        self.send(&line, files)?;
        let outcome = self.receive(progress)?;
        let fds = std::mem::take(&mut self.fds);
        self.broken = false;
        let result = outcome.map_err(refusal)?;
        let reply = serde_json::from_str(result.get()).map_err(protocol)?;
        Ok((reply, fds))
    }

    /// Sends a request whose reply, which has no descriptors, is dropped when it comes. Does not wait: a connection that
    /// takes nothing now is given up, and what it holds with it.
    pub(super) fn tell(&mut self, method: &str, params: &impl Serialize) {
        if !self.is_usable() {
            return;
        }
        self.id += 1;
        let mut poll = [PollFd::new(&self.stream, PollFlags::OUT)];
        let ready = matches!(rustix::event::poll(&mut poll, Some(&Timespec::default())), Ok(1));
        let sent =
            wire::request(self.id, method, params).is_ok_and(|line| ready && self.send(&line, &[]).is_ok());
        if sent {
            self.unawaited.insert(self.id);
        } else {
            self.broken = true;
            // Whoever goes first after a fork must not wait for the other to close it.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn send(&self, mut line: &[u8], mut files: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        while !line.is_empty() {
            match scm::send(&self.stream, line, files) {
                Ok(sent) => {
                    line = &line[sent..];
                    files = &[];
                }
                // A daemon that refuses a line before its end answers why, then closes: read that.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(ClientError::Disconnected(error.to_string())),
            }
        }
        Ok(())
    }

    fn receive(
        &mut self,
        progress: Progress<'_>,
    ) -> Result<Result<Box<RawValue>, wire::ErrorObject>, ClientError> {
        loop {
            match self.message()? {
                // Id null: the daemon could not read the request's id. There is only one request.
                Message::Reply { id: Id::Null, outcome: Err(error) } => return Ok(Err(error)),
                Message::Reply { id, outcome } if id == Id::Number(self.id.into()) => return Ok(outcome),
                Message::Reply { id: Id::Number(id), .. }
                    if id.as_u64().is_some_and(|id| self.unawaited.remove(&id)) => {}
                Message::Reply { .. } => return Err(protocol("a reply to another request")),
                Message::Notification { method, params: Some(params) } if method == JOB_PROGRESS => {
                    progress(&serde_json::from_str(params.get()).map_err(protocol)?);
                }
                // A later version may notify of more.
                Message::Notification { .. } => {}
            }
        }
    }

    fn message(&mut self) -> Result<Message, ClientError> {
        loop {
            if let Some(frame) = self.frames.next_frame().map_err(protocol)? {
                return wire::parse_message(frame).map_err(protocol);
            }
            self.readable()?;
            let received =
                scm::recv(&self.stream, &mut self.buffer, &mut self.fds, scm::FDS_MAX).map_err(|error| {
                    match scm::too_many_fds(&error) {
                        Some(error) => protocol(error),
                        None => ClientError::Disconnected(error.to_string()),
                    }
                })?;
            if received == 0 {
                return Err(ClientError::Disconnected("end of the stream".to_owned()));
            }
            self.frames.push(&self.buffer[..received]);
        }
    }

    /// Waits until there is something to receive, as long as nothing interrupts it.
    fn readable(&mut self) -> Result<(), ClientError> {
        let Some(interrupt) = &mut self.interrupt else { return Ok(()) };
        loop {
            let mut poll = [PollFd::new(&self.stream, PollFlags::IN)];
            match rustix::event::poll(&mut poll, Some(&ASK_INTERVAL)) {
                Ok(0) if interrupt() => return Err(ClientError::Interrupted),
                Ok(0) | Err(Errno::INTR) => {}
                // An error shows in the receive that follows.
                Ok(_) | Err(_) => return Ok(()),
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.is_own() {
            // A forked child may have the descriptor, too; what it inherited must not keep the leases.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn protocol(error: impl ToString) -> ClientError {
    ClientError::Protocol(error.to_string())
}
