//! What is known of others, and what others are to know of this node. Everything here is in memory: whoever reads it waits for nobody
//! but another reader.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::Notify;

use super::entry::Entry;
use super::{Error, Holder, Holding, Status};
use crate::error::Code;

/// Entries of others that are kept: ten artifacts on ten thousand nodes. Less than 100 MB, whatever is in them.
const ENTRIES_MAX: usize = 1 << 17;
/// Artifacts that this node announces.
const ANNOUNCED_MAX: usize = 1 << 14;

/// What others have: by digest, by node.
#[derive(Debug, Default)]
pub(super) struct Table {
    artifacts: HashMap<String, BTreeMap<String, Entry>>,
    entries: usize,
}

impl Table {
    /// Takes an entry in, in the place of an earlier one of this node; false if there is no room.
    pub(super) fn insert(&mut self, digest: &str, node: &str, entry: Entry) -> bool {
        if let Some(known) = self.artifacts.get_mut(digest).and_then(|nodes| nodes.get_mut(node)) {
            *known = entry;
            return true;
        }
        if self.entries >= ENTRIES_MAX {
            return false;
        }
        self.artifacts.entry(digest.to_owned()).or_default().insert(node.to_owned(), entry);
        self.entries += 1;
        true
    }

    pub(super) fn remove(&mut self, digest: &str, node: &str) {
        let Some(nodes) = self.artifacts.get_mut(digest) else { return };
        if nodes.remove(node).is_some() {
            self.entries -= 1;
        }
        if nodes.is_empty() {
            self.artifacts.remove(digest);
        }
    }
}

/// What this node wants to be known, and what of it is still to be written.
///
/// `due` and `later` hold only digests of `wanted` and of `written`, so that they stay small however long etcd is away.
#[derive(Debug, Default)]
struct Own {
    wanted: BTreeMap<String, Holding>,
    /// Keys that may stand in etcd.
    written: BTreeSet<String>,
    /// To be written or removed now.
    due: BTreeSet<String>,
    /// To be written with the next renewal of the lease: more of the same artifact.
    later: BTreeSet<String>,
}

impl Own {
    /// The keys of these artifacts, and no others, stand in etcd: those that should not are removed, those that are missing written.
    fn stand(&mut self, listed: &BTreeSet<String>) {
        self.written.extend(listed.iter().cloned());
        self.due.extend(listed.iter().filter(|digest| !self.wanted.contains_key(*digest)).cloned());
        self.due.extend(self.wanted.keys().filter(|digest| !listed.contains(*digest)).cloned());
    }
}

#[derive(Debug)]
struct Inner {
    others: Table,
    own: Own,
    connected: bool,
    /// When it became so.
    since: SystemTime,
    /// Since when the table is not kept up to date.
    lost: Option<Instant>,
    last_error: Option<Code>,
    refused: u64,
}

/// What the thread that talks to etcd shares with everybody else.
#[derive(Debug)]
pub(super) struct Shared {
    inner: Mutex<Inner>,
    /// There is something to write.
    pub(super) changed: Notify,
}

/// One key of this node: what to write, or `None` to remove it.
pub(super) type Write = (String, Option<Holding>);

