//! What peers say to each other, once the TLS handshake has shown who they are.
//!
//! The client sends [`Hello`], the server answers with its own; then the client sends [`Request`]s, and the server answers
//! them in order with [`Reply`]s. `docs/peers.md` has the form of each.

pub use crate::catalog::manifest::Digest;

use super::frame::{self, BODY_BYTES_MAX, Fields, Malformed};

/// Version of the protocol. A server refuses another one with [`Refusal::BadRequest`], after its own hello.
pub const VERSION: u16 = 1;
/// Length of a node's name, bytes: that of a host name.
pub const NODE_BYTES_MAX: usize = 253;
/// Length of a request's or a hello's body, bytes.
pub const REQUEST_BYTES_MAX: usize = 512;
/// Bytes of a manifest in one frame.
pub const MANIFEST_PART_BYTES: usize = 32 << 10;
/// Chunks that one request may ask for.
pub const CHUNKS_PER_REQUEST_MAX: u16 = 64;
/// Artifacts that one connection may have open.
pub const HANDLES_MAX: usize = 64;

/// Where a node stands among those that load one artifact. A total order: only who is lower is waited for, so that nobody
/// waits in a circle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Rank {
    /// When it began to load, milliseconds since the Unix epoch.
    pub started_ms: u64,
    /// A hash of the node's name, for those that began at the same time.
    pub node: u64,
}

/// The first message of each side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Version of the protocol.
    pub version: u16,
    /// Requests that the sender lets be in flight on this connection; at least 1.
    pub window: u16,
    /// Name of the node: for people, not for decisions.
    pub node: String,
}

/// How much of an artifact a peer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing.
    None,
    /// Some chunks, and more to come.
    Loading,
    /// All of what it holds.
    Complete,
}

/// What a peer has of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Have {
    /// How much.
    pub state: State,
    /// Chunks that can be had now.
    pub chunks_ready: u64,
    /// Chunks that there will be.
    pub chunks_total: u64,
    /// Its place among those that load it.
    pub rank: Rank,
    /// Connections that have it open.
    pub serving: u32,
}

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// What is there of an artifact: [`Reply::Have`].
    Have(Digest),
    /// Its manifest: [`Reply::Manifest`], then the bytes in [`Reply::ManifestPart`]s.
    Manifest(Digest),
    /// A handle for its chunks: [`Reply::Opened`].
    Open {
        /// The artifact.
        digest: Digest,
        /// The client's own place among those that load it: it waits only for servers that are lower.
        rank: Rank,
    },
    /// Chunks of one file: for each of them [`Reply::Chunk`] and its bytes. A refusal ends the request.
    Chunk {
        /// From [`Reply::Opened`] on this connection.
        handle: u32,
        /// Number of the file in the manifest.
        file: u32,
        /// The first chunk.
        chunk: u32,
        /// How many; 1 to [`CHUNKS_PER_REQUEST_MAX`].
        count: u16,
    },
    /// The handle is not needed any more: [`Reply::Closed`].
    Close {
        /// From [`Reply::Opened`] on this connection.
        handle: u32,
    },
}

/// Why a request is not answered with what it asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The peer has nothing of it.
    #[error("it does not have it")]
    NotFound,
    /// The peer is loading it and does not have this chunk yet.
    #[error("it does not have the chunk yet")]
    NotYet,
    /// The peer had it when it was opened, and has given it up.
    #[error("it has given the artifact up")]
    Gone,
    /// The peer serves as many connections as it may.
    #[error("it serves as many connections as it may")]
    Busy,
    /// A limit on what one connection may ask for.
    #[error("more was asked for than one connection may have")]
    TooMany,
    /// The request makes no sense.
    #[error("it takes the request for a wrong one")]
    BadRequest,
}

/// (refusal, its number).
const REFUSALS: [(Refusal, u8); 6] = [
    (Refusal::NotFound, 1),
    (Refusal::NotYet, 2),
    (Refusal::Gone, 3),
    (Refusal::Busy, 4),
    (Refusal::TooMany, 5),
    (Refusal::BadRequest, 6),
];

/// (state, its number).
const STATES: [(State, u8); 3] = [(State::None, 0), (State::Loading, 1), (State::Complete, 2)];

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply<'a> {
    /// To [`Request::Have`].
    Have(Have),
    /// To [`Request::Manifest`]: that many bytes follow in parts.
    Manifest {
        /// Length of the manifest.
        bytes: u64,
    },
    /// The next bytes of a manifest; 1 to [`MANIFEST_PART_BYTES`].
    ManifestPart(&'a [u8]),
    /// To [`Request::Open`].
    Opened {
        /// For this connection; never given out twice on it.
        handle: u32,
    },
    /// To [`Request::Chunk`]: that many bytes follow the frame.
    Chunk {
        /// Bytes of the chunk.
        bytes: u32,
    },
    /// To [`Request::Close`].
    Closed,
    /// No.
    Refused(Refusal),
}

