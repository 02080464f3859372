//! Sessions between peers: real TCP, real TLS, real memory.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod peer;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lodestream::Code;
use lodestream::peer::client::Session;
use lodestream::peer::offer::Offer;
use lodestream::peer::protocol::{Digest, Rank, State};
use peer::{Artifact, Authority, CLIENT, NOBODY, Node, SERVER, Serving, later, until};

const MIB: usize = 1 << 20;

/// All chunks by this session, with as many requests in flight as there may be.
fn take(session: &mut Session, artifact: &Artifact) -> Vec<Vec<u8>> {
    let handle = session.open(&artifact.manifest, later()).unwrap();
    let mut files: Vec<Vec<u8>> = artifact.files.iter().map(|file| vec![0; file.len()]).collect();
    let mut wanted = artifact.chunks().into_iter();
    let mut more = true;
    while more || session.in_flight() > 0 {
        while more && session.in_flight() < session.window() {
            match wanted.next() {
                Some((file, chunk)) => session.request(handle, file, chunk, 1).unwrap(),
                None => more = false,
            }
        }
        if let Some(next) = session.upcoming() {
            let target = &mut files[next.file as usize][next.chunk as usize * MIB..];
            assert_eq!(session.receive(target).unwrap(), next);
        }
    }
    session.close(handle).unwrap();
    files
}

#[test]
fn an_artifact_comes_whole_and_nothing_is_left_behind_invariant_11() {
    let (server, client) = Node::pair();
    let serving = Serving::start(&server);
    // An empty file, one of one byte, and one whose third chunk straddles two parts of the region.
    let artifact = Artifact::new(&[1, 0, 3 * MIB + 5, MIB]);
    let offer = artifact.offer_complete();
    serving.offers.insert(Arc::clone(&offer));
    let mut session = serving.connect(&client);
    assert_eq!((session.identity(), session.node()), (SERVER, "node-x"));

    let have = session.have(&artifact.digest()).unwrap();
    assert_eq!((have.state, have.chunks_ready, have.chunks_total, have.serving), (State::Complete, 6, 6, 0));
    assert_eq!(session.have(&Digest([0; 32])).unwrap().state, State::None);
    assert_eq!(&session.manifest(&artifact.digest()).unwrap(), &*artifact.manifest);
    assert!(take(&mut session, &artifact) == artifact.files);

    // Several chunks by one request, and the count of connections that have it open.
    let handle = session.open(&artifact.manifest, later()).unwrap();
    assert_eq!(session.have(&artifact.digest()).unwrap().serving, 1);
    session.request(handle, 2, 1, 3).unwrap();
    let mut target = vec![0; MIB];
    for chunk in 1..4 {
        let got = session.receive(&mut target).unwrap();
        assert_eq!((got.file, got.chunk), (2, chunk));
        assert!(target[..got.bytes] == *artifact.chunk(2, chunk));
    }
    assert_eq!(session.in_flight(), 0);
    drop(session);
    serving.idle();
    assert_eq!((offer.have().serving, offer.users()), (0, 0));
    let counted =
        [&serving.counters.chunks, &serving.counters.bytes].map(|count| count.load(Ordering::Relaxed));
    assert_eq!(counted, [6 + 3, (4 * MIB + 6 + 2 * MIB + 5) as u64]);
}

#[test]
fn what_is_sealed_is_served_after_its_memory_was_given_away_and_files_that_are_not_there_are_not_found() {
    let (server, client) = Node::pair();
    let serving = Serving::start(&server);
    let artifact = Artifact::new(&[2 * MIB, 7]);
    let mut memory = artifact.memory();
    artifact.fill_all(&memory);
    let sealed: Vec<_> =
        memory.drain(..).map(|part| Arc::into_inner(part).unwrap().seal().unwrap().0).collect();
    let parts: Vec<_> = sealed.iter().collect();
    let places = [artifact.places[0], None];
    let offer = Offer::sealed(&artifact.manifest, &places, &parts, Rank::default()).unwrap();
    drop(sealed);
    serving.offers.insert(Arc::new(offer));
    let mut session = serving.connect(&client);
    let handle = session.open(&artifact.manifest, Rank::default()).unwrap();
    let mut target = vec![0; MIB];
    session.request(handle, 0, 1, 1).unwrap();
    session.request(handle, 1, 0, 1).unwrap();
    session.receive(&mut target).unwrap();
    assert!(target == artifact.chunk(0, 1));
    assert_eq!(session.receive(&mut target).unwrap_err().code(), Code::PeerNotFound);
    assert_eq!(session.have(&artifact.digest()).unwrap().chunks_total, 2, "a refusal ends no session");
}

