//! Gives peers what this node offers.
//!
//! One thread accepts, and each connection has one. What a connection costs before its other end has shown who it is, is bounded
//! in number (`peer.unauthenticated_max`), in time (`peer.handshake_timeout_ms`) and in memory
//! ([`UNAUTHENTICATED_BYTES_MAX`]); afterwards `peer.connections_max`, `peer.idle_timeout_ms` and `peer.chunk_timeout_ms` hold.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::offer::{Offers, Opened};
use super::protocol::{
    CHUNKS_PER_REQUEST_MAX, Digest, HANDLES_MAX, Have, Hello, MANIFEST_PART_BYTES, REQUEST_BYTES_MAX, Rank,
    Refusal, Reply, Request, State, VERSION,
};
use super::stream::{Socket, Stream};
use super::tls::Credentials;
use super::{Error, Result, lock};
use crate::config::{Config, Peer};
use crate::error::Code;

/// Stack of a connection's thread, bytes.
const STACK_BYTES: usize = 256 << 10;
/// The most memory that a connection takes before its other end has shown who it is, bytes: the stack, a handshake of
/// 64 KiB (the TLS library's limit), read and parsed, and what is answered to it. The kernel's buffers of the socket come on top.
pub const UNAUTHENTICATED_BYTES_MAX: usize = 768 << 10;
/// How long to wait after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What the server counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections of peers, open now.
    pub connections: AtomicU64,
    /// Connections whose other end has not shown who it is, open now.
    pub unauthenticated: AtomicU64,
    /// Connections that were closed because there were too many.
    pub refused: AtomicU64,
    /// Connections whose handshake failed: for time, for TLS, for their certificate or its names.
    pub handshakes_failed: AtomicU64,
    /// Connections that were ended because their other end did not keep to the protocol.
    pub malformed: AtomicU64,
    /// Chunks that were sent.
    pub chunks: AtomicU64,
    /// Bytes of chunks that were sent.
    pub bytes: AtomicU64,
}

/// Serves peers until it is dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listener: Arc<TcpListener>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    node: String,
    config: Peer,
    credentials: Arc<Credentials>,
    offers: Arc<Offers>,
    counters: Arc<Counters>,
    stopping: AtomicBool,
    connections: Mutex<Connections>,
    /// A connection has ended, or the server stops.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    open: BTreeMap<u64, Socket>,
    unauthenticated: u32,
    authenticated: u32,
}

