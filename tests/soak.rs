//! Ten clients that attach, read, verify and are killed at random, while artifacts are loaded, evicted and replaced.
//!
//! `LODESTREAM_SOAK_SECONDS` (default 20) says for how long; the clients are processes of this same test binary.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a client that cannot go on has failed, and says why"
)]

mod common;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Options};
use common::directory;
use common::model::{self, Model};
use common::wire::{Connection, list, number, text};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

const CLIENTS: usize = 10;
const MODELS: u64 = 4;
const TENSORS: usize = 5;
const TENSOR_BYTES: u64 = 6 << 20;
/// Room for three of the four models of 30 MiB, less what killed clients still hold.
const BUDGET: &str = "128MiB";
const DEFAULT_SECONDS: u64 = 20;
/// What a client is told by its environment: `SOCKET,ROOT,SEED`.
const CLIENT: &str = "LODESTREAM_SOAK_CLIENT";

/// What an attach may be answered with while artifacts come and go. Anything else is a defect.
const EXPECTED: &[&str] = &[
    "artifact.not_resident",
    "job.cancelled",
    "source.file.changed",
    "source.file.not_found",
    "tier.host.over_budget",
];

#[allow(clippy::disallowed_methods, reason = "how a test binary tells itself what it is")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Where in a fixed sequence of numbers a run stands; one seed repeats its choices.
struct Choices(u64);

impl Choices {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn place(root: &Path, index: u64) -> PathBuf {
    root.join(format!("m{index}"))
}

/// The body of a client process; for the test run itself it does nothing.
#[test]
fn client() {
    let Some(told) = variable(CLIENT) else { return };
    let [socket, root, seed] = told.split(',').collect::<Vec<_>>().try_into().unwrap();
    let mut choices = Choices(seed.parse().unwrap());
    loop {
        let Ok(mut connection) = Connection::open(Path::new(socket)) else { return };
        for _ in 0..=choices.below(4) {
            let source = place(Path::new(root), choices.below(MODELS));
            let name = format!("t.{:04}", choices.below(TENSORS as u64));
            let select = (choices.below(3) == 0).then(|| json!([name]));
            let params = match &select {
                Some(select) => json!({"source": source, "select": select}),
                None => json!({"source": source}),
            };
            match connection.attach(&params) {
                Ok(attached) => verify(&attached, select.map(|_| name)),
                Err(failure) if failure.code == "closed" => return,
                Err(failure) => assert!(EXPECTED.contains(&failure.code.as_str()), "{failure:?}"),
            }
        }
    }
}

/// Each tensor holds what the seed in the file's own metadata says: the bytes of one writing, and of no other.
fn verify(attached: &common::wire::Attached, only: Option<String>) {
    let seed: u64 = text(&attached.reply["metadata"]["seed"]).parse().unwrap();
    let names = attached.names();
    assert_eq!(names.len(), if only.is_some() { 1 } else { TENSORS });
    for name in names {
        let expected = model::Tensor::new(name.clone(), "U8", &[TENSOR_BYTES]).contents(seed);
        assert!(attached.tensor(&name) == expected, "WRONG BYTES in {name} of seed {seed}");
    }
}

/// A client process and what tells of its end.
struct Client {
    child: Child,
    pidfd: OwnedFd,
}

impl Client {
    fn spawn(daemon: &Daemon, root: &Path, seed: u64) -> Client {
        let told = format!("{},{},{seed}", daemon.socket.display(), root.display());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["client", "--exact", "--nocapture"])
            .env(CLIENT, told)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        Client { child, pidfd }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Waits for the end of any client, at most for this long. A client ends only when it is killed or has found a defect.
fn watch(clients: &mut [Client], time: Duration) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) };
    let mut fds: Vec<PollFd<'_>> =
        clients.iter().map(|client| PollFd::new(&client.pidfd, PollFlags::IN)).collect();
    if poll(&mut fds, Some(&timeout)).unwrap() == 0 {
        return;
    }
    let ended = fds.iter().position(|fd| !fd.revents().is_empty()).unwrap();
    let mut said = String::new();
    let client = &mut clients[ended];
    client.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    panic!("a client ended by itself with {}:\n{said}", client.child.wait().unwrap());
}

