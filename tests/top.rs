//! `lodestream top` against a real daemon: in a real terminal, as text, as JSON; and what its questions tell whom.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod common;

use std::fs::File;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Options};
use common::model::Model;
use common::wire::{list, number, text};
use common::{directory, root_or_skip, tenant};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Action, LocalModes, Winsize, tcflow, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const WAIT_MAX: Duration = Duration::from_secs(60);

fn at_least_one(cells: u16) -> NonZeroU16 {
    NonZeroU16::new(cells).unwrap()
}

/// The end of a terminal that programs have.
fn inner_end(terminal: &OwnedFd) -> File {
    let path = ptsname(terminal, Vec::new()).unwrap();
    File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path.to_str().unwrap()).unwrap()
}

/// A terminal with `lodestream top` in it.
struct Screen {
    terminal: OwnedFd,
    parser: vt100::Parser,
    child: Child,
}

impl Screen {
    fn start(daemon: &Daemon, columns: u16, lines: u16) -> Screen {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let inner = inner_end(&terminal);
        // A session of its own with this as its terminal, so that a new size is signalled.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait", env!("CARGO_BIN_EXE_lodestream"), "--socket"]).arg(&daemon.socket);
        command.args(["top", "--interval", "100ms"]).env("TERM", "xterm-256color");
        command.stdin(Stdio::from(inner.try_clone().unwrap()));
        command.stdout(Stdio::from(inner.try_clone().unwrap())).stderr(Stdio::from(inner));
        let mut screen = Screen {
            terminal,
            parser: vt100::Parser::new(at_least_one(lines), at_least_one(columns), 0),
            child: {
                let child = command.spawn().unwrap();
                drop(command);
                child
            },
        };
        screen.resize(columns, lines);
        screen
    }

    fn resize(&mut self, columns: u16, lines: u16) {
        let size = Winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.terminal, size).unwrap();
        self.parser.set_size(at_least_one(lines), at_least_one(columns));
    }

    /// Reads what is drawn until the screen says so.
    #[track_caller]
    fn until(&mut self, what: &str, condition: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let shown = self.parser.screen().contents();
            if condition(&shown) {
                return shown;
            }
            assert!(Instant::now() < deadline, "no {what} in\n{shown}");
            assert!(self.read(), "it ended before {what}:\n{shown}");
        }
    }

    /// Takes in what was drawn, if anything comes soon. `false`: the other end is closed.
    fn read(&mut self) -> bool {
        let mut fds = [PollFd::new(&self.terminal, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).unwrap() == 0 {
            return true;
        }
        let mut buffer = [0; 4096];
        match rustix::io::read(&self.terminal, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::IO) => false,
            Ok(count) => {
                self.parser.process(&buffer[..count]);
                true
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn keys(&mut self, keys: &[u8]) {
        assert_eq!(rustix::io::write(&self.terminal, keys).unwrap(), keys.len());
    }

    /// Takes in what is drawn until the process has ended.
    fn ended(&mut self) -> ExitStatus {
        while self.read() {}
        self.child.wait().unwrap()
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Whether the terminal echoes and gives lines: what a shell finds, or has to repair.
    fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.terminal).unwrap().local_modes;
        modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn top_shows_a_real_daemon_in_a_real_terminal_and_outlives_it() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 40, 2, 4 * MIB);
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("s");
    let mut daemon = Options::new(root.path()).budget("512MiB").socket(&socket).start();
    let mut client = daemon.connect();
    client.call("hello", &json!({"client": "a-test 1"})).unwrap();
    client.attach(&json!({"source": model.path})).unwrap();
    let mut screen = Screen::start(&daemon, 120, 30);
    let path = model.path.to_str().unwrap().to_owned();
    // The last line is drawn last: with it, the frame is whole.
    let whole = |shown: &str| shown.contains(&path) && shown.contains("a-test 1") && shown.contains("q quit");
    let shown = screen.until("the artifact", whole);
    assert!(shown.contains("artifacts: 1"), "{shown}");
    screen.keys(b"\t\ts");
    screen.until("a sorted list", |shown| shown.contains("NAME▼"));
    screen.resize(40, 8);
    screen.until("a word about the size", |shown| shown.contains("too small"));
    screen.resize(100, 24);
    screen.until("the lists again", |shown| shown.contains("artifacts: 1"));
    daemon.kill();
    screen.until("a word that the daemon is away", |shown| {
        shown.contains("the daemon closed") || shown.contains("cannot reach")
    });
    drop(daemon);
    let _daemon = Options::new(root.path()).budget("512MiB").socket(&socket).start();
    screen.until("the new daemon", |shown| shown.contains("artifacts: 0") && !shown.contains("cannot reach"));
    screen.keys(b"q");
    assert!(screen.ended().success());
    assert!(screen.is_cooked());
}

#[test]
fn a_signal_ends_it_and_the_terminal_is_as_it_was() {
    let root = directory();
    let daemon = Daemon::start(root.path());
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let mut screen = Screen::start(&daemon, 100, 24);
        screen.until("the lists", |shown| shown.contains("artifacts: 0"));
        assert!(!screen.is_cooked() && screen.parser.screen().alternate_screen());
        // Hidden after the frame that was waited for.
        while !screen.parser.screen().hide_cursor() {
            assert!(screen.read(), "{signal:?}: it ended by itself");
        }
        screen.send(signal);
        assert!(screen.ended().success(), "{signal:?}");
        assert!(screen.is_cooked(), "{signal:?} leaves the terminal raw");
        assert!(
            !screen.parser.screen().alternate_screen() && !screen.parser.screen().hide_cursor(),
            "{signal:?}"
        );
    }
}

