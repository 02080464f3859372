//! `lodestream doctor peer`: whether artifacts can be taken from a peer, step by step, and if not, what is wrong.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Check, Verdict};
use crate::cli::output::{bytes, milliseconds, rate};
use crate::config::{Config, ServeArgs};
use crate::error::{Code, Result};
use crate::peer::Error;
use crate::peer::client::{Dialer, Session};
use crate::peer::protocol::{Digest, Rank, State};
use crate::peer::tls::Credentials;

/// How long a connection by TCP may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Questions by which the time there and back is measured.
const QUESTIONS: usize = 9;
/// How long chunks are taken to measure the rate.
const RATE_TIME: Duration = Duration::from_secs(2);
const CHUNK: usize = 1 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where it listens: host:port
    #[arg(value_name = "HOST:PORT")]
    address: String,

    /// The daemon's configuration, of which `[peer]` counts [env: LODESTREAM_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Measure how fast chunks of this artifact come, over one connection
    #[arg(long, value_name = "sha256:…")]
    digest: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) verdict: Verdict,
    address: String,
    pub(super) checks: Vec<Check>,
}

/// Goes as far as it comes.
pub(super) fn examine(args: &Args) -> Result<Report> {
    let serve = ServeArgs { config: args.config.clone(), ..ServeArgs::default() };
    let config = Config::load(&serve)?;
    let mut checks = Vec::new();
    if addresses(&args.address, &mut checks) {
        session(&config, args, &mut checks);
    }
    let verdict = checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok);
    Ok(Report { verdict, address: args.address.clone(), checks })
}

/// Name and TCP, without credentials.
fn addresses(address: &str, checks: &mut Vec<Check>) -> bool {
    let found: Vec<SocketAddr> = match address.to_socket_addrs() {
        Ok(found) => found.collect(),
        Err(error) => {
            let change = "write host:port, and see that the name resolves on this node (getent hosts)";
            checks.push(Check::fail("peer_name", error.to_string(), change));
            return false;
        }
    };
    let listed: Vec<_> = found.iter().map(SocketAddr::to_string).collect();
    checks.push(Check::ok("peer_name", listed.join(", ")));
    let mut reached = false;
    for address in found {
        let begin = Instant::now();
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(_) => {
                let time = milliseconds(begin.elapsed().as_secs_f64() * 1e3);
                checks.push(Check::ok("peer_tcp", format!("connected in {time}")).of(address.to_string()));
                reached = true;
            }
            Err(error) => {
                let change = match error.kind() {
                    std::io::ErrorKind::ConnectionRefused => {
                        "nobody listens there: see peer.listen of the other daemon, and that it runs"
                    }
                    std::io::ErrorKind::TimedOut => {
                        "packets are lost on the way: see routes, firewalls and network policies of both nodes"
                    }
                    _ => "see the route to it (ip route get) and that the interface is up",
                };
                checks.push(Check::fail("peer_tcp", error.to_string(), change).of(address.to_string()));
            }
        }
    }
    reached
}

/// TLS, identity and protocol.
fn session(config: &Config, args: &Args, checks: &mut Vec<Check>) {
    let credentials = match Credentials::load(&config.peer) {
        Ok(credentials) => credentials,
        Err(error) => {
            let change =
                "set peer.certificate, peer.key, peer.ca and peer.identities in the file given by --config";
            return checks.push(Check::fail("peer_credentials", error.to_string(), change));
        }
    };
    let dialer = Dialer::new(config, credentials);
    let begin = Instant::now();
    let mut session = match dialer.connect(&args.address) {
        Ok(session) => session,
        Err(error) => {
            return checks.push(Check::fail("peer_tls", error.to_string(), advice(error.code())));
        }
    };
    let time = milliseconds(begin.elapsed().as_secs_f64() * 1e3);
    let found = format!("{} is {} (handshake {time})", session.node(), session.identity());
    checks.push(Check::ok("peer_tls", found));
    let measured = match args.digest.as_deref() {
        Some(text) => match Digest::parse(text) {
            Some(digest) => chunks(&mut session, &digest, checks),
            None => {
                let change = "write sha256: and 64 digits, as lodestream ls --json shows it";
                checks.push(Check::fail("peer_artifact", "that is no digest", change));
                Ok(())
            }
        },
        None => round_trip(&mut session, &Digest([0; 32])).map(|time| {
            let found = format!("{} there and back", milliseconds(time.as_secs_f64() * 1e3));
            checks.push(Check::ok("peer_answers", found));
        }),
    };
    if let Err(error) = measured {
        checks.push(Check::fail("peer_answers", error.to_string(), advice(error.code())));
    }
}

/// The median time of a question.
fn round_trip(session: &mut Session, digest: &Digest) -> Result<Duration, Error> {
    let mut times = Vec::with_capacity(QUESTIONS);
    for _ in 0..QUESTIONS {
        let begin = Instant::now();
        session.have(digest)?;
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    Ok(times[QUESTIONS / 2])
}

/// Takes chunks of an artifact for a while.
fn chunks(session: &mut Session, digest: &Digest, checks: &mut Vec<Check>) -> Result<(), Error> {
    let have = session.have(digest)?;
    if have.state == State::None {
        let change = "load it there first, whole, to the host tier";
        checks.push(Check::fail("peer_artifact", "it does not have that artifact", change));
        return Ok(());
    }
    let manifest = Arc::new(session.manifest(digest)?);
    let handle = session.open(&manifest, Rank { started_ms: u64::MAX, node: u64::MAX })?;
    let mut all = manifest
        .chunks()
        .iter()
        .zip(0u32..)
        .flat_map(|(chunks, file)| (0..chunks.len() as u32).map(move |chunk| (file, chunk)));
    let (mut target, mut taken) = (vec![0; CHUNK], 0);
    let begin = Instant::now();
    loop {
        while session.in_flight() < session.window()
            && begin.elapsed() < RATE_TIME
            && let Some((file, chunk)) = all.next()
        {
            session.request(handle, file, chunk, 1)?;
        }
        if session.in_flight() == 0 {
            break;
        }
        taken += session.receive(&mut target)?.bytes as u64;
    }
    let speed = rate(taken as f64 / begin.elapsed().as_secs_f64().max(1e-9));
    checks.push(Check::ok(
        "peer_rate",
        format!("{speed} over one connection ({} taken, every chunk right)", bytes(taken)),
    ));
    Ok(())
}

/// What is wrong, in words.
fn advice(code: Code) -> &'static str {
    match code {
        Code::PeerTlsHandshake => {
            "one side does not trust the other's certificate: see that both lead to peer.ca, that none has expired \
             (openssl x509 -noout -dates), that the clocks agree, and that it is a peer's port"
        }
        Code::PeerIdentityRefused => {
            "the certificate is good, but its name is not in peer.identities: add it, exactly as the certificate has it \
             (openssl x509 -noout -ext subjectAltName), on the side that refuses"
        }
        Code::PeerTimeout => {
            "it took the connection and did not answer in time: it is overloaded, or no Lodestream"
        }
        Code::PeerVersion => "the daemons are of different versions: update the older one",
        Code::PeerBusy => "it serves as many connections as it may (peer.connections_max)",
        Code::PeerDisconnected => "it closed the connection: its log says why",
        _ => "see the section of the code in docs/errors.md",
    }
}
