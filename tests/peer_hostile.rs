//! Peers that have a good certificate and lie: every kind of wrong number, from either side.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod peer;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use lodestream::Code;
use lodestream::checksum;
use lodestream::peer::Result;
use lodestream::peer::client::Session;
use lodestream::peer::frame::{self, BODY_BYTES_MAX, PREFIX_BYTES};
use lodestream::peer::protocol::{
    CHUNKS_PER_REQUEST_MAX, Digest, HANDLES_MAX, Have, Hello, Rank, Refusal, Reply, Request, State, VERSION,
};
use peer::{Artifact, Node, Serving, later};

const MIB: usize = 1 << 20;

/// The body of the next frame; none at the end.
fn body(stream: &mut impl Read) -> Option<Vec<u8>> {
    let mut prefix = [0; PREFIX_BYTES];
    stream.read_exact(&mut prefix).ok()?;
    let mut body = vec![0; frame::length(prefix, BODY_BYTES_MAX).unwrap()];
    stream.read_exact(&mut body).unwrap();
    Some(body)
}

fn hello(version: u16) -> Vec<u8> {
    let mut out = Vec::new();
    Hello { version, window: 8, node: "hostile".to_owned() }.write(&mut out);
    out
}

/// A frame of any body.
fn raw(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

/// What a server answers to this request.
fn answer(stream: &mut (impl Read + Write), request: &Request) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    request.write(&mut out);
    stream.write_all(&out).unwrap();
    body(stream)
}

fn refusal(body: Option<&[u8]>) -> Refusal {
    match Reply::read(body.unwrap()).unwrap() {
        Reply::Refused(refusal) => refusal,
        other => panic!("answered: {other:?}"),
    }
}

#[test]
fn a_client_with_wrong_numbers_is_refused_and_may_go_on() {
    let (server, client) = Node::pair();
    let serving = Serving::start(&server);
    let artifact = Artifact::new(&[2 * MIB, 0, 5]);
    let offer = artifact.offer_complete();
    serving.offers.insert(Arc::clone(&offer));
    let mut stream = client.raw_client(serving.server.address());
    stream.write_all(&hello(VERSION)).unwrap();
    assert_eq!(Hello::read(&body(&mut stream).unwrap()).unwrap().node, "node-x");

    let open = |stream: &mut _, digest| answer(stream, &Request::Open { digest, rank: later() });
    let opened = open(&mut stream, artifact.digest()).unwrap();
    let Reply::Opened { handle } = Reply::read(&opened).unwrap() else { panic!("not opened") };
    let nothing = Digest([7; 32]);
    let chunk = |handle, file, chunk, count| Request::Chunk { handle, file, chunk, count };
    let cases = [
        (Request::Manifest(nothing), Refusal::NotFound),
        (Request::Open { digest: nothing, rank: later() }, Refusal::NotFound),
        (chunk(handle + 1, 0, 0, 1), Refusal::BadRequest),
        (chunk(u32::MAX, 0, 0, 1), Refusal::BadRequest),
        (chunk(handle, 3, 0, 1), Refusal::BadRequest),
        (chunk(handle, u32::MAX, 0, 1), Refusal::BadRequest),
        (chunk(handle, 0, 2, 1), Refusal::BadRequest),
        (chunk(handle, 0, u32::MAX - 1, 1), Refusal::BadRequest),
        (chunk(handle, 0, u32::MAX, 1), Refusal::BadRequest),
        (chunk(handle, 1, 0, 1), Refusal::BadRequest),
        (chunk(handle, 0, 0, 0), Refusal::BadRequest),
        (chunk(handle, 0, 0, CHUNKS_PER_REQUEST_MAX + 1), Refusal::TooMany),
        (chunk(handle, 0, 0, u16::MAX), Refusal::TooMany),
        (Request::Close { handle: handle + 1 }, Refusal::BadRequest),
    ];
    for (request, expected) in cases {
        assert_eq!(refusal(answer(&mut stream, &request).as_deref()), expected, "{request:?}");
    }

    // More chunks than there are: those that there are, then the refusal.
    let header = answer(&mut stream, &chunk(handle, 0, 1, 5)).unwrap();
    assert_eq!(Reply::read(&header), Ok(Reply::Chunk { bytes: MIB as u32 }));
    let mut bytes = vec![0; MIB];
    stream.read_exact(&mut bytes).unwrap();
    assert!(bytes == artifact.chunk(0, 1));
    assert_eq!(refusal(body(&mut stream).as_deref()), Refusal::BadRequest);

    // A handle of an earlier generation.
    assert_eq!(Reply::read(&answer(&mut stream, &Request::Close { handle }).unwrap()), Ok(Reply::Closed));
    assert_eq!(refusal(answer(&mut stream, &chunk(handle, 0, 0, 1)).as_deref()), Refusal::BadRequest);
    assert_eq!(refusal(answer(&mut stream, &Request::Close { handle }).as_deref()), Refusal::BadRequest);
    for number in 1..=HANDLES_MAX as u32 {
        let opened = open(&mut stream, artifact.digest()).unwrap();
        assert_eq!(
            Reply::read(&opened),
            Ok(Reply::Opened { handle: handle + number }),
            "none is given twice"
        );
    }
    assert_eq!(refusal(open(&mut stream, artifact.digest()).as_deref()), Refusal::TooMany);
    assert_eq!(offer.have().serving, HANDLES_MAX as u32);
    drop(stream);
    serving.idle();
    assert_eq!((offer.have().serving, offer.users()), (0, 0));
    assert_eq!(serving.counters.malformed.load(Ordering::Relaxed), 0);
}