#[test]
fn a_chunk_that_is_not_there_yet_is_waited_for_by_those_who_come_later_only() {
    let (mut server, mut client) = Node::pair();
    // Longer than any test: who waits, waits for the chunk.
    (server.config.peer.chunk_timeout_ms, client.config.peer.chunk_timeout_ms) = (600_000, 600_000);
    let serving = Serving::start(&server);
    let artifact = Artifact::new(&[2 * MIB]);
    let memory = artifact.memory();
    let offer = artifact.offer(&memory, later());
    serving.offers.insert(Arc::clone(&offer));
    let mut target = vec![0; MIB];

    let mut session = serving.connect(&client);
    assert_eq!(session.have(&artifact.digest()).unwrap().state, State::Loading);
    for rank in [Rank::default(), later()] {
        let handle = session.open(&artifact.manifest, rank).unwrap();
        session.request(handle, 0, 0, 1).unwrap();
        assert_eq!(session.receive(&mut target).unwrap_err().code(), Code::PeerNotYet);
    }

    let handle = session.open(&artifact.manifest, Rank { started_ms: 1, node: 1 }).unwrap();
    session.request(handle, 0, 1, 1).unwrap();
    session.request(handle, 0, 0, 1).unwrap();
    std::thread::scope(|scope| {
        let received = scope.spawn(|| {
            for chunk in [1, 0] {
                session.receive(&mut target).unwrap();
                assert!(target == artifact.chunk(0, chunk));
            }
        });
        assert!(!received.is_finished(), "nothing has arrived");
        let span = memory[0].claim(0, 1).unwrap();
        assert!(!offer.arrived(0, 0), "somebody may still write to it");
        drop(span);
        for chunk in [0, 1] {
            artifact.fill(&memory, 0, chunk);
            assert!(offer.arrived(0, chunk) && offer.arrived(0, chunk));
        }
        received.join().unwrap();
    });
    assert!(!offer.arrived(0, 2) && !offer.arrived(1, 0) && !offer.arrived(u32::MAX, u32::MAX));
    assert_eq!((offer.have().state, offer.have().chunks_ready), (State::Loading, 2));
    assert!(offer.complete());
    assert_eq!(offer.have().state, State::Complete);
}

#[test]
fn a_chunk_that_does_not_come_is_waited_for_no_longer_than_it_may() {
    let (mut server, client) = Node::pair();
    server.config.peer.chunk_timeout_ms = 100;
    let serving = Serving::start(&server);
    let artifact = Artifact::new(&[MIB]);
    let memory = artifact.memory();
    serving.offers.insert(artifact.offer(&memory, Rank::default()));
    let mut session = serving.connect(&client);
    let handle = session.open(&artifact.manifest, later()).unwrap();
    session.request(handle, 0, 0, 1).unwrap();
    assert_eq!(session.receive(&mut vec![0; MIB]).unwrap_err().code(), Code::PeerNotYet);
}

