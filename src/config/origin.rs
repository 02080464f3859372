//! A value with the place it came from, and the checks that turn its text into a value.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::{ConfigError, size};

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A flag of `lodestream serve`.
    Flag(&'static str),
    /// A variable of the environment.
    Environment(&'static str),
    /// A line of the file, from 1.
    File(PathBuf, usize),
    /// Nothing was given.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Flag(flag) => write!(f, "from {flag}"),
            Origin::Environment(variable) => write!(f, "from {variable} in the environment"),
            Origin::File(path, line) => write!(f, "from {}:{line}", path.display()),
            Origin::Default => f.write_str("the default"),
        }
    }
}

/// A text that was given for a key.
#[derive(Debug, Clone)]
pub(super) struct Given {
    pub(super) key: &'static str,
    pub(super) text: String,
    pub(super) origin: Origin,
}

impl Given {
    /// The error that says what is allowed instead.
    pub(super) fn invalid(&self, allowed: impl Into<String>) -> ConfigError {
        ConfigError::Invalid {
            key: self.key,
            value: self.text.clone(),
            origin: self.origin.clone(),
            allowed: allowed.into(),
        }
    }

    /// A number in this range.
    pub(super) fn integer(&self, range: &RangeInclusive<u64>) -> Result<u64, ConfigError> {
        self.text
            .parse()
            .ok()
            .filter(|number| range.contains(number))
            .ok_or_else(|| self.invalid(format!("a number from {} to {}", range.start(), range.end())))
    }

    /// A size in this range.
    pub(super) fn size(&self, range: &RangeInclusive<u64>) -> Result<u64, ConfigError> {
        size::parse(&self.text).filter(|bytes| range.contains(bytes)).ok_or_else(|| {
            let (least, most) = (size::Size(*range.start()), size::Size(*range.end()));
            self.invalid(format!("{}, from {least} to {most}", size::ALLOWED))
        })
    }

    /// `true` or `false`; also `1` or `0`, as variables of the environment are often written.
    pub(super) fn truth(&self) -> Result<bool, ConfigError> {
        match self.text.as_str() {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(self.invalid("true or false")),
        }
    }

    /// One of these words.
    pub(super) fn word<T: Copy>(&self, words: &[(&str, T)]) -> Result<T, ConfigError> {
        let found = words.iter().find(|(word, _)| *word == self.text);
        found.map(|(_, value)| *value).ok_or_else(|| {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.invalid(words.join(", "))
        })
    }

    /// An absolute path without NUL.
    pub(super) fn absolute_path(&self) -> Result<PathBuf, ConfigError> {
        if self.text.starts_with('/') && !self.text.contains('\0') {
            Ok(PathBuf::from(&self.text))
        } else {
            Err(self.invalid("an absolute path"))
        }
    }
}
