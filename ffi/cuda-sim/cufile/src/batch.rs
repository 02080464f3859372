//! Batches: many reads and writes by one call, done by threads of the library's own.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::abi::{BATCH_MODE, BatchEntry, BatchEvent, Code, READ, WRITE, batch_status};
use crate::device::lock;
use crate::failure::Answer;
use crate::session::Session;
use crate::statistics::{Direction, Way};
use crate::transfer::{self, Wanted};

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
    /// Cookies of entries for which there was no slab: they are never done, and nobody is told.
    stuck: Vec<usize>,
    running: usize,
    /// Of entries that have ended; not yet told.
    events: VecDeque<Event>,
    /// Slabs in use, by their kind.
    slabs: Vec<usize>,
    is_ended: bool,
}

struct Entry {
    session: Arc<Session>,
    wanted: Wanted,
    cookie: usize,
    slab: Option<usize>,
}

struct Event {
    event: BatchEvent,
    /// Free again when this has been told.
    slab: Option<usize>,
}

impl State {
    fn outstanding(&self) -> usize {
        self.waiting.len() + self.stuck.len() + self.running
    }

    /// Takes a slab for so many bytes; none: none of its kind is left.
    fn take_slab(&mut self, session: &Session, bytes: usize) -> Option<usize> {
        let kinds = session.parameters.slabs();
        let fits = kinds.iter().position(|slab| slab.kib.saturating_mul(1024) >= bytes);
        let kind = fits.unwrap_or(kinds.len().saturating_sub(1));
        self.slabs.resize(kinds.len(), 0);
        let used = self.slabs.get_mut(kind)?;
        if *used >= kinds[kind].count {
            return None;
        }
        *used += 1;
        Some(kind)
    }

    fn tell(&mut self, cookie: usize, status: u32, result: isize, slab: Option<usize>) {
        self.events.push_back(Event { event: BatchEvent { cookie, status, result }, slab });
    }

    fn submit(&mut self, session: &Arc<Session>, entry: &BatchEntry) {
        let cookie = entry.cookie;
        let (wanted, way) = match checked(session, entry) {
            Ok(checked) => checked,
            Err(failure) => return self.tell(cookie, batch_status::INVALID, failure.result(), None),
        };
        let mut slab = None;
        if way == Way::Posix {
            slab = self.take_slab(session, wanted.bytes);
            if slab.is_none() {
                return self.stuck.push(cookie);
            }
        }
        self.waiting.push_back(Entry { session: Arc::clone(session), wanted, cookie, slab });
    }
}

/// What an entry asks for, and the way that it goes.
fn checked(session: &Session, entry: &BatchEntry) -> Answer<(Wanted, Way)> {
    let direction = match entry.opcode {
        READ => Direction::Read,
        WRITE => Direction::Write,
        _ => return Err(Code::INVALID_VALUE.into()),
    };
    if entry.mode != BATCH_MODE {
        return Err(Code::INVALID_VALUE.into());
    }
    let wanted = Wanted {
        direction,
        handle: entry.handle,
        base: entry.base,
        bytes: entry.bytes,
        file_offset: entry.file_offset,
        base_offset: entry.base_offset,
    };
    Ok((wanted, session.file(entry.handle)?.way))
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
            let Some(entry) = state.waiting.pop_front() else {
                state = self.wait(state, None).0;
                continue;
            };
            state.running += 1;
            drop(state);
            let moved = transfer::run(&entry.session, entry.wanted);
            let Entry { session, cookie, slab, .. } = entry;
            // Who is told of the last entry may close the driver at once.
            drop(session);
            state = self.state();
            state.running -= 1;
            match moved {
                Ok(bytes) => state.tell(cookie, batch_status::COMPLETE, bytes as isize, slab),
                Err(failure) => state.tell(cookie, batch_status::FAILED, failure.result(), slab),
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

    /// Submits all of them or none.
    pub(crate) fn submit(&self, session: &Arc<Session>, entries: &[BatchEntry]) -> Answer {
        let mut state = self.shared.state();
        if state.outstanding() + state.events.len() + entries.len() > self.capacity {
            return Err(Code::BATCH_FULL.into());
        }
        for entry in entries {
            state.submit(session, entry);
        }
        self.shared.changed.notify_all();
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
        for slab in told.iter().filter_map(|event| event.slab) {
            state.slabs[slab] -= 1;
        }
        told.into_iter().map(|event| event.event).collect()
    }

    /// What has not begun is not done any more.
    pub(crate) fn cancel(&self) {
        let mut state = self.shared.state();
        let waiting = std::mem::take(&mut state.waiting).into_iter().map(|entry| (entry.cookie, entry.slab));
        let waiting: Vec<_> = waiting.collect();
        let stuck = std::mem::take(&mut state.stuck).into_iter().map(|cookie| (cookie, None));
        for (cookie, slab) in waiting.into_iter().chain(stuck) {
            state.tell(cookie, batch_status::CANCELED, 0, slab);
        }
        self.shared.changed.notify_all();
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
