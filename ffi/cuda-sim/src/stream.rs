//! Streams: a thread each, which does its work in order; events; and modelled links.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::code::Outcome;
use crate::machine::lock;

/// A piece of work; an error is what the context answers from then on.
type Task = Box<dyn FnOnce() -> Outcome + Send>;

/// Work of one device, in order.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) device: usize,
    tasks: Mutex<Sender<Task>>,
    progress: Arc<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    open: Mutex<u64>,
    ended: Condvar,
}

impl Stream {
    /// Starts its thread, which ends with the last handle.
    pub(crate) fn start(device: usize, sticky: Arc<AtomicU32>) -> Arc<Stream> {
        let (sender, tasks) = channel::<Task>();
        let progress = Arc::new(Progress::default());
        let shared = Arc::clone(&progress);
        let body = move || {
            for task in tasks {
                // After an error nothing more is done on the device.
                if sticky.load(Ordering::Acquire) == 0
                    && let Err(code) = task()
                {
                    sticky.store(code, Ordering::Release);
                }
                *lock(&shared.open) -= 1;
                shared.ended.notify_all();
            }
        };
        // Without a thread nothing of this stream ever ends; there is no way to say so from here.
        let _ = std::thread::Builder::new().name("cuda-sim-stream".to_owned()).spawn(body);
        Arc::new(Stream { device, tasks: Mutex::new(sender), progress })
    }

    /// Puts work behind what is there.
    pub(crate) fn push(&self, task: impl FnOnce() -> Outcome + Send + 'static) {
        *lock(&self.progress.open) += 1;
        if lock(&self.tasks).send(Box::new(task)).is_err() {
            *lock(&self.progress.open) -= 1;
        }
    }

    /// Whether all work has ended.
    pub(crate) fn idle(&self) -> bool {
        *lock(&self.progress.open) == 0
    }

    /// Waits until all work has ended.
    pub(crate) fn wait(&self) {
        let mut open = lock(&self.progress.open);
        while *open > 0 {
            open = self.progress.ended.wait(open).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

/// A point in a stream.
#[derive(Debug, Default)]
pub(crate) struct Event {
    state: Mutex<EventState>,
    reached: Condvar,
}

#[derive(Debug, Default)]
struct EventState {
    recorded: u64,
    reached: u64,
    at: Option<Instant>,
}

impl Event {
    /// Records it behind what is in the stream.
    pub(crate) fn record(self: &Arc<Self>, stream: &Stream) {
        let mut state = lock(&self.state);
        state.recorded += 1;
        let (number, event) = (state.recorded, Arc::clone(self));
        drop(state);
        let mark = Mark { event, number };
        stream.push(move || {
            mark.event.reach(mark.number);
            Ok(())
        });
    }

    fn reach(&self, number: u64) {
        let mut state = lock(&self.state);
        if number > state.reached {
            state.reached = number;
            state.at = Some(Instant::now());
        }
        drop(state);
        self.reached.notify_all();
    }

    /// Whether the last recording was reached; also if there was none.
    pub(crate) fn is_reached(&self) -> bool {
        let state = lock(&self.state);
        state.reached == state.recorded
    }

    /// Waits for the last recording.
    pub(crate) fn wait(&self) {
        let mut state = lock(&self.state);
        let wanted = state.recorded;
        while state.reached < wanted {
            state = self.reached.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// When it was reached last.
    pub(crate) fn at(&self) -> Option<Instant> {
        lock(&self.state).at
    }
}

/// Reaches its event also if the work before it failed and this one is dropped.
struct Mark {
    event: Arc<Event>,
    number: u64,
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.event.reach(self.number);
    }
}

/// One direction between host and device.
#[derive(Debug)]
pub(crate) struct Link {
    bytes_per_second: Option<u64>,
    busy_until: Mutex<Option<Instant>>,
}

impl Link {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Link {
        Link { bytes_per_second, busy_until: Mutex::new(None) }
    }

    /// Takes as long as the link would: copies on it share its bandwidth.
    pub(crate) fn carry(&self, bytes: u64, began: Instant) {
        let Some(rate) = self.bytes_per_second.filter(|rate| *rate > 0) else { return };
        let time = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut busy = lock(&self.busy_until);
        let end = busy.map_or(began, |busy| busy.max(began)) + time;
        *busy = Some(end);
        drop(busy);
        let now = Instant::now();
        if end > now {
            pass(end - now);
        }
    }
}

/// A link that is busy is nothing but time.
#[allow(clippy::disallowed_methods, reason = "time is what is modelled")]
fn pass(time: Duration) {
    std::thread::sleep(time);
}

/// Objects by the numbers that are handed out for them.
pub(crate) struct Handles<T>(Mutex<Option<HashMap<usize, Arc<T>>>>);

impl<T> Handles<T> {
    pub(crate) const fn new() -> Handles<T> {
        Handles(Mutex::new(None))
    }

    pub(crate) fn put(&self, number: u64, object: Arc<T>) -> usize {
        // Far from addresses and small numbers, so that one kind is not taken for another.
        let handle = (number as usize) << 4 | 0x7_0000_0000;
        lock(&self.0).get_or_insert_default().insert(handle, object);
        handle
    }

    pub(crate) fn get(&self, handle: usize) -> Option<Arc<T>> {
        lock(&self.0).as_ref()?.get(&handle).cloned()
    }

    pub(crate) fn take(&self, handle: usize) -> Option<Arc<T>> {
        lock(&self.0).as_mut()?.remove(&handle)
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        lock(&self.0).iter().flat_map(|map| map.values().cloned()).collect()
    }
}
