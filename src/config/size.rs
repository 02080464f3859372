//! Sizes as people write them: `4GiB`, `512MiB`, plain bytes.
//!
//! Binary units only: `4GB` and `4G` mean different things to different people, so they are refused.

use std::fmt;

use serde::Serializer;

/// What is allowed, for error messages.
pub const ALLOWED: &str =
    "bytes as a plain number, or with one of the units KiB, MiB, GiB, TiB (such as 4GiB)";

/// Units, largest first, with their power of two.
const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

/// Bytes of a text such as `4GiB`, `4 GiB` or `4294967296`; nothing if it is malformed or exceeds 64 bits.
pub fn parse(text: &str) -> Option<u64> {
    let text = text.trim();
    let (number, shift) = UNITS
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?.trim_end(), *shift)))
        .unwrap_or((text, 0));
    // `u64::from_str` would take a leading plus sign.
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Prints a size in the largest unit that divides it: what [`parse`] reads back.
#[derive(Debug, Clone, Copy)]
pub struct Size(pub u64);

impl Size {
    fn in_unit(self) -> Option<(u64, &'static str)> {
        let fits = |(_, shift): &&(&str, u32)| self.0 != 0 && self.0.is_multiple_of(1 << *shift);
        UNITS.iter().find(fits).map(|(unit, shift)| (self.0 >> shift, *unit))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.in_unit() {
            Some((number, unit)) => write!(f, "{number}{unit}"),
            None => write!(f, "{}", self.0),
        }
    }
}

/// `#[serde(serialize_with)]`: a text with a unit, or a number where no unit divides it.
pub fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    match Size(*bytes).in_unit() {
        Some(_) => serializer.collect_str(&Size(*bytes)),
        None => serializer.serialize_u64(*bytes),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_units_and_plain_numbers() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4KiB", 4096),
            (" 4 GiB ", 4 << 30),
            ("512MiB", 512 << 20),
            ("2TiB", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_ambiguous_malformed_or_too_large() {
        for text in [
            "",
            "GiB",
            "4GB",
            "4G",
            "4gib",
            "-1",
            "+1",
            "1.5GiB",
            "4GiBs",
            "4 4GiB",
            "1e9",
            "0x10",
            "18446744073709551616",
            "16777216TiB",
            "٤GiB",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(mantissa in any::<u64>(), shift in 0u32..50) {
            let bytes = mantissa << shift;
            prop_assert_eq!(parse(&Size(bytes).to_string()), Some(bytes));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,24}") {
            if let Some(bytes) = parse(&text) {
                prop_assert_eq!(parse(&Size(bytes).to_string()), Some(bytes));
            }
        }

        #[test]
        fn units_multiply_or_overflow(number in any::<u64>(), unit in 0usize..4) {
            let (name, shift) = UNITS[unit];
            let exact = u128::from(number) << shift;
            prop_assert_eq!(parse(&format!("{number}{name}")).map(u128::from), u64::try_from(exact).ok().map(u128::from));
        }
    }
}