#[test]
fn a_client_that_does_not_keep_to_the_form_is_told_and_closed() {
    let (server, client) = Node::pair();
    let serving = Serving::start(&server);
    let good = || hello(VERSION);
    let cases = [
        ("a length of 0", good(), Some(0u32.to_le_bytes().to_vec())),
        ("a length above that of requests", good(), Some(513u32.to_le_bytes().to_vec())),
        ("the greatest length", good(), Some(u32::MAX.to_le_bytes().to_vec())),
        ("an unknown kind", good(), Some(raw(&[0x42]))),
        ("a reply as a request", good(), Some(raw(&[0x94]))),
        ("a short digest", good(), Some(raw(&[0x10; 32]))),
        ("a long digest", good(), Some(raw(&[0x10; 34]))),
        ("a request without fields", good(), Some(raw(&[0x13]))),
        ("no hello", raw(&[0x14, 0, 0, 0, 0]), None),
        ("a window of 0", raw(&[1, 1, 0, 0, 0]), None),
        ("a name that is none", raw(&[1, 1, 0, 1, 0, 0xff, 0xfe]), None),
        ("a hello that is too long", raw(&[1; 600]), None),
    ];
    let count = cases.len() as u64;
    for (what, hello, after) in cases {
        let mut stream = client.raw_client(serving.server.address());
        stream.write_all(&hello).unwrap();
        if let Some(bytes) = after {
            Hello::read(&body(&mut stream).unwrap()).unwrap();
            // What comes behind it must not take the answer away.
            stream.write_all(&[&bytes[..], &[0xee; 4096]].concat()).unwrap();
        }
        assert_eq!(refusal(body(&mut stream).as_deref()), Refusal::BadRequest, "{what}");
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "{what}: it is not closed");
    }
    let mut stream = client.raw_client(serving.server.address());
    stream.write_all(&hello(VERSION + 1)).unwrap();
    assert_eq!(Hello::read(&body(&mut stream).unwrap()).unwrap().version, VERSION, "told which it speaks");
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    drop(stream);
    serving.idle();
    assert_eq!(serving.counters.malformed.load(Ordering::Relaxed), count);
}

/// A server that reads a hello, and then this many frames, each answered with bytes. Then it goes, or stays silent until the
/// client goes.
struct Liar {
    hello: Vec<u8>,
    answers: Vec<Vec<u8>>,
    stays: bool,
}

/// A client's call that talks to such a server ends with this code, and the session is of no use afterwards.
fn lied_to(what: &str, liar: Liar, expected: Code, call: impl FnOnce(&mut Session) -> Result<()>) {
    let (server, mut client) = Node::pair();
    if expected == Code::PeerTimeout {
        client.config.peer.chunk_timeout_ms = 1000;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = server.raw_server(listener.accept().unwrap().0);
            if body(&mut stream).is_none() {
                return;
            }
            for bytes in std::iter::once(&liar.hello).chain(&liar.answers) {
                // The client may have had enough already.
                let written = stream.write_all(bytes).and_then(|()| stream.flush());
                if written.is_err() || std::ptr::eq(bytes, liar.answers.last().unwrap_or(&liar.hello)) {
                    break;
                }
                if body(&mut stream).is_none() {
                    return;
                }
            }
            if liar.stays {
                while matches!(stream.read(&mut [0; 512]), Ok(1..)) {}
            }
        });
        let mut session = match client.dialer().connect(&address) {
            Ok(session) => session,
            Err(error) => return assert_eq!(error.code(), expected, "{what}: {error}"),
        };
        let error = call(&mut session).unwrap_err();
        assert_eq!(error.code(), expected, "{what}: {error}");
        let after = session.have(&Digest([0; 32])).unwrap_err().code();
        assert_eq!(after, Code::PeerDisconnected, "{what}: the session goes on");
    });
}

