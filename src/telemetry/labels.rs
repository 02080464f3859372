//! The label values of the metrics, as types: a closed set is an enum, so that no request can add a time series.

use std::fmt;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

use crate::api::methods::JobState;
use crate::error::Code;

/// An enum whose variants are the values of one label.
macro_rules! label {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant,)* }

        impl $name {
            /// Every value.
            pub const ALL: &[$name] = &[$($name::$variant,)*];

            /// The value as it is written in the metrics.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
                EncodeLabelValue::encode(&self.as_str(), encoder)
            }
        }
    };
}

label! {
    /// Where bytes come from.
    Source {
        /// Files of this node.
        File = "file",
        /// Other nodes.
        Peer = "peer",
    }
}

label! {
    /// How bytes came, as observed.
    ReadPath {
        /// Read in place, past the page cache; to a GPU: by the drive itself.
        Direct = "direct",
        /// Read past the page cache by way of a slot.
        Staged = "staged",
        /// Copied from the page cache.
        Cached = "cached",
        /// Read through the page cache, because the file system refuses O_DIRECT.
        Buffered = "buffered",
        /// Read to a GPU by cuFile, by way of host memory.
        Compat = "compat",
        /// From a peer, over TLS.
        Tcp = "tcp",
        /// From the memory of a peer, read by a network adapter.
        Rdma = "rdma",
    }
}

label! {
    /// What a shard thread spends its time on.
    Phase {
        /// Preparing and submitting reads.
        Submit = "submit",
        /// Waiting for completions: the storage is the bottleneck.
        Wait = "wait",
        /// Computing checksums.
        Checksum = "checksum",
        /// Copying from a slot or from the page cache.
        Copy = "copy",
    }
}

label! {
    /// Why a connection was refused.
    Refusal {
        /// `limits.connections_max` is reached.
        Connections = "connections_max",
        /// `limits.connections_per_tenant_max` is reached.
        ConnectionsPerTenant = "connections_per_tenant_max",
        /// The peer's identity could not be found out.
        Identity = "identity",
    }
}

label! {
    /// Why a resident artifact was evicted.
    EvictionReason {
        /// Memory was needed for another.
        Budget = "budget",
        /// `artifact.evict`.
        Request = "request",
        /// Its files changed and its last lease ended.
        Stale = "stale",
        /// Its GPU was lost.
        Lost = "lost",
    }
}

label! {
    /// State of an artifact on a device.
    ArtifactState {
        /// Loading.
        Loading = "loading",
        /// Resident.
        Resident = "resident",
        /// Its files changed; kept for its leases only.
        Stale = "stale",
    }
}

label! {
    /// States of a job that has not ended.
    OpenJob {
        /// Waiting for its turn or for memory.
        Queued = "queued",
        /// Moving bytes.
        Running = "running",
    }
}

label! {
    /// How a job ended.
    EndedJob {
        /// The artifact is resident.
        Done = "done",
        /// With an error.
        Failed = "failed",
        /// Cancelled.
        Cancelled = "cancelled",
    }
}

impl EndedJob {
    /// The label of a job's state; nothing for a job that has not ended.
    pub const fn from_state(state: JobState) -> Option<EndedJob> {
        match state {
            JobState::Done => Some(EndedJob::Done),
            JobState::Failed => Some(EndedJob::Failed),
            JobState::Cancelled => Some(EndedJob::Cancelled),
            JobState::Queued | JobState::Running => None,
        }
    }
}

label! {
    /// A method of the API. What a client makes up is `unknown`: it must not become a time series.
    Method {
        /// `hello`.
        Hello = "hello",
        /// `artifact.resolve`.
        ArtifactResolve = "artifact.resolve",
        /// `artifact.prefetch`.
        ArtifactPrefetch = "artifact.prefetch",
        /// `artifact.attach`.
        ArtifactAttach = "artifact.attach",
        /// `artifact.list`.
        ArtifactList = "artifact.list",
        /// `artifact.stat`.
        ArtifactStat = "artifact.stat",
        /// `artifact.pin`.
        ArtifactPin = "artifact.pin",
        /// `artifact.unpin`.
        ArtifactUnpin = "artifact.unpin",
        /// `artifact.evict`.
        ArtifactEvict = "artifact.evict",
        /// `lease.release`.
        LeaseRelease = "lease.release",
        /// `job.get`.
        JobGet = "job.get",
        /// `job.wait`.
        JobWait = "job.wait",
        /// `job.cancel`.
        JobCancel = "job.cancel",
        /// `job.list`.
        JobList = "job.list",
        /// `node.status`.
        NodeStatus = "node.status",
        /// `node.peers`.
        NodePeers = "node.peers",
        /// `node.topology`.
        NodeTopology = "node.topology",
        /// Anything else.
        Unknown = "unknown",
    }
}

impl Method {
    /// The label of a method's name.
    pub fn from_name(name: &str) -> Method {
        Method::ALL.iter().copied().find(|method| method.as_str() == name).unwrap_or(Method::Unknown)
    }
}

/// How a request ended: `ok`, or the code of its error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    Ok,
    Failed(Code),
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        let text = match self {
            Outcome::Ok => "ok",
            Outcome::Failed(code) => code.as_str(),
        };
        EncodeLabelValue::encode(&text, encoder)
    }
}

/// A set of labels with these names and types.
macro_rules! label_set {
    ($name:ident { $($field:ident: $type:ty),* }) => {
        #[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
        pub(super) struct $name { $(pub(super) $field: $type,)* }
    };
}

label_set!(ReadLabels { source: Source, path: ReadPath });
label_set!(SourceLabels { source: Source });
label_set!(RequestLabels { method: Method, code: Outcome });
label_set!(MethodLabels { method: Method });
label_set!(CodeLabels { code: Outcome });
label_set!(OpenJobLabels { state: OpenJob });
label_set!(EndedJobLabels { state: EndedJob });
label_set!(RefusalLabels { reason: Refusal });
label_set!(DeviceLabels { device: String });
label_set!(ArtifactLabels { device: String, state: ArtifactState });
label_set!(EvictionLabels { device: String, reason: EvictionReason });
label_set!(ShardLabels { shard: u32 });
label_set!(PhaseLabels { shard: u32, phase: Phase });
label_set!(PairLabels { device: String, drive: String });
label_set!(DirectRateLabels { device: String, drive: String, path: ReadPath });
label_set!(ReaderLabels { reader: String, reason: String });
label_set!(PagesLabels { pages: String, reason: String });
label_set!(BuildLabels { version: &'static str });
