//! Loads into the memory of GPUs: one region on each device that was asked for, filled from one read of the files.

use std::sync::Arc;

use super::direct::Settling;
use super::landed::{Chunk, Landed};
use super::load::{Carriers, Prepared, blocking, too_large, too_many_reads};
use super::{Job, Jobs, Target};
use crate::catalog::manifest::Manifest;
use crate::checksum::CHUNK_BYTES;
use crate::error::{Code, Error, Result};
use crate::plan;
use crate::shard::{Batch, DeviceRegion, Regions, mismatch};
use crate::sys::cuda::DeviceMemory;
use crate::tier::DeviceId;
use crate::tier::residency::{Content, Grant, Region};

/// Memory on one device that is being filled.
pub(super) struct Taken {
    pub(super) device: usize,
    pub(super) memory: Arc<DeviceMemory>,
}

impl Jobs {
    /// Makes what was prepared resident on GPUs, each layout on the device of its target; or gives all memory back.
    pub(super) async fn load_gpus(
        &self,
        job: &Job,
        prepared: Prepared,
        targets: &[Target],
        (priority, tenant): (i32, u32),
    ) -> Result<Vec<Content>> {
        let mut taken = Vec::with_capacity(targets.len());
        let result = self.take_and_fill(job, prepared, targets, (priority, tenant), &mut taken).await;
        if result.is_err() {
            for Taken { device, memory } in taken {
                self.residency.gpus()[device].discard(memory);
            }
        }
        if let Err(error) = &result
            && error.code == Code::DeviceLost
        {
            self.find_lost(targets);
        }
        result
    }

    async fn take_and_fill(
        &self,
        job: &Job,
        prepared: Prepared,
        targets: &[Target],
        (priority, tenant): (i32, u32),
        taken: &mut Vec<Taken>,
    ) -> Result<Vec<Content>> {
        self.take(job, &prepared, targets, taken).await?;
        if let Some(sources) = self.on_host(&prepared, targets, tenant)
            && let Some(checks) = self.promote(job, &prepared, &sources, taken).await?
        {
            let manifest = sources.first().and_then(|source| source.content.manifest.clone());
            return Ok(contents(prepared, manifest, checks, taken));
        }
        if prepared.files.is_empty() {
            let message = "the host tier cannot be registered with the driver, and peers give to nothing else: see the log";
            return Err(Error::new(Code::DeviceUnavailable, message));
        }
        let (prepared, landed) = self.fill(job, prepared, priority, taken).await?;
        let files = Arc::clone(&prepared.files);
        let checked = blocking(move || {
            let sizes = prepared.sizes();
            let chunks = landed.chunks(&sizes);
            as_known(&prepared, &chunks)?;
            let regions = prepared.layouts.iter().zip(0u32..);
            let checks = regions.map(|(layout, region)| landed.of_region(region, &layout.pieces(&sizes)));
            let checks: Vec<_> = checks.collect();
            Ok((prepared, chunks, checks))
        });
        let (prepared, chunks, checks) = match checked.await {
            Ok(checked) => checked,
            Err(error) => {
                self.doubt(&error, &files).await;
                return Err(error.kept("nothing of this load; its memory was given back"));
            }
        };
        let sums: Vec<u64> = chunks.iter().map(|chunk| chunk.sum).collect();
        let manifest = self.manifest(&prepared, &sums).await;
        for taken in taken.iter() {
            self.direct.learn(&prepared.files, taken.device);
        }
        Ok(contents(prepared, manifest, checks, taken))
    }

    /// Reads everything to its place: directly where that is used, else by slots.
    async fn fill(
        &self,
        job: &Job,
        prepared: Prepared,
        priority: i32,
        taken: &[Taken],
    ) -> Result<(Prepared, Landed)> {
        let devices: Vec<_> = taken.iter().map(|taken| (taken.device, Arc::clone(&taken.memory))).collect();
        let regions = || {
            let regions = devices
                .iter()
                .map(|(device, memory)| DeviceRegion { device: *device, memory: Arc::clone(memory) });
            Regions::Devices(regions.collect())
        };
        let block = self.config.borrow().data_plane.block_bytes;
        // Which files go directly to which region.
        let used: Vec<Vec<bool>> = devices
            .iter()
            .map(|(gpu, _)| prepared.files.iter().map(|file| self.direct.used(file, *gpu)).collect())
            .collect();
        let planned = blocking(move || {
            let wanted = |region: u32, file: u32| used[region as usize][file as usize];
            let reads = plan::direct(&prepared.layouts, prepared.files.len(), wanted);
            Ok((reads.ok_or_else(too_many_reads)?, prepared))
        });
        let (reads, prepared) = planned.await?;
        let ready = self.direct.prepare(reads, &prepared.files, &devices).await?;
        let (share, before) = match ready {
            Some(ready) => (Some(ready.share), ready.before),
            None => (None, Vec::new()),
        };
        let planned = blocking(move || {
            let reads = share.as_ref().map(|share| share.plan.clone()).unwrap_or_default();
            let plan = plan::scatter(&prepared.layouts, &prepared.sizes(), &reads, block);
            Ok((plan.ok_or_else(too_many_reads)?, share, prepared))
        });
        let (plan, share, prepared) = planned.await?;
        let mut batch = Batch::new(plan, self.batch_files(&prepared), regions(), Arc::clone(&job.progress));
        batch.direct = share;
        job.begin(batch.bytes());
        let (outcome, batch) =
            self.carry_out(job, batch, &prepared.files, Carriers::Shards { moves: None, priority }).await;
        let mut batch =
            batch.ok_or_else(|| Error::new(Code::Internal, "a shard thread did not give the job back"));
        let mut landed = Landed::default();
        let mut missed = None;
        if let Ok(batch) = &mut batch
            && let Some(share) = batch.direct.take()
        {
            let came = Settling::of(&share, before, |region| batch.regions.device(region));
            landed.directly(&share);
            // Registered memory and files: given back before anything is freed, and not on this thread.
            let plan = blocking(move || Ok(share.into_plan())).await?;
            let reads = self.direct.settle(came, &job.progress, &prepared.files).await?;
            missed = Some((plan, reads)).filter(|(_, reads)| !reads.is_empty());
        }
        outcome?;
        landed.by_slots(&batch?);
        if let Some((reads, missed)) = missed {
            let sizes = prepared.sizes();
            let plan = reads.by_slots(&missed, &sizes, block).ok_or_else(too_many_reads)?;
            let batch = Batch::new(plan, self.batch_files(&prepared), regions(), Arc::clone(&job.progress));
            let (outcome, batch) =
                self.carry_out(job, batch, &prepared.files, Carriers::Shards { moves: None, priority }).await;
            outcome?;
            let batch = batch
                .ok_or_else(|| Error::new(Code::Internal, "a shard thread did not give the job back"))?;
            landed.by_slots(&batch);
        }
        landed.sort();
        Ok((prepared, landed))
    }

