//! The methods of the socket API: one request type and one reply type each.
//!
//! These types are the API. `docs/schema/api.json` is generated from them (a test notices drift) and the Rust
//! client, the command line and the server share them. Requests refuse unknown fields, so that a misspelt option
//! is an error and not silence; replies may gain fields, so clients must ignore what they do not know.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

mod either;
mod job;
mod node;
pub use job::{JobInfo, JobState, PeerShare};
pub use node::{
    ClientStatus, DirectState, DirectStatus, DirectoryStatus, ErrorCount, GpuStatus, HostStatus, PeerStatus,
    PeersReply, PeersRequest, PreloadStatus, ShardStatus, StatusReply, StatusRequest, TopologyRequest,
};

/// The API versions that this build speaks, newest last.
pub const VERSIONS: &[u32] = &[1];

/// Where an artifact comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Source {
    /// A URI: `file:///models/llama`, or an absolute path; `peer://sha256:…` for what other nodes have.
    Uri(String),
    /// Files that the client opened itself; its own rights decide.
    Fds(FdSource),
}

/// Files sent along with the request by SCM_RIGHTS.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FdSource {
    /// How many descriptors came with the request, in order. All must be regular files open for reading.
    pub fds: u32,
    /// File names, one for each descriptor; they decide the format by extension. Default: `0.safetensors`, ….
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
}

/// Which tensors: a glob over names, or a slice of the tensors that a glob names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Selector {
    /// Whole tensors whose name matches the glob (`*` also matches dots).
    Glob(String),
    /// Part `index` of `of` equal parts along dimension `dim`.
    Slice(SliceSelector),
}

/// Part `index` of `of` equal parts along dimension `dim` of each tensor whose name matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SliceSelector {
    /// Glob over tensor names.
    pub name: String,
    /// Dimension to cut, from 0.
    pub dim: u32,
    /// Number of equal parts; must divide the dimension.
    pub of: u64,
    /// Which part, from 0.
    pub index: u64,
}

/// `hello`: picks the API version and says who is there. Optional; the first version is spoken without it.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HelloRequest {
    /// Name and version of the client program, for the log.
    #[serde(default)]
    pub client: String,
    /// Versions that the client speaks. Empty means any.
    #[serde(default)]
    pub versions: Vec<u32>,
}

/// Reply to `hello`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HelloReply {
    /// The version spoken from now on.
    pub version: u32,
    /// `lodestream 0.1.0`.
    pub server: String,
    /// The node's name.
    pub node: String,
    /// Who the daemon takes this connection for: `uid:1000`.
    pub tenant: String,
    /// Limits of this connection.
    pub limits: Limits,
    /// Where artifacts can be made resident.
    pub devices: Vec<Device>,
    /// What was found to work on this node.
    pub features: Features,
}

/// Limits that a client can run into.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// Longest request line, bytes.
    pub request_bytes_max: u64,
    /// Longest reply line, bytes.
    pub reply_bytes_max: u64,
    /// Requests that may be unanswered at a time on one connection.
    pub requests_in_flight_max: u32,
    /// Leases that one connection may hold.
    pub leases_max: u32,
    /// File descriptors that one message may carry.
    pub fds_max: u32,
}

/// A place where an artifact can be resident.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Device {
    /// `host`, or `gpu:GPU-<uuid>`.
    pub device: String,
    /// Bytes that may be resident there.
    pub budget_bytes: u64,
    /// Bytes that are resident or set aside there now.
    pub used_bytes: u64,
    /// Kind of memory pages in use: `hugetlb`, `thp` or `4k`; `device` for a GPU.
    pub pages: String,
    /// Name of the model of a GPU. A simulated one says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Address of a GPU on PCIe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_address: Option<String>,
    /// Why nothing can be made resident there, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

/// What was found to work on this node, by trying it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Features {
    /// `io_uring`, or `preadv2` where io_uring is refused.
    pub reader: String,
    /// Why io_uring is not used, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reader_reason: Option<String>,
    /// Page kind of the host tier: `hugetlb`, `thp` or `4k`.
    pub pages: String,
    /// Why a better page kind is not used, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages_reason: Option<String>,
    /// Whether the daemon can open a path with the rights of another user.
    pub acts_as_tenant: bool,
}

/// `artifact.resolve`: opens and describes an artifact without loading it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// Where it comes from.
    pub source: Source,
}

