//! Who is a peer: TLS 1.3 with a certificate on both sides, and an exact name.
//!
//! A peer's certificate must lead to one of the authorities in `peer.ca`, and have one of `peer.identities` among its
//! alternative names (a SPIFFE ID or a DNS name), letter for letter. The name by which a peer was dialled plays no part. Sessions
//! are not resumed: each connection is checked anew, and nothing is kept of those that are gone.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::ring::cipher_suite;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
};

use super::{Error, Result, lock};
use crate::config::Peer;
use crate::error::Code;

/// What both sides must say that they speak, so that a client of something else is refused by the handshake itself.
pub(super) const ALPN: &[u8] = b"lodestream-peer";
/// How often the files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Length of a file with certificates or a key.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Names of a certificate that are shown when none of them is a peer's.
const NAMES_SHOWN_MAX: usize = 4;

/// *ring*, with the ciphers that CPUs compute in hardware first.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider { cipher_suites, ..rustls::crypto::ring::default_provider() })
});

/// This node's certificate and key, and whom it trusts, as the files have them now.
#[derive(Debug)]
pub struct Credentials {
    files: Files,
    identities: Arc<[String]>,
    loaded: Mutex<Loaded>,
}

#[derive(Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    ca: PathBuf,
}

#[derive(Debug)]
struct Loaded {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    /// What the files were when they were last read, whether they could be used or not.
    stamps: [Option<Stamp>; 3],
    looked: Instant,
}

/// A file that is not the same any more has another one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Credentials {
    /// Reads the files of `[peer]`.
    ///
    /// # Errors
    /// `peer.tls.credentials` if one is not named, cannot be read, holds nothing of its kind, or if key and certificate are
    /// not a pair.
    pub fn load(config: &Peer) -> Result<Arc<Credentials>> {
        let named = |path: &Option<PathBuf>, key: &str| {
            path.clone().ok_or_else(|| refused(Path::new(key), "it is not set".to_owned()))
        };
        let files = Files {
            certificate: named(&config.certificate, "peer.certificate")?,
            key: named(&config.key, "peer.key")?,
            ca: named(&config.ca, "peer.ca")?,
        };
        let identities: Arc<[String]> = config.identities.clone().into();
        // Before they are read: what changes meanwhile is then read again.
        let stamps = files.stamps();
        let (server, client) = files.read(&identities)?;
        let loaded = Mutex::new(Loaded { server, client, stamps, looked: Instant::now() });
        Ok(Arc::new(Credentials { files, identities, loaded }))
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        let mut loaded = lock(&self.loaded);
        self.refresh(&mut loaded);
        Arc::clone(&loaded.server)
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        let mut loaded = lock(&self.loaded);
        self.refresh(&mut loaded);
        Arc::clone(&loaded.client)
    }

    /// Reads the files again if they have changed. What cannot be used is logged, once, and what was before stays.
    fn refresh(&self, loaded: &mut Loaded) {
        if loaded.looked.elapsed() < LOOK_INTERVAL {
            return;
        }
        loaded.looked = Instant::now();
        let stamps = self.files.stamps();
        if stamps == loaded.stamps {
            return;
        }
        loaded.stamps = stamps;
        match self.files.read(&self.identities) {
            Ok((server, client)) => {
                (loaded.server, loaded.client) = (server, client);
                tracing::info!("certificate, key and authorities for peers were read anew");
            }
            Err(error) => {
                tracing::error!(code = error.code().as_str(), "{error}; what was read before stays in use")
            }
        }
    }

    /// The identity of a peer that has passed the handshake.
    pub(super) fn identity(&self, certificates: Option<&[CertificateDer<'_>]>) -> Result<String> {
        let leaf = certificates.and_then(<[_]>::first).ok_or(NotPeer { names: Vec::new() });
        let found = leaf.and_then(|leaf| identity(leaf, &self.identities));
        found.map_err(|error| Error::Identity(error.to_string()))
    }
}

impl Files {
    fn stamps(&self) -> [Option<Stamp>; 3] {
        [&self.certificate, &self.key, &self.ca].map(|path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some(Stamp {
                device: metadata.dev(),
                inode: metadata.ino(),
                bytes: metadata.size(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
            })
        })
    }

