//! Jobs: from a request for an artifact to a sealed, resident region.
//!
//! A job is driven on the control thread and moves its bytes on shard threads. Whatever way it ends, its memory is
//! either resident or given back (invariants 2 and 11): it waits for every read in flight before it lets go.

mod direct;
mod gate;
mod gpu;
mod host;
mod job;
mod landed;
mod load;
mod peers;
mod promote;
mod verify;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

pub use direct::DirectPath;
pub use gate::{Entered, HeaderGate};
pub use job::{Interest, Job, JobId};
pub use load::blocking;
pub use peers::{Peers, digest};

use crate::api::methods::Selector;
use crate::catalog::store::Store;
use crate::config;
use crate::error::{Code, Error, Result};
use crate::shard::{Landing, Shard};
use crate::source::Opened;
use crate::telemetry::metrics::Metrics;
use crate::tier::DeviceId;
use crate::tier::residency::{EntryId, Form, Hold, Identity, Key, Residency, Viewer};

/// What to call an artifact on a device, for people.
#[derive(Debug, Clone)]
pub struct Name {
    /// Where it comes from.
    pub source: String,
    /// The path in full; `None` for descriptors.
    pub origin: Option<String>,
    /// `host`, or `gpu:GPU-…`; several with commas between them.
    pub device: String,
}

/// A device, and what of an artifact is wanted there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where.
    pub device: DeviceId,
    /// Only these tensors.
    pub select: Option<Vec<Selector>>,
}

/// What a job is asked for.
#[derive(Debug)]
pub struct Wanted {
    /// Where its bytes come from.
    pub opened: Opened,
    /// What to call it.
    pub name: Name,
    /// Where to: one, or several GPUs that share one read of the files.
    pub targets: Vec<Target>,
    /// Larger goes first.
    pub priority: i32,
    /// Who asks.
    pub tenant: u32,
}

impl Wanted {
    /// What it is.
    fn identity(&self) -> Identity {
        identity(&self.opened)
    }

    /// What makes each of its targets the same as another request's.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.targets.iter().map(|target| key(&self.opened, target.device, target.select.as_deref()))
    }
}

/// What makes two requests mean the same resident bytes.
pub fn key(opened: &Opened, device: DeviceId, select: Option<&[Selector]>) -> Key {
    Key {
        device,
        identity: identity(opened),
        select: select.map(<[Selector]>::to_vec),
        form: Form::of(device),
    }
}

fn identity(opened: &Opened) -> Identity {
    match opened {
        Opened::Files(files) => {
            Identity::Files(files.iter().map(|file| (file.name.clone(), file.stamp.clone())).collect())
        }
        Opened::Digest(digest) => Identity::Digest(digest.clone()),
    }
}

/// What a request for an artifact comes to.
#[derive(Debug)]
pub struct Claim {
    /// Keeps them from eviction; one for each target.
    pub holds: Vec<Hold>,
    /// The job that loads it; `None`: it is resident.
    pub job: Option<(Rc<Job>, Interest)>,
}

/// Who reads the files of a block device, and how.
#[derive(Debug, Clone, Copy)]
pub struct Lane {
    /// Number of the shard thread.
    pub shard: usize,
    /// Where reads land that could land in place.
    pub landing: Landing,
}

/// The lane of a block device, by its numbers (major, minor).
pub type LaneOf = dyn Fn(u32, u32) -> Lane;

/// All jobs. Belongs to the control thread.
pub struct Jobs {
    residency: Rc<Residency>,
    shards: Rc<Vec<Shard>>,
    lane_of: Box<LaneOf>,
    store: Option<Arc<Store>>,
    headers: Rc<HeaderGate>,
    metrics: Arc<Metrics>,
    direct: Rc<DirectPath>,
    peers: Peers,
    config: RefCell<Rc<config::Config>>,
    table: RefCell<BTreeMap<JobId, Rc<Job>>>,
    next: Cell<JobId>,
    draining: Cell<bool>,
}

impl Jobs {
    /// No jobs yet.
    pub fn new(
        residency: Rc<Residency>,
        (shards, lane_of): (Rc<Vec<Shard>>, Box<LaneOf>),
        store: Option<Arc<Store>>,
        headers: Rc<HeaderGate>,
        metrics: Arc<Metrics>,
        peers: Peers,
        config: Rc<config::Config>,
    ) -> Rc<Jobs> {
        let contexts = residency.gpus().iter().map(|gpu| Arc::clone(gpu.context())).collect();
        let options = shards.first().map(|shard| shard.options().clone());
        let direct = DirectPath::new(&config.gpu, contexts, options, Arc::clone(&metrics));
        Rc::new(Jobs {
            direct,
            peers,
            residency,
            shards,
            lane_of,
            store,
            headers,
            metrics,
            config: RefCell::new(config),
            table: RefCell::default(),
            next: Cell::new(1),
            draining: Cell::new(false),
        })
    }

    /// Drives that write to GPUs by themselves.
    pub fn direct(&self) -> &DirectPath {
        &self.direct
    }

    /// Other nodes.
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Takes over reloaded limits.
    pub fn reconfigure(&self, config: Rc<config::Config>) {
        *self.config.borrow_mut() = config;
    }