#[test]
fn a_terminal_that_takes_nothing_or_is_gone_keeps_no_process() {
    let root = directory();
    let daemon = Daemon::start(root.path());
    let mut screen = Screen::start(&daemon, 100, 24);
    screen.until("the lists", |shown| shown.contains("artifacts: 0"));
    tcflow(inner_end(&screen.terminal), Action::OOff).unwrap();
    screen.send(Signal::TERM);
    assert_eq!(screen.child.wait().unwrap().code(), Some(1));
    assert!(screen.is_cooked());

    let mut screen = Screen::start(&daemon, 100, 24);
    screen.until("the lists", |shown| shown.contains("artifacts: 0"));
    // Nobody has the other end any more.
    screen.terminal = File::open("/dev/null").unwrap().into();
    // By SIGHUP or by the error of a write, whichever it sees first; not by a panic.
    assert_eq!(screen.child.wait().unwrap().signal(), None);
}

fn top(daemon: &Daemon, arguments: &[&str]) -> Vec<u8> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lodestream"));
    let output =
        command.arg("--socket").arg(&daemon.socket).args(["top", "--interval", "100ms"]).args(arguments);
    let output = output.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[test]
fn one_frame_as_text_and_as_json_for_scripts() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 41, 2, 4 * MIB);
    let daemon = Daemon::start(root.path());
    let mut client = daemon.connect();
    client.attach(&json!({"source": model.path})).unwrap();
    assert_eq!(client.code("job.get", &json!({"job": 999})), "job.not_found");
    let frame = String::from_utf8(top(&daemon, &["--once"])).unwrap();
    for part in [model.path.to_str().unwrap(), "jobs: 0 running", "done", "job.not_found"] {
        assert!(frame.contains(part), "no {part} in\n{frame}");
    }
    let document: Value = serde_json::from_slice(&top(&daemon, &["--json"])).unwrap();
    assert_eq!(list(&document["artifacts"]).len(), 1);
    assert!(document["rates"]["seconds"].as_f64().unwrap() >= 0.1);
    let clients = list(&document["status"]["clients"]);
    let held: Vec<&Value> = clients.iter().filter(|client| client["leases"] == 1).collect();
    assert_eq!(held.len(), 1);
    assert_eq!(number(&held[0]["leased_bytes"]), number(&document["artifacts"][0]["bytes"]));
    assert_eq!(number(&held[0]["process"]), u64::from(std::process::id()));
    // A pipe is no terminal.
    let mut command = Command::new(env!("CARGO_BIN_EXE_lodestream"));
    let refused =
        command.arg("--socket").arg(&daemon.socket).arg("top").stdin(Stdio::null()).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn a_lease_that_is_given_back_and_a_client_that_goes_are_not_counted() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 42, 1, MIB);
    let mut daemon = Daemon::start(root.path());
    let mut client = daemon.connect();
    let attached = client.call("artifact.attach", &json!({"source": model.path})).unwrap();
    let leases = |daemon: &Daemon| -> Vec<(u64, u64)> {
        let status = daemon.status();
        let clients = list(&status["clients"]);
        clients.iter().map(|client| (number(&client["leases"]), number(&client["leased_bytes"]))).collect()
    };
    let size = number(&attached["regions"][0]["bytes"]);
    assert_eq!(leases(&daemon), [(1, size), (0, 0)], "the client, and who asks");
    client.call("lease.release", &json!({"lease": attached["lease"]})).unwrap();
    assert_eq!(leases(&daemon)[0], (0, 0));
    drop(client);
    daemon.until("a client that has gone", |daemon| leases(daemon).len() == 1);
}

#[test]
fn a_tenant_sees_its_own_connections_and_no_counters() {
    if !root_or_skip() {
        return;
    }
    let root = directory();
    let daemon = Daemon::start(root.path());
    let _mine = daemon.connect();
    let status = tenant::as_nobody(|| daemon.status());
    let clients = list(&status["clients"]);
    assert_eq!(clients.len(), 1, "not that of the tests' own user");
    assert_eq!(text(&clients[0]["tenant"]), format!("uid:{}", tenant::NOBODY));
    for hidden in ["drives", "links", "errors", "preload"] {
        assert!(list(&status[hidden]).is_empty(), "{hidden}");
    }
    let topology = daemon.connect().call("node.topology", &json!({})).unwrap();
    assert_eq!(list(&daemon.status()["drives"]).len(), list(&topology["drives"]).len());
}
