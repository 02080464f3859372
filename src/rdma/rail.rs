//! A rail: several queue pairs between two nodes, by one NIC of each.
//!
//! The receiver READs; the source only answers, without a thread. A NIC lets one queue pair have a few READs under way, often 16,
//! so a rail has several pairs. Its credits are the transfers that its pairs have room for: who has none posts nothing.
//!
//! Upholds invariant 2 by way of `sys::verbs`: a span that a rail has is in flight, and comes back by [`Rail::poll`] whatever
//! happens. A rail that has failed gives all its spans back as not done, and stays failed: one makes a new one, after a pause.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::sys::mem::Span;
use crate::sys::verbs::{
    Channel, Done, Endpoint, Kind, ProtectionDomain, QueuePair, Registered, Remote, Role, Route, Transfer,
    VerbsError, Window, WorkError,
};

/// Queue pairs of one rail at most.
pub const PAIRS_MAX: u32 = 16;

/// Size of a rail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Queue pairs, from 1 to [`PAIRS_MAX`]; both sides have the same number.
    pub pairs: u32,
    /// Transfers in flight by one of them.
    pub depth: u32,
}

/// What the receiver may read: one range, by one key for all queue pairs or by one for each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// One, or one for each queue pair, in their order.
    pub remotes: Vec<Remote>,
}

/// One piece to be read.
#[derive(Debug)]
pub struct Fetch {
    /// Where it begins in the source.
    pub offset: u64,
    /// Where it goes; its length is that of the piece, [`crate::sys::verbs::WORK_BYTES_MAX`] at most.
    pub span: Span,
    /// For the owner.
    pub tag: u64,
}

/// Memory that the peer of a rail may read, until this is dropped or taken back by [`Rail::revoke`].
#[derive(Debug)]
pub struct Published {
    /// What the peer has to know. Travels inside the authenticated session only.
    pub source: Source,
    windows: Vec<Window>,
    _memory: Arc<Registered>,
}

/// How a rail is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Made, not connected.
    New,
    /// Connected; no fault so far.
    Up,
    /// A work request has failed, or the device: nothing more is posted.
    Failed(Fault),
}

/// Why a rail has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A work request, the first that failed by itself.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// A call.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
}

/// What a rail has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that have arrived.
    pub read_bytes: u64,
    /// Bytes that were written to the peer.
    pub written_bytes: u64,
    /// Transfers that failed by themselves.
    pub faults: u64,
    /// Transfers that were given up because another had failed: no faults.
    pub flushed: u64,
}

/// Queue pairs to one peer by one NIC.
#[derive(Debug)]
pub struct Rail {
    pairs: Vec<QueuePair>,
    channel: Arc<Channel>,
    /// The pair that is filled next.
    next: usize,
    /// What is about to be posted; empty between calls, unless a device did not take it.
    batch: VecDeque<Transfer>,
    state: State,
    counters: Counters,
}