/// Numbers of the messages.
mod kind {
    pub(super) const HELLO: u8 = 0x01;
    pub(super) const HAVE: u8 = 0x10;
    pub(super) const MANIFEST: u8 = 0x11;
    pub(super) const OPEN: u8 = 0x12;
    pub(super) const CHUNK: u8 = 0x13;
    pub(super) const CLOSE: u8 = 0x14;
    /// Set in the answers to the requests above.
    pub(super) const REPLY: u8 = 0x80;
    pub(super) const MANIFEST_PART: u8 = 0xa0;
    pub(super) const REFUSED: u8 = 0xff;
}

impl Hello {
    /// Writes it as a frame.
    pub fn write(&self, out: &mut Vec<u8>) {
        frame::write(out, |body| {
            body.push(kind::HELLO);
            body.extend(self.version.to_le_bytes());
            body.extend(self.window.to_le_bytes());
            body.extend(self.node.as_bytes());
        });
    }

    /// Reads a body. Of another version, only that is read: the rest may have another form.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn read(body: &[u8]) -> Result<Hello, Malformed> {
        let mut fields = Fields(body);
        match fields.u8()? {
            kind::HELLO => {}
            other => return Err(Malformed::Kind(other)),
        }
        let version = fields.u16()?;
        if version != VERSION {
            return Ok(Hello { version, window: 1, node: String::new() });
        }
        let window = fields.u16()?;
        if window == 0 {
            return Err(Malformed::Field("window"));
        }
        let node = std::str::from_utf8(fields.0).ok();
        let node =
            node.filter(|name| name.len() <= NODE_BYTES_MAX && name.bytes().all(|b| b.is_ascii_graphic()));
        Ok(Hello { version, window, node: node.ok_or(Malformed::Field("node"))?.to_owned() })
    }
}

impl Rank {
    fn write(self, body: &mut Vec<u8>) {
        body.extend(self.started_ms.to_le_bytes());
        body.extend(self.node.to_le_bytes());
    }

    fn read(fields: &mut Fields<'_>) -> Result<Rank, Malformed> {
        Ok(Rank { started_ms: fields.u64()?, node: fields.u64()? })
    }
}

impl Request {
    /// Writes it as a frame.
    pub fn write(&self, out: &mut Vec<u8>) {
        frame::write(out, |body| match self {
            Request::Have(digest) => {
                body.push(kind::HAVE);
                body.extend(digest.0);
            }
            Request::Manifest(digest) => {
                body.push(kind::MANIFEST);
                body.extend(digest.0);
            }
            Request::Open { digest, rank } => {
                body.push(kind::OPEN);
                body.extend(digest.0);
                rank.write(body);
            }
            Request::Chunk { handle, file, chunk, count } => {
                body.push(kind::CHUNK);
                body.extend(handle.to_le_bytes());
                body.extend(file.to_le_bytes());
                body.extend(chunk.to_le_bytes());
                body.extend(count.to_le_bytes());
            }
            Request::Close { handle } => {
                body.push(kind::CLOSE);
                body.extend(handle.to_le_bytes());
            }
        });
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`Malformed`]. A count that is too large is no form of its own: it is for the server to refuse.
    pub fn read(body: &[u8]) -> Result<Request, Malformed> {
        let mut fields = Fields(body);
        let request = match fields.u8()? {
            kind::HAVE => Request::Have(Digest(fields.array()?)),
            kind::MANIFEST => Request::Manifest(Digest(fields.array()?)),
            kind::OPEN => Request::Open { digest: Digest(fields.array()?), rank: Rank::read(&mut fields)? },
            kind::CHUNK => Request::Chunk {
                handle: fields.u32()?,
                file: fields.u32()?,
                chunk: fields.u32()?,
                count: fields.u16()?,
            },
            kind::CLOSE => Request::Close { handle: fields.u32()? },
            other => return Err(Malformed::Kind(other)),
        };
        fields.end()?;
        Ok(request)
    }
}