fn frames(replies: &[Reply<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    replies.iter().for_each(|reply| reply.write(&mut out));
    out
}

fn liar(answers: Vec<Vec<u8>>, stays: bool) -> Liar {
    Liar { hello: hello(VERSION), answers, stays }
}

#[test]
fn a_server_whose_greeting_is_wrong_is_left() {
    let cases = [
        ("another version", hello(VERSION + 1), true, Code::PeerVersion),
        ("rubbish", raw(b"rubbish"), true, Code::PeerProtocol),
        ("an endless frame", u32::MAX.to_le_bytes().to_vec(), true, Code::PeerProtocol),
        ("busy", frames(&[Reply::Refused(Refusal::Busy)]), false, Code::PeerBusy),
        ("another reply", frames(&[Reply::Closed]), true, Code::PeerProtocol),
        ("nothing", Vec::new(), false, Code::PeerDisconnected),
        ("half a hello", hello(VERSION)[..7].to_vec(), false, Code::PeerDisconnected),
    ];
    for (what, hello, stays, expected) in cases {
        let liar = Liar { hello, answers: Vec::new(), stays };
        lied_to(what, liar, expected, |_| panic!("{what}: it was greeted"));
    }
}

#[test]
fn a_server_that_answers_with_wrong_numbers_is_left() {
    let have = |ready, total| Have {
        state: State::Loading,
        chunks_ready: ready,
        chunks_total: total,
        rank: Rank::default(),
        serving: 0,
    };
    let cases: [(&str, Vec<u8>, bool, Code); 7] = [
        ("more chunks than there are", frames(&[Reply::Have(have(2, 1))]), true, Code::PeerProtocol),
        ("another answer", frames(&[Reply::Opened { handle: 0 }]), true, Code::PeerProtocol),
        ("a state that is none", raw(&[&[0x90, 9][..], &[0; 36]].concat()), true, Code::PeerProtocol),
        ("a length of 0", vec![0; 4], true, Code::PeerProtocol),
        (
            "a length above the limit",
            (BODY_BYTES_MAX as u32 + 1).to_le_bytes().to_vec(),
            true,
            Code::PeerProtocol,
        ),
        ("half an answer", frames(&[Reply::Have(have(1, 1))])[..20].to_vec(), false, Code::PeerDisconnected),
        (
            "half an answer, and silence",
            frames(&[Reply::Have(have(1, 1))])[..20].to_vec(),
            true,
            Code::PeerTimeout,
        ),
    ];
    for (what, answer, stays, expected) in cases {
        lied_to(what, liar(vec![answer], stays), expected, |session| {
            session.have(&Digest([1; 32])).map(drop)
        });
    }
}

#[test]
fn a_manifest_that_is_not_the_one_is_refused() {
    let artifact = Artifact::new(&[5]);
    let good = artifact.manifest.to_bytes().unwrap();
    let length = |bytes: u64| Reply::Manifest { bytes };
    let mut corrupt = good.clone();
    *corrupt.last_mut().unwrap() ^= 1;
    let other = Artifact::new(&[6]).manifest.to_bytes().unwrap();
    let all = good.len() as u64;
    let cases: [(&str, Vec<u8>, bool, Code); 9] = [
        ("no bytes", frames(&[length(0)]), true, Code::PeerProtocol),
        ("the greatest length", frames(&[length(u64::MAX)]), true, Code::PeerProtocol),
        ("a length above the limit", frames(&[length((256 << 20) + 1)]), true, Code::PeerProtocol),
        (
            "more than was said",
            frames(&[length(all - 1), Reply::ManifestPart(&good)]),
            true,
            Code::PeerProtocol,
        ),
        (
            "less than was said",
            frames(&[length(all + 1), Reply::ManifestPart(&good)]),
            true,
            Code::PeerTimeout,
        ),
        ("something in between", frames(&[length(all), Reply::Closed]), true, Code::PeerProtocol),
        (
            "a changed byte",
            frames(&[length(all), Reply::ManifestPart(&corrupt)]),
            true,
            Code::PeerManifestMismatch,
        ),
        (
            "another's",
            frames(&[length(other.len() as u64), Reply::ManifestPart(&other)]),
            true,
            Code::PeerManifestMismatch,
        ),
        ("the end", frames(&[length(all), Reply::ManifestPart(&good[..10])]), false, Code::PeerDisconnected),
    ];
    for (what, answer, stays, expected) in cases {
        let digest = artifact.digest();
        lied_to(what, liar(vec![answer], stays), expected, |session| session.manifest(&digest).map(drop));
    }
}

#[test]
fn a_manifest_with_the_right_digest_that_is_none_is_refused_and_harms_nothing() {
    let (server, client) = Node::pair();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let rubbish = b"{\"version\":1}";
    let answer = frames(&[Reply::Manifest { bytes: rubbish.len() as u64 }, Reply::ManifestPart(rubbish)]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = server.raw_server(listener.accept().unwrap().0);
            for bytes in [&hello(VERSION), &answer, &frames(&[Reply::Closed])] {
                body(&mut stream);
                stream.write_all(bytes).unwrap();
            }
        });
        let mut session = client.dialer().connect(&address).unwrap();
        let digest = {
            use sha2::Digest as _;
            Digest(sha2::Sha256::digest(rubbish).into())
        };
        assert_eq!(session.manifest(&digest).unwrap_err().code(), Code::PeerManifestMismatch);
        // The session went on: what comes is read, and is not what was asked for.
        assert_eq!(session.have(&digest).unwrap_err().code(), Code::PeerProtocol);
    });
}

