//! Asks a peer for an artifact.
//!
//! Everything has a deadline, and nothing is allocated by what the other end says: a chunk goes into memory of the caller, and
//! must have the length and the checksum that the manifest gives it. A session that failed in another way than by a refusal is
//! of no use any more.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use sha2::{Digest as _, Sha256};

use super::frame::{BODY_BYTES_MAX, Malformed};
use super::protocol::{CHUNKS_PER_REQUEST_MAX, Digest, Have, Hello, Rank, Reply, Request, VERSION};
use super::stream::{Socket, Stream};
use super::tls::Credentials;
use super::{Error, Result};
use crate::catalog::manifest::{self, CHUNK_BYTES, Manifest};
use crate::checksum::Running;
use crate::config::{Config, Limits};

/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;
/// Bytes of a manifest for which there is one `peer.chunk_timeout_ms` each.
const MANIFEST_STEP_BYTES: u64 = 1 << 20;

/// Connects to peers.
#[derive(Debug, Clone)]
pub struct Dialer {
    node: String,
    credentials: Arc<Credentials>,
    limits: Limits,
    handshake: Duration,
    chunk: Duration,
    window: u16,
}

impl Dialer {
    /// With the limits of `[peer]`, and those of `[limits]` for manifests.
    pub fn new(config: &Config, credentials: Arc<Credentials>) -> Dialer {
        Dialer {
            node: config.node.clone(),
            credentials,
            limits: config.limits.clone(),
            handshake: Duration::from_millis(config.peer.handshake_timeout_ms),
            chunk: Duration::from_millis(config.peer.chunk_timeout_ms),
            window: u16::try_from(config.peer.window).unwrap_or(u16::MAX),
        }
    }

    /// Connects to `host:port`, the first address of that name that takes a connection, and makes sure that it is a peer.
    ///
    /// Blocks for at most `peer.handshake_timeout_ms`, after the system has looked up the name.
    ///
    /// # Errors
    /// `peer.connect`, `peer.timeout`, `peer.disconnected`; `peer.tls.handshake` and `peer.identity.refused`, whichever
    /// side it was that refused; `peer.busy`, `peer.version`, `peer.protocol`.
    pub fn connect(&self, address: &str) -> Result<Session> {
        let failed = |source| Error::Connect { address: address.to_owned(), source };
        let addresses: Vec<SocketAddr> =
            address.to_socket_addrs().map_err(failed)?.take(ADDRESSES_MAX).collect();
        let deadline = Instant::now() + self.handshake;
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses {
            // A timeout of zero is an error of its own.
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&address, left).and_then(Socket::new) {
                Ok(socket) => return self.greet(socket, address, deadline),
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    fn greet(&self, socket: Socket, address: SocketAddr, deadline: Instant) -> Result<Session> {
        // Whom the certificate is for decides, not the address: the name is not sent and not compared.
        let name = ServerName::from(address.ip());
        let (mut stream, identity) = Stream::connect(socket, name, &self.credentials, deadline)?;
        const WHAT: &str = "the hello";
        let own = Hello { version: VERSION, window: self.window, node: self.node.clone() };
        stream.write(|out| own.write(out), deadline, WHAT)?;
        stream.flush(deadline, WHAT)?;
        let body = stream.frame(BODY_BYTES_MAX, deadline, WHAT)?;
        let hello = match Hello::read(body) {
            Ok(hello) if hello.version == VERSION => hello,
            Ok(hello) => return Err(Error::Version(hello.version)),
            Err(error) => match Reply::read(body) {
                Ok(Reply::Refused(refusal)) => return Err(refusal.into()),
                _ => return Err(error.into()),
            },
        };
        Ok(Session {
            stream,
            identity,
            node: hello.node,
            address,
            window: usize::from(self.window.min(hello.window)),
            limits: self.limits.clone(),
            timeout: self.chunk,
            opened: BTreeMap::new(),
            asked: VecDeque::new(),
            broken: false,
        })
    }
}

/// An artifact that a session has open; of use for that session only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handle(u32);

/// A chunk that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Of which artifact.
    pub handle: Handle,
    /// Number of the file.
    pub file: u32,
    /// Number of the chunk in its file.
    pub chunk: u32,
    /// Its length.
    pub bytes: usize,
}

/// A request for chunks that is not answered yet, or only in part.
#[derive(Debug)]
struct Pending {
    handle: Handle,
    file: u32,
    next: u32,
    end: u32,
}

/// Ends a session from another thread.
#[derive(Debug, Clone)]
pub struct Breaker(Socket);

impl Breaker {
    /// Ends the session: whoever waits in it gets `peer.disconnected` at once.
    pub fn break_off(&self) {
        self.0.shut_down();
    }
}

/// A connection to a peer.
#[derive(Debug)]
pub struct Session {
    stream: Stream,
    identity: String,
    node: String,
    address: SocketAddr,
    window: usize,
    limits: Limits,
    timeout: Duration,
    opened: BTreeMap<u32, Arc<Manifest>>,
    asked: VecDeque<Pending>,
    broken: bool,
}

impl Session {
    /// Which of `peer.identities` the peer has shown to be.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// What the peer calls its node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Where the peer is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What another thread ends this session with.
    pub fn breaker(&self) -> Breaker {
        Breaker(self.stream.socket().clone())
    }

