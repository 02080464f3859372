//! Peers: daemons of other nodes, from which artifacts are taken and to which they are given.
//!
//! What is served is content by digest, over TCP with mutual TLS ([`tls`]); nothing is parsed before the handshake has shown
//! who the other end is. [`offer`] is what this node has to give, [`server`] gives it, and [`client`] asks others for theirs and
//! checks each chunk against the manifest before it counts (invariant 6). [`protocol`] and [`frame`] are the form of what is
//! said. Threads here block: one for each connection, bounded by the limits of `[peer]`. Who is asked for what, and where
//! what arrives is put, is decided elsewhere.

pub mod client;
pub mod directory;
pub mod fetch;
pub mod frame;
pub mod offer;
pub mod offered;
pub mod protocol;
pub mod server;
mod stream;
pub mod tls;

use std::io;
use std::path::PathBuf;

use crate::catalog::manifest;
use crate::error::Code;

use frame::Malformed;
use protocol::{Digest, Refusal};

/// What goes wrong between peers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate, key or list of authorities cannot be used.
    #[error("{} cannot be used for peers: {reason}", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The address for peers cannot be had, or its threads cannot.
    #[error("peers cannot be served on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// No connection.
    #[error("the peer {address} cannot be reached: {source}")]
    Connect {
        /// The address.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// TLS failed, as a rule in the handshake: no TLS, or a certificate that one side does not trust.
    #[error("TLS with the peer failed: {0}")]
    Handshake(String),
    /// A certificate that is good, of somebody who is no peer.
    #[error("{0}")]
    Identity(String),
    /// Something took longer than it may.
    #[error("{0} took longer than it may")]
    Timeout(&'static str),
    /// The connection has ended.
    #[error("the connection to the peer has ended: {0}")]
    Disconnected(String),
    /// The other end does not keep to the protocol.
    #[error("the peer does not keep to the protocol: {0}")]
    Protocol(#[from] Malformed),
    /// The other end speaks another version.
    #[error("the peer speaks version {0} of the protocol, this daemon version {version}", version = protocol::VERSION)]
    Version(u16),
    /// The other end says no.
    #[error("the peer refuses: {0}")]
    Refused(#[from] Refusal),
    /// What was sent for a manifest is none.
    #[error("the peer sent a bad manifest: {0}")]
    Manifest(#[from] manifest::Error),
    /// What was sent for a manifest has another digest.
    #[error("the peer sent a manifest that is not that of {0}")]
    Digest(Digest),
    /// A chunk has another checksum than the manifest says, or another length.
    #[error("the peer sent wrong bytes for chunk {chunk} of file {file}")]
    Chunk {
        /// Number of the file.
        file: u32,
        /// Number of the chunk.
        chunk: u32,
    },
    /// This daemon used a session against its order.
    #[error("a session with a peer was misused: {0}")]
    Misused(&'static str),
    /// There is no memory for what comes.
    #[error("there is no memory for what comes from a peer: {0}")]
    Memory(io::Error),
    /// An offer whose parts do not fit together.
    #[error("an artifact cannot be offered to peers: {0}")]
    Offer(io::Error),
}

impl Error {
    /// The code of this error.
    pub fn code(&self) -> Code {
        match self {
            Error::Credentials { .. } => Code::PeerTlsCredentials,
            Error::Listen { .. } => Code::PeerListen,
            Error::Connect { .. } => Code::PeerConnect,
            Error::Handshake(_) => Code::PeerTlsHandshake,
            Error::Identity(_) => Code::PeerIdentityRefused,
            Error::Timeout(_) => Code::PeerTimeout,
            Error::Disconnected(_) => Code::PeerDisconnected,
            Error::Protocol(_) => Code::PeerProtocol,
            Error::Version(_) => Code::PeerVersion,
            Error::Refused(Refusal::NotFound) => Code::PeerNotFound,
            Error::Refused(Refusal::NotYet) => Code::PeerNotYet,
            Error::Refused(Refusal::Gone) => Code::PeerGone,
            Error::Refused(Refusal::Busy) => Code::PeerBusy,
            Error::Refused(Refusal::TooMany) => Code::PeerTooMany,
            Error::Refused(Refusal::BadRequest) => Code::PeerBadRequest,
            Error::Manifest(_) | Error::Digest(_) => Code::PeerManifestMismatch,
            Error::Chunk { .. } => Code::PeerChunkMismatch,
            Error::Memory(_) => Code::TierHostOutOfMemory,
            Error::Misused(_) | Error::Offer(_) => Code::Internal,
        }
    }
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        crate::Error::new(error.code(), error.to_string())
    }
}

/// The error for what no peer has, as far as this node knows of any.
pub fn nobody() -> crate::Error {
    let message = "no peer that this node knows of has it: see peer.peers, or load it on one of them first";
    crate::Error::new(Code::PeerNobody, message)
}

/// Result of what peers do.
pub type Result<T> = std::result::Result<T, Error>;

/// The lock, also of a thread that panicked: what it guards is changed in single steps.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
