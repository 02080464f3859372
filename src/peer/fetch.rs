//! Brings the chunks of an artifact from peers: one thread for each connection, all of them on the same list of moves.
//!
//! A thread asks its peer for as many moves ahead as the window allows (its credits), receives them in order, each into
//! its place or into a slot, and compares every chunk with the manifest before it counts (invariant 6). Whoever is
//! faster takes more. A peer that fails, lags or gives wrong bytes is left, with what was asked of it put back, and the
//! thread goes to the next; one that has nothing left to ask for takes over what a slower one has asked for and not
//! received. What nobody gives is left to the caller.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::client::{Dialer, Handle, Session};
use super::protocol::{Rank, Refusal};
use super::{Error, Result};
use crate::catalog::manifest::Manifest;
use crate::checksum::{self, CHUNK_BYTES};
use crate::error::{self, Code};
use crate::plan::{Move, Target};
use crate::shard::{Batch, Path, Phase, copy_out};
use crate::sys::mem::{HUGE_PAGE_BYTES, Memory, Span};
use crate::sys::pages::PageKind;

/// How often a thread that waits looks whether its job was stopped.
const LOOK: Duration = Duration::from_millis(50);
/// A stream is slow if nothing has come of what it has asked for so long: others take it over.
const SLOW: Duration = Duration::from_millis(500);
/// Answers "not yet" in a row after which a peer is left.
const NOT_YET_MAX: u32 = 20;
/// A move that does not fit its region: the plan is wrong.
const NO_PLACE: Error = Error::Misused("a chunk has no place in its region");

/// Peers that have an artifact, the best first.
#[derive(Debug, Default)]
pub struct Chosen {
    /// Where each listens, and the session in which it was asked what it has.
    pub peers: Vec<(String, Session)>,
    /// How many of them are asked at a time; the others stand by.
    pub active: usize,
    /// The first is still loading itself: this node comes behind it in a chain.
    pub chained: bool,
}

/// What came of one peer.
#[derive(Debug, Clone)]
pub struct Share {
    /// Where it listens.
    pub address: String,
    /// The name that it has given itself.
    pub node: String,
    /// Bytes that it gave, all of them right.
    pub bytes: u64,
    /// Connections to it.
    pub streams: u32,
    /// Why it was left, if it was.
    pub left: Option<error::Error>,
}

/// One artifact's way from peers; cheap to clone.
#[derive(Debug, Clone)]
pub struct Fetch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    manifest: Arc<Manifest>,
    rank: Rank,
    dialer: Arc<Dialer>,
    /// Streams at a time, to all active peers together.
    streams: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Moves that nobody has been asked for, in order.
    queue: VecDeque<u32>,
    streams: Vec<Asked>,
    /// Moves that are being received.
    receiving: usize,
    shares: Vec<Share>,
    /// Those to ask, the best first: places in `shares`.
    order: Vec<usize>,
    active: usize,
    chained: bool,
    /// Sessions in which active peers were asked what they have, each for the first stream that comes to its peer.
    sessions: Vec<(usize, Session)>,
    /// Grows when others are to be asked from now on.
    turn: u32,
    why: Option<error::Error>,
}

/// What a stream has asked for.
#[derive(Debug)]
struct Asked {
    /// And not begun to receive.
    moves: VecDeque<u32>,
    /// When something last came, or was asked for after nothing had been.
    heard: Instant,
}

impl Asked {
    /// Whether others may take over the last of it. What is next is as good as under way.
    fn slow(&self) -> bool {
        self.moves.len() > 1 && self.heard.elapsed() > SLOW
    }
}

/// A connection to a peer.
struct Stream {
    fetch: Fetch,
    batch: Arc<Batch>,
    session: Session,
    handle: Handle,
    window: usize,
    peer: usize,
    number: usize,
    /// It asks for nothing more in another.
    turn: u32,
    /// For what does not land in place, or was taken over.
    slot: Span,
    /// What was asked for, in order, also what was taken over since.
    pipeline: VecDeque<u32>,
    not_yet: u32,
}

impl Fetch {
    /// From these peers.
    pub fn new(
        manifest: Arc<Manifest>,
        rank: Rank,
        dialer: Arc<Dialer>,
        streams: usize,
        chosen: Chosen,
    ) -> Fetch {
        let streams = chosen.active.max(1) * streams;
        let fetch = Fetch(Arc::new(Shared {
            manifest,
            rank,
            dialer,
            streams,
            state: Mutex::default(),
            changed: Condvar::new(),
        }));
        fetch.ask_others(chosen);
        fetch
    }