#[test]
fn an_artifact_that_is_withdrawn_while_it_is_sent_is_gone_and_its_memory_is_free() {
    let (mut server, mut client) = Node::pair();
    (server.config.peer.chunk_timeout_ms, client.config.peer.chunk_timeout_ms) = (600_000, 600_000);
    let serving = Serving::start(&server);
    // More than the kernel's buffers take.
    let artifact = Artifact::new(&[64 * MIB]);
    let memory = artifact.memory();
    artifact.fill_all(&memory);
    let offer = artifact.offer(&memory, Rank::default());
    assert!(offer.complete());
    serving.offers.insert(Arc::clone(&offer));
    let mut session = serving.connect(&client);
    let handle = session.open(&artifact.manifest, later()).unwrap();
    session.request(handle, 0, 0, 64).unwrap();
    let sent = || serving.counters.chunks.load(Ordering::Relaxed);
    until("chunk on its way", || sent() > 0 && offer.users() == 1);
    serving.offers.withdraw(&offer);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (mut target, mut received) = (vec![0; MIB], 0);
    let code = loop {
        match session.receive(&mut target) {
            Ok(got) => {
                assert!(target == artifact.chunk(0, got.chunk));
                received += 1;
            }
            Err(error) => break error.code(),
        }
    };
    assert_eq!(code, Code::PeerGone);
    assert!((1..64).contains(&received), "{received} of 64");
    runtime.block_on(offer.unused());
    assert_eq!(offer.users(), 0);
    let all = memory.iter().all(|part| part.claim(0, part.bytes()).is_some());
    assert!(all, "no view keeps anybody from the memory");
    assert_eq!(session.have(&artifact.digest()).unwrap().state, State::None);
    session.request(handle, 0, 0, 1).unwrap();
    assert_eq!(session.receive(&mut target).unwrap_err().code(), Code::PeerGone);
    assert_eq!(session.open(&artifact.manifest, later()).unwrap_err().code(), Code::PeerNotFound);
    assert_eq!(session.manifest(&artifact.digest()).unwrap_err().code(), Code::PeerNotFound);
    assert!(!offer.arrived(0, 0) && !offer.complete());
}

#[test]
fn a_server_that_is_dropped_ends_its_connections_wherever_they_are() {
    let (mut server, client) = Node::pair();
    (server.config.peer.chunk_timeout_ms, server.config.peer.idle_timeout_ms) = (600_000, 600_000);
    server.config.peer.handshake_timeout_ms = 60_000;
    let serving = Serving::start(&server);
    let (sent, loading) = (Artifact::new(&[64 * MIB]), Artifact::new(&[MIB]));
    let (offer, memory) = (sent.offer_complete(), loading.memory());
    serving.offers.insert(Arc::clone(&offer));
    serving.offers.insert(loading.offer(&memory, Rank::default()));
    let mut idle = serving.connect(&client);
    let _silent = TcpStream::connect(serving.server.address()).unwrap();
    let mut waiting = serving.connect(&client);
    let handle = waiting.open(&loading.manifest, later()).unwrap();
    waiting.request(handle, 0, 0, 1).unwrap();
    let mut taking = serving.connect(&client);
    let handle = taking.open(&sent.manifest, later()).unwrap();
    taking.request(handle, 0, 0, 64).unwrap();
    until("chunk on its way", || offer.users() == 1);
    drop(serving.server);
    assert_eq!(serving.counters.connections.load(Ordering::Relaxed), 0);
    assert_eq!(serving.counters.unauthenticated.load(Ordering::Relaxed), 0);
    assert_eq!((offer.users(), offer.have().serving), (0, 0));
    let mut target = vec![0; MIB];
    let code = loop {
        if let Err(error) = taking.receive(&mut target) {
            break error.code();
        }
    };
    assert_eq!(code, Code::PeerDisconnected);
    assert_eq!(taking.receive(&mut target).unwrap_err().code(), Code::PeerDisconnected, "it stays broken");
    let code = waiting.receive(&mut target).unwrap_err().code();
    assert!([Code::PeerNotYet, Code::PeerDisconnected].contains(&code), "{code}");
    assert_eq!(idle.have(&sent.digest()).unwrap_err().code(), Code::PeerDisconnected);
}

#[test]
fn a_session_can_be_ended_from_another_thread() {
    let (mut server, mut client) = Node::pair();
    (server.config.peer.chunk_timeout_ms, client.config.peer.chunk_timeout_ms) = (600_000, 600_000);
    let serving = Serving::start(&server);
    let artifact = Artifact::new(&[MIB]);
    let memory = artifact.memory();
    let offer = artifact.offer(&memory, Rank::default());
    serving.offers.insert(Arc::clone(&offer));
    let mut session = serving.connect(&client);
    let handle = session.open(&artifact.manifest, later()).unwrap();
    session.request(handle, 0, 0, 1).unwrap();
    let breaker = session.breaker();
    let waiting = std::thread::spawn(move || session.receive(&mut vec![0; MIB]).unwrap_err().code());
    breaker.break_off();
    assert_eq!(waiting.join().unwrap(), Code::PeerDisconnected);
    // The server waits for the chunk still; it looks at the connection when that is there.
    artifact.fill(&memory, 0, 0);
    assert!(offer.arrived(0, 0));
    serving.idle();
}

