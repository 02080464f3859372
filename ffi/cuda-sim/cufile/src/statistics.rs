//! What `cuFileGetStats…` tell.

use std::time::Duration;

use crate::abi::{Counter, GPUS_MAX, PerGpu, Statistics};

/// Places in `batch_queues`: entries that were submitted, by their way and in all.
const BATCH_NVFS: usize = 4;
const BATCH_P2P: usize = 5;
const BATCH_TOTAL: usize = 9;

/// The way that a transfer took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the drive to the GPU, by nvidia-fs.
    Nvfs,
    /// Likewise, by PCI P2PDMA.
    P2p,
    /// Through the host: compatibility mode.
    Posix,
}

/// A read or a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// Calls that are counted, beside transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    HandleRegister,
    HandleDeregister,
    BufferRegister,
    BufferDeregister,
    BatchSetup,
    BatchSubmit,
    /// A call that told of entries.
    BatchComplete,
    BatchCancel,
    BatchDestroy,
}

/// One transfer that has ended.
#[derive(Debug)]
pub(crate) struct Transferred {
    pub(crate) direction: Direction,
    pub(crate) way: Way,
    /// Whether its place in the file or on the device is not one of whole pages.
    pub(crate) is_unaligned: bool,
    pub(crate) device: usize,
    /// That were asked for: what real libraries count, also where the file has ended before.
    pub(crate) bytes: u64,
    /// Pieces that it was done in.
    pub(crate) pieces: u64,
    pub(crate) succeeded: bool,
    pub(crate) time: Duration,
}

/// The counters, as long as the driver is open.
#[derive(Debug)]
pub(crate) struct Counters {
    /// 0: nothing is counted; 1: calls and bytes; 2: sizes, too; 3: by GPU, too.
    pub(crate) level: i32,
    /// From `cuFileStatsStart` or the opening on until `cuFileStatsStop`.
    pub(crate) is_started: bool,
    counted: Statistics,
}

fn count(counter: &mut Counter, succeeded: bool) {
    if succeeded { counter.ok += 1 } else { counter.failed += 1 }
}

fn mean(sum: u64, count: u64) -> u64 {
    sum.checked_div(count).unwrap_or(0)
}

impl Counters {
    pub(crate) fn new(level: i32, uuids: &[[u8; 16]]) -> Counters {
        let mut counted = Statistics { gpu_count: uuids.len().min(GPUS_MAX) as u32, ..Statistics::default() };
        for (gpu, uuid) in counted.gpus.iter_mut().zip(uuids) {
            gpu.uuid = *uuid;
        }
        // A level that was set before the driver was opened starts them.
        Counters { level, is_started: level > 0, counted }
    }

    pub(crate) fn reset(&mut self) {
        let uuids = self.counted.gpus.map(|gpu| gpu.uuid);
        let gpu_count = self.counted.gpu_count;
        self.counted = Statistics { gpu_count, ..Statistics::default() };
        for (gpu, uuid) in self.counted.gpus.iter_mut().zip(uuids) {
            gpu.uuid = uuid;
        }
    }

    /// What has been counted, with the means of it.
    pub(crate) fn counted(&self) -> Statistics {
        let mut counted = self.counted;
        let basic = &mut counted.detailed.basic;
        basic.read_latency_mean_us = mean(basic.read_latency_sum_us, basic.reads.ok);
        basic.write_latency_mean_us = mean(basic.write_latency_sum_us, basic.writes.ok);
        counted
    }

    /// Counts a call.
    pub(crate) fn call(&mut self, call: Call, succeeded: bool) {
        if !self.is_started || self.level < 1 {
            return;
        }
        let basic = &mut self.counted.detailed.basic;
        let counter = match call {
            Call::HandleRegister => &mut basic.handle_registers,
            Call::HandleDeregister => &mut basic.handle_deregisters,
            Call::BufferRegister => &mut basic.buffer_registers,
            Call::BufferDeregister => &mut basic.buffer_deregisters,
            Call::BatchSetup => &mut basic.batch_setups,
            Call::BatchSubmit => &mut basic.batch_submits,
            Call::BatchComplete => &mut basic.batch_completes,
            Call::BatchCancel => &mut basic.batch_cancels,
            Call::BatchDestroy => &mut basic.batch_destroys,
        };
        count(counter, succeeded);
    }