/// Reply to `artifact.resolve`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ResolveReply {
    /// Digest of the manifest, `sha256:…`; absent until every byte has been read once on this node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// `safetensors`, `gguf` or `plain`.
    pub format: String,
    /// The files.
    pub files: Vec<FileInfo>,
    /// The tensors, in file order.
    pub tensors: Vec<TensorInfo>,
    /// Sum of the file sizes, bytes.
    pub bytes: u64,
    /// Free-form strings of the files' own headers (`__metadata__` of safetensors).
    pub metadata: BTreeMap<String, String>,
    /// Devices on which it is resident in full.
    pub resident: Vec<String>,
}

/// One file of an artifact.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct FileInfo {
    /// Name relative to the artifact.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// One tensor in its file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// safetensors' name of the type (`BF16`), or GGUF's (`Q4_K`).
    pub dtype: String,
    /// Shape, slowest dimension first.
    pub shape: Vec<u64>,
    /// Index into `files`.
    pub file: u32,
    /// Bytes.
    pub nbytes: u64,
}

/// A GPU, and what of an artifact is wanted there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TargetRequest {
    /// `gpu:GPU-<uuid>` or `gpu:<index>`.
    pub device: String,
    /// Only these tensors. Absent: everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<Vec<Selector>>,
}

/// `artifact.prefetch`: starts, or joins, a job that makes an artifact resident.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PrefetchRequest {
    /// Where it comes from.
    pub source: Source,
    /// `host` (default), `gpu:GPU-<uuid>` or `gpu:<index>`.
    #[serde(default = "host")]
    pub device: String,
    /// Only these tensors. Absent: everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<Vec<Selector>>,
    /// Several GPUs, such as the ranks of a tensor-parallel group with a slice each, instead of `device` and `select`.
    /// One job fills all of them, and reads each block of the files once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<TargetRequest>,
    /// Larger goes first. Default 0.
    #[serde(default)]
    pub priority: i32,
    /// The job fails if it has not ended after this many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// The job goes on when this connection closes.
    #[serde(default)]
    pub detach: bool,
    /// Pin it once it is resident: it is not evicted until it is unpinned.
    #[serde(default)]
    pub pin: bool,
    /// Send `job.progress` notifications on this connection.
    #[serde(default)]
    pub notify: bool,
}

impl PrefetchRequest {
    /// Of the whole artifact, by a job like any other.
    pub fn new(source: Source, device: String) -> PrefetchRequest {
        PrefetchRequest {
            source,
            device,
            select: None,
            targets: Vec::new(),
            priority: 0,
            deadline_ms: None,
            detach: false,
            pin: false,
            notify: false,
        }
    }
}

/// Reply to `artifact.prefetch`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PrefetchReply {
    /// The job; it may already be done.
    pub job: JobInfo,
}

/// `artifact.attach`: a lease, the descriptors, and where each tensor lies.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Where it comes from. Exactly one of `source` and `digest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// A resident artifact by its digest. Found only if this tenant has opened it by its source before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// `host` (default), `gpu:GPU-<uuid>` or `gpu:<index>`.
    #[serde(default = "host")]
    pub device: String,
    /// Only these tensors. Absent: everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<Vec<Selector>>,
    /// Load it if it is not resident, and wait. Default true; if false, `artifact.not_resident` is answered.
    #[serde(default = "yes")]
    pub wait: bool,
    /// Before it is handed out, compare what is in memory with the checksums of when it arrived. Default false.
    #[serde(default)]
    pub verify: bool,
    /// Send `job.progress` notifications on this connection while it loads.
    #[serde(default)]
    pub notify: bool,
}

/// Reply to `artifact.attach`. Its descriptors come with its first byte.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct AttachReply {
    /// The lease; it ends with `lease.release` or with the connection.
    pub lease: u64,
    /// Digest of the manifest; absent for a selection of an artifact that was never read in full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// `safetensors`, `gguf` or `plain`.
    pub format: String,
    /// What to map.
    pub regions: Vec<RegionView>,
    /// Where each tensor lies.
    pub tensors: Vec<TensorView>,
    /// Where each file lies, for files that are resident whole.
    pub files: Vec<FileView>,
    /// Free-form strings of the files' own headers.
    pub metadata: BTreeMap<String, String>,
    /// Milliseconds spent, by phase: `resolve`, `load`, `verify`, `total`.
    pub timings_ms: BTreeMap<String, f64>,
}

/// One resident allocation. Its parts are mapped one behind the other into one address range:
/// offsets count from the start of that range.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RegionView {
    /// `host` or `gpu:GPU-<uuid>`.
    pub device: String,
    /// Length of the range, bytes: the sum over `parts`.
    pub bytes: u64,
    /// `hugetlb`, `thp` or `4k`: map with `mmap`; the range must start on a multiple of 2 MiB if it is `hugetlb`.
    /// `device`: the memory of a GPU, imported with `cuMemImportFromShareableHandle` on that same GPU.
    pub pages: String,
    /// The descriptors, in order.
    pub parts: Vec<PartView>,
}

