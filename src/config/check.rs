//! From what was given to a checked [`Config`].

use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::etcd;
use super::flags::{self, ServeArgs};
use super::layers::{Environment, Layers, start_of};
use super::origin::{Given, Origin};
use super::peer::peer;
use super::raw::{RawConfig, RawDataPlane, RawGpu, RawHost, RawLimits, RawLog, RawPreload};
use super::size::Size;
use super::{
    Config, ConfigError, DataPlane, Direct, Gpu, Host, Landing, Limits, Log, LogFormat, PageCache, Pages,
    Preload, Reader, level, size,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Regions and the ready pool consist of huge pages of this size.
const HUGE_PAGE_BYTES: u64 = 2 * MIB;
/// Below this a budget holds no model and not even a pool.
const BUDGET_BYTES_MIN: u64 = 64 * MIB;
/// `sun_path` has 108 bytes, one of them for the NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// SCM_MAX_FD of the kernel.
const FDS_PER_MESSAGE_MAX: u64 = 253;
/// Length of a host name with all its domains.
const NODE_BYTES_MAX: usize = 253;
/// Entries of `roots`, of `preload` and of the other lists.
const LIST_ENTRIES_MAX: usize = 1024;

/// How long something may take that a client decides about, milliseconds.
const CLIENT_TIMEOUT_MS: RangeInclusive<u64> = 10..=3_600_000;

/// What the checks need to know about the machine.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) memory_bytes: u64,
    pub(super) name: String,
}

impl Machine {
    pub(super) fn read() -> Machine {
        let info = rustix::system::sysinfo();
        // The type of `totalram` is the machine's word, which is not always u64.
        #[allow(clippy::useless_conversion, reason = "not the same type on 32-bit machines")]
        let memory_bytes = u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit));
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Machine { memory_bytes, name }
    }
}

/// Reads, checks, and fills in what was not given.
pub(super) fn load(
    args: &ServeArgs,
    environment: Environment<'_>,
    machine: &Machine,
) -> Result<Config, ConfigError> {
    let (layers, raw) = Layers::read(args, environment)?;
    let default = Config::default();
    let RawConfig { preload: raw_preload, .. } = raw;
    let roots = match layers.list(flags::ROOTS, &args.root, ':')? {
        Some(roots) => roots,
        None => layers.file_list(flags::ROOTS.key, raw.roots),
    };
    let preload = match layers.list(flags::PRELOAD, &args.preload, ',')? {
        Some(entries) => bounded(entries)?.iter().map(preload_of_text).collect::<Result<_, _>>()?,
        None => preload_of_file(&layers, raw_preload.unwrap_or_default())?,
    };
    Ok(Config {
        node: node(layers.any(flags::NODE, args.node.as_ref(), raw.node)?, machine)?,
        socket: socket(layers.any(flags::SOCKET, args.socket.as_ref(), raw.socket)?, default.socket)?,
        socket_mode: match layers.file("socket_mode", raw.socket_mode) {
            Some(given) => mode(&given)?,
            None => default.socket_mode,
        },
        roots: bounded(roots)?.iter().map(Given::absolute_path).collect::<Result<_, _>>()?,
        state_dir: layers
            .any(flags::STATE_DIR, args.state_dir.as_ref(), raw.state_dir)?
            .map(|given| given.absolute_path())
            .transpose()?,
        metrics_listen: layers
            .any(flags::METRICS_LISTEN, args.metrics_listen.as_ref(), raw.metrics_listen)?
            .map(|given| {
                given.text.parse().map_err(|_| given.invalid("an address and a port, such as 127.0.0.1:9464"))
            })
            .transpose()?,
        metrics_connections_max: count(
            layers.file("metrics_connections_max", raw.metrics_connections_max),
            default.metrics_connections_max,
            1..=1024,
        )?,
        metrics_timeout_ms: integer(
            layers.file("metrics_timeout_ms", raw.metrics_timeout_ms),
            default.metrics_timeout_ms,
            CLIENT_TIMEOUT_MS,
        )?,
        drain_timeout_ms: integer(
            layers.file("drain_timeout_ms", raw.drain_timeout_ms),
            default.drain_timeout_ms,
            0..=86_400_000,
        )?,
        host: host(&layers, args, raw.host, default.host, machine)?,
        gpu: gpu(&layers, args, raw.gpu, default.gpu)?,
        data_plane: data_plane(&layers, args, raw.data_plane, default.data_plane)?,
        peer: peer(&layers, raw.peer, default.peer)?,
        limits: limits(&layers, raw.limits, default.limits)?,
        etcd: etcd::etcd(&layers, raw.etcd, default.etcd)?,
        preload,
        ready_after_preload: truth(
            layers.file("ready_after_preload", raw.ready_after_preload),
            default.ready_after_preload,
        )?,
        log: log(&layers, args, raw.log, default.log)?,
    })
}

