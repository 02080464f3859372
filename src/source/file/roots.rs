//! The configured roots, and how an artifact below one is opened: path → root → files.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::index;
use super::open::{Error, OpenFile, file_type};
use super::uri::local_path;
use crate::config::Limits;
use crate::error::{Code, Result};
use crate::json::shown;
use crate::sys::identity::{self, Tenant};

/// Entries of a directory that are looked at; one with more is not a model.
const DIRECTORY_ENTRIES_MAX: usize = 65_536;
/// Times that a path is resolved anew because directories above it were being renamed.
const RESOLVE_TRIES_MAX: u32 = 16;

const INDEX: &str = "model.safetensors.index.json";
const INDEX_END: &str = ".safetensors.index.json";

/// The directories below which tenants may name paths, opened once.
///
/// The path to a root is the operator's; only what lies below it is looked up with a tenant's rights.
#[derive(Debug)]
pub struct Roots {
    roots: Vec<Root>,
}

#[derive(Debug)]
struct Root {
    /// As configured.
    given: PathBuf,
    /// With its symlinks resolved.
    canonical: PathBuf,
    dir: OwnedFd,
}

impl Roots {
    /// Opens each root.
    ///
    /// # Errors
    /// `config.invalid` if one is not an absolute path of a directory that the daemon can reach.
    pub fn open(paths: &[PathBuf]) -> Result<Roots> {
        let open = |path: &PathBuf| {
            let fail = |why: &dyn std::fmt::Display| {
                crate::Error::new(
                    Code::ConfigInvalid,
                    format!("root '{}' cannot be used: {why}", path.display()),
                )
            };
            if !path.is_absolute() {
                return Err(fail(&"it is not an absolute path"));
            }
            let canonical = std::fs::canonicalize(path).map_err(|error| fail(&error))?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = rustix::fs::open(&canonical, flags, Mode::empty()).map_err(|error| fail(&error))?;
            Ok(Root { given: path.clone(), canonical, dir })
        };
        Ok(Roots { roots: paths.iter().map(open).collect::<Result<_>>()? })
    }

    /// Opens the files of the artifact that `uri` names: a file, or a directory, of which are taken
    /// the shards that `model.safetensors.index.json` (or the only other index) names, else `*.safetensors`,
    /// else `*.gguf`, else every regular file. Sorted by name. Hidden files and subdirectories are left out.
    ///
    /// Blocks; the calling thread acts as the tenant meanwhile (invariant 7). Symlinks are followed as long as
    /// they do not leave the root, so that a Hugging Face cache can be named.
    ///
    /// # Errors
    /// `source.*` and `identity.*` if the path or a file cannot be had, `catalog.index.*` for a bad index,
    /// `catalog.empty`, `catalog.too_many_files`.
    pub fn open_artifact(&self, uri: &str, tenant: &Tenant, limits: &Limits) -> Result<Vec<OpenFile>> {
        let path = local_path(uri)?;
        let (root, relative) = self.find(&path).ok_or_else(|| {
            let why = if self.roots.is_empty() {
                "none is configured; open the files yourself and send their descriptors"
            } else {
                "no root is above it"
            };
            Error::OutsideRoot { name: path.display().to_string(), why }
        })?;
        let place = Place { root, relative, requested: path.display().to_string() };
        identity::act_as(tenant, || place.open(limits))?
    }

    /// The longest root that is above `path`, and the rest of the path.
    fn find<'a>(&'a self, path: &'a Path) -> Option<(&'a Root, &'a Path)> {
        self.roots
            .iter()
            .flat_map(|root| [(root, &root.given), (root, &root.canonical)])
            .filter_map(|(root, prefix)| {
                Some((prefix.components().count(), root, path.strip_prefix(prefix).ok()?))
            })
            .max_by_key(|(length, _, _)| *length)
            .map(|(_, root, relative)| (root, relative))
    }
}

/// What a tenant named, below a root. Its methods run with the tenant's rights.
struct Place<'a> {
    root: &'a Root,
    relative: &'a Path,
    requested: String,
}

