//! What a shard thread needs of whatever reads files for it. Three kinds: io_uring, preadv2 threads, and the
//! simulated one of the tests, which errs, stops short, reorders, delays and hangs by seed.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::sys::mem::Memory;
use crate::sys::uring::{Done, Read, Ring};

/// Reads files into spans. Owns a read from [`Reader::start`] until it is handed back as [`Done`] (invariant 2).
pub(super) trait Reader {
    /// Reads that may be started before one has to end.
    fn room(&self) -> usize;
    /// Reads in flight.
    fn in_flight(&self) -> usize;
    /// Queues a read; gives it back if there is no room.
    fn start(&mut self, read: Read) -> Result<(), Read>;
    /// Sets the queued reads going. Whether there were any.
    fn submit(&mut self) -> io::Result<bool>;
    /// Waits until a read has ended, the shard was woken, or the time is over; appends what has ended.
    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<()>;
    /// Waits for everything in flight. Gives the bytes that had to be leaked.
    fn drain(&mut self, timeout: Duration) -> u64;
    /// Registers a file for cheaper reads, if that is possible.
    fn register_file(&mut self, _file: &Arc<OwnedFd>) -> Option<u32> {
        None
    }
    /// Takes a file out of the table.
    fn unregister_file(&mut self, _slot: u32) {}
    /// Registers populated memory for cheaper reads, if that is possible.
    fn register_memory(&mut self, _memory: &Arc<Memory>) -> bool {
        false
    }
    /// Takes memory out of the table.
    fn unregister_memory(&mut self, _memory: &Arc<Memory>) {}
}

impl Reader for Ring {
    fn room(&self) -> usize {
        Ring::room(self)
    }
    fn in_flight(&self) -> usize {
        Ring::in_flight(self)
    }
    fn start(&mut self, read: Read) -> Result<(), Read> {
        Ring::start(self, read)
    }
    fn submit(&mut self) -> io::Result<bool> {
        Ring::submit(self)
    }
    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<()> {
        Ring::wait(self, timeout, done)
    }
    fn drain(&mut self, timeout: Duration) -> u64 {
        Ring::drain(self, timeout)
    }
    fn register_file(&mut self, file: &Arc<OwnedFd>) -> Option<u32> {
        Ring::register_file(self, file)
    }
    fn unregister_file(&mut self, slot: u32) {
        Ring::unregister_file(self, slot);
    }
    fn register_memory(&mut self, memory: &Arc<Memory>) -> bool {
        Ring::register_memory(self, memory)
    }
    fn unregister_memory(&mut self, memory: &Arc<Memory>) {
        Ring::unregister_memory(self, memory);
    }
}
