//! What stands in etcd: `<prefix>/artifacts/<digest>/<node>` → a small JSON object. Nothing that is read is trusted: whoever can write
//! below the prefix can write anything.

use serde::{Deserialize, Serialize};

use super::{Address, Holding, State, Tier};

/// Version of the values that are written and read.
pub(super) const VERSION: u32 = 1;
/// Longest value that is looked at, bytes: three times the longest that is written.
const VALUE_BYTES_MAX: usize = 1024;
/// Most chunks of an artifact: 4 PiB of them.
const CHUNKS_MAX: u64 = 1 << 32;
/// Length of a node's name, as in the configuration.
const NODE_BYTES_MAX: usize = 253;
/// Hexadecimal digits of a SHA-256.
const DIGEST_DIGITS: usize = 64;

/// What one node has of one artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) address: Address,
    pub(super) holding: Holding,
}

/// Why something in etcd is not taken in.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("the key is not <digest>/<node>")]
    Key,
    #[error("the value is longer than {VALUE_BYTES_MAX} bytes")]
    TooLong,
    #[error("the value is not the JSON of an entry")]
    NotEntry,
    #[error("version {0} of the value is not known")]
    Version(u32),
    #[error("the address is not one that can be connected to")]
    Address,
    #[error("it counts more than {CHUNKS_MAX} chunks")]
    Chunks,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    version: u32,
    address: String,
    state: State,
    tier: Tier,
    chunks: u64,
    rank: u64,
}

impl Entry {
    /// The value to write.
    pub(super) fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let Holding { state, tier, chunks, rank } = self.holding;
        let address = self.address.as_str().to_owned();
        serde_json::to_vec(&Wire { version: VERSION, address, state, tier, chunks, rank })
    }

    /// Reads a value.
    pub(super) fn parse(value: &[u8]) -> Result<Entry, Refused> {
        if value.len() > VALUE_BYTES_MAX {
            return Err(Refused::TooLong);
        }
        // First, so that a later version is called that, whatever fields it has.
        let Versioned { version } = serde_json::from_slice(value).map_err(|_| Refused::NotEntry)?;
        if version != VERSION {
            return Err(Refused::Version(version));
        }
        let wire: Wire = serde_json::from_slice(value).map_err(|_| Refused::NotEntry)?;
        if wire.chunks > CHUNKS_MAX {
            return Err(Refused::Chunks);
        }
        let Wire { state, tier, chunks, rank, .. } = wire;
        let address = Address::parse(&wire.address).map_err(|_| Refused::Address)?;
        Ok(Entry { address, holding: Holding { state, tier, chunks, rank } })
    }
}

/// The part of a key after `<prefix>/artifacts/`: (digest, node). A digest has no slash, so that a node's name may.
pub(super) fn parse_key(key: &[u8]) -> Result<(&str, &str), Refused> {
    let text = str::from_utf8(key).map_err(|_| Refused::Key)?;
    text.split_once('/').filter(|(digest, node)| is_digest(digest) && is_node(node)).ok_or(Refused::Key)
}

