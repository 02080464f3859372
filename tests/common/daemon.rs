//! The daemon under test: started, waited for, looked at from outside, killed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use serde_json::Value;

use super::tenant::{self, NOBODY};
use super::wire::{Connection, number};

/// How long any state may take to come about.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Between two looks at a state that the daemon does not announce.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// How to start a daemon.
pub struct Options {
    flags: Vec<String>,
    config: Option<String>,
    socket: Option<PathBuf>,
    nobody: bool,
    io_uring_refused: bool,
    notify: Option<PathBuf>,
    environment: Vec<(String, String)>,
}

impl Options {
    /// Flags that every test wants: a small budget and no ready pool; later ones add to them.
    pub fn new(root: &Path) -> Options {
        let flags = ["--root", root.to_str().unwrap(), "--log-format", "json"].map(str::to_owned).to_vec();
        let options = Options {
            flags,
            config: None,
            socket: None,
            nobody: false,
            io_uring_refused: false,
            notify: None,
            environment: Vec::new(),
        };
        options.flags(&["--ready-pool", "0"])
    }

    pub fn flags(mut self, flags: &[&str]) -> Options {
        self.flags.extend(flags.iter().map(|flag| (*flag).to_owned()));
        self
    }

    pub fn budget(self, budget: &str) -> Options {
        self.flags(&["--host-budget", budget])
    }

    /// A ready pool, where tests have none.
    #[allow(dead_code, reason = "not every test file needs it")]
    pub fn pool(mut self, pool: &str) -> Options {
        let at = self.flags.iter().position(|flag| flag == "--ready-pool").unwrap();
        pool.clone_into(&mut self.flags[at + 1]);
        self
    }

    /// A configuration file with these lines of TOML.
    pub fn config(mut self, toml: &str) -> Options {
        self.config = Some(toml.to_owned());
        self
    }

    /// The socket is there instead of in a directory of the daemon's own.
    pub fn socket(mut self, path: &Path) -> Options {
        self.socket = Some(path.to_owned());
        self
    }

    /// The daemon runs as `nobody`. Needs root.
    pub fn nobody(mut self) -> Options {
        self.nobody = true;
        self
    }

    /// Where systemd would want to be told of readiness.
    #[allow(dead_code, reason = "not every test file needs it")]
    pub fn notify(mut self, socket: &Path) -> Options {
        self.notify = Some(socket.to_owned());
        self
    }

    /// More variables for the daemon alone.
    #[allow(dead_code, reason = "not every test file needs it")]
    pub fn environment(mut self, variables: &[(&str, &str)]) -> Options {
        self.environment
            .extend(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self
    }

    pub fn io_uring_refused(mut self) -> Options {
        self.io_uring_refused = true;
        self
    }

    /// Starts it and waits until it is ready.
    pub fn start(self) -> Daemon {
        let mut daemon = self.spawn();
        daemon.until("readiness", |daemon| {
            daemon.try_connect().is_some_and(|mut connection| {
                connection.call("node.status", &Value::Object(Default::default())).unwrap()["state"]
                    == "ready"
            })
        });
        daemon
    }

    /// Starts it and waits until it has ended: (status, what it wrote).
    pub fn start_and_fail(self) -> (ExitStatus, String) {
        let mut daemon = self.spawn();
        let status = daemon.ended();
        (status, daemon.log())
    }

    fn spawn(self) -> Daemon {
        // Below the system's directory for temporary files: the path of a Unix socket has 107 bytes at most.
        let directory = super::directory_for_everyone();
        let socket = self.socket.unwrap_or_else(|| directory.path().join("socket"));
        let log = File::create(directory.path().join("log")).unwrap();
        let metrics = own_address();
        let binary = if self.nobody {
            tenant::binary_for_everyone(directory.path())
        } else {
            PathBuf::from(env!("CARGO_BIN_EXE_lodestream"))
        };
        let mut command = Command::new(binary);
        command.arg("serve").arg("--socket").arg(&socket);
        command.arg("--state-dir").arg(directory.path().join("state"));
        command.arg("--metrics-listen").arg(metrics.to_string()).args(&self.flags);
        if let Some(config) = &self.config {
            let path = directory.path().join("config.toml");
            fs::write(&path, config).unwrap();
            command.arg("--config").arg(path);
        }
        if let Some(socket) = &self.notify {
            command.env("NOTIFY_SOCKET", socket);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if self.nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = if self.io_uring_refused {
            tenant::spawn_without_io_uring(&mut command)
        } else {
            command.spawn().unwrap()
        };
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        Daemon { child, pidfd, socket, metrics, directory, status: None }
    }
}

/// An address that no other daemon has: the loopback network is large enough for one for each process.
pub fn own_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let port = NEXT.fetch_add(1, Ordering::Relaxed);
    SocketAddr::from((Ipv4Addr::new(127, high | 0x80, middle, low), port))
}

/// A running daemon; killed when it goes out of scope.
pub struct Daemon {
    child: Child,
    pidfd: OwnedFd,
    metrics: SocketAddr,
    directory: tempfile::TempDir,
    status: Option<ExitStatus>,
    pub socket: PathBuf,
}

impl Daemon {
    /// A daemon with 512 MiB for models below `root`.
    pub fn start(root: &Path) -> Daemon {
        Options::new(root).budget("512MiB").start()
    }

