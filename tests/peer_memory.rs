//! What a connection may take of the daemon's memory before its other end has shown who it is.
#![allow(clippy::unwrap_used, reason = "a test that cannot set up has failed")]

mod peer;

use std::alloc::System;
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::Ordering;

use lodestream::peer::server::UNAUTHENTICATED_BYTES_MAX;
use peer::{Node, Serving, WAIT_MAX};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CONNECTIONS: usize = 8;

/// All but the end of the longest handshake message that the TLS library takes, in records.
fn unfinished() -> Vec<u8> {
    let message = [&[1, 0, 0xff, 0xf0, 3, 3][..], &[0; 0xff00]].concat();
    message
        .chunks(16 << 10)
        .flat_map(|part| [&[0x16, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat())
        .collect()
}

#[test]
fn who_has_not_shown_who_it_is_takes_little_memory() {
    let (mut server, _) = Node::pair();
    server.config.peer.handshake_timeout_ms = 2000;
    let serving = Serving::start(&server);
    let bytes = unfinished();
    let mut clients: Vec<_> =
        (0..CONNECTIONS).map(|_| TcpStream::connect(serving.server.address()).unwrap()).collect();
    // Not a byte is allocated here while it is looked at.
    let region = Region::new(ALLOCATOR);
    for client in &mut clients {
        client.set_write_timeout(Some(WAIT_MAX)).unwrap();
        // The server may have had enough before it has all of it.
        let _ = client.write_all(&bytes);
    }
    let mut most = 0;
    while serving.counters.handshakes_failed.load(Ordering::Relaxed) < CONNECTIONS as u64 {
        let change = region.change();
        most = most.max(change.bytes_allocated.saturating_sub(change.bytes_deallocated));
    }
    let each = most / CONNECTIONS;
    println!("{each} bytes of heap for each connection");
    assert!(each >= 64 << 10, "the server has not taken what it was sent");
    let stack = 256 << 10;
    assert!(each <= UNAUTHENTICATED_BYTES_MAX - stack, "{each} bytes for each connection");
    serving.idle();
}
