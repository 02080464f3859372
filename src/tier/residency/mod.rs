//! What is resident: artifacts and selections of artifacts, their leases and pins, and what is evicted next.
//!
//! Entries are found by what their files *are* (device, inode, size, times), not by how they are called, so a file
//! that was replaced is another artifact. A tenant sees an entry only if it has opened its files itself.

mod content;
mod demote;
mod key;
mod reserve;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Notify;

pub use content::{Content, Piece, Region};
pub use key::{Form, Identity, Key};
pub use reserve::Grant;

use super::DeviceId;
use super::gpu::{Gpu, Importer};
use super::host::Host;
use crate::api::methods::Selector;
use crate::error::{Code, Error, Result};

/// Number of an entry, unique while the daemon runs.
pub type EntryId = u64;

/// A user id on whose behalf entries are looked at; `None` is the daemon itself and its own user, who see all.
pub type Viewer = Option<u32>;

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
            State::Resident(content) => content.digest().map(str::to_owned),
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
    /// Processes that were sent the descriptor of its memory on a GPU, and have not said that they have let go of it.
    importers: Vec<Importer>,
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
    /// Its device was lost.
    Lost,
}

impl Eviction {
    /// `budget`, `request`, `stale` or `lost`.
    pub fn as_str(self) -> &'static str {
        match self {
            Eviction::Budget => "budget",
            Eviction::Request => "request",
            Eviction::Stale => "stale",
            Eviction::Lost => "lost",
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    entries: BTreeMap<EntryId, Entry>,
    by_key: HashMap<Key, EntryId>,
    next: EntryId,
    evictions: Vec<(DeviceId, Eviction)>,
}

/// An entry that has left the table.
#[derive(Debug)]
struct Parted {
    device: DeviceId,
    content: Arc<Content>,
    importers: Vec<Importer>,
}

/// What is resident. Belongs to the control thread.
#[derive(Debug)]
pub struct Residency {
    host: Rc<Host>,
    gpus: Vec<Rc<Gpu>>,
    table: RefCell<Table>,
    /// Evicted, but named by replies that are still on their way.
    parting: RefCell<Vec<Parted>>,
    /// Bytes that went from GPUs to the host tier since they were last asked for.
    demoted: Cell<u64>,
    /// A device was lost.
    losses: Notify,
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
        self.residency.nudge();
    }
}

impl Residency {
    /// Nothing is resident yet.
    pub fn new(host: Rc<Host>, gpus: Vec<Rc<Gpu>>) -> Rc<Residency> {
        Rc::new(Residency {
            host,
            gpus,
            table: RefCell::default(),
            parting: RefCell::default(),
            demoted: Cell::new(0),
            losses: Notify::new(),
        })
    }

    /// The host tier.
    pub fn host(&self) -> &Rc<Host> {
        &self.host
    }

    /// The GPUs in use, in the order of [`DeviceId::Gpu`].
    pub fn gpus(&self) -> &[Rc<Gpu>] {
        &self.gpus
    }

    /// How clients call a device.
    pub fn device_name(&self, device: DeviceId) -> String {
        match device {
            DeviceId::Host => "host".to_owned(),
            DeviceId::Gpu(index) => self.gpus.get(index).map_or_else(String::new, |gpu| gpu.name()),
        }
    }

    /// Something that a load may wait for has happened.
    pub fn nudge(&self) {
        self.host.nudge();
        for gpu in &self.gpus {
            gpu.nudge();
        }
    }