fn model(root: &Path, index: u64, seed: u64) {
    Model::uniform(&place(root, index), seed, TENSORS, TENSOR_BYTES);
}

/// Evicts everything; what its last client has not yet given back is answered with `artifact.leased`.
fn evict_all(daemon: &mut Daemon) {
    daemon.until("everything evicted", |daemon| {
        let mut connection = daemon.connect();
        let reply = connection.call("artifact.list", &json!({})).unwrap();
        let artifacts = list(&reply["artifacts"]);
        for artifact in artifacts {
            let which = match artifact.get("select") {
                Some(select) => json!({"source": artifact["source"], "select": select}),
                None => json!({"source": artifact["source"]}),
            };
            let _ = connection.call("artifact.evict", &which);
        }
        artifacts.is_empty()
    });
}

/// Invariant 9: a client dying costs the daemon nothing.
#[test]
fn clients_killed_at_random_cost_nothing() {
    let seconds = variable("LODESTREAM_SOAK_SECONDS").map_or(DEFAULT_SECONDS, |text| text.parse().unwrap());
    let seed = std::process::id().into();
    eprintln!("soak: {seconds} s, seed {seed}");
    let mut choices = Choices(seed);
    let root = directory();
    for index in 0..MODELS {
        model(root.path(), index, index);
    }
    let mut daemon = Options::new(root.path()).budget(BUDGET).start();
    // What the daemon takes on first use belongs to the state that it must come back to.
    for index in 0..MODELS {
        daemon.connect().load(&place(root.path(), index));
    }
    evict_all(&mut daemon);
    daemon.assert_idle();
    let (fds, memory) = (daemon.fds(), daemon.own_memory());

    let mut clients: Vec<Client> =
        (0..CLIENTS).map(|_| Client::spawn(&daemon, root.path(), choices.below(1 << 30))).collect();
    let (mut done, mut generation) = (BTreeMap::<&str, u32>::new(), MODELS);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut connection = daemon.connect();
    while Instant::now() < end {
        watch(&mut clients, Duration::from_millis(choices.below(60)));
        let index = choices.below(MODELS);
        let source = json!({"source": place(root.path(), index)});
        let what = match choices.below(8) {
            0..3 => {
                let victim = usize::try_from(choices.below(CLIENTS as u64)).unwrap();
                let client = Client::spawn(&daemon, root.path(), choices.below(1 << 30));
                std::mem::replace(&mut clients[victim], client).kill();
                "killed"
            }
            3 | 4 => {
                let _ = connection.call("artifact.evict", &source);
                "evicted"
            }
            5 | 6 => {
                connection.call("artifact.prefetch", &source).map_or_else(
                    |failure| assert!(EXPECTED.contains(&failure.code.as_str()), "{failure:?}"),
                    |_| (),
                );
                "prefetched"
            }
            _ => {
                generation += 1;
                model(root.path(), index, generation);
                "replaced"
            }
        };
        *done.entry(what).or_default() += 1;
        let host = daemon.status()["host"].take();
        let taken =
            number(&host["resident_bytes"]) + number(&host["held_bytes"]) + number(&host["pool_bytes"]);
        assert!(taken <= number(&host["budget_bytes"]), "over budget: {host}");
    }
    for client in clients {
        client.kill();
    }
    drop(connection);
    eprintln!("soak: {done:?}");
    daemon.until("leases given back", |daemon| daemon.status()["leases"] == 0);
    evict_all(&mut daemon);
    daemon.assert_idle();
    assert_eq!(daemon.metric("lodestream_errors_total", &["code=\"internal\""]), 0.0);
    // Looked at until it holds: the last connections of the questions above are still being closed.
    daemon.until("descriptors given back", |daemon| daemon.fds() <= fds);
    // The allocator keeps some of what it was given; a leak would grow with every attach.
    let now = daemon.own_memory();
    assert!(now < memory + (24 << 20), "own memory was {memory} bytes and is {now}");
    assert!(daemon.terminate().success());
}
