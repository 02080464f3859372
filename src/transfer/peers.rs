//! Peers, as jobs see them: who may have an artifact, from whom it is brought, and what of it is given on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Job;
use super::load::{Prepared, blocking};
use crate::api::methods::{DirectoryStatus, PeerStatus, PeersReply};
use crate::catalog::manifest::Manifest;
use crate::config::Config;
use crate::error::{Code, Error, Result};
use crate::json::shown;
use crate::peer::client::{Dialer, Session};
use crate::peer::directory::{Address, Directory};
use crate::peer::fetch::{Chosen, Fetch};
use crate::peer::offer::{Offer, Offers};
use crate::peer::offered::Offered;
use crate::peer::protocol::{Digest, Have, Rank, State};
use crate::peer::server::{Counters, Server};
use crate::peer::tls::Credentials;
use crate::shard::Part;
use crate::sys::mem::{Memory, Sealed};
use crate::telemetry::metrics::{Metrics, PeerReadMetrics};

/// Peers that are asked what they have, for one job.
const CANDIDATES_MAX: usize = 64;
/// Peers that have all of an artifact and are asked for it at a time.
const ACTIVE_MAX: usize = 4;
/// After this time, and twice, four times as much and so on, it is looked again whether there is one to come behind.
const LOOK: Duration = Duration::from_millis(50);
/// Until so many times have passed.
const LOOKS_MAX: u32 = 16;
/// Peers whose counts are kept.
const KNOWN_MAX: usize = 4096;

/// What a URI begins with that names an artifact by its digest.
const SCHEME: &str = "peer://";

/// The digest that `peer://sha256:…` names; `None` for any other URI.
///
/// # Errors
/// `source.uri_invalid`.
pub fn digest(uri: &str) -> Option<Result<Digest>> {
    let text = uri.strip_prefix(SCHEME)?;
    Some(Digest::parse(text).ok_or_else(|| {
        let message = format!("'{}' is no digest: write peer://sha256: and 64 digits", shown(uri));
        Error::new(Code::SourceUriInvalid, message)
    }))
}

/// The way to and from peers. Belongs to the control thread.
#[derive(Debug)]
pub struct Peers {
    /// None: no peer is asked.
    dialer: Option<Arc<Dialer>>,
    /// None: no peer is served.
    served: Option<Served>,
    directory: Arc<Directory>,
    /// Connections to each peer that is asked.
    streams: usize,
    /// Peers are asked before files are read whose manifest is known.
    prefer: bool,
    /// A hash of this node's name.
    node: u64,
    reads: PeerReadMetrics,
    known: RefCell<BTreeMap<String, PeerStatus>>,
}

/// What peers are served with.
#[derive(Debug)]
struct Served {
    server: Server,
    offers: Arc<Offers>,
    counters: Arc<Counters>,
}

impl Peers {
    /// Nobody is asked and nobody is served.
    pub fn none(metrics: &Metrics) -> Peers {
        Peers {
            dialer: None,
            served: None,
            directory: Arc::new(Directory::of_peers(&[], None)),
            streams: 0,
            prefer: false,
            node: 0,
            reads: metrics.peer_reads(),
            known: RefCell::default(),
        }
    }

