//! What a job says about itself.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ErrorData;

/// State of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waiting for its turn or for memory.
    Queued,
    /// Moving bytes.
    Running,
    /// Ended: the artifact is resident.
    Done,
    /// Ended with an error; everything it took was given back.
    Failed,
    /// Cancelled; everything it took was given back.
    Cancelled,
}

impl JobState {
    /// Whether the job has ended.
    pub fn ended(self) -> bool {
        matches!(self, JobState::Done | JobState::Failed | JobState::Cancelled)
    }
}

/// A job, and the content of the notification `job.progress`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JobInfo {
    /// Its number, unique while the daemon runs.
    pub job: u64,
    /// State.
    pub state: JobState,
    /// The artifact's source.
    pub artifact: String,
    /// Where it goes.
    pub device: String,
    /// Bytes that have arrived and were checksummed.
    pub bytes: u64,
    /// Bytes to move.
    pub total: u64,
    /// Bytes per second since it started to run.
    pub rate: f64,
    /// Where its bytes come from: `file`, `peer`, or `peer,file` if files had to give the rest.
    pub source: String,
    /// Bytes by path, as observed: `direct` (read in place past the page cache), `staged` (by way of a slot),
    /// `cached` (copied from the page cache), `buffered` (through the page cache, for want of O_DIRECT), `tcp` (from a
    /// peer, over TLS).
    pub path: BTreeMap<String, u64>,
    /// The peers that were asked, the first choice first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerShare>,
    /// Bytes that were copied from its GPUs to the host tier to make room for it.
    #[serde(default)]
    pub demoted_bytes: u64,
    /// Estimated milliseconds to the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_ms: Option<u64>,
    /// What the time went to most: `storage`, `network`, `checksum`, `memory` (page faults), `copy`, or `queue`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bottleneck: Option<String>,
    /// Milliseconds since the request.
    pub elapsed_ms: u64,
    /// Digest, once done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorData>,
}

/// What a peer has given to a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PeerShare {
    /// Where it listens.
    pub address: String,
    /// The name that it has given itself.
    pub node: String,
    /// Bytes that it gave.
    pub bytes: u64,
    /// Why it was left, if it was: a code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<String>,
}