    /// Finds what is wanted resident, joins the job that loads it, or starts one.
    ///
    /// `connection`: the interest ends with it; `None`: it lasts to the end of the job.
    pub fn want(
        self: &Rc<Self>,
        wanted: Wanted,
        connection: Option<u64>,
        deadline: Option<Instant>,
    ) -> Result<Claim> {
        let mut holds = Vec::with_capacity(wanted.targets.len());
        let (mut fresh, mut loading) = (Vec::new(), None);
        for (place, key) in wanted.keys().enumerate() {
            let (source, origin) = (&wanted.name.source, wanted.name.origin.as_deref());
            let (entry, new) = self.residency.enter(key, source, origin, wanted.tenant);
            holds.push(self.residency.hold(entry)?);
            if new {
                fresh.push((place, entry));
            } else if !self.residency.with(entry, |entry| entry.state.is_resident())? {
                loading = loading.or_else(|| self.of_entry(entry));
            }
        }
        let (places, entries): (Vec<_>, Vec<_>) = fresh.into_iter().unzip();
        if entries.is_empty() {
            let job = loading.map(|job| {
                let interest = job.join(wanted.tenant, connection, deadline);
                (job, interest)
            });
            return Ok(Claim { holds, job });
        }
        let job =
            self.may_start().map(|()| self.open_job(entries.clone(), &wanted.name)).inspect_err(|_| {
                entries.iter().for_each(|entry| self.residency.forget(*entry));
            })?;
        let interest = job.join(wanted.tenant, connection, deadline);
        tracing::info!(job = job.id, source = wanted.name.source, tenant = wanted.tenant, "job starts");
        // What is there already is not loaded again.
        let targets = places.into_iter().map(|place| wanted.targets[place].clone()).collect();
        let wanted = Wanted { targets, ..wanted };
        tokio::task::spawn_local(Rc::clone(self).drive(Rc::clone(&job), wanted));
        Ok(Claim { holds, job: Some((job, interest)) })
    }

    /// The job that made `entry` resident, or a new one that is done already if that is forgotten.
    pub fn done(&self, entry: EntryId, name: &Name, tenant: u32) -> Rc<Job> {
        let job = self.of_entry(entry).unwrap_or_else(|| {
            let job = self.open_job(vec![entry], name);
            job.end(self.residency.with(entry, |entry| entry.state.digest()));
            job
        });
        // Whoever asks for it may see it.
        drop(job.join(tenant, Some(0), None));
        job
    }

    fn may_start(&self) -> Result<()> {
        if self.draining.get() {
            let message = "the daemon is stopping and starts no new jobs: ask again after its restart";
            return Err(Error::new(Code::DaemonDraining, message));
        }
        let (open, most) = (self.open(), self.config.borrow().limits.jobs_max);
        if open >= most as usize {
            let message = format!("{open} jobs are open, and limits.jobs_max is {most}: wait for one to end");
            return Err(Error::new(Code::JobTooMany, message));
        }
        Ok(())
    }

    fn open_job(&self, entries: Vec<EntryId>, name: &Name) -> Rc<Job> {
        self.forget_old();
        let number = self.next.replace(self.next.get() + 1);
        let job = Rc::new(Job::new(number, entries, name.clone()));
        self.table.borrow_mut().insert(number, Rc::clone(&job));
        job
    }

    /// Number of jobs that have not ended.
    pub fn open(&self) -> usize {
        self.table.borrow().values().filter(|job| !job.state().ended()).count()
    }

    fn of_entry(&self, entry: EntryId) -> Option<Rc<Job>> {
        let fills = |job: &&Rc<Job>| job.entries.contains(&entry) || job.below.get() == Some(entry);
        self.table.borrow().values().rev().find(fills).cloned()
    }

    /// A job that `viewer` may see.
    pub fn get(&self, id: JobId, viewer: Viewer) -> Result<Rc<Job>> {
        let job = self.table.borrow().get(&id).cloned();
        job.filter(|job| job.seen_by(viewer))
            .ok_or_else(|| Error::new(Code::JobNotFound, format!("there is no job {id}, or it is not yours")))
    }

    /// The jobs that `viewer` may see, newest first.
    pub fn list(&self, viewer: Viewer) -> Vec<Rc<Job>> {
        self.table.borrow().values().rev().filter(|job| job.seen_by(viewer)).cloned().collect()
    }

    /// Starts no new jobs, gives the running ones until `deadline`, then cancels them and waits for their end.
    pub async fn drain(&self, deadline: Instant) {
        self.draining.set(true);
        let open: Vec<_> = self.list(None).into_iter().filter(|job| !job.state().ended()).collect();
        for job in open {
            if tokio::time::timeout_at(deadline.into(), job.ended()).await.is_err() {
                job.cancel(None);
                job.ended().await;
            }
        }
    }

    /// Ended jobs beyond `limits.jobs_kept_max` are forgotten, oldest first.
    fn forget_old(&self) {
        let kept = self.config.borrow().limits.jobs_kept_max as usize;
        let mut table = self.table.borrow_mut();
        let ended: Vec<_> = table.values().filter(|job| job.state().ended()).map(|job| job.id).collect();
        for id in ended.iter().take(ended.len().saturating_sub(kept)) {
            table.remove(id);
        }
    }
}
