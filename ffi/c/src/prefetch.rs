//! Making something resident, with progress.

use std::ffi::{c_char, c_int, c_void};

use lodestream::api::methods::{JobInfo, JobState, JobWaitRequest, PrefetchRequest, Selector, Source};
use lodestream::client::error_of;
use lodestream::{Code, Error};
use serde::Deserialize;

use crate::error::guard;
use crate::{host, lodestream_client, text};

/// How often progress is reported, milliseconds.
const PROGRESS_MS: u64 = 100;

/// How far a load is.
#[repr(C)]
#[derive(Debug)]
pub struct lodestream_progress {
    /// Bytes that have arrived and were checksummed.
    pub bytes: u64,
    /// Bytes to move; 0 while that is not known.
    pub total: u64,
    /// Bytes per second since it started to run.
    pub rate: f64,
}

/// Told how far a load is, and given what was passed along with it. 0 to go on, anything else to cancel the load.
pub type lodestream_progress_callback =
    Option<unsafe extern "C" fn(progress: *const lodestream_progress, data: *mut c_void) -> c_int>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    #[serde(default = "host")]
    device: String,
    #[serde(default)]
    select: Option<Vec<Selector>>,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    deadline_ms: Option<u64>,
    #[serde(default)]
    pin: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { device: host(), select: None, priority: 0, deadline_ms: None, pin: false }
    }
}

/// Makes what `source` names (an absolute path or a file:// URI) resident, and waits until it is.
///
/// `options` is NULL or a JSON object with any of: "device" and "select" as in lodestream_attach(), "priority", "deadline_ms", "pin".
/// `progress` is NULL or is called about ten times a second, on this thread, with `data`; it must not use `client`. 0, or -1:
/// `job.cancelled` if `progress` wanted that.
///
/// # Safety
/// `client` is NULL or open; `source` and `options` are NULL or strings; `progress` may be called with `data`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_prefetch(
    client: *mut lodestream_client,
    source: *const c_char,
    options: *const c_char,
    progress: lodestream_progress_callback,
    data: *mut c_void,
) -> c_int {
    guard(-1, || {
        // SAFETY: the caller says so.
        let client = unsafe { crate::client(client) }?;
        // SAFETY: the caller says so.
        let source = Source::Uri(unsafe { text(source, "source") }?.to_owned());
        // SAFETY: the caller says so.
        let Options { device, select, priority, deadline_ms, pin } = unsafe { crate::options(options) }?;
        let request = PrefetchRequest {
            source,
            device,
            select,
            targets: Vec::new(),
            priority,
            deadline_ms,
            detach: false,
            pin,
            notify: false,
        };
        let goes_on = |job: &JobInfo| {
            let now = lodestream_progress { bytes: job.bytes, total: job.total, rate: job.rate };
            // SAFETY: the caller says that it may be called with `data`; `now` outlives the call.
            progress.is_none_or(|progress| unsafe { progress(&raw const now, data) } == 0)
        };
        let mut job = client.prefetch(&request, &[], &mut |_| ())?;
        while goes_on(&job) {
            if job.state.ended() {
                break;
            }
            let wait = JobWaitRequest { job: job.job, timeout_ms: Some(PROGRESS_MS), notify: false };
            job = client.job_wait(&wait, &mut |_| ())?;
        }
        if !job.state.ended() {
            client.job_cancel(job.job)?;
            return Err(Error::new(Code::JobCancelled, "the callback has cancelled the load"));
        }
        match (&job.error, job.state) {
            (Some(error), _) => Err(error_of(error)),
            (None, JobState::Done) => Ok(0),
            (None, _) => Err(Error::new(Code::JobCancelled, "the load was cancelled")),
        }
    })
}
