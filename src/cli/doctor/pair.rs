//! How fast a file comes to each GPU: by way of host memory, and by the drive itself where cuFile can.

use std::path::Path;
use std::time::Duration;

use super::super::output::rate;
use super::Check;
use super::read::unreadable;
use crate::config::Config;
use crate::error::Result;
use crate::measure::drive::{DriveError, Target};
use crate::probe::{self, FILE_BYTES_MIN, Report, Settings};
use crate::sys::uring;
use crate::telemetry::gpu::Identity;
use crate::topology::Topology;

/// How long the helper may take for one GPU.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// One check for each GPU, with the file or the largest file of the directory at `path`.
pub(super) fn checks(path: &Path, topology: &Topology, gpus: &[Identity]) -> Result<Vec<Check>> {
    let target = match Target::open(path, topology, FILE_BYTES_MIN) {
        Ok(target) => target,
        Err(DriveError::Open { path, error }) => return Err(unreadable(&path, &error)),
        // The other check of this file has said so.
        Err(DriveError::TooSmall(_) | DriveError::NoDirect(_)) => return Ok(Vec::new()),
    };
    let drive = target.drive.clone().unwrap_or_else(|| target.path.display().to_string());
    let plane = Config::default().data_plane;
    let checks = gpus.iter().map(|gpu| {
        let settings = Settings {
            device: gpu.uuid.clone(),
            preadv2: uring::probe().is_err(),
            block_bytes: plane.block_bytes,
            depth: plane.depth,
            slots: plane.slots,
        };
        let report = probe::ask(&settings, target.file(), PROBE_TIMEOUT);
        check(&report).of(format!("{drive} → {}", gpu.uuid))
    });
    Ok(checks.collect())
}

fn check(report: &Report) -> Check {
    const NAME: &str = "drive_to_gpu";
    let Some(staged) = report.staged_bytes_per_second else {
        let reason = report.reason.clone().unwrap_or_default();
        return Check::warn(NAME, format!("not measured: {reason}"), "see the other checks");
    };
    let by_host = format!("{} by way of host memory", rate(staged));
    match (report.mode, report.direct_bytes_per_second) {
        (Some(mode), Some(direct)) if mode.is_direct() => {
            Check::ok(NAME, format!("{by_host}, {} directly ({})", rate(direct), mode.as_str()))
        }
        (Some(_), Some(direct)) => Check::warn(
            NAME,
            format!("{by_host}; cuFile brings {}, and goes by way of host memory, too", rate(direct)),
            "nothing with one drive; for more: load nvidia-fs, or a kernel and a driver with PCI P2PDMA, and a file system \
             that they support (ext4 or xfs on NVMe)",
        ),
        _ => {
            let reason = report.reason.clone().unwrap_or_default();
            Check::ok(NAME, format!("{by_host}; no direct path: {reason}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::probe::Mode;

    #[test]
    fn what_was_measured_is_said_in_plain_words() {
        let mut report = Report { staged_bytes_per_second: Some(3e9), ..Report::default() };
        report.reason = Some("libcufile.so.0 cannot be loaded".to_owned());
        let none = check(&report);
        assert!(none.verdict == Verdict::Ok && none.found.contains("no direct path: libcufile"));
        report.direct_bytes_per_second = Some(6e9);
        report.mode = Some(Mode::P2pdma);
        assert!(check(&report).found.contains("directly (p2pdma)"));
        report.mode = Some(Mode::Compat);
        assert_eq!(check(&report).verdict, Verdict::Warn);
        assert!(check(&Report::default()).found.starts_with("not measured"));
    }
}