    /// Asks these peers from now on. Streams to others end with what they have asked for.
    pub fn ask_others(&self, chosen: Chosen) {
        let mut state = self.state();
        state.order.clear();
        state.sessions.clear();
        for (address, session) in chosen.peers {
            let known = state.shares.iter().position(|share| share.address == address);
            let place = known.unwrap_or_else(|| {
                let node = session.node().to_owned();
                state.shares.push(Share { address, node, bytes: 0, streams: 0, left: None });
                state.shares.len() - 1
            });
            // One that stands by would have been closed by the time it is used.
            if state.order.len() < chosen.active {
                state.sessions.push((place, session));
            }
            state.order.push(place);
        }
        state.active = chosen.active.max(1);
        state.chained = chosen.chained;
        state.turn += 1;
    }

    /// Whether it comes behind one that is still loading, or has nothing left to ask for.
    pub fn settled(&self) -> bool {
        let state = self.state();
        state.chained || state.queue.is_empty() && !state.streams.is_empty()
    }

    /// Begins to bring all moves of a batch for the host tier, which is moved to `home` by each thread that has ended.
    pub fn begin(&self, batch: &Arc<Batch>, home: &mpsc::Sender<Arc<Batch>>) {
        let streams = self.0.streams;
        let mut state = self.state();
        state.queue = (0..batch.plan.moves.len() as u32).collect();
        let nothing = || Asked { moves: VecDeque::new(), heard: Instant::now() };
        state.streams = (0..streams).map(|_| nothing()).collect();
        drop(state);
        for number in 0..streams {
            let (fetch, batch, home) = (self.clone(), Arc::clone(batch), home.clone());
            let body = move || {
                fetch.run(&batch, number);
                // An owner that has gone away has no use for it.
                let _ = home.try_send(batch);
            };
            if let Err(error) = std::thread::Builder::new().name(format!("peer-{number}")).spawn(body) {
                let message = format!("a thread for a peer cannot start: {error}");
                self.state().why = Some(error::Error::new(Code::Internal, message));
            }
        }
    }

    /// The numbers of the moves that nobody gave, in order.
    pub fn left(&self) -> Vec<u32> {
        let mut left: Vec<u32> = self.state().queue.iter().copied().collect();
        left.sort_unstable();
        left
    }

    /// Why moves are left.
    pub fn why(&self) -> error::Error {
        self.state().why.clone().unwrap_or_else(super::nobody)
    }