/// Whether this is `sha256:` and 64 lower-case hexadecimal digits.
pub(super) fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|digits| {
        digits.len() == DIGEST_DIGITS && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

fn is_node(text: &str) -> bool {
    (1..=NODE_BYTES_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> Entry {
        let holding = Holding { state: State::Loading, tier: Tier::Gpu, chunks: 7, rank: 3 };
        Entry { address: Address::parse("node-a:7443").unwrap(), holding }
    }

    fn value(change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) -> Vec<u8> {
        let mut value: serde_json::Map<_, _> = serde_json::from_slice(&entry().to_json().unwrap()).unwrap();
        change(&mut value);
        serde_json::to_vec(&value).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let written = entry().to_json().unwrap();
        let expected =
            r#"{"version":1,"address":"node-a:7443","state":"loading","tier":"gpu","chunks":7,"rank":3}"#;
        assert_eq!(str::from_utf8(&written).unwrap(), expected, "other daemons read this form");
        assert_eq!(Entry::parse(&written), Ok(entry()));
        let most = Holding { state: State::Complete, tier: Tier::Nvme, chunks: CHUNKS_MAX, rank: u64::MAX };
        let name = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61)].join(".");
        let longest = Entry { address: Address::parse(&format!("{name}:65535")).unwrap(), holding: most };
        let written = longest.to_json().unwrap();
        assert!(written.len() <= VALUE_BYTES_MAX / 2, "{}", written.len());
        assert_eq!(Entry::parse(&written), Ok(longest));
    }

    #[test]
    fn values_that_are_no_entry_are_refused_each_with_its_reason() {
        let refused = |value: &[u8]| Entry::parse(value).unwrap_err();
        for text in
            ["", "[]", "null", "{", "\u{0}", "{\"version\":\"1\"}", "{\"version\":-1}", "{\"version\":1}"]
        {
            assert_eq!(refused(text.as_bytes()), Refused::NotEntry, "{text}");
        }
        assert_eq!(refused(&[0xff, 0xfe]), Refused::NotEntry);
        assert_eq!(refused(&vec![b' '; VALUE_BYTES_MAX + 1]), Refused::TooLong);
        assert_eq!(refused(&value(|v| drop(v.insert("version".into(), 2.into())))), Refused::Version(2));
        assert_eq!(refused(br#"{"version":7,"what":["else"]}"#), Refused::Version(7));
        assert_eq!(
            refused(&value(|v| drop(v.insert("address".into(), "0.0.0.0:1".into())))),
            Refused::Address
        );
        assert_eq!(refused(&value(|v| drop(v.insert("address".into(), "".into())))), Refused::Address);
        assert_eq!(
            refused(&value(|v| drop(v.insert("chunks".into(), (CHUNKS_MAX + 1).into())))),
            Refused::Chunks
        );
        for (field, wrong) in
            [("chunks", "-1"), ("chunks", "1.5"), ("rank", "-1"), ("rank", "18446744073709551616")]
        {
            let wrong: serde_json::Value = serde_json::from_str(wrong).unwrap();
            assert_eq!(refused(&value(|v| drop(v.insert(field.into(), wrong.clone())))), Refused::NotEntry);
        }
        for (field, wrong) in [("state", "done"), ("tier", "tape"), ("rkey", "1")] {
            assert_eq!(refused(&value(|v| drop(v.insert(field.into(), wrong.into())))), Refused::NotEntry);
        }
        assert_eq!(refused(&value(|v| drop(v.remove("rank")))), Refused::NotEntry);
        let twice = String::from_utf8(value(|_| ())).unwrap().replace("\"rank\":3", "\"rank\":3,\"rank\":4");
        assert_eq!(refused(twice.as_bytes()), Refused::NotEntry);
    }

    #[test]
    fn keys_are_a_digest_and_a_node() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let key =
            |key: &str| parse_key(key.as_bytes()).map(|(digest, node)| (digest.to_owned(), node.to_owned()));
        assert_eq!(key(&format!("{digest}/a")), Ok((digest.clone(), "a".to_owned())));
        assert_eq!(key(&format!("{digest}/rack/a")), Ok((digest.clone(), "rack/a".to_owned())));
        let upper = digest.to_uppercase();
        let long = format!("{digest}/{}", "n".repeat(254));
        for wrong in
            ["", "/", &digest, &format!("{digest}/"), &format!("{digest}0/a"), &format!("{upper}/a"), &long]
        {
            assert_eq!(key(wrong), Err(Refused::Key), "{wrong}");
        }
        assert_eq!(key(&format!("{digest}/a b")), Err(Refused::Key));
        assert_eq!(parse_key(&[0xff]), Err(Refused::Key));
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic(value in proptest::collection::vec(any::<u8>(), 0..64), text in ".{0,120}") {
            drop(Entry::parse(&value));
            drop(Entry::parse(text.as_bytes()));
            drop(parse_key(&value));
            drop(parse_key(text.as_bytes()));
        }
    }
}
