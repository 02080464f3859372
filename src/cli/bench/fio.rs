//! fio, the reference: one job that reads the files from first to last with O_DIRECT, each byte once.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::measure::Run;
use crate::measure::drive::Setting;

/// How fio reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Fio {
    #[serde(flatten)]
    pub(super) setting: Setting,
    engine: &'static str,
    /// Into huge pages: without them fio is slower, and flatters whoever is compared with it.
    huge: bool,
}

/// Engines, the better one first.
const ENGINES: [&str; 2] = ["io_uring", "libaio"];

#[derive(Deserialize)]
struct Document {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i64,
    read: Reads,
    usr_cpu: f64,
    sys_cpu: f64,
}

#[derive(Deserialize)]
struct Reads {
    io_bytes: u64,
    /// Milliseconds.
    runtime: u64,
}

impl Fio {
    /// The best way in which fio works here, or why it does not: tries every setting once, the kinds of memory and engines on
    /// the first one.
    pub(super) fn best(files: &[PathBuf], settings: &[Setting]) -> Result<Fio, String> {
        let first = settings.first().copied().ok_or("no setting to try")?;
        let kinds = [true, false].into_iter().flat_map(|huge| ENGINES.map(|engine| (huge, engine)));
        let mut why = String::new();
        let mut usable = None;
        for (huge, engine) in kinds {
            let fio = Fio { setting: first, engine, huge };
            match fio.read(files) {
                Ok(_) => {
                    usable = Some(fio);
                    break;
                }
                Err(error) => why = error,
            }
        }
        let usable = usable.ok_or(why)?;
        let mut best: Option<(Fio, f64)> = None;
        for setting in settings {
            let fio = Fio { setting: *setting, ..usable };
            // A larger one may find too few huge pages.
            let Ok(rate) = fio.read(files).map(Run::rate) else { continue };
            if best.is_none_or(|(_, most)| rate > most) {
                best = Some((fio, rate));
            }
        }
        best.map(|(fio, _)| fio).ok_or_else(|| "no setting to try".to_owned())
    }

    /// Reads the files once.
    pub(super) fn read(self, files: &[PathBuf]) -> Result<Run, String> {
        let mut command = Command::new("fio");
        command.args([
            "--name=read",
            "--rw=read",
            "--direct=1",
            "--file_service_type=sequential",
            "--readonly",
        ]);
        command.args(["--invalidate=0", "--output-format=json"]).arg(format!("--ioengine={}", self.engine));
        command
            .arg(format!("--bs={}", self.setting.block_bytes))
            .arg(format!("--iodepth={}", self.setting.depth));
        command.arg(format!("--filename={}", names(files)?));
        if self.huge {
            command.arg("--iomem=mmaphuge");
        }
        let output =
            command.stdin(Stdio::null()).output().map_err(|error| format!("fio cannot be run: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        // Lines of warning may stand before the document.
        let document = text.find('{').map_or("", |at| &text[at..]);
        let said = String::from_utf8_lossy(&output.stderr);
        let failed = || format!("fio failed: {}", said.trim().lines().last().unwrap_or("it says nothing"));
        if !output.status.success() {
            return Err(failed());
        }
        let document: Document = serde_json::from_str(document).map_err(|_| failed())?;
        let job = document.jobs.into_iter().next().filter(|job| job.error == 0).ok_or_else(failed)?;
        let seconds = job.read.runtime as f64 / 1e3;
        let run = Run {
            bytes: job.read.io_bytes,
            seconds,
            cpu_seconds: seconds * (job.usr_cpu + job.sys_cpu) / 100.0,
        };
        let expected: u64 =
            files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|meta| meta.len()).sum();
        // Whole blocks only: fio leaves out the unaligned tail of each file.
        let least = expected.saturating_sub(self.setting.block_bytes.saturating_mul(files.len() as u64));
        if run.bytes < least || seconds <= 0.0 {
            return Err(format!("fio read {} of {expected} bytes", run.bytes));
        }
        Ok(run)
    }

    /// `fio (io_uring, 1.00 MiB × 8, mmaphuge)`.
    pub(super) fn words(self) -> String {
        let memory = if self.huge { "mmaphuge" } else { "malloc" };
        let block = crate::cli::output::bytes(self.setting.block_bytes);
        format!("fio ({}, {block} × {}, {memory})", self.engine, self.setting.depth)
    }
}

/// fio's separator of file names is a colon; one inside a name is escaped.
fn names(files: &[PathBuf]) -> Result<String, String> {
    let name = |path: &Path| {
        let text =
            path.to_str().ok_or_else(|| format!("{} is not UTF-8, which fio needs", path.display()))?;
        Ok::<_, String>(text.replace(':', "\\:"))
    };
    Ok(files.iter().map(|path| name(path)).collect::<Result<Vec<_>, _>>()?.join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colons_in_names_are_escaped() {
        let files = [PathBuf::from("/a:b"), PathBuf::from("/c")];
        assert_eq!(names(&files).unwrap(), "/a\\:b:/c");
    }
}