/// Who trusts whom: the server's certificate and whom it knows, the client's and whom that knows; the client's error.
#[test]
fn only_peers_with_good_certificates_and_known_names_get_a_word_in() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let good = |name| ours.issue(name);
    let cases = [
        ("all is well", good(SERVER), CLIENT, good(CLIENT), SERVER, None),
        (
            "another authority's client",
            good(SERVER),
            CLIENT,
            theirs.issue(CLIENT),
            SERVER,
            Some(Code::PeerTlsHandshake),
        ),
        (
            "another authority's server",
            theirs.issue(SERVER),
            CLIENT,
            good(CLIENT),
            SERVER,
            Some(Code::PeerTlsHandshake),
        ),
        ("an unknown client", good(SERVER), CLIENT, good(NOBODY), SERVER, Some(Code::PeerIdentityRefused)),
        ("an unknown server", good(NOBODY), CLIENT, good(CLIENT), SERVER, Some(Code::PeerIdentityRefused)),
        (
            "a name that only begins alike",
            good("spiffe://example.org/node/server2"),
            CLIENT,
            good(CLIENT),
            SERVER,
            Some(Code::PeerIdentityRefused),
        ),
        ("a wildcard", good(SERVER), CLIENT, good("*.example.org"), SERVER, Some(Code::PeerIdentityRefused)),
        (
            "an expired client",
            good(SERVER),
            CLIENT,
            ours.issue_until(CLIENT, 2020),
            SERVER,
            Some(Code::PeerTlsHandshake),
        ),
        (
            "an expired server",
            ours.issue_until(SERVER, 2020),
            CLIENT,
            good(CLIENT),
            SERVER,
            Some(Code::PeerTlsHandshake),
        ),
    ];
    for (what, server, known_client, client, known_server, expected) in cases {
        let server = Node::new(&ours, &server, &[known_client]);
        let client = Node::new(&ours, &client, &[known_server]);
        let serving = Serving::start(&server);
        let code = client.dialer().connect(&serving.address()).err().map(|error| error.code());
        assert_eq!(code, expected, "{what}");
        serving.idle();
        let failed = serving.counters.handshakes_failed.load(Ordering::Relaxed);
        assert_eq!(failed, u64::from(expected.is_some()), "{what}");
    }
}

#[test]
fn certificates_are_read_again_when_they_change_and_kept_when_the_new_ones_are_broken() {
    let authority = Authority::new();
    let server = Node::new(&authority, &authority.issue(SERVER), &[CLIENT]);
    let client = Node::new(&authority, &authority.issue(CLIENT), &[SERVER, NOBODY]);
    let serving = Serving::start(&server);
    // One that keeps what it has read: the files of the server are what changes.
    let dialer = client.dialer();
    let identity = || dialer.connect(&serving.address()).unwrap().identity().to_owned();
    assert_eq!(identity(), SERVER);
    server.rotate(&authority.issue(NOBODY));
    until("use of the new certificate", || identity() == NOBODY);

    // A key that is not that of the certificate. It is looked at when the one after it is, at the latest.
    let (mut torn, next) = (authority.issue(SERVER), authority.issue(SERVER));
    torn.key = authority.issue(SERVER).key;
    server.rotate(&torn);
    for _ in 0..3 {
        assert_eq!(identity(), NOBODY);
    }
    server.rotate(&next);
    until("use of the certificate after the broken one", || identity() == SERVER);
}

#[test]
fn credentials_that_cannot_be_used_say_which_file() {
    let (server, _) = Node::pair();
    let load =
        |config: &lodestream::config::Peer| lodestream::peer::tls::Credentials::load(config).unwrap_err();
    let rubbish = tempfile::NamedTempFile::new().unwrap();
    let path = rubbish.path().to_owned();
    for (name, part) in [("certificate", 0), ("key", 1), ("ca", 2)] {
        let mut config = server.config.peer.clone();
        let field = [&mut config.certificate, &mut config.key, &mut config.ca].into_iter().nth(part).unwrap();
        *field = Some(path.clone());
        let error = load(&config);
        assert_eq!(error.code(), Code::PeerTlsCredentials, "{name}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{name}: {error}");
        let mut config = server.config.peer.clone();
        *[&mut config.certificate, &mut config.key, &mut config.ca].into_iter().nth(part).unwrap() = None;
        assert!(load(&config).to_string().contains(&format!("peer.{name}")));
    }
}

