//! Streams, each a thread that does its work in order, and events, which mark a point in a stream.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use crate::abi::{Answer, Code};
use crate::context::Context;
use crate::sim::lock;
use crate::work::Work;

/// Pieces of work that wait in a stream. Past this the caller waits, as a real driver has it.
const WAITING_MAX: usize = 1024;

#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) context: Arc<Context>,
    blocking: bool,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Item>,
    /// Pieces submitted and done since the stream was made.
    submitted: u64,
    done: u64,
    closed: bool,
}

#[derive(Debug)]
struct Item {
    work: Work,
    /// All submitted before: so waits cannot go in a circle.
    after: Vec<Mark>,
}

impl Stream {
    /// A stream with its thread, which ends when the stream is closed and all is done.
    pub(crate) fn start(context: Arc<Context>, blocking: bool) -> Answer<Arc<Stream>> {
        let stream = Arc::new(Stream { context, blocking, queue: Mutex::default(), changed: Condvar::new() });
        let thread = Arc::clone(&stream);
        std::thread::Builder::new()
            .name("cuda-sim-stream".to_owned())
            .spawn(move || thread.work())
            .map_err(|_| Code::OPERATING_SYSTEM)?;
        Ok(stream)
    }

    pub(crate) fn blocking(&self) -> bool {
        self.blocking
    }

    /// The thread.
    fn work(&self) {
        while let Some(item) = self.next() {
            item.after.iter().for_each(Mark::wait);
            self.context.run(|| item.work.run(&self.context));
            lock(&self.queue).done += 1;
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<Item> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(item) = queue.waiting.pop_front() {
                self.changed.notify_all();
                return Some(item);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Submits work.
    pub(crate) fn push(self: &Arc<Stream>, work: Work, after: Vec<Mark>) -> Mark {
        let mut queue = lock(&self.queue);
        while queue.waiting.len() >= WAITING_MAX {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.waiting.push_back(Item { work, after });
        queue.submitted += 1;
        self.changed.notify_all();
        Mark { stream: Arc::clone(self), number: queue.submitted }
    }

    /// The end of what was submitted so far.
    pub(crate) fn tail(self: &Arc<Stream>) -> Mark {
        Mark { stream: Arc::clone(self), number: lock(&self.queue).submitted }
    }

    /// Lets the thread end when all is done.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }
}

/// A point in the work of a stream.
#[derive(Debug, Clone)]
pub(crate) struct Mark {
    stream: Arc<Stream>,
    number: u64,
}

impl Mark {
    pub(crate) fn is_reached(&self) -> bool {
        lock(&self.stream.queue).done >= self.number
    }

    pub(crate) fn wait(&self) {
        let mut queue = lock(&self.stream.queue);
        while queue.done < self.number {
            queue = self.stream.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// An event of the C API.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) context: Arc<Context>,
    pub(crate) timing: bool,
    pub(crate) recorded: Mutex<Option<Recorded>>,
}

/// The last recording of an event.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    pub(crate) mark: Mark,
    pub(crate) time: Arc<OnceLock<Instant>>,
}
