//! Loads into the memory of GPUs: one region on each device that was asked for, filled from one read of the files.

use std::sync::Arc;

use super::load::{Prepared, blocking, sums, too_large, too_many_reads};
use super::{Job, Jobs, Target};
use crate::checksum;
use crate::error::{Code, Error, Result};
use crate::plan::{self, Copy, Plan};
use crate::shard::{Batch, DeviceRegion, Regions};
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
            let digest = sources.first().and_then(|source| source.content.digest.clone());
            return Ok(contents(prepared, digest, checks, taken));
        }
        let block = self.config.borrow().data_plane.block_bytes;
        let planned = blocking(move || {
            let plan =
                plan::scatter(&prepared.layouts, &prepared.sizes(), block).ok_or_else(too_many_reads)?;
            Ok((prepared, plan))
        });
        let (prepared, plan) = planned.await?;
        job.begin(plan.bytes);
        let regions = taken
            .iter()
            .map(|taken| DeviceRegion { device: taken.device, memory: Arc::clone(&taken.memory) });
        let regions = Regions::Devices(regions.collect());
        let batch = Batch::new(plan, self.batch_files(&prepared), regions, Arc::clone(&job.progress));
        let (outcome, batch) = self.carry_out(job, batch, &prepared.files, priority).await;
        outcome?;
        let batch =
            batch.ok_or_else(|| Error::new(Code::Internal, "a shard thread did not give the job back"))?;
        let digest = self.digest(&prepared, &batch.checks).await;
        let (plan, sums) = (batch.plan, sums(&batch.copy_checks));
        let checked = blocking(move || {
            let regions = prepared.layouts.iter().zip(0u32..);
            let sizes = prepared.sizes();
            let checks = regions.map(|(layout, region)| checks(&plan, &sums, region, &layout.pieces(&sizes)));
            Ok((checks.collect::<Vec<_>>(), prepared))
        });
        let (checks, prepared) = checked.await?;
        Ok(contents(prepared, digest, checks, taken))
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
    digest: Option<String>,
    checks: Vec<Box<[u64]>>,
    taken: &mut Vec<Taken>,
) -> Vec<Content> {
    let Prepared { layouts, description, .. } = prepared;
    let contents = layouts.into_iter().zip(checks).zip(taken.drain(..)).map(|((layout, checks), taken)| {
        let region = Region::Gpu(taken.memory);
        let (description, digest) = (description.clone(), digest.clone());
        let (files, tensors, chunks) = (layout.files, layout.tensors, Box::default());
        Content { description, files, tensors, digest, checks, chunks, region }
    });
    contents.collect()
}

/// The checksum of each piece of a region, put together from those of the copies that filled it.
fn checks(plan: &Plan, sums: &[u64], region: u32, pieces: &[(u64, u64)]) -> Box<[u64]> {
    let own = plan.copies.iter().zip(sums).filter(|(copy, _)| copy.region == region);
    let mut own: Vec<(&Copy, &u64)> = own.collect();
    own.sort_by_key(|(copy, _)| copy.region_offset);
    let checks = pieces.iter().map(|(offset, bytes)| {
        let end = offset + bytes;
        let first = own.partition_point(|(copy, _)| copy.region_offset < *offset);
        let inside = own[first..].iter().take_while(|(copy, _)| copy.region_offset < end);
        inside.fold(checksum::EMPTY, |sum, (copy, next)| {
            checksum::combine(sum, **next, copy.bytes * copy.count)
        })
    });
    checks.collect()
}
