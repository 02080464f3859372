//! Memory of the host tier: a budget that is never exceeded, a pool of ready memory, and regions made of both.
//!
//! A region is a sequence of parts: segments of the ready pool as far as there are any, and one part made on the
//! spot for the rest (docs/decisions/0003-regions-of-parts.md). Everything that takes memory is in one account:
//! regions, the pool, what is being made or freed, and what was evicted but is still mapped by an importer.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;

use super::Shortage;
use crate::config;
use crate::error::{Code, Error, Result};
use crate::sys::lease::Importers;
use crate::sys::mem::{HUGE_PAGE_BYTES, Memory, Retired, Sealed};
use crate::sys::pages::{self, PageKind};

/// Segments that the ready pool is cut into at most: keeps the number of descriptors of a region small.
const POOL_SEGMENTS_MAX: u64 = 128;
/// Smallest segment of the ready pool, bytes.
const SEGMENT_BYTES_MIN: u64 = 64 << 20;
/// How often memory that importers still hold is looked at.
const HELD_INTERVAL: Duration = Duration::from_secs(1);

/// How long the pool is left alone when it could not be filled.
const FILL_PAUSE: Duration = Duration::from_secs(10);

/// The page kinds that this node gives, best first, and why a better one is missing.
#[derive(Debug, Clone)]
pub struct PageChoice {
    /// Kinds to try, best first; never empty.
    pub kinds: Vec<PageKind>,
    /// Why the best kind is not used, if it is not.
    pub reason: Option<String>,
}

impl PageChoice {
    /// Tries out what the configuration allows.
    pub fn probe(config: &config::Host) -> Result<PageChoice> {
        let wanted: &[PageKind] = match config.pages {
            config::Pages::Auto => &[PageKind::Hugetlb, PageKind::Thp, PageKind::Small],
            config::Pages::Hugetlb => &[PageKind::Hugetlb],
            config::Pages::Thp => &[PageKind::Thp],
            config::Pages::Small => &[PageKind::Small],
        };
        let mut choice = PageChoice { kinds: Vec::new(), reason: None };
        for kind in wanted {
            match pages::probe(*kind) {
                Ok(()) => choice.kinds.push(*kind),
                Err(why) if choice.reason.is_none() => choice.reason = Some(why),
                Err(_) => {}
            }
        }
        if choice.kinds.is_empty() {
            let why = choice.reason.unwrap_or_default();
            return Err(Error::new(Code::DaemonStart, format!("host.pages cannot be had here: {why}")));
        }
        if choice.kinds.first() == wanted.first() {
            choice.reason = None;
        }
        Ok(choice)
    }

    /// The kind that new regions get.
    pub fn best(&self) -> PageKind {
        self.kinds.first().copied().unwrap_or(PageKind::Small)
    }

