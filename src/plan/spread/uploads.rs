//! The side that answers: what to send next of what was asked for.

use std::collections::{BTreeMap, BTreeSet};

use super::{Chunks, Member};

/// Asks that wait at one member, at most: every member of a cube of 2^20 may have eight there.
pub const REQUESTS_MAX: usize = 512;

/// A chunk that somebody has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    /// When it is due, as who asks says.
    pub turn: u32,
    /// Who asks.
    pub asker: Member,
    /// Which chunk.
    pub chunk: u32,
}

/// The requests of all askers. What is due earliest goes first, a few at a time, to each asker one at a time: so that
/// one that takes its bytes slowly holds up nobody else.
#[derive(Debug)]
pub struct Uploads {
    at_once_max: usize,
    ready: BTreeSet<Request>,
    /// By chunk: those that wait until it is here.
    waiting: BTreeMap<u32, Vec<Request>>,
    waiting_count: usize,
    sending: Vec<Request>,
}

impl Uploads {
    /// Nothing to send; at most `at_once_max` chunks are sent at a time.
    pub fn new(at_once_max: usize) -> Uploads {
        Uploads {
            at_once_max,
            ready: BTreeSet::new(),
            waiting: BTreeMap::new(),
            waiting_count: 0,
            sending: Vec::new(),
        }
    }

    /// Takes a request; `waits` if it may wait until the chunk is here. Whether it was taken: if not, the answer is "not
    /// now".
    pub fn request(&mut self, request: Request, waits: bool, have: &Chunks) -> bool {
        if self.len() >= REQUESTS_MAX || request.chunk >= have.total() {
            return false;
        }
        if have.has(request.chunk) {
            self.ready.insert(request);
            return true;
        }
        if waits {
            self.waiting.entry(request.chunk).or_default().push(request);
            self.waiting_count += 1;
        }
        waits
    }

    /// `chunk` is here, verified: who waits for it can have it.
    pub fn arrived(&mut self, chunk: u32) {
        let requests = self.waiting.remove(&chunk).unwrap_or_default();
        self.waiting_count -= requests.len();
        self.ready.extend(requests);
    }

    /// What to send now, if anything. It counts as being sent until [`Uploads::ended`].
    pub fn next_upload(&mut self) -> Option<Request> {
        if self.sending.len() >= self.at_once_max {
            return None;
        }
        let free = |request: &&Request| self.sending.iter().all(|sending| sending.asker != request.asker);
        let request = *self.ready.iter().find(free)?;
        self.ready.remove(&request);
        self.sending.push(request);
        Some(request)
    }

    /// What was being sent has arrived, or will not.
    pub fn ended(&mut self, request: Request) {
        self.sending.retain(|sending| *sending != request);
    }

    /// Whoever asked for `chunk` has it from elsewhere, or has gone elsewhere for it. What is being sent goes on.
    pub fn withdrawn(&mut self, asker: Member, chunk: u32) {
        self.drop_if(|request| request.asker == asker && request.chunk == chunk);
    }

    /// `asker` has gone.
    pub fn gone(&mut self, asker: Member) {
        self.drop_if(|request| request.asker == asker);
    }

    /// Requests that nothing has been sent for yet.
    pub fn len(&self) -> usize {
        self.ready.len() + self.waiting_count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn drop_if(&mut self, which: impl Fn(&Request) -> bool) {
        self.ready.retain(|request| !which(request));
        self.waiting.retain(|_, requests| {
            requests.retain(|request| !which(request));
            !requests.is_empty()
        });
        self.waiting_count = self.waiting.values().map(Vec::len).sum();
    }
}
