//! What is resident: artifacts and selections of artifacts, their leases and pins, and what is evicted next.
//!
//! Entries are found by what their files *are* (device, inode, size, times), not by how they are called, so a file
//! that was replaced is another artifact. A tenant sees an entry only if it has opened its files itself.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::host::{Grant, Host, Shortage};
use crate::api::methods::Selector;
use crate::catalog::Description;
use crate::error::{Code, Error, Result};
use crate::plan::Placed;
use crate::source::file::Stamp;
use crate::sys::mem::Sealed;

/// How long a load waits for memory that importers hold before more is evicted for it.
const HELD_PATIENCE: Duration = Duration::from_millis(500);
/// How often it looks meanwhile.
const HELD_INTERVAL: Duration = Duration::from_millis(10);

/// Number of an entry, unique while the daemon runs.
pub type EntryId = u64;

/// A user id on whose behalf entries are looked at; `None` is the daemon itself and its own user, who see all.
pub type Viewer = Option<u32>;

/// What makes two requests mean the same resident bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// Name and identity of each file.
    pub files: Vec<(String, Stamp)>,
    /// The selection.
    pub select: Option<Vec<Selector>>,
}

/// Content of a resident entry; immutable.
#[derive(Debug)]
pub struct Content {
    /// Files, tensors, metadata.
    pub description: Description,
    /// Where each file lies that is resident whole.
    pub files: Vec<Option<u64>>,
    /// Where the tensors lie.
    pub tensors: Vec<Placed>,
    /// Digest of the manifest, if all bytes were read.
    pub digest: Option<String>,
    /// Checksums of what is resident, in the order of the plan that filled it.
    pub checks: Box<[u64]>,
    /// The memory.
    pub parts: Vec<Sealed>,
}

impl Content {
    /// Length of the region, bytes.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(Sealed::bytes).sum()
    }

    /// `hugetlb`, `thp`, `4k`, or `mixed`.
    pub fn pages(&self) -> &'static str {
        let mut kinds = self.parts.iter().map(Sealed::pages);
        match kinds.next() {
            Some(first) if kinds.all(|kind| kind == first) => first.as_str(),
            Some(_) => "mixed",
            None => "4k",
        }
    }
}

/// How an entry stands.
#[derive(Debug, Clone)]
pub enum State {
    /// Its job runs.
    Loading,
    /// It can be attached.
    Resident(Arc<Content>),
}

impl State {
    /// Whether it can be attached.
    pub fn is_resident(&self) -> bool {
        matches!(self, State::Resident(_))
    }

    /// Digest of the manifest, if known.
    pub fn digest(&self) -> Option<String> {
        match self {
            State::Resident(content) => content.digest.clone(),
            State::Loading => None,
        }
    }
}

/// One artifact, or one selection of it, on the host tier.
#[derive(Debug)]
pub struct Entry {
    /// Its number.
    pub id: EntryId,
    /// What it is.
    pub key: Key,
    /// What it was loaded from, for people.
    pub source: String,
    /// The path that it was loaded from, in full; `None` for descriptors, whose names say nothing.
    pub origin: Option<String>,
    /// How it stands.
    pub state: State,
    /// Memory that it takes, bytes.
    pub bytes: u64,
    /// Leases on it.
    pub leases: u32,
    /// Who has pinned it.
    pub pins: BTreeSet<u32>,
    /// Its files are others now: it goes with its last lease.
    pub stale: bool,
    /// When it was last loaded or attached.
    pub used: Instant,
    /// Who has opened its files.
    tenants: BTreeSet<u32>,
}

/// Why an entry left memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eviction {
    /// Room was needed.
    Budget,
    /// A client asked for it.
    Request,
    /// Its files have changed.
    Stale,
}

impl Eviction {
    /// `budget`, `request` or `stale`.
    pub fn as_str(self) -> &'static str {
        match self {
            Eviction::Budget => "budget",
            Eviction::Request => "request",
            Eviction::Stale => "stale",
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    entries: BTreeMap<EntryId, Entry>,
    by_key: HashMap<Key, EntryId>,
    next: EntryId,
    evictions: Vec<Eviction>,
}

/// What is resident. Belongs to the control thread.
#[derive(Debug)]
pub struct Residency {
    host: Rc<Host>,
    table: RefCell<Table>,
    /// Evicted, but named by replies that are still on their way.
    parting: RefCell<Vec<Arc<Content>>>,
}

/// A hold on an entry: while there is one, it is not evicted. A lease is a hold on a resident entry.
#[derive(Debug)]
pub struct Hold {
    residency: Rc<Residency>,
    id: EntryId,
}

impl Hold {
    /// The entry.
    pub fn id(&self) -> EntryId {
        self.id
    }