    /// As configured: serves peers from now on, if it is to.
    ///
    /// # Errors
    /// `peer.listen`, `peer.tls.credentials`, `directory.*`.
    pub fn start(config: &Config, metrics: &Metrics) -> Result<Peers> {
        let peer = &config.peer;
        let etcd = !config.etcd.endpoints.is_empty();
        let none = Peers::none(metrics);
        if peer.listen.is_none() && peer.peers.is_empty() && !etcd {
            return Ok(none);
        }
        let credentials = Credentials::load(peer)?;
        let served = match peer.listen {
            Some(_) => {
                let (offers, counters) = (Arc::<Offers>::default(), Arc::<Counters>::default());
                let (given, counted) = (Arc::clone(&offers), Arc::clone(&counters));
                let server = Server::start(config, Arc::clone(&credentials), given, counted)?;
                tracing::info!(address = %server.address(), "peers are served");
                Some(Served { server, offers, counters })
            }
            None => None,
        };
        let own = peer.advertise.as_deref().map(Address::parse).transpose()?;
        let directory = match own {
            Some(own) if etcd => Directory::etcd(&config.etcd, &config.node, own)?,
            own => {
                let listed: Result<Vec<_>, _> = peer.peers.iter().map(|peer| Address::parse(peer)).collect();
                Directory::of_peers(&listed?, own.as_ref())
            }
        };
        let mut hasher = DefaultHasher::new();
        config.node.hash(&mut hasher);
        Ok(Peers {
            dialer: Some(Arc::new(Dialer::new(config, credentials))),
            served,
            directory: Arc::new(directory),
            streams: peer.streams as usize,
            prefer: peer.prefer,
            node: hasher.finish(),
            ..none
        })
    }

    /// The manifest with this digest, from the first peer that has it.
    ///
    /// # Errors
    /// `peer.nobody`, or why the last one that was asked did not give it.
    pub async fn manifest(&self, digest: &str) -> Result<Arc<Manifest>> {
        let (Some(dialer), Some(parsed)) = (self.dialer.clone(), Digest::parse(digest)) else {
            return Err(crate::peer::nobody());
        };
        let addresses = addresses(&self.directory, digest);
        blocking(move || {
            let mut why = crate::peer::nobody();
            for address in addresses {
                let asked = dialer.connect(&address).and_then(|mut session| session.manifest(&parsed));
                match asked {
                    Ok(manifest) => return Ok(Arc::new(manifest)),
                    Err(error) => {
                        tracing::debug!(address, %error, "a peer gives no manifest");
                        why = error.into();
                    }
                }
            }
            Err(why)
        })
        .await
    }

    /// The way of what was prepared from peers, if they have it and are wanted.
    pub(super) async fn fetch(&self, job: &Job, prepared: &Prepared) -> Option<Fetch> {
        let manifest = prepared.known.as_ref().filter(|_| self.asks(prepared))?;
        let (dialer, digest) = (self.dialer.clone()?, Digest::parse(manifest.digest())?);
        let rank = self.rank(job);
        let chosen = survey(&dialer, addresses(&self.directory, manifest.digest()), digest, rank).await?;
        let fetch = Fetch::new(Arc::clone(manifest), rank, dialer, self.streams, chosen);
        *job.fetch.borrow_mut() = Some(fetch.clone());
        tokio::task::spawn_local(self.look_again(fetch.clone(), manifest, rank));
        Some(fetch)
    }

    /// Nodes that begin at the same time do not see each other yet. Whoever asks one that has everything looks again a few
    /// times whether it can come behind one that is loading.
    fn look_again(&self, fetch: Fetch, manifest: &Manifest, rank: Rank) -> impl Future<Output = ()> + use<> {
        let (dialer, digest) = (self.dialer.clone(), manifest.digest().to_owned());
        let (directory, parsed) = (Arc::clone(&self.directory), Digest::parse(manifest.digest()));
        async move {
            let (Some(dialer), Some(parsed)) = (dialer, parsed) else { return };
            let mut tick = tokio::time::interval(LOOK);
            tick.tick().await;
            for number in 1..=LOOKS_MAX {
                tick.tick().await;
                if fetch.settled() {
                    return;
                }
                // Ever more seldom.
                if !number.is_power_of_two() {
                    continue;
                }
                let addresses = addresses(&directory, &digest);
                let found = survey(&dialer, addresses, parsed, rank).await;
                if let Some(chosen) = found.filter(|chosen| chosen.chained) {
                    return fetch.ask_others(chosen);
                }
            }
        }
    }

