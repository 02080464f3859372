//! One io_uring that reads files into spans.
//!
//! Upholds invariant 2: the ring owns the span and the file of a read from [`Ring::start`] until its completion is
//! handed back; a ring that cannot drain leaks the spans and says how many bytes.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use super::mem::{Memory, Span};

/// `user_data` of the poll on the wake descriptor; reads use their place in the table of reads in flight.
const WAKE: u64 = u64::MAX;
/// `user_data` of a cancellation; its own completion carries no information.
const CANCEL: u64 = u64::MAX - 1;
/// Files that may be registered at a time; further ones are read by plain descriptor.
const FILES_MAX: u32 = 1024;
/// Memories that may be registered at a time; further ones are read into without registration.
const BUFFERS_MAX: u32 = 1024;
/// The kernel's limit on one registered buffer, bytes.
const BUFFER_BYTES_MAX: u64 = 1 << 30;

/// One read of a file into a span. Owns both.
#[derive(Debug)]
pub struct Read {
    /// What is read.
    pub file: Arc<OwnedFd>,
    /// Its place in the table of registered files, if it is registered.
    pub file_slot: Option<u32>,
    /// Offset in the file of the span's first byte.
    pub offset: u64,
    /// Where the bytes go.
    pub span: Span,
    /// Bytes to read, at most the span's length.
    pub bytes: u32,
    /// Bytes at the head of the span that have already arrived.
    pub arrived: u32,
    /// Take only what the page cache holds, and do not wait for the drive.
    pub cached_only: bool,
    /// For the owner.
    pub tag: u64,
}

/// A read that has ended. `result` is the number of bytes that arrived by this attempt.
#[derive(Debug)]
pub struct Done {
    /// The read, with its span.
    pub read: Read,
    /// Bytes, or why not.
    pub result: io::Result<u32>,
}

/// An io_uring with a table of reads in flight. Not to be moved to another thread: the kernel accepts
/// submissions only of the thread that made it.
pub struct Ring {
    ring: IoUring,
    in_flight: Box<[Option<Read>]>,
    free: Vec<u32>,
    wake: Arc<OwnedFd>,
    wake_armed: bool,
    files: Vec<Option<Arc<OwnedFd>>>,
    buffers: Vec<Option<Arc<Memory>>>,
    _not_send: std::marker::PhantomData<*const ()>,
}

/// Whether this process may use io_uring: makes a small ring and lets it go.
pub fn probe() -> io::Result<()> {
    build(4).map(drop)
}

/// Shard threads own their ring, so completions need no interrupt; kernels before 6.1 do not know the flags.
fn build(entries: u32) -> io::Result<IoUring> {
    let tuned = IoUring::builder()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_defer_taskrun()
        .setup_cqsize(entries.saturating_mul(2))
        .build(entries);
    match tuned {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries),
        other => other,
    }
}

impl Ring {
    /// A ring for `depth` reads in flight, woken from [`Ring::wait`] by the eventfd `wake`.
    pub fn new(depth: u32, wake: Arc<OwnedFd>) -> io::Result<Ring> {
        // Two more entries: the poll on `wake` and a cancellation.
        let ring = build(depth.saturating_add(2).next_power_of_two())?;
        let files = match ring.submitter().register_files_sparse(FILES_MAX) {
            Ok(()) => vec![None; FILES_MAX as usize],
            Err(_) => Vec::new(),
        };
        let buffers = match ring.submitter().register_buffers_sparse(BUFFERS_MAX) {
            Ok(()) => vec![None; BUFFERS_MAX as usize],
            Err(_) => Vec::new(),
        };
        Ok(Ring {
            ring,
            in_flight: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            wake,
            wake_armed: false,
            files,
            buffers,
            _not_send: std::marker::PhantomData,
        })
    }