    /// Requests for chunks that may be in flight: what both sides allow.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Requests for chunks that are not answered.
    pub fn in_flight(&self) -> usize {
        self.asked.len()
    }

    /// What the peer has of an artifact.
    ///
    /// # Errors
    /// Those of the connection: `peer.timeout`, `peer.disconnected`, `peer.protocol`; `internal` while chunks are in flight.
    pub fn have(&mut self, digest: &Digest) -> Result<Have> {
        self.ask(&Request::Have(*digest))?;
        self.answer(|reply| match reply {
            Reply::Have(have) => Some(have),
            _ => None,
        })
    }

    /// The manifest of an artifact, which has that digest and is within the limits. It takes at most
    /// `peer.chunk_timeout_ms` for each MiB begun.
    ///
    /// # Errors
    /// `peer.not_found`; `peer.manifest.mismatch` if it is another one or none; those of the connection.
    pub fn manifest(&mut self, digest: &Digest) -> Result<Manifest> {
        self.ask(&Request::Manifest(*digest))?;
        let length = self.answer(|reply| match reply {
            Reply::Manifest { bytes } => Some(bytes),
            _ => None,
        })?;
        if length == 0 || length > manifest::BYTES_MAX {
            self.broken = true;
            return Err(Malformed::Field("length of a manifest").into());
        }
        let steps = u32::try_from(length.div_ceil(MANIFEST_STEP_BYTES)).unwrap_or(u32::MAX);
        let deadline = Instant::now() + self.timeout.saturating_mul(steps);
        let read = self.manifest_bytes(length, deadline);
        self.broken |= read.is_err();
        let bytes = read?;
        if Sha256::digest(&bytes).as_slice() != digest.0 {
            self.broken = true;
            return Err(Error::Digest(*digest));
        }
        Ok(Manifest::parse(&bytes, &self.limits)?)
    }

    fn manifest_bytes(&mut self, length: u64, deadline: Instant) -> Result<Vec<u8>> {
        // It grows with what has come, not with what was said.
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < length {
            let deadline = deadline.min(Instant::now() + self.timeout);
            match Reply::read(self.stream.frame(BODY_BYTES_MAX, deadline, "a manifest")?)? {
                Reply::ManifestPart(part) if part.len() as u64 <= length - bytes.len() as u64 => {
                    bytes.extend(part)
                }
                _ => return Err(Malformed::Unexpected.into()),
            }
        }
        Ok(bytes)
    }

    /// Opens an artifact for [`Session::request`]. `rank` is this node's own place among those that load it: a peer that
    /// is still loading lets only those wait that come after it.
    ///
    /// # Errors
    /// `peer.not_found`, `peer.too_many`; those of the connection.
    pub fn open(&mut self, manifest: &Arc<Manifest>, rank: Rank) -> Result<Handle> {
        let digest = Digest::parse(manifest.digest()).ok_or(Error::Misused("a manifest without a digest"))?;
        self.ask(&Request::Open { digest, rank })?;
        let handle = self.answer(|reply| match reply {
            Reply::Opened { handle } => Some(handle),
            _ => None,
        })?;
        if self.opened.contains_key(&handle) {
            self.broken = true;
            return Err(Malformed::Field("handle").into());
        }
        self.opened.insert(handle, Arc::clone(manifest));
        Ok(Handle(handle))
    }

    /// Gives a handle back.
    ///
    /// # Errors
    /// Those of the connection; `internal` for a handle that is not open.
    pub fn close(&mut self, handle: Handle) -> Result<()> {
        if !self.opened.contains_key(&handle.0) {
            return Err(Error::Misused("a handle that is not open"));
        }
        self.ask(&Request::Close { handle: handle.0 })?;
        self.opened.remove(&handle.0);
        self.answer(|reply| matches!(reply, Reply::Closed).then_some(()))
    }

