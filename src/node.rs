//! What every connection shares: the parts of the running daemon, and what it says about itself.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::api::methods::{
    Device, ErrorCount, Features, GpuStatus, HelloReply, HostStatus, Limits, PreloadStatus, ShardStatus,
    StatusReply,
};
use crate::catalog::store::Store;
use crate::config::{self, Config};
use crate::error::{Code, Error, Result};
use crate::shard::Shard;
use crate::source::file::Roots;
use crate::sys::identity::Tenant;
use crate::telemetry::gpu::Monitor;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::Readiness;
use crate::tier::DeviceId;
use crate::tier::residency::{Residency, Viewer};
use crate::topology::{Activity, Topology};
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
    /// What drives and links move.
    pub activity: Activity,
    /// Watches over the GPUs.
    pub monitor: Monitor,
    pub(crate) features: Features,
    /// Why no GPU is used, if none is.
    pub(crate) no_gpus: Option<String>,
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
            devices: self.devices(),
            features: self.features.clone(),
        }
    }

    fn devices(&self) -> Vec<Device> {
        let host = Device {
            device: "host".to_owned(),
            budget_bytes: self.residency.host().budget(),
            used_bytes: self.residency.host().account().total(),
            pages: self.features.pages.clone(),
            name: None,
            pci_address: None,
            lost: None,
        };
        let gpus = self.residency.gpus().iter().map(|gpu| Device {
            device: gpu.name(),
            budget_bytes: gpu.budget(),
            used_bytes: gpu.account().total(),
            pages: "device".to_owned(),
            name: Some(gpu.context().device().name.clone()),
            pci_address: gpu.context().device().pci_address.clone(),
            lost: gpu.lost().then(|| gpu.lost_error().message),
        });
        std::iter::once(host).chain(gpus).collect()
    }

    /// All devices in use.
    pub fn device_ids(&self) -> impl Iterator<Item = DeviceId> + use<> {
        let gpus = (0..self.residency.gpus().len()).map(DeviceId::Gpu);
        std::iter::once(DeviceId::Host).chain(gpus)
    }

    /// The device that a client means: `host`, `gpu:GPU-<uuid>`, `gpu:MIG-<uuid>` or `gpu:<index>`.
    pub fn device(&self, name: &str) -> Result<DeviceId> {
        let Some(gpu) = name.strip_prefix("gpu:") else {
            return match name {
                "host" => Ok(DeviceId::Host),
                other => {
                    let message =
                        format!("{other:?} is no device: write host, gpu:GPU-<uuid> or gpu:<index>");
                    Err(Error::new(Code::ApiBadParams, message))
                }
            };
        };
        let gpus = self.residency.gpus();
        let found = match gpu.parse::<usize>() {
            Ok(index) => (index < gpus.len()).then_some(index),
            Err(_) => gpus.iter().position(|known| known.context().device().uuid == gpu),
        };
        let Some(index) = found else {
            let message = match &self.no_gpus {
                Some(why) => format!("{name} is not available: {why}"),
                None => {
                    let known: Vec<_> = gpus.iter().map(|gpu| gpu.name()).collect();
                    format!("{name} is not available: this daemon uses {}", known.join(", "))
                }
            };
            return Err(Error::new(Code::DeviceUnavailable, message));
        };
        if gpus[index].lost() { Err(gpus[index].lost_error()) } else { Ok(DeviceId::Gpu(index)) }
    }

    /// The reply to `node.status`, without the connections. The preload list names paths, and the counters tell what
    /// others do, so they are for those who may look at everyone.
    pub fn status(&self, viewer: Viewer) -> StatusReply {
        let all = viewer.is_none();
        let errors = self.metrics.errors().into_iter();
        let errors = errors.map(|(code, count)| ErrorCount { code: code.as_str().to_owned(), count });
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
            gpus: (0..self.residency.gpus().len()).map(|index| self.gpu_status(index)).collect(),
            shards: options
                .zip(self.shards.iter().zip(&self.shard_devices))
                .map(|(options, (shard, devices))| ShardStatus {
                    shard: options.index,
                    reader: options.reader.as_str().to_owned(),
                    devices: devices.clone(),
                    cpus: options.cpus.clone(),
                    slot_nodes: shard.slot_nodes().clone(),
                    block_bytes: options.block_bytes,
                    depth: options.depth,
                    in_flight: shard.stats().in_flight.load(Ordering::Relaxed),
                })
                .collect(),
            connections: self.connections.get(),
            leases: self.leases.get(),
            jobs: self.jobs.open() as u32,
            preload: if all { self.preload.borrow().clone() } else { Vec::new() },
            clients: Vec::new(),
            drives: if all { self.activity.drives() } else { Vec::new() },
            links: if all { self.activity.links() } else { Vec::new() },
            errors: if all { errors.collect() } else { Vec::new() },
        }
    }

    fn gpu_status(&self, index: usize) -> GpuStatus {
        let gpu = &self.residency.gpus()[index];
        gpu.look_at_held();
        let account = gpu.account();
        GpuStatus {
            device: gpu.name(),
            name: gpu.context().device().name.clone(),
            budget_bytes: gpu.budget(),
            resident_bytes: account.regions,
            demoting_bytes: account.leaving,
            held_bytes: account.held,
            lost: gpu.lost(),
            direct: self.jobs.direct().status(index),
        }
    }

    /// The reply to `node.topology`, read anew.
    pub async fn topology(&self) -> Result<Topology> {
        let gpus = self.monitor.gpus().to_vec();
        transfer::blocking(move || Ok(Topology::read(Path::new("/")).with_gpus(&gpus))).await
    }
}
