//! The part of a job that shard threads work on: what to read, where to, and what came of it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::mpsc;

use super::direct::DirectShare;
use crate::checksum::CHUNK_BYTES;
use crate::error::Error;
use crate::peer::offer::Offer;
use crate::plan::{Move, Plan, Target};
use crate::sys::cuda::DeviceMemory;
use crate::sys::mem::Memory;

/// How bytes arrived, as observed (invariant 10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Read past the page cache, in place; to a GPU: by the drive itself, as cuFile's counters say.
    Direct,
    /// Read past the page cache into a slot and copied to its place.
    Staged,
    /// Copied from the page cache, which held it before.
    Cached,
    /// Read through the page cache, because the file system refuses O_DIRECT.
    Buffered,
    /// Copied from the host tier to a GPU, by the GPU.
    Host,
    /// Read to a GPU by cuFile, by way of host memory though it was to go directly.
    Compat,
    /// From a peer, over TLS.
    Tcp,
    /// From the memory of a peer, read by a network adapter.
    Rdma,
}

impl Path {
    /// All of them, in the order of the counters.
    pub const ALL: [Path; 8] = [
        Path::Direct,
        Path::Staged,
        Path::Cached,
        Path::Buffered,
        Path::Host,
        Path::Compat,
        Path::Tcp,
        Path::Rdma,
    ];

    /// `direct`, `staged`, `cached`, `buffered`, `host`, `compat`, `tcp` or `rdma`.
    pub fn as_str(self) -> &'static str {
        match self {
            Path::Direct => "direct",
            Path::Staged => "staged",
            Path::Cached => "cached",
            Path::Buffered => "buffered",
            Path::Host => "host",
            Path::Compat => "compat",
            Path::Tcp => "tcp",
            Path::Rdma => "rdma",
        }
    }
}

/// Where a read lands that could land in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landing {
    /// In its place in the region: least work, where the drive writes to memory by itself.
    InPlace,
    /// In a slot, to be copied by streaming stores: faster where a hypervisor copies what was read, because slots stay
    /// in its processor's cache (docs/decisions/0006-landing.md).
    Slot,
}

/// What a shard thread spends its time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Handing reads to the kernel; page faults of the target memory and copies from the page cache happen here.
    Submit,
    /// Waiting for reads to end.
    Wait,
    /// Checksums.
    Checksum,
    /// Copies from slots.
    Copy,
}

impl Phase {
    /// All of them, in the order of the counters.
    pub const ALL: [Phase; 4] = [Phase::Submit, Phase::Wait, Phase::Checksum, Phase::Copy];

    /// `submit`, `wait`, `checksum` or `copy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Submit => "submit",
            Phase::Wait => "wait",
            Phase::Checksum => "checksum",
            Phase::Copy => "copy",
        }
    }
}

/// One file of a batch.
#[derive(Debug)]
pub struct BatchFile {
    /// Name, for messages.
    pub name: String,
    /// Size, bytes.
    pub bytes: u64,
    /// Checksums of its chunks, if they are known: from an earlier load of the same file, or from the manifest. What
    /// arrives must match.
    pub expected: Option<Arc<[u64]>>,
}

/// By what shard threads read a file.
#[derive(Debug)]
pub struct Handles {
    /// Through the page cache.
    pub file: Arc<OwnedFd>,
    /// Past it, where the file system allows.
    pub direct: Option<Arc<OwnedFd>>,
    /// Where its reads land that could land in place.
    pub landing: Landing,
}

/// One part of the region that a batch fills.
#[derive(Debug)]
pub struct Part {
    /// The memory.
    pub memory: Arc<Memory>,
    /// Its pages have been touched, so it may be registered.
    pub populated: bool,
}

/// One region in the memory of a GPU that a batch fills.
#[derive(Debug)]
pub struct DeviceRegion {
    /// Place of its device among those that the shard threads were started with.
    pub device: usize,
    /// The memory.
    pub memory: Arc<DeviceMemory>,
}

/// What a batch fills.
#[derive(Debug)]
pub enum Regions {
    /// The parts of one region of the host tier.
    Host(Vec<Part>),
    /// Regions on GPUs, in the order in which the plan's copies name them.
    Devices(Vec<DeviceRegion>),
}

impl Regions {
    /// The parts on the host tier; none on GPUs.
    pub fn parts(&self) -> &[Part] {
        match self {
            Regions::Host(parts) => parts,
            Regions::Devices(_) => &[],
        }
    }

    /// The place of the device of a region.
    pub fn device(&self, region: u32) -> Option<usize> {
        match self {
            Regions::Host(_) => None,
            Regions::Devices(regions) => regions.get(region as usize).map(|region| region.device),
        }
    }
}

