//! One job: its state, who is interested in it, and what it says about itself.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, watch};

use super::Name;
use crate::api::methods::{ErrorData, JobInfo, JobState, PeerShare};
use crate::error::{Code, Error};
use crate::peer::fetch::Fetch;
use crate::shard::{Path, Phase, Progress};
use crate::tier::residency::{EntryId, Viewer};

/// Number of a job, unique while the daemon runs.
pub type JobId = u64;

/// One asynchronous transfer that makes an artifact resident.
#[derive(Debug)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// What it fills: one entry, or one for each rank of a tensor-parallel group.
    pub entries: Vec<EntryId>,
    name: Name,
    created: Instant,
    /// When it was asked for, milliseconds since the Unix epoch.
    pub(super) created_ms: u64,
    /// Bytes that have arrived; also the way to stop it.
    pub(super) progress: Arc<Progress>,
    /// Bytes to move, once planned.
    pub(super) total: Cell<u64>,
    pub(super) began: Cell<Option<Instant>>,
    /// The entry of the host tier that it fills on the way to GPUs, if it does.
    pub(super) below: Cell<Option<EntryId>>,
    /// Its way from peers, if it has one.
    pub(super) fetch: RefCell<Option<Fetch>>,
    /// Bytes that went from its devices to the host tier to make room for it.
    pub(super) demoted: Rc<Cell<u64>>,
    outcome: RefCell<Option<Outcome>>,
    state: watch::Sender<JobState>,
    interests: RefCell<Vec<Interested>>,
    /// Everyone who ever had an interest: they may see the job.
    tenants: RefCell<BTreeSet<u32>>,
    next_interest: Cell<u64>,
    /// The interests have changed.
    pub(super) interest: Notify,
}

/// How a job ended.
#[derive(Debug, Clone)]
struct Outcome {
    result: Result<Option<String>, Error>,
    elapsed: Duration,
}

#[derive(Debug)]
struct Interested {
    number: u64,
    tenant: u32,
    /// The connection that asked, if the interest ends with it.
    connection: Option<u64>,
    deadline: Option<Instant>,
}

/// One requester's interest in a job. When the last one is dropped before the job has ended, it is cancelled.
#[derive(Debug)]
pub struct Interest {
    job: Rc<Job>,
    number: u64,
}

impl Interest {
    /// The job.
    pub fn job(&self) -> &Rc<Job> {
        &self.job
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        self.job
            .interests
            .borrow_mut()
            .retain(|other| other.number != self.number || other.connection.is_none());
        self.job.interest.notify_one();
    }
}

impl Job {
    pub(super) fn new(id: JobId, entries: Vec<EntryId>, name: Name) -> Job {
        Job {
            id,
            entries,
            name,
            created: Instant::now(),
            created_ms: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
            progress: Arc::default(),
            total: Cell::new(0),
            began: Cell::new(None),
            below: Cell::new(None),
            fetch: RefCell::default(),
            demoted: Rc::default(),
            outcome: RefCell::default(),
            state: watch::Sender::new(JobState::Queued),
            interests: RefCell::default(),
            tenants: RefCell::default(),
            next_interest: Cell::new(0),
            interest: Notify::new(),
        }
    }

    /// Registers an interest. With `connection` it ends when dropped; without, it stays to the end of the job.
    pub fn join(
        self: &Rc<Self>,
        tenant: u32,
        connection: Option<u64>,
        deadline: Option<Instant>,
    ) -> Interest {
        let number = self.next_interest.get();
        self.next_interest.set(number + 1);
        self.tenants.borrow_mut().insert(tenant);
        self.interests.borrow_mut().push(Interested { number, tenant, connection, deadline });
        self.interest.notify_one();
        Interest { job: Rc::clone(self), number }
    }

    /// Takes back the interests of one tenant, or all of them: the job ends unless somebody else wants it.
    pub fn cancel(&self, viewer: Viewer) {
        self.interests.borrow_mut().retain(|other| viewer.is_some_and(|tenant| tenant != other.tenant));
        self.interest.notify_one();
    }

    /// Whether `viewer` may know of it.
    pub fn seen_by(&self, viewer: Viewer) -> bool {
        viewer.is_none_or(|tenant| self.tenants.borrow().contains(&tenant))
    }

    /// Why it should stop now, if it should.
    pub(super) fn reason_to_stop(&self) -> Option<Error> {
        let interests = self.interests.borrow();
        if interests.is_empty() {
            let message = "the job was cancelled: nobody waits for it any more";
            return Some(
                Error::new(Code::JobCancelled, message).kept("nothing of it; its memory was given back"),
            );
        }
        let now = Instant::now();
        let late = |interested: &Interested| interested.deadline.is_some_and(|deadline| deadline <= now);
        interests.iter().all(late).then(|| {
            Error::new(Code::JobDeadlineExceeded, "the job did not end before its deadline")
                .kept("nothing of it; its memory was given back")
        })
    }