    /// New memory of the best kind that can be had now.
    fn make(&self, bytes: u64) -> io::Result<Memory> {
        let mut last = io::Error::from(io::ErrorKind::OutOfMemory);
        for kind in &self.kinds {
            match Memory::new(bytes, *kind) {
                Ok(memory) => return Ok(memory),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// Bytes, by what they are taken for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Account {
    /// Regions, resident or being filled.
    pub regions: u64,
    /// Ready memory.
    pub pool: u64,
    /// Being made for the pool.
    pub filling: u64,
    /// On its way back to the kernel.
    pub freeing: u64,
    /// Evicted, but still mapped by an importer.
    pub held: u64,
}

impl Account {
    /// Everything.
    pub fn total(&self) -> u64 {
        self.regions + self.pool + self.filling + self.freeing + self.held
    }
}

#[derive(Debug)]
struct State {
    budget: u64,
    pool_target: u64,
    segment: u64,
    account: Account,
    pool: Vec<Memory>,
    held: Vec<Importers>,
    /// Loads that run or wait for memory: the pool is not filled meanwhile.
    loads: u32,
    /// The pool could not be filled: it is not tried again before.
    pause_until: Option<std::time::Instant>,
}

impl State {
    /// Takes whole segments of at least `over` bytes, as far as there are any, out of the pool to be freed.
    fn take_from_pool(&mut self, over: u64) -> Vec<Memory> {
        let mut taken = 0;
        let count = self.pool.iter().take_while(|memory| {
            let more = taken < over;
            taken += if more { memory.bytes() } else { 0 };
            more
        });
        let count = count.count();
        let excess: Vec<Memory> = self.pool.drain(..count).collect();
        self.account.pool -= taken;
        self.account.freeing += taken;
        excess
    }
}

/// Memory that is on its way back to the kernel.
trait Freed: Send + 'static {
    fn bytes(&self) -> u64;
}

impl Freed for Memory {
    fn bytes(&self) -> u64 {
        Memory::bytes(self)
    }
}

impl Freed for Importers {
    fn bytes(&self) -> u64 {
        Importers::bytes(self)
    }
}

/// The memory of the host tier.
#[derive(Debug)]
pub struct Host {
    choice: PageChoice,
    state: RefCell<State>,
    /// Something was freed, or cannot be waited for any more.
    changed: Notify,
    /// The pool may need filling.
    wanting: Notify,
}

/// Memory for one region that has been set aside, but not made yet.
#[derive(Debug)]
pub struct Grant {
    bytes: u64,
    ready: Vec<Memory>,
}

/// The parts of a region that is being filled.
#[derive(Debug)]
pub struct Parts {
    /// Memory and whether its pages have been touched.
    pub parts: Vec<(Memory, bool)>,
}

impl Host {
    /// A tier with the configured budget. Fills nothing yet.
    pub fn new(config: &config::Host, choice: PageChoice) -> Rc<Host> {
        let state = State {
            budget: 0,
            pool_target: 0,
            segment: 0,
            account: Account::default(),
            pool: Vec::new(),
            held: Vec::new(),
            loads: 0,
            pause_until: None,
        };
        let host = Rc::new(Host {
            choice,
            state: RefCell::new(state),
            changed: Notify::new(),
            wanting: Notify::new(),
        });
        host.resize(config);
        host
    }

    /// Takes over another budget and pool size. What is over a smaller budget goes as leases end.
    pub fn resize(self: &Rc<Self>, config: &config::Host) {
        let mut state = self.state.borrow_mut();
        state.budget = config.budget_bytes;
        state.pool_target = config.ready_pool_bytes.min(config.budget_bytes);
        let wanted = state.pool_target.div_ceil(POOL_SEGMENTS_MAX).next_multiple_of(HUGE_PAGE_BYTES);
        // Segments of one pool may differ in size after a reload; each carries its own.
        state.segment = wanted.max(SEGMENT_BYTES_MIN);
        let over = state.account.pool.saturating_sub(state.pool_target);
        let excess = state.take_from_pool(over);
        drop(state);
        self.free_later(excess);
        self.wanting.notify_one();
        self.changed.notify_waiters();
    }

    /// The kinds of pages in use.
    pub fn choice(&self) -> &PageChoice {
        &self.choice
    }

    /// What memory is taken for now.
    pub fn account(&self) -> Account {
        self.state.borrow().account
    }

    /// The budget, bytes.
    pub fn budget(&self) -> u64 {
        self.state.borrow().budget
    }

    /// What the pool is filled up to, bytes.
    pub fn pool_target(&self) -> u64 {
        let state = self.state.borrow();
        state.pool_target / state.segment * state.segment
    }

    /// Waits until memory was freed.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Something that a load may wait for has happened.
    pub fn nudge(&self) {
        self.changed.notify_waiters();
    }

    /// Sets `bytes` (a multiple of 2 MiB) aside for a region. The account never goes above the budget.
    pub fn grant(self: &Rc<Self>, bytes: u64) -> Result<Grant, Shortage> {
        self.look_at_held();
        let mut state = self.state.borrow_mut();
        let fixed = state.account.total() - state.account.pool;
        if fixed + bytes > state.budget {
            let coming = state.account.freeing + state.account.filling;
            let missing = (fixed + bytes).saturating_sub(state.budget);
            return Err(match () {
                () if missing <= coming => Shortage::Wait,
                () if missing <= coming + state.account.held => Shortage::Held,
                () => Shortage::Evict,
            });
        }
        let (mut have, mut segments) = (0, 0);
        for segment in state.pool.iter().rev().map(Memory::bytes) {
            if have >= bytes {
                break;
            }
            have += segment;
            segments += 1;
        }
        let fresh = bytes.saturating_sub(have);
        let over = (state.account.total() + fresh).saturating_sub(state.budget);
        if over > 0 {
            // The pool gives way. Its memory has to be free before the region's is taken.
            let excess = state.take_from_pool(over);
            drop(state);
            self.free_later(excess);
            return Err(Shortage::Wait);
        }
        let at = state.pool.len() - segments;
        let ready = state.pool.split_off(at);
        state.account.pool -= have;
        state.account.regions += bytes.max(have);
        Ok(Grant { bytes, ready })
    }

    /// Makes the memory of a grant. On failure everything of it is given back.
    pub async fn make(self: &Rc<Self>, grant: Grant) -> Result<Parts> {
        let choice = self.choice.clone();
        let Grant { bytes, ready } = grant;
        let taken = ready.iter().map(Memory::bytes).sum::<u64>().max(bytes);
        let made = tokio::task::spawn_blocking(move || assemble(&choice, bytes, ready)).await;
        let made = made.unwrap_or_else(|_| Err(io::Error::other("the thread that makes memory failed")));
        let mut state = self.state.borrow_mut();
        match made {
            Ok(parts) => {
                state.account.regions -= taken - bytes;
                Ok(Parts { parts })
            }
            Err(error) => {
                state.account.regions -= taken;
                drop(state);
                self.changed.notify_waiters();
                let message = format!(
                    "the kernel gives no {bytes} bytes of memory in pages of kind {}: {error}",
                    self.choice.best()
                );
                Err(Error::new(Code::TierHostOutOfMemory, message))
            }
        }
    }

    /// Gives back the memory of a region that was never shared.
    pub fn discard(self: &Rc<Self>, memories: Vec<Memory>) {
        let bytes: u64 = memories.iter().map(Memory::bytes).sum();
        let mut state = self.state.borrow_mut();
        state.account.regions -= bytes;
        state.account.freeing += bytes;
        drop(state);
        self.free_later(memories);
    }

    /// Gives back the memory of a region that was shared. What importers still have mapped stays in the account
    /// until they let go of it. Such memory is never used again (invariant 8): the kernel clears it.
    pub fn release(self: &Rc<Self>, parts: Vec<Sealed>) {
        let mut free = Vec::new();
        let mut state = self.state.borrow_mut();
        for part in parts {
            let bytes = part.bytes();
            state.account.regions -= bytes;
            let importers = part.retire();
            if importers.hold() {
                state.account.held += bytes;
                state.held.push(importers);
            } else {
                state.account.freeing += bytes;
                free.push(importers);
            }
        }
        drop(state);
        self.free_later(free);
    }

    /// Seals the parts of a region; or gives all of them back.
    pub fn seal(self: &Rc<Self>, memories: Vec<Memory>) -> Result<Vec<Sealed>> {
        let mut sealed = Vec::with_capacity(memories.len());
        let mut retired = Vec::with_capacity(memories.len());
        let mut memories = memories.into_iter();
        while let Some(memory) = memories.next() {
            match memory.seal() {
                Ok((part, mapping)) => {
                    sealed.push(part);
                    retired.push(mapping);
                }
                Err(failed) => {
                    let (memory, error) = *failed;
                    drop(retired);
                    self.release(sealed);
                    self.discard(std::iter::once(memory).chain(memories).collect());
                    let message = format!("a region cannot be sealed: {error}");
                    return Err(Error::new(Code::TierHostOutOfMemory, message));
                }
            }
        }
        self.unmap_later(retired);
        Ok(sealed)
    }

    /// Drops the daemon's own mapping of shared memory. It is not counted: the memory is the region's.
    fn unmap_later(&self, retired: Vec<Retired>) {
        tokio::task::spawn_blocking(move || drop(retired));
    }

    /// Frees what importers have let go of.
    pub fn look_at_held(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        let (held, free): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.held).into_iter().partition(Importers::hold);
        let bytes: u64 = free.iter().map(Importers::bytes).sum();
        state.held = held;
        state.account.held -= bytes;
        state.account.freeing += bytes;
        drop(state);
        self.free_later(free);
    }

    /// A load begins: the pool is not filled while one runs, so that it does not compete for memory bandwidth.
    pub fn load_begins(&self) {
        self.state.borrow_mut().loads += 1;
    }

    /// A load has ended.
    pub fn load_ends(&self) {
        self.state.borrow_mut().loads -= 1;
        self.wanting.notify_one();
    }

    /// Drops `memory`, counted as on its way back, off the control thread; then takes it out of the account.
    fn free_later<T: Freed>(self: &Rc<Self>, memory: Vec<T>) {
        if memory.is_empty() {
            return;
        }
        let bytes: u64 = memory.iter().map(Freed::bytes).sum();
        let host = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let _ = tokio::task::spawn_blocking(move || drop(memory)).await;
            host.state.borrow_mut().account.freeing -= bytes;
            host.changed.notify_waiters();
            host.wanting.notify_one();
        });
    }

    /// Keeps the pool filled and looks after held memory; runs as long as the daemon.
    pub async fn keep(self: Rc<Self>, filled: impl Fn(Duration)) {
        let mut tick = tokio::time::interval(HELD_INTERVAL);
        loop {
            tokio::select! {
                () = self.wanting.notified() => {}
                _ = tick.tick() => self.look_at_held(),
            }
            while let Some(bytes) = self.pool_needs() {
                let began = std::time::Instant::now();
                let choice = self.choice.clone();
                let made = tokio::task::spawn_blocking(move || {
                    let memory = choice.make(bytes)?;
                    memory.populate(0, memory.bytes())?;
                    io::Result::Ok(memory)
                });
                let made = made.await.unwrap_or_else(|_| Err(io::ErrorKind::OutOfMemory.into()));
                filled(began.elapsed());
                let mut state = self.state.borrow_mut();
                state.account.filling -= bytes;
                match made {
                    Ok(memory) => {
                        state.account.pool += memory.bytes();
                        state.pool.push(memory);
                    }
                    Err(error) => {
                        // The machine has no more for now.
                        tracing::warn!(%error, pool_bytes = state.account.pool, "ready pool cannot be filled");
                        state.pause_until = Some(std::time::Instant::now() + FILL_PAUSE);
                    }
                }
                drop(state);
                self.changed.notify_waiters();
            }
        }
    }

    /// The size of the next segment to make, taken into the account; `None`: nothing to do now.
    fn pool_needs(&self) -> Option<u64> {
        let mut state = self.state.borrow_mut();
        let segment = state.segment;
        let fits = state.account.total() + segment <= state.budget;
        let wanted = state.account.pool + segment <= state.pool_target;
        let paused = state.pause_until.is_some_and(|until| std::time::Instant::now() < until);
        (state.loads == 0 && fits && wanted && !paused).then(|| {
            state.account.filling += segment;
            segment
        })
    }
}