    /// What is held, once it is resident.
    pub fn content(&self) -> Result<Arc<Content>> {
        let mut table = self.residency.table.borrow_mut();
        let entry = table.entries.get_mut(&self.id).ok_or_else(not_resident)?;
        entry.used = Instant::now();
        match &entry.state {
            State::Resident(content) => Ok(Arc::clone(content)),
            State::Loading => Err(not_resident()),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(entry) = self.residency.table.borrow_mut().entries.get_mut(&self.id) {
            entry.leases -= 1;
            entry.used = Instant::now();
        }
        self.residency.sweep();
        self.residency.host.nudge();
    }
}

impl Residency {
    /// Nothing is resident yet.
    pub fn new(host: Rc<Host>) -> Rc<Residency> {
        Rc::new(Residency { host, table: RefCell::default(), parting: RefCell::default() })
    }

    /// The memory below.
    pub fn host(&self) -> &Rc<Host> {
        &self.host
    }

    /// The entry for `key`, which `tenant` has just opened, or a new one that is loading (then `true`).
    ///
    pub fn enter(&self, key: Key, source: &str, origin: Option<&str>, tenant: u32) -> (EntryId, bool) {
        let mut table = self.table.borrow_mut();
        if let Some(id) = table.by_key.get(&key).copied()
            && let Some(entry) = table.entries.get_mut(&id)
        {
            entry.tenants.insert(tenant);
            // Its files have just been opened: they are what they were.
            entry.stale = false;
            return (id, false);
        }
        table.next += 1;
        let id = table.next;
        table.by_key.insert(key.clone(), id);
        let entry = Entry {
            id,
            key,
            source: source.to_owned(),
            origin: origin.map(str::to_owned),
            state: State::Loading,
            bytes: 0,
            leases: 0,
            pins: BTreeSet::new(),
            stale: false,
            used: Instant::now(),
            tenants: BTreeSet::from([tenant]),
        };
        table.entries.insert(id, entry);
        (id, true)
    }

    /// The entry for `key`, which `tenant` has just opened, if there is one.
    pub fn known(&self, key: &Key, tenant: u32) -> Option<EntryId> {
        let mut table = self.table.borrow_mut();
        let id = table.by_key.get(key).copied()?;
        let entry = table.entries.get_mut(&id)?;
        entry.tenants.insert(tenant);
        entry.stale = false;
        Some(id)
    }

    /// The newest entry that was loaded from the path `origin`, if `viewer` may see it.
    pub fn find_origin(&self, origin: &str, select: Option<&[Selector]>, viewer: Viewer) -> Option<EntryId> {
        let table = self.table.borrow();
        let mut newest = table.entries.values().rev();
        newest
            .find(|entry| entry.came_from(Some(origin), select) && entry.seen_by(viewer))
            .map(|entry| entry.id)
    }

    /// The entry with this digest and selection, if `viewer` may see it.
    pub fn find_digest(&self, digest: &str, select: Option<&[Selector]>, viewer: Viewer) -> Result<EntryId> {
        let table = self.table.borrow();
        let found = table.entries.values().rev().find(|entry| {
            let known =
                matches!(&entry.state, State::Resident(content) if content.digest.as_deref() == Some(digest));
            known && entry.key.select.as_deref() == select && entry.seen_by(viewer)
        });
        found.map(|entry| entry.id).ok_or_else(|| {
            Error::new(
                Code::ArtifactNotFound,
                format!("no artifact with digest {digest} is resident that you have opened: name its source instead"),
            )
        })
    }

    /// Looks at an entry.
    pub fn with<T>(&self, id: EntryId, look: impl FnOnce(&Entry) -> T) -> Result<T> {
        self.table.borrow().entries.get(&id).map(look).ok_or_else(not_resident)
    }

    /// Looks at all entries that `viewer` may see, most recently used first.
    pub fn list<T>(&self, viewer: Viewer, look: impl Fn(&Entry) -> T) -> Vec<T> {
        let table = self.table.borrow();
        let mut seen: Vec<&Entry> = table.entries.values().filter(|entry| entry.seen_by(viewer)).collect();
        seen.sort_by_key(|entry| std::cmp::Reverse(entry.used));
        seen.into_iter().map(look).collect()
    }

