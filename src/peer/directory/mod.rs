//! The directory: who may have which artifact, at which address, and how far they are with it.
//!
//! It is for choosing whom to ask. It is not for deciding what is true: a holder is asked over an authenticated session, its bytes are
//! checked against the manifest of the digest, and one that turns out not to have it costs a question. So the directory may be old,
//! incomplete or wrong, and whoever writes to it can at most make nodes ask in vain.
//!
//! There are two backends. The list knows nothing by itself: each peer that was configured is a candidate for every artifact. etcd is
//! read into memory by a thread of its own and kept up to date from there ([`docs/decisions/0013-directory.md`] says why), so that
//! nobody who asks ever waits for the network, and so that the last known state goes on being used while etcd is away.
//!
//! [`docs/decisions/0013-directory.md`]: ../../../../docs/decisions/0013-directory.md

mod address;
mod entry;
mod etcd;
mod table;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

pub use address::Address;

use crate::config;
use crate::error::Code;

/// How much of an artifact a node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A part of it, and more is coming.
    Loading,
    /// All of it.
    Complete,
}

/// Where a node has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// In the memory of a GPU.
    Gpu,
    /// In host memory.
    Host,
    /// On a drive.
    Nvme,
}

/// What a node has of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// How much.
    pub state: State,
    /// Where.
    pub tier: Tier,
    /// Chunks that it has and has verified. Of others it is some seconds old: they are asked for what they have now.
    pub chunks: u64,
    /// The order in which nodes may wait for each other: only on one whose rank is lower. What a node loads has one rank from begin to end.
    pub rank: u64,
}

/// Somebody who may have an artifact. Never this node itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The name of the node, if the backend knows it.
    pub node: Option<String>,
    /// Where to ask.
    pub address: Address,
    /// What it said that it has. `None`: nothing is known, it must be asked.
    pub holding: Option<Holding>,
    /// `None`: up to date. Else etcd was lost this long ago, and this is how it was then.
    pub age: Option<Duration>,
}

/// How the directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// `static` or `etcd`.
    pub backend: &'static str,
    /// Whether what is known is up to date.
    pub connected: bool,
    /// Since when that is so.
    pub since: SystemTime,
    /// Entries of others that are known; peers of the list.
    pub entries: usize,
    /// Artifacts that this node announces.
    pub announced: usize,
    /// Keys and values that were read since the start and not taken in: malformed, of another version, or past a limit.
    pub refused: u64,
    /// Why the connection was last lost or not made, also when there is one again.
    pub last_error: Option<Code>,
}

/// Why something cannot be looked up or made known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address that cannot be connected to.
    #[error(
        "`{0}` is not the address of a peer: a host name, an IPv4 address or an [IPv6 address], a colon, and a port"
    )]
    BadAddress(String),
    /// Not the digest of a manifest.
    #[error("`{0}` is not a digest: sha256: and 64 hexadecimal digits")]
    BadDigest(String),
    /// More than are announced.
    #[error("more than {limit} artifacts of this node cannot be announced")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The password or a certificate cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The thread cannot be started.
    #[error("the directory cannot be started: {0}")]
    Start(std::io::Error),
    /// No connection, or it was lost. With the chain of causes.
    #[error("etcd cannot be reached: {0}")]
    Unreachable(String),
    /// No answer in time.
    #[error("etcd did not answer within {0:?}")]
    Timeout(Duration),
    /// Wrong user, password or rights.
    #[error("etcd refuses this node: {0}")]
    Denied(String),
    /// The lease ended, and with it all that was registered under it.
    #[error("the lease in etcd has ended")]
    LeaseLost,
    /// Any other error of etcd.
    #[error("etcd answered with an error: {0}")]
    BadAnswer(String),
}

impl Error {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            Error::BadAddress(_) => Code::DirectoryBadAddress,
            Error::BadDigest(_) => Code::DirectoryBadDigest,
            Error::TooMany { .. } => Code::DirectoryTooMany,
            Error::Credentials { .. } => Code::DirectoryCredentials,
            Error::Start(_) => Code::DaemonStart,
            Error::Unreachable(_) => Code::DirectoryUnreachable,
            Error::Timeout(_) => Code::DirectoryTimeout,
            Error::Denied(_) => Code::DirectoryDenied,
            Error::LeaseLost => Code::DirectoryLeaseLost,
            Error::BadAnswer(_) => Code::DirectoryBadAnswer,
        }
    }
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        crate::Error::new(error.code(), error.to_string())
    }
}

