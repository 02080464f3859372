//! SOURCE on the command line: a path, a URI, a digest, or files to open here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use super::parse;
use crate::api::methods::{FdSource, Selector, Source};
use crate::api::scm::FDS_MAX;
use crate::error::{Code, Error, Result};

/// Where, which part, and how it is opened: what the subcommands that name an artifact have in common.
#[derive(Debug, clap::Args)]
pub(super) struct Wanted {
    /// Where it is or will be resident: `host`, `gpu:GPU-<uuid>` or `gpu:<index>`
    #[arg(long, value_name = "DEVICE", default_value = "host")]
    pub(super) device: String,

    /// Only these tensors, or part INDEX of OF along dimension DIM of them; repeatable
    #[arg(long, value_name = "GLOB[:DIM:OF:INDEX]", value_parser = parse::selector)]
    select: Vec<Selector>,

    /// Open the files here and send them, instead of their path
    #[arg(long)]
    open: bool,
}

impl Wanted {
    /// The selection; `None`: everything.
    pub(super) fn select(&self) -> Option<Vec<Selector>> {
        (!self.select.is_empty()).then(|| self.select.clone())
    }

    /// What SOURCE names.
    pub(super) fn source(&self, text: &str) -> Result<Opened> {
        source(text, self.open)
    }
}

/// A source and the files that are sent along with it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) source: Source,
    files: Vec<File>,
}

impl Opened {
    pub(super) fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd).collect()
    }
}

/// With `open`, the files are opened by this process and its rights decide.
fn source(text: &str, open: bool) -> Result<Opened> {
    if open {
        return open_files(Path::new(text));
    }
    Ok(Opened { source: Source::Uri(uri(text)?), files: Vec::new() })
}

/// The digest, if SOURCE is one.
pub(super) fn digest(text: &str) -> Option<&str> {
    text.starts_with("sha256:").then_some(text)
}

/// URIs as they are; a path is made absolute, because the daemon has another working directory.
pub(super) fn uri(text: &str) -> Result<String> {
    if text.contains("://") {
        return Ok(text.to_owned());
    }
    // What does not exist is named as well as it can be: the daemon says what is wrong with it.
    let path = std::fs::canonicalize(text)
        .or_else(|_| std::path::absolute(text))
        .map_err(|error| Error::new(Code::SourceUriInvalid, format!("{text:?} is no path: {error}")))?;
    path.into_os_string().into_string().map_err(|path| {
        Error::new(
            Code::SourceUriInvalid,
            format!("the path {path:?} is not UTF-8; open it here with --open"),
        )
    })
}

fn open_files(path: &Path) -> Result<Opened> {
    let metadata = std::fs::metadata(path).map_err(|error| file_error(path, &error))?;
    let mut names = Vec::new();
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).map_err(|error| file_error(path, &error))? {
            let entry = entry.map_err(|error| file_error(path, &error))?;
            // Links are followed, as in a model hub's snapshot directory.
            let is_file = std::fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file());
            if is_file && !entry.file_name().as_encoded_bytes().starts_with(b".") {
                names.push(entry.path());
            }
        }
        names.sort();
    } else {
        names.push(path.to_owned());
    }
    if names.len() > FDS_MAX {
        let message = format!("{} has {} files; {FDS_MAX} can be sent", path.display(), names.len());
        return Err(Error::new(Code::ApiTooManyFds, message));
    }
    let mut files = Vec::with_capacity(names.len());
    for name in &names {
        files.push(File::open(name).map_err(|error| file_error(name, &error))?);
    }
    let names: Option<Vec<String>> =
        names.iter().map(|name| Some(name.file_name()?.to_str()?.to_owned())).collect();
    let names = names.ok_or_else(|| Error::new(Code::SourceFdsInvalid, "a file name is not UTF-8"))?;
    let source = Source::Fds(FdSource { fds: files.len() as u32, names });
    Ok(Opened { source, files })
}

fn file_error(path: &Path, error: &io::Error) -> Error {
    let code = match error.kind() {
        io::ErrorKind::NotFound => Code::SourceFileNotFound,
        io::ErrorKind::PermissionDenied => Code::SourceFilePermissionDenied,
        _ => Code::SourceFileIo,
    };
    Error::new(code, format!("cannot open {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_absolute_and_uris_stay() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().canonicalize().unwrap().join("model");
        std::fs::create_dir(&real).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let of = |text: &str| source(text, false).unwrap().source;
        assert_eq!(of(link.to_str().unwrap()), Source::Uri(real.to_str().unwrap().to_owned()));
        assert_eq!(of("file:///x/../y"), Source::Uri("file:///x/../y".to_owned()));
        let here = std::env::current_dir().unwrap().join("no-such-model");
        assert_eq!(of("no-such-model"), Source::Uri(here.to_str().unwrap().to_owned()));
    }

    #[test]
    fn a_directory_is_sent_as_its_files_by_name() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["b.safetensors", "a.safetensors", ".hidden"] {
            std::fs::write(directory.path().join(name), name).unwrap();
        }
        std::fs::create_dir(directory.path().join("sub")).unwrap();
        let opened = source(directory.path().to_str().unwrap(), true).unwrap();
        let names = vec!["a.safetensors".to_owned(), "b.safetensors".to_owned()];
        assert_eq!(opened.source, Source::Fds(FdSource { fds: 2, names }));
        assert_eq!(opened.files().len(), 2);
        let error = source("/nonexistent/model", true).unwrap_err();
        assert_eq!(error.code, Code::SourceFileNotFound);
    }
}
