//! The repository's Rust files as the rules look at them: comments and literals blanked, test code told apart.

use std::fs;
use std::path::{Path, PathBuf};

/// One Rust file.
pub(crate) struct File {
    /// Path relative to the repository: `src/api/wire.rs`.
    pub(crate) path: String,
    /// As it stands on disk.
    pub(crate) text: String,
    /// The same with the contents of comments, strings and characters blanked; lines keep their numbers.
    pub(crate) code: String,
    /// `code` with test items blanked as well; empty for files that are tests as a whole.
    pub(crate) product: String,
}

impl File {
    /// Module below `src/` that the file belongs to, as path segments: `src/api/wire.rs` → `["api", "wire"]`.
    pub(crate) fn module(&self) -> Vec<&str> {
        let inside = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let stem = inside.strip_suffix(".rs").unwrap_or(inside);
        stem.split('/').filter(|part| *part != "mod").collect()
    }

    /// The test part of the file with its comments: all of a test file, else from the first `#[cfg(test)]` on.
    pub(crate) fn test_text(&self) -> &str {
        if is_test(&self.path) {
            return &self.text;
        }
        self.code.find("#[cfg(test)]").map_or("", |start| &self.text[start..])
    }

    /// `path:line` for a byte offset.
    pub(crate) fn place(&self, offset: usize) -> String {
        format!("{}:{}", self.path, self.text[..offset].matches('\n').count() + 1)
    }
}

/// Every `.rs` file below these directories, sorted by path.
pub(crate) fn files(directories: &[&str]) -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    for directory in directories {
        collect(&root.join(directory), &mut paths);
    }
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let path = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            let code = blank(&text);
            let product = if is_test(&path) { String::new() } else { without_tests(&code) };
            File { path, text, code, product }
        })
        .collect()
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                collect(&path, paths);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

/// Whether the whole file is test code: below `tests/`, or a module named `tests` or `…_tests`.
fn is_test(path: &str) -> bool {
    path.split('/').any(|part| {
        let stem = part.strip_suffix(".rs").unwrap_or(part);
        stem == "tests" || stem.ends_with("_tests")
    })
}

/// Overwrites comments and the contents of string and character literals with spaces.
pub(crate) fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => find(text, at, "\n").unwrap_or(bytes.len()),
            b'/' if bytes.get(at + 1) == Some(&b'*') => block_comment_end(bytes, at),
            b'"' => string_end(bytes, at),
            b'r' if !follows_identifier(bytes, at) => match raw_string_end(text, at) {
                Some(end) => end,
                None => {
                    at += 1;
                    continue;
                }
            },
            b'\'' => match character_end(text, at) {
                Some(end) => end,
                None => {
                    at += 1;
                    continue;
                }
            },
            _ => {
                at += 1;
                continue;
            }
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8(out).unwrap()
}

fn find(text: &str, from: usize, what: &str) -> Option<usize> {
    text[from..].find(what).map(|position| from + position)
}

fn follows_identifier(bytes: &[u8], at: usize) -> bool {
    // `br"…"` is a raw string too: its `b` does not make the `r` part of a name.
    let before = |distance: usize| at.checked_sub(distance).map_or(b' ', |index| bytes[index]);
    let name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let byte_string = before(1) == b'b' && !name(before(2));
    name(before(1)) && !byte_string
}

fn block_comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at + 1 < bytes.len() {
        match (bytes[at], bytes[at + 1]) {
            (b'/', b'*') => (depth, at) = (depth + 1, at + 2),
            (b'*', b'/') => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn raw_string_end(text: &str, start: usize) -> Option<usize> {
    let rest = &text[start + 1..];
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    rest[hashes..].starts_with('"').then(|| {
        let close = format!("\"{}", "#".repeat(hashes));
        find(text, start + 2 + hashes, &close).map_or(text.len(), |end| end + close.len())
    })
}

/// End of a character literal, or nothing if the quote begins a lifetime.
fn character_end(text: &str, start: usize) -> Option<usize> {
    let mut characters = text[start + 1..].char_indices();
    let (_, first) = characters.next()?;
    if first == '\\' {
        return find(text, start + 3, "'").map(|end| end + 1);
    }
    let (next, second) = characters.next()?;
    (second == '\'').then_some(start + 1 + next + 1)
}

/// Overwrites every item that follows `#[cfg(test)]`.
pub(crate) fn without_tests(code: &str) -> String {
    let mut out = code.to_owned();
    while let Some(start) = out.find("#[cfg(test)]") {
        let end = item_end(out.as_bytes(), start + "#[cfg(test)]".len());
        let blanked: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(start..end, &blanked);
    }
    out
}

/// End of the item that begins after `from`: its closing brace, or the semicolon of one without a body.
fn item_end(bytes: &[u8], from: usize) -> usize {
    let mut depth = 0usize;
    for (at, byte) in bytes.iter().enumerate().skip(from) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth <= 1 => return at + 1,
            b'}' => depth -= 1,
            b';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    bytes.len()
}

/// Byte offsets at which `word` stands as a whole word.
pub(crate) fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |at| !text[..*at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}
