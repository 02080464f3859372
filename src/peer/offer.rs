//! What this node gives to peers: artifacts that are resident, and those that are still being loaded.
//!
//! An [`Offer`] maps the artifact's memory by itself, so a connection that is sending a chunk keeps the bytes where they are.
//! Whoever wants the memory back withdraws the offer and waits until it is unused: that takes no longer than the chunks that
//! are being sent, each of which has a deadline.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::protocol::{Digest, Have, Rank, Refusal, State};
use super::{Error, Result, lock};
use crate::catalog::manifest::{CHUNK_BYTES, Manifest};
use crate::sys::mem::{Memory, Sealed};
use crate::sys::view::View;

/// One artifact, or the files of one, that peers may have.
#[derive(Debug)]
pub struct Offer {
    digest: Digest,
    manifest: Box<[u8]>,
    rank: Rank,
    /// Of each file: the number of its first chunk among the pieces of the view, and how many there are. None of a file
    /// that is not resident whole.
    files: Box<[Option<(usize, u32)>]>,
    chunks_total: u64,
    chunks_ready: AtomicU64,
    now: Mutex<Now>,
    /// A chunk has arrived, or the state has changed.
    changed: Condvar,
    /// The last user of the mapping is gone.
    idle: Notify,
}

#[derive(Debug)]
struct Now {
    complete: bool,
    /// None once it was withdrawn.
    view: Option<Arc<View>>,
    /// Chunks that are being sent.
    users: u32,
    /// Connections that have it open.
    connections: u32,
}

impl Offer {
    /// Offers an artifact that is being loaded into `parts`, which make up its region one behind the other. `files` says
    /// where each file lies in the region, on a multiple of 4096, if it will be resident whole.
    ///
    /// The memory can be sealed, but not be shrunk, while it is offered.
    ///
    /// # Errors
    /// `internal` if the files do not fit the manifest or the region, or if the memory cannot be mapped.
    pub fn filling(
        manifest: &Manifest,
        files: &[Option<u64>],
        parts: &[&Memory],
        rank: Rank,
    ) -> Result<Offer> {
        Offer::new(manifest, files, rank, false, |pieces| View::filling(parts, pieces))
    }

    /// Offers an artifact that is complete, in sealed memory.
    ///
    /// # Errors
    /// As [`Offer::filling`].
    pub fn sealed(
        manifest: &Manifest,
        files: &[Option<u64>],
        parts: &[&Sealed],
        rank: Rank,
    ) -> Result<Offer> {
        Offer::new(manifest, files, rank, true, |pieces| View::sealed(parts, pieces))
    }

    fn new(
        manifest: &Manifest,
        places: &[Option<u64>],
        rank: Rank,
        complete: bool,
        view: impl FnOnce(Vec<(u64, u32)>) -> io::Result<View>,
    ) -> Result<Offer> {
        let invalid = |what| Error::Offer(io::Error::new(io::ErrorKind::InvalidInput, what));
        let digest = Digest::parse(manifest.digest()).ok_or_else(|| invalid("it has no digest"))?;
        let entries = &manifest.description().files;
        if entries.len() != places.len() {
            return Err(invalid("the places are not those of its files"));
        }
        let mut pieces = Vec::new();
        let mut files = Vec::with_capacity(entries.len());
        for ((entry, place), chunks) in entries.iter().zip(places).zip(manifest.chunks()) {
            let Some(place) = *place else {
                files.push(None);
                continue;
            };
            let count = u32::try_from(chunks.len()).map_err(|_| invalid("a file has too many chunks"))?;
            files.push(Some((pieces.len(), count)));
            for chunk in 0..u64::from(count) {
                let offset = place.checked_add(chunk * CHUNK_BYTES);
                let bytes = (entry.bytes - chunk * CHUNK_BYTES).min(CHUNK_BYTES);
                pieces.push((offset.ok_or_else(|| invalid("a file lies too far out"))?, bytes as u32));
            }
        }
        let chunks_total = pieces.len() as u64;
        let view = Arc::new(view(pieces).map_err(Error::Offer)?);
        Ok(Offer {
            digest,
            manifest: manifest.to_bytes()?.into(),
            rank,
            files: files.into(),
            chunks_total,
            chunks_ready: AtomicU64::new(if complete { chunks_total } else { 0 }),
            now: Mutex::new(Now { complete, view: Some(view), users: 0, connections: 0 }),
            changed: Condvar::new(),
            idle: Notify::new(),
        })
    }

    /// The artifact.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The manifest, as it is written.
    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    /// A chunk was verified and will not be written again: peers may have it. False, and peers may not, if there is no such
    /// chunk, if a span reaches into it, or if the offer was withdrawn.
    pub fn arrived(&self, file: u32, chunk: u32) -> bool {
        let Ok(piece) = self.piece(file, chunk) else { return false };
        let now = lock(&self.now);
        let Some(view) = &now.view else { return false };
        if !view.is_frozen(piece) {
            if !view.freeze(piece) {
                return false;
            }
            self.chunks_ready.fetch_add(1, Ordering::Relaxed);
        }
        drop(now);
        self.changed.notify_all();
        true
    }

    /// All chunks have arrived, those that were not told of, too. False, and it goes on as loading, if a span reaches into
    /// one of them, or if the offer was withdrawn.
    pub fn complete(&self) -> bool {
        let chunks = self.files.iter().zip(0..).filter_map(|(file, number)| Some((number, (*file)?.1)));
        let all = chunks.flat_map(|(file, count)| (0..count).map(move |chunk| (file, chunk)));
        let arrived = all.fold(true, |all, (file, chunk)| self.arrived(file, chunk) && all);
        let mut now = lock(&self.now);
        now.complete = arrived && now.view.is_some();
        now.complete
    }

