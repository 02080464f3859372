//! Reading of small kernel files below a root, bounded, with everything unexpected as absence.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Most bytes of one file. The kernel's attributes are at most a page; `/proc/self/status` is a few KiB.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Most entries of one directory.
const ENTRIES_MAX: usize = 16_384;

/// `sys` and `proc` below a root.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    pub(super) fn new(root: &Path) -> Tree {
        Tree { root: root.canonicalize().unwrap_or_else(|_| root.to_owned()) }
    }

    /// The text of a file, without white space around it.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(self.root.join(path)).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The number in a file.
    pub(super) fn number<T: FromStr>(&self, path: &str) -> Option<T> {
        self.text(path)?.parse().ok()
    }

    /// The names in a directory, sorted.
    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join(path)) else { return Vec::new() };
        let names = entries.take(ENTRIES_MAX).filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    /// Where a path leads once all links are followed, relative to the root.
    pub(super) fn resolve(&self, path: &str) -> Option<String> {
        let resolved = self.root.join(path).canonicalize().ok()?;
        Some(resolved.strip_prefix(&self.root).ok()?.to_str()?.to_owned())
    }

    /// The last component of where a path leads.
    pub(super) fn target_name(&self, path: &str) -> Option<String> {
        Some(file_name(&self.resolve(path)?).to_owned())
    }
}

/// The last component of a path.
pub(super) fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The path without its last component.
pub(super) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}