    /// When the last deadline is over, if every interest has one.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let interests = self.interests.borrow();
        interests.iter().map(|interested| interested.deadline).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    pub(super) fn begin(&self, total: u64) {
        // What goes to GPUs by way of the host tier begins twice.
        self.total.set(self.progress.bytes_total() + total);
        if self.began.get().is_none() {
            self.began.set(Some(Instant::now()));
        }
        self.state.send_replace(JobState::Running);
    }

    pub(super) fn end(&self, result: Result<Option<String>, Error>) {
        let state = match &result {
            Ok(_) => JobState::Done,
            Err(error) if matches!(error.code, Code::JobCancelled) => JobState::Cancelled,
            Err(_) => JobState::Failed,
        };
        *self.outcome.borrow_mut() = Some(Outcome { result, elapsed: self.created.elapsed() });
        self.state.send_replace(state);
    }

    /// Its state.
    pub fn state(&self) -> JobState {
        *self.state.borrow()
    }

    /// Why it failed, if it has.
    pub fn error(&self) -> Option<Error> {
        self.outcome.borrow().as_ref().and_then(|outcome| outcome.result.as_ref().err().cloned())
    }

    /// How long it took, once ended; else since it was asked for.
    pub fn elapsed(&self) -> Duration {
        self.outcome.borrow().as_ref().map_or_else(|| self.created.elapsed(), |outcome| outcome.elapsed)
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        let mut state = self.state.subscribe();
        // The sender is in `self`, so it cannot be gone.
        let _ = state.wait_for(|state| state.ended()).await;
    }

    /// What it says about itself.
    pub fn info(&self) -> JobInfo {
        let (bytes, total) = (self.progress.bytes_total(), self.total.get());
        let outcome = self.outcome.borrow();
        let running = self.began.get().map(|began| match &*outcome {
            Some(outcome) => outcome.elapsed.saturating_sub(began - self.created),
            None => began.elapsed(),
        });
        let rate = running.map_or(0.0, |time| bytes as f64 / time.as_secs_f64().max(1e-9));
        let eta = (rate > 0.0 && outcome.is_none())
            .then(|| (total.saturating_sub(bytes) as f64 / rate * 1e3) as u64);
        let observed = Path::ALL.iter().map(|path| (path.as_str().to_owned(), self.progress.bytes(*path)));
        JobInfo {
            job: self.id,
            state: self.state(),
            artifact: self.name.source.clone(),
            device: self.name.device.clone(),
            bytes,
            total,
            rate,
            source: self.source().to_owned(),
            peers: self.peers(),
            path: observed.filter(|(_, bytes)| *bytes > 0).collect::<BTreeMap<_, _>>(),
            demoted_bytes: self.demoted.get(),
            eta_ms: eta,
            bottleneck: self.bottleneck().map(str::to_owned),
            elapsed_ms: self.elapsed().as_millis() as u64,
            digest: outcome.as_ref().and_then(|outcome| outcome.result.clone().ok().flatten()),
            error: outcome.as_ref().and_then(|outcome| outcome.result.as_ref().err()).map(ErrorData::from),
        }
    }

    /// Where its bytes come from, as observed.
    fn source(&self) -> &'static str {
        let bytes = |paths: &[Path]| paths.iter().map(|path| self.progress.bytes(*path)).sum::<u64>();
        let from_peers = bytes(&[Path::Tcp, Path::Rdma]);
        let from_files = bytes(&[Path::Direct, Path::Staged, Path::Cached, Path::Buffered, Path::Compat]);
        match (from_peers > 0 || self.fetch.borrow().is_some(), from_files > 0) {
            (true, true) => "peer,file",
            (true, false) => "peer",
            (false, _) => "file",
        }
    }

    fn peers(&self) -> Vec<PeerShare> {
        let shares = self.fetch.borrow().as_ref().map(Fetch::shares).unwrap_or_default();
        let shares = shares.into_iter().map(|share| PeerShare {
            address: share.address,
            node: share.node,
            bytes: share.bytes,
            left: share.left.map(|error| error.code.as_str().to_owned()),
        });
        shares.collect()
    }

    /// What most of the time went to, as measured on the shard threads.
    fn bottleneck(&self) -> Option<&'static str> {
        if self.began.get().is_none() {
            return Some("queue");
        }
        // Copies from the page cache happen when a read is submitted, page faults of new memory too.
        let from_cache = self.progress.bytes(Path::Cached) * 2 > self.progress.bytes_total();
        let phases = [
            (if self.source() == "peer" { "network" } else { "storage" }, Phase::Wait),
            ("checksum", Phase::Checksum),
            (if self.name.device == "host" { "copy" } else { "link" }, Phase::Copy),
            (if from_cache { "copy" } else { "memory" }, Phase::Submit),
        ];
        let (name, nanos) = phases
            .map(|(name, phase)| (name, self.progress.nanos(phase)))
            .into_iter()
            .max_by_key(|(_, nanos)| *nanos)?;
        (nanos > 0).then_some(name)
    }
}