impl Shared {
    pub(super) fn new() -> Shared {
        Shared {
            inner: Mutex::new(Inner {
                others: Table::default(),
                own: Own::default(),
                connected: false,
                since: SystemTime::now(),
                lost: Some(Instant::now()),
                last_error: None,
                refused: 0,
            }),
            changed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn holders(&self, digest: &str) -> Vec<Holder> {
        let inner = self.lock();
        let age = inner.lost.map(|lost| lost.elapsed());
        let nodes = inner.others.artifacts.get(digest).into_iter().flatten();
        nodes
            .map(|(node, entry)| Holder {
                node: Some(node.clone()),
                address: entry.address.clone(),
                holding: Some(entry.holding),
                age,
            })
            .collect()
    }

    pub(super) fn status(&self) -> Status {
        let inner = self.lock();
        Status {
            backend: "etcd",
            connected: inner.connected,
            since: inner.since,
            entries: inner.others.entries,
            announced: inner.own.wanted.len(),
            refused: inner.refused,
            last_error: inner.last_error,
        }
    }

    /// This node has, or is loading, an artifact.
    pub(super) fn announce(&self, digest: &str, holding: Holding) -> Result<(), Error> {
        let mut inner = self.lock();
        let own = &mut inner.own;
        let before = own.wanted.get(digest);
        if before.is_none() && own.wanted.len() >= ANNOUNCED_MAX {
            return Err(Error::TooMany { limit: ANNOUNCED_MAX });
        }
        if before == Some(&holding) {
            return Ok(());
        }
        let more_of_the_same =
            before.is_some_and(|before| Holding { chunks: holding.chunks, ..*before } == holding);
        own.wanted.insert(digest.to_owned(), holding);
        if more_of_the_same {
            own.later.insert(digest.to_owned());
            return Ok(());
        }
        own.due.insert(digest.to_owned());
        drop(inner);
        self.changed.notify_one();
        Ok(())
    }

    /// This node has it no longer.
    pub(super) fn withdraw(&self, digest: &str) {
        let mut inner = self.lock();
        let own = &mut inner.own;
        own.wanted.remove(digest);
        own.later.remove(digest);
        if own.written.contains(digest) {
            own.due.insert(digest.to_owned());
        } else {
            own.due.remove(digest);
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// The lease is gone, and with it all that was written under it: everything is to be written again.
    pub(super) fn forget_written(&self) {
        let mut inner = self.lock();
        let own = &mut inner.own;
        own.written.clear();
        own.later.clear();
        own.due = own.wanted.keys().cloned().collect();
    }

    /// What progress there is becomes due.
    pub(super) fn progress_is_due(&self) {
        let mut inner = self.lock();
        let later = std::mem::take(&mut inner.own.later);
        inner.own.due.extend(later);
    }

    /// At most `most` of what is to be written. What could not be is handed to [`Shared::give_back`].
    pub(super) fn take(&self, most: usize) -> Vec<Write> {
        let mut inner = self.lock();
        let own = &mut inner.own;
        let mut writes = Vec::new();
        while writes.len() < most
            && let Some(digest) = own.due.pop_first()
        {
            own.later.remove(&digest);
            // Noted before it is known: a request without an answer may have been carried out.
            own.written.insert(digest.clone());
            let holding = own.wanted.get(&digest).copied();
            writes.push((digest, holding));
        }
        writes
    }

    /// Whether there is more to [`take`](Shared::take).
    pub(super) fn has_due(&self) -> bool {
        !self.lock().own.due.is_empty()
    }

    /// These were not written, or it is not known.
    pub(super) fn give_back(&self, writes: Vec<Write>) {
        self.lock().own.due.extend(writes.into_iter().map(|(digest, _)| digest));
    }

    /// These were written.
    pub(super) fn wrote(&self, writes: &[Write]) {
        let mut inner = self.lock();
        for (digest, _) in writes.iter().filter(|(_, holding)| holding.is_none()) {
            inner.own.written.remove(digest);
        }
    }

    /// The table as it was listed anew, with the own keys that stand in etcd.
    pub(super) fn replace(&self, others: Table, own: &BTreeSet<String>, refused: u64) {
        let mut inner = self.lock();
        inner.own.stand(own);
        inner.refused += refused;
        let before = std::mem::replace(&mut inner.others, others);
        drop(inner);
        // A large table takes a while to free: not while others wait for the lock.
        drop(before);
    }

    /// Another node wrote something; `None`: nothing that can be used.
    pub(super) fn other_wrote(&self, digest: &str, node: &str, entry: Option<Entry>) {
        let mut inner = self.lock();
        let taken = match entry {
            Some(entry) => inner.others.insert(digest, node, entry),
            None => false,
        };
        if !taken {
            inner.others.remove(digest, node);
            inner.refused += 1;
        }
    }

    /// A key that is none: nothing but a count comes of it.
    pub(super) fn refuse(&self) {
        self.lock().refused += 1;
    }

    /// Another node removed its key, or its lease ended.
    pub(super) fn other_removed(&self, digest: &str, node: &str) {
        self.lock().others.remove(digest, node);
    }

    /// A key of this node was removed: by this node, or by somebody else, and then it is written again.
    pub(super) fn own_removed(&self, digest: &str) {
        let mut inner = self.lock();
        if inner.own.wanted.contains_key(digest) {
            inner.own.due.insert(digest.to_owned());
            drop(inner);
            self.changed.notify_one();
        }
    }

    /// The table is up to date from now on.
    pub(super) fn connected(&self) {
        let mut inner = self.lock();
        inner.connected = true;
        inner.since = SystemTime::now();
        inner.lost = None;
    }

    /// The table is kept as it is, and grows old.
    pub(super) fn lost(&self, code: Code) {
        let mut inner = self.lock();
        inner.last_error = Some(code);
        if inner.connected {
            inner.connected = false;
            inner.since = SystemTime::now();
            inner.lost = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Address, State, Tier};
    use super::*;

    const LOADING: Holding = Holding { state: State::Loading, tier: Tier::Host, chunks: 1, rank: 5 };

    fn entry(chunks: u64) -> Entry {
        Entry { address: Address::parse("a:1").unwrap(), holding: Holding { chunks, ..LOADING } }
    }

    fn taken(shared: &Shared) -> Vec<Write> {
        let writes = shared.take(100);
        shared.wrote(&writes);
        writes
    }

    #[test]
    fn what_is_announced_is_written_once_and_progress_later() {
        let shared = Shared::new();
        shared.announce("d", LOADING).unwrap();
        shared.announce("d", LOADING).unwrap();
        assert_eq!(taken(&shared), [("d".to_owned(), Some(LOADING))]);
        let more = Holding { chunks: 9, ..LOADING };
        shared.announce("d", more).unwrap();
        assert_eq!(taken(&shared), []);
        shared.progress_is_due();
        assert_eq!(taken(&shared), [("d".to_owned(), Some(more))]);
        let complete = Holding { state: State::Complete, ..more };
        shared.announce("d", complete).unwrap();
        assert_eq!(taken(&shared), [("d".to_owned(), Some(complete))]);
        shared.progress_is_due();
        assert_eq!(taken(&shared), []);
    }

    #[test]
    fn what_was_never_written_is_not_removed_and_what_may_have_been_is() {
        let shared = Shared::new();
        shared.announce("d", LOADING).unwrap();
        shared.withdraw("d");
        assert_eq!(taken(&shared), []);
        shared.announce("d", LOADING).unwrap();
        let lost = shared.take(100);
        shared.give_back(lost);
        shared.withdraw("d");
        assert_eq!(taken(&shared), [("d".to_owned(), None)]);
        shared.withdraw("d");
        assert_eq!(taken(&shared), []);
    }

    #[test]
    fn a_lost_lease_writes_all_anew_and_strangers_under_this_name_are_removed() {
        let shared = Shared::new();
        shared.announce("d", LOADING).unwrap();
        taken(&shared);
        shared.forget_written();
        shared.replace(Table::default(), &["d", "old"].map(str::to_owned).into(), 0);
        assert_eq!(taken(&shared), [("d".to_owned(), Some(LOADING)), ("old".to_owned(), None)]);
        shared.own_removed("d");
        shared.own_removed("old");
        assert_eq!(taken(&shared), [("d".to_owned(), Some(LOADING))]);
        shared.replace(Table::default(), &BTreeSet::new(), 0);
        assert_eq!(taken(&shared), [("d".to_owned(), Some(LOADING))], "somebody removed it unseen");
    }

    #[test]
    fn limits_hold_and_say_so() {
        let shared = Shared::new();
        for at in 0..ANNOUNCED_MAX {
            shared.announce(&at.to_string(), LOADING).unwrap();
        }
        assert!(matches!(shared.announce("one more", LOADING), Err(Error::TooMany { .. })));
        shared.announce("0", Holding { chunks: 2, ..LOADING }).unwrap();
        let mut table = Table::default();
        for at in 0..ENTRIES_MAX {
            assert!(table.insert("d", &at.to_string(), entry(1)));
        }
        assert!(!table.insert("d", "one more", entry(1)) && !table.insert("e", "0", entry(1)));
        assert!(table.insert("d", "0", entry(2)), "one that is known has its place");
        table.remove("d", "0");
        table.remove("d", "0");
        table.remove("nothing", "0");
        assert!(table.insert("e", "0", entry(1)) && !table.insert("e", "1", entry(1)));
    }

    #[test]
    fn rubbish_in_the_place_of_an_entry_takes_it_away() {
        let shared = Shared::new();
        shared.other_wrote("d", "a", Some(entry(3)));
        assert_eq!(shared.holders("d")[0].holding.unwrap().chunks, 3);
        shared.other_wrote("d", "a", None);
        assert_eq!((shared.holders("d"), shared.status().refused), (Vec::new(), 1));
        assert_eq!(shared.status().entries, 0);
    }
}
