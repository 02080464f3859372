//! The loop of a shard thread.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};

use super::batch::{Assignment, Batch, Landing, Path, Phase, Regions};
use super::reader::Reader;
use super::settle::{Way, copy_chunk, copy_out, expected, lap, mismatch, truncated, way};
use super::uplink::{Uplink, check};
use super::{Options, Stats};
use crate::checksum;
use crate::error::{Code, Error};
use crate::plan::{BLOCK_ALIGN, Target};
use crate::staging;
use crate::sys::mem::Span;
use crate::sys::page_cache;
use crate::sys::uring::{Done, Read};

/// Batches that one shard thread works on at a time; further ones wait in the mailbox.
const BATCHES_MAX: usize = 64;
/// Attempts at one read that the kernel puts off (EAGAIN) before it counts as failed.
const ATTEMPTS_MAX: u8 = 64;
/// How long the thread sleeps between two looks at copies to GPUs, if nothing else can happen. A slot of 1 MiB takes 20
/// to 40 µs on the links of today: with eight of them the device hardly runs dry meanwhile.
const LANDING_LOOK: Duration = Duration::from_micros(100);
/// How long a stopping shard waits for the kernel to let go of its reads.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// What a read in flight is for; travels in its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Purpose {
    active: u16,
    index: u32,
    way: Way,
    landing: Landing,
    attempts: u8,
}

impl Purpose {
    fn pack(self) -> u64 {
        u64::from(self.index)
            | u64::from(self.active) << 32
            | u64::from(self.attempts) << 48
            | (self.way as u64) << 56
            | (self.landing as u64) << 60
    }

    fn unpack(tag: u64) -> Purpose {
        let way = match tag >> 56 & 0xf {
            0 => Way::Cached,
            1 => Way::Direct,
            2 => Way::Buffered,
            _ => Way::BufferedTidy,
        };
        let landing = if tag >> 60 == 0 { Landing::InPlace } else { Landing::Slot };
        Purpose { active: (tag >> 32) as u16, index: tag as u32, way, landing, attempts: (tag >> 48) as u8 }
    }
}

/// An assignment that the thread works on.
struct Active {
    assignment: Assignment,
    /// Registered slots of each file: through the page cache, and past it.
    file_slots: Vec<[Option<u32>; 2]>,
    lane: usize,
    next: u32,
    in_flight: u32,
}

impl Active {
    /// The next move, if one is left and the batch was not stopped.
    fn peek(&self) -> Option<u32> {
        let open = self.lane < self.assignment.moves.len() && !self.assignment.batch.progress.stopped();
        open.then_some(self.next)
    }

    fn advance(&mut self) {
        self.next += 1;
        if self.next >= self.assignment.moves[self.lane].end {
            self.lane += 1;
            self.next = self.assignment.moves.get(self.lane).map_or(0, |range| range.start);
        }
    }

    fn waiting(&self) -> u64 {
        let lanes = self.assignment.moves.get(self.lane..).unwrap_or_default();
        let all: u64 = lanes.iter().map(|range| u64::from(range.end - range.start)).sum();
        all - lanes.first().map_or(0, |range| u64::from(self.next - range.start))
    }
}

/// The state of a shard thread.
pub(super) struct Runner<'a, R> {
    reader: R,
    slots: staging::Pool,
    uplink: Option<Uplink<Purpose>>,
    options: &'a Options,
    stats: Arc<Stats>,
    active: Vec<Option<Active>>,
    done: Vec<Done>,
    /// Reads that have to go on, but found the queue full: they go first.
    backlog: Vec<Read>,
    turn: usize,
}

impl<'a, R: Reader> Runner<'a, R> {
    pub(super) fn new(
        mut reader: R,
        slots: staging::Pool,
        uplink: Option<Uplink<Purpose>>,
        options: &'a Options,
        stats: Arc<Stats>,
    ) -> Self {
        reader.register_memory(slots.memory());
        Runner {
            reader,
            slots,
            uplink,
            options,
            stats,
            active: (0..BATCHES_MAX).map(|_| None).collect(),
            done: Vec::with_capacity(options.depth as usize),
            backlog: Vec::with_capacity(options.depth as usize),
            turn: 0,
        }
    }

