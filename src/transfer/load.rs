//! The course of one job.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use super::{Job, Jobs, Target, Wanted, key};
use crate::catalog::manifest::Manifest;
use crate::catalog::{self, Description};
use crate::checksum::CHUNK_BYTES;
use crate::error::{Code, Error, Result};
use crate::peer;
use crate::peer::fetch::Fetch;
use crate::plan::{self, Layout, Plan};
use crate::shard::{Assignment, Batch, BatchFile, DirectShare, Handles};
use crate::source::Opened;
use crate::source::file::OpenFile;
use crate::telemetry::labels::EndedJob;
use crate::tier::DeviceId;
use crate::tier::residency::{Content, Grant, Hold, Identity};

/// Batches on their way home at a time, beside those of shard threads: what streams from peers bring back.
const HOMES_MIN: usize = 64;

/// Who carries out the moves of a batch.
#[derive(Clone, Copy)]
pub(super) enum Carriers<'a> {
    /// Shard threads, all of them or those with these numbers, and the direct path.
    Shards { moves: Option<&'a [u32]>, priority: i32 },
    /// Streams from peers.
    Peers(&'a Fetch),
}

/// What is known before any memory is taken.
#[derive(Clone)]
pub(super) struct Prepared {
    /// What makes it the same artifact as another request's.
    pub(super) identity: Identity,
    /// The files on this node. None: its bytes come from peers only.
    pub(super) files: Arc<Vec<OpenFile>>,
    pub(super) description: Description,
    /// One for each target.
    pub(super) layouts: Vec<Layout>,
    pub(super) known: Option<Arc<Manifest>>,
}

impl Prepared {
    /// Sizes of the files, bytes.
    pub(super) fn sizes(&self) -> Vec<u64> {
        self.description.files.iter().map(|file| file.bytes).collect()
    }
}

impl Jobs {
    /// Drives a job to its end.
    pub(super) async fn drive(self: Rc<Self>, job: Rc<Job>, wanted: Wanted) {
        let result = self.load(&job, wanted).await;
        let result = match result {
            Ok(contents) => {
                let digest = contents.first().and_then(|content| content.digest().map(str::to_owned));
                for (entry, content) in job.entries.iter().zip(contents) {
                    self.residency.fill(*entry, content);
                }
                Ok(digest)
            }
            Err(error) => {
                job.entries.iter().for_each(|entry| self.residency.forget(*entry));
                self.metrics.error(error.code);
                if error.code == Code::SourceFileIo {
                    self.metrics.file_reads().errors.inc();
                }
                Err(error)
            }
        };
        let bytes = job.progress.bytes_total();
        let state = match &result {
            Ok(_) => EndedJob::Done,
            Err(error) if error.code == Code::JobCancelled => EndedJob::Cancelled,
            Err(_) => EndedJob::Failed,
        };
        match &result {
            Ok(_) => tracing::info!(job = job.id, bytes, elapsed = ?job.elapsed(), "job done"),
            Err(error) => tracing::warn!(job = job.id, bytes, code = %error.code, %error, "job ended"),
        }
        job.end(result);
        self.metrics.job_ended(state, job.elapsed());
        // A load that waits for memory may have it now, or has to be told that it never will.
        self.residency.nudge();
    }

    async fn load(&self, job: &Job, wanted: Wanted) -> Result<Vec<Content>> {
        let prepared = self.prepare(job, &wanted).await?;
        let host = self.residency.host();
        host.load_begins();
        let contents = if wanted.targets.iter().all(|target| target.device == DeviceId::Host) {
            self.load_host(job, prepared, wanted.priority).await.map(|content| vec![content])
        } else {
            match self.below(job, &prepared, &wanted).await {
                Ok(_below) => {
                    let who = (wanted.priority, wanted.tenant);
                    self.load_gpus(job, prepared, &wanted.targets, who).await
                }
                Err(error) => Err(error),
            }
        };
        host.load_ends();
        contents
    }

    /// What only peers have goes to the host tier first, whole: GPUs copy it from there.
    async fn below(&self, job: &Job, prepared: &Prepared, wanted: &Wanted) -> Result<Option<Hold>> {
        if let Identity::Files(_) = prepared.identity {
            return Ok(None);
        }
        let target = Target { device: DeviceId::Host, select: None };
        let key = key(&wanted.opened, target.device, None);
        let (entry, new) = self.residency.enter(key, &wanted.name.source, None, wanted.tenant);
        let hold = self.residency.hold(entry)?;
        if !new {
            let loading = !self.residency.with(entry, |entry| entry.state.is_resident())?;
            if let Some(other) = self.of_entry(entry).filter(|_| loading) {
                tokio::select! {
                    () = other.ended() => {}
                    reason = stop_reason(job) => return Err(reason),
                }
                other.error().map_or(Ok(()), Err)?;
            }
            return Ok(Some(hold));
        }
        job.below.set(Some(entry));
        let layouts = lay_out(&prepared.description, &[target])?;
        match self.load_host(job, Prepared { layouts, ..prepared.clone() }, wanted.priority).await {
            Ok(content) => {
                self.residency.fill(entry, content);
                Ok(Some(hold))
            }
            Err(error) => {
                self.residency.forget(entry);
                Err(error)
            }
        }
    }

    async fn prepare(&self, job: &Job, wanted: &Wanted) -> Result<Prepared> {
        let limits = self.config.borrow().limits.clone();
        let (store, targets) = (self.store.clone(), wanted.targets.clone());
        let entered = self.headers.enter().await;
        let known = match &wanted.opened {
            Opened::Files(_) => None,
            Opened::Digest(digest) => Some(tokio::select! {
                manifest = self.peers.manifest(digest) => manifest?,
                reason = stop_reason(job) => return Err(reason),
            }),
        };
        let (opened, identity) = (wanted.opened.clone(), wanted.identity());
        let prepared = blocking(move || {
            let (files, description, known) = match (opened, known) {
                (Opened::Files(files), _) => {
                    let description = catalog::describe(&files, &limits)?;
                    let known = store.and_then(|store| store.get(&files)).map(Arc::new);
                    (files, description, known)
                }
                (Opened::Digest(_), known) => {
                    let known = known.ok_or_else(peer::nobody)?;
                    (Vec::new(), known.description().clone(), Some(known))
                }
            };
            let layouts = lay_out(&description, &targets)?;
            Ok(Prepared { identity, files: Arc::new(files), description, layouts, known })
        });
        let prepared = prepared.await;
        drop(entered);
        prepared
    }

    /// Sets memory aside, unless the job is to stop before there is any.
    pub(super) async fn reserve(&self, job: &Job, device: DeviceId, bytes: u64) -> Result<Grant> {
        tokio::select! {
            grant = self.residency.reserve(device, bytes, &job.demoted) => grant,
            reason = stop_reason(job) => Err(reason),
        }
    }

    /// Has a batch carried out, and checks that the files stayed what they were.
    ///
    /// Comes back only when no read and no copy is in flight any more (invariant 2). `None` in place of the batch: a
    /// broken shard thread still owns reads into its memory, which is lost.
    pub(super) async fn carry_out(
        &self,
        job: &Job,
        batch: Batch,
        files: &Arc<Vec<OpenFile>>,
        carriers: Carriers<'_>,
    ) -> (Result<()>, Option<Batch>) {
        let batch = Arc::new(batch);
        let before = job.progress.bytes_total();
        let (home, mut back) = mpsc::channel(self.shards.len().max(HOMES_MIN));
        match carriers {
            Carriers::Shards { moves, priority } => {
                let lanes = self.lanes(&batch.plan, files, moves);
                for (shard, moves) in lanes.into_iter().enumerate().filter(|(_, moves)| !moves.is_empty()) {
                    let assignment =
                        Assignment { batch: Arc::clone(&batch), moves, priority, home: home.clone() };
                    if self.shards[shard].send(assignment).is_err() {
                        let message = format!("the mailbox of shard {shard} is full");
                        job.progress.fail(Error::new(Code::JobTooMany, message));
                    }
                }
                self.direct.send(&batch, |region| batch.regions.device(region), &home);
            }
            Carriers::Peers(fetch) => fetch.begin(&batch, &home),
        }
        drop(home);
        let mut reason = None;
        loop {
            tokio::select! {
                got = back.recv() => if got.is_none() { break },
                why = stop_reason(job), if reason.is_none() => {
                    job.progress.stop();
                    // Whoever asks from now on gets a job of its own.
                    job.entries.iter().for_each(|entry| self.residency.disown(*entry));
                    reason = Some(why);
                }
            }
        }
        let (wanted, missed) = match carriers {
            Carriers::Shards { moves, .. } => {
                let direct = batch.direct.as_ref();
                let by_moves = moves.map_or(batch.plan.bytes, |moves| batch.plan.bytes_of(moves));
                let directly = direct.map_or(0, |share| share.plan.bytes());
                (by_moves + directly, direct.map_or(0, DirectShare::missed_bytes))
            }
            Carriers::Peers(fetch) => (batch.plan.bytes, batch.plan.bytes_of(&fetch.left())),
        };
        let mut outcome = match (reason, job.progress.failure()) {
            (Some(reason), _) => Err(reason),
            (None, Some(error)) => Err(error.clone()),
            // Every byte must have been seen: a shard thread that ended early has reported nothing.
            (None, None) if job.progress.bytes_total() + missed != before + wanted => {
                Err(Error::new(Code::Internal, "a shard thread ended before it had read everything"))
            }
            (None, None) => Ok(()),
        };
        if outcome.is_ok() {
            let files = Arc::clone(files);
            outcome = blocking(move || unchanged(&files)).await;
        }
        if let Err(error) = &outcome {
            self.doubt(error, files).await;
        }
        let outcome = outcome.map_err(|error| error.kept("nothing of this load; its memory was given back"));
        (outcome, Arc::into_inner(batch))
    }

    /// The files of a batch, and by what they are read.
    pub(super) fn batch_files(&self, prepared: &Prepared) -> (Vec<BatchFile>, Vec<Handles>) {
        let files = prepared.description.files.iter().enumerate().map(|(number, file)| BatchFile {
            name: file.name.clone(),
            bytes: file.bytes,
            expected: prepared.known.as_ref().map(|manifest| manifest.chunks()[number].clone().into()),
        });
        let handles = prepared.files.iter().map(|file| Handles {
            file: Arc::clone(&file.file),
            direct: file.direct.clone(),
            landing: (self.lane_of)(file.stamp.dev_major, file.stamp.dev_minor).landing,
        });
        (files.collect(), handles.collect())
    }

    /// The manifest of what was read: known before, or made of files that were read whole.
    ///
    /// `checks` are the checksums of all chunks of all files, in order.
    pub(super) async fn manifest(&self, prepared: &Prepared, checks: &[u64]) -> Option<Arc<Manifest>> {
        match &prepared.known {
            Some(manifest) => Some(Arc::clone(manifest)),
            None if prepared.layouts.iter().any(|layout| layout.whole) => {
                self.remember(Arc::clone(&prepared.files), &prepared.description, checks).await
            }
            None => None,
        }
    }

    /// The moves of each shard thread, all or those that are named: a file is read by the thread of its drive.
    fn lanes(&self, plan: &Plan, files: &[OpenFile], moves: Option<&[u32]>) -> Vec<Vec<Range<u32>>> {
        let mut lanes = vec![Vec::<Range<u32>>::new(); self.shards.len()];
        let all = 0..plan.moves.len() as u32;
        let numbers: &mut dyn Iterator<Item = u32> = match moves {
            Some(moves) => &mut moves.iter().copied(),
            None => &mut all.into_iter(),
        };
        for number in numbers {
            let step = &plan.moves[number as usize];
            let stamp = &files[step.file as usize].stamp;
            let shard = (self.lane_of)(stamp.dev_major, stamp.dev_minor).shard % lanes.len();
            match lanes[shard].last_mut() {
                Some(range) if range.end == number => range.end += 1,
                _ => lanes[shard].push(number..number + 1),
            }
        }
        lanes
    }

    /// Makes the manifest of files that were read whole, and keeps it for the next run.
    ///
    /// `None` if it would be too large; the artifact is then resident without a digest.
    async fn remember(
        &self,
        files: Arc<Vec<OpenFile>>,
        description: &Description,
        checks: &[u64],
    ) -> Option<Arc<Manifest>> {
        let mut rest = checks;
        let mut sums = Vec::with_capacity(files.len());
        for file in files.iter() {
            let chunks = file.stamp.bytes.div_ceil(CHUNK_BYTES) as usize;
            let (own, others) = rest.split_at_checked(chunks)?;
            sums.push(own.to_vec());
            rest = others;
        }
        let (description, store) = (description.clone(), self.store.clone());
        let made = blocking(move || {
            let manifest = Manifest::new(description, sums).map_err(|error| {
                Error::new(Code::Internal, format!("the manifest cannot be made: {error}"))
            })?;
            if let Some(store) = store
                && let Err(error) = store.put(&files, &manifest)
            {
                tracing::warn!(%error, "a manifest was not kept for the next run");
            }
            Ok(Arc::new(manifest))
        });
        made.await.inspect_err(|error| tracing::warn!(%error, "an artifact has no digest")).ok()
    }

    /// Bytes that differ from what was remembered: whichever is wrong, the next load starts without the memory of it.
    pub(super) async fn doubt(&self, error: &Error, files: &Arc<Vec<OpenFile>>) {
        if error.code != Code::CatalogChecksumMismatch {
            return;
        }
        if let Some(store) = self.store.clone() {
            let files = Arc::clone(files);
            let _ = tokio::task::spawn_blocking(move || store.forget(&files)).await;
        }
    }
}

/// Runs something that blocks off the control thread.
pub async fn blocking<T: Send + 'static>(act: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let joined = tokio::task::spawn_blocking(act).await;
    joined.unwrap_or_else(|_| Err(Error::new(Code::Internal, "a thread of the control plane failed")))
}

