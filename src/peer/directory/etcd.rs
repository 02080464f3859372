//! The thread that keeps the table of `table.rs` equal to what is in etcd, and etcd equal to what this node announces.
//!
//! One connection to one endpoint at a time; whatever goes wrong ends it, and the next endpoint is tried after a pause that grows. What
//! outlives a connection is the lease and the place in etcd's history ([`Known`]). A lease that can still be renewed proves that it is the
//! same etcd with the same history: what was registered stands, and the watch goes on where it was. If it cannot, everything is listed and
//! registered anew. A watch whose place has been compacted away is listed anew under the same lease.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, GetOptions, Identity, KeyValue, LeaseKeepAliveStream, LeaseKeeper,
    PutOptions, TlsOptions, Txn, TxnOp, WatchOptions, WatchResponse, WatchStream,
};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

use super::entry::{Entry, parse_key};
use super::table::{Shared, Table, Write};
use super::{Address, Error};
use crate::config;
use crate::error::Code;

/// Pause before the second attempt to connect; it doubles with each.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause, and how long a connection must have held for the next pause to be the shortest again.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Keys that are asked for at a time: with honest values some 100 KB, well below the 4 MiB of one answer.
const PAGE_MAX: i64 = 512;
/// Keys that are looked at below the prefix. There is room for half as many of them.
const LISTED_MAX: usize = 1 << 18;
/// Keys written in one transaction: half of what etcd allows.
const WRITES_MAX: usize = 64;
/// Length of a password file or of a file of certificates, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// A lease is renewed this many times in its time.
const RENEWALS: u32 = 3;

/// gRPC status codes (the numbers of the specification).
mod status {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNAVAILABLE: i32 = 14;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// The connection to etcd, kept by a thread of its own.
#[derive(Debug)]
pub(super) struct Etcd {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Etcd {
    pub(super) fn start(config: &config::Etcd, node: &str, address: Address) -> Result<Etcd, Error> {
        let shared = Arc::new(Shared::new());
        let link = Link {
            artifacts: format!("{}/artifacts/", config.prefix),
            timeout: Duration::from_millis(config.timeout_ms),
            config: config.clone(),
            node: node.to_owned(),
            address,
            shared: Arc::clone(&shared),
        };
        // What is wrong from the beginning is an error of the start; later it is one of the connection.
        link.options()?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Start)?;
        let (stop, stopped) = watch::channel(false);
        let thread = thread::Builder::new().name("directory".to_owned()).spawn(move || {
            let end = Ended(Arc::clone(&link.shared));
            runtime.block_on(link.run(stopped));
            // A name that is still being resolved is not waited for.
            runtime.shutdown_background();
            drop(end);
        });
        Ok(Etcd { shared, stop, thread: Some(thread.map_err(Error::Start)?) })
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // Its panic, if there was one, has been reported; nothing here depends on it.
            drop(thread.join());
        }
    }
}

/// However the thread ends, nobody takes the table for up to date afterwards.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.lost(Code::Internal);
    }
}

/// What outlives a connection.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// What this node's keys live under.
    lease: i64,
    /// The first revision that may not be in the table; `None`: it has to be listed anew.
    next: Option<i64>,
}

struct Link {
    config: config::Etcd,
    node: String,
    address: Address,
    shared: Arc<Shared>,
    /// What all keys begin with.
    artifacts: String,
    timeout: Duration,
}