    /// Runs until the mailbox is closed and everything has ended.
    pub(super) fn run(mut self, letters: &Receiver<Assignment>) {
        let mut open = true;
        loop {
            while open && self.active.iter().any(Option::is_none) {
                match letters.try_recv() {
                    Ok(assignment) => self.accept(assignment),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => open = false,
                }
            }
            // Assignments wait in the mailbox until a place is free; their wake-up may be spent.
            let may_wait = || open && letters.is_empty();
            if let Err(error) = self.turn_over(may_wait) {
                self.fail_all(&error, letters);
                break;
            }
            if !open && self.active.iter().all(Option::is_none) {
                break;
            }
        }
        let leaked = self.reader.drain(DRAIN_TIMEOUT);
        self.stats.leaked.fetch_add(leaked, Ordering::Relaxed);
        self.backlog.clear();
        self.done.clear();
        self.end_batches();
    }

    fn accept(&mut self, assignment: Assignment) {
        let reader = &mut self.reader;
        let Some(place) = self.active.iter().position(Option::is_none) else { return };
        for part in assignment
            .batch
            .regions
            .parts()
            .iter()
            .filter(|part| part.populated && part.memory.pages().huge())
        {
            reader.register_memory(&part.memory);
        }
        let files = assignment.batch.handles.iter();
        let file_slots = files.map(|file| {
            let direct = file.direct.as_ref();
            [reader.register_file(&file.file), direct.and_then(|file| reader.register_file(file))]
        });
        let file_slots = file_slots.collect();
        let next = assignment.moves.first().map_or(0, |range| range.start);
        self.active[place] = Some(Active { assignment, file_slots, lane: 0, next, in_flight: 0 });
    }

    /// Sets reads going while there is room, each at once: the drive begins with the first while the second is made
    /// ready. The kernel holds a batch back until it has all of it.
    fn begin_reads(&mut self) -> io::Result<()> {
        while self.reader.room() > 0
            && let Some(read) = self.backlog.pop()
        {
            self.hand_over(read);
        }
        loop {
            let mut clock = Instant::now();
            if self.reader.submit()? {
                self.spent_all(Phase::Submit, &mut clock);
            }
            if self.reader.room() == 0 {
                return Ok(());
            }
            let Some(at) = self.choose() else { return Ok(()) };
            if !self.begin_next(at) {
                return Ok(());
            }
        }
    }

    /// The batch whose turn it is: the highest priority first, equal ones one after the other.
    fn choose(&mut self) -> Option<usize> {
        let count = self.active.len();
        let mut best: Option<(usize, i32)> = None;
        for at in (0..count).map(|step| (self.turn + step) % count) {
            let Some(active) = &self.active[at] else { continue };
            let priority = active.assignment.priority;
            if active.peek().is_some() && best.is_none_or(|(_, highest)| priority > highest) {
                best = Some((at, priority));
            }
        }
        let (at, _) = best?;
        self.turn = at + 1;
        Some(at)
    }

    /// Starts the next read of a batch. `false`: nothing more can be started now.
    fn begin_next(&mut self, at: usize) -> bool {
        let Some(active) = &mut self.active[at] else { return true };
        let index = active.next;
        let batch = &active.assignment.batch;
        let step = &batch.plan.moves[index as usize];
        let way = way(&batch.handles[step.file as usize], step, self.options.page_cache);
        let landing = match &step.target {
            Target::Staged(_) => Landing::Slot,
            // The copy from the page cache goes to its place at once.
            Target::Direct { .. } if way != Way::Direct => Landing::InPlace,
            Target::Direct { .. } => batch.handles[step.file as usize].landing,
        };
        let span = match (&step.target, landing) {
            (Target::Direct { part, offset }, Landing::InPlace) => {
                let memory = batch.regions.parts().get(*part as usize).map(|part| &part.memory);
                let Some(span) = memory.and_then(|memory| memory.claim(*offset, u64::from(step.read_bytes)))
                else {
                    batch.progress.fail(Error::new(Code::Internal, "a read has no place in its region"));
                    return true;
                };
                span
            }
            _ => match self.slots.take() {
                Some(slot) => slot,
                None => return false,
            },
        };
        active.advance();
        active.in_flight += 1;
        self.start(Purpose { active: at as u16, index, way, landing, attempts: 0 }, span, 0);
        true
    }

