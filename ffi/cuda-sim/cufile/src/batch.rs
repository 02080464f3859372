//! Batches: many reads and writes by one call, done by threads of the library's own.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::abi::{BATCH_MODE, BatchEntry, BatchEvent, Code, READ, WRITE, batch_status};
use crate::device::lock;
use crate::failure::Answer;
use crate::parameters::Slab;
use crate::session::Session;
use crate::statistics::{Direction, Way};
use crate::transfer::{self, Planned, Wanted};

/// Entries of a batch that are done at the same time.
const THREADS: usize = 4;

/// One batch, from its setting up to its destruction.
pub(crate) struct Batch {
    capacity: usize,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// In the order in which they were submitted.
    waiting: VecDeque<Entry>,
    running: usize,
    /// Of entries that have ended; not yet told.
    events: VecDeque<Event>,
    /// Slabs in use, by their kind.
    slabs: Vec<usize>,
    /// Goes up when the batch is cancelled.
    cancelled: u64,
    is_ended: bool,
}

/// One that is to be done.
struct Entry {
    session: Arc<Session>,
    planned: Planned,
    direction: Direction,
    cookie: usize,
    slab: Option<usize>,
}

/// One that has ended.
struct Event {
    event: BatchEvent,
    /// Free again when this has been told.
    slab: Option<usize>,
}

impl State {
    fn outstanding(&self) -> usize {
        self.waiting.len() + self.running
    }

    /// Takes a slab for so many bytes, if one of its kind is left.
    fn take_slab(&mut self, kinds: &[Slab], bytes: usize) -> Option<usize> {
        let fits = kinds.iter().position(|slab| slab.kib.saturating_mul(1024) >= bytes);
        let kind = fits.unwrap_or(kinds.len().saturating_sub(1));
        self.slabs.resize(kinds.len(), 0);
        let used = self.slabs.get_mut(kind).filter(|used| **used < kinds[kind].count)?;
        *used += 1;
        Some(kind)
    }

    fn free_slab(&mut self, slab: Option<usize>) {
        if let Some(used) = slab.and_then(|kind| self.slabs.get_mut(kind)) {
            *used -= 1;
        }
    }
}

/// What an entry asks for.
fn wanted(entry: &BatchEntry) -> Answer<Wanted> {
    let direction = match entry.opcode {
        READ => Direction::Read,
        WRITE => Direction::Write,
        _ => return Err(Code::INVALID_VALUE.into()),
    };
    if entry.mode != BATCH_MODE {
        return Err(Code::INTERNAL_BATCH_SUBMIT_ERROR.into());
    }
    Ok(Wanted {
        direction,
        handle: entry.handle,
        base: entry.base,
        bytes: entry.bytes,
        file_offset: entry.file_offset,
        base_offset: entry.base_offset,
    })
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Waits for a change, until then at most; whether there is time left.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        until: Option<Instant>,
    ) -> (MutexGuard<'a, State>, bool) {
        let Some(until) = until else {
            return (self.changed.wait(state).unwrap_or_else(PoisonError::into_inner), true);
        };
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        (waited.0, !waited.1.timed_out())
    }

    /// What each thread does until the batch is ended.
    fn work(&self) {
        let mut state = self.state();
        while !state.is_ended {
            let Some(mut entry) = state.waiting.pop_front() else {
                state = self.wait(state, None).0;
                continue;
            };
            state.running += 1;
            let cancelled = state.cancelled;
            drop(state);
            let moved = entry.planned.run(&entry.session);
            if let Ok(bytes) = moved {
                lock(&entry.session.counters).batch_moved(entry.direction, bytes);
            }
            let Entry { session, cookie, slab, .. } = entry;
            // Who is told of the last entry may close the driver at once.
            drop(session);
            state = self.state();
            state.running -= 1;
            if state.cancelled == cancelled {
                // Why it failed is not told, as real libraries have it.
                let (status, result) = match moved {
                    Ok(bytes) => (batch_status::COMPLETE, bytes as isize),
                    Err(_) => (batch_status::FAILED, -1),
                };
                state.events.push_back(Event { event: BatchEvent { cookie, status, result }, slab });
            } else {
                state.free_slab(slab);
            }
            self.changed.notify_all();
        }
    }
}

