//! The loop of a shard thread.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};

use super::batch::{Assignment, Batch, BatchFile, Landing, Path, Phase};
use super::reader::Reader;
use super::{Options, Stats};
use crate::checksum::{self, CHUNK_BYTES};
use crate::error::{Code, Error};
use crate::plan::{BLOCK_ALIGN, Copy, Move, Target};
use crate::staging;
use crate::sys::copy;
use crate::sys::mem::{SPAN_ALIGN, Span};
use crate::sys::page_cache;
use crate::sys::uring::{Done, Read};

/// Batches that one shard thread works on at a time; further ones wait in the mailbox.
const BATCHES_MAX: usize = 64;
/// Attempts at one read that the kernel puts off (EAGAIN) before it counts as failed.
const ATTEMPTS_MAX: u8 = 64;
/// Bytes that are checksummed and then copied while they are in the CPU's nearest cache.
const COPY_STEP_BYTES: usize = 16 << 10;
/// How long a stopping shard waits for the kernel to let go of its reads.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How a read goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the page cache, without waiting for the drive.
    Cached,
    /// Past the page cache.
    Direct,
    /// Through the page cache, which held all of it before.
    Buffered,
    /// Through the page cache and out of it again.
    BufferedTidy,
}

/// What a read in flight is for; travels in its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Purpose {
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
    options: &'a Options,
    stats: Arc<Stats>,
    active: Vec<Option<Active>>,
    done: Vec<Done>,
    /// Reads that have to go on, but found the queue full: they go first.
    backlog: Vec<Read>,
    turn: usize,
}