    /// Peers may not have it any more: connections stop at the next chunk. [`Offer::unused`] says when the last has.
    pub fn withdraw(&self) {
        let mut now = lock(&self.now);
        let view = now.view.take();
        drop(now);
        // Unmapped here if no chunk is being sent, and not under the lock: that takes long.
        drop(view);
        self.changed.notify_all();
        self.idle.notify_waiters();
    }

    /// Waits until the offer was withdrawn and no connection uses its mapping, so that its memory can be given back.
    pub async fn unused(&self) {
        loop {
            let mut idle = std::pin::pin!(self.idle.notified());
            // Before looking, so that nothing is missed in between.
            idle.as_mut().enable();
            if self.is_unused() {
                return;
            }
            idle.await;
        }
    }

    fn is_unused(&self) -> bool {
        let now = lock(&self.now);
        now.view.is_none() && now.users == 0
    }

    /// Chunks that are being sent.
    pub fn users(&self) -> u32 {
        lock(&self.now).users
    }

    /// What a peer is told of it.
    pub fn have(&self) -> Have {
        let now = lock(&self.now);
        let state = match (&now.view, now.complete) {
            (None, _) => State::None,
            (Some(_), false) => State::Loading,
            (Some(_), true) => State::Complete,
        };
        Have {
            state,
            chunks_ready: self.chunks_ready.load(Ordering::Relaxed),
            chunks_total: self.chunks_total,
            rank: self.rank,
            serving: now.connections,
        }
    }

    /// Counts a connection as one that has it open, until what is returned is dropped.
    pub(super) fn open(self: Arc<Self>, rank: Rank) -> Opened {
        lock(&self.now).connections += 1;
        // Who is not lower does not wait for whom it may have to wait for: no circle.
        let waits = self.rank < rank;
        Opened { offer: self, waits }
    }

    /// The number of a chunk among the pieces of the view.
    fn piece(&self, file: u32, chunk: u32) -> std::result::Result<usize, Refusal> {
        let file = self.files.get(file as usize).ok_or(Refusal::BadRequest)?;
        let (first, count) = file.ok_or(Refusal::NotFound)?;
        if chunk >= count { Err(Refusal::BadRequest) } else { Ok(first + chunk as usize) }
    }

    /// Lets those who wait for a chunk look at the world again.
    fn wake(&self) {
        drop(lock(&self.now));
        self.changed.notify_all();
    }
}

/// An offer that a connection has open.
#[derive(Debug)]
pub(super) struct Opened {
    offer: Arc<Offer>,
    /// Whether the other end may wait for chunks.
    waits: bool,
}

impl Opened {
    /// A chunk to send. If it has not arrived yet, waits for it until `deadline`, unless the other end may not wait or
    /// `stopping` is set (and the offers are woken).
    pub(super) fn chunk(
        &self,
        file: u32,
        chunk: u32,
        deadline: Instant,
        stopping: &AtomicBool,
    ) -> std::result::Result<Taken<'_>, Refusal> {
        let offer = &*self.offer;
        let piece = offer.piece(file, chunk)?;
        let mut now = lock(&offer.now);
        loop {
            let view = now.view.as_ref().ok_or(Refusal::Gone)?;
            if view.is_frozen(piece) {
                let view = Arc::clone(view);
                now.users += 1;
                return Ok(Taken { offer, view: Some(view), piece });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.waits || left.is_zero() || stopping.load(Ordering::Relaxed) {
                return Err(Refusal::NotYet);
            }
            now = offer.changed.wait_timeout(now, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        lock(&self.offer.now).connections -= 1;
    }
}

/// A chunk whose bytes stay where they are until it is dropped.
#[derive(Debug)]
pub(super) struct Taken<'a> {
    offer: &'a Offer,
    view: Option<Arc<View>>,
    piece: usize,
}

impl Taken<'_> {
    pub(super) fn bytes(&self) -> &[u8] {
        self.view.as_ref().and_then(|view| view.piece(self.piece)).unwrap_or_default()
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        // The mapping goes, if this was its last user, before it is said that nobody uses it.
        drop(self.view.take());
        let mut now = lock(&self.offer.now);
        now.users -= 1;
        let unused = now.users == 0;
        drop(now);
        if unused {
            self.offer.idle.notify_waiters();
        }
    }
}

/// All that this node offers, by digest.
#[derive(Debug, Default)]
pub struct Offers(Mutex<HashMap<Digest, Arc<Offer>>>);

impl Offers {
    /// Lets peers find it. The offer of the same digest that was there before, if there was, is withdrawn and returned.
    pub fn insert(&self, offer: Arc<Offer>) -> Option<Arc<Offer>> {
        let before = lock(&self.0).insert(offer.digest, offer);
        before.inspect(|offer| offer.withdraw())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        lock(&self.0).len()
    }

    /// What is offered under this digest.
    pub fn get(&self, digest: &Digest) -> Option<Arc<Offer>> {
        lock(&self.0).get(digest).cloned()
    }

    /// Withdraws this offer; one of the same digest that has taken its place stays.
    pub fn withdraw(&self, offer: &Arc<Offer>) {
        let mut offers = lock(&self.0);
        if offers.get(&offer.digest).is_some_and(|current| Arc::ptr_eq(current, offer)) {
            offers.remove(&offer.digest);
        }
        drop(offers);
        offer.withdraw();
    }

    /// Lets every connection that waits for a chunk look whether it should stop.
    pub(super) fn wake(&self) {
        let offers: Vec<_> = lock(&self.0).values().cloned().collect();
        offers.iter().for_each(|offer| offer.wake());
    }
}