impl Link {
    async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut known = None;
        let mut pause = PAUSE_MIN;
        // Nodes that start together do not all go to the same endpoint.
        let mut endpoint = random(u64::MAX);
        loop {
            let begin = Instant::now();
            let end = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                end = self.keep(endpoint, &mut known) => end,
            };
            let Err(error) = end;
            if matches!(error, Error::LeaseLost) {
                known = None;
            }
            tracing::warn!(code = %error.code(), %error, "the directory is not connected to etcd");
            self.shared.lost(error.code());
            endpoint = endpoint.wrapping_add(1);
            pause = if begin.elapsed() >= PAUSE_MAX { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
            // Nodes that lost etcd together do not come back together.
            let jittered = pause / 2
                + Duration::from_millis(random(u64::try_from(pause.as_millis()).unwrap_or(0) / 2 + 1));
            let stopped = timeout(jittered, stop.wait_for(|stop| *stop)).await.is_ok();
            if stopped {
                break;
            }
        }
        if let Some(Known { lease, .. }) = known
            && self.shared.status().connected
        {
            // If it cannot be said, the lease's end says it.
            drop(timeout(self.timeout, self.leave(endpoint, lease)).await);
        }
    }

    async fn leave(&self, endpoint: u64, lease: i64) -> Result<(), Error> {
        let mut client = self.connect(endpoint).await?;
        self.call(client.lease_revoke(lease)).await?;
        Ok(())
    }

    /// Keeps the table and etcd equal until that fails.
    async fn keep(&self, endpoint: u64, known: &mut Option<Known>) -> Result<Infallible, Error> {
        let mut client = self.connect(endpoint).await?;
        let mut lease = match *known {
            Some(Known { lease, .. }) => self.renewal(&mut client, lease).await?,
            None => {
                let granted = self.call(client.lease_grant(self.ttl(), None)).await?;
                self.shared.forget_written();
                *known = Some(Known { lease: granted.id(), next: None });
                self.renewal(&mut client, granted.id()).await?
            }
        };
        let Some(known) = known else { return Err(Error::LeaseLost) };
        let mut events = self.watch(&mut client, known).await?;
        tracing::info!(endpoint = %self.endpoint(endpoint), "the directory is connected to etcd");
        self.shared.connected();
        let mut ticks = interval(Duration::from_secs(self.config.ttl_s) / RENEWALS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = events.message() => match message {
                    Err(error) if is_too_long(&error) => {
                        // Asked for again, it would come again. The listing goes around it.
                        known.next = None;
                        return Err(meaning(error));
                    }
                    Err(error) => return Err(meaning(error)),
                    Ok(None) => return Err(ended()),
                    Ok(Some(message)) if message.compact_revision() > 0 => {
                        known.next = None;
                        events = self.watch(&mut client, known).await?;
                    }
                    Ok(Some(message)) if message.canceled() => {
                        return Err(Error::BadAnswer(crate::json::shown(message.cancel_reason())));
                    }
                    Ok(Some(message)) => known.next = self.take_in(&message).max(known.next),
                },
                answer = lease.answer() => answer?,
                _ = ticks.tick() => {
                    lease.renew(self).await?;
                    self.shared.progress_is_due();
                }
                () = self.shared.changed.notified() => {}
            }
            self.write(&mut client, known.lease).await?;
        }
    }

    fn endpoint(&self, number: u64) -> &str {
        let endpoints = &self.config.endpoints;
        let count = u64::try_from(endpoints.len()).unwrap_or(1).max(1);
        let at = usize::try_from(number % count).unwrap_or(0);
        endpoints.get(at).map_or("", String::as_str)
    }

    fn ttl(&self) -> i64 {
        i64::try_from(self.config.ttl_s).unwrap_or(i64::MAX)
    }

    /// Reads the files anew each time: they are replaced when they are about to expire.
    fn options(&self) -> Result<ConnectOptions, Error> {
        let config::Etcd { ca, certificate, key, user, password_file, .. } = &self.config;
        let mut options = ConnectOptions::new().with_connect_timeout(self.timeout).with_require_leader(true);
        if let Some(ca) = ca {
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca)?));
            if let (Some(certificate), Some(key)) = (certificate, key) {
                tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            options = options.with_tls(tls);
        }
        if let (Some(user), Some(path)) = (user, password_file) {
            let password = String::from_utf8(read(path)?).map_err(|error| Error::Credentials {
                path: path.clone(),
                source: std::io::Error::new(std::io::ErrorKind::InvalidData, error),
            })?;
            options = options.with_user(user, password.trim_end_matches(['\r', '\n']));
        }
        Ok(options)
    }

    async fn connect(&self, endpoint: u64) -> Result<Client, Error> {
        let options = self.options()?;
        // With a user this asks etcd; without one nothing is sent yet.
        self.call(Client::connect([self.endpoint(endpoint)], Some(options))).await
    }

    /// One request, which must be answered in time.
    async fn call<T>(
        &self,
        request: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Error> {
        match timeout(self.timeout, request).await {
            Ok(answer) => answer.map_err(meaning),
            Err(_) => Err(Error::Timeout(self.timeout)),
        }
    }

    /// The stream on which this lease is renewed; it has been, once.
    async fn renewal(&self, client: &mut Client, id: i64) -> Result<Lease, Error> {
        let begun = timeout(self.timeout, client.lease_keep_alive(id)).await;
        let (keeper, answers) = match begun.map_err(|_| Error::Timeout(self.timeout))? {
            // What the client makes of an answer that there is no such lease.
            Err(etcd_client::Error::LeaseKeepAliveError(_)) => return Err(Error::LeaseLost),
            begun => begun.map_err(meaning)?,
        };
        Ok(Lease { keeper, answers, overdue: None })
    }

    /// Reads everything below the prefix; from which revision on changes are to be watched.
    ///
    /// Pages are of different moments. All changes since the first are seen again by the watch, in their order, so that the table is
    /// right when it has caught up.
    async fn list(&self, client: &mut Client) -> Result<i64, Error> {
        let (mut table, mut own, mut refused, mut listed) = (Table::default(), BTreeSet::new(), 0, 0_usize);
        let end = after_prefix(self.artifacts.as_bytes());
        let mut from = self.artifacts.clone().into_bytes();
        let (mut page, mut next) = (PAGE_MAX, None);
        while listed < LISTED_MAX {
            let options = GetOptions::new().with_range(end.clone()).with_limit(page);
            let answer = match timeout(self.timeout, client.get(from.clone(), Some(options))).await {
                Err(_) => return Err(Error::Timeout(self.timeout)),
                Ok(Err(error)) if page > 1 && is_too_long(&error) => {
                    page /= 2;
                    continue;
                }
                // One value alone is longer than an answer may be.
                Ok(Err(error)) if is_too_long(&error) => {
                    let options = GetOptions::new().with_range(end.clone()).with_limit(1).with_keys_only();
                    refused += 1;
                    self.call(client.get(from.clone(), Some(options))).await?
                }
                Ok(answer) => {
                    let answer = answer.map_err(meaning)?;
                    page = (page * 2).min(PAGE_MAX);
                    for pair in answer.kvs() {
                        match self.read(pair) {
                            Some(Read::Own(digest)) => drop(own.insert(digest.to_owned())),
                            Some(Read::Other(digest, node, Some(entry))) => {
                                refused += u64::from(!table.insert(digest, node, entry));
                            }
                            Some(Read::Other(_, _, None)) | None => refused += 1,
                        }
                    }
                    answer
                }
            };
            let revision = answer.header().map_or(0, |header| header.revision());
            next.get_or_insert(revision.saturating_add(1));
            listed += answer.kvs().len();
            match answer.kvs().last().filter(|_| answer.more()) {
                Some(last) => from = [last.key(), &[0]].concat(),
                None => break,
            }
        }
        if listed >= LISTED_MAX {
            tracing::warn!(listed, "there are more keys in etcd than are looked at");
        }
        self.shared.replace(table, &own, refused);
        Ok(next.unwrap_or(1))
    }

    /// Watches from where the table ends; lists first if that is not known.
    async fn watch(&self, client: &mut Client, known: &mut Known) -> Result<WatchStream, Error> {
        let from = match known.next {
            Some(next) => next,
            None => self.list(client).await?,
        };
        known.next = Some(from);
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        // Progress is told now and then where nothing happens, so that the place in the history does not grow old. Fragments: what was
        // changed at once comes in messages of a length that is taken.
        let options = options.with_progress_notify().with_fragment();
        let mut events = self.call(client.watch(self.artifacts.as_str(), Some(options))).await?;
        let created = self.call(events.message()).await?.ok_or_else(ended)?;
        if created.created() && !created.canceled() {
            Ok(events)
        } else {
            Err(Error::BadAnswer(crate::json::shown(created.cancel_reason())))
        }
    }

    /// Events of a watch; from where to go on after them.
    fn take_in(&self, message: &WatchResponse) -> Option<i64> {
        let mut next = None;
        for event in message.events() {
            let Some(pair) = event.kv() else { continue };
            // This revision again: the rest of it may be in a message that does not come.
            next = next.max(Some(pair.mod_revision()));
            let removed = pair.version() == 0;
            match self.read(pair) {
                Some(Read::Own(digest)) if removed => self.shared.own_removed(digest),
                Some(Read::Other(digest, node, _)) if removed => self.shared.other_removed(digest, node),
                Some(Read::Own(_)) => {}
                Some(Read::Other(digest, node, entry)) => self.shared.other_wrote(digest, node, entry),
                None if removed => {}
                None => self.shared.refuse(),
            }
        }
        if message.events().is_empty() { Some(message.header()?.revision().saturating_add(1)) } else { next }
    }

    /// What a pair means to this node; `None`: its key is none. A removed one has no value, and so no entry.
    fn read<'a>(&self, pair: &'a KeyValue) -> Option<Read<'a>> {
        let key = pair.key().strip_prefix(self.artifacts.as_bytes()).unwrap_or_default();
        let (digest, node) = match parse_key(key) {
            Ok(parts) => parts,
            Err(reason) => {
                tracing::debug!(%reason, key = %shown(pair.key()), "a key in etcd is ignored");
                return None;
            }
        };
        let entry = match Entry::parse(pair.value()) {
            Ok(entry) => Some(entry),
            Err(_) if pair.version() == 0 => None,
            Err(reason) => {
                tracing::debug!(%reason, key = %shown(pair.key()), "a value in etcd is ignored");
                None
            }
        };
        if node != self.node {
            return Some(Read::Other(digest, node, entry));
        }
        // Not fought over: the two would write against each other as fast as etcd can.
        if entry.is_some_and(|entry| entry.address != self.address) {
            tracing::warn!(node, digest, "another daemon has written in etcd under the name of this node");
        }
        Some(Read::Own(digest))
    }

    /// Writes some of what is due.
    async fn write(&self, client: &mut Client, lease: i64) -> Result<(), Error> {
        let writes = self.shared.take(WRITES_MAX);
        if writes.is_empty() {
            return Ok(());
        }
        let operations: Result<Vec<_>, _> = writes.iter().map(|write| self.operation(write, lease)).collect();
        let written = match operations {
            Ok(operations) => self.call(client.txn(Txn::new().and_then(operations))).await.map(drop),
            Err(error) => Err(Error::BadAnswer(error.to_string())),
        };
        if let Err(error) = written {
            self.shared.give_back(writes);
            return Err(error);
        }
        self.shared.wrote(&writes);
        if self.shared.has_due() {
            // After the events and the lease have had their turn.
            self.shared.changed.notify_one();
        }
        Ok(())
    }

    fn operation(&self, (digest, holding): &Write, lease: i64) -> Result<TxnOp, serde_json::Error> {
        let key = format!("{}{digest}/{}", self.artifacts, self.node);
        let Some(holding) = *holding else { return Ok(TxnOp::delete(key, None)) };
        let value = Entry { address: self.address.clone(), holding }.to_json()?;
        Ok(TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease))))
    }
}

