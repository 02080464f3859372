//! Contexts: the streams of one device in one process, and the error that ends them all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};

use crate::abi::{Answer, Code};
use crate::sim::{Device, lock};
use crate::stream::{Mark, Stream};
use crate::work::Work;

/// The primary context of a device.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) device: Arc<Device>,
    progress: Mutex<Progress>,
    /// Work has ended.
    quiet: Condvar,
    /// The error that every call answers from now on; zero: none.
    failed: AtomicU32,
    legacy: Mutex<Legacy>,
}

#[derive(Debug, Default)]
struct Progress {
    /// Streams that are in the middle of something.
    running: u32,
    /// An error that is not visible yet, because something still runs.
    pending: Option<Code>,
}

/// The NULL stream, and the streams that wait for it and that it waits for.
#[derive(Debug, Default)]
struct Legacy {
    null: Option<Arc<Stream>>,
    blocking: Vec<Weak<Stream>>,
    all: Vec<Weak<Stream>>,
}

impl Context {
    pub(crate) fn new(device: Arc<Device>) -> Arc<Context> {
        Arc::new(Context {
            device,
            progress: Mutex::default(),
            quiet: Condvar::new(),
            failed: AtomicU32::new(0),
            legacy: Mutex::default(),
        })
    }

    /// The error that has ended it, if one has. Counts as no operation.
    pub(crate) fn check(&self) -> Answer {
        match self.failed.load(Ordering::Acquire) {
            0 if self.device.is_lost() => Err(Code::DEVICE_UNAVAILABLE),
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }

    /// Does one piece of work, unless an error has ended the context.
    ///
    /// As on a device that stops, an error is seen by callers only when nothing runs any more: who sees it may take back
    /// all memory that was used.
    pub(crate) fn run(&self, work: impl FnOnce() -> Answer) {
        let mut progress = lock(&self.progress);
        if progress.pending.is_none() && self.check().is_ok() {
            progress.running += 1;
            drop(progress);
            let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Code::UNKNOWN));
            progress = lock(&self.progress);
            progress.running -= 1;
            if let Err(code) = result {
                progress.pending.get_or_insert(code);
            }
        }
        while let Some(code) = progress.pending {
            if progress.running == 0 {
                self.failed.store(code.0, Ordering::Release);
                self.quiet.notify_all();
                return;
            }
            if self.failed.load(Ordering::Acquire) != 0 {
                return;
            }
            progress = self.quiet.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A new stream; `blocking`: ordered with the NULL stream.
    pub(crate) fn stream(self: &Arc<Context>, blocking: bool) -> Answer<Arc<Stream>> {
        let stream = Stream::start(Arc::clone(self), blocking)?;
        let mut legacy = lock(&self.legacy);
        legacy.all.retain(|stream| stream.strong_count() > 0);
        legacy.blocking.retain(|stream| stream.strong_count() > 0);
        legacy.all.push(Arc::downgrade(&stream));
        if blocking {
            legacy.blocking.push(Arc::downgrade(&stream));
        }
        Ok(stream)
    }

    /// Submits work to a stream of the context (none: the NULL stream), to be done after `after`.
    pub(crate) fn submit(
        self: &Arc<Context>,
        stream: Option<&Arc<Stream>>,
        work: Work,
        mut after: Vec<Mark>,
    ) -> Answer<Mark> {
        let mut legacy = lock(&self.legacy);
        if let Some(stream) = stream {
            if let Some(null) = legacy.null.as_ref().filter(|_| stream.blocking()) {
                after.push(null.tail());
            }
            return Ok(stream.push(work, after));
        }
        after.extend(legacy.blocking.iter().filter_map(Weak::upgrade).map(|stream| stream.tail()));
        let null = match &legacy.null {
            Some(null) => Arc::clone(null),
            None => {
                let null = Stream::start(Arc::clone(self), true)?;
                legacy.all.push(Arc::downgrade(&null));
                Arc::clone(legacy.null.insert(null))
            }
        };
        Ok(null.push(work, after))
    }

    /// Waits until all that was submitted to any stream has ended, well or not.
    pub(crate) fn settle(&self) {
        let tails: Vec<Mark> = {
            let legacy = lock(&self.legacy);
            legacy.all.iter().filter_map(Weak::upgrade).map(|stream| stream.tail()).collect()
        };
        tails.iter().for_each(Mark::wait);
    }

    /// Whether all that was submitted to the NULL stream, and to those that it waits for, has ended.
    pub(crate) fn null_is_idle(&self) -> bool {
        let legacy = lock(&self.legacy);
        let blocking = legacy.blocking.iter().filter_map(Weak::upgrade);
        legacy.null.iter().cloned().chain(blocking).all(|stream| stream.tail().is_reached())
    }

    /// Ends the streams, after what was submitted.
    pub(crate) fn close(&self) {
        self.settle();
        let mut legacy = lock(&self.legacy);
        legacy.all.iter().filter_map(Weak::upgrade).for_each(|stream| stream.close());
        *legacy = Legacy::default();
    }
}
