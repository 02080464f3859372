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
        // The whole line is one message, so that all its figures are of the same moment.
        let bar = output.shows_progress().then(|| {
            let style = ProgressStyle::with_template("{wide_msg}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        });
        Progress { bar }
    }

    /// Whether the daemon is to send progress.
    pub(super) fn wanted(&self) -> bool {
        self.bar.is_some()
    }

    pub(super) fn update(&self, job: &JobInfo) {
        if let Some(bar) = &self.bar {
            let line = format!("{} {}  {}", gauge(job), describe(job), printable(&job.artifact));
            bar.set_message(line.replace('\n', " "));
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

/// `[#######-------------]  36 %`.
fn gauge(job: &JobInfo) -> String {
    const CELLS: u128 = 20;
    let part = |of: u128| {
        let part = u128::from(job.bytes.min(job.total)) * of / u128::from(job.total.max(1));
        usize::try_from(part).unwrap_or(0)
    };
    let filled = part(CELLS);
    format!("[{}{}] {:>3} %", "#".repeat(filled), "-".repeat(CELLS as usize - filled), part(100))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::fake::job;

    #[test]
    fn a_job_reads_the_same_at_every_stage() {
        let half = job(1, JobState::Running);
        assert_eq!(gauge(&half), "[##########----------]  50 %");
        assert_eq!(describe(&half), "512.00 MiB of 1.00 GiB, 953.67 MiB/s, 500.0 ms left, storage-bound");
        let none = JobInfo { bytes: 0, total: 0, ..job(1, JobState::Queued) };
        assert_eq!(
            (gauge(&none), describe(&none)),
            (format!("[{}]   0 %", "-".repeat(20)), "queued".to_owned())
        );
        let odd = JobInfo { bytes: u64::MAX, total: u64::MAX - 1, ..half };
        assert_eq!(gauge(&odd), format!("[{}] 100 %", "#".repeat(20)));
    }
}