/// One descriptor of a region, mapped whole with `mmap(fd, bytes, PROT_READ, MAP_SHARED)`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PartView {
    /// Index among the descriptors of this message.
    pub fd: u32,
    /// Bytes, a multiple of 4096 (of 2 MiB if the pages are `hugetlb`).
    pub bytes: u64,
}

/// Where a tensor lies.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TensorView {
    /// Name.
    pub name: String,
    /// safetensors' name of the type (`BF16`), or GGUF's (`Q4_K`).
    pub dtype: String,
    /// Shape, slowest dimension first; of the slice, if it is one.
    pub shape: Vec<u64>,
    /// Index into `regions`.
    pub region: u32,
    /// Byte offset in the region.
    pub offset: u64,
    /// Bytes.
    pub nbytes: u64,
}

/// Where a whole file lies.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct FileView {
    /// Name relative to the artifact.
    pub name: String,
    /// Index into `regions`.
    pub region: u32,
    /// Byte offset in the region.
    pub offset: u64,
    /// Bytes.
    pub nbytes: u64,
}

/// `artifact.list`: what is resident or loading, as far as this tenant has opened it.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListRequest {}

/// Reply to `artifact.list`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ListReply {
    /// Most recently used first.
    pub artifacts: Vec<ArtifactInfo>,
}

/// One artifact, or one selection of it, on one device.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ArtifactInfo {
    /// Where it was loaded from.
    pub source: String,
    /// Digest of the manifest, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The selection, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub select: Option<Vec<Selector>>,
    /// `host` or `gpu:GPU-<uuid>`.
    pub device: String,
    /// `loading`, `resident`, or `stale` (its files changed; kept for its leases only).
    pub state: String,
    /// Bytes of memory it takes.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: u64,
    /// Leases on it.
    pub leases: u32,
    /// Pinned: it is not evicted.
    pub pinned: bool,
    /// Kind of pages: `hugetlb`, `thp`, `4k`, or `mixed`.
    pub pages: String,
    /// Laid out for GPUs. On the host tier: it had to leave a GPU, waits there to be copied back to one, and is not attached
    /// by itself.
    #[serde(default)]
    pub packed: bool,
    /// Milliseconds since it was last attached.
    pub idle_ms: u64,
}

/// `artifact.stat`, `artifact.pin`, `artifact.unpin`, `artifact.evict`: which one.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ArtifactRequest {
    /// Where it came from. Exactly one of `source` and `digest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Its digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// `host` (default), `gpu:GPU-<uuid>` or `gpu:<index>`.
    #[serde(default = "host")]
    pub device: String,
    /// The selection. Absent: the whole artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<Vec<Selector>>,
}

/// Reply to `artifact.stat`, `artifact.pin`, `artifact.unpin` and `artifact.evict` (as it was).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ArtifactReply {
    /// The artifact.
    pub artifact: ArtifactInfo,
}

/// `lease.release`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRequest {
    /// A lease of this connection.
    pub lease: u64,
}

/// A reply without content.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct EmptyReply {}

/// `job.get`, `job.cancel`: which one.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    /// The job.
    pub job: u64,
}

/// `job.wait`: answers when the job has ended.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobWaitRequest {
    /// The job.
    pub job: u64,
    /// Answer after this many milliseconds even if it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Send `job.progress` notifications on this connection.
    #[serde(default)]
    pub notify: bool,
}

/// Reply to `job.get`, `job.wait` and `job.cancel`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JobReply {
    /// The job.
    pub job: JobInfo,
}

/// `job.list`: running and recently ended jobs of this tenant.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobListRequest {}

/// Reply to `job.list`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JobListReply {
    /// Newest first.
    pub jobs: Vec<JobInfo>,
}

/// `data` of an error reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorData {
    /// Stable code; `docs/errors.md` has a section for each.
    pub code: String,
    /// What happened and what to do.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The request's id in the log.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub request: String,
    /// What is still in place.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kept: String,
}

impl From<&crate::error::Error> for ErrorData {
    fn from(error: &crate::error::Error) -> Self {
        ErrorData {
            code: error.code.as_str().to_owned(),
            message: error.message.clone(),
            retryable: error.code.retryable(),
            request: String::new(),
            kept: error.kept.clone(),
        }
    }
}

fn host() -> String {
    "host".to_owned()
}

fn yes() -> bool {
    true
}