    /// Asks for `count` chunks of a file from `chunk` on. They come by [`Session::receive`], in the order in which they were
    /// asked for.
    ///
    /// # Errors
    /// Those of the connection; `internal` if [`Session::window`] requests are in flight, or for chunks that the manifest does
    /// not have.
    pub fn request(&mut self, handle: Handle, file: u32, chunk: u32, count: u16) -> Result<()> {
        self.usable()?;
        let manifest = self.opened.get(&handle.0).ok_or(Error::Misused("a handle that is not open"))?;
        let chunks = manifest.chunks().get(file as usize).map_or(0, Vec::len);
        let end = chunk.checked_add(u32::from(count)).filter(|end| *end as usize <= chunks);
        let end = end.ok_or(Error::Misused("chunks that the manifest does not have"))?;
        if !(1..=CHUNKS_PER_REQUEST_MAX).contains(&count) || self.asked.len() >= self.window {
            return Err(Error::Misused("more chunks, or more requests, than may be in flight"));
        }
        self.send(&Request::Chunk { handle: handle.0, file, chunk, count })?;
        self.asked.push_back(Pending { handle, file, next: chunk, end });
        Ok(())
    }

    /// The chunk that [`Session::receive`] gives next.
    pub fn upcoming(&self) -> Option<Asked> {
        let pending = self.asked.front()?;
        let manifest = self.opened.get(&pending.handle.0)?;
        let file = manifest.description().files.get(pending.file as usize)?;
        let rest = file.bytes.checked_sub(u64::from(pending.next) * CHUNK_BYTES)?;
        let bytes = usize::try_from(rest.min(CHUNK_BYTES)).ok()?;
        Some(Asked { handle: pending.handle, file: pending.file, chunk: pending.next, bytes })
    }

    /// Receives the next chunk into the front of `target`, and checks it against the manifest.
    ///
    /// # Errors
    /// A refusal (`peer.not_yet`, `peer.not_found`, `peer.gone`, …) ends the request that the chunk belongs to; the session
    /// goes on. `peer.chunk.mismatch` if the bytes are wrong: what is in `target` then does not count, and the session ends.
    /// Those of the connection; `internal` if nothing was asked for, or if `target` is too short.
    pub fn receive(&mut self, target: &mut [u8]) -> Result<Asked> {
        self.usable()?;
        let asked = self.upcoming().ok_or(Error::Misused("nothing was asked for"))?;
        let target = target.get_mut(..asked.bytes).ok_or(Error::Misused("a target that is too short"))?;
        let received = self.chunk(&asked, target);
        match &received {
            Err(Error::Refused(_)) => drop(self.asked.pop_front()),
            Err(_) => self.broken = true,
            Ok(()) => {
                if let Some(pending) = self.asked.front_mut() {
                    pending.next += 1;
                }
                self.asked.pop_front_if(|pending| pending.next == pending.end);
            }
        }
        received.map(|()| asked)
    }

    fn chunk(&mut self, asked: &Asked, target: &mut [u8]) -> Result<()> {
        const WHAT: &str = "a chunk";
        let deadline = Instant::now() + self.timeout;
        let wrong = Error::Chunk { file: asked.file, chunk: asked.chunk };
        match Reply::read(self.stream.frame(BODY_BYTES_MAX, deadline, WHAT)?)? {
            Reply::Chunk { bytes } if bytes as usize == target.len() => {}
            Reply::Chunk { .. } => return Err(wrong),
            Reply::Refused(refusal) => return Err(refusal.into()),
            _ => return Err(Malformed::Unexpected.into()),
        }
        // While the bytes are still in the cache.
        let (mut sum, mut filled) = (Running::new(), 0);
        while filled < target.len() {
            let read = self.stream.read(&mut target[filled..], deadline, WHAT)?;
            sum.update(&target[filled..filled + read]);
            filled += read;
        }
        let manifest = self.opened.get(&asked.handle.0);
        let expected = manifest
            .and_then(|manifest| manifest.chunks().get(asked.file as usize)?.get(asked.chunk as usize));
        if expected == Some(&sum.finish()) { Ok(()) } else { Err(wrong) }
    }

    fn usable(&self) -> Result<()> {
        if self.broken {
            return Err(Error::Disconnected("it has failed before".to_owned()));
        }
        Ok(())
    }

    /// Sends a request whose answer is the next.
    fn ask(&mut self, request: &Request) -> Result<()> {
        self.usable()?;
        if !self.asked.is_empty() {
            return Err(Error::Misused("chunks are in flight"));
        }
        self.send(request)
    }

    fn send(&mut self, request: &Request) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        let sent = self.stream.write(|out| request.write(out), deadline, "a request");
        let sent = sent.and_then(|()| self.stream.flush(deadline, "a request"));
        self.broken |= sent.is_err();
        sent
    }

    /// The answer to a request that [`Session::ask`] sent, if it is what `expected` looks for.
    fn answer<T>(&mut self, expected: impl FnOnce(Reply<'_>) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + self.timeout;
        let answered = self.stream.frame(BODY_BYTES_MAX, deadline, "a reply").and_then(|body| {
            match Reply::read(body)? {
                Reply::Refused(refusal) => Err(refusal.into()),
                reply => expected(reply).ok_or(Malformed::Unexpected.into()),
            }
        });
        self.broken |= !matches!(answered, Ok(_) | Err(Error::Refused(_)));
        answered
    }
}