impl<'a, R: Reader> Runner<'a, R> {
    pub(super) fn new(mut reader: R, slots: staging::Pool, options: &'a Options, stats: Arc<Stats>) -> Self {
        reader.register_memory(slots.memory());
        Runner {
            reader,
            slots,
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
        for part in assignment.batch.parts.iter().filter(|part| part.populated && part.memory.pages().huge())
        {
            reader.register_memory(&part.memory);
        }
        let files = assignment.batch.files.iter();
        let file_slots = files.map(|file| {
            let direct = file.direct.as_ref();
            [reader.register_file(&file.file), direct.and_then(|file| reader.register_file(file))]
        });
        let file_slots = file_slots.collect();
        let next = assignment.moves.first().map_or(0, |range| range.start);
        self.active[place] = Some(Active { assignment, file_slots, lane: 0, next, in_flight: 0 });
    }

    /// Starts reads while there is room.
    fn begin_reads(&mut self) {
        while self.reader.room() > 0
            && let Some(read) = self.backlog.pop()
        {
            self.hand_over(read);
        }
        while self.reader.room() > 0 {
            let Some(at) = self.choose() else { return };
            if !self.begin_next(at) {
                return;
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
        let way = way(&batch.files[step.file as usize], step, self.options.page_cache);
        let landing = match &step.target {
            Target::Staged(_) => Landing::Slot,
            // The copy from the page cache goes to its place at once.
            Target::Direct { .. } if way != Way::Direct => Landing::InPlace,
            Target::Direct { .. } => batch.files[step.file as usize].landing,
        };
        let span = match (&step.target, landing) {
            (Target::Direct { part, offset }, Landing::InPlace) => {
                let memory = batch.parts.get(*part as usize).map(|part| &part.memory);
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
        let file = &batch.files[step.file as usize];
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

    /// Sets reads going, deals with those that had ended before, and waits for the next that end.
    ///
    /// In this order, so that the drive has new reads while this thread computes checksums: some hypervisors tell of
    /// ended reads only when the queue is empty, and the drive would stand idle.
    /// `may_wait`: whether to wait even if nothing is in flight, as no assignment waits in the mailbox.
    fn turn_over(&mut self, may_wait: impl Fn() -> bool) -> io::Result<()> {
        self.begin_reads();
        let mut clock = Instant::now();
        self.reader.submit()?;
        if self.reader.in_flight() > 0 {
            self.spent_all(Phase::Submit, &mut clock);
        }
        let mut done = std::mem::take(&mut self.done);
        for ended in done.drain(..) {
            self.settle(ended);
        }
        // Slots have come back.
        self.begin_reads();
        self.end_batches();
        self.publish();
        let mut clock = Instant::now();
        let busy = self.reader.in_flight() > 0;
        let more = self.active.iter().flatten().any(|active| active.peek().is_some());
        let waited = if busy || !more && may_wait() { self.reader.wait(None, &mut done) } else { Ok(()) };
        if busy {
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
        let drive = if file.direct.is_some() { Way::Direct } else { Way::BufferedTidy };
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
                batch.progress.fail(mismatch(file, &piece, sum, expected));
            }
            batch.checks[step.first_check as usize + number].store(sum, Ordering::Release);
        }
        self.spent(batch, Phase::Checksum, lap(&mut clock));
        if let Target::Staged(_) = &step.target {
            let mut copies = batch.plan.copies_of(step).iter();
            if copies.any(|copy| copy_rows(batch, copy, span.as_slice()).is_none()) {
                batch.progress.fail(Error::new(Code::Internal, "a staged row has no place in its region"));
            }
            self.spent(batch, Phase::Copy, lap(&mut clock));
        }
        if purpose.way == Way::BufferedTidy {
            page_cache::drop_pages(file.file.as_fd(), step.offset, u64::from(step.expect_bytes));
        }
        let path = match (purpose.way, purpose.landing) {
            (Way::Cached, _) => Path::Cached,
            (Way::Buffered | Way::BufferedTidy, _) => Path::Buffered,
            (Way::Direct, Landing::InPlace) => Path::Direct,
            (Way::Direct, Landing::Slot) => Path::Staged,
        };
        batch.progress.arrived(path, u64::from(step.expect_bytes));
        self.stats.bytes[path as usize].fetch_add(u64::from(step.expect_bytes), Ordering::Relaxed);
        self.release(purpose, span);
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
                for part in &assignment.batch.parts {
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

/// Nanoseconds since `clock`, which is set to now.
fn lap(clock: &mut Instant) -> u64 {
    let now = Instant::now();
    let nanos = now.duration_since(*clock).as_nanos();
    *clock = now;
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

/// From the page cache if it holds all of the bytes, else past it if the file system allows.
fn way(file: &BatchFile, step: &Move, use_cache: bool) -> Way {
    let bytes = u64::from(step.expect_bytes);
    let all = bytes.div_ceil(BLOCK_ALIGN);
    match file.direct {
        Some(_) if !use_cache => Way::Direct,
        Some(_) if page_cache::cached_pages(file.file.as_fd(), step.offset, bytes) < all => Way::Direct,
        Some(_) => Way::Cached,
        None if page_cache::cached_pages(file.file.as_fd(), step.offset, bytes) < all => Way::BufferedTidy,
        None => Way::Buffered,
    }
}

/// The checksum that a piece must have: known only for whole chunks of files that were read before.
fn expected(file: &BatchFile, piece: &std::ops::Range<u64>) -> Option<u64> {
    let whole = piece.start.is_multiple_of(CHUNK_BYTES)
        && (piece.end.is_multiple_of(CHUNK_BYTES) || piece.end == file.bytes);
    let sums = file.expected.as_ref().filter(|_| whole)?;
    sums.get((piece.start / CHUNK_BYTES) as usize).copied()
}

fn mismatch(file: &BatchFile, piece: &std::ops::Range<u64>, sum: u64, expected: u64) -> Error {
    let message = format!(
        "{}: bytes {}..{} have checksum {sum:016x}, but had {expected:016x} when this unchanged file was first read: \
         the drive or the memory is at fault",
        file.name, piece.start, piece.end
    );
    Error::new(Code::CatalogChecksumMismatch, message)
}

/// Copies a chunk to its place in a part and gives its checksum: in steps that stay in the CPU's nearest cache, so that
/// the bytes are fetched once for both.
fn copy_chunk(batch: &Batch, part: u32, offset: u64, bytes: &[u8]) -> Option<u64> {
    let memory = &batch.parts.get(part as usize)?.memory;
    let mut span = memory.claim(offset, bytes.len() as u64)?;
    let mut sum = checksum::Running::new();
    let steps = bytes.chunks(COPY_STEP_BYTES).zip(span.as_mut_slice().chunks_mut(COPY_STEP_BYTES));
    for (from, to) in steps {
        sum.update(from);
        copy::streaming(from, to);
    }
    Some(sum.finish())
}

fn truncated(file: &BatchFile, step: &Move, arrived: u32) -> Error {
    let message = format!(
        "{}: the file ends at {} of {} bytes: it was truncated while it was read",
        file.name,
        step.offset + u64::from(arrived),
        file.bytes
    );
    Error::new(Code::SourceFileShortRead, message)
}

/// Copies the rows that `slot` holds to their place in the region.
fn copy_rows(batch: &Batch, copy: &Copy, slot: &[u8]) -> Option<()> {
    for row in 0..copy.count {
        let start = usize::try_from(u64::from(copy.slot_offset) + row * copy.stride).ok()?;
        let bytes = slot.get(start..start.checked_add(usize::try_from(copy.bytes).ok()?)?)?;
        write(batch, copy.region_offset + row * copy.bytes, bytes)?;
    }
    Some(())
}

/// Writes to a region, across its parts.
fn write(batch: &Batch, mut offset: u64, mut bytes: &[u8]) -> Option<()> {
    for part in &batch.parts {
        if offset >= part.memory.bytes() {
            offset -= part.memory.bytes();
            continue;
        }
        let here = bytes.len().min(usize::try_from(part.memory.bytes() - offset).ok()?);
        let lead = offset % SPAN_ALIGN;
        let mut span = part.memory.claim(offset - lead, lead + here as u64)?;
        span.as_mut_slice()[lead as usize..].copy_from_slice(&bytes[..here]);
        bytes = &bytes[here..];
        if bytes.is_empty() {
            return Some(());
        }
        offset = 0;
    }
    bytes.is_empty().then_some(())
}
