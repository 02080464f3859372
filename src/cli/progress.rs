//! The progress bar of a job, and how a job's end reads.

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{Output, bytes, milliseconds, printable, rate};
use crate::api::methods::{JobInfo, JobState};
use crate::client::error_of;
use crate::error::{Code, Error, Result};

/// A bar on stderr if it is a terminal, else nothing.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn new(output: Output) -> Progress {
        let bar = output.shows_progress().then(|| {
            let style = ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} %  {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Progress { bar }
    }

    /// Whether the daemon is to send progress.
    pub(super) fn wanted(&self) -> bool {
        self.bar.is_some()
    }

    pub(super) fn update(&self, job: &JobInfo) {
        if let Some(bar) = &self.bar {
            bar.set_prefix(printable(&job.artifact));
            bar.set_length(job.total);
            bar.set_position(job.bytes.min(job.total));
            bar.set_message(describe(job));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `1.00 GiB of 2.00 GiB, 1.50 GiB/s, 0.5 s left, storage-bound`.
pub(super) fn describe(job: &JobInfo) -> String {
    if job.state == JobState::Queued {
        return "queued".to_owned();
    }
    let mut text = format!("{} of {}, {}", bytes(job.bytes), bytes(job.total), rate(job.rate));
    if let Some(eta_ms) = job.eta_ms {
        text.push_str(&format!(", {} left", milliseconds(eta_ms as f64)));
    }
    if let Some(bottleneck) = &job.bottleneck {
        text.push_str(&format!(", {}-bound", printable(bottleneck)));
    }
    text
}

/// The job if it did what it was for, else why not.
pub(super) fn succeeded(job: JobInfo) -> Result<JobInfo> {
    let error = match (&job.error, job.state) {
        (Some(data), JobState::Failed | JobState::Cancelled) => error_of(data),
        (None, JobState::Cancelled) => Error::new(Code::JobCancelled, "the job was cancelled"),
        (None, JobState::Failed) => Error::new(Code::Internal, "the job failed and did not say why"),
        _ => return Ok(job),
    };
    Err(Error { message: format!("{}: {}", job.artifact, error.message), ..error })
}
