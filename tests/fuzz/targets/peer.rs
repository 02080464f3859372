//! Any bytes as what peers say to each other: a message has one form, and what is no message is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lodestream::peer::frame::{self, BODY_BYTES_MAX, PREFIX_BYTES};
use lodestream::peer::protocol::{Hello, MANIFEST_PART_BYTES, NODE_BYTES_MAX, Reply, Request, VERSION};

/// The body that `write` makes is the one that was read.
fn same(body: &[u8], write: impl FnOnce(&mut Vec<u8>)) {
    let mut out = Vec::new();
    write(&mut out);
    let (prefix, written) = out.split_first_chunk::<PREFIX_BYTES>().expect("a frame has a length");
    assert_eq!(frame::length(*prefix, BODY_BYTES_MAX), Ok(written.len()));
    assert_eq!(written, body, "two ways to write it");
}

fuzz_target!(|bytes: &[u8]| {
    let Some((prefix, body)) = bytes.split_first_chunk::<PREFIX_BYTES>() else { return };
    if let Ok(length) = frame::length(*prefix, BODY_BYTES_MAX) {
        assert!((1..=BODY_BYTES_MAX).contains(&length));
    }
    if let Ok(request) = Request::read(body) {
        same(body, |out| request.write(out));
    }
    if let Ok(reply) = Reply::read(body) {
        match &reply {
            Reply::ManifestPart(part) => assert!((1..=MANIFEST_PART_BYTES).contains(&part.len())),
            Reply::Have(have) => assert!(have.chunks_ready <= have.chunks_total),
            _ => {}
        }
        same(body, |out| reply.write(out));
    }
    if let Ok(hello) = Hello::read(body) {
        assert!(hello.node.len() <= NODE_BYTES_MAX && hello.window > 0);
        if hello.version == VERSION {
            same(body, |out| hello.write(out));
        }
    }
});