#[test]
fn chunks_that_are_not_those_of_the_manifest_do_not_count_invariant_6() {
    let artifact = Artifact::new(&[MIB + 5]);
    let opened = || frames(&[Reply::Opened { handle: 3 }]);
    let chunk = |bytes: u32, payload: &[u8]| [frames(&[Reply::Chunk { bytes }]), payload.to_vec()].concat();
    let good = artifact.chunk(0, 1);
    let mut wrong = good.to_vec();
    wrong[2] ^= 1;
    assert_ne!(checksum::chunk(&wrong), checksum::chunk(good));
    let cases: [(&str, Vec<u8>, bool, Code); 9] = [
        ("a changed bit", chunk(5, &wrong), true, Code::PeerChunkMismatch),
        ("another chunk", chunk(5, &artifact.chunk(0, 0)[..5]), true, Code::PeerChunkMismatch),
        ("a byte too few", chunk(4, &good[..4]), true, Code::PeerChunkMismatch),
        ("a byte too many", chunk(6, &[good, &[0]].concat()), true, Code::PeerChunkMismatch),
        ("no bytes", chunk(0, &[]), true, Code::PeerChunkMismatch),
        ("the greatest length", chunk(u32::MAX, &[0; 64]), true, Code::PeerChunkMismatch),
        ("the end in the middle", chunk(5, &good[..3]), false, Code::PeerDisconnected),
        ("silence in the middle", chunk(5, &good[..3]), true, Code::PeerTimeout),
        ("another answer", frames(&[Reply::Closed]), true, Code::PeerProtocol),
    ];
    for (what, answer, stays, expected) in cases {
        lied_to(what, liar(vec![opened(), answer], stays), expected, |session| {
            let handle = session.open(&artifact.manifest, later())?;
            session.request(handle, 0, 1, 1)?;
            session.receive(&mut [0; 5]).map(drop)
        });
    }
    let twice = liar(vec![opened(), opened()], true);
    lied_to("a handle that was given before", twice, Code::PeerProtocol, |session| {
        session.open(&artifact.manifest, later())?;
        session.open(&artifact.manifest, later()).map(drop)
    });
}

#[test]
fn a_session_that_is_misused_says_so_and_sends_nothing() {
    let (server, client) = Node::pair();
    let serving = Serving::start(&server);
    let artifact = Artifact::new(&[2 * MIB]);
    serving.offers.insert(artifact.offer_complete());
    let mut session = serving.connect(&client);
    let mut target = vec![0; MIB];
    let misused = |result: Result<()>| assert_eq!(result.unwrap_err().code(), Code::Internal);
    misused(session.receive(&mut target).map(drop));
    let handle = session.open(&artifact.manifest, later()).unwrap();
    for (file, chunk, count) in
        [(1, 0, 1), (0, 2, 1), (0, 1, 2), (0, u32::MAX, 1), (0, 0, 0), (u32::MAX, 0, 1)]
    {
        misused(session.request(handle, file, chunk, count));
    }
    for _ in 0..session.window() {
        session.request(handle, 0, 0, 1).unwrap();
    }
    misused(session.request(handle, 0, 0, 1));
    misused(session.have(&artifact.digest()).map(drop));
    misused(session.close(handle));
    misused(session.receive(&mut target[1..]).map(drop));
    while session.in_flight() > 0 {
        session.receive(&mut target).unwrap();
    }
    session.close(handle).unwrap();
    misused(session.close(handle));
    misused(session.request(handle, 0, 0, 1));
    session.have(&artifact.digest()).unwrap();
}
