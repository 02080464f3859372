//! `lodestream doctor`: what limits this node, and what to change. Needs no daemon.
//!
//! A check that cannot be made is a warning and never keeps the others from being made. Nothing is changed on the node.

mod gpu;
mod host;
mod pair;
mod peer;
mod place;
pub(super) mod read;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::output::{Output, bytes, printable, rate};
use crate::error::Result;
use crate::telemetry::gpu::{Absent, Driver, Gone, Identity, Nvml, Reading};
use crate::topology::Topology;
use read::Measured;

/// Checks by how much a load suffers when they are not in order, the most first; the others come after them.
const BY_WEIGHT: [&str; 9] =
    ["gpu_health", "gpu", "read", "drives", "huge_pages", "io_uring", "seccomp", "memlock", "page_cache"];
/// How long the GPUs have to answer.
const GPU_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Measure reads of this file, or of the largest file of this directory, past the page cache, and to each GPU
    #[arg(long, value_name = "PATH")]
    read: Option<PathBuf>,

    #[command(subcommand)]
    of: Option<Of>,
}

/// What else can be examined.
#[derive(Debug, clap::Subcommand)]
enum Of {
    /// Another node: whether artifacts can be taken from it, and if not, what is wrong
    Peer(peer::Args),
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// Nothing to do.
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// Something does not work.
    Fail,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    /// Its name: stable, for scripts.
    check: &'static str,
    /// What it is about, if there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<String>,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What limits the node, and what to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    change: Option<String>,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Check {
        Check { check, of: None, verdict: Verdict::Ok, found: found.into(), change: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, change: impl Into<String>) -> Check {
        Check { verdict: Verdict::Warn, change: Some(change.into()), ..Check::ok(check, found) }
    }

    fn fail(check: &'static str, found: impl Into<String>, change: impl Into<String>) -> Check {
        Check { verdict: Verdict::Fail, change: Some(change.into()), ..Check::ok(check, found) }
    }

    fn of(mut self, what: impl Into<String>) -> Check {
        self.of = Some(what.into());
        self
    }
}

/// A GPU as it was found.
#[derive(Debug, Clone, Serialize)]
struct FoundGpu {
    #[serde(flatten)]
    identity: Identity,
    simulated: bool,
    /// Nothing if it is lost or did not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    reading: Option<Reading>,
}

/// What NVML came to.
#[derive(Debug)]
struct Gpus {
    driver: std::result::Result<Driver, Absent>,
    /// Each GPU and what it said; nothing if none answered in time.
    found: Vec<(Identity, Option<std::result::Result<Reading, Gone>>)>,
}

impl Gpus {
    fn find() -> Gpus {
        let nvml = match Nvml::start() {
            Ok(nvml) => nvml,
            Err(absent) => return Gpus { driver: Err(absent), found: Vec::new() },
        };
        let readings = nvml.read(GPU_TIMEOUT);
        let reading = |place: usize| readings.as_ref()?.get(place).cloned();
        let found =
            nvml.gpus().iter().enumerate().map(|(place, gpu)| (gpu.clone(), reading(place))).collect();
        let driver = nvml.driver().clone();
        nvml.stop(GPU_TIMEOUT);
        Gpus { driver: Ok(driver), found }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    /// The worst of all checks.
    verdict: Verdict,
    /// Checks that are not in order: what does not work, then what limits loads most.
    limits: Vec<&'static str>,
    checks: Vec<Check>,
    #[serde(skip_serializing_if = "Option::is_none")]
    driver: Option<Driver>,
    gpus: Vec<FoundGpu>,
    topology: Topology,
    reads: Vec<Measured>,
}

/// Makes all checks. Exit code 1 if one of them failed.
pub(super) fn run(output: Output, args: &Args) -> Result<ExitCode> {
    let verdict = match &args.of {
        Some(Of::Peer(args)) => {
            let report = peer::examine(args)?;
            output.result(&report, || printable(&listing(&report.checks)))?;
            report.verdict
        }
        None => {
            let report = examine(args)?;
            output.result(&report, || text(&report))?;
            report.verdict
        }
    };
    Ok(if verdict == Verdict::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn examine(args: &Args) -> Result<Report> {
    let root = Path::new("/");
    let gpus = Gpus::find();
    let identities: Vec<Identity> = gpus.found.iter().map(|(gpu, _)| gpu.clone()).collect();
    let topology = Topology::read(root).with_gpus(&identities);
    let mut checks = host::checks(root, &topology);
    checks.extend(gpu::checks(root, &topology, &gpus));
    checks.extend(place::checks(&topology));
    let reads = match &args.read {
        Some(path) => {
            let (check, reads) = read::measure(path, &topology)?;
            checks.push(check);
            checks.extend(pair::checks(path, &topology, &identities)?);
            reads
        }
        None => Vec::new(),
    };
    Ok(Report {
        verdict: checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok),
        limits: limits(&checks),
        checks,
        driver: gpus.driver.ok(),
        gpus: gpus
            .found
            .into_iter()
            .map(|(identity, reading)| FoundGpu {
                simulated: identity.simulated(),
                identity,
                reading: reading.and_then(std::result::Result::ok),
            })
            .collect(),
        topology,
        reads,
    })
}

fn limits(checks: &[Check]) -> Vec<&'static str> {
    let mut wrong: Vec<&Check> = checks.iter().filter(|check| check.verdict != Verdict::Ok).collect();
    let weight =
        |check: &Check| BY_WEIGHT.iter().position(|name| *name == check.check).unwrap_or(BY_WEIGHT.len());
    wrong.sort_by_key(|check| (std::cmp::Reverse(check.verdict), weight(check)));
    let mut names: Vec<&'static str> = wrong.into_iter().map(|check| check.check).collect();
    names.dedup();
    names
}

fn listing(checks: &[Check]) -> String {
    let mut out = String::new();
    for check in checks {
        let verdict = match check.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
        };
        let of = check.of.as_ref().map(|of| format!(" {of}")).unwrap_or_default();
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{verdict}  {}{of}: {}", check.check, check.found);
        if let Some(change) = &check.change {
            let _ = writeln!(out, "      → {change}");
        }
    }
    out
}

fn text(report: &Report) -> String {
    let mut out = listing(&report.checks);
    for read in &report.reads {
        let _ = writeln!(
            out,
            "read  {} × {}: {}",
            read.setting.depth,
            bytes(read.setting.block_bytes),
            rate(read.bytes_per_second)
        );
    }
    let count = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    let _ = writeln!(out, "{} warnings, {} failures", count(Verdict::Warn), count(Verdict::Fail));
    let _ = match report.limits.as_slice() {
        [] => writeln!(out, "Nothing was found that limits this node."),
        names => writeln!(out, "What limits this node, the most first: {}.", names.join(", ")),
    };
    printable(&out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_work_comes_before_what_limits_and_that_by_its_weight() {
        let checks = [
            Check::warn("memlock", "", ""),
            Check::ok("io_uring", ""),
            Check::warn("huge_pages", "", ""),
            Check::warn("gpu_bar1", "", ""),
            Check::warn("gpu_bar1", "", ""),
            Check::fail("nvidia_driver", "", ""),
        ];
        assert_eq!(limits(&checks), ["nvidia_driver", "huge_pages", "memlock", "gpu_bar1"]);
    }
}