/// What shard threads work on together.
#[derive(Debug)]
pub struct Batch {
    /// The reads.
    pub plan: Plan,
    /// What is read.
    pub files: Vec<BatchFile>,
    /// By what it is read, file by file. Empty: shard threads take no part.
    pub handles: Vec<Handles>,
    /// Peers may have chunks as soon as they are in their place.
    pub offer: Option<Arc<Offer>>,
    /// Where to.
    pub regions: Regions,
    /// What goes directly from drives to GPUs, beside the plan.
    pub direct: Option<DirectShare>,
    /// Checksums of the chunks of the files, in the order of the plan.
    pub checks: Box<[AtomicU64]>,
    /// Checksums of what each of the plan's copies puts in its place; only for GPUs, whose memory the CPU cannot read.
    pub copy_checks: Box<[AtomicU64]>,
    /// How far it is.
    pub progress: Arc<Progress>,
}

impl Batch {
    /// A batch that has not begun.
    pub fn new(
        plan: Plan,
        (files, handles): (Vec<BatchFile>, Vec<Handles>),
        regions: Regions,
        progress: Arc<Progress>,
    ) -> Batch {
        let sums = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        let copies = match regions {
            Regions::Host(_) => 0,
            Regions::Devices(_) => plan.copies.len(),
        };
        Batch {
            checks: sums(plan.checks as usize),
            copy_checks: sums(copies),
            plan,
            files,
            handles,
            offer: None,
            regions,
            direct: None,
            progress,
        }
    }

    /// The bytes of a move are in their place, and no span reaches into them any more.
    pub fn landed(&self, step: &Move, path: Path) {
        self.progress.arrived(path, u64::from(step.expect_bytes));
        if let Some(offer) = &self.offer {
            for piece in step.pieces() {
                offer.arrived(step.file, (piece.start / CHUNK_BYTES) as u32);
            }
        }
    }

    /// Bytes that have to arrive, by both ways.
    pub fn bytes(&self) -> u64 {
        self.plan.bytes + self.direct.as_ref().map_or(0, |share| share.plan.bytes())
    }

    /// Where the checksums of a move's copies go.
    pub(super) fn copies_from(&self, step: &Move) -> &[AtomicU64] {
        match &step.target {
            Target::Staged(range) => {
                self.copy_checks.get(range.start as usize..range.end as usize).unwrap_or_default()
            }
            Target::Direct { .. } => &[],
        }
    }
}

/// How far a batch is; shared with whoever wants to look, and the way to stop it.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: [AtomicU64; Path::ALL.len()],
    /// Arrived, by a path that is not proven yet.
    unproven: AtomicU64,
    nanos: [AtomicU64; Phase::ALL.len()],
    stopped: AtomicBool,
    failure: OnceLock<Error>,
}

impl Progress {
    /// Bytes that have arrived and were checksummed, by path.
    pub fn bytes(&self, path: Path) -> u64 {
        self.bytes[path as usize].load(Ordering::Relaxed)
    }

    /// Bytes that have arrived and were checksummed.
    pub fn bytes_total(&self) -> u64 {
        let proven: u64 = Path::ALL.iter().map(|path| self.bytes(*path)).sum();
        proven + self.unproven.load(Ordering::Relaxed)
    }

    /// Nanoseconds that shard threads spent in a phase while they worked on this batch.
    pub fn nanos(&self, phase: Phase) -> u64 {
        self.nanos[phase as usize].load(Ordering::Relaxed)
    }

    /// Stops the batch: no further read is started, what is in flight ends.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Whether it was stopped, by its owner or by a failure.
    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Why it failed, if it has.
    pub fn failure(&self) -> Option<&Error> {
        self.failure.get()
    }

    /// Bytes have arrived.
    pub fn arrived(&self, path: Path, bytes: u64) {
        self.bytes[path as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes have arrived directly, or so it was wanted.
    pub(super) fn unproven(&self, bytes: u64) {
        self.unproven.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that have arrived came by `path`, as counters say.
    pub fn prove(&self, path: Path, bytes: u64) {
        self.unproven.fetch_sub(bytes, Ordering::Relaxed);
        self.arrived(path, bytes);
    }

    /// Time of a phase that threads spent on this batch, nanoseconds.
    pub fn spent(&self, phase: Phase, nanos: u64) {
        self.nanos[phase as usize].fetch_add(nanos, Ordering::Relaxed);
    }

    /// The first failure is kept and stops the batch.
    pub fn fail(&self, error: Error) {
        let _ = self.failure.set(error);
        self.stop();
    }
}

/// One shard thread's share of a batch.
#[derive(Debug)]
pub struct Assignment {
    /// The batch.
    pub batch: Arc<Batch>,
    /// Which moves of its plan.
    pub moves: Vec<std::ops::Range<u32>>,
    /// Larger goes first.
    pub priority: i32,
    /// Where the batch is moved back to when this share has ended, so that its owner gets hold of the memory.
    pub home: mpsc::Sender<Arc<Batch>>,
}
