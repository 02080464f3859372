//! What one look at the daemon gives, and what has changed since the look before.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;

use crate::api::methods::{ArtifactInfo, JobInfo, JobState, StatusReply};
use crate::client::Client;
use crate::error::Result;

/// One look.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) status: StatusReply,
    pub(super) jobs: Vec<JobInfo>,
    pub(super) artifacts: Vec<ArtifactInfo>,
}

impl Sample {
    pub(super) fn take(client: &mut Client) -> Result<Sample> {
        let (jobs, artifacts, status) = (client.job_list()?, client.list()?, client.status()?);
        Ok(Sample { at: Instant::now(), status, jobs, artifacts })
    }
}

/// What a drive does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct DriveRate {
    pub(super) read_bytes_per_s: f64,
    pub(super) reads_per_s: f64,
    /// Part of the time during which something was in flight, 0 to 1.
    pub(super) busy: f64,
}

/// What a network card does, bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct LinkRate {
    pub(super) received_bytes_per_s: f64,
    pub(super) sent_bytes_per_s: f64,
}

/// What has changed between two looks.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Rates {
    /// Seconds between them; 0 if there was only one.
    pub(super) seconds: f64,
    /// Bytes per second of jobs that run. Of one that was not there before: since it began.
    pub(super) jobs: BTreeMap<u64, f64>,
    pub(super) drives: BTreeMap<String, DriveRate>,
    pub(super) links: BTreeMap<String, LinkRate>,
    /// Errors that are new, by code.
    pub(super) errors: BTreeMap<String, u64>,
}

impl Rates {
    fn between(before: Option<&Sample>, now: &Sample) -> Rates {
        let running = now.jobs.iter().filter(|job| job.state == JobState::Running);
        let mut rates =
            Rates { jobs: running.clone().map(|job| (job.job, job.rate)).collect(), ..Rates::default() };
        // Of another daemon nothing can be compared: its counters and its jobs begin anew.
        let before = before.filter(|before| before.status.uptime_s <= now.status.uptime_s);
        let Some(before) = before else { return rates };
        let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
        if seconds <= 0.0 {
            return rates;
        }
        rates.seconds = seconds;
        let per_s = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        for job in running {
            let old = before.jobs.iter().find(|old| old.job == job.job && old.state == JobState::Running);
            if let Some(old) = old {
                rates.jobs.insert(job.job, per_s(job.bytes, old.bytes));
            }
        }
        for drive in &now.status.drives {
            let Some(old) = before.status.drives.iter().find(|old| old.drive == drive.drive) else {
                continue;
            };
            let rate = DriveRate {
                read_bytes_per_s: per_s(drive.read_bytes, old.read_bytes),
                reads_per_s: per_s(drive.reads, old.reads),
                busy: (per_s(drive.busy_ms, old.busy_ms) / 1e3).min(1.0),
            };
            rates.drives.insert(drive.drive.clone(), rate);
        }
        for link in &now.status.links {
            let Some(old) = before.status.links.iter().find(|old| old.link == link.link) else { continue };
            let moved = |now: Option<u64>, old: Option<u64>| Some(per_s(now?, old?));
            let received = moved(link.received_bytes, old.received_bytes);
            let sent = moved(link.sent_bytes, old.sent_bytes);
            if let (Some(received_bytes_per_s), Some(sent_bytes_per_s)) = (received, sent) {
                rates.links.insert(link.link.clone(), LinkRate { received_bytes_per_s, sent_bytes_per_s });
            }
        }
        for error in &now.status.errors {
            let old = before.status.errors.iter().find(|old| old.code == error.code);
            let new = error.count.saturating_sub(old.map_or(0, |old| old.count));
            if new > 0 {
                rates.errors.insert(error.code.clone(), new);
            }
        }
        rates
    }
}

/// A look with what has changed since the one before.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) sample: Sample,
    pub(super) rates: Rates,
}

impl Model {
    pub(super) fn new(sample: Sample, before: Option<&Sample>) -> Model {
        let rates = Rates::between(before, &sample);
        Model { sample, rates }
    }

    /// Jobs that run: how many, their bytes per second together, and what holds most of those bytes up.
    pub(super) fn running(&self) -> (usize, f64, Option<&str>) {
        let running: Vec<&JobInfo> =
            self.sample.jobs.iter().filter(|job| job.state == JobState::Running).collect();
        let mut held_up: BTreeMap<&str, u64> = BTreeMap::new();
        for job in &running {
            if let Some(bottleneck) = &job.bottleneck {
                *held_up.entry(bottleneck).or_default() += job.total.saturating_sub(job.bytes);
            }
        }
        let most = held_up.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(name, _)| name);
        (running.len(), self.rates.jobs.values().sum(), most)
    }
}