    /// Counts for one GPU.
    pub(crate) fn gpu(&mut self, device: usize, change: impl FnOnce(&mut PerGpu)) {
        if let Some(gpu) = self.counted.gpus.get_mut(device).filter(|_| self.is_started && self.level >= 3) {
            change(gpu);
        }
    }

    /// Counts a read or a write that was refused.
    pub(crate) fn refused(&mut self, direction: Direction) {
        if self.is_started && self.level >= 1 {
            self.calls(direction).failed += 1;
        }
    }

    fn calls(&mut self, direction: Direction) -> &mut Counter {
        match direction {
            Direction::Read => &mut self.counted.detailed.basic.reads,
            Direction::Write => &mut self.counted.detailed.basic.writes,
        }
    }

    /// Counts a size among others.
    fn size(&mut self, direction: Direction, bytes: u64) {
        if self.level < 2 {
            return;
        }
        let sizes = match direction {
            Direction::Read => &mut self.counted.detailed.read_sizes,
            Direction::Write => &mut self.counted.detailed.write_sizes,
        };
        // By powers of two: below 4 KiB, below 8 KiB, and so on.
        let place = (bytes >> 11).checked_ilog2().unwrap_or(0) as usize;
        let last = sizes.len() - 1;
        sizes[place.min(last)] += 1;
    }

    pub(crate) fn transfer(&mut self, transferred: &Transferred) {
        if !self.is_started || self.level < 1 {
            return;
        }
        let time = transferred.time.as_micros() as u64;
        count(self.calls(transferred.direction), transferred.succeeded);
        if transferred.succeeded {
            let basic = &mut self.counted.detailed.basic;
            let (bytes, latency) = match transferred.direction {
                Direction::Read => (&mut basic.read_bytes, &mut basic.read_latency_sum_us),
                Direction::Write => (&mut basic.write_bytes, &mut basic.write_latency_sum_us),
            };
            *bytes += transferred.bytes;
            *latency += time;
            self.size(transferred.direction, transferred.bytes);
        }
        self.gpu(transferred.device, |gpu| by_gpu(gpu, transferred, time));
    }

    /// Counts an entry of a batch that was submitted. They are not among the reads and writes, nor among those of a GPU.
    pub(crate) fn batch_entry(&mut self, way: Way) {
        if !self.is_started || self.level < 1 {
            return;
        }
        let queues = &mut self.counted.detailed.basic.batch_queues;
        match way {
            Way::Nvfs => queues[BATCH_NVFS].ok += 1,
            Way::P2p => queues[BATCH_P2P].ok += 1,
            Way::Posix => {}
        }
        queues[BATCH_TOTAL].ok += 1;
    }

    /// Counts an entry of a batch that has succeeded.
    pub(crate) fn batch_moved(&mut self, direction: Direction, bytes: u64) {
        if !self.is_started || self.level < 1 {
            return;
        }
        let basic = &mut self.counted.detailed.basic;
        match direction {
            Direction::Read => basic.batch_read_bytes += bytes,
            Direction::Write => basic.batch_write_bytes += bytes,
        }
        self.size(direction, bytes);
    }
}

fn by_gpu(gpu: &mut PerGpu, transferred: &Transferred, time: u64) {
    if !transferred.succeeded {
        *match transferred.direction {
            Direction::Read => &mut gpu.reads_failed,
            Direction::Write => &mut gpu.writes_failed,
        } += 1;
        return;
    }
    let (bytes, pieces) = (transferred.bytes, transferred.pieces);
    let unaligned = u64::from(transferred.is_unaligned);
    match transferred.direction {
        Direction::Read => {
            gpu.reads += pieces;
            gpu.read_bytes += bytes;
            gpu.read_us += time;
            gpu.unaligned_reads += unaligned;
            *match transferred.way {
                Way::Nvfs => &mut gpu.nvfs_reads,
                Way::P2p => &mut gpu.p2p_reads,
                Way::Posix => &mut gpu.posix_reads,
            } += pieces;
        }
        Direction::Write => {
            gpu.writes += pieces;
            gpu.write_bytes += bytes;
            gpu.write_us += time;
            gpu.unaligned_writes += unaligned;
            *match transferred.way {
                Way::Nvfs => &mut gpu.nvfs_writes,
                Way::P2p => &mut gpu.p2p_writes,
                Way::Posix => &mut gpu.posix_writes,
            } += pieces;
        }
    }
}