    /// Says that an entry takes `bytes` while it loads.
    pub fn takes(&self, id: EntryId, bytes: u64) {
        if let Some(entry) = self.table.borrow_mut().entries.get_mut(&id) {
            entry.bytes = bytes;
        }
    }

    /// A load has ended well. What was loaded from the same path before is stale from now on.
    pub fn fill(self: &Rc<Self>, id: EntryId, content: Content) {
        let mut table = self.table.borrow_mut();
        let same = table.entries.get(&id).map(|entry| (entry.origin.clone(), entry.key.select.clone()));
        if let Some((origin, select)) = same {
            let before = table.entries.range_mut(..id).map(|(_, entry)| entry);
            for old in before.filter(|old| old.came_from(origin.as_deref(), select.as_deref())) {
                old.stale = true;
            }
        }
        if let Some(entry) = table.entries.get_mut(&id) {
            entry.bytes = content.bytes();
            entry.state = State::Resident(Arc::new(content));
            entry.used = Instant::now();
        }
        drop(table);
        self.sweep();
    }

    /// A load is being stopped: its entry is not found any more, and another may take its place.
    pub fn disown(&self, id: EntryId) {
        let mut table = self.table.borrow_mut();
        let Some(key) = table.entries.get(&id).map(|entry| entry.key.clone()) else { return };
        if table.by_key.get(&key) == Some(&id) {
            table.by_key.remove(&key);
        }
    }

    /// A load has failed: the entry is gone.
    pub fn forget(&self, id: EntryId) {
        self.table.borrow_mut().remove(id);
    }

    /// Keeps an entry from being evicted as long as the hold lives.
    pub fn hold(self: &Rc<Self>, id: EntryId) -> Result<Hold> {
        let mut table = self.table.borrow_mut();
        let entry = table.entries.get_mut(&id).ok_or_else(not_resident)?;
        entry.leases += 1;
        Ok(Hold { residency: Rc::clone(self), id })
    }

    /// Pins for a tenant.
    pub fn pin(&self, id: EntryId, tenant: u32) -> Result<()> {
        let mut table = self.table.borrow_mut();
        let entry = table.entries.get_mut(&id).ok_or_else(not_resident)?;
        entry.pins.insert(tenant);
        Ok(())
    }

    /// Takes a tenant's pin back; all pins for the daemon's own user (`None`).
    pub fn unpin(&self, id: EntryId, viewer: Viewer) -> Result<()> {
        let mut table = self.table.borrow_mut();
        let entry = table.entries.get_mut(&id).ok_or_else(not_resident)?;
        entry.pins.retain(|pin| viewer.is_some_and(|tenant| tenant != *pin));
        drop(table);
        self.host.nudge();
        Ok(())
    }

    /// Evicts one entry on request.
    pub fn evict(self: &Rc<Self>, id: EntryId) -> Result<()> {
        let mut table = self.table.borrow_mut();
        let entry = table.entries.get(&id).ok_or_else(not_resident)?;
        if !entry.pins.is_empty() {
            let message = "the artifact is pinned: unpin it first, or ask who pinned it";
            return Err(Error::new(Code::ArtifactPinned, message).kept("the artifact stays resident"));
        }
        if entry.leases > 0 || matches!(entry.state, State::Loading) {
            let message = format!("the artifact is in use ({} leases, or loading)", entry.leases);
            return Err(Error::new(Code::ArtifactLeased, message).kept("the artifact stays resident"));
        }
        self.let_go(table.evict(id, Eviction::Request));
        Ok(())
    }

    /// Sets memory aside for a new region of `bytes`; evicts and waits as needed. The budget is never exceeded.
    pub async fn reserve(&self, bytes: u64) -> Result<Grant> {
        let began = Instant::now();
        loop {
            if bytes > self.host.budget() {
                return Err(self.over_budget(bytes));
            }
            match self.host.grant(bytes) {
                Ok(grant) => return Ok(grant),
                Err(Shortage::Wait) => self.host.changed().await,
                // What was evicted or let go of a moment ago may still be mapped for another: by the daemon itself,
                // or by a client that is ending.
                Err(Shortage::Held) if began.elapsed() < HELD_PATIENCE => {
                    self.sweep();
                    let _ = tokio::time::timeout(HELD_INTERVAL, self.host.changed()).await;
                }
                Err(Shortage::Held | Shortage::Evict) if self.evict_oldest() => {}
                Err(_) if self.memory_may_come() => self.host.changed().await,
                Err(_) => return Err(self.over_budget(bytes)),
            }
        }
    }

