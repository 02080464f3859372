//! `liblodestream_verbs.so`: where it is looked for, and why it cannot be used.

use std::error::Error;
use std::fmt;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lodestream_verbs_abi::{DeviceName, ENTRY, Entry, NAME_BYTES, Table, VERSION};

use super::{VerbsError, check};

/// Its file name.
const NAME: &str = "liblodestream_verbs.so";
/// Devices that are looked at on one node.
const DEVICES_MAX: usize = 64;

/// Why there are no verbs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Absent {
    /// The file is at none of the places where it is looked for.
    #[error("{NAME} is not there: looked at {}", paths(.0))]
    Missing(Vec<PathBuf>),
    /// It cannot be loaded. Most often libibverbs is not installed, which the text says.
    #[error("{} cannot be loaded: {reason}", path.display())]
    Unloadable {
        /// The file.
        path: PathBuf,
        /// What the loader says.
        reason: String,
    },
    /// It is of another version than this program.
    #[error("{} is not of version {VERSION} of the table: install the one that came with this program", .0.display())]
    Version(PathBuf),
}

fn paths(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The library, loaded. Unloaded when the last that was made through it has gone.
pub struct Library {
    table: NonNull<Table>,
    /// Bytes that the NIC did not give back: see [`Library::leaked_bytes`].
    leaked_bytes: AtomicU64,
    _library: libloading::Library,
}

// SAFETY: the table is a constant of the library; libibverbs may be called by several threads at a time.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").finish_non_exhaustive()
    }
}

impl Deref for Library {
    type Target = Table;

    fn deref(&self) -> &Table {
        // SAFETY: `open` got it from the library, for the version whose layout this is; it is there as long as the library is
        // loaded, which is as long as `self`.
        unsafe { self.table.as_ref() }
    }
}

impl Library {
    /// Loads the library from `configured`, or else from beside this program or from `../lib/lodestream` of there.
    pub fn open(configured: Option<&Path>) -> Result<Arc<Library>, Absent> {
        let places = match configured {
            Some(path) => vec![path.to_owned()],
            None => beside_the_program(),
        };
        let Some(path) = places.iter().find(|path| path.is_file()) else {
            return Err(Absent::Missing(places));
        };
        let unloadable = |error: libloading::Error| {
            // What the loader says is the cause of what libloading says.
            let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            Absent::Unloadable { path: path.clone(), reason }
        };
        // SAFETY: the library that belongs to this program, or that the operator names; its initialisers and those of libibverbs
        // are trusted like those of any installed library.
        let library = unsafe { libloading::Library::new(path) }.map_err(unloadable)?;
        // SAFETY: the type is that of the symbol, in every version.
        let entry = unsafe { library.get::<Entry>(ENTRY) }.map_err(unloadable)?;
        // SAFETY: takes a number, and answers null for a version that it does not have.
        let table = unsafe { entry(VERSION) };
        let Some(table) = NonNull::new(table.cast_mut()) else { return Err(Absent::Version(path.clone())) };
        Ok(Arc::new(Library { table, leaked_bytes: AtomicU64::new(0), _library: library }))
    }

    /// A library whose functions a test has written.
    #[cfg(test)]
    pub(super) fn simulated(table: &'static Table) -> Arc<Library> {
        let program = libloading::os::unix::Library::this().into();
        Arc::new(Library { table: NonNull::from(table), leaked_bytes: AtomicU64::new(0), _library: program })
    }

    /// Names of the devices of this node, in the order of libibverbs.
    ///
    /// # Errors
    /// ENOSYS: the kernel has no RDMA (`ib_uverbs` is not loaded).
    pub fn devices(&self) -> Result<Vec<String>, VerbsError> {
        let mut names = [DeviceName { bytes: [0; NAME_BYTES] }; DEVICES_MAX];
        let mut count = 0;
        // SAFETY: there is room for as many as it is told.
        let answer = unsafe { (self.devices)(names.as_mut_ptr(), DEVICES_MAX as u32, &mut count) };
        check("listing devices", answer)?;
        let text = |name: &DeviceName| {
            let end = name.bytes.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
            String::from_utf8_lossy(&name.bytes[..end]).into_owned()
        };
        Ok(names.iter().take(count as usize).map(text).collect())
    }

    /// Bytes of spans that are lost until this process ends, as the NIC did not say that it is done with them. 0 unless a device
    /// is broken.
    pub fn leaked_bytes(&self) -> u64 {
        self.leaked_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn count_leak(&self, bytes: u64) {
        self.leaked_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn beside_the_program() -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let Some(directory) = program.parent() else { return Vec::new() };
    vec![directory.join(NAME), directory.join("../lib/lodestream").join(NAME)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_named_with_the_places() {
        let error = Library::open(Some(Path::new("/nowhere/liblodestream_verbs.so"))).unwrap_err();
        assert_eq!(error, Absent::Missing(vec!["/nowhere/liblodestream_verbs.so".into()]));
        assert!(error.to_string().contains("/nowhere/liblodestream_verbs.so"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_library_is_refused_with_the_loader_s_reason() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, b"no library").unwrap();
        let error = Library::open(Some(file.path())).unwrap_err();
        let Absent::Unloadable { path, reason } = &error else { panic!("{error}") };
        assert_eq!(path, file.path());
        assert!(!reason.is_empty());
    }
}
