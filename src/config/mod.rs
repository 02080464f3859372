//! Configuration: file, environment and flags in, one checked [`Config`] out.
//!
//! This is the only module that reads the environment. Everything below it receives values.

mod check;
mod etcd;
pub mod flags;
mod layers;
pub mod level;
mod origin;
mod peer;
mod raw;
pub mod reload;
pub mod size;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;

pub use etcd::Etcd;
pub use flags::ServeArgs;
pub use origin::Origin;
pub use peer::Peer;
pub use reload::diff_reloadable;

use crate::error::{Code, Error, Result};

/// The effective configuration: every value present, checked against the others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// Name of this node in `hello`, status and logs. Default: the host name.
    pub node: String,
    /// Where the API listens.
    pub socket: PathBuf,
    /// Mode of the socket; the directory's mode and mount decide who reaches it.
    #[serde(serialize_with = "octal")]
    pub socket_mode: u32,
    /// Directories below which tenants may name paths. Empty: only descriptors that clients send.
    pub roots: Vec<PathBuf>,
    /// Where manifests are kept from one run to the next. Absent: nowhere.
    pub state_dir: Option<PathBuf>,
    /// Where `/metrics`, `/live` and `/ready` are served. Absent: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// Connections at a time to the metrics page; further ones wait.
    pub metrics_connections_max: u32,
    /// Most time for one request to the metrics page and its reply, milliseconds.
    pub metrics_timeout_ms: u64,
    /// How long running jobs may go on after SIGTERM, milliseconds.
    pub drain_timeout_ms: u64,
    /// The host tier.
    pub host: Host,
    /// The memory of GPUs.
    pub gpu: Gpu,
    /// The data-plane threads.
    pub data_plane: DataPlane,
    /// Daemons of other nodes.
    pub peer: Peer,
    /// Limits on what comes from outside.
    pub limits: Limits,
    /// The directory in etcd.
    pub etcd: Etcd,
    /// Artifacts made resident at start, highest priority first.
    pub preload: Vec<Preload>,
    /// `/ready` answers 503 until the preload list is resident.
    pub ready_after_preload: bool,
    /// Logging.
    pub log: Log,
}

/// The host tier.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Host {
    /// Most bytes that regions, the ready pool and memory still held by importers take together.
    #[serde(serialize_with = "size::serialize")]
    pub budget_bytes: u64,
    /// Bytes of zeroed memory kept ready for the next load, inside the budget.
    #[serde(serialize_with = "size::serialize")]
    pub ready_pool_bytes: u64,
    /// Which pages to use.
    pub pages: Pages,
    /// Whether the daemon may raise the kernel's number of huge pages (`vm.nr_hugepages`) up to its budget.
    pub reserve_huge_pages: bool,
}

/// The memory of GPUs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gpu {
    /// Most bytes that regions, and memory still held by importers, take together on each device. 0: GPUs are left alone.
    #[serde(serialize_with = "size::serialize")]
    pub budget_bytes: u64,
    /// UUIDs (`GPU-…`, `MIG-…`) of the devices to use. Empty: all that the driver shows.
    pub devices: Vec<String>,
    /// Whether drives write to GPUs by themselves, through cuFile.
    pub direct: Direct,
    /// How long the helper that measures the direct path may take, milliseconds.
    pub direct_probe_timeout_ms: u64,
}

/// Whether drives write to GPUs by themselves, through cuFile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direct {
    /// Where they do, as measured, and are faster than the way through host memory.
    Auto,
    /// Where they do, as measured, however fast.
    On,
    /// Nowhere; nothing is measured.
    Off,
}

/// Which pages the host tier uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// The best that can be had: hugetlb, else transparent huge pages, else 4 KiB.
    Auto,
    /// hugetlb only; a load fails if there are not enough.
    Hugetlb,
    /// Transparent huge pages on memfd.
    Thp,
    /// 4 KiB pages.
    #[serde(rename = "4k")]
    Small,
}

/// How files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reader {
    /// io_uring if the kernel allows it, else preadv2 threads.
    #[serde(rename = "auto")]
    Auto,
    /// io_uring; the daemon does not start without it.
    #[serde(rename = "io_uring")]
    IoUring,
    /// preadv2 threads.
    #[serde(rename = "preadv2")]
    Preadv2,
}

/// Whether blocks that the page cache holds are taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageCache {
    /// Take a block from the cache if all of it is there.
    Auto,
    /// Always read from the drive.
    Never,
}

/// Where reads land that could land in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Landing {
    /// In slots where a hypervisor copies what is read, else in place.
    Auto,
    /// In place.
    InPlace,
    /// In slots, and from there to their place.
    Slots,
}

/// The data-plane threads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataPlane {
    /// How files are read.
    pub reader: Reader,
    /// Bytes of one read: a multiple of 1 MiB. Default 1 MiB.
    #[serde(serialize_with = "size::serialize")]
    pub block_bytes: u64,
    /// Reads in flight on each shard thread. Default 8.
    pub depth: u32,
    /// Slots of `block_bytes` on each shard thread. Default 16.
    pub slots: u32,
    /// Shard threads. 0: one for each NVMe drive, at least one.
    pub shards: u32,
    /// Pin shard threads to the CPUs near their drive.
    pub pin: bool,
    /// Use of the page cache.
    pub page_cache: PageCache,
    /// Where reads land that could land in place.
    pub landing: Landing,
}

