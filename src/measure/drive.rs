//! How fast a file can be read past the page cache into slots, by size of a block and depth: with the daemon's own ring.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use super::{Run, Watch};
use crate::staging::Pool;
use crate::sys::uring::{Done, Read, Ring};
use crate::topology::Topology;

const MIB: u64 = 1 << 20;
/// Below this a measurement says little, bytes.
pub const FILE_BYTES_MIN: u64 = 64 * MIB;
/// How long a read may take before the drive counts as hung.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Files of a directory that are looked at.
const FILES_MAX: usize = 4096;
/// A setting that is this near to the best one is as good, and the one with the least memory in flight is chosen.
const AS_GOOD: f64 = 0.95;

/// Size of a read and how many are in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Bytes of one read.
    pub block_bytes: u64,
    /// Reads in flight.
    pub depth: u32,
}

impl Setting {
    /// Every size with every depth.
    pub fn all(blocks: &[u64], depths: &[u32]) -> Vec<Setting> {
        let with = |&block_bytes: &u64| depths.iter().map(move |&depth| Setting { block_bytes, depth });
        blocks.iter().flat_map(with).collect()
    }

    /// Memory that it keeps in flight, bytes.
    fn in_flight_bytes(self) -> u64 {
        self.block_bytes.saturating_mul(self.depth.into())
    }
}

/// The setting to use among `figures`, pairs of a setting and how fast it was: of those as good as the best one, the one that needs
/// the least memory.
pub fn best(figures: &[(Setting, f64)]) -> Option<Setting> {
    let most = figures.iter().map(|(_, figure)| *figure).fold(f64::NEG_INFINITY, f64::max);
    let good = figures.iter().filter(|(_, figure)| *figure >= most * AS_GOOD);
    good.map(|(setting, _)| *setting).min_by_key(|setting| setting.in_flight_bytes())
}

/// Why a file cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// It cannot be opened.
    #[error("{} cannot be read: {error}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Its file system reads through the page cache only.
    #[error("the file system of {} has no O_DIRECT", .0.display())]
    NoDirect(PathBuf),
    /// It is shorter than was asked for.
    #[error("{} is too small: name a file of 64 MiB or more", .0.display())]
    TooSmall(PathBuf),
}

/// A file that is read past the page cache.
#[derive(Debug)]
pub struct Target {
    /// The file.
    pub path: PathBuf,
    /// The drive below it, if one is known.
    pub drive: Option<String>,
    file: Arc<OwnedFd>,
    bytes: u64,
}

