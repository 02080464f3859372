//! What `cuFileGetStats…` tell.

use std::time::Duration;

use crate::abi::{Counter, GPUS_MAX, PerGpu, Statistics};

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
    /// One entry of a batch that the caller was told of.
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
    /// None: it failed.
    pub(crate) bytes: Option<u64>,
    pub(crate) time: Duration,
}

/// The counters, as long as the driver is open.
#[derive(Debug)]
pub(crate) struct Counters {
    /// 0: nothing is counted; 1: calls and bytes; 2: sizes, too; 3: by GPU, too.
    pub(crate) level: i32,
    /// Between `cuFileStatsStart` and `cuFileStatsStop`.
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
        Counters { level, is_started: false, counted }
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

    pub(crate) fn transfer(&mut self, transferred: &Transferred) {
        if !self.is_started || self.level < 1 {
            return;
        }
        let (level, read) = (self.level, transferred.direction == Direction::Read);
        let time = transferred.time.as_micros() as u64;
        let detailed = &mut self.counted.detailed;
        let basic = &mut detailed.basic;
        let calls = if read { &mut basic.reads } else { &mut basic.writes };
        count(calls, transferred.bytes.is_some());
        if let Some(bytes) = transferred.bytes {
            let (sum, latency) = if read {
                (&mut basic.read_bytes, &mut basic.read_latency_sum_us)
            } else {
                (&mut basic.write_bytes, &mut basic.write_latency_sum_us)
            };
            *sum += bytes;
            *latency += time;
            if level >= 2 {
                let sizes = if read { &mut detailed.read_sizes } else { &mut detailed.write_sizes };
                // By powers of two of KiB.
                sizes[((bytes >> 10).checked_ilog2().map_or(0, |log| log + 1) as usize).min(31)] += 1;
            }
        }
        self.gpu(transferred.device, |gpu| by_gpu(gpu, transferred, time));
    }
}

fn by_gpu(gpu: &mut PerGpu, transferred: &Transferred, time: u64) {
    let Some(bytes) = transferred.bytes else {
        *match transferred.direction {
            Direction::Read => &mut gpu.reads_failed,
            Direction::Write => &mut gpu.writes_failed,
        } += 1;
        return;
    };
    let unaligned = u64::from(transferred.is_unaligned);
    match transferred.direction {
        Direction::Read => {
            gpu.reads += 1;
            gpu.read_bytes += bytes;
            gpu.read_us += time;
            gpu.unaligned_reads += unaligned;
            *match transferred.way {
                Way::Nvfs => &mut gpu.nvfs_reads,
                Way::P2p => &mut gpu.p2p_reads,
                Way::Posix => &mut gpu.posix_reads,
            } += 1;
        }
        Direction::Write => {
            gpu.writes += 1;
            gpu.write_bytes += bytes;
            gpu.write_us += time;
            gpu.unaligned_writes += unaligned;
            *match transferred.way {
                Way::Nvfs => &mut gpu.nvfs_writes,
                Way::P2p => &mut gpu.p2p_writes,
                Way::Posix => &mut gpu.posix_writes,
            } += 1;
        }
    }
}
