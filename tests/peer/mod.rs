//! Two ends of a connection between peers, with certificates of their own making.
#![allow(dead_code, unreachable_pub, reason = "each test takes what it needs")]

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lodestream::catalog::manifest::{CHUNK_BYTES, Manifest};
use lodestream::catalog::{Description, FileEntry, Format};
use lodestream::checksum;
use lodestream::config::Config;
use lodestream::peer::client::{Dialer, Session};
use lodestream::peer::offer::{Offer, Offers};
use lodestream::peer::protocol::{Digest, Rank};
use lodestream::peer::server::{Counters, Server};
use lodestream::peer::tls::Credentials;
use lodestream::sys::mem::{HUGE_PAGE_BYTES, Memory};
use lodestream::sys::pages::PageKind;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tempfile::TempDir;

/// What a condition may take that is expected to come true.
pub const WAIT_MAX: Duration = Duration::from_secs(30);
/// The peers' own identities.
pub const SERVER: &str = "spiffe://example.org/node/server";
pub const CLIENT: &str = "client.example.org";
pub const NOBODY: &str = "spiffe://example.org/node/nobody";

/// Waits until the condition holds.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT_MAX;
    while !condition() {
        assert!(Instant::now() < deadline, "no {what} within {WAIT_MAX:?}");
        std::thread::yield_now();
    }
}

/// An authority that gives out certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    pub fn issue(&self, name: &str) -> Pair {
        self.issue_until(name, 2100)
    }

    /// A certificate with this alternative name that is good to the first day of that year.
    pub fn issue_until(&self, name: &str, year: i32) -> Pair {
        let mut params = CertificateParams::default();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        params.subject_alt_names = vec![match name.starts_with("spiffe://") {
            true => SanType::URI(name.try_into().unwrap()),
            false => SanType::DnsName(name.try_into().unwrap()),
        }];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

/// A node's files and configuration.
pub struct Node {
    pub config: Config,
    directory: TempDir,
}

impl Node {
    /// A node that has this pair and trusts this authority and these identities.
    pub fn new(authority: &Authority, pair: &Pair, identities: &[&str]) -> Node {
        let directory = tempfile::tempdir().unwrap();
        let mut config = Config { node: "node-x".to_owned(), ..Config::default() };
        config.peer.listen = Some("127.0.0.1:0".parse().unwrap());
        config.peer.certificate = Some(directory.path().join("certificate.pem"));
        config.peer.key = Some(directory.path().join("key.pem"));
        config.peer.ca = Some(directory.path().join("ca.pem"));
        config.peer.identities = identities.iter().map(|name| (*name).to_owned()).collect();
        fs::write(directory.path().join("ca.pem"), authority.pem()).unwrap();
        let node = Node { config, directory };
        node.rotate(pair);
        node
    }

    /// The server of the tests, and its client.
    pub fn pair() -> (Node, Node) {
        let authority = Authority::new();
        let server = Node::new(&authority, &authority.issue(SERVER), &[CLIENT]);
        (server, Node::new(&authority, &authority.issue(CLIENT), &[SERVER]))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts another certificate and key in the place of its own, each by rename.
    pub fn rotate(&self, pair: &Pair) {
        for (name, text) in [("certificate.pem", &pair.certificate), ("key.pem", &pair.key)] {
            fs::write(self.path("new"), text).unwrap();
            fs::rename(self.path("new"), self.path(name)).unwrap();
        }
    }

    pub fn dialer(&self) -> Dialer {
        Dialer::new(&self.config, Credentials::load(&self.config.peer).unwrap())
    }

    /// A client that has the node's certificate, trusts anybody, and says what it is told to.
    pub fn raw_client(
        &self,
        address: SocketAddr,
    ) -> rustls::StreamOwned<rustls::ClientConnection, TcpStream> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody))
            .with_client_auth_cert(chain(&self.path("certificate.pem")), key(&self.path("key.pem")))
            .unwrap();
        config.alpn_protocols = vec![b"lodestream-peer".to_vec()];
        let name = ServerName::try_from("anybody").unwrap();
        let connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(WAIT_MAX)).unwrap();
        rustls::StreamOwned::new(connection, socket)
    }

    /// A server that has the node's certificate, trusts anybody, and says what it is told to.
    pub fn raw_server(&self, socket: TcpStream) -> rustls::StreamOwned<rustls::ServerConnection, TcpStream> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain(&self.path("certificate.pem")), key(&self.path("key.pem")))
            .unwrap();
        config.alpn_protocols = vec![b"lodestream-peer".to_vec()];
        socket.set_read_timeout(Some(WAIT_MAX)).unwrap();
        rustls::StreamOwned::new(rustls::ServerConnection::new(Arc::new(config)).unwrap(), socket)
    }
}

fn chain(path: &Path) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_file_iter(path).unwrap().map(Result::unwrap).collect()
}

fn key(path: &Path) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_file(path).unwrap()
}

/// Trusts everybody.
#[derive(Debug)]
struct Anybody;

impl rustls::client::danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// A server with what it offers and counts.
pub struct Serving {
    pub server: Server,
    pub offers: Arc<Offers>,
    pub counters: Arc<Counters>,
}

