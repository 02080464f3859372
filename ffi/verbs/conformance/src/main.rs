//! Checks Lodestream's use of RDMA on a device: with a source on the same machine (`node`) or on another (`pair`), and measures it
//! against ib_read_bw (`measure`). scripts/vm runs it in virtual machines, whose environment tells who is who.
//!
//! Only what every RoCE device does is asserted, so it can be run on real ones too.

mod check;
mod failures;
mod measure;
mod session;
mod transfers;

use std::io::{self, BufRead, BufReader, Write};
use std::net::IpAddr;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lodestream::rdma::Settings;
use lodestream::sys::verbs::{Context, Library};

use check::{Checked, Wrong, ensure};
use session::{Ask, Receiver, Way};

const USAGE: &str = "usage: verbs-conformance list | node [CHECK…] | pair [CHECK…] | source | measure

  list     the devices, their ports and GIDs, and the route that would be taken
  node     all checks, or those that are named, with a source on this machine
  pair     on the machine with VM_NODE=0 the source, on the other the checks
  source   answers at VM_ADDRESS
  measure  READs against ib_read_bw on this machine, as JSON

Takes the first device, and liblodestream_verbs.so from beside this program. VM_ADDRESS is this machine's address, VM_PEER the
source's. Exit status: 0 all checks passed, 1 some failed, 2 usage.";

/// How long a source may take to come up, under emulation.
const START_MAX: Duration = Duration::from_secs(60);
/// Between two tries to connect to it.
const RETRY: Duration = Duration::from_millis(50);

/// Where the checks run.
pub(crate) struct Node {
    pub(crate) library: Arc<Library>,
    pub(crate) context: Arc<Context>,
    pub(crate) local: IpAddr,
    pub(crate) peer: IpAddr,
    /// The source is on another machine.
    pub(crate) pair: bool,
    source: Mutex<Option<SourceProcess>>,
}

/// A source on this machine.
struct SourceProcess(Child);

impl SourceProcess {
    fn start() -> Checked<SourceProcess> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.arg("source").stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().ok_or(Wrong("no output".into()))?;
        let process = SourceProcess(child);
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        ensure!(line.trim() == "listening", "the source did not start");
        Ok(process)
    }
}

impl Drop for SourceProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Node {
    fn new() -> Checked<Node> {
        let library = Library::open(None)?;
        let name = library.devices()?.into_iter().next().ok_or(Wrong("there is no RDMA device".into()))?;
        let context = Context::open(&library, &name)?;
        let local = address("VM_ADDRESS")?;
        Ok(Node { library, context, local, peer: local, pair: false, source: Mutex::default() })
    }

    /// A rail to a source, which is started if need be.
    pub(crate) fn connect(&self, way: Way, settings: Settings) -> Checked<Receiver> {
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.pair && source.is_none() {
            *source = Some(SourceProcess::start()?);
        }
        let deadline = Instant::now() + START_MAX;
        loop {
            match Receiver::connect(&self.context, self.local, self.peer, way, settings) {
                Ok(receiver) => return Ok(receiver),
                Err(error) if Instant::now() > deadline => return Err(error),
                // The other machine may just be starting it.
                Err(_) if self.pair => std::thread::park_timeout(RETRY),
                Err(error) => return Err(error),
            }
        }
    }

    /// After the source has died: waits for that, so that the next is another one.
    pub(crate) fn bury(&self) {
        *self.source.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "scripts/vm tells by the environment who is who; this is no part of the daemon"
)]
fn environment(name: &str) -> Checked<String> {
    std::env::var(name).map_err(|_| Wrong(format!("{name} is not set: see --help")))
}

fn address(name: &str) -> Checked<IpAddr> {
    environment(name)?.parse().map_err(|_| Wrong(format!("{name} is not an address")))
}

type Check = fn(&Node) -> Checked<String>;

macro_rules! checks {
    ($($module:ident: $($name:ident)*;)*) => {
        const CHECKS: &[(&str, Check)] = &[$($((stringify!($name), $module::$name)),*),*];
    };
}

// The last one looks at what the others have left.
checks! {
    transfers: devices_are_described the_route_has_the_address_that_was_asked_for reads_bring_what_the_source_has
        writes_arrive a_chunk_of_an_odd_length_is_read windows_show_what_they_are_bound_to
        sealed_memory_can_be_a_source dma_bufs_are_refused_where_there_are_none;
    failures: a_wrong_key_is_refused what_lies_behind_the_memory_is_refused a_revoked_key_is_void
        a_source_cannot_be_written_to memory_of_another_domain_is_refused a_dropped_rail_gives_its_spans_back
        a_killed_peer_fails_the_rail a_link_that_goes_down_fails_the_rail;
}