    /// What each peer gave.
    pub fn shares(&self) -> Vec<Share> {
        self.state().shares.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment: a panic while it was locked cannot have left it half-made.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One stream: from its first peer, and from the next whenever it leaves one, until everything is there or all were
    /// left.
    fn run(&self, batch: &Arc<Batch>, number: usize) {
        while let Some((peer, turn)) = self.next(number) {
            let ended = self.stream(batch, peer, number, turn);
            self.put_back(number);
            match ended {
                Ok(()) if turn == self.state().turn || batch.progress.stopped() => return,
                Ok(()) => {}
                Err(error) => self.leave(peer, error.into()),
            }
        }
    }

    /// The peer that a stream is to ask, and in which turn.
    fn next(&self, number: usize) -> Option<(usize, u32)> {
        let state = self.state();
        let all = state.order.len();
        let mut peers = (0..all).map(|step| state.order[(number % state.active + step) % all]);
        Some((peers.find(|peer| state.shares[*peer].left.is_none())?, state.turn))
    }

    fn stream(&self, batch: &Arc<Batch>, peer: usize, number: usize, turn: u32) -> Result<()> {
        let (known, address) = {
            let mut state = self.state();
            let known = state.sessions.iter().position(|(place, _)| *place == peer);
            let known = known.map(|place| state.sessions.swap_remove(place).1);
            (known, state.shares[peer].address.clone())
        };
        let mut session = known.map_or_else(|| self.0.dialer.connect(&address), Ok)?;
        let handle = session.open(&self.0.manifest, self.0.rank)?;
        let slot = slot(batch).map_err(Error::Memory)?;
        self.state().shares[peer].streams += 1;
        let mut stream = Stream {
            window: session.window(),
            fetch: self.clone(),
            batch: Arc::clone(batch),
            session,
            handle,
            peer,
            number,
            turn,
            slot,
            pipeline: VecDeque::new(),
            not_yet: 0,
        };
        stream.run()
    }

    /// What a stream has asked for and not received can be asked for again.
    fn put_back(&self, number: usize) {
        let mut state = self.state();
        let asked = std::mem::take(&mut state.streams[number].moves);
        for step in asked.into_iter().rev() {
            state.queue.push_front(step);
        }
        drop(state);
        self.0.changed.notify_all();
    }

    fn leave(&self, peer: usize, error: error::Error) {
        let mut state = self.state();
        let share = &mut state.shares[peer];
        if share.left.is_none() {
            let (address, node, bytes) = (&share.address, &share.node, share.bytes);
            tracing::warn!(address, node, code = %error.code, %error, bytes, "a peer is left");
            share.left = Some(error.clone());
        }
        state.why = Some(error);
    }
}

/// Memory that a move fits into, with the rest of the chunks at both of its ends.
fn slot(batch: &Batch) -> std::io::Result<Span> {
    let longest = batch.plan.moves.iter().map(|step| u64::from(step.read_bytes)).max().unwrap_or(0);
    let bytes = (longest + 2 * CHUNK_BYTES).next_multiple_of(HUGE_PAGE_BYTES);
    let memory = Arc::new(Memory::new(bytes, PageKind::Small)?);
    memory.claim(0, bytes).ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
}

/// The chunks that a move touches.
fn chunks(step: &Move) -> Range<u64> {
    let end = step.offset + u64::from(step.expect_bytes);
    step.offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES)
}

impl Stream {
    fn run(&mut self) -> Result<()> {
        loop {
            if self.batch.progress.stopped() {
                return Ok(());
            }
            while self.pipeline.len() < self.window
                && let Some(number) = self.take()
            {
                self.pipeline.push_back(number);
                self.ask(number)?;
            }
            match self.pipeline.pop_front() {
                Some(number) => self.receive(number)?,
                None if self.wait() => {}
                None => return Ok(()),
            }
        }
    }

    /// The next move to ask for; from the end of what a slower stream has asked for, if there is none.
    fn take(&mut self) -> Option<u32> {
        let mut state = self.fetch.state();
        if state.turn != self.turn {
            return None;
        }
        let next = match state.queue.pop_front() {
            Some(next) => next,
            None if self.pipeline.is_empty() => {
                let slow = state.streams.iter_mut().filter(|asked| asked.slow());
                slow.max_by_key(|asked| asked.moves.len())?.moves.pop_back()?
            }
            None => return None,
        };
        let own = &mut state.streams[self.number];
        if own.moves.is_empty() {
            own.heard = Instant::now();
        }
        own.moves.push_back(next);
        Some(next)
    }

    fn ask(&mut self, number: u32) -> Result<()> {
        let step = &self.batch.plan.moves[number as usize];
        let chunks = chunks(step);
        self.session.request(self.handle, step.file, chunks.start as u32, (chunks.end - chunks.start) as u16)
    }

    /// Waits until there may be something to ask for. `false`: everything is there.
    fn wait(&self) -> bool {
        let state = self.fetch.state();
        let open = |state: &State| {
            !state.queue.is_empty()
                || state.receiving > 0
                || state.streams.iter().any(|asked| !asked.moves.is_empty())
        };
        if !open(&state) || state.turn != self.turn {
            return false;
        }
        let waited = self.fetch.0.changed.wait_timeout(state, LOOK);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        true
    }

    /// Receives what was asked for first.
    fn receive(&mut self, number: u32) -> Result<()> {
        let mine = {
            let mut state = self.fetch.state();
            let mine = state.streams[self.number].moves.front() == Some(&number);
            if mine {
                state.streams[self.number].moves.pop_front();
                state.receiving += 1;
            }
            mine
        };
        let received = self.bring(number, mine);
        let not_yet = matches!(received, Err(Error::Refused(Refusal::NotYet)));
        if mine {
            let mut state = self.fetch.state();
            state.receiving -= 1;
            state.streams[self.number].heard = Instant::now();
            match &received {
                Ok(bytes) => state.shares[self.peer].bytes += bytes,
                Err(_) => state.queue.push_front(number),
            }
            drop(state);
            self.fetch.0.changed.notify_all();
        }
        match received {
            Ok(_) => self.not_yet = 0,
            Err(error) => {
                self.not_yet += 1;
                if !not_yet || self.not_yet > NOT_YET_MAX {
                    return Err(error);
                }
                self.wait();
            }
        }
        Ok(())
    }