impl Rail {
    /// A rail by `route`, in `domain`. It is to be connected next.
    ///
    /// # Errors
    /// EINVAL for settings that are out of range of this module or of the device.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        route: &Route,
        role: Role,
        settings: Settings,
    ) -> Result<Rail, VerbsError> {
        if settings.pairs == 0 || settings.pairs > PAIRS_MAX {
            return Err(invalid("making a rail"));
        }
        let channel = Channel::new(domain.context())?;
        let pairs = (0..settings.pairs)
            .map(|_| QueuePair::new(domain, &channel, route, role, settings.depth))
            .collect::<Result<_, _>>()?;
        let batch = VecDeque::with_capacity(settings.depth as usize);
        Ok(Rail { pairs, channel, next: 0, batch, state: State::New, counters: Counters::default() })
    }

    /// What the peer has to know of each queue pair.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.pairs.iter().map(QueuePair::endpoint).collect()
    }

    /// Connects each queue pair to that of the peer in the same place.
    ///
    /// # Errors
    /// EINVAL: the peer has another number of them, or what it says is out of range; the rail has then failed.
    pub fn connect(&mut self, remotes: &[Endpoint]) -> Result<(), VerbsError> {
        if remotes.len() != self.pairs.len() || self.state != State::New {
            return Err(invalid("connecting a rail"));
        }
        for (pair, remote) in self.pairs.iter_mut().zip(remotes) {
            if let Err(error) = pair.connect(remote) {
                self.state = State::Failed(error.into());
                return Err(error);
            }
        }
        self.state = State::Up;
        Ok(())
    }

    /// How it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Transfers that may be started before one has to end: 0 unless it is up.
    pub fn credits(&self) -> usize {
        if self.state == State::Up { self.pairs.iter().map(QueuePair::room).sum() } else { 0 }
    }

    /// Transfers that have not ended.
    pub fn in_flight(&self) -> usize {
        self.pairs.iter().map(QueuePair::in_flight).sum::<usize>() + self.batch.len()
    }

    /// Starts READs from the front of `fetches` while there are credits. → how many. `memory` is what the spans lie in
    /// ([`Registered::own`]).
    ///
    /// # Errors
    /// EINVAL: `source` has a number of keys that does not fit, or the first of `fetches` is not inside it, too long, or not of
    /// `memory`; that one is taken off and its span freed. Else what the device answers; the rail has then failed, and what it took
    /// from `fetches` comes back by [`Rail::poll`].
    pub fn read(
        &mut self,
        source: &Source,
        memory: &Arc<Registered>,
        fetches: &mut VecDeque<Fetch>,
    ) -> Result<usize, VerbsError> {
        self.start(Kind::Read, source, memory, fetches)
    }

    /// As [`Rail::read`], in the other direction: `target` is what a peer of [`Role::Target`] has given to be written to.
    pub fn write(
        &mut self,
        target: &Source,
        memory: &Arc<Registered>,
        pieces: &mut VecDeque<Fetch>,
    ) -> Result<usize, VerbsError> {
        self.start(Kind::Write, target, memory, pieces)
    }

    fn start(
        &mut self,
        kind: Kind,
        remote: &Source,
        memory: &Arc<Registered>,
        fetches: &mut VecDeque<Fetch>,
    ) -> Result<usize, VerbsError> {
        const CALL: &str = "starting transfers";
        if remote.remotes.len() != 1 && remote.remotes.len() != self.pairs.len() {
            return Err(invalid(CALL));
        }
        let mut started = 0;
        while self.credits() > 0 && !fetches.is_empty() {
            // Each pair in turn gets its share, so that all of them are at work with a list of a few posted at once.
            let share = fetches.len().div_ceil(self.pairs.len());
            let place = self.next % self.pairs.len();
            self.next = place + 1;
            let (pair, remotes) = (&mut self.pairs[place], &remote.remotes);
            let remote = remotes.get(place).or(remotes.first()).ok_or(invalid(CALL))?;
            let mut refused = None;
            for _ in 0..share.min(pair.room()) {
                let Some(fetch) = fetches.pop_front() else { break };
                let part = remote.part(fetch.offset, fetch.span.bytes()).ok_or(invalid(CALL));
                match part.and_then(|part| Transfer::new(kind, fetch.span, memory, part, fetch.tag)) {
                    Ok(transfer) => self.batch.push_back(transfer),
                    Err(error) => {
                        refused = Some(error);
                        break;
                    }
                }
            }
            match pair.post(&mut self.batch) {
                Ok(posted) => started += posted,
                Err(error) => {
                    self.state = State::Failed(error.into());
                    return Err(error);
                }
            }
            if let Some(error) = refused {
                return Err(error);
            }
        }
        Ok(started)
    }

    /// Hands back the transfers that have ended, by appending them to `done`. → how many.
    ///
    /// With the first that fails by itself the rail has failed, and all others come back as flushed.
    ///
    /// # Errors
    /// What the device answers; the rail has then failed.
    pub fn poll(&mut self, done: &mut Vec<Done>) -> Result<usize, VerbsError> {
        let before = done.len();
        let mut failure = Ok(());
        for pair in &mut self.pairs {
            failure = failure.and(pair.poll(done).map(drop));
        }
        done.extend(self.batch.drain(..).map(Transfer::give_up));
        for ended in &done[before..] {
            match (ended.result, ended.kind) {
                (Ok(()), Kind::Read) => self.counters.read_bytes += ended.span.bytes(),
                (Ok(()), Kind::Write) => self.counters.written_bytes += ended.span.bytes(),
                (Err(WorkError::Flushed), _) => self.counters.flushed += 1,
                (Err(error), _) => {
                    self.counters.faults += 1;
                    if !matches!(self.state, State::Failed(_)) {
                        self.state = State::Failed(error.into());
                        failure = failure.and(self.pairs.iter_mut().try_for_each(QueuePair::fail));
                    }
                }
            }
        }
        if let Err(error) = failure {
            if !matches!(self.state, State::Failed(_)) {
                self.state = State::Failed(error.into());
            }
            return Err(error);
        }
        Ok(done.len() - before)
    }

    /// As [`Rail::poll`], and blocks until at least one has ended or `timeout` is over. Returns at once if none is in flight.
    pub fn wait(&mut self, done: &mut Vec<Done>, timeout: Duration) -> Result<usize, VerbsError> {
        let deadline = Instant::now() + timeout;
        loop {
            let ended = self.poll(done)?;
            if ended > 0 || self.in_flight() == 0 {
                return Ok(ended);
            }
            self.pairs.iter_mut().try_for_each(QueuePair::arm)?;
            // What completed before it was armed wakes nobody.
            let ended = self.poll(done)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if ended > 0 || left.is_zero() {
                return Ok(ended);
            }
            self.channel.wait(left)?;
        }
    }

    /// Gives the rail up: everything in flight comes back by [`Rail::poll`], most of it flushed, and nothing more is posted.
    pub fn stop(&mut self) -> Result<(), VerbsError> {
        if !matches!(self.state, State::Failed(_)) {
            self.state = State::Failed(WorkError::Flushed.into());
        }
        self.pairs.iter_mut().try_for_each(QueuePair::fail)
    }

    /// Lets the peer of this rail ([`Role::Source`]) read `bytes` from `offset` on of `memory`: through windows if it is
    /// [`Registered::windowed`], else by its own key, which then stands for all of it until it is deregistered.
    ///
    /// # Errors
    /// EINVAL: out of range, or memory that is not there to be read.
    pub fn publish(
        &mut self,
        memory: &Arc<Registered>,
        offset: u64,
        bytes: u64,
    ) -> Result<Published, VerbsError> {
        const CALL: &str = "publishing memory";
        let mut windows = Vec::new();
        let remotes = match memory.remote() {
            Some(remote) => vec![remote.part(offset, bytes).ok_or(invalid(CALL))?],
            None => self
                .pairs
                .iter_mut()
                .map(|pair| {
                    let mut window = Window::new(memory)?;
                    let remote = pair.bind(&mut window, offset, bytes)?;
                    windows.push(window);
                    Ok(remote)
                })
                .collect::<Result<_, VerbsError>>()?,
        };
        Ok(Published { source: Source { remotes }, windows, _memory: Arc::clone(memory) })
    }

    /// Takes back what was published by this rail: windows are void when this returns. Without windows the key is void when the last
    /// that holds the registered memory has let go of it.
    pub fn revoke(&mut self, published: Published) -> Result<(), VerbsError> {
        let mut windows = published.windows;
        self.pairs.iter_mut().zip(&mut windows).try_for_each(|(pair, window)| pair.invalidate(window))
    }
}

fn invalid(call: &'static str) -> VerbsError {
    VerbsError { call, errno: libc::EINVAL }
}
