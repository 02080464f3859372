//! Loads into the host tier: memory is taken, filled by the shard threads, and sealed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinHandle;

use super::load::{Carriers, Prepared, blocking, sums, too_large, too_many_reads};
use super::{Job, Jobs};
use crate::error::{Code, Error, Result};
use crate::peer::{self, offered::Offered};
use crate::plan::{self, Plan, Target};
use crate::shard::{Batch, Part, Progress, Regions};
use crate::sys::mem::{HUGE_PAGE_BYTES, Memory};
use crate::tier::DeviceId;
use crate::tier::host::Parts;
use crate::tier::residency::{Content, Grant, Region};

/// Pages of a fresh part are touched ahead of the reads in steps of this many bytes.
const POPULATE_BYTES: u64 = 16 << 20;

impl Jobs {
    /// Makes what was prepared resident on the host tier; or gives all memory back.
    pub(super) async fn load_host(&self, job: &Job, prepared: Prepared, priority: i32) -> Result<Content> {
        let layout = prepared.layouts.first().ok_or_else(too_large)?;
        let bytes = layout.bytes.max(1).checked_next_multiple_of(HUGE_PAGE_BYTES).ok_or_else(too_large)?;
        let Grant::Host(grant) = self.reserve(job, DeviceId::Host, bytes).await? else {
            return Err(Error::new(Code::Internal, "the host tier gave memory of another"));
        };
        job.entries.iter().for_each(|entry| self.residency.takes(*entry, bytes));
        let host = self.residency.host();
        let Parts { parts } = host.make(grant).await?;
        let (prepared, plan) = match self.plan_host(prepared, &parts).await {
            Ok(planned) => planned,
            Err(error) => {
                host.discard(parts.into_iter().map(|(memory, _)| memory).collect());
                return Err(error);
            }
        };
        job.begin(plan.bytes);
        let parts = parts.into_iter().map(|(memory, populated)| Part { memory: Arc::new(memory), populated });
        let regions = Regions::Host(parts.collect());
        let mut batch = Batch::new(plan, self.batch_files(&prepared), regions, Arc::clone(&job.progress));
        let offered = self.peers.offer_loading(job, &prepared, batch.regions.parts());
        batch.offer = offered.as_ref().map(|offered| Arc::clone(offered.offer()));
        let ahead = Populating::begin(&batch, &job.progress);
        let (outcome, batch) = self.bring(job, batch, &prepared, priority).await;
        ahead.end().await;
        let checks = batch.as_ref().map(|batch| sums(&batch.checks)).unwrap_or_default();
        let manifest = match (&outcome, &batch) {
            (Ok(()), Some(_)) => self.manifest(&prepared, &checks).await,
            _ => None,
        };
        let chunks = batch.as_ref().map(chunks).unwrap_or_default();
        let Some(memories) = batch.and_then(recover) else {
            // It stays in the account of regions: lost, but never handed to anyone else.
            tracing::error!(job = job.id, "memory leaked: a broken shard thread still owns reads into it");
            let lost = Error::new(Code::Internal, "a shard thread did not give the job back");
            return Err(outcome.err().unwrap_or(lost));
        };
        if let Err(error) = outcome {
            if let Some(offered) = offered {
                offered.end().await;
            }
            host.discard(memories);
            return Err(error);
        }
        let parts = host.seal(memories)?;
        let offered = offered.filter(Offered::complete);
        let Prepared { description, layouts, .. } = prepared;
        let layout = layouts.into_iter().next().ok_or_else(too_large)?;
        let offered = match (offered, &manifest) {
            (None, Some(manifest)) if layout.whole => self.peers.offer(manifest, &layout.files, &parts),
            (offered, _) => offered,
        };
        let (files, tensors, region) = (layout.files, layout.tensors, Region::Host(parts));
        Ok(Content { description, files, tensors, manifest, checks, chunks, region, offered })
    }

    /// Has a batch carried out: by peers as far as they give anything, the rest by shard threads from the files.
    async fn bring(
        &self,
        job: &Job,
        batch: Batch,
        prepared: &Prepared,
        priority: i32,
    ) -> (Result<()>, Option<Batch>) {
        let all = Carriers::Shards { moves: None, priority };
        let Some(fetch) = self.peers.fetch(job, prepared).await else {
            if prepared.files.is_empty() {
                return (Err(peer::nobody()), Some(batch));
            }
            return self.carry_out(job, batch, &prepared.files, all).await;
        };
        let (outcome, batch) = self.carry_out(job, batch, &prepared.files, Carriers::Peers(&fetch)).await;
        self.peers.fetched(&fetch);
        let left = fetch.left();
        match (outcome, batch) {
            (Ok(()), Some(batch)) if !left.is_empty() && prepared.files.is_empty() => {
                (Err(fetch.why().kept("nothing of this load; its memory was given back")), Some(batch))
            }
            (Ok(()), Some(batch)) if !left.is_empty() => {
                tracing::warn!(job = job.id, moves = left.len(), error = %fetch.why(), "the rest comes from files");
                let rest = Carriers::Shards { moves: Some(&left), priority };
                self.carry_out(job, batch, &prepared.files, rest).await
            }
            ended => ended,
        }
    }

    async fn plan_host(&self, prepared: Prepared, parts: &[(Memory, bool)]) -> Result<(Prepared, Plan)> {
        let part_sizes: Vec<u64> = parts.iter().map(|(memory, _)| memory.bytes()).collect();
        let block = self.config.borrow().data_plane.block_bytes;
        blocking(move || {
            let layout = prepared.layouts.first().ok_or_else(too_large)?;
            let plan =
                plan::moves(layout, &prepared.sizes(), &part_sizes, block).ok_or_else(too_many_reads)?;
            Ok((prepared, plan))
        })
        .await
    }
}

/// Where in the region the chunks lie that the checksums of a batch are of.
fn chunks(batch: &Batch) -> Box<[(u64, u32)]> {
    let mut starts = Vec::new();
    let mut end = 0;
    for part in batch.regions.parts() {
        starts.push(end);
        end += part.memory.bytes();
    }
    let places = batch.plan.moves.iter().flat_map(|step| {
        let place = match &step.target {
            Target::Direct { part, offset } => starts.get(*part as usize).map(|start| start + offset),
            Target::Staged(_) => None,
        };
        step.pieces().map(move |piece| match place {
            Some(place) => (place + (piece.start - step.offset), (piece.end - piece.start) as u32),
            None => (0, 0),
        })
    });
    places.collect()
}

/// Gets the memory out of a batch that every shard thread has given back.
fn recover(batch: Batch) -> Option<Vec<Memory>> {
    let Regions::Host(parts) = batch.regions else { return None };
    parts.into_iter().map(|part| Arc::into_inner(part.memory)).collect()
}

/// Threads that touch the pages of fresh parts ahead of the reads, so that reads do not wait for page faults.
struct Populating {
    enough: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Populating {
    fn begin(batch: &Batch, progress: &Arc<Progress>) -> Populating {
        let enough = Arc::new(AtomicBool::new(false));
        let fresh =
            batch.regions.parts().iter().filter(|part| !part.populated).map(|part| Arc::clone(&part.memory));
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
