//! The three places that a value can come from, and which of them wins: flag, environment, file.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use toml::Spanned;

use super::ConfigError;
use super::flags::{CONFIG_ENV, Name, ServeArgs};
use super::origin::{Given, Origin};
use super::raw::{Field, RawConfig, Scalar};

/// Most bytes of a configuration file: a thousand times a long one.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Looks a variable up. An argument, so that tests need not change the environment of their process.
pub(super) type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// What turns places into [`Given`] values.
pub(super) struct Layers<'a> {
    environment: Environment<'a>,
    path: PathBuf,
    text: String,
}

impl<'a> Layers<'a> {
    /// Reads the file, if one is named.
    pub(super) fn read(
        args: &ServeArgs,
        environment: Environment<'a>,
    ) -> Result<(Layers<'a>, RawConfig), ConfigError> {
        let named = args
            .config
            .clone()
            .or_else(|| environment(CONFIG_ENV).filter(|value| !value.is_empty()).map(PathBuf::from));
        let Some(path) = named else {
            return Ok((
                Layers { environment, path: PathBuf::new(), text: String::new() },
                RawConfig::default(),
            ));
        };
        let text =
            read_text(&path).map_err(|source| ConfigError::Unreadable { path: path.clone(), source })?;
        let raw = toml::from_str(&text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            ConfigError::Syntax {
                path: path.clone(),
                line: line_of(&text, start),
                text: text_of_line(&text, start),
                reason: error.message().to_owned(),
            }
        })?;
        Ok((Layers { environment, path, text }, raw))
    }

    /// A value of the file.
    pub(super) fn file(&self, key: &'static str, field: Field) -> Option<Given> {
        let field = field?;
        let origin = self.place(field.span().start);
        Some(Given { key, text: field.into_inner().0, origin })
    }

    /// The place in the file at this byte offset.
    pub(super) fn place(&self, offset: usize) -> Origin {
        Origin::File(self.path.clone(), line_of(&self.text, offset))
    }

    /// A value that can be given in all three places.
    pub(super) fn any(
        &self,
        name: Name,
        flag: Option<&String>,
        field: Field,
    ) -> Result<Option<Given>, ConfigError> {
        if let Some(text) = flag {
            return Ok(Some(Given { key: name.key, text: text.clone(), origin: Origin::Flag(name.flag) }));
        }
        Ok(self.environment(name)?.or_else(|| self.file(name.key, field)))
    }

    /// A list that can be given in all three places; `separator` splits the variable. Lists replace each other.
    /// The file's list is `None` where the variable or the flag won.
    pub(super) fn list(
        &self,
        name: Name,
        flags: &[String],
        separator: char,
    ) -> Result<Option<Vec<Given>>, ConfigError> {
        let given = |text: &str, origin: Origin| Given { key: name.key, text: text.to_owned(), origin };
        if !flags.is_empty() {
            return Ok(Some(flags.iter().map(|text| given(text, Origin::Flag(name.flag))).collect()));
        }
        Ok(self.environment(name)?.map(|whole| {
            whole
                .text
                .split(separator)
                .filter(|part| !part.is_empty())
                .map(|part| given(part, whole.origin.clone()))
                .collect()
        }))
    }

    /// The entries of a list in the file.
    pub(super) fn file_list(&self, key: &'static str, field: Field<Vec<Scalar>>) -> Vec<Given> {
        let Some(field) = field else { return Vec::new() };
        let origin = self.place(field.span().start);
        field
            .into_inner()
            .into_iter()
            .map(|Scalar(text)| Given { key, text, origin: origin.clone() })
            .collect()
    }

    /// A variable of the environment; an empty one counts as absent, as deployments often cannot unset one.
    fn environment(&self, name: Name) -> Result<Option<Given>, ConfigError> {
        let Some(value) = (self.environment)(name.env).filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        let origin = Origin::Environment(name.env);
        match value.into_string() {
            Ok(text) => Ok(Some(Given { key: name.key, text, origin })),
            Err(value) => {
                let text = value.to_string_lossy().into_owned();
                Err(Given { key: name.key, text, origin }.invalid("UTF-8 text"))
            }
        }
    }
}

/// The start of a table or of a list in the file.
pub(super) fn start_of<T>(field: &Spanned<T>) -> usize {
    field.span().start
}

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if u64::try_from(read).is_ok_and(|read| read <= FILE_BYTES_MAX) {
        Ok(text)
    } else {
        Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is longer than {FILE_BYTES_MAX} bytes")))
    }
}

/// The line of a byte offset, from 1.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// The text of the line at a byte offset.
fn text_of_line(text: &str, offset: usize) -> String {
    text.lines().nth(line_of(text, offset) - 1).unwrap_or_default().trim().to_owned()
}
