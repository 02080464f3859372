//! JSON objects as they are written: every pair, in order, duplicates included.
//!
//! A map type would keep the last of two equal keys in silence; the strict readers must see both to refuse them.
//! The number of pairs kept is bounded by the type, so that a small text cannot become a large table.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

/// The pairs of one object.
pub(crate) struct Pairs<V> {
    /// The first pairs, at most as many as were asked for.
    pub(crate) list: Vec<(String, V)>,
    /// The object has more pairs than were asked for.
    pub(crate) more: bool,
}

impl<V> Pairs<V> {
    /// Reads `text`, one whole JSON object, keeping at most `pairs_max` pairs.
    pub(crate) fn parse<'de>(text: &'de str, pairs_max: usize) -> serde_json::Result<Pairs<V>>
    where
        V: Deserialize<'de>,
    {
        let mut json = serde_json::Deserializer::from_str(text);
        let pairs = Seed { pairs_max, value: PhantomData }.deserialize(&mut json)?;
        json.end()?;
        Ok(pairs)
    }

    /// The first key that is there twice.
    pub(crate) fn duplicate(&self) -> Option<&str> {
        let mut seen = HashSet::with_capacity(self.list.len());
        self.list.iter().map(|(key, _)| key.as_str()).find(|key| !seen.insert(*key))
    }
}

struct Seed<V> {
    pairs_max: usize,
    value: PhantomData<V>,
}

impl<'de, V: Deserialize<'de>> DeserializeSeed<'de> for Seed<V> {
    type Value = Pairs<V>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Pairs<V>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, V: Deserialize<'de>> Visitor<'de> for Seed<V> {
    type Value = Pairs<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<V>, A::Error> {
        let mut pairs = Pairs { list: Vec::new(), more: false };
        while pairs.list.len() < self.pairs_max {
            match map.next_entry()? {
                Some(pair) => pairs.list.push(pair),
                None => return Ok(pairs),
            }
        }
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            pairs.more = true;
        }
        Ok(pairs)
    }
}

/// A name from outside, fit for a message: control characters escaped, cut to a length that a reader can take in.
pub(crate) fn shown(name: &str) -> String {
    const CHARS_MAX: usize = 120;
    let mut chars = name.escape_debug();
    let mut shown: String = chars.by_ref().take(CHARS_MAX).collect();
    if chars.next().is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_duplicates_and_order() {
        let pairs = Pairs::<u8>::parse(r#"{"b":1,"a":2,"\u0062":3}"#, 10).unwrap();
        assert_eq!(pairs.list, [("b".to_owned(), 1), ("a".to_owned(), 2), ("b".to_owned(), 3)]);
        assert_eq!(pairs.duplicate(), Some("b"), "an escaped key is the same key");
        assert!(!pairs.more);
    }

    #[test]
    fn stops_keeping_at_the_limit_and_still_reads_to_the_end() {
        let pairs = Pairs::<u8>::parse(r#"{"a":1,"b":2,"c":[{}]}"#, 2).unwrap();
        assert_eq!(pairs.list.len(), 2);
        assert!(pairs.more);
        assert!(!Pairs::<u8>::parse(r#"{"a":1,"b":2}"#, 2).unwrap().more);
        assert!(Pairs::<u8>::parse(r#"{"a":1,"b":2,"c":}"#, 2).is_err());
    }

    #[test]
    fn refuses_what_follows_the_object() {
        assert!(Pairs::<u8>::parse("{} {}", 2).is_err());
        assert!(Pairs::<u8>::parse("{} \r\n\t", 2).is_ok());
    }

    #[test]
    fn shown_names_are_short_and_printable() {
        assert_eq!(shown("a\n\0b"), "a\\n\\0b");
        assert!(shown(&"x".repeat(5000)).chars().count() <= 121);
    }
}