impl Place<'_> {
    fn open(&self, limits: &Limits) -> Result<Vec<OpenFile>> {
        let path = self.beneath(self.relative, &self.requested)?;
        match file_type(&path).map_err(|errno| Error::opening(&self.requested, errno))? {
            FileType::RegularFile => {
                let name = self.relative.file_name().and_then(|name| name.to_str());
                let name = name.ok_or_else(|| bad_name(&self.requested))?;
                Ok(vec![OpenFile::open(&path, name, &self.requested)?])
            }
            FileType::Directory => self.open_directory(&path, limits),
            _ => Err(Error::NotRegular { name: self.requested.clone() }.into()),
        }
    }

    fn open_directory(&self, path: &OwnedFd, limits: &Limits) -> Result<Vec<OpenFile>> {
        let files = match choose(self.list(path)?)? {
            Choice::Index(name) => self.open_indexed(&name, limits)?,
            Choice::Files(names) => {
                check_files_max(names.len(), limits)?;
                names.iter().map(|name| self.open_file(name)).collect::<Result<_, Error>>()?
            }
            Choice::Regular(names) => self.open_regular(&names, limits)?,
        };
        if files.is_empty() {
            let message = format!("'{}' contains no file", shown(&self.requested));
            return Err(crate::Error::new(Code::CatalogEmpty, message));
        }
        Ok(files)
    }

    /// The shards that an index names.
    fn open_indexed(&self, name: &str, limits: &Limits) -> Result<Vec<OpenFile>> {
        let index = self.open_file(name)?;
        let (bytes, bytes_max) = (index.stamp.bytes, limits.header_bytes_max);
        if bytes > bytes_max {
            return Err(index::Error::TooLarge { bytes, bytes_max }.into());
        }
        let mut text = vec![0; usize::try_from(bytes).unwrap_or(0)];
        index.read_exact_at(&mut text, 0)?;
        let shards: BTreeMap<String, Vec<String>> = index::parse(&text, limits.tensors_max)?;
        check_files_max(shards.len(), limits)?;
        let open = |(shard, tensors): (String, Vec<String>)| {
            let file = self.open_file(&shard)?;
            Ok(OpenFile { indexed: Some(Arc::from(tensors)), ..file })
        };
        shards.into_iter().map(open).collect()
    }

    /// Those of `names` that are regular files.
    fn open_regular(&self, names: &[String], limits: &Limits) -> Result<Vec<OpenFile>> {
        let mut files = Vec::new();
        for name in names {
            match self.open_file(name) {
                Ok(file) => files.push(file),
                Err(Error::NotRegular { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            check_files_max(files.len(), limits)?;
        }
        Ok(files)
    }

    /// A file right in the directory. Looked up from the root, not from the directory: a symlink of a model
    /// cache leads up before it leads down again.
    fn open_file(&self, name: &str) -> Result<OpenFile, Error> {
        let requested = format!("{}/{name}", self.requested);
        let path = self.beneath(&self.relative.join(name), &requested)?;
        OpenFile::open(&path, name, &requested)
    }

    /// An O_PATH descriptor, which opens nothing yet: a FIFO or a device is recognised before it is touched.
    fn beneath(&self, relative: &Path, requested: &str) -> Result<OwnedFd, Error> {
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        loop {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            match rustix::fs::openat2(&self.root.dir, relative, flags, Mode::empty(), resolve) {
                Ok(path) => return Ok(path),
                Err(Errno::AGAIN | Errno::INTR) if tries < RESOLVE_TRIES_MAX => tries += 1,
                Err(errno) => return Err(Error::opening(requested, errno)),
            }
        }
    }

    /// The names in the directory, without hidden ones, sorted.
    fn list(&self, path: &OwnedFd) -> Result<Vec<String>> {
        let opening = |errno| Error::opening(&self.requested, errno);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(path, ".", flags, Mode::empty()).map_err(opening)?;
        let mut names = Vec::new();
        for (count, entry) in Dir::new(dir).map_err(opening)?.enumerate() {
            if count >= DIRECTORY_ENTRIES_MAX {
                let message = format!(
                    "'{}' has more than {DIRECTORY_ENTRIES_MAX} entries: name the files' own directory",
                    shown(&self.requested)
                );
                return Err(crate::Error::new(Code::CatalogTooManyFiles, message));
            }
            let entry = entry.map_err(opening)?;
            let name = entry.file_name();
            if !name.to_bytes().starts_with(b".") {
                names.push(name.to_str().map_err(|_| bad_name(&self.requested))?.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// Which files of a directory make up the artifact.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// Those that this index names.
    Index(String),
    /// These.
    Files(Vec<String>),
    /// Those of these that are regular files.
    Regular(Vec<String>),
}

fn choose(names: Vec<String>) -> Result<Choice> {
    let ending = |end: &str| names.iter().filter(|name| name.ends_with(end)).cloned().collect::<Vec<_>>();
    if names.iter().any(|name| name == INDEX) {
        return Ok(Choice::Index(INDEX.to_owned()));
    }
    match ending(INDEX_END).as_slice() {
        [] => {}
        [index] => return Ok(Choice::Index(index.clone())),
        [first, second, ..] => {
            let message = format!(
                "there are several indexes, among them '{}' and '{}', and none of the name {INDEX}: \
                 name a file, or send descriptors",
                shown(first),
                shown(second)
            );
            return Err(crate::Error::new(Code::CatalogIndexAmbiguous, message));
        }
    }
    for end in [".safetensors", ".gguf"] {
        let files = ending(end);
        if !files.is_empty() {
            return Ok(Choice::Files(files));
        }
    }
    Ok(Choice::Regular(names))
}

fn check_files_max(files: usize, limits: &Limits) -> Result<(), Error> {
    if files > limits.files_max as usize {
        return Err(Error::TooManyFiles { files, files_max: limits.files_max });
    }
    Ok(())
}

fn bad_name(requested: &str) -> crate::Error {
    let message = format!("a file name in '{}' is not UTF-8", shown(requested));
    crate::Error::new(Code::CatalogBadName, message)
}

#[cfg(test)]
mod tests;
