//! The two ends of a connection: lines of JSON over TCP in place of the authenticated session that peers have.
//!
//! The source is a process of its own, so that it can be killed. It answers one connection after the other.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use lodestream::checksum;
use lodestream::rdma::{Rail, Settings, Source};
use lodestream::sys::mem::{HUGE_PAGE_BYTES, Memory};
use lodestream::sys::pages::PageKind;
use lodestream::sys::verbs::{Backing, Context, Endpoint, ProtectionDomain, Registered, Role};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::check::{Checked, Wrong, ensure};

/// What the source has, bytes.
pub(crate) const SOURCE_BYTES: u64 = 16 * HUGE_PAGE_BYTES;
/// Port of the source's session, and of ib_read_bw's.
pub(crate) const PORT: u16 = 7700;
const PERFTEST_PORT: u16 = 18515;

/// How the source lets its memory be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Way {
    /// By the key of its memory.
    Key,
    /// By windows.
    Windows,
    /// To be written to.
    Target,
}

/// The receiver's first line.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    way: Way,
    depth: u32,
    endpoints: Vec<Endpoint>,
}

/// The source's answer. `Err`: why it cannot.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    endpoints: Vec<Endpoint>,
    source: Source,
    chunks: Vec<u64>,
}

/// What the receiver asks for afterwards.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Make the keys void.
    Revoke,
    /// Checksums of the memory as it is now, taken back from the receiver.
    Chunks,
    /// End at once, without a word.
    Die,
    /// Start ib_read_bw's server, with so many queue pairs, transfers in flight by each, and READs of each.
    Perftest { pairs: u32, depth: u32, each: u64 },
    /// End when this connection does.
    Leave,
}

#[derive(Debug)]
struct Lines {
    read: BufReader<TcpStream>,
}

impl Lines {
    fn new(stream: TcpStream) -> Checked<Lines> {
        stream.set_nodelay(true)?;
        Ok(Lines { read: BufReader::new(stream) })
    }

    fn say(&self, line: &impl Serialize) -> Checked {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        Ok(self.read.get_ref().write_all(&text)?)
    }

    /// The next line; `None` at the end.
    fn hear<T: DeserializeOwned>(&mut self) -> Checked<Option<T>> {
        let mut line = String::new();
        Ok(if self.read.read_line(&mut line)? == 0 { None } else { Some(serde_json::from_str(&line)?) })
    }

    fn expect<T: DeserializeOwned>(&mut self) -> Checked<T> {
        self.hear::<Result<T, String>>()?.ok_or(Wrong("the source has gone".into()))?.map_err(Wrong)
    }
}