impl Batch {
    pub(crate) fn new(capacity: usize) -> Answer<Batch> {
        let batch = Batch { capacity, shared: Arc::default(), threads: Mutex::default() };
        for _ in 0..THREADS {
            let shared = Arc::clone(&batch.shared);
            let thread =
                std::thread::Builder::new().name("cufile-batch".to_owned()).spawn(move || shared.work());
            // Those that were started end when the batch is dropped.
            lock(&batch.threads).push(thread.map_err(|_| Code::INTERNAL_BATCH_SETUP_ERROR)?);
        }
        Ok(batch)
    }

    /// Submits all of them or none. In compatibility mode each takes a slab; where none is left this waits until one has
    /// been told of or the batch is cancelled or ended, which only another thread can do: a real library hangs here.
    pub(crate) fn submit(&self, session: &Arc<Session>, entries: &[BatchEntry]) -> Answer {
        if entries.is_empty() || entries.len() > self.capacity {
            return Err(Code::INTERNAL_BATCH_SUBMIT_ERROR.into());
        }
        let planned = entries.iter().map(|entry| {
            let wanted = wanted(entry)?;
            Ok((entry, wanted.direction, transfer::plan(session, wanted)?))
        });
        let planned = planned.collect::<Answer<Vec<_>>>()?;
        let mut state = self.shared.state();
        if state.is_ended {
            return Err(Code::INVALID_VALUE.into());
        }
        if state.outstanding() + state.events.len() + entries.len() > self.capacity {
            return Err(Code::BATCH_FULL.into());
        }
        let cancelled = state.cancelled;
        for (entry, direction, planned) in planned {
            let mut slab = None;
            while planned.way == Way::Posix && slab.is_none() {
                slab = state.take_slab(session.parameters.slabs(), entry.bytes);
                if slab.is_none() {
                    state = self.shared.wait(state, None).0;
                }
                if state.is_ended || state.cancelled != cancelled {
                    return Err(Code::BATCH_SUBMIT_FAILED.into());
                }
            }
            lock(&session.counters).batch_entry(planned.way);
            let session = Arc::clone(session);
            state.waiting.push_back(Entry { session, planned, direction, cookie: entry.cookie, slab });
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// Waits until at least so many entries have ended, or all have, or the time is over; then tells of up to `max`.
    pub(crate) fn events(&self, min: usize, max: usize, until: Option<Instant>) -> Vec<BatchEvent> {
        let mut state = self.shared.state();
        let mut has_time = true;
        while has_time && !state.is_ended && state.events.len() < min.min(max) && state.outstanding() > 0 {
            (state, has_time) = self.shared.wait(state, until);
        }
        let count = state.events.len().min(max);
        let told: Vec<_> = state.events.drain(..count).collect();
        told.iter().for_each(|event| state.free_slab(event.slab));
        self.shared.changed.notify_all();
        told.into_iter().map(|event| event.event).collect()
    }

    /// What has not begun is not done any more, and what has begun is waited for. Nobody is told of any of it.
    pub(crate) fn cancel(&self) {
        let mut state = self.shared.state();
        state.cancelled += 1;
        let waiting = std::mem::take(&mut state.waiting);
        waiting.iter().for_each(|entry| state.free_slab(entry.slab));
        let events = std::mem::take(&mut state.events);
        events.iter().for_each(|event| state.free_slab(event.slab));
        self.shared.changed.notify_all();
        while state.running > 0 {
            state = self.shared.wait(state, None).0;
        }
    }

    /// Waits for what has begun, and does nothing more.
    pub(crate) fn end(&self) {
        let mut state = self.shared.state();
        state.is_ended = true;
        state.waiting.clear();
        self.shared.changed.notify_all();
        drop(state);
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            // A thread that has panicked has ended, too.
            let _ = thread.join();
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.end();
    }
}
