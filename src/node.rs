//! What every connection shares: the parts of the running daemon, and what it says about itself.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::api::methods::{
    Device, Features, HelloReply, HostStatus, Limits, PreloadStatus, ShardStatus, StatusReply,
};
use crate::catalog::store::Store;
use crate::config::{self, Config};
use crate::error::Result;
use crate::shard::Shard;
use crate::source::file::Roots;
use crate::sys::identity::Tenant;
use crate::telemetry::gpu::Monitor;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::Readiness;
use crate::tier::residency::{Residency, Viewer};
use crate::topology::Topology;
use crate::transfer::{self, HeaderGate, Jobs};

/// Name and version, as replies give it.
pub const SERVER: &str = concat!("lodestream ", env!("CARGO_PKG_VERSION"));

/// The parts of the running daemon. Belongs to the control thread.
pub struct Node {
    /// Where tenants may name paths.
    pub roots: Arc<Roots>,
    /// What is resident.
    pub residency: Rc<Residency>,
    /// What is being made resident.
    pub jobs: Rc<Jobs>,
    /// Whoever reads headers goes through it.
    pub headers: Rc<HeaderGate>,
    /// The data-plane threads.
    pub shards: Rc<Vec<Shard>>,
    /// Manifests of earlier runs.
    pub store: Option<Arc<Store>>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How far the daemon is.
    pub readiness: Arc<Readiness>,
    /// The user that the daemon runs as.
    pub own_uid: u32,
    /// Open connections.
    pub connections: Cell<u32>,
    /// Leases held by connections.
    pub leases: Cell<u32>,
    /// Watches over the GPUs.
    pub monitor: Monitor,
    pub(crate) features: Features,
    pub(crate) shard_devices: Vec<Vec<String>>,
    pub(crate) preload: RefCell<Vec<PreloadStatus>>,
    pub(crate) config: RefCell<Rc<Config>>,
    pub(crate) started: Instant,
    pub(crate) lease: Cell<u64>,
}

impl Node {
    /// The configuration in force.
    pub fn config(&self) -> Rc<Config> {
        Rc::clone(&self.config.borrow())
    }

    /// The node's name.
    pub fn name(&self) -> String {
        self.config.borrow().node.clone()
    }

    /// A number for a new lease, which counts from now on.
    pub fn next_lease(&self) -> u64 {
        self.lease.set(self.lease.get() + 1);
        self.leases.set(self.leases.get() + 1);
        self.metrics.leases.inc();
        self.lease.get()
    }

    /// The reply to `hello`.
    pub fn hello(&self, version: u32, tenant: &Tenant, limits: &config::Limits) -> HelloReply {
        HelloReply {
            version,
            server: SERVER.to_owned(),
            node: self.name(),
            tenant: tenant.to_string(),
            limits: Limits {
                request_bytes_max: limits.request_bytes_max,
                reply_bytes_max: limits.reply_bytes_max,
                requests_in_flight_max: limits.requests_in_flight_max,
                leases_max: limits.leases_per_connection_max,
                fds_max: limits.fds_per_message_max,
            },
            devices: vec![Device {
                device: "host".to_owned(),
                budget_bytes: self.residency.host().budget(),
                used_bytes: self.residency.host().account().total(),
                pages: self.features.pages.clone(),
            }],
            features: self.features.clone(),
        }
    }

    /// The reply to `node.status`. The preload list names paths, so it is for those who may look at everyone.
    pub fn status(&self, viewer: Viewer) -> StatusReply {
        let host = self.residency.host();
        let account = host.account();
        let options = self.shards.iter().map(Shard::options);
        StatusReply {
            server: SERVER.to_owned(),
            node: self.name(),
            state: self.readiness.get().as_str().to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            features: self.features.clone(),
            host: HostStatus {
                budget_bytes: host.budget(),
                resident_bytes: account.regions,
                pool_bytes: account.pool,
                pool_target_bytes: host.pool_target(),
                held_bytes: account.held,
                staging_bytes: options.clone().map(|shard| shard.block_bytes * u64::from(shard.slots)).sum(),
                pages: self.features.pages.clone(),
                pages_reason: self.features.pages_reason.clone(),
            },
            shards: options
                .zip(self.shards.iter().zip(&self.shard_devices))
                .map(|(options, (shard, devices))| ShardStatus {
                    shard: options.index,
                    reader: options.reader.as_str().to_owned(),
                    devices: devices.clone(),
                    cpus: options.cpus.clone(),
                    block_bytes: options.block_bytes,
                    depth: options.depth,
                    in_flight: shard.stats().in_flight.load(Ordering::Relaxed),
                })
                .collect(),
            connections: self.connections.get(),
            leases: self.leases.get(),
            jobs: self.jobs.open() as u32,
            preload: if viewer.is_none() { self.preload.borrow().clone() } else { Vec::new() },
        }
    }

    /// The reply to `node.topology`, read anew.
    pub async fn topology(&self) -> Result<Topology> {
        let gpus = self.monitor.gpus().to_vec();
        transfer::blocking(move || Ok(Topology::read(Path::new("/")).with_gpus(&gpus))).await
    }
}
