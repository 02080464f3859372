//! Physical memory of the devices, shared by all processes of the simulated machine.
//!
//! An allocation is a file in the device's folder of the simulated machine's directory. Whoever made it holds `flock(LOCK_SH)` on it. The
//! lock belongs to the open file description, which duplicates of the descriptor, descriptors sent to other processes and
//! mappings share: so it is held exactly as long as any of them lives anywhere, and the kernel ends it when the last
//! process that had one is killed. A file whose exclusive lock can be had is dead, and is removed by whoever sees it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, flock};

use crate::abi::{Answer, Code};
use crate::config::GRANULARITY;
use crate::memory::Shadow;

/// Bytes behind the memory in an allocation's file, which say what it is.
const TRAILER_BYTES: u64 = 4096;
/// How the names of allocations' files end.
const EXTENSION: &str = ".memory";
/// First line of the trailer.
const MAGIC: &str = "cuda-sim memory 1";
/// What fresh memory holds: whoever forgets to fill or clear it is seen.
const POISON: u8 = 0xa5;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// The memory of one device.
#[derive(Debug)]
pub(crate) struct Store {
    /// The device's folder.
    folder: PathBuf,
    /// `GPU-…`.
    device: String,
    total: u64,
}

/// One physical allocation, kept alive by this process.
#[derive(Debug)]
pub(crate) struct Allocation {
    /// What the C API's handle is.
    pub(crate) id: u64,
    /// Index of its device in this process.
    pub(crate) device: usize,
    pub(crate) bytes: u64,
    /// Whether it was made to be shared by descriptor.
    pub(crate) exportable: bool,
    pub(crate) rdma: bool,
    // None only while it is being dropped.
    shadow: Option<Shadow>,
    file: Option<OwnedFd>,
    path: PathBuf,
}

/// What is asked for in a new allocation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) id: u64,
    pub(crate) device: usize,
    pub(crate) bytes: u64,
    pub(crate) exportable: bool,
    pub(crate) rdma: bool,
}

/// What the trailer of an allocation's file says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    /// UUID of the device, as text.
    pub(crate) device: String,
    bytes: u64,
    rdma: bool,
    name: String,
}

impl Store {
    /// The memory of the device with this UUID, in the directory of its machine.
    pub(crate) fn open(directory: &Path, device: String, total: u64) -> io::Result<Store> {
        let folder = directory.join(&device);
        fs::create_dir_all(&folder)?;
        let store = Store { folder, device, total };
        // Also clears what processes left that were killed.
        store.used()?;
        Ok(store)
    }

    /// The lock under which allocations are counted and made.
    fn lock(&self) -> io::Result<File> {
        let path = self.folder.join("lock");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    }

    /// Bytes in use, all processes counted.
    pub(crate) fn used(&self) -> io::Result<u64> {
        let lock = self.lock()?;
        let used = self.count();
        drop(lock);
        used
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Under the lock.
    fn count(&self) -> io::Result<u64> {
        let mut used = 0;
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(is_name) {
                used += live(&entry.path())?;
            }
        }
        Ok(used)
    }

    /// Makes an allocation, of a multiple of the granularity, filled with poison.
    pub(crate) fn create(&self, wanted: Wanted) -> Answer<Arc<Allocation>> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}{EXTENSION}", rustix::process::getpid().as_raw_nonzero());
        let path = self.folder.join(&name);
        let file = self.reserve(&path, wanted.bytes).map_err(|error| match error.kind() {
            ErrorKind::OutOfMemory | ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Code::OUT_OF_MEMORY,
            _ => Code::OPERATING_SYSTEM,
        })?;
        let trailer = Trailer { device: self.device.clone(), bytes: wanted.bytes, rdma: wanted.rdma, name };
        // From here on the allocation is dropped, and with it the file, when something fails.
        let mut allocation = Allocation {
            id: wanted.id,
            device: wanted.device,
            bytes: wanted.bytes,
            exportable: wanted.exportable,
            rdma: wanted.rdma,
            shadow: None,
            file: None,
            path,
        };
        let written = file.write_all_at(trailer.text().as_bytes(), wanted.bytes);
        let file = allocation.file.insert(OwnedFd::from(file));
        written.map_err(|_| Code::OPERATING_SYSTEM)?;
        let shadow = allocation.shadow.insert(Shadow::map(file.as_fd(), wanted.bytes)?);
        shadow.fill(0, wanted.bytes as usize, POISON)?;
        Ok(Arc::new(allocation))
    }

    /// The file of a new allocation, locked and with room for all its bytes.
    fn reserve(&self, path: &Path, bytes: u64) -> io::Result<File> {
        let length = bytes.checked_add(TRAILER_BYTES).ok_or(ErrorKind::OutOfMemory)?;
        let lock = self.lock()?;
        if self.count()?.checked_add(bytes).is_none_or(|used| used > self.total) {
            return Err(ErrorKind::OutOfMemory.into());
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        // Others count it from here on, although it is not filled yet.
        let made = flock(&file, FlockOperation::NonBlockingLockShared)
            .and_then(|()| rustix::fs::ftruncate(&file, length))
            // So that a full tmpfs is an error here and no SIGBUS later.
            .and_then(|()| rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, length));
        if let Err(error) = made {
            fs::remove_file(path)?;
            return Err(error.into());
        }
        drop(lock);
        Ok(file)
    }
}