    pub fn connect(&self) -> Connection {
        Connection::open(&self.socket).unwrap()
    }

    fn try_connect(&self) -> Option<Connection> {
        Connection::open(&self.socket).ok()
    }

    /// Looks until `condition` holds; fails when the daemon ends or the time is over.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut condition: impl FnMut(&Daemon) -> bool) {
        let deadline = Instant::now() + WAIT_MAX;
        while !condition(self) {
            assert!(!self.wait_for_end(&LOOK), "the daemon ended before {what}:\n{}", self.log());
            assert!(Instant::now() < deadline, "no {what} within {WAIT_MAX:?}:\n{}", self.log());
        }
    }

    /// Whether the daemon ends within this time.
    fn wait_for_end(&self, time: &Timespec) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut fds, Some(time)).unwrap() > 0
    }

    /// Waits until the daemon has ended by itself.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        if self.status.is_none() {
            let long = Timespec { tv_sec: i64::try_from(WAIT_MAX.as_secs()).unwrap(), tv_nsec: 0 };
            assert!(self.wait_for_end(&long), "the daemon did not end:\n{}", self.log());
            self.status = Some(self.child.wait().unwrap());
        }
        self.status.unwrap()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.ended();
    }

    /// SIGTERM: the daemon drains; how it ended.
    pub fn terminate(&mut self) -> ExitStatus {
        rustix::process::pidfd_send_signal(&self.pidfd, Signal::TERM).unwrap();
        self.ended()
    }

    /// Changes the configuration file and has it read again.
    #[allow(dead_code, reason = "not every test file needs it")]
    pub fn reload(&self, toml: &str) {
        fs::write(self.directory.path().join("config.toml"), toml).unwrap();
        rustix::process::pidfd_send_signal(&self.pidfd, Signal::HUP).unwrap();
    }

    /// Its state directory.
    #[allow(dead_code, reason = "not every test file needs it")]
    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// The reply to `node.status`, on a connection of its own.
    pub fn status(&self) -> Value {
        self.connect().call("node.status", &Value::Object(Default::default())).unwrap()
    }

    /// A number of the host tier in the status.
    pub fn host(&self, field: &str) -> u64 {
        number(&self.status()["host"][field])
    }

    /// A page of the metrics listener: (status line, body).
    pub fn page(&self, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.metrics).unwrap();
        stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    /// Sum of all series of a metric whose labels contain each of `labels` (`code="x"`).
    #[track_caller]
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let (_, body) = self.page("/metrics");
        let series: Vec<f64> = body
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '))
            .filter(|(series, _)| series.split('{').next() == Some(name))
            .filter(|(series, _)| labels.iter().all(|label| series.contains(label)))
            .map(|(_, value)| value.parse().unwrap())
            .collect();
        assert!(body.contains(name.trim_end_matches("_total")), "no metric {name}");
        series.into_iter().sum()
    }

    /// Its open descriptors.
    pub fn fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Resident bytes of the process itself: without regions and pool, which are shared memory.
    pub fn own_memory(&self) -> u64 {
        fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .unwrap()
            .lines()
            .filter(|line| line.starts_with("RssAnon:") || line.starts_with("RssFile:"))
            .map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10)
            .sum()
    }

    /// Invariant 11: with one connection for the question and nothing else, every gauge of use is at zero.
    #[track_caller]
    pub fn assert_idle(&mut self) {
        self.until("an idle daemon", |daemon| {
            let status = daemon.status();
            ["connections", "leases", "jobs"].map(|field| number(&status[field])) == [1, 0, 0]
                && ["resident_bytes", "held_bytes"].iter().all(|field| number(&status["host"][*field]) == 0)
        });
        for gauge in [
            "lodestream_leases",
            "lodestream_jobs",
            "lodestream_resident_bytes",
            "lodestream_held_bytes",
            "lodestream_artifacts",
            "lodestream_shard_queue_depth",
            "lodestream_shard_reads_in_flight",
            "lodestream_shard_slots_in_use_bytes",
            "lodestream_staging_leaked_bytes_total",
        ] {
            assert_eq!(self.metric(gauge, &[]), 0.0, "{gauge} of an idle daemon");
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the daemon ---\n{}", self.log());
        }
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