    fn read(&self, identities: &Arc<[String]>) -> Result<(Arc<ServerConfig>, Arc<ClientConfig>)> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(&self.ca)? {
            roots.add(authority).map_err(|error| refused(&self.ca, error.to_string()))?;
        }
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&contents(&self.key)?)
            .map_err(|_| refused(&self.key, "it holds no private key in PEM".to_owned()))?;
        let roots = Arc::new(roots);
        let pair = |error: rustls::Error| {
            refused(&self.key, format!("with {}: {error}", self.certificate.display()))
        };
        let versions = |error: rustls::Error| refused(&self.certificate, error.to_string());

        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&PROVIDER));
        let verifier = verifier.build().map_err(|error| refused(&self.ca, error.to_string()))?;
        let verifier = Arc::new(Clients { chain: verifier, identities: Arc::clone(identities) });
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(versions)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(pair)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![ALPN.to_vec()];

        let verifier = Arc::new(Servers { roots, identities: Arc::clone(identities) });
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(versions)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(chain, key)
            .map_err(pair)?;
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        client.alpn_protocols = vec![ALPN.to_vec()];
        Ok((Arc::new(server), Arc::new(client)))
    }
}

fn refused(path: &Path, reason: String) -> Error {
    Error::Credentials { path: path.to_owned(), reason }
}

fn contents(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Ok(read) if read as u64 > FILE_BYTES_MAX => {
            Err(refused(path, format!("it is longer than {FILE_BYTES_MAX} bytes")))
        }
        Ok(_) => Ok(bytes),
        Err(error) => Err(refused(path, error.to_string())),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = contents(path)?;
    let certificates: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(refused(path, "it holds no certificate in PEM".to_owned())),
        Err(error) => Err(refused(path, error.to_string())),
    }
}

/// A certificate that is none of the peers'.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the certificate is of no peer: none of its names ({}) is in peer.identities", names.join(", "))]
struct NotPeer {
    names: Vec<String>,
}

/// The first of the certificate's names that is in `identities`.
fn identity(leaf: &CertificateDer<'_>, identities: &[String]) -> std::result::Result<String, NotPeer> {
    let Ok(leaf) = webpki::EndEntityCert::try_from(leaf) else { return Err(NotPeer { names: Vec::new() }) };
    let names = || leaf.valid_uri_names().chain(leaf.valid_dns_names());
    let known = names().find(|name| identities.iter().any(|identity| identity == name));
    known.map(str::to_owned).ok_or_else(|| NotPeer {
        names: names().take(NAMES_SHOWN_MAX).map(|name| name.escape_default().to_string()).collect(),
    })
}

/// Checks the certificates of those who connect.
#[derive(Debug)]
struct Clients {
    chain: Arc<dyn ClientCertVerifier>,
    identities: Arc<[String]>,
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        match identity(leaf, &self.identities) {
            Ok(_) => Ok(verified),
            Err(error) => {
                tracing::warn!(
                    code = Code::PeerIdentityRefused.as_str(),
                    "a connection was refused: {error}"
                );
                // This one tells the client "access denied", which no other failure does.
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Checks the certificates of those who are connected to.
#[derive(Debug)]
struct Servers {
    roots: Arc<RootCertStore>,
    identities: Arc<[String]>,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = PROVIDER.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        match identity(leaf, &self.identities) {
            Ok(_) => Ok(ServerCertVerified::assertion()),
            Err(error) => Err(CertificateError::Other(OtherError(Arc::new(error))).into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, leaf, signature, &PROVIDER.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signature, &PROVIDER.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// What an error of the TLS library means here.
pub(super) fn failed(error: &rustls::Error) -> Error {
    use rustls::Error as Tls;
    match error {
        Tls::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
            Error::Identity("the client's certificate is of no peer".to_owned())
        }
        Tls::InvalidCertificate(CertificateError::Other(OtherError(error))) => {
            match error.downcast_ref::<NotPeer>() {
                Some(error) => Error::Identity(error.to_string()),
                None => Error::Handshake(error.to_string()),
            }
        }
        Tls::AlertReceived(AlertDescription::AccessDenied) => Error::Identity(
            "the peer does not know this node: none of its names is in the peer's peer.identities".to_owned(),
        ),
        error => Error::Handshake(error.to_string()),
    }
}
