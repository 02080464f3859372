//! What is measured of a running daemon: made cold, loaded, watched.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::api::methods::{ArtifactRequest, PrefetchRequest, ResolveRequest, Source};
use crate::cli::{Context, source};
use crate::client::Client;
use crate::error::{Code, Error, Result};
use crate::measure::Run;
use crate::sys::page_cache;

/// How long the ready pool may take to be full again.
const POOL_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two looks at the pool.
const LOOK: Duration = Duration::from_millis(20);

/// An artifact of a running daemon.
pub(super) struct Subject {
    client: Client,
    source: Source,
    device: String,
    /// Its files, as this process finds them.
    pub(super) files: Vec<PathBuf>,
    /// Sum of their sizes, bytes.
    pub(super) bytes: u64,
}

impl Subject {
    /// Finds the files of a path or URI that both the daemon and this process see.
    pub(super) fn open(context: &Context, text: &str, device: &str) -> Result<Subject> {
        let mut client = context.connect()?;
        let uri = source::uri(text)?;
        let source = Source::Uri(uri.clone());
        let path = Path::new(uri.strip_prefix("file://").unwrap_or(&uri)).to_owned();
        let resolved = client.resolve(&ResolveRequest { source: source.clone() }, &[])?;
        let of = |name: &str| if path.is_dir() { path.join(name) } else { path.clone() };
        let files: Vec<PathBuf> = resolved.files.iter().map(|file| of(&file.name)).collect();
        for (file, told) in files.iter().zip(&resolved.files) {
            let bytes =
                fs::metadata(file).map_err(|error| crate::cli::doctor::read::unreadable(file, &error))?.len();
            if bytes != told.bytes {
                let message = format!("{} is not the file that the daemon sees there", file.display());
                return Err(Error::new(Code::SourceFileChanged, message));
            }
        }
        Ok(Subject { client, source, device: device.to_owned(), files, bytes: resolved.bytes })
    }

    /// The source, for other requests.
    pub(super) fn source(&self) -> Source {
        self.source.clone()
    }

    /// Evicts it, waits until the ready pool is full again, and drops its files from the page cache.
    pub(super) fn cool(&mut self) -> Result<()> {
        let request = ArtifactRequest {
            source: Some(self.source.clone()),
            digest: None,
            device: self.device.clone(),
            select: None,
        };
        match self.client.evict(&request, &[]) {
            Err(error) if !matches!(error.code, Code::ArtifactNotResident | Code::ArtifactNotFound) => {
                return Err(error);
            }
            _ => {}
        }
        let deadline = Instant::now() + POOL_TIMEOUT;
        loop {
            let host = self.client.status()?.host;
            // Held memory counts against the pool, too: what cannot be filled is not waited for.
            let room = host.budget_bytes.saturating_sub(host.resident_bytes).saturating_sub(host.held_bytes);
            if host.pool_bytes >= host.pool_target_bytes.min(room) || Instant::now() > deadline {
                break;
            }
            std::thread::park_timeout(LOOK);
        }
        self.drop_cache();
        Ok(())
    }

    /// Drops the files from the page cache.
    pub(super) fn drop_cache(&self) {
        for file in self.files.iter().filter_map(|file| File::open(file).ok()) {
            page_cache::drop_pages(file.as_fd(), 0, 0);
        }
    }

    /// Makes it resident. Wall time from the request to the end of the job; CPU time of the daemon's process.
    pub(super) fn load(&mut self) -> Result<(Run, crate::api::methods::JobInfo)> {
        let request = PrefetchRequest::new(self.source.clone(), self.device.clone());
        let process = self.client.process();
        let cpu = || process.and_then(cpu_seconds);
        let before = cpu();
        let begun = Instant::now();
        let mut job = self.client.prefetch(&request, &[], &mut |_| ())?;
        if !job.state.ended() {
            let wait = crate::api::methods::JobWaitRequest { job: job.job, timeout_ms: None, notify: false };
            job = self.client.job_wait(&wait, &mut |_| ())?;
        }
        let seconds = begun.elapsed().as_secs_f64();
        let cpu_seconds = cpu().zip(before).map_or(f64::NAN, |(after, before)| after - before);
        let job = crate::cli::progress::succeeded(job)?;
        Ok((Run { bytes: job.bytes, seconds, cpu_seconds }, job))
    }
}

/// User and system time of a process, all its threads together, if this one may see it.
fn cpu_seconds(process: i32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may have spaces and parentheses of its own.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |place: usize| fields.get(place)?.parse::<u64>().ok();
    Some((ticks(11)? + ticks(12)?) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_time_of_a_process_is_read() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(super::cpu_seconds(own).unwrap() >= 0.0);
        assert_eq!(super::cpu_seconds(-1), None);
    }
}