fn node(given: Option<Given>, machine: &Machine) -> Result<String, ConfigError> {
    let given = given.unwrap_or_else(|| Given {
        key: flags::NODE.key,
        text: machine.name.clone(),
        origin: Origin::Default,
    });
    let name = &given.text;
    let printable = name.chars().all(|c| c.is_ascii_graphic());
    if name.is_empty() || name.len() > NODE_BYTES_MAX || !printable {
        return Err(given.invalid(format!("1 to {NODE_BYTES_MAX} printable ASCII characters, no spaces")));
    }
    Ok(given.text)
}

fn socket(given: Option<Given>, default: PathBuf) -> Result<PathBuf, ConfigError> {
    let Some(given) = given else { return Ok(default) };
    if given.text.len() > SOCKET_PATH_BYTES_MAX {
        return Err(given.invalid(format!("an absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes")));
    }
    given.absolute_path()
}

/// A file mode: `"0660"`, or TOML's own `0o660` (which arrives here as a decimal number).
fn mode(given: &Given) -> Result<u32, ConfigError> {
    let parsed = match given.text.strip_prefix('0') {
        Some(octal) if !octal.is_empty() => u32::from_str_radix(octal.trim_start_matches('o'), 8).ok(),
        _ => given.text.parse().ok(),
    };
    parsed.filter(|mode| *mode <= 0o777).ok_or_else(|| {
        given.invalid("an octal mode from \"0000\" to \"0777\" (a string with a leading zero, or 0o660)")
    })
}

fn host(
    layers: &Layers<'_>,
    args: &ServeArgs,
    raw: RawHost,
    default: Host,
    machine: &Machine,
) -> Result<Host, ConfigError> {
    let budget =
        layers.any(flags::HOST_BUDGET, args.host_budget.as_ref(), raw.budget_bytes)?.unwrap_or_else(|| {
            Given {
                key: flags::HOST_BUDGET.key,
                text: Size(default.budget_bytes).to_string(),
                origin: Origin::Default,
            }
        });
    let budget_bytes = budget.size(&(BUDGET_BYTES_MIN..=i64::MAX.unsigned_abs()))?;
    if budget_bytes > machine.memory_bytes {
        let (asked, has) = (budget_bytes, machine.memory_bytes);
        return Err(budget.invalid(format!(
            "at most the machine's memory: {asked} bytes are asked for, the machine has {has}"
        )));
    }
    let budget_bytes = whole_huge_pages(budget_bytes);
    let pool = layers.any(flags::READY_POOL, args.ready_pool.as_ref(), raw.ready_pool_bytes)?;
    let ready_pool_bytes = match pool {
        // A pool that nobody asked for must not make a small budget an error.
        None => default.ready_pool_bytes.min(budget_bytes / 4),
        Some(pool) => {
            let bytes = pool.size(&(0..=i64::MAX.unsigned_abs()))?;
            if bytes > budget_bytes {
                let budget = Size(budget_bytes);
                return Err(pool.invalid(format!("at most host.budget_bytes, which is {budget}")));
            }
            bytes
        }
    };
    Ok(Host {
        budget_bytes,
        ready_pool_bytes: whole_huge_pages(ready_pool_bytes),
        pages: word(
            layers.any(flags::PAGES, args.pages.as_ref(), raw.pages)?,
            default.pages,
            &[("auto", Pages::Auto), ("hugetlb", Pages::Hugetlb), ("thp", Pages::Thp), ("4k", Pages::Small)],
        )?,
        reserve_huge_pages: truth(
            layers.any(
                flags::RESERVE_HUGE_PAGES,
                args.reserve_huge_pages.as_ref(),
                raw.reserve_huge_pages,
            )?,
            default.reserve_huge_pages,
        )?,
    })
}

fn gpu(layers: &Layers<'_>, args: &ServeArgs, raw: RawGpu, default: Gpu) -> Result<Gpu, ConfigError> {
    let budget = layers.any(flags::GPU_BUDGET, args.gpu_budget.as_ref(), raw.budget_bytes)?;
    let budget_bytes = match budget {
        Some(budget) => budget.size(&(0..=i64::MAX.unsigned_abs()))?,
        None => default.budget_bytes,
    };
    let devices = layers.file_list("gpu.devices", raw.devices);
    let devices = bounded(devices)?;
    let devices = devices.iter().map(|given| {
        let known = ["GPU-", "MIG-"].iter().any(|prefix| given.text.starts_with(prefix));
        if known { Ok(given.text.clone()) } else { Err(given.invalid("a UUID such as GPU-… or MIG-…")) }
    });
    Ok(Gpu {
        budget_bytes: whole_huge_pages(budget_bytes),
        devices: devices.collect::<Result<_, _>>()?,
        direct: word(
            layers.file("gpu.direct", raw.direct),
            default.direct,
            &[("auto", Direct::Auto), ("on", Direct::On), ("off", Direct::Off)],
        )?,
        direct_probe_timeout_ms: integer(
            layers.file("gpu.direct_probe_timeout_ms", raw.direct_probe_timeout_ms),
            default.direct_probe_timeout_ms,
            100..=600_000,
        )?,
    })
}

