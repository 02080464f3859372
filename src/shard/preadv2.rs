//! Reading with preadv2 on a few threads, for machines and containers that refuse io_uring.

use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::ReadWriteFlags;

use super::reader::Reader;
use crate::sys::uring::{Done, Read};

/// Threads at most, whatever the depth: each blocks in one read.
const THREADS_MAX: u32 = 16;

/// A pool of reading threads.
pub(super) struct Preadv2 {
    queue: Option<Sender<Read>>,
    ended: Receiver<Done>,
    wake: Arc<OwnedFd>,
    depth: usize,
    in_flight: usize,
    threads: Vec<JoinHandle<()>>,
}

impl Preadv2 {
    /// Threads for `depth` reads in flight; `wake` wakes [`Reader::wait`].
    pub(super) fn new(depth: u32, wake: Arc<OwnedFd>) -> io::Result<Preadv2> {
        let depth = depth.min(THREADS_MAX);
        let (queue, reads) = crossbeam_channel::bounded::<Read>(depth as usize);
        let (finished, ended) = crossbeam_channel::bounded(depth as usize);
        let threads = (0..depth).map(|number| {
            let (reads, finished, wake) = (reads.clone(), finished.clone(), Arc::clone(&wake));
            std::thread::Builder::new().name(format!("preadv2-{number}")).spawn(move || {
                for mut read in reads {
                    let result = once(&mut read);
                    if finished.send(Done { read, result }).is_err() {
                        return;
                    }
                    super::ring(&wake);
                }
            })
        });
        let threads = threads.collect::<io::Result<Vec<_>>>()?;
        Ok(Preadv2 { queue: Some(queue), ended, wake, depth: depth as usize, in_flight: 0, threads })
    }
}

/// One attempt at a read.
fn once(read: &mut Read) -> io::Result<u32> {
    let flags = if read.cached_only { ReadWriteFlags::NOWAIT } else { ReadWriteFlags::empty() };
    let range = read.arrived as usize..read.bytes as usize;
    let target = read.span.as_mut_slice().get_mut(range).ok_or(io::ErrorKind::InvalidInput)?;
    let offset = read.offset + u64::from(read.arrived);
    let bytes = rustix::io::preadv2(&read.file, &mut [IoSliceMut::new(target)], offset, flags)?;
    Ok(bytes as u32)
}

impl Reader for Preadv2 {
    fn room(&self) -> usize {
        self.depth - self.in_flight
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn start(&mut self, read: Read) -> Result<(), Read> {
        let Some(queue) = &self.queue else { return Err(read) };
        queue.try_send(read).map_err(crossbeam_channel::TrySendError::into_inner)?;
        self.in_flight += 1;
        Ok(())
    }

    fn submit(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<()> {
        if self.ended.is_empty() {
            let time = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
            match rustix::event::poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], time.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        for ended in self.ended.try_iter() {
            self.in_flight -= 1;
            done.push(ended);
        }
        Ok(())
    }

    fn drain(&mut self, timeout: Duration) -> u64 {
        let deadline = Instant::now() + timeout;
        let mut done = Vec::with_capacity(self.depth);
        while self.in_flight > 0 && Instant::now() < deadline {
            if self.wait(Some(deadline.saturating_duration_since(Instant::now())), &mut done).is_err() {
                break;
            }
            done.clear();
        }
        // Reads that hang stay with their threads, which own the spans: nothing is freed, nothing is lost count of.
        0
    }
}

impl Drop for Preadv2 {
    fn drop(&mut self) {
        drop(self.queue.take());
        if self.in_flight == 0 {
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
    }
}