    /// The entry for `key`, which `tenant` has just opened, or a new one that is loading (then `true`).
    pub fn enter(&self, key: Key, source: &str, origin: Option<&str>, tenant: u32) -> (EntryId, bool) {
        let mut table = self.table.borrow_mut();
        if let Some(id) = table.find(&key)
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
            importers: Vec::new(),
        };
        table.entries.insert(id, entry);
        (id, true)
    }

    /// The entry for `key`, which `tenant` has just opened, if there is one.
    pub fn known(&self, key: &Key, tenant: u32) -> Option<EntryId> {
        let mut table = self.table.borrow_mut();
        let id = table.find(key)?;
        let entry = table.entries.get_mut(&id)?;
        entry.tenants.insert(tenant);
        entry.stale = false;
        Some(id)
    }

    /// The newest entry that was loaded from the path `origin`, if `viewer` may see it.
    pub fn find_origin(
        &self,
        origin: &str,
        device: DeviceId,
        select: Option<&[Selector]>,
        viewer: Viewer,
    ) -> Option<EntryId> {
        let table = self.table.borrow();
        let mut newest = table.entries.values().rev();
        newest
            .find(|entry| entry.came_from(Some(origin), device, select) && entry.seen_by(viewer))
            .map(|entry| entry.id)
    }

    /// The entry with this digest and selection, if `viewer` may see it.
    pub fn find_digest(
        &self,
        digest: &str,
        device: DeviceId,
        select: Option<&[Selector]>,
        viewer: Viewer,
    ) -> Result<EntryId> {
        let table = self.table.borrow();
        let of_device = |entry: &&Entry| entry.key.device == device && entry.key.form == Form::of(device);
        let found = table.entries.values().rev().filter(of_device).find(|entry| {
            entry.has_digest(digest) && entry.key.select.as_deref() == select && entry.seen_by(viewer)
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
        let same = table.entries.get(&id).map(|entry| (entry.origin.clone(), entry.key.clone()));
        if let Some((origin, key)) = same {
            let (origin, select) = (origin.as_deref(), key.select.as_deref());
            let before = table.entries.range_mut(..id).map(|(_, entry)| entry);
            for old in before {
                let replaced = old.came_from(origin, key.device, select);
                let of_old_files = old.came_down_from(origin) && old.key.identity != key.identity;
                old.stale |= replaced || of_old_files;
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
        self.nudge();
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

    /// Evicts what is stale and has no lease left.
    pub fn sweep(&self) {
        let mut table = self.table.borrow_mut();
        let stale = table.entries.values().filter(|entry| entry.stale && entry.idle()).map(|entry| entry.id);
        for id in stale.collect::<Vec<_>>() {
            self.let_go(table.evict(id, Eviction::Stale));
        }
        drop(table);
        for parted in self.parting.take() {
            self.let_go(Some(parted));
        }
    }

    /// A process was sent the descriptor of an entry's memory on a GPU.
    pub fn imported(&self, id: EntryId, importer: &Importer) {
        if let Some(entry) = self.table.borrow_mut().entries.get_mut(&id) {
            entry.importers.push(Arc::clone(importer));
        }
    }

    /// A process has let go of one of its mappings of an entry's memory.
    pub fn let_go_of(&self, id: EntryId, importer: &Importer) {
        if let Some(entry) = self.table.borrow_mut().entries.get_mut(&id) {
            let place = entry.importers.iter().position(|other| Arc::ptr_eq(other, importer));
            place.map(|place| entry.importers.swap_remove(place));
        }
    }

    /// An entry was found to hold wrong bytes: nobody finds it any more, and it goes with its last lease.
    pub fn condemn(&self, id: EntryId) {
        self.disown(id);
        if let Some(entry) = self.table.borrow_mut().entries.get_mut(&id) {
            entry.stale = true;
        }
    }

    /// The memory of a GPU had an error: what is resident there may be wrong, and is not handed out any more.
    pub fn doubt(&self, index: usize) {
        let table = self.table.borrow();
        let here = table.entries.values().filter(|entry| entry.key.device == DeviceId::Gpu(index));
        let resident: Vec<_> = here.filter(|entry| entry.state.is_resident()).map(|entry| entry.id).collect();
        drop(table);
        tracing::warn!(
            device = self.device_name(DeviceId::Gpu(index)),
            artifacts = resident.len(),
            "resident copies dropped"
        );
        resident.into_iter().for_each(|id| self.condemn(id));
        self.sweep();
    }

    /// The memory of a GPU is lost, with all that was resident there: nobody finds it any more.
    pub fn lose(&self, index: usize) {
        let Some(gpu) = self.gpus.get(index) else { return };
        if gpu.lose() {
            tracing::error!(device = gpu.name(), "device lost: what was resident there is forgotten");
            self.losses.notify_one();
        }
        let mut table = self.table.borrow_mut();
        let here = table.entries.values().filter(|entry| entry.key.device == DeviceId::Gpu(index));
        let resident = here.filter(|entry| entry.state.is_resident()).map(|entry| entry.id);
        for id in resident.collect::<Vec<_>>() {
            self.let_go(table.evict(id, Eviction::Lost));
        }
    }

    /// Gives memory back, unless a reply that names it is still on its way: then at the next occasion.
    fn let_go(&self, parted: Option<Parted>) {
        let Some(Parted { device, content, importers }) = parted else { return };
        match Arc::try_unwrap(content) {
            Ok(Content { region: Region::Host(parts), offered, .. }) => {
                // Whoever still sends of it lets go after the chunk that it is at; until then it counts as held.
                drop(offered);
                self.host.release(parts);
            }
            Ok(Content { region: Region::Gpu(memory), .. }) => {
                if let DeviceId::Gpu(index) = device
                    && let Some(gpu) = self.gpus.get(index)
                {
                    gpu.release(memory, importers);
                }
            }
            Err(content) => self.parting.borrow_mut().push(Parted { device, content, importers }),
        }
    }

    /// Waits until a device is lost. Says so to one who waits, also if it begins to wait later.
    pub async fn lost_one(&self) {
        self.losses.notified().await;
    }

    /// Bytes that went from GPUs to the host tier since the last call, for the metrics.
    pub fn take_demoted(&self) -> u64 {
        self.demoted.take()
    }

    /// What was evicted since the last call, for the metrics.
    pub fn take_evictions(&self) -> Vec<(DeviceId, Eviction)> {
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
    /// The entry for `key`. A digest also finds what was loaded from files and turned out to have it.
    fn find(&self, key: &Key) -> Option<EntryId> {
        let known = self.by_key.get(key).copied();
        let Identity::Digest(digest) = &key.identity else { return known };
        known.or_else(|| {
            let same = |entry: &&Entry| {
                let Key { device, select, form, .. } = &entry.key;
                (device, select, form) == (&key.device, &key.select, &key.form)
            };
            let mut newest = self.entries.values().rev().filter(same).filter(|entry| !entry.stale);
            newest.find(|entry| entry.has_digest(digest)).map(|entry| entry.id)
        })
    }

    fn remove(&mut self, id: EntryId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        // A newer entry may have the key by now.
        if self.by_key.get(&entry.key) == Some(&id) {
            self.by_key.remove(&entry.key);
        }
        Some(entry)
    }

    fn evict(&mut self, id: EntryId, why: Eviction) -> Option<Parted> {
        let Entry { key, state, source, bytes, importers, .. } = self.remove(id)?;
        let State::Resident(content) = state else { return None };
        self.evictions.push((key.device, why));
        tracing::info!(source, bytes, why = why.as_str(), "evicted");
        Some(Parted { device: key.device, content, importers })
    }
}

impl Entry {
    fn idle(&self) -> bool {
        let State::Resident(content) = &self.state else { return false };
        // A chunk that is being sent to a peer keeps the memory for a moment.
        let sent = content.offered.as_ref().is_some_and(|offered| offered.offer().users() > 0);
        self.leases == 0 && !sent
    }

    fn came_from(&self, origin: Option<&str>, device: DeviceId, select: Option<&[Selector]>) -> bool {
        origin.is_some()
            && self.origin.as_deref() == origin
            && self.key.device == device
            && self.key.form == Form::of(device)
            && self.key.select.as_deref() == select
    }

    /// Whether it is on the host tier, has left a GPU, and was loaded from this path.
    fn came_down_from(&self, origin: Option<&str>) -> bool {
        let below = self.key.device == DeviceId::Host && self.key.form == Form::Packed;
        below && origin.is_some() && self.origin.as_deref() == origin
    }

    fn has_digest(&self, digest: &str) -> bool {
        matches!(&self.state, State::Resident(content) if content.digest() == Some(digest))
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
