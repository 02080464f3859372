//! What an artifact is called, and the files that are opened here and sent along.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use lodestream::api::methods::{ArtifactRequest, AttachRequest, FdSource, Selector, Source};
use lodestream::api::scm::FDS_MAX;
use lodestream::{Code, Error};
use pyo3::prelude::*;

use crate::convert;
use crate::error::Failure;

/// An artifact on a device, as a caller names it.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    /// A URI or an absolute path; or a digest.
    source: String,
    /// Files to open here instead.
    open: Vec<PathBuf>,
    pub(crate) device: String,
    pub(crate) select: Option<Vec<Selector>>,
}

impl Named {
    pub(crate) fn new(
        source: String,
        open: Vec<PathBuf>,
        device: String,
        select: Option<&Bound<'_, PyAny>>,
    ) -> Result<Named, Failure> {
        if open.len() > FDS_MAX {
            let message = format!("{} files are to be opened here; {FDS_MAX} can be sent", open.len());
            return Err(Error::new(Code::ApiTooManyFds, message).into());
        }
        Ok(Named { source, open, device, select: convert::argument("select", select)? })
    }

    pub(crate) fn digest(&self) -> Option<String> {
        (self.open.is_empty() && self.source.starts_with("sha256:")).then(|| self.source.clone())
    }

    /// Opens the files, if any are to be opened here.
    pub(crate) fn files(&self) -> Result<Files, Error> {
        let open = |path: &PathBuf| File::open(path).map_err(|error| file_error(path, &error));
        Ok(Files(self.open.iter().map(open).collect::<Result<_, _>>()?))
    }

    pub(crate) fn source(&self) -> Result<Source, Error> {
        if self.open.is_empty() {
            return Ok(Source::Uri(self.source.clone()));
        }
        let name = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
            name.ok_or_else(|| Error::new(Code::SourceFdsInvalid, "a file name is not UTF-8"))
        };
        let names = self.open.iter().map(name).collect::<Result<Vec<_>, _>>()?;
        Ok(Source::Fds(FdSource { fds: names.len() as u32, names }))
    }

    pub(crate) fn attach_request(&self, wait: bool, verify: bool) -> Result<AttachRequest, Error> {
        let digest = self.digest();
        Ok(AttachRequest {
            source: if digest.is_none() { Some(self.source()?) } else { None },
            digest,
            device: self.device.clone(),
            select: self.select.clone(),
            wait,
            verify,
            notify: false,
        })
    }

    pub(crate) fn artifact_request(&self) -> Result<ArtifactRequest, Error> {
        let AttachRequest { source, digest, device, select, .. } = self.attach_request(false, false)?;
        Ok(ArtifactRequest { source, digest, device, select })
    }
}

/// Files that were opened here.
pub(crate) struct Files(Vec<File>);

impl Files {
    pub(crate) fn borrow(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }
}

fn file_error(path: &Path, error: &io::Error) -> Error {
    let code = match error.kind() {
        io::ErrorKind::NotFound => Code::SourceFileNotFound,
        io::ErrorKind::PermissionDenied => Code::SourceFilePermissionDenied,
        _ => Code::SourceFileIo,
    };
    Error::new(code, format!("cannot open {}: {error}", path.display()))
}