    /// Takes memory on each device, in the order of the devices: two jobs never wait for each other's.
    async fn take(
        &self,
        job: &Job,
        prepared: &Prepared,
        targets: &[Target],
        taken: &mut Vec<Taken>,
    ) -> Result<()> {
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|place| targets[*place].device);
        let mut made: Vec<Option<Taken>> = targets.iter().map(|_| None).collect();
        let mut outcome = Ok(());
        for place in order {
            match self.take_one(job, &prepared.layouts[place], targets[place].device, place).await {
                Ok(one) => made[place] = Some(one),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        taken.extend(made.into_iter().flatten());
        outcome
    }

    async fn take_one(
        &self,
        job: &Job,
        layout: &plan::Layout,
        device: DeviceId,
        place: usize,
    ) -> Result<Taken> {
        let DeviceId::Gpu(index) = device else {
            let message = "one job loads either to the host tier or to GPUs: ask for the host tier by itself";
            return Err(Error::new(Code::ApiBadParams, message));
        };
        let gpu = &self.residency.gpus()[index];
        let unavailable = |error| Error::new(Code::DeviceUnavailable, format!("{}: {error}", gpu.name()));
        let bytes = DeviceMemory::rounded(gpu.context(), layout.bytes).map_err(unavailable)?;
        let bytes = bytes.ok_or_else(too_large)?;
        let Grant::Gpu(gpu, grant) = self.reserve(job, device, bytes).await? else {
            return Err(Error::new(Code::Internal, "a GPU gave memory of another tier"));
        };
        if let Some(entry) = job.entries.get(place) {
            self.residency.takes(*entry, bytes);
        }
        Ok(Taken { device: index, memory: Arc::new(gpu.make(grant).await?) })
    }

    /// A copy has found a device lost: which of them it was is asked of each.
    fn find_lost(&self, targets: &[Target]) {
        for target in targets {
            if let DeviceId::Gpu(index) = target.device
                && self.residency.gpus()[index].context().memory().is_err_and(|error| error.is_fatal())
            {
                self.residency.lose(index);
            }
        }
    }
}

/// What is resident from now on.
fn contents(
    prepared: Prepared,
    manifest: Option<Arc<Manifest>>,
    checks: Vec<Box<[u64]>>,
    taken: &mut Vec<Taken>,
) -> Vec<Content> {
    let Prepared { layouts, description, .. } = prepared;
    let contents = layouts.into_iter().zip(checks).zip(taken.drain(..)).map(|((layout, checks), taken)| {
        let region = Region::Gpu(taken.memory);
        let (description, manifest) = (description.clone(), manifest.clone());
        let (files, tensors, chunks) = (layout.files, layout.tensors, Box::default());
        Content { description, files, tensors, manifest, checks, chunks, region, offered: None }
    });
    contents.collect()
}

/// Compares chunks with what they were when these files were first read. What came by slots was compared when it came;
/// a chunk that came directly, or by both ways, is compared here.
fn as_known(prepared: &Prepared, chunks: &[Chunk]) -> Result<()> {
    let Some(known) = &prepared.known else { return Ok(()) };
    for chunk in chunks {
        let file = &prepared.description.files[chunk.file as usize];
        let expected = known.chunks()[chunk.file as usize].get(chunk.number as usize).copied();
        if let Some(expected) = expected.filter(|expected| *expected != chunk.sum) {
            let start = chunk.number * CHUNK_BYTES;
            let range = start..(start + CHUNK_BYTES).min(file.bytes);
            return Err(mismatch(&file.name, &range, chunk.sum, expected));
        }
    }
    Ok(())
}