impl Serving {
    pub fn start(node: &Node) -> Serving {
        let (offers, counters) = (Arc::<Offers>::default(), Arc::<Counters>::default());
        let credentials = Credentials::load(&node.config.peer).unwrap();
        let server =
            Server::start(&node.config, credentials, Arc::clone(&offers), Arc::clone(&counters)).unwrap();
        Serving { server, offers, counters }
    }

    pub fn connect(&self, node: &Node) -> Session {
        node.dialer().connect(&self.address()).unwrap()
    }

    pub fn address(&self) -> String {
        self.server.address().to_string()
    }

    /// Waits until no connection is left.
    #[track_caller]
    pub fn idle(&self) {
        until("end of all connections", || {
            self.counters.connections.load(Ordering::Relaxed) == 0
                && self.counters.unauthenticated.load(Ordering::Relaxed) == 0
        });
    }
}

/// An artifact and where its files lie in a region.
pub struct Artifact {
    pub manifest: Arc<Manifest>,
    pub files: Vec<Vec<u8>>,
    pub places: Vec<Option<u64>>,
    /// Length of the region, whole huge pages.
    pub bytes: u64,
}

impl Artifact {
    /// Files of these lengths, of bytes that no other chunk has.
    pub fn new(lengths: &[usize]) -> Artifact {
        let mut seed = 1u64;
        let mut block = vec![0; CHUNK_BYTES as usize];
        for word in block.chunks_exact_mut(8) {
            // Xorshift: any sequence without repetition will do.
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            word.copy_from_slice(&seed.to_le_bytes());
        }
        let files = lengths.iter().map(|length| {
            let mut file = vec![0; *length];
            for chunk in file.chunks_mut(block.len()) {
                block.rotate_left(13);
                chunk.copy_from_slice(&block[..chunk.len()]);
            }
            file
        });
        let files: Vec<Vec<u8>> = files.collect();
        let entries = files
            .iter()
            .zip(0..)
            .map(|(file, number)| FileEntry { name: format!("file-{number}"), bytes: file.len() as u64 });
        let description = Description {
            format: Format::Safetensors,
            files: entries.collect(),
            tensors: Vec::new(),
            metadata: BTreeMap::new(),
        };
        let sums = files.iter().map(|file| file.chunks(CHUNK_BYTES as usize).map(checksum::chunk).collect());
        let manifest = Arc::new(Manifest::new(description, sums.collect()).unwrap());
        let mut end = 0;
        let places = files.iter().map(|file| {
            let place = end;
            end = (place + file.len() as u64).next_multiple_of(4096);
            Some(place)
        });
        let places = places.collect();
        Artifact { manifest, files, places, bytes: end.next_multiple_of(HUGE_PAGE_BYTES) }
    }

    pub fn digest(&self) -> Digest {
        Digest::parse(self.manifest.digest()).unwrap()
    }

    /// Memory for its region: one part of 2 MiB, and one for the rest if there is any.
    pub fn memory(&self) -> Vec<Arc<Memory>> {
        let rest = self.bytes - HUGE_PAGE_BYTES;
        let part = |bytes| Arc::new(Memory::new(bytes, PageKind::Small).unwrap());
        [HUGE_PAGE_BYTES, rest].into_iter().filter(|bytes| *bytes > 0).map(part).collect()
    }

    /// Puts a chunk in its place, across parts.
    pub fn fill(&self, memory: &[Arc<Memory>], file: u32, chunk: u32) {
        let mut bytes = self.chunk(file, chunk);
        let mut offset = self.places[file as usize].unwrap() + u64::from(chunk) * CHUNK_BYTES;
        let mut start = 0;
        for part in memory {
            let end = start + part.bytes();
            if offset < end && !bytes.is_empty() {
                let (now, later) = bytes.split_at(bytes.len().min((end - offset) as usize));
                let mut span = part.claim(offset - start, now.len() as u64).unwrap();
                span.as_mut_slice().copy_from_slice(now);
                (bytes, offset) = (later, end);
            }
            start = end;
        }
    }

    pub fn fill_all(&self, memory: &[Arc<Memory>]) {
        for (file, chunk) in self.chunks() {
            self.fill(memory, file, chunk);
        }
    }

    /// The bytes of a chunk.
    pub fn chunk(&self, file: u32, chunk: u32) -> &[u8] {
        self.files[file as usize].chunks(CHUNK_BYTES as usize).nth(chunk as usize).unwrap()
    }

    /// All chunks, by file and number.
    pub fn chunks(&self) -> Vec<(u32, u32)> {
        let counts = self.manifest.chunks().iter().map(|sums| sums.len() as u32);
        counts.zip(0..).flat_map(|(count, file)| (0..count).map(move |chunk| (file, chunk))).collect()
    }

    /// Offers it as something that is being loaded.
    pub fn offer(&self, memory: &[Arc<Memory>], rank: Rank) -> Arc<Offer> {
        let parts: Vec<&Memory> = memory.iter().map(|part| &**part).collect();
        Arc::new(Offer::filling(&self.manifest, &self.places, &parts, rank).unwrap())
    }

    /// Offers it complete.
    pub fn offer_complete(&self) -> Arc<Offer> {
        let memory = self.memory();
        self.fill_all(&memory);
        let offer = self.offer(&memory, Rank::default());
        assert!(offer.complete());
        offer
    }
}

/// A rank that comes after that of a server which began at 0.
pub fn later() -> Rank {
    Rank { started_ms: 1, node: 0 }
}