/// What a key and a value mean.
enum Read<'a> {
    /// Under the name of this node: the digest.
    Own(&'a str),
    /// Digest, node, and the entry if it is one.
    Other(&'a str, &'a str, Option<Entry>),
}

/// A lease that is being renewed.
struct Lease {
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
    /// When the answer to the last renewal should be there.
    overdue: Option<(Instant, Duration)>,
}

impl Lease {
    /// Asks for a renewal.
    async fn renew(&mut self, link: &Link) -> Result<(), Error> {
        link.call(self.keeper.keep_alive()).await?;
        // An earlier one without an answer keeps its time.
        self.overdue.get_or_insert((Instant::now() + link.timeout, link.timeout));
        Ok(())
    }

    /// Waits for the answer to a renewal, as long as it may take.
    async fn answer(&mut self) -> Result<(), Error> {
        let message = self.answers.message();
        let answer = match self.overdue {
            Some((time, limit)) => timeout_at(time, message).await.map_err(|_| Error::Timeout(limit))?,
            None => message.await,
        };
        let answer = answer.map_err(|error| Error::Unreachable(chain(&error)))?.ok_or_else(ended)?;
        self.overdue = None;
        if answer.ttl() > 0 { Ok(()) } else { Err(Error::LeaseLost) }
    }
}