impl Target {
    /// Opens `path`, or the largest file of that directory, if it has `bytes_min` bytes.
    pub fn open(path: &Path, topology: &Topology, bytes_min: u64) -> Result<Target, DriveError> {
        let failed = |error: io::Error| DriveError::Open { path: path.to_owned(), error };
        let path = largest(path).map_err(failed)?;
        let meta = fs::metadata(&path).map_err(failed)?;
        if meta.len() < bytes_min {
            return Err(DriveError::TooSmall(path));
        }
        let device = meta.dev();
        let drive = topology.drive_of(rustix::fs::major(device), rustix::fs::minor(device));
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(file) => Ok(Target {
                drive: drive.map(|drive| drive.name.clone()),
                file: Arc::new(file),
                bytes: meta.len(),
                path,
            }),
            Err(rustix::io::Errno::INVAL) => Err(DriveError::NoDirect(path)),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The file, open past the page cache.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its size, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads whole blocks from the beginning on, over again if the file ends, for `time` at most and `bytes_max` at most.
    ///
    /// # Errors
    /// What the kernel says to a read, or `TimedOut` if the drive does not answer.
    pub fn read(&self, setting: Setting, time: Duration, bytes_max: u64) -> io::Result<Run> {
        let Setting { block_bytes, depth } = setting;
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut ring = Ring::new(depth, wake)?;
        let mut slots = Pool::new(depth, block_bytes, None)?;
        ring.register_memory(slots.memory());
        let blocks = (self.bytes / block_bytes).max(1);
        let bytes = u32::try_from(block_bytes).map_err(io::Error::other)?;
        let (mut started, mut arrived) = (0u64, 0u64);
        let mut done: Vec<Done> = Vec::new();
        let mut failure = None;
        let begun = Instant::now();
        let watch = Watch::start();
        loop {
            let within = started.saturating_mul(block_bytes) < bytes_max && begun.elapsed() < time;
            // Once at least: a thread that had to wait for its CPU has measured nothing yet.
            let more = failure.is_none() && (started == 0 || within);
            while more && let Some(span) = slots.take() {
                let read = Read {
                    file: Arc::clone(&self.file),
                    file_slot: None,
                    offset: started % blocks * block_bytes,
                    span,
                    bytes,
                    arrived: 0,
                    cached_only: false,
                    tag: 0,
                };
                if let Err(read) = ring.start(read) {
                    slots.give(read.span);
                    break;
                }
                started += 1;
            }
            if ring.in_flight() == 0 {
                break;
            }
            ring.submit()?;
            ring.wait(Some(READ_TIMEOUT), &mut done)?;
            if done.is_empty() {
                ring.drain(READ_TIMEOUT);
                return Err(io::ErrorKind::TimedOut.into());
            }
            for Done { read, result } in done.drain(..) {
                slots.give(read.span);
                match result {
                    Ok(bytes) => arrived += u64::from(bytes),
                    Err(error) => failure = Some(error),
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(watch.run(arrived)),
        }
    }
}

/// The file itself, or the largest regular file of a directory.
fn largest(path: &Path) -> io::Result<PathBuf> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(path.to_owned());
    }
    let files = fs::read_dir(path)?.take(FILES_MAX).filter_map(|entry| {
        let path = entry.ok()?.path();
        let meta = fs::metadata(&path).ok()?;
        meta.is_file().then_some((meta.len(), path))
    });
    let largest = files.max().map(|(_, path)| path);
    largest.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no file in the directory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_settings_that_are_as_good_the_one_with_the_least_memory_is_best() {
        let [small, middle, large] =
            [(MIB, 4), (MIB, 16), (4 * MIB, 16)].map(|(block_bytes, depth)| Setting { block_bytes, depth });
        assert_eq!(best(&[(small, 0.9), (large, 1.0), (middle, 0.96)]), Some(middle));
        assert_eq!(best(&[(small, 0.96), (large, 1.0), (middle, 0.97)]), Some(small));
        assert_eq!(best(&[]), None);
        assert_eq!(Setting::all(&[MIB, 4 * MIB], &[1, 2]).len(), 4);
    }

    #[test]
    fn a_file_is_read_in_whole_blocks_until_the_bytes_are_there() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "short").unwrap();
        let topology = Topology::read(Path::new("/"));
        assert!(matches!(
            Target::open(directory.path(), &topology, FILE_BYTES_MIN),
            Err(DriveError::TooSmall(_))
        ));
        assert!(matches!(
            Target::open(&directory.path().join("none"), &topology, 1),
            Err(DriveError::Open { .. })
        ));
        fs::File::create(&path).unwrap().set_len(FILE_BYTES_MIN).unwrap();
        let target = match Target::open(directory.path(), &topology, FILE_BYTES_MIN) {
            Ok(target) => target,
            Err(DriveError::NoDirect(_)) => return,
            Err(error) => panic!("{error}"),
        };
        let setting = Setting { block_bytes: MIB, depth: 4 };
        // More than the file has: it is read over again.
        match target.read(setting, READ_TIMEOUT, FILE_BYTES_MIN + 8 * MIB) {
            Ok(run) => assert_eq!(run.bytes, FILE_BYTES_MIN + 8 * MIB),
            Err(error) => assert!(crate::sys::uring::probe().is_err(), "{error}"),
        }
    }
}