    /// Whether a load that will end binds memory, or a reply that names an evicted region is still on its way.
    fn memory_may_come(&self) -> bool {
        let table = self.table.borrow();
        let mut loading = table.entries.values().filter(|entry| matches!(entry.state, State::Loading));
        loading.any(|entry| entry.bytes > 0) || !self.parting.borrow().is_empty()
    }

    fn over_budget(&self, bytes: u64) -> Error {
        let message = format!(
            "{bytes} bytes do not fit into the host budget of {} beside what is leased, pinned or still mapped by clients; \
             release or unpin some, select fewer tensors, or raise host.budget_bytes",
            self.host.budget(),
        );
        Error::new(Code::TierHostOverBudget, message).kept("everything that was resident and in use")
    }

    /// Evicts the least recently used entry that nobody has leased or pinned. `false`: there is none.
    fn evict_oldest(&self) -> bool {
        let mut table = self.table.borrow_mut();
        let idle = table.entries.values().filter(|entry| entry.idle() && entry.pins.is_empty());
        let Some(id) = idle.min_by_key(|entry| entry.used).map(|entry| entry.id) else { return false };
        self.let_go(table.evict(id, Eviction::Budget));
        true
    }

    /// Evicts what is stale and has no lease left.
    pub fn sweep(&self) {
        let mut table = self.table.borrow_mut();
        let stale = table.entries.values().filter(|entry| entry.stale && entry.idle()).map(|entry| entry.id);
        for id in stale.collect::<Vec<_>>() {
            self.let_go(table.evict(id, Eviction::Stale));
        }
        drop(table);
        for content in self.parting.take() {
            self.let_go(Some(content));
        }
    }

    /// Gives memory back, unless a reply that names it is still on its way: then at the next occasion.
    fn let_go(&self, content: Option<Arc<Content>>) {
        match content.map(Arc::try_unwrap) {
            Some(Ok(content)) => self.host.release(content.parts),
            Some(Err(content)) => self.parting.borrow_mut().push(content),
            None => {}
        }
    }

    /// What was evicted since the last call, for the metrics.
    pub fn take_evictions(&self) -> Vec<Eviction> {
        std::mem::take(&mut self.table.borrow_mut().evictions)
    }

    /// Evicts everything that has no lease, pinned or not: the daemon stops.
    pub fn clear(&self) {
        let mut table = self.table.borrow_mut();
        let idle = table.entries.values().filter(|entry| entry.idle()).map(|entry| entry.id);
        for id in idle.collect::<Vec<_>>() {
            self.let_go(table.evict(id, Eviction::Request));
        }
    }
}

impl Table {
    fn remove(&mut self, id: EntryId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        // A newer entry may have the key by now.
        if self.by_key.get(&entry.key) == Some(&id) {
            self.by_key.remove(&entry.key);
        }
        Some(entry)
    }

    fn evict(&mut self, id: EntryId, why: Eviction) -> Option<Arc<Content>> {
        let entry = self.remove(id)?;
        let State::Resident(content) = entry.state else { return None };
        self.evictions.push(why);
        tracing::info!(source = entry.source, bytes = entry.bytes, why = why.as_str(), "evicted");
        Some(content)
    }
}

impl Entry {
    fn idle(&self) -> bool {
        self.leases == 0 && matches!(self.state, State::Resident(_))
    }

    fn came_from(&self, origin: Option<&str>, select: Option<&[Selector]>) -> bool {
        origin.is_some() && self.origin.as_deref() == origin && self.key.select.as_deref() == select
    }

    /// Whether `viewer` may know of it.
    pub fn seen_by(&self, viewer: Viewer) -> bool {
        viewer.is_none_or(|uid| self.tenants.contains(&uid))
    }

    /// `loading`, `resident` or `stale`.
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Loading => "loading",
            State::Resident(_) if self.stale => "stale",
            State::Resident(_) => "resident",
        }
    }
}

/// The error for what is not, or not yet, resident.
pub fn not_resident() -> Error {
    Error::new(
        Code::ArtifactNotResident,
        "the artifact is not resident: prefetch it, or attach with \"wait\": true",
    )
}
