//! `lodestream prefetch`: makes artifacts resident.

use serde_json::json;

use super::output::{bytes, milliseconds, rate};
use super::progress::{self, Progress};
use super::source::Wanted;
use super::{Context, parse};
use crate::api::methods::{JobInfo, JobWaitRequest, PrefetchRequest};
use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Path or URI
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<String>,

    #[command(flatten)]
    wanted: Wanted,

    /// Larger goes first
    #[arg(long, value_name = "NUMBER", default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,

    /// Fail if it has not ended after this time, such as 30s
    #[arg(long, value_name = "DURATION", value_parser = parse::duration_ms)]
    deadline: Option<u64>,

    /// Go on when this command is interrupted
    #[arg(long)]
    detach: bool,

    /// Pin it once it is resident
    #[arg(long)]
    pin: bool,

    /// Do not wait for the end; implies --detach
    #[arg(long)]
    no_wait: bool,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let mut client = context.connect()?;
    let mut jobs = Vec::with_capacity(args.sources.len());
    for text in &args.sources {
        let opened = args.wanted.source(text)?;
        let request = PrefetchRequest {
            source: opened.source.clone(),
            device: args.wanted.device.clone(),
            select: args.wanted.select(),
            targets: Vec::new(),
            priority: args.priority,
            deadline_ms: args.deadline,
            detach: args.detach || args.no_wait,
            pin: args.pin,
            notify: false,
        };
        jobs.push(client.prefetch(&request, &opened.files(), &mut |_| ())?);
    }
    let mut failed: Option<Error> = None;
    if !args.no_wait {
        for job in &mut jobs {
            if !job.state.ended() {
                let progress = Progress::new(context.output);
                let request = JobWaitRequest { job: job.job, timeout_ms: None, notify: progress.wanted() };
                *job = client.job_wait(&request, &mut |job| progress.update(job))?;
            }
            // The others are waited for all the same: leaving now would cancel them.
            if let Err(error) = progress::succeeded(job.clone()) {
                failed.get_or_insert(error);
            }
        }
    }
    match failed {
        Some(error) => Err(kept(error, &jobs)),
        None => context.output.result(&json!({ "jobs": jobs }), || jobs.iter().map(line).collect::<String>()),
    }
}

/// One job failed; the ones that did not are worth a word.
fn kept(mut error: Error, jobs: &[JobInfo]) -> Error {
    let resident: Vec<&str> = jobs
        .iter()
        .filter(|job| progress::succeeded((*job).clone()).is_ok())
        .map(|job| job.artifact.as_str())
        .collect();
    if error.kept.is_empty() && !resident.is_empty() {
        error.kept = format!("resident: {}", resident.join(", "));
    }
    error
}

fn line(job: &JobInfo) -> String {
    if !job.state.ended() {
        return format!("{}: job {}\n", job.artifact, job.job);
    }
    let paths: Vec<String> =
        job.path.iter().map(|(path, moved)| format!("{} {path}", bytes(*moved))).collect();
    let made_room = match job.demoted_bytes {
        0 => String::new(),
        down => format!("; {} went to the host tier for it", bytes(down)),
    };
    format!(
        "{}: {} in {}, {} ({}); {}{made_room}\n",
        job.artifact,
        bytes(job.total),
        milliseconds(job.elapsed_ms as f64),
        rate(job.rate),
        if paths.is_empty() { "nothing to move".to_owned() } else { paths.join(", ") },
        job.digest.as_deref().unwrap_or("no digest"),
    )
}