fn data_plane(
    layers: &Layers<'_>,
    args: &ServeArgs,
    raw: RawDataPlane,
    default: DataPlane,
) -> Result<DataPlane, ConfigError> {
    let block_bytes = match layers.file("data_plane.block_bytes", raw.block_bytes) {
        None => default.block_bytes,
        Some(given) => size::parse(&given.text)
            .filter(|bytes| (MIB..=64 * MIB).contains(bytes) && bytes.is_multiple_of(MIB))
            .ok_or_else(|| given.invalid("a multiple of 1MiB from 1MiB to 64MiB"))?,
    };
    Ok(DataPlane {
        reader: word(
            layers.any(flags::READER, args.reader.as_ref(), raw.reader)?,
            default.reader,
            &[("auto", Reader::Auto), ("io_uring", Reader::IoUring), ("preadv2", Reader::Preadv2)],
        )?,
        block_bytes,
        depth: count(layers.file("data_plane.depth", raw.depth), default.depth, 1..=1024)?,
        slots: count(layers.file("data_plane.slots", raw.slots), default.slots, 1..=1024)?,
        shards: count(layers.file("data_plane.shards", raw.shards), default.shards, 0..=256)?,
        pin: truth(layers.file("data_plane.pin", raw.pin), default.pin)?,
        page_cache: word(
            layers.file("data_plane.page_cache", raw.page_cache),
            default.page_cache,
            &[("auto", PageCache::Auto), ("never", PageCache::Never)],
        )?,
        landing: word(
            layers.file("data_plane.landing", raw.landing),
            default.landing,
            &[("auto", Landing::Auto), ("in_place", Landing::InPlace), ("slots", Landing::Slots)],
        )?,
    })
}

fn limits(layers: &Layers<'_>, raw: RawLimits, default: Limits) -> Result<Limits, ConfigError> {
    /// `limits.<name>`, checked by a function that takes what was given, the default and the range.
    macro_rules! limit {
        ($check:ident, $name:ident, $range:expr) => {
            $check(layers.file(concat!("limits.", stringify!($name)), raw.$name), default.$name, $range)?
        };
    }
    Ok(Limits {
        connections_max: limit!(count, connections_max, 1..=65_536),
        connections_per_tenant_max: limit!(count, connections_per_tenant_max, 1..=65_536),
        request_bytes_max: limit!(bytes, request_bytes_max, KIB..=64 * MIB),
        reply_bytes_max: limit!(bytes, reply_bytes_max, 4 * KIB..=GIB),
        requests_in_flight_max: limit!(count, requests_in_flight_max, 1..=4096),
        leases_per_connection_max: limit!(count, leases_per_connection_max, 1..=65_536),
        fds_per_message_max: limit!(count, fds_per_message_max, 1..=FDS_PER_MESSAGE_MAX),
        frame_timeout_ms: limit!(integer, frame_timeout_ms, CLIENT_TIMEOUT_MS),
        write_timeout_ms: limit!(integer, write_timeout_ms, CLIENT_TIMEOUT_MS),
        jobs_max: limit!(count, jobs_max, 1..=65_536),
        jobs_kept_max: limit!(count, jobs_kept_max, 1..=65_536),
        files_max: limit!(count, files_max, 1..=1_000_000),
        tensors_max: limit!(integer, tensors_max, 1..=1 << 24),
        header_bytes_max: limit!(bytes, header_bytes_max, 4 * KIB..=GIB),
    })
}

fn log(layers: &Layers<'_>, args: &ServeArgs, raw: RawLog, default: Log) -> Result<Log, ConfigError> {
    let format = layers.any(flags::LOG_FORMAT, args.log_format.as_ref(), raw.format)?;
    let filter = layers.any(flags::LOG_LEVEL, args.log_level.as_ref(), raw.level)?;
    if let Some(given) = &filter {
        level::parse(&given.text)
            .map_err(|reason| given.invalid(format!("{} ({reason})", level::ALLOWED)))?;
    }
    Ok(Log {
        format: word(format, default.format, &[("text", LogFormat::Text), ("json", LogFormat::Json)])?,
        level: filter.map_or(default.level, |given| given.text),
    })
}