/// Who has which artifact. Dropping it takes this node out of it, as far as that can be done in the time of one request.
#[derive(Debug)]
pub struct Directory {
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Static { peers: Vec<Address>, since: SystemTime },
    Etcd(etcd::Etcd),
}

impl Directory {
    /// The directory of a list of peers, each of which is a candidate for everything. `own` is where this node itself listens: the
    /// same list can be given to all nodes.
    pub fn of_peers(peers: &[Address], own: Option<&Address>) -> Directory {
        let mut peers: Vec<Address> = peers.iter().filter(|peer| Some(*peer) != own).cloned().collect();
        peers.sort();
        peers.dedup();
        Directory { backend: Backend::Static { peers, since: SystemTime::now() } }
    }

    /// The directory in etcd, in which this node is `node` and listens at `address`. Returns before there is a connection.
    ///
    /// # Errors
    /// [`Error::Credentials`] if a file that the configuration names cannot be read, [`Error::Start`].
    pub fn etcd(config: &config::Etcd, node: &str, address: Address) -> Result<Directory, Error> {
        Ok(Directory { backend: Backend::Etcd(etcd::Etcd::start(config, node, address)?) })
    }

    /// Who may have the artifact with this digest, in the order of their names. At once, whatever the network does.
    pub fn holders(&self, digest: &str) -> Vec<Holder> {
        match &self.backend {
            Backend::Static { peers, .. } => {
                let candidate = |address: &Address| Holder {
                    node: None,
                    address: address.clone(),
                    holding: None,
                    age: None,
                };
                peers.iter().map(candidate).collect()
            }
            Backend::Etcd(etcd) => etcd.shared().holders(digest),
        }
    }

    /// This node has, or is loading, this artifact: others come to know as soon as may be, and again whenever etcd has forgotten it. If
    /// only the number of chunks has changed since the last time, they come to know within a third of the lease's time.
    ///
    /// # Errors
    /// [`Error::BadDigest`], [`Error::TooMany`].
    pub fn announce(&self, digest: &str, holding: Holding) -> Result<(), Error> {
        if !entry::is_digest(digest) {
            return Err(Error::BadDigest(crate::json::shown(digest)));
        }
        match &self.backend {
            // Peers of a list are asked.
            Backend::Static { .. } => Ok(()),
            Backend::Etcd(etcd) => etcd.shared().announce(digest, holding),
        }
    }

    /// This node no longer has this artifact.
    pub fn withdraw(&self, digest: &str) {
        match &self.backend {
            Backend::Static { .. } => {}
            Backend::Etcd(etcd) => etcd.shared().withdraw(digest),
        }
    }

    /// How it is.
    pub fn status(&self) -> Status {
        match &self.backend {
            Backend::Static { peers, since } => Status {
                backend: "static",
                connected: true,
                since: *since,
                entries: peers.len(),
                announced: 0,
                refused: 0,
                last_error: None,
            },
            Backend::Etcd(etcd) => etcd.shared().status(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_makes_everybody_but_this_node_a_candidate_for_everything() {
        let address = |text: &str| Address::parse(text).unwrap();
        let peers = ["c:1", "a:1", "own:1", "c:1"].map(address);
        let directory = Directory::of_peers(&peers, Some(&address("own:1")));
        let digest = format!("sha256:{}", "00".repeat(32));
        let holding = Holding { state: State::Complete, tier: Tier::Host, chunks: 1, rank: 0 };
        directory.announce(&digest, holding).unwrap();
        let holders = directory.holders(&digest);
        assert_eq!(holders.iter().map(|holder| holder.address.as_str()).collect::<Vec<_>>(), ["a:1", "c:1"]);
        assert!(holders.iter().all(|h| h.node.is_none() && h.holding.is_none() && h.age.is_none()));
        let status = directory.status();
        assert_eq!((status.backend, status.connected, status.entries), ("static", true, 2));
        assert_eq!(directory.announce("sha256:00", holding).unwrap_err().code(), Code::DirectoryBadDigest);
    }
}