/// Bytes that differ from chunk to chunk.
fn fill(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// Checksums of the chunks of memory.
pub(crate) fn chunks(memory: &Arc<Memory>) -> Checked<Vec<u64>> {
    let span = memory.claim(0, memory.bytes()).ok_or(Wrong("a span was not given back".into()))?;
    Ok(span.as_slice().chunks(checksum::CHUNK_BYTES as usize).map(checksum::chunk).collect())
}

/// Answers receivers until one says [`Ask::Leave`].
pub(crate) fn serve(context: &Arc<Context>, address: IpAddr) -> Checked {
    let listener = TcpListener::bind(SocketAddr::new(address, PORT))?;
    // For whoever has started it.
    writeln!(std::io::stdout(), "listening")?;
    let memory = Arc::new(Memory::new(SOURCE_BYTES, PageKind::Small)?);
    let mut span = memory.claim(0, SOURCE_BYTES).ok_or(Wrong("new memory is claimed".into()))?;
    fill(span.as_mut_slice());
    drop(span);
    loop {
        let (stream, _) = listener.accept()?;
        // A receiver that goes in the middle harms nobody: the next one is answered.
        if let Ok(true) = answer(context, address, &memory, stream) {
            return Ok(());
        }
    }
}

/// Answers one receiver. → whether it says that this is the last.
fn answer(context: &Arc<Context>, address: IpAddr, memory: &Arc<Memory>, stream: TcpStream) -> Checked<bool> {
    let mut lines = Lines::new(stream)?;
    let Some(hello) = lines.hear::<Hello>()? else { return Ok(false) };
    let route = context.route(Some(address))?;
    let domain = ProtectionDomain::new(context)?;
    let settings = Settings { pairs: hello.endpoints.len() as u32, depth: hello.depth };
    let role = if hello.way == Way::Target { Role::Target } else { Role::Source };
    let mut rail = Rail::new(&domain, &route, role, settings)?;
    rail.connect(&hello.endpoints)?;
    let chunks_before = chunks(memory)?;
    let backing = || Backing::Memory(Arc::clone(memory));
    let (mut published, mut target) = (None, None);
    let source = match hello.way {
        Way::Target => {
            let mut span = memory.claim(0, SOURCE_BYTES).ok_or(Wrong("claimed".into()))?;
            span.as_mut_slice().fill(0);
            let registered = Registered::target(&domain, span)?;
            let remote = registered.remote().ok_or(Wrong("a target that nobody can reach".into()))?;
            target = Some(registered);
            Source { remotes: vec![remote] }
        }
        way => {
            let memory = match way {
                Way::Windows => Registered::windowed(&domain, backing())?,
                _ => Registered::source(&domain, backing())?,
            };
            let made = rail.publish(&memory, 0, SOURCE_BYTES)?;
            published.insert(made).source.clone()
        }
    };
    lines.say(&Ok::<_, String>(Offer { endpoints: rail.endpoints(), source, chunks: chunks_before }))?;
    let mut perftest = None;
    let mut leave = false;
    while let Some(ask) = lines.hear::<Ask>()? {
        let mut answer = Vec::new();
        match ask {
            Ask::Revoke => match published.take() {
                Some(published) => rail.revoke(published)?,
                None => return Err(Wrong("nothing to revoke".into())),
            },
            Ask::Chunks => {
                let target = target.take().ok_or(Wrong("not a target".into()))?;
                drop(target.into_span().ok_or(Wrong("the target was not given back".into()))?);
                answer = chunks(memory)?;
                fill(memory.claim(0, SOURCE_BYTES).ok_or(Wrong("claimed".into()))?.as_mut_slice());
            }
            Ask::Die => std::process::abort(),
            Ask::Perftest { pairs, depth, each } => {
                perftest =
                    Some(Perftest::server(context.name(), route.choice.entry.index, pairs, depth, each)?);
            }
            Ask::Leave => leave = true,
        }
        lines.say(&Ok::<_, String>(answer))?;
    }
    drop(perftest);
    Ok(leave)
}

/// ib_read_bw with the same sizes.
pub(crate) struct Perftest(Child);

impl Perftest {
    fn command(device: &str, gid: u8, pairs: u32, depth: u32, each: u64) -> Command {
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "ib_read_bw", "-F", "-d", device, "-x", &gid.to_string()]);
        command.args(["-s", &checksum::CHUNK_BYTES.to_string(), "-q", &pairs.to_string()]);
        command.args(["-t", &depth.to_string(), "-n", &each.to_string(), "-p", &PERFTEST_PORT.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        command
    }

    /// A server that waits for its client.
    fn server(device: &str, gid: u8, pairs: u32, depth: u32, each: u64) -> Checked<Perftest> {
        let mut child = Perftest::command(device, gid, pairs, depth, each).spawn()?;
        let output = child.stdout.take().ok_or(Wrong("no output".into()))?;
        let server = Perftest(child);
        let mut lines = BufReader::new(output).lines();
        while let Some(line) = lines.next().transpose()? {
            if line.contains("Waiting for client") {
                // A pipe that nobody reads would end it.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(server);
            }
        }
        Err(Wrong("ib_read_bw's server has ended".into()))
    }

    /// MiB/s that a client gets, on average, from the server at `peer`.
    pub(crate) fn client(
        device: &str,
        gid: u8,
        pairs: u32,
        depth: u32,
        each: u64,
        peer: IpAddr,
    ) -> Checked<f64> {
        let output = Perftest::command(device, gid, pairs, depth, each).arg(peer.to_string()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // bytes, iterations, peak, average, message rate.
        let size = checksum::CHUNK_BYTES.to_string();
        let mut rows = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.rfind(|row| row.first() == Some(&size.as_str()));
        let average = row.and_then(|row| row.get(3)?.parse().ok());
        average.ok_or_else(|| Wrong(format!("ib_read_bw gave no rate:\n{text}")))
    }
}

impl Drop for Perftest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The receiver's end.
#[derive(Debug)]
pub(crate) struct Receiver {
    lines: Lines,
    pub(crate) rail: Rail,
    pub(crate) source: Source,
    /// Checksums of what the source has.
    pub(crate) chunks: Vec<u64>,
    /// The memory that is read into, and its registration.
    pub(crate) memory: Arc<Memory>,
    pub(crate) registered: Arc<Registered>,
}

impl Receiver {
    /// Connects a rail to the source at `peer`, and has as much memory as it.
    pub(crate) fn connect(
        context: &Arc<Context>,
        local: IpAddr,
        peer: IpAddr,
        way: Way,
        settings: Settings,
    ) -> Checked<Receiver> {
        let route = context.route(Some(local))?;
        let domain = ProtectionDomain::new(context)?;
        let mut rail = Rail::new(&domain, &route, Role::Initiator, settings)?;
        let mut lines = Lines::new(TcpStream::connect(SocketAddr::new(peer, PORT))?)?;
        lines.say(&Hello { way, depth: settings.depth, endpoints: rail.endpoints() })?;
        let offer: Offer = lines.expect()?;
        rail.connect(&offer.endpoints)?;
        ensure!(offer.source.remotes.iter().all(|remote| remote.bytes() == SOURCE_BYTES), "another size");
        let memory = Arc::new(Memory::new(SOURCE_BYTES, PageKind::Small)?);
        let registered = Registered::own(&domain, &memory)?;
        let (source, chunks) = (offer.source, offer.chunks);
        Ok(Receiver { lines, rail, source, chunks, memory, registered })
    }

    /// Asks, and waits for the answer.
    pub(crate) fn ask(&mut self, ask: Ask) -> Checked<Vec<u64>> {
        self.lines.say(&ask)?;
        self.lines.expect()
    }

    /// Asks for what is not answered.
    pub(crate) fn tell(&mut self, ask: Ask) -> Checked {
        self.lines.say(&ask)
    }
}
