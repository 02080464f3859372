//! Values of flags that have a form of their own.

use crate::api::methods::{Selector, SliceSelector};

/// `GLOB`, or `GLOB:DIM:OF:INDEX` for part INDEX of OF along dimension DIM.
pub(super) fn selector(text: &str) -> Result<Selector, String> {
    let fields: Vec<&str> = text.rsplitn(4, ':').collect();
    let [index, of, dim, name] = fields[..] else {
        return Ok(Selector::Glob(text.to_owned()));
    };
    // A name may have colons of its own: only three numbers make a slice.
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if ![index, of, dim].into_iter().all(number) {
        return Ok(Selector::Glob(text.to_owned()));
    }
    let too_large = |what: &str| format!("{what} of the slice is too large");
    let slice = SliceSelector {
        name: name.to_owned(),
        dim: dim.parse().map_err(|_| too_large("DIM"))?,
        of: of.parse().map_err(|_| too_large("OF"))?,
        index: index.parse().map_err(|_| too_large("INDEX"))?,
    };
    if slice.index >= slice.of {
        return Err(format!("INDEX counts from 0 and must be below OF, {}", slice.of));
    }
    Ok(Selector::Slice(slice))
}

/// A duration such as `500ms`, `30s`, `5m`, `1h`, as milliseconds.
pub(super) fn duration_ms(text: &str) -> Result<u64, String> {
    // `ms` before `s`, which it ends with.
    const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
    let parsed = UNITS.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)));
    let (number, factor) = parsed.ok_or("a duration needs a unit: ms, s, m or h")?;
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("a duration is a whole number with a unit, such as 30s".to_owned());
    }
    let number: Option<u64> = number.parse().ok();
    number.and_then(|number| number.checked_mul(factor)).ok_or_else(|| "that is too long".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn glob(text: &str) -> Result<Selector, String> {
        Ok(Selector::Glob(text.to_owned()))
    }

    #[test]
    fn selectors() {
        let slice = SliceSelector { name: "a:*.q".to_owned(), dim: 0, of: 8, index: 3 };
        assert_eq!(selector("a:*.q:0:8:3"), Ok(Selector::Slice(slice)));
        for text in ["*.q_proj.weight", "a:b:c:d", "1:2:3", "x:1:2:", "x:-1:2:0"] {
            assert_eq!(selector(text), glob(text), "{text}");
        }
        assert!(selector("x:0:8:8").is_err());
        assert!(selector("x:0:0:0").is_err());
        assert!(selector("x:4294967296:8:0").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(duration_ms("500ms"), Ok(500));
        assert_eq!(duration_ms("30s"), Ok(30_000));
        assert_eq!(duration_ms("5m"), Ok(300_000));
        assert_eq!(duration_ms("2h"), Ok(7_200_000));
        for text in ["", "30", "s", "1.5s", "+1s", "-1s", "1d", "18446744073709551615h"] {
            assert!(duration_ms(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_them_panic(text in "\\PC{0,30}") {
            let _ = (selector(&text), duration_ms(&text));
        }
    }
}
