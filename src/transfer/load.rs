//! The course of one job.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Job, Jobs, Wanted};
use crate::api::methods::Selector;
use crate::catalog::manifest::Manifest;
use crate::catalog::store::Store;
use crate::catalog::{self, Description};
use crate::checksum::CHUNK_BYTES;
use crate::config::Limits;
use crate::error::{Code, Error, Result};
use crate::plan::{self, Layout, Plan};
use crate::shard::{Assignment, Batch, BatchFile, Part, Progress};
use crate::source::file::OpenFile;
use crate::sys::mem::{HUGE_PAGE_BYTES, Memory};
use crate::telemetry::labels::{EndedJob, Source};
use crate::tier::host::Parts;
use crate::tier::residency::Content;

/// Pages of a fresh part are touched ahead of the reads in steps of this many bytes.
const POPULATE_BYTES: u64 = 16 << 20;

/// What is known before any memory is taken.
struct Prepared {
    files: Vec<OpenFile>,
    description: Description,
    layout: Layout,
    known: Option<Manifest>,
}

impl Jobs {
    /// Drives a job to its end.
    pub(super) async fn drive(self: Rc<Self>, job: Rc<Job>, wanted: Wanted) {
        let result = self.load(&job, wanted).await;
        let result = match result {
            Ok(content) => {
                let digest = content.digest.clone();
                self.residency.fill(job.entry, content);
                Ok(digest)
            }
            Err(error) => {
                self.residency.forget(job.entry);
                self.metrics.error(error.code);
                if error.code == Code::SourceFileIo {
                    self.metrics.reads(Source::File).errors.inc();
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
        self.residency.host().nudge();
    }

    async fn load(&self, job: &Job, wanted: Wanted) -> Result<Content> {
        let limits = self.config.borrow().limits.clone();
        let (store, select) = (self.store.clone(), wanted.select.clone());
        let entered = self.headers.enter().await;
        let prepared = blocking(move || {
            Ok((prepare(wanted.files, select.as_deref(), store.as_deref(), &limits)?, entered))
        });
        let (prepared, entered) = prepared.await?;
        drop(entered);
        let bytes = prepared.layout.bytes.max(1).checked_next_multiple_of(HUGE_PAGE_BYTES);
        let bytes = bytes.ok_or_else(too_large)?;
        let host = self.residency.host();
        host.load_begins();
        let content = self.take_and_fill(job, prepared, bytes, wanted.priority).await;
        host.load_ends();
        content
    }

    async fn take_and_fill(
        &self,
        job: &Job,
        prepared: Prepared,
        bytes: u64,
        priority: i32,
    ) -> Result<Content> {
        let grant = tokio::select! {
            grant = self.residency.reserve(bytes) => grant?,
            reason = stop_reason(job) => return Err(reason),
        };
        self.residency.takes(job.entry, bytes);
        let parts = self.residency.host().make(grant).await?;
        self.fill(job, prepared, parts, priority).await
    }

    /// Moves the bytes, and seals the memory; or gives it back.
    async fn fill(&self, job: &Job, prepared: Prepared, parts: Parts, priority: i32) -> Result<Content> {
        let host = self.residency.host();
        let Prepared { files, description, layout, known } = prepared;
        let sizes: Vec<u64> = files.iter().map(|file| file.stamp.bytes).collect();
        let part_sizes: Vec<u64> = parts.parts.iter().map(|(memory, _)| memory.bytes()).collect();
        let block = self.config.borrow().data_plane.block_bytes;
        let (layout, plan) = match blocking(move || {
            let plan = plan::moves(&layout, &sizes, &part_sizes, block).ok_or_else(too_many_reads)?;
            Ok((layout, plan))
        })
        .await
        {
            Ok(planned) => planned,
            Err(error) => {
                host.discard(parts.parts.into_iter().map(|(memory, _)| memory).collect());
                return Err(error);
            }
        };
        job.begin(plan.bytes);
        let (outcome, memories, checks) =
            self.transfer(job, plan, &files, known.as_ref(), parts, priority).await;
        let files = Arc::new(files);
        let outcome = match outcome {
            Ok(()) => {
                let files = Arc::clone(&files);
                blocking(move || unchanged(&files)).await
            }
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => {}
            Err(error) => {
                host.discard(memories);
                self.doubt(&error, &files).await;
                return Err(error.kept("nothing of this load; its memory was given back"));
            }
        };
        let whole = layout.files.iter().all(Option::is_some);
        let digest = match (known, whole) {
            (Some(manifest), _) => Some(manifest.digest().to_owned()),
            (None, true) => self.remember(files, &description, &checks).await,
            (None, false) => None,
        };
        let mut sealed = Vec::with_capacity(memories.len());
        let mut retired = Vec::with_capacity(memories.len());
        let mut memories = memories.into_iter();
        while let Some(memory) = memories.next() {
            match memory.seal() {
                Ok((part, mapping)) => {
                    sealed.push(part);
                    retired.push(mapping);
                }
                Err(failed) => {
                    let (memory, error) = *failed;
                    drop(retired);
                    host.release(sealed);
                    host.discard(std::iter::once(memory).chain(memories).collect());
                    let message = format!("a region cannot be sealed: {error}");
                    return Err(Error::new(Code::TierHostOutOfMemory, message));
                }
            }
        }
        host.unmap_later(retired);
        Ok(Content {
            description,
            files: layout.files,
            tensors: layout.tensors,
            digest,
            checks,
            parts: sealed,
        })
    }

    /// Has the shard threads carry out a plan. Comes back only when no read is in flight any more (invariant 2).
    async fn transfer(
        &self,
        job: &Job,
        plan: Plan,
        files: &[OpenFile],
        known: Option<&Manifest>,
        parts: Parts,
        priority: i32,
    ) -> (Result<()>, Vec<Memory>, Box<[u64]>) {
        let lanes = self.lanes(&plan, files);
        let batch_files = files.iter().enumerate().map(|(number, file)| BatchFile {
            name: file.name.clone(),
            file: Arc::clone(&file.file),
            direct: file.direct.clone(),
            bytes: file.stamp.bytes,
            landing: (self.lane_of)(file.stamp.dev_major, file.stamp.dev_minor).landing,
            expected: known.map(|manifest| manifest.chunks()[number].clone().into()),
        });
        let parts =
            parts.parts.into_iter().map(|(memory, populated)| Part { memory: Arc::new(memory), populated });
        let batch = Batch::new(plan, batch_files.collect(), parts.collect(), Arc::clone(&job.progress));
        let batch = Arc::new(batch);
        let total = batch.plan.bytes;
        let (home, mut back) = mpsc::channel(self.shards.len());
        let ahead = Populating::begin(&batch, &job.progress);
        for (shard, moves) in lanes.into_iter().enumerate().filter(|(_, moves)| !moves.is_empty()) {
            let assignment = Assignment { batch: Arc::clone(&batch), moves, priority, home: home.clone() };
            if self.shards[shard].send(assignment).is_err() {
                job.progress
                    .fail(Error::new(Code::JobTooMany, format!("the mailbox of shard {shard} is full")));
            }
        }
        drop(home);
        let mut reason = None;
        loop {
            tokio::select! {
                got = back.recv() => if got.is_none() { break },
                why = stop_reason(job), if reason.is_none() => {
                    job.progress.stop();
                    // Whoever asks from now on gets a job of its own.
                    self.residency.disown(job.entry);
                    reason = Some(why);
                }
            }
        }
        ahead.end().await;
        let outcome = match (reason, job.progress.failure()) {
            (Some(reason), _) => Err(reason),
            (None, Some(error)) => Err(error.clone()),
            // Every byte must have been seen: a shard thread that ended early has reported nothing.
            (None, None) if job.progress.bytes_total() != total => {
                Err(Error::new(Code::Internal, "a shard thread ended before it had read everything"))
            }
            (None, None) => Ok(()),
        };
        match recover(batch) {
            Some((memories, checks)) => (outcome, memories, checks),
            None => {
                // It stays in the account of regions: lost, but never handed to anyone else.
                tracing::error!(
                    job = job.id,
                    "memory leaked: a broken shard thread still owns reads into it"
                );
                let lost = Error::new(Code::Internal, "a shard thread did not give the job back");
                (Err(outcome.err().unwrap_or(lost)), Vec::new(), Box::default())
            }
        }
    }

    /// The moves of each shard thread: a file is read by the thread of its drive.
    fn lanes(&self, plan: &Plan, files: &[OpenFile]) -> Vec<Vec<Range<u32>>> {
        let mut lanes = vec![Vec::<Range<u32>>::new(); self.shards.len()];
        for (number, step) in (0u32..).zip(&plan.moves) {
            let stamp = &files[step.file as usize].stamp;
            let shard = (self.lane_of)(stamp.dev_major, stamp.dev_minor).shard % lanes.len();
            match lanes[shard].last_mut() {
                Some(range) if range.end == number => range.end += 1,
                _ => lanes[shard].push(number..number + 1),
            }
        }
        lanes
    }

    /// Makes the manifest of files that were read whole, keeps it for the next run, and gives its digest.
    ///
    /// `None` if it would be too large; the artifact is then resident without a digest.
    async fn remember(
        &self,
        files: Arc<Vec<OpenFile>>,
        description: &Description,
        checks: &[u64],
    ) -> Option<String> {
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
            Ok(manifest.digest().to_owned())
        });
        made.await.inspect_err(|error| tracing::warn!(%error, "an artifact has no digest")).ok()
    }

    /// Bytes that differ from what was remembered: whichever is wrong, the next load starts without the memory of it.
    async fn doubt(&self, error: &Error, files: &Arc<Vec<OpenFile>>) {
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

/// Reads the headers and lays out the region. Takes no memory beyond the headers.
fn prepare(
    files: Vec<OpenFile>,
    select: Option<&[Selector]>,
    store: Option<&Store>,
    limits: &Limits,
) -> Result<Prepared> {
    let description = catalog::describe(&files, limits)?;
    let picks = select.map(|select| catalog::select::pick(&description.tensors, Some(select))).transpose()?;
    let sizes: Vec<u64> = files.iter().map(|file| file.stamp.bytes).collect();
    let layout = plan::layout(&sizes, &description.tensors, picks.as_deref()).ok_or_else(too_large)?;
    let known = store.and_then(|store| store.get(&files));
    Ok(Prepared { files, description, layout, known })
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

fn too_large() -> Error {
    Error::new(Code::TierHostOverBudget, "the sizes in this artifact add up to more than can be addressed")
}

fn too_many_reads() -> Error {
    let message =
        format!("this takes more than {} reads: select fewer rows, or whole tensors", plan::MOVES_MAX);
    Error::new(Code::PlanTooManyReads, message)
}

/// Gets the memory and the checksums out of a batch that every shard thread has given back.
fn recover(batch: Arc<Batch>) -> Option<(Vec<Memory>, Box<[u64]>)> {
    let batch = Arc::into_inner(batch)?;
    let memories = batch.parts.into_iter().map(|part| Arc::into_inner(part.memory));
    let checks = batch.checks.iter().map(|sum| sum.load(Ordering::Acquire)).collect();
    Some((memories.collect::<Option<_>>()?, checks))
}

/// Resolves when a job should stop, with the reason.
async fn stop_reason(job: &Job) -> Error {
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

/// Threads that touch the pages of fresh parts ahead of the reads, so that reads do not wait for page faults.
struct Populating {
    enough: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Populating {
    fn begin(batch: &Batch, progress: &Arc<Progress>) -> Populating {
        let enough = Arc::new(AtomicBool::new(false));
        let fresh = batch.parts.iter().filter(|part| !part.populated).map(|part| Arc::clone(&part.memory));
        let tasks = fresh.map(|memory| {
            let (enough, progress) = (Arc::clone(&enough), Arc::clone(progress));
            tokio::task::spawn_blocking(move || {
                for offset in (0..memory.bytes()).step_by(POPULATE_BYTES as usize) {
                    let bytes = POPULATE_BYTES.min(memory.bytes() - offset);
                    if enough.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(error) = memory.populate(offset, bytes) {
                        // A huge page that a limit withholds: touching it would end the process.
                        let message = format!("the kernel withholds memory that it had promised: {error}");
                        progress.fail(Error::new(Code::TierHostOutOfMemory, message));
                        return;
                    }
                }
            })
        });
        Populating { tasks: tasks.collect(), enough }
    }

    async fn end(self) {
        self.enough.store(true, Ordering::Relaxed);
        for task in self.tasks {
            // It has nothing to report; a panic in it has been reported by the panic hook.
            let _ = task.await;
        }
    }
}
