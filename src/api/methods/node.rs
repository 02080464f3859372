//! What the node says about itself.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ErrorData, Features, JobState};

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