    /// Reads that may be started before one has to end.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Reads in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len() - self.free.len()
    }

    /// Registers a file. `None`: the table is full, or the kernel has none; the file is then read as it is.
    pub fn register_file(&mut self, file: &Arc<OwnedFd>) -> Option<u32> {
        let slot = self.files.iter().position(Option::is_none)?;
        self.ring.submitter().register_files_update(slot as u32, &[file.as_raw_fd()]).ok()?;
        self.files[slot] = Some(Arc::clone(file));
        Some(slot as u32)
    }

    /// Takes a file out of the table.
    pub fn unregister_file(&mut self, slot: u32) {
        const NONE: RawFd = -1;
        if self.files.get_mut(slot as usize).is_some_and(|file| file.take().is_some()) {
            let _ = self.ring.submitter().register_files_update(slot, &[NONE]);
        }
    }

    /// Registers populated memory, so that reads into it need not pin its pages each time. `false`: not
    /// registered (too large, no room, or over the limit on locked memory); reads work all the same.
    ///
    /// Memory whose pages were not touched yet must not be registered: the kernel would fault it in here.
    pub fn register_memory(&mut self, memory: &Arc<Memory>) -> bool {
        if memory.bytes() > BUFFER_BYTES_MAX {
            return false;
        }
        let Some(slot) = self.buffers.iter().position(Option::is_none) else { return false };
        let vector =
            libc::iovec { iov_base: memory.address().as_ptr().cast(), iov_len: memory.bytes() as usize };
        // SAFETY: the range is the whole mapping of `memory`, which the table keeps alive while it is registered.
        let registered =
            unsafe { self.ring.submitter().register_buffers_update(slot as u32, &[vector], None) };
        if registered.is_ok() {
            self.buffers[slot] = Some(Arc::clone(memory));
        }
        registered.is_ok()
    }

    /// Takes memory out of the table. No read into it may be in flight.
    pub fn unregister_memory(&mut self, memory: &Arc<Memory>) {
        let Some(slot) = self.buffer_slot(memory) else { return };
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: a null vector clears the slot; no memory is named.
        let _ = unsafe { self.ring.submitter().register_buffers_update(slot.into(), &[none], None) };
        self.buffers[usize::from(slot)] = None;
    }

    fn buffer_slot(&self, memory: &Arc<Memory>) -> Option<u16> {
        let same = |slot: &Option<Arc<Memory>>| slot.as_ref().is_some_and(|other| Arc::ptr_eq(other, memory));
        self.buffers.iter().position(same).map(|slot| slot as u16)
    }

    /// Queues a read; the kernel sees it at the next [`Ring::submit`]. Gives it back if there is no room.
    pub fn start(&mut self, read: Read) -> Result<(), Read> {
        let fits = u64::from(read.bytes) <= read.span.bytes();
        let wanted = read.bytes.checked_sub(read.arrived).filter(|_| fits);
        let (Some(bytes), Some(place)) = (wanted, self.free.pop()) else { return Err(read) };
        // SAFETY: `arrived` ≤ `bytes` ≤ the span's length (checked above), so the address stays inside the span.
        let target = unsafe { read.span.address().add(read.arrived as usize) }.as_ptr();
        let offset = read.offset + u64::from(read.arrived);
        let flags = if read.cached_only { libc::RWF_NOWAIT } else { 0 };
        let buffer = self.buffer_slot(read.span.memory());
        let known = |slot: &u32| self.files.get(*slot as usize).is_some_and(Option::is_some);
        let entry = match (read.file_slot.filter(known), buffer) {
            (Some(slot), Some(buffer)) => opcode::ReadFixed::new(types::Fixed(slot), target, bytes, buffer)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            (None, Some(buffer)) => {
                opcode::ReadFixed::new(types::Fd(read.file.as_raw_fd()), target, bytes, buffer)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            (Some(slot), None) => {
                opcode::Read::new(types::Fixed(slot), target, bytes).offset(offset).rw_flags(flags).build()
            }
            (None, None) => opcode::Read::new(types::Fd(read.file.as_raw_fd()), target, bytes)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        };
        self.in_flight[place as usize] = Some(read);
        if self.push(&entry.user_data(u64::from(place))).is_err() {
            self.free.push(place);
            return match self.in_flight[place as usize].take() {
                Some(read) => Err(read),
                None => unreachable!("the read was stored above"),
            };
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<(), squeue::PushError> {
        // SAFETY: a read's span and file are owned by `in_flight` until its completion is seen, also when the ring
        // is dropped (see `drain`); the poll and the cancellation name no memory.
        unsafe { self.ring.submission().push(entry) }
    }

    /// Hands the queued reads to the kernel. Page faults of the target memory happen in here. Whether there were any.
    pub fn submit(&mut self) -> io::Result<bool> {
        if !self.wake_armed {
            let poll = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), libc::POLLIN as u32).build();
            self.wake_armed = self.push(&poll.user_data(WAKE)).is_ok();
        }
        if self.ring.submission().is_empty() {
            return Ok(false);
        }
        match retry(|| self.ring.submit()) {
            // Completions have to be taken first, or memory is short for a moment: `wait` tries again.
            Err(error)
                if self.in_flight() > 0
                    && matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) =>
            {
                Ok(true)
            }
            submitted => submitted.map(|_| true),
        }
    }

    /// Waits until a read has ended, the ring was woken, or the time is over; appends what has ended to `done`.
    pub fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<()> {
        if self.ring.completion().is_empty() {
            let waited = match timeout {
                None => retry(|| self.ring.submit_and_wait(1)),
                Some(timeout) => {
                    let time = types::Timespec::from(timeout);
                    let arguments = types::SubmitArgs::new().timespec(&time);
                    retry(|| self.ring.submitter().submit_with_args(1, &arguments))
                }
            };
            match waited {
                Err(error) if error.raw_os_error() == Some(libc::ETIME) => {}
                other => drop(other?),
            }
        }
        self.reap(done);
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        for completion in self.ring.completion() {
            match completion.user_data() {
                WAKE => {
                    self.wake_armed = false;
                    let mut count = [0; 8];
                    // Non-blocking: empty means that somebody else took the wake-up, which is as good.
                    let _ = rustix::io::read(&self.wake, &mut count);
                }
                CANCEL => {}
                place => {
                    let taken = self.in_flight.get_mut(place as usize).and_then(Option::take);
                    let Some(read) = taken else { continue };
                    self.free.push(place as u32);
                    let result = u32::try_from(completion.result())
                        .map_err(|_| io::Error::from_raw_os_error(-completion.result()));
                    done.push(Done { read, result });
                }
            }
        }
    }

    /// Cancels what is in flight and waits for it. Gives the bytes of the spans that had to be leaked because
    /// the kernel did not let go of them in time: 0 if all is well.
    pub fn drain(&mut self, timeout: Duration) -> u64 {
        let deadline = Instant::now() + timeout;
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build().user_data(CANCEL);
        if self.in_flight() > 0 {
            let _ = self.push(&cancel);
        }
        let mut done = Vec::with_capacity(self.in_flight.len());
        while self.in_flight() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.submit().is_err() || self.wait(Some(left), &mut done).is_err() {
                break;
            }
            done.clear();
        }
        let stuck = self.in_flight.iter_mut().filter_map(Option::take);
        stuck.map(|read| (read.span.bytes(), std::mem::forget(read)).0).sum()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The owner drains with its own timeout and counts; this is for the paths where it could not.
        self.drain(Duration::from_secs(5));
    }
}

/// Repeats a system call that a signal has interrupted.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