/// Lays out the regions.
fn lay_out(description: &Description, targets: &[Target]) -> Result<Vec<Layout>> {
    let sizes: Vec<u64> = description.files.iter().map(|file| file.bytes).collect();
    let layouts = targets.iter().map(|target| {
        let picks = target.select.as_deref();
        let picks =
            picks.map(|select| catalog::select::pick(&description.tensors, Some(select))).transpose()?;
        let lay_out = match target.device {
            DeviceId::Host => plan::layout,
            DeviceId::Gpu(_) => plan::packed,
        };
        lay_out(&sizes, &description.tensors, picks.as_deref()).ok_or_else(too_large)
    });
    layouts.collect()
}

/// Checksums that shard threads have left.
pub(super) fn sums(checks: &[AtomicU64]) -> Box<[u64]> {
    checks.iter().map(|sum| sum.load(Ordering::Acquire)).collect()
}

/// Checks that the files are still what they were when they were opened.
fn unchanged(files: &[OpenFile]) -> Result<()> {
    for file in files {
        if file.restamp()? != file.stamp {
            let message = format!("{} was changed while it was read: load it again", file.name);
            return Err(Error::new(Code::SourceFileChanged, message));
        }
    }
    Ok(())
}

pub(super) fn too_large() -> Error {
    Error::new(Code::TierHostOverBudget, "the sizes in this artifact add up to more than can be addressed")
}

pub(super) fn too_many_reads() -> Error {
    let message =
        format!("this takes more than {} reads: select fewer rows, or whole tensors", plan::MOVES_MAX);
    Error::new(Code::PlanTooManyReads, message)
}

/// Resolves when a job should stop, with the reason.
pub(super) async fn stop_reason(job: &Job) -> Error {
    loop {
        if let Some(reason) = job.reason_to_stop() {
            return reason;
        }
        match job.deadline() {
            Some(deadline) => drop(tokio::time::timeout_at(deadline.into(), job.interest.notified()).await),
            None => job.interest.notified().await,
        }
    }
}