    /// Receives a move: into its place if it is still this stream's to bring; else it is thrown away. → bytes of it.
    fn bring(&mut self, number: u32, mine: bool) -> Result<u64> {
        let batch = Arc::clone(&self.batch);
        let step = &batch.plan.moves[number as usize];
        let own = step.offset..step.offset + u64::from(step.expect_bytes);
        let chunks = chunks(step);
        let first = chunks.start * CHUNK_BYTES;
        let bytes = (chunks.end * CHUNK_BYTES).min(batch.files[step.file as usize].bytes) - first;
        let whole = (first..first + bytes) == own;
        let mut clock = Instant::now();
        match &step.target {
            Target::Direct { part, offset } if mine && whole => {
                let mut span = claim(&batch, *part, *offset, bytes).ok_or(NO_PLACE)?;
                receive(&mut self.session, &chunks, span.as_mut_slice())?;
                batch.progress.spent(Phase::Wait, lap(&mut clock));
                keep_sums(&batch, step, first, span.as_slice());
                // Before the chunk may be given on.
                drop(span);
            }
            target => {
                let slot = self.slot.as_mut_slice().get_mut(..bytes as usize).ok_or(NO_PLACE)?;
                receive(&mut self.session, &chunks, slot)?;
                batch.progress.spent(Phase::Wait, lap(&mut clock));
                if !mine {
                    return Ok(0);
                }
                keep_sums(&batch, step, first, slot);
                let own = &slot[(own.start - first) as usize..(own.end - first) as usize];
                match target {
                    Target::Direct { part, offset } => {
                        let mut span = claim(&batch, *part, *offset, own.len() as u64).ok_or(NO_PLACE)?;
                        span.as_mut_slice().copy_from_slice(own);
                    }
                    Target::Staged(_) => copy_out(&batch, step, own).ok_or(NO_PLACE)?,
                }
                batch.progress.spent(Phase::Copy, lap(&mut clock));
            }
        }
        batch.landed(step, Path::Tcp);
        Ok(u64::from(step.expect_bytes))
    }
}

/// Receives chunks one behind the other. The session compares each with the manifest.
fn receive(session: &mut Session, chunks: &Range<u64>, target: &mut [u8]) -> Result<()> {
    let mut targets = target.chunks_mut(CHUNK_BYTES as usize);
    chunks.clone().try_for_each(|_| session.receive(targets.next().ok_or(NO_PLACE)?).map(drop))
}

fn claim(batch: &Batch, part: u32, offset: u64, bytes: u64) -> Option<Span> {
    batch.regions.parts().get(part as usize)?.memory.claim(offset, bytes)
}

/// Keeps the checksums of the pieces of a move: of whole chunks those of the manifest, with which they were compared.
/// `first`: where in the file `bytes` begin, on a chunk boundary.
fn keep_sums(batch: &Batch, step: &Move, first: u64, bytes: &[u8]) {
    let file = &batch.files[step.file as usize];
    let expected = file.expected.as_deref().unwrap_or_default();
    let sums = batch.checks.get(step.first_check as usize..).unwrap_or_default();
    for (piece, sum) in step.pieces().zip(sums) {
        let whole = piece.start.is_multiple_of(CHUNK_BYTES)
            && (piece.end.is_multiple_of(CHUNK_BYTES) || piece.end == file.bytes);
        let known = expected.get((piece.start / CHUNK_BYTES) as usize).copied().filter(|_| whole);
        let own = || checksum::chunk(&bytes[(piece.start - first) as usize..(piece.end - first) as usize]);
        sum.store(known.unwrap_or_else(own), Ordering::Release);
    }
}

/// Nanoseconds since `clock`, which is set to now.
fn lap(clock: &mut Instant) -> u64 {
    let now = Instant::now();
    let nanos = now.duration_since(*clock).as_nanos();
    *clock = now;
    u64::try_from(nanos).unwrap_or(u64::MAX)
}
