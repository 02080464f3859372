//! What the node says about itself.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ErrorData, Features, JobState};
use crate::topology::{DriveStatus, LinkStatus};

/// `node.status`: what an operator asks first.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StatusRequest {}

/// Reply to `node.status`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct StatusReply {
    /// `lodestream 0.1.0`.
    pub server: String,
    /// The node's name.
    pub node: String,
    /// `starting`, `ready` or `draining`.
    pub state: String,
    /// Seconds since the start.
    pub uptime_s: u64,
    /// What works here.
    pub features: Features,
    /// The host tier.
    pub host: HostStatus,
    /// GPUs in use.
    #[serde(default)]
    pub gpus: Vec<GpuStatus>,
    /// The data-plane threads.
    pub shards: Vec<ShardStatus>,
    /// Open connections.
    pub connections: u32,
    /// Leases held.
    pub leases: u32,
    /// Jobs that have not ended.
    pub jobs: u32,
    /// Preloads that the configuration names, and how each stands.
    pub preload: Vec<PreloadStatus>,
    /// Open connections: all for the daemon's own user and root, else those of this tenant.
    #[serde(default)]
    pub clients: Vec<ClientStatus>,
    /// Drives, counted since the machine started. Empty for all but the daemon's own user and root; so are the next two.
    #[serde(default)]
    pub drives: Vec<DriveStatus>,
    /// Network cards, and the PCIe links of drives and GPUs, counted since the machine started.
    #[serde(default)]
    pub links: Vec<LinkStatus>,
    /// Errors since the start of the daemon, by code, without those that never happened.
    #[serde(default)]
    pub errors: Vec<ErrorCount>,
}

/// One open connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClientStatus {
    /// Its number, unique while the daemon runs; the middle part of a `request` in the log.
    pub connection: u64,
    /// Who it acts for: `uid:1000`.
    pub tenant: String,
    /// The process that connected, as the daemon sees it.
    pub process: i32,
    /// What it called itself in `hello`; empty if it did not.
    pub name: String,
    /// Leases that it holds.
    pub leases: u32,
    /// Sum of the sizes of what they are on, bytes. Two leases on one artifact count twice.
    pub leased_bytes: u64,
    /// Requests that are not answered yet.
    pub requests: u32,
}

/// How often an error has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorCount {
    /// Its code.
    pub code: String,
    /// How often.
    pub count: u64,
}

/// The host tier.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HostStatus {
    /// Most that the tier may take: regions, the ready pool and what importers still hold.
    pub budget_bytes: u64,
    /// Bytes in regions that are resident or loading.
    pub resident_bytes: u64,
    /// Bytes of ready, zeroed memory.
    pub pool_bytes: u64,
    /// Bytes that the pool is filled up to when the budget allows.
    pub pool_target_bytes: u64,
    /// Bytes of evicted regions that some process still has mapped.
    pub held_bytes: u64,
    /// Bytes of pinned staging memory.
    pub staging_bytes: u64,
    /// Page kind of new regions: `hugetlb`, `thp` or `4k`.
    pub pages: String,
    /// Why a better page kind is not used, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages_reason: Option<String>,
}

/// The memory of one GPU.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GpuStatus {
    /// `gpu:GPU-<uuid>`.
    pub device: String,
    /// Name of the model. A simulated one says so.
    pub name: String,
    /// Most that may be taken: regions and what importers still hold.
    pub budget_bytes: u64,
    /// Bytes in regions that are resident or loading.
    pub resident_bytes: u64,
    /// Bytes of evicted regions that are being copied to the host tier.
    #[serde(default)]
    pub demoting_bytes: u64,
    /// Bytes of evicted regions that some process may still have mapped.
    pub held_bytes: u64,
    /// The driver's calls fail: nothing is loaded there until the daemon is restarted.
    pub lost: bool,
    /// What is known of the direct path from each drive that was loaded from. Empty: nothing, or `gpu.direct` is `off`.
    #[serde(default)]
    pub direct: Vec<DirectStatus>,
}

/// The direct path from one drive to one GPU.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DirectStatus {
    /// The block device of the file system, as the kernel names it.
    pub drive: String,
    /// Whether it is used.
    pub state: DirectState,
    /// How cuFile's bytes came when they were measured: `nvidia_fs`, `p2pdma`, or `compat` (by way of host memory).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Measured by cuFile, bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_bytes_per_second: Option<f64>,
    /// Measured by way of slots on the same bytes, bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staged_bytes_per_second: Option<f64>,
    /// Why it is not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Whether a direct path is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DirectState {
    /// It is being measured; files go by way of host memory meanwhile.
    Probing,
    /// Files go directly, as far as they are aligned.
    Used,
    /// Files go by way of host memory.
    NotUsed,
}

/// One data-plane thread.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ShardStatus {
    /// Number, from 0.
    pub shard: u32,
    /// `io_uring` or `preadv2`.
    pub reader: String,
    /// Block devices it serves.
    pub devices: Vec<String>,
    /// CPUs it may run on, if it is pinned.
    pub cpus: Vec<u32>,
    /// Bytes of its slots on each NUMA node, as observed. Empty: the kernel does not say.
    #[serde(default)]
    pub slot_nodes: BTreeMap<u32, u64>,
    /// Bytes of one read.
    pub block_bytes: u64,
    /// Reads in flight at most.
    pub depth: u32,
    /// Reads in flight now.
    pub in_flight: u32,
}

/// One entry of the preload list.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PreloadStatus {
    /// What.
    pub source: String,
    /// Where.
    pub device: String,
    /// State of its job.
    pub state: JobState,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorData>,
}

/// `node.topology`: NUMA nodes, PCIe, drives, network cards and GPUs as found in sysfs.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TopologyRequest {}

/// `node.peers`: the other nodes that artifacts come from and go to. For the daemon's own user.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PeersRequest {}

/// Reply to `node.peers`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PeersReply {
    /// Where this node listens for peers. Absent: it serves none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// Artifacts that peers may have, or are being loaded and given on meanwhile.
    pub offers: u32,
    /// Connections of peers that are open.
    pub connections: u32,
    /// Bytes of chunks that were sent to peers.
    pub sent_bytes: u64,
    /// Who has which artifact, and where that is known from.
    pub directory: DirectoryStatus,
    /// Peers that something came from, or was to.
    pub peers: Vec<PeerStatus>,
}

/// The directory of who has which artifact.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DirectoryStatus {
    /// `static` or `etcd`.
    pub backend: String,
    /// Whether what is known is up to date.
    pub connected: bool,
    /// Entries of others that are known; peers of the list.
    pub entries: u64,
    /// Artifacts that this node announces.
    pub announced: u64,
    /// Keys and values that were read and not taken in.
    pub refused: u64,
    /// Why the connection was last lost or not made: a code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// What came from one peer since the daemon started.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PeerStatus {
    /// Where it listens.
    pub address: String,
    /// The name that it has given itself. Empty: it has not been reached yet.
    pub node: String,
    /// Bytes that it gave.
    pub bytes: u64,
    /// Jobs that took something from it.
    pub jobs: u64,
    /// Jobs that left it.
    pub left: u64,
    /// Why it was last left: a code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}
