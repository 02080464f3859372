//! `scripts/net` and `scripts/net-proxy`, as tests use them.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part of the harness")]
#![allow(clippy::print_stderr, reason = "what a skipped test has to say")]

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

/// What `scripts/net` exits with where namespaces cannot be made, and where links cannot be slowed.
const NO_NAMESPACES: i32 = 3;
const NO_SHAPING: i32 = 4;

fn script(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}

/// A proxy that spoils connections on demand.
pub struct Proxy {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    address: String,
}

impl Proxy {
    /// One that forwards to this address.
    pub fn start(to: &str) -> Proxy {
        let mut child = Command::new(script("net-proxy"))
            .args(["127.0.0.1:0", to])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening ").unwrap().to_owned();
        Proxy { commands: child.stdin.take().unwrap(), child, answers, address }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Gives a command, such as `cut`; it is in effect afterwards.
    #[track_caller]
    pub fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "ok", "{command}");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hosts of this test alone; they are gone when it goes out of scope.
pub struct Hosts {
    name: String,
}

impl Hosts {
    /// `None`, and a word about it, where they cannot be made.
    pub fn up(name: &str, count: u32) -> Option<Hosts> {
        let hosts = Hosts { name: format!("{name}{}", std::process::id()) };
        let output = hosts.net(&["up", &count.to_string()]);
        if output.status.code() == Some(NO_NAMESPACES) {
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(hosts)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(script("net"));
        command.args(arguments).env("LODESTREAM_NET", &self.name);
        command
    }

    pub fn net(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    #[track_caller]
    pub fn must(&self, arguments: &[&str]) -> String {
        let output = self.net(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Slows a host's link; false, and a word about it, where the kernel cannot.
    #[track_caller]
    pub fn slow(&self, host: &str, rate: &str) -> bool {
        let output = self.net(&["slow", host, rate]);
        if output.status.code() == Some(NO_SHAPING) {
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
            return false;
        }
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        true
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        drop(self.command(&["down"]).output());
    }
}