impl Server {
    /// Listens on `peer.listen` and serves `offers` there.
    ///
    /// # Errors
    /// `peer.listen` if the address cannot be had.
    pub fn start(
        config: &Config,
        credentials: Arc<Credentials>,
        offers: Arc<Offers>,
        counters: Arc<Counters>,
    ) -> Result<Server> {
        let named =
            config.peer.listen.map_or_else(|| "peer.listen".to_owned(), |address| address.to_string());
        let failed = |source| Error::Listen { address: named.clone(), source };
        let address = config.peer.listen.ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?;
        let listener = Arc::new(TcpListener::bind(address).map_err(failed)?);
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared {
            node: config.node.clone(),
            config: config.peer.clone(),
            credentials,
            offers,
            counters,
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
            changed: Condvar::new(),
        });
        let (accept, accepted) = (Arc::clone(&listener), Arc::clone(&shared));
        let thread = Builder::new().name("peer-accept".to_owned()).stack_size(STACK_BYTES);
        let accepting = thread.spawn(move || accepted.accept(&accept)).map_err(failed)?;
        Ok(Server { shared, listener, address, accepting: Some(accepting) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    /// Ends every connection, and waits until their threads are done with what is offered.
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // On Linux this ends an accept that waits.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        // Or else it may be about to wait, having looked at `stopping` before.
        drop(lock(&self.shared.connections));
        self.shared.changed.notify_all();
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let mut connections = lock(&self.shared.connections);
        connections.open.values().for_each(Socket::shut_down);
        self.shared.offers.wake();
        while !connections.open.is_empty() {
            connections = self.shared.changed.wait(connections).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn accept(self: Arc<Self>, listener: &TcpListener) {
        loop {
            let accepted = listener.accept();
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let started = accepted.and_then(|(socket, address)| {
                let socket = Socket::new(socket)?;
                let Some(place) = self.place(&socket) else { return Ok(()) };
                let thread = Builder::new().name("peer".to_owned()).stack_size(STACK_BYTES);
                // If there is no thread, the place and the socket are given back with the closure.
                thread.spawn(move || place.serve(socket, address)).map(drop)
            });
            if let Err(error) = started {
                tracing::warn!(
                    code = Code::PeerListen.as_str(),
                    "a peer's connection could not be taken: {error}"
                );
                let connections = lock(&self.connections);
                if !self.stopping.load(Ordering::SeqCst) {
                    drop(self.changed.wait_timeout(connections, ACCEPT_PAUSE));
                }
            }
        }
    }

    /// A place for a new connection, if there is one.
    fn place(self: &Arc<Self>, socket: &Socket) -> Option<Place> {
        let mut connections = lock(&self.connections);
        if connections.unauthenticated >= self.config.unauthenticated_max {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        connections.unauthenticated += 1;
        self.counters.unauthenticated.fetch_add(1, Ordering::Relaxed);
        let number = connections.next;
        connections.next += 1;
        connections.open.insert(number, socket.clone());
        Some(Place { shared: Arc::clone(self), number, authenticated: false })
    }
}

/// A connection's place among those that may be. Given back when it is dropped.
#[derive(Debug)]
struct Place {
    shared: Arc<Shared>,
    number: u64,
    authenticated: bool,
}

impl Place {
    /// Serves the connection to its end.
    fn serve(mut self, socket: Socket, address: SocketAddr) {
        let handshake = Duration::from_millis(self.shared.config.handshake_timeout_ms);
        let deadline = Instant::now() + handshake;
        let counters = &self.shared.counters;
        let (stream, identity) = match Stream::accept(socket, &self.shared.credentials, deadline) {
            Ok(accepted) => accepted,
            Err(error) => {
                counters.handshakes_failed.fetch_add(1, Ordering::Relaxed);
                return tracing::debug!(code = error.code().as_str(), "{address}: {error}");
            }
        };
        let admitted = self.admit();
        let shared = Arc::clone(&self.shared);
        let mut connection = Connection { shared: &shared, stream, handles: BTreeMap::new(), next_handle: 0 };
        let ended = connection.greet(admitted, deadline).and_then(|()| connection.answer());
        if let Err(error) = &ended {
            tracing::debug!(code = error.code().as_str(), "{identity} at {address}: {error}");
        }
        if let Err(Error::Protocol(_)) = ended {
            shared.counters.malformed.fetch_add(1, Ordering::Relaxed);
            let deadline = Instant::now() + handshake;
            let told = connection.refuse(Refusal::BadRequest, deadline);
            if told.is_ok() {
                connection.stream.end(deadline);
            }
        }
    }

    /// Counts the connection as a peer's. False if there are as many as there may be.
    fn admit(&mut self) -> bool {
        let mut connections = lock(&self.shared.connections);
        if connections.authenticated >= self.shared.config.connections_max {
            self.shared.counters.refused.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        connections.unauthenticated -= 1;
        connections.authenticated += 1;
        self.shared.counters.unauthenticated.fetch_sub(1, Ordering::Relaxed);
        self.shared.counters.connections.fetch_add(1, Ordering::Relaxed);
        self.authenticated = true;
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = lock(&self.shared.connections);
        connections.open.remove(&self.number);
        if self.authenticated {
            connections.authenticated -= 1;
            self.shared.counters.connections.fetch_sub(1, Ordering::Relaxed);
        } else {
            connections.unauthenticated -= 1;
            self.shared.counters.unauthenticated.fetch_sub(1, Ordering::Relaxed);
        }
        self.shared.changed.notify_all();
    }
}

/// A connection of a peer.
struct Connection<'a> {
    shared: &'a Shared,
    stream: Stream,
    /// What it has open. A number is not given twice.
    handles: BTreeMap<u32, Opened>,
    next_handle: u32,
}

impl Connection<'_> {
    /// Exchanges hellos.
    fn greet(&mut self, admitted: bool, deadline: Instant) -> Result<()> {
        const WHAT: &str = "the hello";
        let hello = Hello::read(self.stream.frame(REQUEST_BYTES_MAX, deadline, WHAT)?)?;
        if !admitted {
            self.refuse(Refusal::Busy, deadline)?;
            return Err(Refusal::Busy.into());
        }
        let window = u16::try_from(self.shared.config.window).unwrap_or(u16::MAX);
        let own = Hello { version: VERSION, window, node: self.shared.node.clone() };
        self.stream.write(|out| own.write(out), deadline, WHAT)?;
        self.stream.flush(deadline, WHAT)?;
        if hello.version == VERSION { Ok(()) } else { Err(Error::Version(hello.version)) }
    }

    /// Answers requests in order, until there are no more.
    fn answer(&mut self) -> Result<()> {
        loop {
            let idle = Instant::now() + Duration::from_millis(self.shared.config.idle_timeout_ms);
            let body = self.stream.frame(REQUEST_BYTES_MAX, idle, "waiting for a request")?;
            let request = Request::read(body)?;
            let deadline = self.deadline();
            match request {
                Request::Have(digest) => self.reply(&Reply::Have(self.have(&digest)), deadline)?,
                Request::Manifest(digest) => self.manifest(&digest)?,
                Request::Open { digest, rank } => match self.open(&digest, rank) {
                    Ok(handle) => self.reply(&Reply::Opened { handle }, deadline)?,
                    Err(refusal) => self.refuse(refusal, deadline)?,
                },
                Request::Chunk { handle, file, chunk, count } => self.chunks(handle, file, chunk, count)?,
                Request::Close { handle } => match self.handles.remove(&handle) {
                    Some(_) => self.reply(&Reply::Closed, deadline)?,
                    None => self.refuse(Refusal::BadRequest, deadline)?,
                },
            }
        }
    }

    /// When an answer that begins now must have been taken.
    fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.shared.config.chunk_timeout_ms)
    }

    fn reply(&mut self, reply: &Reply<'_>, deadline: Instant) -> Result<()> {
        self.stream.write(|out| reply.write(out), deadline, "a reply")?;
        self.stream.flush(deadline, "a reply")
    }

    fn refuse(&mut self, refusal: Refusal, deadline: Instant) -> Result<()> {
        self.reply(&Reply::Refused(refusal), deadline)
    }

    fn have(&self, digest: &Digest) -> Have {
        let nothing =
            Have { state: State::None, chunks_ready: 0, chunks_total: 0, rank: Rank::default(), serving: 0 };
        self.shared.offers.get(digest).map_or(nothing, |offer| offer.have())
    }

    fn manifest(&mut self, digest: &Digest) -> Result<()> {
        let deadline = self.deadline();
        let Some(offer) = self.shared.offers.get(digest) else {
            return self.refuse(Refusal::NotFound, deadline);
        };
        let bytes = offer.manifest().len() as u64;
        self.stream.write(|out| Reply::Manifest { bytes }.write(out), deadline, "a manifest")?;
        for part in offer.manifest().chunks(MANIFEST_PART_BYTES) {
            let deadline = self.deadline();
            self.stream.write(|out| Reply::ManifestPart(part).write(out), deadline, "a manifest")?;
        }
        self.stream.flush(self.deadline(), "a manifest")
    }

    fn open(&mut self, digest: &Digest, rank: Rank) -> std::result::Result<u32, Refusal> {
        let offer = self.shared.offers.get(digest).ok_or(Refusal::NotFound)?;
        if self.handles.len() >= HANDLES_MAX {
            return Err(Refusal::TooMany);
        }
        let handle = self.next_handle;
        self.next_handle = handle.checked_add(1).ok_or(Refusal::TooMany)?;
        self.handles.insert(handle, offer.open(rank));
        Ok(handle)
    }

    /// Sends `count` chunks from `first` on, until one is refused.
    fn chunks(&mut self, handle: u32, file: u32, first: u32, count: u16) -> Result<()> {
        let range =
            first.checked_add(u32::from(count)).map(|end| first..end).filter(|range| !range.is_empty());
        let (Some(opened), Some(range)) = (self.handles.get(&handle), range) else {
            return self.refuse(Refusal::BadRequest, self.deadline());
        };
        if count > CHUNKS_PER_REQUEST_MAX {
            return self.refuse(Refusal::TooMany, self.deadline());
        }
        let timeout = Duration::from_millis(self.shared.config.chunk_timeout_ms);
        const WHAT: &str = "sending a chunk";
        for chunk in range {
            // Half of the time, so that the other end hears of it before its own time is up.
            let taken = opened.chunk(file, chunk, Instant::now() + timeout / 2, &self.shared.stopping);
            let deadline = Instant::now() + timeout;
            let sent = taken.map(|taken| {
                // A chunk has at most CHUNK_BYTES.
                let bytes = taken.bytes().len() as u32;
                self.stream.write(|out| Reply::Chunk { bytes }.write(out), deadline, WHAT)?;
                self.stream.write_all(taken.bytes(), deadline, WHAT)?;
                self.stream.flush(deadline, WHAT)?;
                Ok::<_, Error>(bytes)
            });
            let bytes = match sent {
                Ok(sent) => sent?,
                Err(refusal) => return self.refuse(refusal, deadline),
            };
            self.shared.counters.chunks.fetch_add(1, Ordering::Relaxed);
            self.shared.counters.bytes.fetch_add(u64::from(bytes), Ordering::Relaxed);
        }
        Ok(())
    }
}
