//! `scripts/net` makes hosts on one machine whose links are cut, slowed and restored; `scripts/net-proxy` spoils connections.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

#[path = "common/net.rs"]
mod net;

use net::{Hosts, Proxy};

/// Answers every connection with the number of the host, and says when it listens.
const SERVER: &str = "
import socket, sys
server = socket.create_server((sys.argv[1], 9000), backlog=8)
print('listening', flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(sys.argv[1].encode())
    connection.close()
";
/// Prints what a server says; fails if it cannot be reached.
const CLIENT: &str = "
import socket, sys
with socket.create_connection((sys.argv[1], 9000), timeout=float(sys.argv[2])) as connection:
    print(connection.recv(100).decode())
";

fn namespaces(name: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|entry| entry.starts_with(&format!("{name}-"))).collect()
}

fn interfaces() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/class/net").unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn three_hosts_reach_each_other_until_one_is_cut_off_and_nothing_is_left_of_them() {
    let own = interfaces();
    let Some(hosts) = Hosts::up("t", 3) else { return };
    hosts.must(&["up", "3"]);
    assert_eq!(interfaces(), own, "the machine's own network is left alone");
    let mut servers: Vec<_> = ["1", "2", "3"]
        .map(|host| {
            let address = format!("10.77.0.{host}");
            let mut command = hosts.command(&["exec", host, "python3", "-c", SERVER, &address]);
            let mut server = command.stdout(Stdio::piped()).spawn().unwrap();
            let mut line = String::new();
            BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
            assert_eq!(line, "listening\n");
            server
        })
        .into();
    let ask = |from: &str, to: &str, seconds: &str| {
        let address = format!("10.77.0.{to}");
        let output = hosts.net(&["exec", from, "python3", "-c", CLIENT, &address, seconds]);
        output
            .status
            .success()
            .then(|| assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), address))
            .is_some()
    };
    for (from, to) in [("1", "2"), ("2", "3"), ("3", "1"), ("1", "1")] {
        assert!(ask(from, to, "20"), "{from} → {to}");
    }

    hosts.must(&["cut", "2"]);
    assert!(!ask("1", "2", "0.3") && !ask("2", "3", "0.3"), "host 2 is cut off");
    assert!(ask("1", "3", "20"), "the others are not");
    hosts.must(&["restore", "2"]);
    assert!(ask("1", "2", "20") && ask("2", "3", "20"), "host 2 is back");

    if hosts.slow("3", "8mbit") {
        let shaping = || hosts.must(&["exec", "3", "tc", "qdisc", "show", "dev", "eth0"]);
        assert!(shaping().contains("tbf") && shaping().contains("rate 8Mbit"), "{}", shaping());
        assert!(ask("3", "1", "20"));
        hosts.must(&["restore", "3"]);
        assert!(!shaping().contains("tbf"), "{}", shaping());
    }

    hosts.must(&["down"]);
    for server in &mut servers {
        assert!(!server.wait().unwrap().success(), "what ran there was ended");
    }
    assert_eq!(namespaces(hosts.name()), [""; 0]);
    assert_eq!(interfaces(), own);
    hosts.must(&["down"]);
    let output = hosts.net(&["exec", "1", "true"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    let net = |arguments: &[&str], name: &str| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/net");
        let output = Command::new(script).args(arguments).env("LODESTREAM_NET", name).output().unwrap();
        output.status.code()
    };
    for arguments in [
        &[][..],
        &["up"],
        &["up", "0"],
        &["up", "251"],
        &["up", "1;true"],
        &["exec", "1"],
        &["exec", "x", "true"],
        &["cut"],
        &["cut", "../1"],
        &["slow", "1"],
        &["down", "1"],
        &["fly", "1"],
    ] {
        assert_eq!(net(arguments, "t"), Some(2), "{arguments:?}");
    }
    for name in ["../t", "T", "t t", "-t"] {
        assert_eq!(net(&["down"], name), Some(2), "{name}");
    }
}

/// A server that sends back what it gets, a connection at a time.
fn echo() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut reader = connection.try_clone().unwrap();
            // A connection that was cut ends with an error.
            let _ = std::io::copy(&mut reader, &mut connection);
        }
    });
    address
}

#[test]
fn a_proxy_forwards_corrupts_stalls_and_cuts() {
    let mut proxy = Proxy::start(&echo());
    let connect = |proxy: &Proxy| TcpStream::connect(proxy.address()).unwrap();
    let say = |connection: &mut TcpStream, text: &[u8]| -> std::io::Result<Vec<u8>> {
        connection.write_all(text)?;
        let mut answer = vec![0; text.len()];
        connection.read_exact(&mut answer)?;
        Ok(answer)
    };
    let mut connection = connect(&proxy);
    assert_eq!(say(&mut connection, b"hello").unwrap(), b"hello");
    proxy.tell("rate 1000000");
    assert_eq!(say(&mut connection, &[7; 100_000]).unwrap(), [7; 100_000]);
    proxy.tell("rate 0");

    proxy.tell("corrupt");
    assert_eq!(say(&mut connection, b"hello").unwrap(), b"iello");
    assert_eq!(say(&mut connection, b"hello").unwrap(), b"hello");

    proxy.tell("stall");
    connection.set_nonblocking(true).unwrap();
    let stalled = say(&mut connection, b"hello").unwrap_err();
    assert_eq!(stalled.kind(), std::io::ErrorKind::WouldBlock);
    connection.set_nonblocking(false).unwrap();
    proxy.tell("go");
    let mut answer = [0; 5];
    connection.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");

    proxy.tell("cut");
    assert!(say(&mut connection, b"hello").is_err());
    assert!(say(&mut connect(&proxy), b"hello").is_err());
    proxy.tell("restore");
    assert_eq!(say(&mut connect(&proxy), b"hello").unwrap(), b"hello");
}