    /// Counts what came of a fetch that has ended.
    pub(super) fn fetched(&self, fetch: &Fetch) {
        let mut known = self.known.borrow_mut();
        for share in fetch.shares() {
            self.reads.tcp_bytes.inc_by(share.bytes);
            self.reads.errors.inc_by(u64::from(share.left.is_some()));
            if known.len() >= KNOWN_MAX && !known.contains_key(&share.address) {
                continue;
            }
            let peer = known.entry(share.address.clone()).or_insert_with(|| PeerStatus {
                address: share.address,
                node: String::new(),
                bytes: 0,
                jobs: 0,
                left: 0,
                last_error: None,
            });
            peer.node = share.node;
            peer.bytes += share.bytes;
            peer.jobs += u64::from(share.bytes > 0);
            if let Some(error) = share.left {
                peer.left += 1;
                peer.last_error = Some(error.code.as_str().to_owned());
            }
        }
    }

    /// What the reply to `node.peers` says.
    pub fn status(&self) -> PeersReply {
        let directory = self.directory.status();
        let served = self.served.as_ref();
        let count = |of: fn(&Counters) -> &AtomicU64| {
            served.map_or(0, |served| of(&served.counters).load(Ordering::Relaxed))
        };
        PeersReply {
            listen: served.map(|served| served.server.address().to_string()),
            offers: served.map_or(0, |served| served.offers.count() as u32),
            connections: count(|counters| &counters.connections) as u32,
            sent_bytes: count(|counters| &counters.bytes),
            directory: DirectoryStatus {
                backend: directory.backend.to_owned(),
                connected: directory.connected,
                entries: directory.entries as u64,
                announced: directory.announced as u64,
                refused: directory.refused,
                last_error: directory.last_error.map(|code| code.as_str().to_owned()),
            },
            peers: self.known.borrow().values().cloned().collect(),
        }
    }

    /// Lets peers have what is being loaded, chunk by chunk, if its manifest is known and all of it comes.
    pub(super) fn offer_loading(&self, job: &Job, prepared: &Prepared, parts: &[Part]) -> Option<Offered> {
        let (manifest, layout) = (prepared.known.as_ref()?, prepared.layouts.first()?);
        let served = self.served.as_ref().filter(|_| layout.whole)?;
        let parts: Vec<&Memory> = parts.iter().map(|part| &*part.memory).collect();
        // What comes from files waits for no peer: everybody may wait for it.
        let rank = if self.asks(prepared) { self.rank(job) } else { Rank { started_ms: 0, node: self.node } };
        let offer = Offer::filling(manifest, &layout.files, &parts, rank);
        self.offered(offer, served, manifest.digest())
    }

    /// Lets peers have what is resident, whole.
    pub(super) fn offer(
        &self,
        manifest: &Manifest,
        files: &[Option<u64>],
        parts: &[Sealed],
    ) -> Option<Offered> {
        let served = self.served.as_ref()?;
        let parts: Vec<&Sealed> = parts.iter().collect();
        let offer = Offer::sealed(manifest, files, &parts, Rank { started_ms: 0, node: self.node });
        self.offered(offer, served, manifest.digest())
    }

    fn offered(
        &self,
        offer: Result<Offer, crate::peer::Error>,
        served: &Served,
        digest: &str,
    ) -> Option<Offered> {
        match offer {
            Ok(offer) => Some(Offered::new(offer, Arc::clone(&served.offers), Arc::clone(&self.directory))),
            Err(error) => {
                tracing::warn!(digest, %error, "peers cannot have an artifact");
                None
            }
        }
    }

    /// Whether peers are asked for what was prepared.
    fn asks(&self, prepared: &Prepared) -> bool {
        self.dialer.is_some() && prepared.known.is_some() && (self.prefer || prepared.files.is_empty())
    }

    fn rank(&self, job: &Job) -> Rank {
        Rank { started_ms: job.created_ms, node: self.node }
    }
}