/// Limits on what comes from outside. Going past one is an error with a code.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limits {
    /// Open connections.
    pub connections_max: u32,
    /// Open connections of one tenant.
    pub connections_per_tenant_max: u32,
    /// Length of a request line, bytes.
    #[serde(serialize_with = "size::serialize")]
    pub request_bytes_max: u64,
    /// Length of a reply line, bytes.
    #[serde(serialize_with = "size::serialize")]
    pub reply_bytes_max: u64,
    /// Requests that may be unanswered at a time on one connection.
    pub requests_in_flight_max: u32,
    /// Leases of one connection.
    pub leases_per_connection_max: u32,
    /// Descriptors in one message, at most 253 (the kernel's limit).
    pub fds_per_message_max: u32,
    /// A request line that has begun must be complete after this many milliseconds.
    pub frame_timeout_ms: u64,
    /// A reply must be taken by the client within this many milliseconds.
    pub write_timeout_ms: u64,
    /// Jobs that have not ended.
    pub jobs_max: u32,
    /// Ended jobs that `job.get` still knows.
    pub jobs_kept_max: u32,
    /// Files of one artifact.
    pub files_max: u32,
    /// Tensors of one artifact.
    pub tensors_max: u64,
    /// Length of one file's header, bytes.
    #[serde(serialize_with = "size::serialize")]
    pub header_bytes_max: u64,
}

/// One artifact made resident at start.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Preload {
    /// URI or absolute path.
    pub source: String,
    /// `host` or `gpu:…`.
    pub device: String,
    /// Larger goes first.
    pub priority: i32,
    /// Not evicted until unpinned. Default true.
    pub pin: bool,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Logging.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Log {
    /// Form.
    pub format: LogFormat,
    /// Filter in the syntax of `tracing-subscriber`: `info`, `lodestream=debug,warn`.
    pub level: String,
}

/// Why there is no configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML, has a key that does not exist, or a value of the wrong type.
    #[error("{}:{line}: `{text}`: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The line.
        text: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A value is not allowed.
    #[error("{key} = `{value}` ({origin}) is not valid; allowed: {allowed}")]
    Invalid {
        /// The key, as in the file.
        key: &'static str,
        /// The value that was given.
        value: String,
        /// Where it came from.
        origin: Origin,
        /// What would be right.
        allowed: String,
    },
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        let code = match error {
            ConfigError::Unreadable { .. } => Code::ConfigUnreadable,
            ConfigError::Syntax { .. } | ConfigError::Invalid { .. } => Code::ConfigInvalid,
        };
        Error::new(code, error.to_string())
    }
}

impl Config {
    /// The effective configuration of these flags, the environment and the file.
    ///
    /// Errors: `config.unreadable`, `config.invalid`; each says the key, where its value came from, and what
    /// is allowed.
    pub fn load(args: &ServeArgs) -> Result<Config> {
        Ok(check::load(args, &|name| std::env::var_os(name), &check::Machine::read())?)
    }

    /// The configuration as a file that loads back to the same configuration.
    ///
    /// Errors: `config.invalid` for a configuration made by hand that TOML cannot hold (a path that is not
    /// UTF-8, a number above 63 bits); never for one from [`Config::load`].
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| {
            Error::new(Code::ConfigInvalid, format!("the configuration has no TOML form: {error}"))
        })
    }
}

/// A file mode as people write it: `"0666"`.
fn octal<S: Serializer>(mode: &u32, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{mode:04o}"))
}

impl Default for Config {
    /// The defaults of `docs/configuration.md`.
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Config {
            node: String::new(),
            socket: PathBuf::from("/run/lodestream/lodestream.sock"),
            socket_mode: 0o666,
            roots: Vec::new(),
            state_dir: None,
            metrics_listen: None,
            metrics_connections_max: 16,
            metrics_timeout_ms: 10_000,
            drain_timeout_ms: 30_000,
            host: Host {
                budget_bytes: 4096 * MIB,
                ready_pool_bytes: 1024 * MIB,
                pages: Pages::Auto,
                reserve_huge_pages: false,
            },
            gpu: Gpu {
                budget_bytes: 0,
                devices: Vec::new(),
                direct: Direct::Auto,
                direct_probe_timeout_ms: 30_000,
            },
            data_plane: DataPlane {
                reader: Reader::Auto,
                block_bytes: MIB,
                depth: 8,
                slots: 8,
                shards: 0,
                pin: true,
                page_cache: PageCache::Auto,
                landing: Landing::Auto,
            },
            peer: Peer::default(),
            limits: Limits {
                connections_max: 1024,
                connections_per_tenant_max: 256,
                request_bytes_max: MIB,
                reply_bytes_max: 64 * MIB,
                requests_in_flight_max: 32,
                leases_per_connection_max: 256,
                fds_per_message_max: 253,
                frame_timeout_ms: 10_000,
                write_timeout_ms: 10_000,
                jobs_max: 256,
                jobs_kept_max: 256,
                files_max: 4096,
                tensors_max: 1 << 20,
                header_bytes_max: 100 * 1000 * 1000,
            },
            etcd: Etcd::default(),
            preload: Vec::new(),
            ready_after_preload: false,
            log: Log { format: LogFormat::Text, level: "info".to_owned() },
        }
    }
}
