//! Threads on which drives write to the memory of a GPU, through cuFile.
//!
//! cuFile blocks, so these threads are not the shard threads: each has one read under way. When it has ended, the device
//! computes the checksums of what has come (invariant 6). A read that fails is noted, and left to the slots of a shard
//! thread; by which path the bytes of the others came is said by cuFile's counters, and not here (invariant 10).

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use tokio::sync::mpsc;

use super::batch::{Batch, Phase};
use super::copy_error;
use super::settle::lap;
use crate::error::{Code, Error};
use crate::plan::{BLOCK_ALIGN, DIRECT_BYTES_MAX, Direct, DirectRead, TENSOR_ALIGN};
use crate::sys::cuda::{Context, CudaError, DeviceMemory, Kernel};
use crate::sys::cufile::{Handle, Registered};

/// Reads under way at a time for one device: 32 MiB in flight.
pub const DIRECT_DEPTH: usize = 4;
/// Assignments that may wait in the mailbox of one device. `limits.jobs_max` keeps it from filling.
const MAILBOX_MAX: usize = 4096 * DIRECT_DEPTH;
/// Pieces of one read at most: every tensor of a span ends on such a multiple, and every chunk does.
const PIECES_MAX: u64 = DIRECT_BYTES_MAX / TENSOR_ALIGN;

/// What of a batch goes directly.
#[derive(Debug)]
pub struct DirectShare {
    /// The reads.
    pub plan: Direct,
    /// The regions of the batch that are registered.
    pub regions: Vec<Option<Registered>>,
    /// The files of the batch that cuFile knows.
    pub handles: Vec<Option<Handle>>,
    /// The checksum of each piece.
    sums: Box<[AtomicU64]>,
    /// For each region, which read is next.
    next: Box<[AtomicUsize]>,
    ended: Mutex<Ended>,
}

/// Reads that have ended.
#[derive(Debug, Default)]
struct Ended {
    carried_out: Vec<u32>,
    missed: Vec<u32>,
    /// Why the first was missed.
    why: Option<String>,
}

impl DirectShare {
    /// A share of which nothing was read yet.
    pub fn new(plan: Direct, regions: Vec<Option<Registered>>, handles: Vec<Option<Handle>>) -> DirectShare {
        DirectShare {
            sums: plan.pieces.iter().map(|_| AtomicU64::new(0)).collect(),
            next: regions.iter().map(|_| AtomicUsize::new(0)).collect(),
            plan,
            regions,
            handles,
            ended: Mutex::default(),
        }
    }

    /// Gives back what is registered; what is left is the reads.
    pub fn into_plan(self) -> Direct {
        self.plan
    }

    /// The regions that it reads into.
    pub fn regions_used(&self) -> impl Iterator<Item = u32> {
        (0u32..)
            .zip(&self.next)
            .map(|(region, _)| region)
            .filter(|region| self.plan.reads.iter().any(|read| read.region == *region))
    }

    /// The checksum of each piece.
    pub fn sums(&self) -> Vec<u64> {
        self.sums.iter().map(|sum| sum.load(Ordering::Acquire)).collect()
    }

    /// Reads that failed, in order, and why the first did.
    pub fn missed(&self) -> (Vec<u32>, Option<String>) {
        let ended = self.ended();
        let mut reads = ended.missed.clone();
        reads.sort_unstable();
        (reads, ended.why.clone())
    }

    /// Sum of the reads that failed, bytes.
    pub fn missed_bytes(&self) -> u64 {
        let ended = self.ended();
        ended
            .missed
            .iter()
            .filter_map(|read| self.plan.reads.get(*read as usize))
            .map(|read| read.bytes)
            .sum()
    }

    /// The reads that were carried out so far.
    pub fn carried_out(&self) -> impl Iterator<Item = &DirectRead> {
        let reads = self.ended().carried_out.clone();
        reads.into_iter().filter_map(|read| self.plan.reads.get(read as usize))
    }

    fn ended(&self) -> MutexGuard<'_, Ended> {
        // A panic while it was locked cannot have left it half-made.
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, index: usize) {
        self.ended().carried_out.push(index as u32);
    }

    fn miss(&self, index: usize, why: impl FnOnce() -> String) {
        let mut ended = self.ended();
        ended.missed.push(index as u32);
        ended.why.get_or_insert_with(why);
    }

    /// The next read into a region that nobody has begun.
    fn take(&self, region: u32) -> Option<(usize, &DirectRead)> {
        let next = self.next.get(region as usize)?;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let read = self.plan.reads.get(index)?;
            if read.region == region {
                return Some((index, read));
            }
        }
    }
}

/// A region of a batch, for the threads of its device.
#[derive(Debug, Clone)]
struct Assignment {
    batch: Arc<Batch>,
    region: u32,
    /// Where the batch is moved back to, so that its owner gets hold of what it keeps.
    home: mpsc::Sender<Arc<Batch>>,
}

