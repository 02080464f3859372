//! `[peer]`: who is served, who is asked, and whom to trust.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Serialize;

use super::ConfigError;
use super::check::{bounded, count, integer, truth};
use super::layers::Layers;
use super::origin::{Given, Origin};
use super::raw::RawPeer;

/// Length of an identity: that of a SPIFFE ID.
const IDENTITY_BYTES_MAX: usize = 2048;
/// Length of a host name with all its domains.
const HOST_BYTES_MAX: usize = 253;

/// Peers: daemons of other nodes that artifacts are taken from and given to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Peer {
    /// Where peers are served. Absent: nobody is.
    pub listen: Option<SocketAddr>,
    /// Where others reach this node, `host:port`: what the directory in etcd says, and how it knows itself in `peers`.
    pub advertise: Option<String>,
    /// PEM file with this node's certificate and its intermediates, leaf first.
    pub certificate: Option<PathBuf>,
    /// PEM file with the key of the certificate.
    pub key: Option<PathBuf>,
    /// PEM file with the certificate authorities that peers' certificates lead to.
    pub ca: Option<PathBuf>,
    /// Who is a peer: names of certificates, `spiffe://…` or DNS, to be matched exactly.
    pub identities: Vec<String>,
    /// Peers that are asked, `host:port`.
    pub peers: Vec<String>,
    /// Connections to one peer for one job.
    pub streams: u32,
    /// Peers' connections that are served at a time.
    pub connections_max: u32,
    /// Connections at a time whose other end has not shown yet who it is.
    pub unauthenticated_max: u32,
    /// Most time from connecting to the end of the handshake, milliseconds.
    pub handshake_timeout_ms: u64,
    /// How long a connection may be without a request, milliseconds.
    pub idle_timeout_ms: u64,
    /// How long one chunk may take, asked for or served, milliseconds.
    pub chunk_timeout_ms: u64,
    /// Requests in flight on a connection.
    pub window: u32,
    /// Whether files whose manifest is known are taken from peers that have them; what those do not give is read.
    pub prefer: bool,
    /// Users, by number, that may load by digest beside the daemon's own.
    pub tenants: Vec<u32>,
}

impl Default for Peer {
    fn default() -> Peer {
        Peer {
            listen: None,
            advertise: None,
            certificate: None,
            key: None,
            ca: None,
            identities: Vec::new(),
            peers: Vec::new(),
            streams: 4,
            connections_max: 256,
            unauthenticated_max: 32,
            handshake_timeout_ms: 5_000,
            idle_timeout_ms: 30_000,
            chunk_timeout_ms: 5_000,
            window: 8,
            prefer: false,
            tenants: Vec::new(),
        }
    }
}

/// Checks the table.
pub(super) fn peer(layers: &Layers<'_>, raw: RawPeer, default: Peer) -> Result<Peer, ConfigError> {
    let listen = layers.file("peer.listen", raw.listen);
    let peers = bounded(layers.file_list("peer.peers", raw.peers))?;
    let identities = bounded(layers.file_list("peer.identities", raw.identities))?;
    let used = listen.as_ref().or(peers.first()).cloned();
    let file = |key: &'static str, field| match (layers.file(key, field), &used) {
        (Some(given), _) => given.absolute_path().map(Some),
        (None, None) => Ok(None),
        (None, Some(used)) => Err(missing(key, used, "the path of a PEM file")),
    };
    let (certificate, key) = (file("peer.certificate", raw.certificate)?, file("peer.key", raw.key)?);
    let ca = file("peer.ca", raw.ca)?;
    if let Some(used) = used.as_ref().filter(|_| identities.is_empty()) {
        return Err(missing("peer.identities", used, "names of peers' certificates"));
    }
    let tenants = bounded(layers.file_list("peer.tenants", raw.tenants))?;
    let tenants =
        tenants.iter().map(|given| given.text.parse().map_err(|_| given.invalid("numbers of users")));
    let listen = listen.map(|given| {
        given.text.parse().map_err(|_| given.invalid("an address and a port, such as 10.0.0.1:7420"))
    });
    Ok(Peer {
        listen: listen.transpose()?,
        advertise: layers.file("peer.advertise", raw.advertise).as_ref().map(address).transpose()?,
        certificate,
        key,
        ca,
        identities: identities.iter().map(identity).collect::<Result<_, _>>()?,
        peers: peers.iter().map(address).collect::<Result<_, _>>()?,
        streams: count(layers.file("peer.streams", raw.streams), default.streams, 1..=64)?,
        connections_max: count(
            layers.file("peer.connections_max", raw.connections_max),
            default.connections_max,
            1..=4096,
        )?,
        unauthenticated_max: count(
            layers.file("peer.unauthenticated_max", raw.unauthenticated_max),
            default.unauthenticated_max,
            1..=1024,
        )?,
        handshake_timeout_ms: integer(
            layers.file("peer.handshake_timeout_ms", raw.handshake_timeout_ms),
            default.handshake_timeout_ms,
            100..=60_000,
        )?,
        idle_timeout_ms: integer(
            layers.file("peer.idle_timeout_ms", raw.idle_timeout_ms),
            default.idle_timeout_ms,
            100..=3_600_000,
        )?,
        chunk_timeout_ms: integer(
            layers.file("peer.chunk_timeout_ms", raw.chunk_timeout_ms),
            default.chunk_timeout_ms,
            100..=600_000,
        )?,
        window: count(layers.file("peer.window", raw.window), default.window, 1..=256)?,
        prefer: truth(layers.file("peer.prefer", raw.prefer), default.prefer)?,
        tenants: tenants.collect::<Result<_, _>>()?,
    })
}

/// What `used` needs and is not there.
fn missing(key: &'static str, used: &Given, what: &str) -> ConfigError {
    let (text, origin): (_, Origin) = (String::new(), used.origin.clone());
    Given { key, text, origin }.invalid(format!("{what}, as there is {}", used.key))
}

fn identity(given: &Given) -> Result<String, ConfigError> {
    let name = given.text.as_str();
    let valid = match name.strip_prefix("spiffe://") {
        Some(rest) => !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic()),
        None => is_host(name) && !name.bytes().any(|byte| byte.is_ascii_uppercase()),
    };
    if valid && name.len() <= IDENTITY_BYTES_MAX {
        return Ok(given.text.clone());
    }
    Err(given.invalid("spiffe://… or a DNS name in lower case, as in the certificate; no wildcards"))
}

fn address(given: &Given) -> Result<String, ConfigError> {
    let valid = given.text.rsplit_once(':').is_some_and(|(host, port)| {
        let numeric = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = numeric.map_or_else(|| is_host(host), |host| host.parse::<std::net::Ipv6Addr>().is_ok());
        host && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if valid { Ok(given.text.clone()) } else { Err(given.invalid("host:port, such as node-b:7420")) }
}

/// Letters, digits, hyphens and dots.
fn is_host(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    name.len() <= HOST_BYTES_MAX && name.split('.').all(|label| !label.is_empty() && label.bytes().all(known))
}
