//! What may be written as a text or as an object, and as nothing else.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use super::{FdSource, Selector, SliceSelector, Source};

/// An untagged enum would be derived to take an array of the object's fields as well, which the schema does not allow.
struct TextOr<O, T> {
    expecting: &'static str,
    text: fn(String) -> T,
    object: fn(O) -> T,
}

impl<'de, O: Deserialize<'de>, T> Visitor<'de> for TextOr<O, T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        Ok((self.text)(text.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        O::deserialize(MapAccessDeserializer::new(map)).map(self.object)
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "a URI, or an object with \"fds\"";
        let visitor: TextOr<FdSource, Source> = TextOr { expecting, text: Source::Uri, object: Source::Fds };
        deserializer.deserialize_any(visitor)
    }
}

impl<'de> Deserialize<'de> for Selector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "a glob, or an object with \"name\", \"dim\", \"of\" and \"index\"";
        let visitor: TextOr<SliceSelector, Selector> =
            TextOr { expecting, text: Selector::Glob, object: Selector::Slice };
        deserializer.deserialize_any(visitor)
    }
}