/// A socket on which the server has said its last, and whether something came before.
fn closed(mut socket: TcpStream) -> Vec<u8> {
    socket.set_read_timeout(Some(peer::WAIT_MAX)).unwrap();
    let mut said = Vec::new();
    match socket.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    said
}

#[test]
fn who_does_not_shake_hands_is_closed_in_time_however_it_goes_about() {
    let (mut server, _) = Node::pair();
    server.config.peer.handshake_timeout_ms = 200;
    let serving = Serving::start(&server);
    let connect = || TcpStream::connect(serving.server.address()).unwrap();

    assert!(closed(connect()).is_empty(), "to the silent nothing is said");

    let mut plain = connect();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n").unwrap();
    assert!(closed(plain).len() < 32, "an alert at most");

    // A byte now and then: the beginning of a handshake that would be good.
    let mut dripping = connect();
    dripping.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let hello = [0x16, 3, 1, 0x3f, 0xff, 1, 0, 0x3f, 0xfb, 3, 3];
    let begin = Instant::now();
    for byte in hello.into_iter().chain(std::iter::repeat(0)) {
        assert!(begin.elapsed() < peer::WAIT_MAX, "it is not closed");
        let written = dripping.write(&[byte]);
        let ended = match dripping.read(&mut [0; 64]) {
            Ok(read) => read == 0,
            Err(error) => ![ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()),
        };
        if ended || written.is_err() {
            break;
        }
    }
    serving.idle();
    assert_eq!(serving.counters.handshakes_failed.load(Ordering::Relaxed), 3);
}

#[test]
fn a_peer_that_never_says_hello_or_asks_nothing_is_closed_in_time() {
    let (mut server, client) = Node::pair();
    (server.config.peer.handshake_timeout_ms, server.config.peer.idle_timeout_ms) = (1500, 500);
    let serving = Serving::start(&server);
    let mut silent = client.raw_client(serving.server.address());
    assert_eq!(silent.read(&mut [0]).map_err(|error| error.kind()), Err(ErrorKind::UnexpectedEof));
    let mut session = serving.connect(&client);
    serving.idle();
    assert_eq!(session.have(&Digest([0; 32])).unwrap_err().code(), Code::PeerDisconnected);
}

#[test]
fn connections_that_have_not_shown_who_they_are_have_their_limit() {
    let (mut server, client) = Node::pair();
    (server.config.peer.unauthenticated_max, server.config.peer.handshake_timeout_ms) = (2, 60_000);
    let serving = Serving::start(&server);
    let connect = || TcpStream::connect(serving.server.address()).unwrap();
    let (first, _second) = (connect(), connect());
    until("two connections", || serving.counters.unauthenticated.load(Ordering::Relaxed) == 2);
    assert!(closed(connect()).is_empty());
    let code = client.dialer().connect(&serving.address()).unwrap_err().code();
    assert_eq!(code, Code::PeerDisconnected);
    assert_eq!(serving.counters.refused.load(Ordering::Relaxed), 2);
    drop(first);
    until("a place", || serving.counters.unauthenticated.load(Ordering::Relaxed) == 1);
    drop(serving.connect(&client));
}

#[test]
fn peers_have_their_limit_and_are_told_so() {
    let (mut server, client) = Node::pair();
    server.config.peer.connections_max = 1;
    let serving = Serving::start(&server);
    let mut first = serving.connect(&client);
    let code = client.dialer().connect(&serving.address()).unwrap_err().code();
    assert_eq!(code, Code::PeerBusy);
    first.have(&Digest([0; 32])).unwrap();
    drop(first);
    serving.idle();
    drop(serving.connect(&client));
}

#[test]
fn nobody_there_is_told_from_nobody_who_answers() {
    let (_, client) = Node::pair();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut hurried = client;
    hurried.config.peer.handshake_timeout_ms = 200;
    let error = hurried.dialer().connect(&address).unwrap_err();
    assert_eq!(error.code(), Code::PeerTimeout);
    drop(listener);
    assert_eq!(hurried.dialer().connect(&address).unwrap_err().code(), Code::PeerConnect);
    assert_eq!(hurried.dialer().connect("no such host:1").unwrap_err().code(), Code::PeerConnect);
}