/// The threads of one device. Dropping them stops them once their reads have ended.
#[derive(Debug)]
pub struct DirectThreads {
    mailbox: Option<Sender<Assignment>>,
    threads: Vec<JoinHandle<()>>,
}

impl DirectThreads {
    /// Starts them, each with the checksum kernel of the device.
    pub fn start(context: &Arc<Context>) -> Result<DirectThreads, Error> {
        let (mailbox, letters) = crossbeam_channel::bounded(MAILBOX_MAX);
        let mut started = DirectThreads { mailbox: Some(mailbox), threads: Vec::new() };
        for number in 0..DIRECT_DEPTH {
            let arrivals = Arrivals::new(context).map_err(copy_error)?;
            let letters = letters.clone();
            let thread = std::thread::Builder::new().name(format!("direct-{number}"));
            let thread = thread.spawn(move || run(&letters, &arrivals)).map_err(|error| {
                Error::new(Code::Internal, format!("a thread of the direct path cannot start: {error}"))
            })?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Hands one region of a batch to the threads. If the mailbox is full, the batch fails.
    pub fn send(&self, batch: &Arc<Batch>, region: u32, home: &mpsc::Sender<Arc<Batch>>) {
        let assignment = Assignment { batch: Arc::clone(batch), region, home: home.clone() };
        for _ in 0..DIRECT_DEPTH {
            let sent =
                self.mailbox.as_ref().is_some_and(|mailbox| mailbox.try_send(assignment.clone()).is_ok());
            if !sent {
                let message = "the mailbox of the direct path is full";
                return batch.progress.fail(Error::new(Code::JobTooMany, message));
            }
        }
    }
}

impl Drop for DirectThreads {
    fn drop(&mut self) {
        drop(self.mailbox.take());
        for thread in self.threads.drain(..) {
            // A panic there has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn run(letters: &Receiver<Assignment>, arrivals: &Arrivals) {
    for Assignment { batch, region, home } in letters {
        if let Some(share) = &batch.direct {
            while !batch.progress.stopped()
                && let Some((index, read)) = share.take(region)
            {
                arrivals.carry_out(&batch, share, index, read);
            }
        }
        // An owner that has gone away, or that has others of it, has no use for it.
        let _ = home.try_send(batch);
    }
}

/// What one thread needs to know what has arrived: the checksum kernel, and a place for its results.
struct Arrivals {
    kernel: Kernel,
    room: DeviceMemory,
}

impl Arrivals {
    fn new(context: &Arc<Context>) -> Result<Arrivals, CudaError> {
        let kernel = Kernel::load(context)?;
        let bytes = DeviceMemory::rounded(context, PIECES_MAX * 8)?.unwrap_or_default();
        Ok(Arrivals { kernel, room: DeviceMemory::new(context, bytes)? })
    }

    fn carry_out(&self, batch: &Batch, share: &DirectShare, index: usize, read: &DirectRead) {
        let handle = share.handles.get(read.file as usize).and_then(Option::as_ref);
        let target = share.regions.get(read.region as usize).and_then(Option::as_ref);
        let (Some(handle), Some(target)) = (handle, target) else {
            return share.miss(index, || "its file or its region is not registered".to_owned());
        };
        let mut clock = Instant::now();
        let arrived = fill(handle, target, read);
        batch.progress.spent(Phase::Wait, lap(&mut clock));
        let failed = match arrived {
            Ok(()) => {
                let pieces = share.plan.pieces_of(read);
                let places = pieces.iter().map(|piece| (piece.place, piece.bytes));
                let sums = self.kernel.pieces(target.memory(), places, &self.room);
                batch.progress.spent(Phase::Checksum, lap(&mut clock));
                match sums {
                    Ok(sums) => {
                        let own = share.sums.get(read.pieces.start as usize..).unwrap_or_default();
                        own.iter().zip(sums).for_each(|(place, sum)| place.store(sum, Ordering::Release));
                        share.carry_out(index);
                        return batch.progress.unproven(read.bytes);
                    }
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error,
        };
        // What cuFile says of a device that is lost differs from version to version: the driver is asked.
        match target.memory().context().memory() {
            Err(error) if error.is_fatal() => batch.progress.fail(copy_error(error)),
            _ => share.miss(index, || failed),
        }
    }
}

/// Reads until all bytes are there, or no more come: the only place for short reads of this path (invariant 5).
fn fill(handle: &Handle, target: &Registered, read: &DirectRead) -> Result<(), String> {
    let mut done = 0;
    while done < read.bytes {
        let arrived = handle
            .read(target, read.place + done, read.bytes - done, read.offset + done)
            .map_err(|error| error.to_string())?;
        // What came of a block that is not whole is read again with the rest of it.
        done += arrived;
        done -= done % BLOCK_ALIGN;
        if arrived < BLOCK_ALIGN {
            return Err(format!("cuFileRead ended after {done} of {} bytes", read.bytes));
        }
    }
    Ok(())
}
