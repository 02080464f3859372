//! `lodestream jobs`: lists jobs, or shows, waits for or cancels one.

use serde_json::json;

use super::Context;
use super::output::{Column, milliseconds, table};
use super::progress::{self, Progress};
use crate::api::methods::{JobInfo, JobState, JobWaitRequest};
use crate::error::Result;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One job; default: all that run or ended recently
    #[arg(value_name = "ID")]
    job: Option<u64>,

    /// Wait until it has ended; the exit code says how
    #[arg(long, requires = "job", conflicts_with = "cancel")]
    wait: bool,

    /// Cancel it
    #[arg(long, requires = "job")]
    cancel: bool,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let mut client = context.connect()?;
    let Some(number) = args.job else {
        let jobs = client.job_list()?;
        return context.output.result(&json!({ "jobs": jobs }), || listing(&jobs));
    };
    let job = if args.cancel {
        client.job_cancel(number)?
    } else if args.wait {
        let progress = Progress::new(context.output);
        let request = JobWaitRequest { job: number, timeout_ms: None, notify: progress.wanted() };
        let job = client.job_wait(&request, &mut |job| progress.update(job))?;
        progress::succeeded(job)?
    } else {
        client.job_get(number)?
    };
    context.output.result(&json!({ "job": job }), || listing(std::slice::from_ref(&job)))
}

fn listing(jobs: &[JobInfo]) -> String {
    let columns = [
        Column::Right("JOB"),
        Column::Left("STATE"),
        Column::Left("SOURCE"),
        Column::Left("DEVICE"),
        Column::Right("SINCE"),
        Column::Left("PROGRESS"),
    ];
    let rows = jobs.iter().map(|job| {
        let state = match job.state {
            JobState::Queued => "queued",
            JobState::Running => "running",
            JobState::Done => "done",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        };
        let error = job.error.as_ref().map(|error| format!("{} [{}]", error.message, error.code));
        vec![
            job.job.to_string(),
            state.to_owned(),
            job.artifact.clone(),
            job.device.clone(),
            milliseconds(job.elapsed_ms as f64),
            error.unwrap_or_else(|| progress::describe(job)),
        ]
    });
    table(&columns, rows.collect())
}