/// What an error of the client means.
fn meaning(error: etcd_client::Error) -> Error {
    let etcd_client::Error::GRpcStatus(status) = &error else {
        return Error::Unreachable(chain(&error));
    };
    let said = crate::json::shown(status.message());
    match i32::from(status.code()) {
        status::NOT_FOUND => Error::LeaseLost,
        status::PERMISSION_DENIED | status::UNAUTHENTICATED => Error::Denied(said),
        // In answer to requests that are in order, etcd has these for: no user, a wrong password, no authentication.
        status::INVALID_ARGUMENT | status::FAILED_PRECONDITION => Error::Denied(said),
        status::UNAVAILABLE => Error::Unreachable(chain(status)),
        // Of the connection: one that broke has no code of etcd.
        _ if std::error::Error::source(status).is_some() => Error::Unreachable(chain(status)),
        _ => Error::BadAnswer(said),
    }
}

fn ended() -> Error {
    Error::Unreachable("the connection has ended".to_owned())
}

/// Whether an answer was not taken because it is longer than answers may be: `OUT_OF_RANGE`, which a request for a range has for nothing
/// else unless it names a revision.
fn is_too_long(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if i32::from(status.code()) == status::OUT_OF_RANGE)
}

/// The first key after all those that begin with `prefix`, which ends in a slash.
fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let credentials = |source| Error::Credentials { path: path.to_owned(), source };
    let length = fs::metadata(path).map_err(credentials)?.len();
    if length > FILE_BYTES_MAX {
        return Err(credentials(std::io::ErrorKind::FileTooLarge.into()));
    }
    fs::read(path).map_err(credentials)
}

/// An error with its causes, which is where a TLS library says what it does not like.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    crate::json::shown(&text)
}

fn shown(key: &[u8]) -> String {
    crate::json::shown(&String::from_utf8_lossy(key))
}

/// Below `limit`. The standard library's seed of hash tables is random enough for telling nodes apart.
fn random(limit: u64) -> u64 {
    RandomState::new().hash_one(0) % limit.max(1)
}