/// Turns ready segments and fresh memory into exactly `bytes`.
fn assemble(choice: &PageChoice, bytes: u64, ready: Vec<Memory>) -> io::Result<Vec<(Memory, bool)>> {
    let mut parts = Vec::new();
    let mut missing = bytes;
    // The last one is cut: the order in which they were counted.
    for segment in ready.into_iter().rev() {
        let part = if segment.bytes() > missing { segment.shrink(missing)? } else { segment };
        missing -= part.bytes();
        parts.push((part, true));
    }
    if missing > 0 {
        parts.push((choice.make(missing)?, false));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_of_several_sizes_make_a_region_of_the_exact_size() {
        let choice = PageChoice { kinds: vec![PageKind::Small], reason: None };
        let segment = |pages: u64| Memory::new(pages * HUGE_PAGE_BYTES, PageKind::Small).unwrap();
        // The last ones were counted first, until they were enough.
        let parts = assemble(&choice, 5 * HUGE_PAGE_BYTES, vec![segment(8), segment(4)]).unwrap();
        let sizes: Vec<u64> = parts.iter().map(|(part, _)| part.bytes() / HUGE_PAGE_BYTES).collect();
        assert_eq!(sizes, [4, 1]);
        let parts = assemble(&choice, 5 * HUGE_PAGE_BYTES, vec![segment(4)]).unwrap();
        let ready: Vec<bool> = parts.iter().map(|(_, ready)| *ready).collect();
        assert_eq!(ready, [true, false]);
    }
}