/// Objects that the kernel counts on the device.
fn resources() -> Checked<String> {
    let output = Command::new("rdma").args(["-j", "resource", "show"]).output()?;
    ensure!(output.status.success(), "rdma resource show: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn checks(node: &Node, wanted: &[String]) -> Checked<bool> {
    let before = resources()?;
    let begin = Instant::now();
    let mut all = true;
    let mut report = |name: &str, result: Checked<String>| -> Checked {
        all &= result.is_ok();
        match result {
            Ok(note) => writeln!(io::stdout(), "ok      {:4} s  {name}: {note}", begin.elapsed().as_secs())?,
            Err(Wrong(reason)) => {
                writeln!(io::stdout(), "FAILED  {:4} s  {name}: {reason}", begin.elapsed().as_secs())?;
            }
        }
        Ok(())
    };
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    for (name, check) in CHECKS.iter().filter(|(name, _)| chosen(name)) {
        report(name, check(node))?;
    }
    let mut last = node.connect(Way::Key, transfers::SETTINGS)?;
    last.ask(Ask::Leave)?;
    drop(last);
    node.bury();
    report("nothing_is_left", nothing_is_left(node, &before))?;
    Ok(all)
}

/// Invariants 2 and 11: all spans came back, and the device has as many objects as before.
fn nothing_is_left(node: &Node, before: &str) -> Checked<String> {
    ensure!(node.library.leaked_bytes() == 0, "{} bytes were leaked", node.library.leaked_bytes());
    let after = resources()?;
    ensure!(after == before, "before {before}, after {after}");
    Ok(after)
}

/// Starts the source again until it leaves by itself.
fn supervise() -> Checked<bool> {
    loop {
        let status = Command::new(std::env::current_exe()?).arg("source").stdout(Stdio::null()).status()?;
        if status.success() {
            return Ok(true);
        }
        ensure!(status.code().is_none(), "the source has failed: {status}");
    }
}

fn list(library: &Arc<Library>) -> Checked<bool> {
    let mut out = io::stdout();
    for name in library.devices()? {
        let context = Context::open(library, &name)?;
        writeln!(
            out,
            "{name}: {:?}, NUMA node {:?}, windows: {}",
            context.transport(),
            context.numa_node(),
            context.has_windows()
        )?;
        for port in context.ports()? {
            let speed = port.speed_mbps.map_or("unknown".into(), |speed| format!("{speed} Mbit/s"));
            writeln!(
                out,
                "  port {}: {:?}, {:?}, MTU {}, {speed}",
                port.number, port.state, port.link_layer, port.mtu_bytes
            )?;
            for gid in port.gids {
                let netdev = gid.netdev.unwrap_or_default();
                writeln!(out, "    GID {}: {:?} {:?} {netdev}", gid.index, gid.gid, gid.kind)?;
            }
        }
        match context.route(None) {
            Ok(route) => writeln!(
                out,
                "  route: port {}, GID {} ({})",
                route.port, route.choice.entry.index, route.choice.reason
            )?,
            Err(error) => writeln!(out, "  no route: {error}")?,
        }
    }
    Ok(true)
}

fn run(command: &str, names: &[String]) -> Checked<bool> {
    match command {
        "list" => list(&Library::open(None)?),
        "source" => {
            let node = Node::new()?;
            session::serve(&node.context, node.local).map(|()| true)
        }
        "node" => checks(&Node::new()?, names),
        "pair" if environment("VM_NODE")? == "0" => supervise(),
        "pair" => checks(&Node { peer: address("VM_PEER")?, pair: true, ..Node::new()? }, names),
        "measure" => measure::measure(&Node::new()?).map(|()| true),
        _ => Err(Wrong(USAGE.into())),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((command, names)) = arguments.split_first() else {
        let _ = writeln!(io::stderr(), "{USAGE}");
        return ExitCode::from(2);
    };
    match run(command, names) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Wrong(reason)) => {
            let _ = writeln!(io::stderr(), "verbs-conformance: {reason}");
            ExitCode::FAILURE
        }
    }
}
