//! How fast a file can be read past the page cache into slots, and which block size and depth its drive is best at.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::super::output::{bytes, rate};
use super::Check;
use crate::error::{Code, Error, Result};
use crate::measure::drive::{self, DriveError, FILE_BYTES_MIN, Setting, Target};
use crate::topology::Topology;

const MIB: u64 = 1 << 20;
/// Block sizes and depths that are tried: those that drives differ in. `bench drive` tries more, and several times.
const BLOCKS: [u64; 2] = [MIB, 4 * MIB];
const DEPTHS: [u32; 3] = [2, 4, 16];
/// How long one of them may take.
const TRIAL_TIME: Duration = Duration::from_millis(500);
/// And how much it reads: enough for some tenths of a second of the fastest drive.
const TRIAL_BYTES: u64 = 4 << 30;

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measured {
    #[serde(flatten)]
    pub(super) setting: Setting,
    /// What came of it.
    pub(super) bytes_per_second: f64,
}

/// Measures reads of `path`, or of its largest file.
///
/// Errors: `source.file.not_found`, `source.file.permission_denied`, `source.file.io`.
pub(super) fn measure(path: &Path, topology: &Topology) -> Result<(Check, Vec<Measured>)> {
    let none = |check: Check, path: &Path| Ok((check.of(path.display().to_string()), Vec::new()));
    let target = match Target::open(path, topology, FILE_BYTES_MIN) {
        Ok(target) => target,
        Err(DriveError::Open { path, error }) => return Err(unreadable(&path, &error)),
        Err(DriveError::TooSmall(path)) => {
            return none(Check::warn("read", "the file is too small", "name one of 64 MiB or more"), &path);
        }
        Err(DriveError::NoDirect(path)) => {
            let check = Check::warn(
                "read",
                "the file system has no O_DIRECT",
                "every byte is copied by the kernel once more: keep models on ext4 or xfs on a local drive",
            );
            return none(check, &path);
        }
    };
    let of = target.path.display().to_string();
    let of = target.drive.as_ref().map_or_else(|| of.clone(), |drive| format!("{of} ({drive})"));
    let mut measured = Vec::new();
    for setting in Setting::all(&BLOCKS, &DEPTHS) {
        match target.read(setting, TRIAL_TIME, TRIAL_BYTES) {
            Ok(run) => measured.push(Measured { setting, bytes_per_second: run.rate() }),
            Err(error) => {
                let check = Check::warn("read", format!("not measured: {error}"), "see the other checks");
                return Ok((check.of(of), measured));
            }
        }
    }
    let figures: Vec<(Setting, f64)> =
        measured.iter().map(|measured| (measured.setting, measured.bytes_per_second)).collect();
    let most = figures.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let best = drive::best(&figures).map_or_else(String::new, |Setting { block_bytes, depth }| {
        format!("; {} × {depth} is enough for it", bytes(block_bytes))
    });
    Ok((Check::ok("read", format!("{} at best{best}", rate(most))).of(of), measured))
}

/// Why a file cannot be measured, as the error of a command.
pub(in crate::cli) fn unreadable(path: &Path, error: &io::Error) -> Error {
    let code = match error.kind() {
        io::ErrorKind::NotFound => Code::SourceFileNotFound,
        io::ErrorKind::PermissionDenied => Code::SourceFilePermissionDenied,
        _ => Code::SourceFileIo,
    };
    Error::new(code, format!("{} cannot be read: {error}", path.display()))
}
