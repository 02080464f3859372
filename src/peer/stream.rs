//! TLS over a TCP connection, with a deadline for everything.
//!
//! The socket does not block: what cannot be done at once waits in `poll` until it can, or until the deadline. So a peer that
//! sends a byte now and then gets no more time than one that sends none.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConnection};

use super::frame::{self, BODY_BYTES_MAX, PREFIX_BYTES};
use super::tls::{self, Credentials};
use super::{Error, Result};

/// Bytes taken from the socket at a time, once the other end is known. Before, nothing is read ahead.
const READ_BYTES: usize = 128 << 10;
/// Encrypted bytes that wait to be written.
const WRITE_BYTES: usize = 128 << 10;
/// Input that is thrown away, at most, so that the other end gets the last words.
const LINGER_BYTES: usize = 256 << 10;

/// A socket that two threads may hold, one of them to shut it down.
#[derive(Debug, Clone)]
pub(super) struct Socket(Arc<TcpStream>);

impl Socket {
    pub(super) fn new(socket: TcpStream) -> io::Result<Socket> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Socket(Arc::new(socket)))
    }

    /// Ends the connection: whoever waits for it wakes up.
    pub(super) fn shut_down(&self) {
        // Fails if the other end did it before.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Says that nothing more is written, and waits until the other end closes, as in [`Stream::end`].
    fn linger(&self, deadline: Instant) {
        if self.0.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let (mut scrap, mut left) = ([0; 4096], LINGER_BYTES);
        while left > 0 && self.wait(PollFlags::IN, deadline, "the end").is_ok() {
            match (&*self.0).read(&mut scrap) {
                Ok(read @ 1..) => left = left.saturating_sub(read),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => return,
            }
        }
    }

    /// Waits until the socket can be read from or written to.
    fn wait(&self, events: PollFlags, deadline: Instant, what: &'static str) -> Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout(what));
            }
            match rustix::event::poll(&mut [PollFd::new(&*self.0, events)], Some(&timespec(left))) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(Error::Disconnected(error.to_string())),
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(target)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    /// Without the signal that a closed connection would give: in a library the process is somebody else's.
    fn write_vectored(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(sendmsg(&*self.0, bytes, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// A connection whose other end is a peer.
#[derive(Debug)]
pub(super) struct Stream {
    tls: Connection,
    socket: Socket,
    input: BufReader<Socket>,
    /// What is written before it goes into the TLS library: small messages.
    output: Vec<u8>,
    /// The body that was read last.
    body: Vec<u8>,
}

impl Stream {
    /// The server's side of a handshake. Returns the identity of the other end, too.
    pub(super) fn accept(
        socket: Socket,
        credentials: &Credentials,
        deadline: Instant,
    ) -> Result<(Stream, String)> {
        let tls = ServerConnection::new(credentials.server()).map_err(|error| tls::failed(&error))?;
        Stream::shake_hands(tls.into(), socket, credentials, deadline)
    }

    /// The client's side of a handshake. Returns the identity of the other end, too.
    pub(super) fn connect(
        socket: Socket,
        name: ServerName<'static>,
        credentials: &Credentials,
        deadline: Instant,
    ) -> Result<(Stream, String)> {
        let tls = ClientConnection::new(credentials.client(), name).map_err(|error| tls::failed(&error))?;
        Stream::shake_hands(tls.into(), socket, credentials, deadline)
    }

    fn shake_hands(
        tls: Connection,
        socket: Socket,
        credentials: &Credentials,
        deadline: Instant,
    ) -> Result<(Stream, String)> {
        // The library bounds what it takes of a handshake; nothing is read ahead here.
        let input = BufReader::with_capacity(0, socket.clone());
        let mut stream = Stream { tls, socket, input, output: Vec::new(), body: Vec::new() };
        if let Err(error) = stream.handshake(deadline) {
            if matches!(error, Error::Handshake(_) | Error::Identity(_)) {
                // So that the other end gets the alert that says why.
                stream.socket.linger(deadline);
            }
            return Err(error);
        }
        let identity = credentials.identity(stream.tls.peer_certificates())?;
        stream.input = BufReader::with_capacity(READ_BYTES, stream.socket.clone());
        stream.tls.set_buffer_limit(Some(WRITE_BYTES));
        Ok((stream, identity))
    }

    fn handshake(&mut self, deadline: Instant) -> Result<()> {
        const WHAT: &str = "the TLS handshake";
        while self.tls.is_handshaking() {
            self.flush(deadline, WHAT)?;
            if self.tls.is_handshaking() {
                self.fill(deadline, WHAT)?;
            }
        }
        self.flush(deadline, WHAT)?;
        if self.tls.alpn_protocol() == Some(tls::ALPN) {
            return Ok(());
        }
        Err(Error::Handshake("the other end did not say that it speaks as peers do".to_owned()))
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Reads one frame and returns its body, which has at most `max` bytes.
    pub(super) fn frame(&mut self, max: usize, deadline: Instant, what: &'static str) -> Result<&[u8]> {
        let mut prefix = [0; PREFIX_BYTES];
        self.read_exact(&mut prefix, deadline, what)?;
        let length = frame::length(prefix, max.min(BODY_BYTES_MAX))?;
        let mut body = std::mem::take(&mut self.body);
        body.resize(length, 0);
        let read = self.read_exact(&mut body, deadline, what);
        self.body = body;
        read?;
        Ok(&self.body)
    }

    /// Fills `target`.
    pub(super) fn read_exact(
        &mut self,
        target: &mut [u8],
        deadline: Instant,
        what: &'static str,
    ) -> Result<()> {
        let mut filled = 0;
        while filled < target.len() {
            filled += self.read(&mut target[filled..], deadline, what)?;
        }
        Ok(())
    }

    /// Reads at least one byte into `target`, which is not empty.
    pub(super) fn read(&mut self, target: &mut [u8], deadline: Instant, what: &'static str) -> Result<usize> {
        loop {
            match self.tls.reader().read(target) {
                Ok(0) => return Err(Error::Disconnected("the other end has closed it".to_owned())),
                Ok(bytes) => return Ok(bytes),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.fill(deadline, what)?,
                Err(error) => return Err(Error::Disconnected(error.to_string())),
            }
        }
    }

    /// Writes what `message` appends. It may stay here until [`Stream::flush`].
    pub(super) fn write(
        &mut self,
        message: impl FnOnce(&mut Vec<u8>),
        deadline: Instant,
        what: &'static str,
    ) -> Result<()> {
        let mut output = std::mem::take(&mut self.output);
        message(&mut output);
        let written = self.write_all(&output, deadline, what);
        output.clear();
        self.output = output;
        written
    }

    /// Writes all of `bytes`. The last of them may stay here until [`Stream::flush`].
    pub(super) fn write_all(
        &mut self,
        mut bytes: &[u8],
        deadline: Instant,
        what: &'static str,
    ) -> Result<()> {
        while !bytes.is_empty() {
            let taken =
                self.tls.writer().write(bytes).map_err(|error| Error::Disconnected(error.to_string()))?;
            bytes = &bytes[taken..];
            if taken == 0 || !bytes.is_empty() {
                self.flush(deadline, what)?;
            }
        }
        Ok(())
    }

    /// Sends what was written.
    pub(super) fn flush(&mut self, deadline: Instant, what: &'static str) -> Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(0) => return Err(Error::Disconnected("nothing can be written".to_owned())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.socket.wait(PollFlags::OUT, deadline, what)?;
                }
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// Ends the connection so that the other end gets what was written: with unread input, closing would take that back.
    /// Waits until the other end closes, but no longer than until `deadline` and for no more than some input.
    pub(super) fn end(mut self, deadline: Instant) {
        self.tls.send_close_notify();
        if self.flush(deadline, "the end").is_ok() {
            self.socket.linger(deadline);
        }
    }

    /// Takes something from the socket.
    fn fill(&mut self, deadline: Instant, what: &'static str) -> Result<()> {
        loop {
            if Instant::now() >= deadline {
                return Err(Error::Timeout(what));
            }
            match self.tls.read_tls(&mut self.input) {
                Ok(0) => return Err(Error::Disconnected("the other end has closed it".to_owned())),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.socket.wait(PollFlags::IN, deadline, what)?;
                }
                Err(error) => return Err(Error::Disconnected(error.to_string())),
            }
        }
        match self.tls.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => {
                // The alert that says why, if it goes without waiting.
                let _ = self.tls.write_tls(&mut self.socket);
                Err(tls::failed(&error))
            }
        }
    }

    /// Why nothing can be written: what the other end said before it closed, if it did.
    fn broken(&mut self, error: io::Error) -> Error {
        while let Ok(1..) = self.tls.read_tls(&mut self.input) {
            if let Err(error) = self.tls.process_new_packets() {
                return tls::failed(&error);
            }
        }
        Error::Disconnected(error.to_string())
    }
}