fn preload_of_file(
    layers: &Layers<'_>,
    entries: Vec<toml::Spanned<RawPreload>>,
) -> Result<Vec<Preload>, ConfigError> {
    let mut preload = Vec::new();
    for entry in entries {
        let origin = layers.place(start_of(&entry));
        let entry = entry.into_inner();
        let source = layers.file("preload.source", entry.source).unwrap_or(Given {
            key: "preload.source",
            text: String::new(),
            origin,
        });
        if preload.len() == LIST_ENTRIES_MAX {
            return Err(too_many(&source));
        }
        let priority = match layers.file("preload.priority", entry.priority) {
            None => 0,
            Some(given) => given
                .text
                .parse()
                .map_err(|_| given.invalid(format!("a number from {} to {}", i32::MIN, i32::MAX)))?,
        };
        preload.push(Preload {
            source: preload_source(&source)?,
            device: match layers.file("preload.device", entry.device) {
                None => "host".to_owned(),
                Some(given) => device(&given)?,
            },
            priority,
            pin: truth(layers.file("preload.pin", entry.pin), true)?,
        });
    }
    // Stable: entries of one priority stay in the order in which they were written.
    preload.sort_by_key(|entry| std::cmp::Reverse(entry.priority));
    Ok(preload)
}

/// `URI[=DEVICE]`: the last `=` separates, so that a URI that has one itself is written with its device.
fn preload_of_text(given: &Given) -> Result<Preload, ConfigError> {
    let (source, place) = given.text.rsplit_once('=').unwrap_or((&given.text, "host"));
    let part = |text: &str| Given { text: text.to_owned(), ..given.clone() };
    Ok(Preload {
        source: preload_source(&part(source))?,
        device: device(&part(place))?,
        priority: 0,
        pin: true,
    })
}

fn preload_source(given: &Given) -> Result<String, ConfigError> {
    let absolute = given.text.starts_with('/')
        || given.text.split_once("://").is_some_and(|(s, r)| !s.is_empty() && !r.is_empty());
    if absolute && !given.text.contains('\0') {
        Ok(given.text.clone())
    } else {
        Err(given.invalid("an absolute path or a URI such as file:///models/llama"))
    }
}

fn device(given: &Given) -> Result<String, ConfigError> {
    let valid = match given.text.strip_prefix("gpu:") {
        None => given.text == "host",
        Some(gpu) => match gpu.strip_prefix("GPU-") {
            Some(uuid) => !uuid.is_empty() && uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'),
            None => gpu.len() <= 3 && !gpu.is_empty() && gpu.bytes().all(|byte| byte.is_ascii_digit()),
        },
    };
    if valid { Ok(given.text.clone()) } else { Err(given.invalid("host, gpu:<index> or gpu:GPU-<uuid>")) }
}

pub(super) fn bounded(entries: Vec<Given>) -> Result<Vec<Given>, ConfigError> {
    match entries.get(LIST_ENTRIES_MAX) {
        Some(surplus) => Err(too_many(surplus)),
        None => Ok(entries),
    }
}

fn too_many(given: &Given) -> ConfigError {
    given.invalid(format!("at most {LIST_ENTRIES_MAX} entries"))
}

fn whole_huge_pages(bytes: u64) -> u64 {
    bytes - bytes % HUGE_PAGE_BYTES
}

pub(super) fn integer(
    given: Option<Given>,
    default: u64,
    range: RangeInclusive<u64>,
) -> Result<u64, ConfigError> {
    given.map_or(Ok(default), |given| given.integer(&range))
}

/// A number whose range lies within 32 bits.
pub(super) fn count(
    given: Option<Given>,
    default: u32,
    range: RangeInclusive<u64>,
) -> Result<u32, ConfigError> {
    let Some(given) = given else { return Ok(default) };
    let number = given.integer(&range)?;
    u32::try_from(number).map_err(|_| given.invalid(format!("a number up to {}", u32::MAX)))
}

fn bytes(given: Option<Given>, default: u64, range: RangeInclusive<u64>) -> Result<u64, ConfigError> {
    given.map_or(Ok(default), |given| given.size(&range))
}

pub(super) fn truth(given: Option<Given>, default: bool) -> Result<bool, ConfigError> {
    given.map_or(Ok(default), |given| given.truth())
}

fn word<T: Copy>(given: Option<Given>, default: T, words: &[(&str, T)]) -> Result<T, ConfigError> {
    given.map_or(Ok(default), |given| given.word(words))
}