impl<'a> Reply<'a> {
    /// Writes it as a frame.
    pub fn write(&self, out: &mut Vec<u8>) {
        frame::write(out, |body| match self {
            Reply::Have(have) => {
                body.push(kind::HAVE | kind::REPLY);
                body.push(number_of(&STATES, &have.state));
                body.extend(have.chunks_ready.to_le_bytes());
                body.extend(have.chunks_total.to_le_bytes());
                have.rank.write(body);
                body.extend(have.serving.to_le_bytes());
            }
            Reply::Manifest { bytes } => {
                body.push(kind::MANIFEST | kind::REPLY);
                body.extend(bytes.to_le_bytes());
            }
            Reply::ManifestPart(bytes) => {
                body.push(kind::MANIFEST_PART);
                body.extend(*bytes);
            }
            Reply::Opened { handle } => {
                body.push(kind::OPEN | kind::REPLY);
                body.extend(handle.to_le_bytes());
            }
            Reply::Chunk { bytes } => {
                body.push(kind::CHUNK | kind::REPLY);
                body.extend(bytes.to_le_bytes());
            }
            Reply::Closed => body.push(kind::CLOSE | kind::REPLY),
            Reply::Refused(refusal) => {
                body.push(kind::REFUSED);
                body.push(number_of(&REFUSALS, refusal));
            }
        });
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn read(body: &'a [u8]) -> Result<Reply<'a>, Malformed> {
        const {
            assert!(MANIFEST_PART_BYTES < BODY_BYTES_MAX, "a part of a manifest fits into a frame");
        }
        const HAVE: u8 = kind::HAVE | kind::REPLY;
        const MANIFEST: u8 = kind::MANIFEST | kind::REPLY;
        const OPENED: u8 = kind::OPEN | kind::REPLY;
        const CHUNK: u8 = kind::CHUNK | kind::REPLY;
        const CLOSED: u8 = kind::CLOSE | kind::REPLY;
        let mut fields = Fields(body);
        let reply = match fields.u8()? {
            HAVE => Reply::Have(Have {
                state: of_number(&STATES, fields.u8()?).ok_or(Malformed::Field("state"))?,
                chunks_ready: fields.u64()?,
                chunks_total: fields.u64()?,
                rank: Rank::read(&mut fields)?,
                serving: fields.u32()?,
            }),
            MANIFEST => Reply::Manifest { bytes: fields.u64()? },
            kind::MANIFEST_PART => {
                let bytes = fields.take(fields.0.len())?;
                if !(1..=MANIFEST_PART_BYTES).contains(&bytes.len()) {
                    return Err(Malformed::Field("length"));
                }
                Reply::ManifestPart(bytes)
            }
            OPENED => Reply::Opened { handle: fields.u32()? },
            CHUNK => Reply::Chunk { bytes: fields.u32()? },
            CLOSED => Reply::Closed,
            kind::REFUSED => {
                Reply::Refused(of_number(&REFUSALS, fields.u8()?).ok_or(Malformed::Field("refusal"))?)
            }
            other => return Err(Malformed::Kind(other)),
        };
        fields.end()?;
        if let Reply::Have(have) = &reply
            && have.chunks_ready > have.chunks_total
        {
            return Err(Malformed::Field("number of chunks"));
        }
        Ok(reply)
    }
}

fn number_of<T: PartialEq>(table: &[(T, u8)], value: &T) -> u8 {
    // Every value is in its table: a test goes through them.
    table.iter().find(|(known, _)| known == value).map_or(0, |(_, number)| *number)
}

fn of_number<T: Copy>(table: &[(T, u8)], number: u8) -> Option<T> {
    table.iter().find(|(_, known)| *known == number).map(|(value, _)| *value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::frame::PREFIX_BYTES;
    use super::*;

    fn ranks() -> impl Strategy<Value = Rank> {
        any::<(u64, u64)>().prop_map(|(started_ms, node)| Rank { started_ms, node })
    }

    fn digests() -> impl Strategy<Value = Digest> {
        any::<[u8; 32]>().prop_map(Digest)
    }

    fn requests() -> impl Strategy<Value = Request> {
        prop_oneof![
            digests().prop_map(Request::Have),
            digests().prop_map(Request::Manifest),
            (digests(), ranks()).prop_map(|(digest, rank)| Request::Open { digest, rank }),
            any::<(u32, u32, u32, u16)>().prop_map(|(handle, file, chunk, count)| Request::Chunk {
                handle,
                file,
                chunk,
                count
            }),
            any::<u32>().prop_map(|handle| Request::Close { handle }),
        ]
    }

    fn haves() -> impl Strategy<Value = Have> {
        let state = proptest::sample::select(STATES.map(|(state, _)| state).to_vec());
        (state, any::<(u64, u64, u32)>(), ranks()).prop_map(|(state, (one, two, serving), rank)| Have {
            state,
            chunks_ready: one.min(two),
            chunks_total: one.max(two),
            rank,
            serving,
        })
    }

    /// The body of the only frame in `out`.
    fn body(out: &[u8]) -> &[u8] {
        let (prefix, body) = out.split_first_chunk::<PREFIX_BYTES>().unwrap();
        assert_eq!(frame::length(*prefix, BODY_BYTES_MAX), Ok(body.len()));
        body
    }

    fn round_trip(reply: &Reply<'_>) {
        let mut out = Vec::new();
        reply.write(&mut out);
        assert_eq!(Reply::read(body(&out)).as_ref(), Ok(reply));
    }

    proptest! {
        #[test]
        fn requests_and_hellos_round_trip(request in requests(), window in 1u16.., node in "[!-~]{0,253}") {
            let mut out = Vec::new();
            request.write(&mut out);
            prop_assert!(body(&out).len() <= REQUEST_BYTES_MAX);
            prop_assert_eq!(Request::read(body(&out)), Ok(request));
            let hello = Hello { version: VERSION, window, node };
            let mut out = Vec::new();
            hello.write(&mut out);
            prop_assert!(body(&out).len() <= REQUEST_BYTES_MAX);
            prop_assert_eq!(Hello::read(body(&out)), Ok(hello));
        }

        #[test]
        fn replies_round_trip(have in haves(), bytes: u64, number: u32, part in prop::collection::vec(any::<u8>(), 1..100)) {
            round_trip(&Reply::Have(have));
            round_trip(&Reply::Manifest { bytes });
            round_trip(&Reply::ManifestPart(&part));
            round_trip(&Reply::Opened { handle: number });
            round_trip(&Reply::Chunk { bytes: number });
        }

        #[test]
        fn arbitrary_bytes_are_a_message_in_its_one_form_or_an_error(body in prop::collection::vec(any::<u8>(), 0..80), kind: u8) {
            let kinds = [0x01, 0x10, 0x11, 0x12, 0x13, 0x14, 0x90, 0x91, 0x92, 0x93, 0x94, 0xa0, 0xff, kind];
            for kind in kinds {
                let mut body = body.clone();
                body.insert(0, kind);
                let mut out = Vec::new();
                if let Ok(request) = Request::read(&body) {
                    request.write(&mut out);
                    prop_assert_eq!(self::body(&out), &body[..]);
                }
                out.clear();
                if let Ok(reply) = Reply::read(&body) {
                    reply.write(&mut out);
                    prop_assert_eq!(self::body(&out), &body[..]);
                }
                drop(Hello::read(&body));
            }
        }

        #[test]
        fn digests_are_written_as_manifests_have_them(digest in digests()) {
            let text = digest.to_string();
            prop_assert_eq!(text.len(), 71);
            prop_assert_eq!(Digest::parse(&text), Some(digest));
            prop_assert_eq!(Digest::parse(&text[..70]), None);
            prop_assert_eq!(Digest::parse(&text.to_uppercase()), None);
        }
    }

    #[test]
    fn every_refusal_and_reply_without_fields_round_trips() {
        round_trip(&Reply::Closed);
        for (refusal, _) in REFUSALS {
            round_trip(&Reply::Refused(refusal));
        }
    }

    #[test]
    fn wrong_numbers_are_refused() {
        let mut have = vec![0x90, 1];
        have.extend(5u64.to_le_bytes());
        have.extend(4u64.to_le_bytes());
        have.extend([0; 20]);
        assert_eq!(Reply::read(&have), Err(Malformed::Field("number of chunks")));
        assert_eq!(Reply::read(&[0xa0]), Err(Malformed::Field("length")));
        assert_eq!(Reply::read(&[0xff, 0]), Err(Malformed::Field("refusal")));
        assert_eq!(Reply::read(&vec![0xa0; MANIFEST_PART_BYTES + 2]), Err(Malformed::Field("length")));
        assert_eq!(Request::read(&[0x14, 0, 0, 0]), Err(Malformed::Short));
        assert_eq!(Request::read(&[0x14, 0, 0, 0, 0, 0]), Err(Malformed::Trailing));
        assert_eq!(Request::read(&[0x15]), Err(Malformed::Kind(0x15)));
        assert_eq!(Hello::read(&[1, 1, 0, 0, 0]), Err(Malformed::Field("window")));
        assert_eq!(Hello::read(&[1, 1, 0, 1, 0, b' ']), Err(Malformed::Field("node")));
        let other = Hello::read(&[1, 2, 0]).unwrap();
        assert_eq!(other.version, 2, "of another version, only that is read");
    }
}