impl Allocation {
    /// Takes in what another process (or this one) has exported. `devices` says which device of this process has a UUID.
    pub(crate) fn import(
        id: u64,
        fd: BorrowedFd<'_>,
        directory: &Path,
        devices: impl FnOnce(&str) -> Option<usize>,
    ) -> Answer<Arc<Allocation>> {
        let file = File::from(fd.try_clone_to_owned().map_err(|_| Code::INVALID_VALUE)?);
        let trailer = Trailer::read(&file).ok_or(Code::INVALID_VALUE)?;
        let device = devices(&trailer.device).ok_or(Code::INVALID_DEVICE)?;
        let shadow = Shadow::map(file.as_fd(), trailer.bytes)?;
        Ok(Arc::new(Allocation {
            id,
            device,
            bytes: trailer.bytes,
            exportable: true,
            rdma: trailer.rdma,
            shadow: Some(shadow),
            file: Some(OwnedFd::from(file)),
            path: directory.join(trailer.device).join(trailer.name),
        }))
    }

    /// A descriptor by which it can be imported, closed by `exec`.
    pub(crate) fn export(&self) -> Answer<OwnedFd> {
        let file = self.file.as_ref().ok_or(Code::UNKNOWN)?;
        file.try_clone().map_err(|_| Code::OPERATING_SYSTEM)
    }

    pub(crate) fn shadow(&self) -> Answer<&Shadow> {
        self.shadow.as_ref().ok_or(Code::UNKNOWN)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // Both hold the lock.
        self.shadow = None;
        self.file = None;
        // Gone if this was the last; else another process will see to it. The directory may be another machine's.
        let _ = live(&self.path);
    }
}

/// Bytes of an allocation's file if it is alive; a dead one is removed.
fn live(path: &Path) -> io::Result<u64> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(0),
        },
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(file.metadata()?.size().saturating_sub(TRAILER_BYTES)),
        Err(error) => Err(error.into()),
    }
}

/// Whether a file's name is that of an allocation.
fn is_name(name: &str) -> bool {
    name.strip_suffix(EXTENSION).is_some_and(|rest| {
        !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
    })
}

impl Trailer {
    fn text(&self) -> String {
        format!("{MAGIC}\n{}\n{}\n{}\n{}\n", self.device, self.bytes, u8::from(self.rdma), self.name)
    }

    /// What a descriptor says that somebody handed in: nothing of it is trusted.
    fn read(file: &File) -> Option<Trailer> {
        let metadata = file.metadata().ok()?;
        let bytes = metadata.size().checked_sub(TRAILER_BYTES).filter(|bytes| *bytes > 0)?;
        if !metadata.is_file() || bytes % GRANULARITY != 0 {
            return None;
        }
        let mut text = vec![0; TRAILER_BYTES as usize];
        file.read_exact_at(&mut text, bytes).ok()?;
        let trailer = Trailer::parse(std::str::from_utf8(&text).ok()?)?;
        (trailer.bytes == bytes).then_some(trailer)
    }

    fn parse(text: &str) -> Option<Trailer> {
        let mut lines = text.lines();
        if lines.next() != Some(MAGIC) {
            return None;
        }
        let device = lines.next()?.to_owned();
        let bytes = lines.next()?.parse().ok()?;
        let rdma = lines.next()? == "1";
        let name = lines.next()?.to_owned();
        is_name(&name).then_some(Trailer { device, bytes, rdma, name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trailer_is_read_as_it_was_written_and_no_path_comes_in() {
        let trailer = |name: &str| Trailer {
            device: "GPU-1".to_owned(),
            bytes: GRANULARITY,
            rdma: true,
            name: name.to_owned(),
        };
        assert_eq!(Trailer::parse(&trailer("7-0.memory").text()), Some(trailer("7-0.memory")));
        for name in [".memory", "../7-0.memory", "x.memory", "7-0", ""] {
            assert_eq!(Trailer::parse(&trailer(name).text()), None, "{name}");
        }
        assert_eq!(Trailer::parse(""), None);
    }
}
