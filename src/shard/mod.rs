//! The data plane: shard threads, each of which alone owns one ring, its slots and its completion queue.
//!
//! A shard thread takes [`Assignment`]s from a bounded mailbox, reads the files of a [`Batch`] into its memory,
//! checksums every byte, and moves the batch back when it is done with it. It runs no async code, takes no lock and
//! allocates nothing while it moves bytes (invariant 3).

mod batch;
mod direct;
mod preadv2;
mod reader;
mod run;
mod settle;
#[cfg(test)]
mod tests;
mod uplink;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use rustix::event::EventfdFlags;

use crate::error::{Code, Error, Result};
use crate::staging;
use crate::sys::cuda::Context;
use crate::sys::uring;

pub use batch::{
    Assignment, Batch, BatchFile, DeviceRegion, Handles, Landing, Part, Path, Phase, Progress, Regions,
};
pub use direct::{DIRECT_DEPTH, DirectShare, DirectThreads};
use preadv2::Preadv2;
use reader::Reader;
pub use settle::{copy_out, mismatch};
use uplink::Uplink;
pub use uplink::copy_error;

/// Assignments that may wait in the mailbox of one shard thread. `limits.jobs_max` keeps it from filling.
const MAILBOX_MAX: usize = 4096;

/// How a shard thread reads files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReaderKind {
    /// io_uring.
    IoUring,
    /// Threads that call preadv2, where io_uring is refused.
    Preadv2,
}

impl ReaderKind {
    /// `io_uring` or `preadv2`.
    pub fn as_str(self) -> &'static str {
        match self {
            ReaderKind::IoUring => "io_uring",
            ReaderKind::Preadv2 => "preadv2",
        }
    }
}

/// What a shard thread is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Number of the shard, from 0.
    pub index: u32,
    /// How it reads.
    pub reader: ReaderKind,
    /// Bytes of one read at most.
    pub block_bytes: u64,
    /// Reads in flight at most.
    pub depth: u32,
    /// Slots of `block_bytes`.
    pub slots: u32,
    /// CPUs to run on; empty: all.
    pub cpus: Vec<u32>,
    /// NUMA node that its slots are wanted on.
    pub numa_node: Option<u32>,
    /// Whether blocks that the page cache holds are taken from it.
    pub page_cache: bool,
    /// GPUs that it copies to.
    pub devices: Vec<Arc<Context>>,
}

/// Counters of one shard thread, read by anyone.
#[derive(Debug, Default)]
pub struct Stats {
    /// Reads in flight.
    pub in_flight: AtomicU32,
    /// Reads that wait for their turn.
    pub waiting: AtomicU64,
    /// Slots in use.
    pub slots_used: AtomicU32,
    /// Bytes read, by [`Path`].
    pub bytes: [AtomicU64; Path::ALL.len()],
    /// Nanoseconds spent, by [`Phase`].
    pub nanos: [AtomicU64; Phase::ALL.len()],
    /// Bytes of spans that had to be leaked because the kernel did not let go of them.
    pub leaked: AtomicU64,
}

/// A running shard thread. Dropping it stops the thread once its batches have ended.
#[derive(Debug)]
pub struct Shard {
    options: Options,
    mailbox: Option<Sender<Assignment>>,
    wake: Arc<OwnedFd>,
    stats: Arc<Stats>,
    slot_nodes: BTreeMap<u32, u64>,
    thread: Option<JoinHandle<()>>,
}

impl Shard {
    /// Starts the thread, with its slots allocated, populated and registered, and waits until it is ready.
    pub fn start(options: Options) -> Result<Shard> {
        let index = options.index;
        let failed = |error: io::Error| {
            Error::new(Code::DaemonStart, format!("shard thread {index} cannot start: {error}"))
        };
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|error| failed(error.into()))?);
        let (mailbox, letters) = crossbeam_channel::bounded(MAILBOX_MAX);
        let (ready, started) = crossbeam_channel::bounded(1);
        let stats = Arc::new(Stats::default());
        let thread = {
            let (options, wake, stats) = (options.clone(), Arc::clone(&wake), Arc::clone(&stats));
            let body = move || match options.reader {
                ReaderKind::IoUring => {
                    launch(uring::Ring::new(options.depth, wake), &options, &letters, stats, &ready);
                }
                ReaderKind::Preadv2 => {
                    launch(Preadv2::new(options.depth, wake), &options, &letters, stats, &ready);
                }
            };
            std::thread::Builder::new().name(format!("shard-{index}")).spawn(body).map_err(failed)?
        };
        let slot_nodes = match started.recv() {
            Ok(Ok(nodes)) => nodes,
            Ok(Err(error)) => return Err(failed(error)),
            Err(_) => return Err(failed(io::Error::other("it ended at once"))),
        };
        Ok(Shard { options, mailbox: Some(mailbox), wake, stats, slot_nodes, thread: Some(thread) })
    }

    /// Hands an assignment to the thread. Gives it back if the mailbox is full or the thread is gone.
    pub fn send(&self, assignment: Assignment) -> Result<(), Assignment> {
        let Some(mailbox) = &self.mailbox else { return Err(assignment) };
        mailbox.try_send(assignment).map_err(crossbeam_channel::TrySendError::into_inner)?;
        ring(&self.wake);
        Ok(())
    }

    /// What it was started with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Bytes of its slots on each NUMA node, as observed at its start. Empty: the kernel does not say.
    pub fn slot_nodes(&self) -> &BTreeMap<u32, u64> {
        &self.slot_nodes
    }

    /// Its counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        drop(self.mailbox.take());
        ring(&self.wake);
        if let Some(thread) = self.thread.take() {
            // A panic there has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Wakes whoever waits on the eventfd. Its counter cannot overflow: the waiter resets it.
fn ring(wake: &OwnedFd) {
    let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
}

/// Prepares the thread, says whether that worked and where its slots are, and runs.
fn launch<R: Reader>(
    reader: io::Result<R>,
    options: &Options,
    letters: &Receiver<Assignment>,
    stats: Arc<Stats>,
    ready: &Sender<io::Result<BTreeMap<u32, u64>>>,
) {
    pin(&options.cpus);
    let prepared = reader.and_then(|reader| {
        let slots = staging::Pool::new(options.slots, options.block_bytes, options.numa_node)?;
        let uplink = Uplink::new(&options.devices, &slots).map_err(io::Error::other)?;
        Ok((reader, slots, uplink))
    });
    match prepared {
        Ok((reader, slots, uplink)) => {
            let nodes = slots.numa_nodes();
            let runner = run::Runner::new(reader, slots, uplink, options, stats);
            // The starter waits for this; it cannot be gone.
            let _ = ready.send(Ok(nodes));
            runner.run(letters);
        }
        Err(error) => drop(ready.send(Err(error))),
    }
}

/// Keeps the thread on its CPUs. A refusal costs speed only.
fn pin(cpus: &[u32]) {
    if cpus.is_empty() {
        return;
    }
    let mut set = rustix::thread::CpuSet::new();
    for cpu in cpus.iter().filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU as u32) {
        set.set(*cpu as usize);
    }
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::debug!(%error, "shard thread not pinned");
    }
}