    /// Hands a read to the reader.
    fn start(&mut self, purpose: Purpose, span: Span, arrived: u32) {
        let Some(active) = &self.active[usize::from(purpose.active)] else { return };
        let batch = &active.assignment.batch;
        let step = &batch.plan.moves[purpose.index as usize];
        let file = &batch.handles[step.file as usize];
        let [buffered_slot, direct_slot] = active.file_slots[step.file as usize];
        let (handle, file_slot, bytes) = match (purpose.way, &file.direct) {
            (Way::Direct, Some(direct)) => (direct, direct_slot, step.read_bytes),
            _ => (&file.file, buffered_slot, step.expect_bytes),
        };
        let read = Read {
            file: Arc::clone(handle),
            file_slot,
            offset: step.offset,
            span,
            bytes,
            arrived,
            cached_only: purpose.way == Way::Cached,
            tag: purpose.pack(),
        };
        self.hand_over(read);
    }

    fn hand_over(&mut self, read: Read) {
        if let Err(read) = self.reader.start(read) {
            self.backlog.push(read);
        }
    }

    /// Deals with the reads that have ended, sets new ones going, and waits for the next that end.
    ///
    /// A slot that was emptied is read into again before the next one is emptied: some hypervisors tell of ended reads
    /// only when all have ended, and the drive would stand idle meanwhile.
    /// `may_wait`: whether to wait even if nothing is in flight, as no assignment waits in the mailbox.
    fn turn_over(&mut self, may_wait: impl Fn() -> bool) -> io::Result<()> {
        let mut done = std::mem::take(&mut self.done);
        for ended in done.drain(..) {
            self.settle(ended);
            self.begin_reads()?;
        }
        self.land();
        self.begin_reads()?;
        self.end_batches();
        self.publish();
        let mut clock = Instant::now();
        let busy = self.reader.in_flight() > 0;
        let more = self.active.iter().flatten().any(|active| active.peek().is_some());
        // Nobody tells of copies that have ended: they are looked at whenever a read ends, and if only they can set
        // anything going, again and again.
        let sending = self.uplink.as_ref().map_or(0, Uplink::sending) > 0;
        let by_copies = sending && (!busy || self.slots.used() == self.slots.slots());
        let timeout = by_copies.then_some(LANDING_LOOK);
        let waits = busy || sending || !more && may_wait();
        let waited = if waits { self.reader.wait(timeout, &mut done) } else { Ok(()) };
        if by_copies {
            self.spent_all(Phase::Copy, &mut clock);
        } else if busy {
            self.spent_all(Phase::Wait, &mut clock);
        }
        self.done = done;
        waited
    }

    fn publish(&self) {
        let waiting = self.active.iter().flatten().map(Active::waiting).sum();
        self.stats.waiting.store(waiting, Ordering::Relaxed);
        self.stats.in_flight.store(self.reader.in_flight() as u32, Ordering::Relaxed);
        self.stats.slots_used.store(self.slots.used() as u32, Ordering::Relaxed);
    }

    fn spent_all(&self, phase: Phase, clock: &mut Instant) {
        let nanos = lap(clock);
        self.stats.nanos[phase as usize].fetch_add(nanos, Ordering::Relaxed);
        for active in self.active.iter().flatten() {
            active.assignment.batch.progress.spent(phase, nanos);
        }
    }

