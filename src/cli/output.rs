//! Everything that the command line prints passes here.

use std::io::{self, Write};
use std::process::ExitCode;

use indicatif::BinaryBytes;
use serde::Serialize;
use serde_json::json;

use crate::api::methods::ErrorData;
use crate::error::{Code, Error, Result};

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    json: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Output {
        Output { json }
    }

    /// Whether one JSON document is wanted instead of text.
    pub(super) fn is_json(self) -> bool {
        self.json
    }

    /// Whether there may be a progress bar: on a terminal and for a person.
    pub(super) fn shows_progress(self) -> bool {
        !self.json && io::IsTerminal::is_terminal(&io::stderr())
    }

    /// Prints the result: the document with `--json`, else the text.
    pub(super) fn result(self, document: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
        let mut all = if self.json {
            serde_json::to_string(document).map_err(|error| Error::new(Code::Internal, error.to_string()))?
        } else {
            text()
        };
        if !all.is_empty() && !all.ends_with('\n') {
            all.push('\n');
        }
        print(all.as_bytes())
    }

    /// Prints text that has no JSON form.
    pub(super) fn text(self, text: &[u8]) -> Result<()> {
        print(text)
    }

    /// Prints the error and gives the exit code of its class.
    pub(super) fn failed(self, error: &Error) -> ExitCode {
        // Nothing can be done if this cannot be written either: the exit code still tells.
        let _ = if self.json {
            print(format!("{}\n", json!({ "error": ErrorData::from(error) })).as_bytes())
        } else {
            let mut text = format!("error: {} [{}]\n", printable(&error.message), error.code);
            if !error.kept.is_empty() {
                text.push_str(&format!("kept: {}\n", printable(&error.kept)));
            }
            io::stderr().write_all(text.as_bytes()).map_err(|error| write_error(&error))
        };
        ExitCode::from(error.code.class().exit_code())
    }
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        // Who reads has seen enough, such as `head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| write_error(&error)),
    }
}

fn write_error(error: &io::Error) -> Error {
    Error::new(Code::Internal, format!("cannot write the result: {error}"))
}

/// Text from elsewhere without control characters: names in a model file must not steer a terminal.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\n' {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
    }
    out
}

/// `1.50 GiB`.
pub(super) fn bytes(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// `1.50 GiB/s`.
pub(super) fn rate(bytes_per_second: f64) -> String {
    // A cast saturates: what is negative or no number becomes 0.
    format!("{}/s", BinaryBytes(bytes_per_second as u64))
}

/// `0.5 ms`, `1.23 s`, `2 min 3 s`, `5 h 0 min`.
pub(super) fn milliseconds(milliseconds: f64) -> String {
    let seconds = milliseconds / 1000.0;
    if seconds < 1.0 {
        format!("{milliseconds:.1} ms")
    } else if seconds < 60.0 {
        format!("{seconds:.2} s")
    } else {
        let minutes = (seconds / 60.0) as u64;
        match minutes {
            0..60 => format!("{minutes} min {} s", seconds as u64 % 60),
            _ => format!("{} h {} min", minutes / 60, minutes % 60),
        }
    }
}

/// Which way a column is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    /// Text.
    Left(&'static str),
    /// Numbers.
    Right(&'static str),
}

/// Rows below a head, in columns as wide as their widest cell.
pub(super) fn table(columns: &[Column], rows: Vec<Vec<String>>) -> String {
    let head = columns.iter().map(|column| match column {
        Column::Left(name) | Column::Right(name) => (*name).to_owned(),
    });
    let mut lines: Vec<Vec<String>> = vec![head.collect()];
    lines.extend(
        rows.into_iter().map(|row| row.iter().map(|cell| printable(cell).replace('\n', "\\n")).collect()),
    );
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut out = String::new();
    for line in &lines {
        let mut text = String::new();
        for ((cell, column), &width) in line.iter().zip(columns).zip(&widths) {
            match column {
                Column::Left(_) => text.push_str(&format!("{cell:<width$}  ")),
                Column::Right(_) => text.push_str(&format!("{cell:>width$}  ")),
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_steer_no_terminal() {
        let rows = vec![
            vec!["a".to_owned(), "1.00 GiB".to_owned()],
            vec!["\u{1b}[2Jé\n".to_owned(), "7 B".to_owned()],
        ];
        assert_eq!(
            table(&[Column::Left("NAME"), Column::Right("SIZE")], rows),
            "NAME              SIZE\n\
             a             1.00 GiB\n\
             \\u{1b}[2Jé\\n       7 B\n"
        );
    }

    #[test]
    fn times_for_people() {
        assert_eq!(milliseconds(0.52), "0.5 ms");
        assert_eq!(milliseconds(1230.0), "1.23 s");
        assert_eq!(milliseconds(123_000.0), "2 min 3 s");
        assert_eq!(milliseconds(18_060_000.0), "5 h 1 min");
        assert_eq!(rate(f64::NAN), "0 B/s");
    }
}
