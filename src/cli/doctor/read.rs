//! How fast a file can be read past the page cache into slots, by size of a block and depth.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use super::super::output::rate;
use super::Check;
use crate::error::{Code, Error, Result};
use crate::staging::Pool;
use crate::sys::uring::{Done, Read, Ring};
use crate::topology::{Drive, Topology};

const MIB: u64 = 1 << 20;
/// Block sizes and depths that are tried: those that drives differ in.
const TRIALS: [(u64, u32); 4] = [(MIB, 4), (MIB, 16), (4 * MIB, 4), (4 * MIB, 16)];
/// How long one of them may take.
const TRIAL_TIME: Duration = Duration::from_secs(1);
/// And how much it reads: enough for some tenths of a second of the fastest drive.
const TRIAL_BYTES: u64 = 4 << 30;
/// Below this a measurement says little.
const FILE_BYTES_MIN: u64 = 64 * MIB;
/// How long a read may take before the drive counts as hung.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Files of a directory that are looked at.
const FILES_MAX: usize = 4096;

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measured {
    /// Bytes of one read.
    pub(super) block_bytes: u64,
    /// Reads in flight.
    pub(super) depth: u32,
    /// What came of it.
    pub(super) bytes_per_second: f64,
}

/// Measures reads of `path`, or of its largest file.
///
/// Errors: `source.file.not_found`, `source.file.io`.
pub(super) fn measure(path: &Path, topology: &Topology) -> Result<(Check, Vec<Measured>)> {
    let failed = |error: std::io::Error| unreadable(path, &error);
    let path = largest(path).map_err(failed)?;
    let meta = fs::metadata(&path).map_err(failed)?;
    let drive = drive_of(&meta, topology);
    let of = drive
        .map_or_else(|| path.display().to_string(), |drive| format!("{} ({})", path.display(), drive.name));
    if meta.len() < FILE_BYTES_MIN {
        let check = Check::warn("read", "the file is too small", "name one of 64 MiB or more").of(of);
        return Ok((check, Vec::new()));
    }
    let file = match past_the_page_cache(&path) {
        Ok(file) => Arc::new(file),
        Err(rustix::io::Errno::INVAL) => {
            let check = Check::warn(
                "read",
                "the file system has no O_DIRECT",
                "every byte is copied by the kernel once more: keep models on ext4 or xfs on a local drive",
            );
            return Ok((check.of(of), Vec::new()));
        }
        Err(error) => return Err(failed(error.into())),
    };
    let mut measured = Vec::new();
    for (block_bytes, depth) in TRIALS {
        match trial(&file, meta.len(), block_bytes, depth) {
            Ok(bytes_per_second) => measured.push(Measured { block_bytes, depth, bytes_per_second }),
            Err(error) => {
                let check = Check::warn("read", format!("not measured: {error}"), "see the other checks");
                return Ok((check.of(of), measured));
            }
        }
    }
    let best = measured.iter().map(|measured| measured.bytes_per_second).fold(0.0, f64::max);
    Ok((Check::ok("read", format!("{} at best", rate(best))).of(of), measured))
}

/// The drive that a file is on, if it is known.
pub(super) fn drive_of<'a>(meta: &fs::Metadata, topology: &'a Topology) -> Option<&'a Drive> {
    let device = meta.dev();
    topology.drive_of(rustix::fs::major(device), rustix::fs::minor(device))
}

/// Opens a file for reading past the page cache.
pub(super) fn past_the_page_cache(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT, Mode::empty())
}

pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => Code::SourceFileNotFound,
        std::io::ErrorKind::PermissionDenied => Code::SourceFilePermissionDenied,
        _ => Code::SourceFileIo,
    };
    Error::new(code, format!("{} cannot be read: {error}", path.display()))
}

/// The file itself, or the largest regular file of a directory.
pub(super) fn largest(path: &Path) -> std::io::Result<PathBuf> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(path.to_owned());
    }
    let files = fs::read_dir(path)?.take(FILES_MAX).filter_map(|entry| {
        let path = entry.ok()?.path();
        let meta = fs::metadata(&path).ok()?;
        meta.is_file().then_some((meta.len(), path))
    });
    let largest = files.max().map(|(_, path)| path);
    largest.ok_or_else(|| std::io::Error::new(std::io::ErrorKind::NotFound, "no file in the directory"))
}

/// Reads whole blocks from the beginning on, over again if the file ends. Bytes a second.
fn trial(file: &Arc<OwnedFd>, file_bytes: u64, block_bytes: u64, depth: u32) -> std::io::Result<f64> {
    let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let mut ring = Ring::new(depth, wake)?;
    let mut slots = Pool::new(depth, block_bytes, None)?;
    ring.register_memory(slots.memory());
    let blocks = (file_bytes / block_bytes).max(1);
    let bytes = u32::try_from(block_bytes).map_err(std::io::Error::other)?;
    let begin = Instant::now();
    let (mut started, mut arrived) = (0u64, 0u64);
    let mut done: Vec<Done> = Vec::new();
    let mut failure = None;
    loop {
        let more = failure.is_none() && started * block_bytes < TRIAL_BYTES && begin.elapsed() < TRIAL_TIME;
        while more && let Some(span) = slots.take() {
            let offset = started % blocks * block_bytes;
            let read = Read {
                file: Arc::clone(file),
                file_slot: None,
                offset,
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
            return Err(std::io::ErrorKind::TimedOut.into());
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
        None => Ok(arrived as f64 / begin.elapsed().as_secs_f64()),
    }
}