    /// Deals with a read that has ended: the only place for short reads, tails and EAGAIN (invariant 5).
    fn settle(&mut self, done: Done) {
        let Done { read, result } = done;
        let purpose = Purpose::unpack(read.tag);
        let Some(active) = &self.active[usize::from(purpose.active)] else { return };
        let batch = Arc::clone(&active.assignment.batch);
        let step = &batch.plan.moves[purpose.index as usize];
        let file = &batch.files[step.file as usize];
        let again = |way, attempts| Purpose { way, attempts, ..purpose };
        let drive =
            if batch.handles[step.file as usize].direct.is_some() { Way::Direct } else { Way::BufferedTidy };
        match result {
            Ok(bytes) => {
                let arrived = read.arrived + bytes;
                let whole = arrived >= step.expect_bytes;
                let aligned = u64::from(arrived).is_multiple_of(BLOCK_ALIGN);
                if whole {
                    return self.complete(&batch, purpose, read.span);
                }
                if purpose.way == Way::Cached {
                    // Some pages have left the cache since we looked.
                    return self.start(again(drive, purpose.attempts), read.span, 0);
                }
                // Past the page cache a read ends off a block only at the end of the file.
                if bytes == 0 || purpose.way == Way::Direct && !aligned {
                    batch.progress.fail(truncated(file, step, arrived));
                } else if !batch.progress.stopped() {
                    return self.start(purpose, read.span, arrived);
                }
            }
            Err(_) if purpose.way == Way::Cached => {
                return self.start(again(drive, purpose.attempts), read.span, 0);
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && purpose.way == Way::Direct => {
                // The file system took O_DIRECT at open and refuses it now, as for inline or encrypted data.
                return self.start(again(Way::BufferedTidy, purpose.attempts), read.span, 0);
            }
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
                    && purpose.attempts < ATTEMPTS_MAX
                    && !batch.progress.stopped() =>
            {
                return self.start(again(purpose.way, purpose.attempts + 1), read.span, read.arrived);
            }
            Err(error) => batch.progress.fail(Error::new(
                Code::SourceFileIo,
                format!(
                    "{}: reading {} bytes at {} failed: {error}",
                    file.name, step.expect_bytes, step.offset
                ),
            )),
        }
        self.release(purpose, read.span);
    }

    /// All bytes of a read are there: checksum, copy if staged, count.
    fn complete(&mut self, batch: &Batch, purpose: Purpose, span: Span) {
        let step = &batch.plan.moves[purpose.index as usize];
        let file = &batch.files[step.file as usize];
        if let Regions::Devices(_) = &batch.regions {
            return self.send(batch, purpose, span);
        }
        let mut clock = Instant::now();
        let in_place = match (&step.target, purpose.landing) {
            (Target::Direct { part, offset }, Landing::Slot) => Some((*part, *offset)),
            _ => None,
        };
        for (number, piece) in step.pieces().enumerate() {
            let range = (piece.start - step.offset) as usize..(piece.end - step.offset) as usize;
            let bytes = &span.as_slice()[range.clone()];
            let sum = match in_place {
                None => Some(checksum::chunk(bytes)),
                Some((part, offset)) => copy_chunk(batch, part, offset + range.start as u64, bytes),
            };
            let Some(sum) = sum else {
                batch.progress.fail(Error::new(Code::Internal, "a read has no place in its region"));
                break;
            };
            if let Some(expected) = expected(file, &piece).filter(|expected| *expected != sum) {
                batch.progress.fail(mismatch(&file.name, &piece, sum, expected));
            }
            batch.checks[step.first_check as usize + number].store(sum, Ordering::Release);
        }
        self.spent(batch, Phase::Checksum, lap(&mut clock));
        if let Target::Staged(_) = &step.target {
            if copy_out(batch, step, span.as_slice()).is_none() {
                batch.progress.fail(Error::new(Code::Internal, "a staged row has no place in its region"));
            }
            self.spent(batch, Phase::Copy, lap(&mut clock));
        }
        tidy(batch, purpose);
        self.release(purpose, span);
        self.arrived(batch, purpose);
    }

    /// All bytes of a read are there, and go on to GPUs: their checksums are computed while the devices copy.
    fn send(&mut self, batch: &Batch, purpose: Purpose, span: Span) {
        let step = &batch.plan.moves[purpose.index as usize];
        let (Some(uplink), Regions::Devices(regions)) = (&mut self.uplink, &batch.regions) else {
            batch.progress.fail(Error::new(Code::Internal, "this shard thread has no way to GPUs"));
            return self.release(purpose, span);
        };
        let mut clock = Instant::now();
        let sent = uplink.send(purpose, batch, regions, step, span, |slot| check(batch, step, slot));
        self.spent(batch, Phase::Checksum, lap(&mut clock));
        tidy(batch, purpose);
        if let Err((purpose, span, error)) = sent {
            batch.progress.fail(error);
            self.release(purpose, span);
        }
    }

    /// Deals with copies to GPUs that have ended.
    fn land(&mut self) {
        while let Some((purpose, span, result)) = self.uplink.as_mut().and_then(Uplink::landed) {
            if let Some(active) = &self.active[usize::from(purpose.active)] {
                let batch = Arc::clone(&active.assignment.batch);
                match result {
                    Ok(()) => self.arrived(&batch, purpose),
                    Err(error) => batch.progress.fail(error),
                }
            }
            self.release(purpose, span);
        }
    }

    /// Counts a read whose bytes are where they belong.
    fn arrived(&self, batch: &Batch, purpose: Purpose) {
        let step = &batch.plan.moves[purpose.index as usize];
        let path = match (purpose.way, purpose.landing) {
            (Way::Cached, _) => Path::Cached,
            (Way::Buffered | Way::BufferedTidy, _) => Path::Buffered,
            (Way::Direct, Landing::InPlace) => Path::Direct,
            (Way::Direct, Landing::Slot) => Path::Staged,
        };
        batch.landed(step, path);
        self.stats.bytes[path as usize].fetch_add(u64::from(step.expect_bytes), Ordering::Relaxed);
    }

    fn spent(&self, batch: &Batch, phase: Phase, nanos: u64) {
        self.stats.nanos[phase as usize].fetch_add(nanos, Ordering::Relaxed);
        batch.progress.spent(phase, nanos);
    }

    /// A read is over: its slot goes back, or its claim on the region ends.
    fn release(&mut self, purpose: Purpose, span: Span) {
        match purpose.landing {
            Landing::Slot => self.slots.give(span),
            Landing::InPlace => drop(span),
        }
        if let Some(active) = &mut self.active[usize::from(purpose.active)] {
            active.in_flight -= 1;
        }
    }

    /// Moves batches home of which nothing is left to do and nothing is in flight.
    fn end_batches(&mut self) {
        for place in &mut self.active {
            if place.as_ref().is_some_and(|active| active.in_flight == 0 && active.peek().is_none()) {
                let Some(Active { assignment, file_slots, .. }) = place.take() else { continue };
                for slot in file_slots.into_iter().flatten().flatten() {
                    self.reader.unregister_file(slot);
                }
                for part in assignment.batch.regions.parts() {
                    self.reader.unregister_memory(&part.memory);
                }
                // An owner that has gone away has no use for it.
                let _ = assignment.home.try_send(assignment.batch);
            }
        }
    }

    /// The ring itself is broken: nothing can be read any more.
    fn fail_all(&mut self, error: &io::Error, letters: &Receiver<Assignment>) {
        tracing::error!(shard = self.options.index, %error, "shard thread broken");
        let message = format!("shard thread {} is broken: {error}", self.options.index);
        let broken = Error::new(Code::SourceFileIo, message);
        if let Some(uplink) = &mut self.uplink {
            uplink.wait_all();
        }
        for active in self.active.iter_mut().flatten() {
            active.assignment.batch.progress.fail(broken.clone());
            active.in_flight = 0;
        }
        for assignment in letters.try_iter() {
            assignment.batch.progress.fail(broken.clone());
            let _ = assignment.home.try_send(assignment.batch);
        }
    }
}

/// Takes what a read has put into the page cache out of it again.
fn tidy(batch: &Batch, purpose: Purpose) {
    if purpose.way == Way::BufferedTidy {
        let step = &batch.plan.moves[purpose.index as usize];
        let file = batch.handles[step.file as usize].file.as_fd();
        page_cache::drop_pages(file, step.offset, u64::from(step.expect_bytes));
    }
}
