//! `*.safetensors.index.json`: which shard holds which tensor. Pure; strict.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::error::Code;
use crate::json::{Pairs, shown};

/// Members of the outer object that are read at most; stock writers have two.
const MEMBERS_MAX: usize = 64;
/// Longest name of a shard, bytes: the limit of Linux file systems.
const NAME_BYTES_MAX: usize = 255;

/// What is wrong with an index.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Longer than the limit of headers.
    #[error("the index has {bytes} bytes, more than the limit of {bytes_max}")]
    TooLarge {
        /// Its length.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// Not a JSON object in UTF-8.
    #[error("the index is not a JSON object: {why}")]
    NotJson {
        /// What the parser says.
        why: String,
    },
    /// The same key twice.
    #[error("the index has the key '{}' twice", shown(key))]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// No `weight_map`, or not one of strings to strings, or an empty one.
    #[error("the index has no usable weight_map: {why}")]
    BadWeightMap {
        /// Why.
        why: String,
    },
    /// A shard name that is not a plain file name.
    #[error("the index names the shard '{}', which is not a plain file name", shown(name))]
    BadName {
        /// The name.
        name: String,
    },
    /// More tensors than allowed.
    #[error("the index names more than {tensors_max} tensors, the limit")]
    TooManyTensors {
        /// The limit.
        tensors_max: u64,
    },
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::TooLarge { .. } => Code::CatalogIndexTooLarge,
            Error::NotJson { .. } => Code::CatalogIndexNotJson,
            Error::DuplicateKey { .. } => Code::CatalogIndexDuplicateKey,
            Error::BadWeightMap { .. } => Code::CatalogIndexBadWeightMap,
            Error::BadName { .. } => Code::CatalogIndexBadName,
            Error::TooManyTensors { .. } => Code::CatalogTooManyTensors,
        };
        crate::Error::new(code, error.to_string())
    }
}

/// The shards that an index names, each with the names of its tensors, both sorted.
///
/// # Errors
/// [`Error`] for anything but a JSON object whose `weight_map` maps at least one tensor, and at most
/// `tensors_max`, to plain file names, with no key twice.
pub fn parse(text: &[u8], tensors_max: u64) -> Result<BTreeMap<String, Vec<String>>, Error> {
    let not_json = |why: &dyn std::fmt::Display| Error::NotJson { why: why.to_string() };
    let text = std::str::from_utf8(text).map_err(|error| not_json(&error))?;
    let members = Pairs::<&RawValue>::parse(text, MEMBERS_MAX).map_err(|error| not_json(&error))?;
    if let Some(key) = members.duplicate() {
        return Err(Error::DuplicateKey { key: key.to_owned() });
    }
    if members.more {
        return Err(not_json(&format_args!("more than {MEMBERS_MAX} members")));
    }
    let bad_map = |why: String| Error::BadWeightMap { why };
    let map = members.list.iter().find(|(key, _)| key == "weight_map");
    let (_, map) = map.ok_or_else(|| bad_map("it is missing".to_owned()))?;
    let pairs_max = usize::try_from(tensors_max).unwrap_or(usize::MAX);
    let weights = Pairs::<String>::parse(map.get(), pairs_max).map_err(|error| bad_map(error.to_string()))?;
    if let Some(key) = weights.duplicate() {
        return Err(Error::DuplicateKey { key: key.to_owned() });
    }
    if weights.more {
        return Err(Error::TooManyTensors { tensors_max });
    }
    if weights.list.is_empty() {
        return Err(bad_map("it is empty".to_owned()));
    }
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weights.list {
        if !is_plain(&shard) {
            return Err(Error::BadName { name: shard });
        }
        shards.entry(shard).or_default().push(tensor);
    }
    shards.values_mut().for_each(|tensors| tensors.sort_unstable());
    Ok(shards)
}

/// Whether `name` is the name of a file right in its directory.
pub(super) fn is_plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= NAME_BYTES_MAX && !name.contains(['/', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STOCK: &str = r#"{
      "metadata": {"total_size": 24, "total_parameters": 6},
      "weight_map": {"b": "m-00001-of-00002.safetensors", "a": "m-00001-of-00002.safetensors",
                     "c": "m-00002-of-00002.safetensors"}
    }"#;

    #[test]
    fn groups_tensors_by_shard() {
        let shards = parse(STOCK.as_bytes(), 3).unwrap();
        assert_eq!(
            shards.keys().collect::<Vec<_>>(),
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
        );
        assert_eq!(shards["m-00001-of-00002.safetensors"], ["a", "b"]);
    }

    #[test]
    fn each_fault_has_its_code() {
        use Code::*;
        let long = format!(r#"{{"weight_map":{{"a":"{}"}}}}"#, "x".repeat(256));
        let many = format!("{{{}\"weight_map\":{{\"a\":\"b\"}}}}", members(64));
        let cases: &[(&str, Code)] = &[
            ("", CatalogIndexNotJson),
            ("\u{feff}{}", CatalogIndexNotJson),
            ("[]", CatalogIndexNotJson),
            (r#"{"weight_map":{"a":"b"}} x"#, CatalogIndexNotJson),
            (r#"{"weight_map":{"a":"b"}"#, CatalogIndexNotJson),
            (&many, CatalogIndexNotJson),
            ("{}", CatalogIndexBadWeightMap),
            (r#"{"weight_map":[]}"#, CatalogIndexBadWeightMap),
            (r#"{"weight_map":{}}"#, CatalogIndexBadWeightMap),
            (r#"{"weight_map":{"a":1}}"#, CatalogIndexBadWeightMap),
            (r#"{"weight_map":{"a":null}}"#, CatalogIndexBadWeightMap),
            (r#"{"weight_map":{"a":"b"},"weight_map":{"a":"b"}}"#, CatalogIndexDuplicateKey),
            (r#"{"weight_map":{"a":"b","\u0061":"c"}}"#, CatalogIndexDuplicateKey),
            (r#"{"weight_map":{"a":""}}"#, CatalogIndexBadName),
            (r#"{"weight_map":{"a":".."}}"#, CatalogIndexBadName),
            (r#"{"weight_map":{"a":"/etc/shadow"}}"#, CatalogIndexBadName),
            (r#"{"weight_map":{"a":"../b.safetensors"}}"#, CatalogIndexBadName),
            (r#"{"weight_map":{"a":"b\u0000"}}"#, CatalogIndexBadName),
            (&long, CatalogIndexBadName),
            (r#"{"weight_map":{"a":"x","b":"x","c":"x","d":"x"}}"#, CatalogTooManyTensors),
        ];
        for (text, code) in cases {
            assert_eq!(crate::Error::from(parse(text.as_bytes(), 3).unwrap_err()).code, *code, "{text}");
        }
        assert_eq!(crate::Error::from(parse(b"{\"a\xff\":1}", 3).unwrap_err()).code, CatalogIndexNotJson);
    }

    fn members(count: usize) -> String {
        (0..count).map(|member| format!("\"m{member}\":0,")).collect()
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,80}") {
            let _ = parse(text.as_bytes(), 100);
        }

        #[test]
        fn every_tensor_lands_in_its_shard(
            map in proptest::collection::btree_map(".{0,8}", "[a-c]{1,2}", 1..20),
        ) {
            let text = serde_json::json!({"weight_map": map}).to_string();
            let shards = parse(text.as_bytes(), 20).unwrap();
            let back: BTreeMap<String, String> = shards
                .iter()
                .flat_map(|(shard, tensors)| tensors.iter().map(|tensor| (tensor.clone(), shard.clone())))
                .collect();
            prop_assert_eq!(back, map);
        }
    }
}