fn addresses(directory: &Directory, digest: &str) -> Vec<String> {
    let holders = directory.holders(digest);
    holders.into_iter().take(CANDIDATES_MAX).map(|holder| holder.address.to_string()).collect()
}

async fn survey(dialer: &Arc<Dialer>, addresses: Vec<String>, digest: Digest, rank: Rank) -> Option<Chosen> {
    let dialer = Arc::clone(dialer);
    blocking(move || {
        let (peers, active, chained) = choose(ask(&dialer, &addresses, digest), rank);
        Ok(Chosen { peers, active, chained })
    })
    .await
    .ok()
}

/// Asks all of them at once what they have.
fn ask(dialer: &Dialer, addresses: &[String], digest: Digest) -> Vec<(String, Session, Have)> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = addresses
            .iter()
            .map(|address| {
                scope.spawn(move || {
                    let mut session = dialer.connect(address)?;
                    let have = session.have(&digest)?;
                    Ok::<_, crate::peer::Error>((address.clone(), session, have))
                })
            })
            .collect();
        let mut found = Vec::with_capacity(asked.len());
        for (address, asked) in addresses.iter().zip(asked) {
            match asked.join() {
                Ok(Ok(answer)) => found.push(answer),
                Ok(Err(error)) => tracing::info!(address, %error, "a peer cannot be asked"),
                // The panic hook has reported it.
                Err(_) => {}
            }
        }
        found
    })
}

/// The best first. Whoever is still loading and lower in rank comes before those that have it all, so that those do not
/// have to send it to everybody; of them the one that sends to the fewest.
fn choose<S>(mut found: Vec<(String, S, Have)>, rank: Rank) -> (Vec<(String, S)>, usize, bool) {
    let usable = |have: &Have| match have.state {
        State::None => false,
        State::Loading => have.rank < rank,
        State::Complete => true,
    };
    found.retain(|(_, _, have)| usable(have));
    found.sort_by_key(|(_, _, have)| {
        (have.state == State::Complete, have.serving, std::cmp::Reverse(have.rank))
    });
    let loading = found.iter().any(|(_, _, have)| have.state == State::Loading);
    let active = if loading { 1 } else { found.len().min(ACTIVE_MAX) };
    (found.into_iter().map(|(address, session, _)| (address, session)).collect(), active, loading)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(found: &[(&str, State, u64, u32)], rank: u64) -> (Vec<String>, usize) {
        let found = found.iter().map(|(name, state, started_ms, serving)| {
            let rank = Rank { started_ms: *started_ms, node: 0 };
            let have = Have { state: *state, chunks_ready: 1, chunks_total: 2, rank, serving: *serving };
            ((*name).to_owned(), (), have)
        });
        let (peers, active, chained) = choose(found.collect(), Rank { started_ms: rank, node: 0 });
        assert!(!chained || active == 1, "of a chain one is asked");
        (peers.into_iter().map(|(name, ())| name).collect(), active)
    }

    #[test]
    fn all_that_have_everything_are_asked_at_once_the_idle_first() {
        let found = [
            ("busy", State::Complete, 1, 8),
            ("idle", State::Complete, 2, 0),
            ("nothing", State::None, 0, 0),
            ("later", State::Loading, 9, 0),
            ("same", State::Loading, 5, 0),
        ];
        assert_eq!(chosen(&found, 5), (vec!["idle".to_owned(), "busy".to_owned()], 2));
        assert_eq!(chosen(&[], 5), (vec![], 0));
    }

    #[test]
    fn loading_ones_form_a_chain_and_the_others_stand_by() {
        let found = [
            ("source", State::Complete, 0, 0),
            ("first", State::Loading, 1, 4),
            ("second", State::Loading, 2, 0),
            ("third", State::Loading, 3, 0),
        ];
        let order = ["third", "second", "first", "source"].map(str::to_owned).to_vec();
        assert_eq!(chosen(&found, 4), (order, 1));
    }
}
