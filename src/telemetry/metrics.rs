//! The one table of metrics.
//!
//! [`Metrics::new`] is the table: each metric is declared, named and explained there, and `docs/metrics.md` says when
//! to worry (a test compares the two, names and labels, both ways). Every series whose labels are a closed set exists from the start,
//! at zero, so that a rate over it is right from the first event on.
//!
//! Hot paths take handles once ([`Metrics::shard`], [`Metrics::file_reads`], [`Metrics::device`]): after that an
//! update is one atomic operation, without a lock or an allocation.

use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry, Unit};

use super::gpu::GpuMetrics;
use super::labels::{
    ArtifactLabels, BuildLabels, CodeLabels, DeviceLabels, DirectRateLabels, EndedJobLabels, EvictionLabels,
    MethodLabels, OpenJobLabels, Outcome, PagesLabels, PairLabels, PhaseLabels, ReadLabels, ReaderLabels,
    RefusalLabels, RequestLabels, ShardLabels, SourceLabels,
};
pub use super::labels::{
    ArtifactState, EndedJob, EvictionReason, Method, OpenJob, Phase, ReadPath, Refusal, Source,
};
use crate::error::Code;

/// A counter of seconds.
pub type Seconds = Counter<f64, AtomicU64>;

/// What every name starts with.
const PREFIX: &str = "lodestream";

/// Requests: an attach of something resident takes under 5 ms, one that loads takes as long as the load.
const REQUEST_SECONDS: [f64; 13] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0];
/// Jobs: from 100 MB on one drive to a terabyte.
const JOB_SECONDS: [f64; 12] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0];

fn request_histogram() -> Histogram {
    Histogram::new(REQUEST_SECONDS)
}

fn job_histogram() -> Histogram {
    Histogram::new(JOB_SECONDS)
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// All metrics of the daemon. Shared by `Arc`; every method takes `&self` and may be called from any thread.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,

    /// What NVML says of GPUs.
    pub gpu: GpuMetrics,
    /// Open connections.
    pub connections: Gauge,
    /// Leases held.
    pub leases: Gauge,
    /// Bytes of ready, zeroed memory in the pool.
    pub pool_bytes: Gauge,
    /// Bytes of staging memory given up because a shard could not drain.
    pub staging_leaked_bytes: Counter,
    /// Bytes that GPUs have copied to the host tier.
    pub demoted_bytes: Counter,
    /// Bytes that GPUs have copied from the host tier.
    pub promoted_bytes: Counter,
    /// Bytes of chunks that were sent to peers.
    pub peer_sent_bytes: Counter,
    /// Open connections of peers.
    pub peer_connections: Gauge,
    /// Artifacts that peers may have.
    pub peer_offers: Gauge,
    /// Bytes that the direct path failed to bring, and that came by slots instead.
    pub direct_fallback_bytes: Counter,

    attach_seconds: Histogram,
    wait_seconds: Seconds,
    pool_fill_seconds: Seconds,
    read_bytes: Family<ReadLabels, Counter>,
    read_errors: Family<SourceLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    request_seconds: Histograms<MethodLabels>,
    errors: Family<CodeLabels, Counter>,
    connections_refused: Family<RefusalLabels, Counter>,
    jobs: Family<OpenJobLabels, Gauge>,
    jobs_ended: Family<EndedJobLabels, Counter>,
    job_seconds: Histograms<EndedJobLabels>,
    resident_bytes: Family<DeviceLabels, Gauge>,
    held_bytes: Family<DeviceLabels, Gauge>,
    budget_bytes: Family<DeviceLabels, Gauge>,
    artifacts: Family<ArtifactLabels, Gauge>,
    evictions: Family<EvictionLabels, Counter>,
    shard_queue_depth: Family<ShardLabels, Gauge>,
    shard_reads_in_flight: Family<ShardLabels, Gauge>,
    shard_slots_bytes: Family<ShardLabels, Gauge>,
    shard_seconds: Family<PhaseLabels, Seconds>,
    direct_used: Family<PairLabels, Gauge>,
    direct_rate: Family<DirectRateLabels, Gauge<f64, AtomicU64>>,
    reader_info: Family<ReaderLabels, Gauge>,
    pages_info: Family<PagesLabels, Gauge>,
}

impl Metrics {
    /// The table, with every series of a closed set at zero.
    pub fn new() -> Metrics {
        let mut table = Table { registry: Registry::with_prefix(PREFIX) };
        let t = &mut table;
        let build_info: Family<BuildLabels, Gauge> =
            t.add("build_info", "The running build; always 1", Family::default());
        build_info.get_or_create(&BuildLabels { version: env!("CARGO_PKG_VERSION") }).set(1);
        let start_time: Gauge<f64, AtomicU64> =
            t.seconds("start_time", "Start of the daemon, since the Unix epoch", Gauge::default());
        start_time.set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());

        let metrics = Metrics {
            read_bytes: t.bytes("read", "Bytes read, by the path they took as observed", Family::default()),
            read_errors: t.add("read_errors", "Reads that failed after retries", Family::default()),

            requests: t.add("requests", "Requests answered, by method and outcome", Family::default()),
            request_seconds: t.seconds(
                "request_duration",
                "From the last byte of a request to its reply",
                Family::new_with_constructor(request_histogram),
            ),
            attach_seconds: t.seconds(
                "attach_duration",
                "Duration of artifact.attach for what was already resident",
                request_histogram(),
            ),
            wait_seconds: t.seconds("wait", "Time that clients waited for a load to end", Seconds::default()),
            errors: t.add("errors", "Errors, by code", Family::default()),
            connections: t.add("connections", "Open connections", Gauge::default()),
            connections_refused: t.add("connections_refused", "Connections refused", Family::default()),
            leases: t.add("leases", "Leases held", Gauge::default()),

            jobs: t.add("jobs", "Jobs that have not ended", Family::default()),
            jobs_ended: t.add("jobs_ended", "Jobs that have ended", Family::default()),
            job_seconds: t.seconds(
                "job_duration",
                "From the request to the end of a job",
                Family::new_with_constructor(job_histogram),
            ),

            resident_bytes: t.bytes("resident", "Memory in regions, resident or loading", Family::default()),
            held_bytes: t.bytes("held", "Memory evicted but still mapped by a process", Family::default()),
            budget_bytes: t.bytes("budget", "Most memory the tier may take", Family::default()),
            pool_bytes: t.bytes("pool", "Ready, zeroed memory for the next load", Gauge::default()),
            pool_fill_seconds: t.seconds("pool_fill", "Time spent preparing memory", Seconds::default()),
            artifacts: t.add("artifacts", "Artifacts on a device, by state", Family::default()),
            evictions: t.add("evictions", "Artifacts evicted", Family::default()),

            shard_queue_depth: t.add("shard_queue_depth", "Moves waiting for a shard", Family::default()),
            shard_reads_in_flight: t.add("shard_reads_in_flight", "Reads submitted", Family::default()),
            shard_slots_bytes: t.bytes("shard_slots_in_use", "Staging memory in use", Family::default()),
            shard_seconds: t.seconds("shard", "Time of a shard thread, by phase", Family::default()),
            demoted_bytes: t.bytes("demoted", "Copied from GPUs to the host tier", Counter::default()),
            promoted_bytes: t.bytes("promoted", "Copied from the host tier to GPUs", Counter::default()),
            peer_sent_bytes: t.bytes("peer_sent", "Chunks that were sent to peers", Counter::default()),
            peer_connections: t.add("peer_connections", "Open connections of peers", Gauge::default()),
            peer_offers: t.add("peer_offers", "Artifacts that peers may have", Gauge::default()),
            direct_fallback_bytes: t.bytes(
                "direct_fallback",
                "Read by way of slots because the direct path failed",
                Counter::default(),
            ),
            direct_used: t.add("direct_used", "Whether a drive writes to a GPU by itself", Family::default()),
            direct_rate: t.add(
                "direct_measured_bytes_per_second",
                "Measured from a drive to a GPU, by path",
                Family::default(),
            ),
            staging_leaked_bytes: t.bytes(
                "staging_leaked",
                "Staging memory given up because its reads could not be drained",
                Counter::default(),
            ),

            reader_info: t.add("reader_info", "How files are read, and why; always 1", Family::default()),
            pages_info: t.add("pages_info", "Kind of memory pages, and why; always 1", Family::default()),
            gpu: GpuMetrics::new(t),
            registry: table.registry,
        };
        metrics.start_at_zero();
        metrics
    }

    /// Makes the series of every closed set of labels.
    fn start_at_zero(&self) {
        drop((self.file_reads(), self.peer_reads()));
        for &method in Method::ALL {
            touch(&self.requests, RequestLabels { method, code: Outcome::Ok });
            touch(&self.request_seconds, MethodLabels { method });
        }
        for &code in Code::ALL {
            touch(&self.errors, CodeLabels { code: Outcome::Failed(code) });
        }
        for &reason in Refusal::ALL {
            touch(&self.connections_refused, RefusalLabels { reason });
        }
        for &state in OpenJob::ALL {
            touch(&self.jobs, OpenJobLabels { state });
        }
        for &state in EndedJob::ALL {
            touch(&self.jobs_ended, EndedJobLabels { state });
            touch(&self.job_seconds, EndedJobLabels { state });
        }
    }

    /// The page as Prometheus and OpenMetrics read it.
    pub fn encode(&self) -> String {
        let mut page = String::new();
        // Writing to a String cannot fail; an encoder that did would leave a page without its `# EOF`,
        // which every scraper refuses.
        let _ = text::encode(&mut page, &self.registry);
        page
    }

    /// Counters of what comes from files of this node.
    pub fn file_reads(&self) -> ReadMetrics {
        let source = Source::File;
        let path = |path| self.read_bytes.get_or_create_owned(&ReadLabels { source, path });
        ReadMetrics {
            direct_bytes: path(ReadPath::Direct),
            staged_bytes: path(ReadPath::Staged),
            cached_bytes: path(ReadPath::Cached),
            buffered_bytes: path(ReadPath::Buffered),
            compat_bytes: path(ReadPath::Compat),
            errors: self.read_errors.get_or_create_owned(&SourceLabels { source }),
        }
    }

    /// Counters of what comes from peers.
    pub fn peer_reads(&self) -> PeerReadMetrics {
        let source = Source::Peer;
        let path = |path| self.read_bytes.get_or_create_owned(&ReadLabels { source, path });
        PeerReadMetrics {
            tcp_bytes: path(ReadPath::Tcp),
            rdma_bytes: path(ReadPath::Rdma),
            errors: self.read_errors.get_or_create_owned(&SourceLabels { source }),
        }
    }

    /// Gauges and counters of one shard thread.
    pub fn shard(&self, shard: u32) -> ShardMetrics {
        let labels = ShardLabels { shard };
        let phase = |phase| self.shard_seconds.get_or_create_owned(&PhaseLabels { shard, phase });
        ShardMetrics {
            queue_depth: self.shard_queue_depth.get_or_create_owned(&labels),
            reads_in_flight: self.shard_reads_in_flight.get_or_create_owned(&labels),
            slots_bytes: self.shard_slots_bytes.get_or_create_owned(&labels),
            submit_seconds: phase(Phase::Submit),
            wait_seconds: phase(Phase::Wait),
            checksum_seconds: phase(Phase::Checksum),
            copy_seconds: phase(Phase::Copy),
        }
    }

    /// Gauges and counters of one device (`host`, `gpu:GPU-<uuid>`).
    pub fn device(&self, device: &str) -> DeviceMetrics {
        let labels = DeviceLabels { device: device.to_owned() };
        let artifacts =
            |state| self.artifacts.get_or_create_owned(&ArtifactLabels { device: device.to_owned(), state });
        let evictions = |reason| {
            self.evictions.get_or_create_owned(&EvictionLabels { device: device.to_owned(), reason })
        };
        DeviceMetrics {
            resident_bytes: self.resident_bytes.get_or_create_owned(&labels),
            held_bytes: self.held_bytes.get_or_create_owned(&labels),
            budget_bytes: self.budget_bytes.get_or_create_owned(&labels),
            loading: artifacts(ArtifactState::Loading),
            resident: artifacts(ArtifactState::Resident),
            stale: artifacts(ArtifactState::Stale),
            evicted_for_budget: evictions(EvictionReason::Budget),
            evicted_by_request: evictions(EvictionReason::Request),
            evicted_stale: evictions(EvictionReason::Stale),
            evicted_lost: evictions(EvictionReason::Lost),
        }
    }

    /// What was measured from a drive to a GPU, directly and by slots, in bytes per second, and whether it is used.
    pub fn direct_path(&self, device: &str, drive: &str, rates: (Option<f64>, Option<f64>), used: bool) {
        let (device, drive) = (device.to_owned(), drive.to_owned());
        for (path, rate) in [(ReadPath::Direct, rates.0), (ReadPath::Staged, rates.1)] {
            if let Some(rate) = rate {
                let labels = DirectRateLabels { device: device.clone(), drive: drive.clone(), path };
                self.direct_rate.get_or_create(&labels).set(rate);
            }
        }
        self.direct_used.get_or_create(&PairLabels { device, drive }).set(used.into());
    }

    /// A request was answered: with success, or with the error of this code (which is counted too).
    pub fn request(&self, method: Method, error: Option<Code>, duration: Duration) {
        let code = error.map_or(Outcome::Ok, Outcome::Failed);
        self.requests.get_or_create(&RequestLabels { method, code }).inc();
        self.request_seconds.get_or_create(&MethodLabels { method }).observe(duration.as_secs_f64());
        if let Some(code) = error {
            self.error(code);
        }
    }

    /// An attach of something that was already resident took this long.
    pub fn attached(&self, duration: Duration) {
        self.attach_seconds.observe(duration.as_secs_f64());
    }

    /// A client waited this long for a load.
    pub fn waited(&self, duration: Duration) {
        self.wait_seconds.inc_by(duration.as_secs_f64());
    }

    /// The pool's filling took this long.
    pub fn pool_filled(&self, duration: Duration) {
        self.pool_fill_seconds.inc_by(duration.as_secs_f64());
    }

    /// An error that is not the answer to a request ([`Metrics::request`] counts those itself).
    pub fn error(&self, code: Code) {
        self.errors.get_or_create(&CodeLabels { code: Outcome::Failed(code) }).inc();
    }

    /// The errors that have happened, and how often.
    pub fn errors(&self) -> Vec<(Code, u64)> {
        let count = |code: &Code| {
            (*code, self.errors.get_or_create(&CodeLabels { code: Outcome::Failed(*code) }).get())
        };
        Code::ALL.iter().map(count).filter(|(_, count)| *count > 0).collect()
    }

    /// A connection was refused.
    pub fn connection_refused(&self, reason: Refusal) {
        self.connections_refused.get_or_create(&RefusalLabels { reason }).inc();
    }

    /// The gauge of jobs in this state.
    pub fn jobs(&self, state: OpenJob) -> Gauge {
        self.jobs.get_or_create_owned(&OpenJobLabels { state })
    }

    /// A job ended, this long after its request.
    pub fn job_ended(&self, state: EndedJob, duration: Duration) {
        self.jobs_ended.get_or_create(&EndedJobLabels { state }).inc();
        self.job_seconds.get_or_create(&EndedJobLabels { state }).observe(duration.as_secs_f64());
    }

    /// Says how files are read (`io_uring`, `preadv2`), and why not otherwise (empty: it is the best).
    pub fn set_reader(&self, reader: &str, reason: &str) {
        self.reader_info.clear();
        let labels = ReaderLabels { reader: reader.to_owned(), reason: reason.to_owned() };
        self.reader_info.get_or_create(&labels).set(1);
    }

    /// Says which pages the host tier uses (`hugetlb`, `thp`, `4k`), and why no better (empty: it is the best).
    pub fn set_pages(&self, pages: &str, reason: &str) {
        self.pages_info.clear();
        let labels = PagesLabels { pages: pages.to_owned(), reason: reason.to_owned() };
        self.pages_info.get_or_create(&labels).set(1);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

/// Counters of one source of bytes.
#[derive(Debug, Clone)]
pub struct ReadMetrics {
    /// Bytes read in place, past the page cache.
    pub direct_bytes: Counter,
    /// Bytes read by way of a slot.
    pub staged_bytes: Counter,
    /// Bytes copied from the page cache.
    pub cached_bytes: Counter,
    /// Bytes read through the page cache, because the file system refuses O_DIRECT.
    pub buffered_bytes: Counter,
    /// Bytes read to GPUs by cuFile, by way of host memory.
    pub compat_bytes: Counter,
    /// Reads that failed after retries.
    pub errors: Counter,
}

/// Counters of what comes from peers.
#[derive(Debug, Clone)]
pub struct PeerReadMetrics {
    /// Bytes that came over TLS.
    pub tcp_bytes: Counter,
    /// Bytes that a network adapter read from the memory of a peer.
    pub rdma_bytes: Counter,
    /// Peers that were left in the middle of a load, or gave wrong bytes.
    pub errors: Counter,
}

/// Gauges and counters of one shard thread.
#[derive(Debug, Clone)]
pub struct ShardMetrics {
    /// Moves waiting in the mailbox.
    pub queue_depth: Gauge,
    /// Reads submitted and not completed.
    pub reads_in_flight: Gauge,
    /// Bytes of slots that are not idle.
    pub slots_bytes: Gauge,
    /// Seconds spent preparing and submitting reads.
    pub submit_seconds: Seconds,
    /// Seconds spent waiting for completions.
    pub wait_seconds: Seconds,
    /// Seconds spent on checksums.
    pub checksum_seconds: Seconds,
    /// Seconds spent copying.
    pub copy_seconds: Seconds,
}

/// Gauges and counters of one device.
#[derive(Debug, Clone)]
pub struct DeviceMetrics {
    /// Bytes in regions, resident or loading.
    pub resident_bytes: Gauge,
    /// Bytes evicted but still mapped by a process.
    pub held_bytes: Gauge,
    /// Most bytes that the tier may take.
    pub budget_bytes: Gauge,
    /// Artifacts that are loading.
    pub loading: Gauge,
    /// Artifacts that are resident.
    pub resident: Gauge,
    /// Artifacts kept for their leases only.
    pub stale: Gauge,
    /// Evictions because memory was needed.
    pub evicted_for_budget: Counter,
    /// Evictions by `artifact.evict`.
    pub evicted_by_request: Counter,
    /// Evictions of what had changed on disk.
    pub evicted_stale: Counter,
    /// Evictions of what was on a device that was lost.
    pub evicted_lost: Counter,
}

/// Registers a metric and returns it, so that the table reads as one list.
pub(super) struct Table {
    registry: Registry,
}

impl Table {
    pub(super) fn add<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.registry.register(name, help, metric.clone());
        metric
    }

    /// The name gets `_bytes`.
    pub(super) fn bytes<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.with_unit(name, help, Unit::Bytes, metric)
    }

    /// The name gets `_seconds`.
    pub(super) fn seconds<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.with_unit(name, help, Unit::Seconds, metric)
    }

    /// The name gets the unit.
    pub(super) fn with_unit<M: Metric + Clone>(
        &mut self,
        name: &str,
        help: &str,
        unit: Unit,
        metric: M,
    ) -> M {
        self.registry.register_with_unit(name, help, unit, metric.clone());
        metric
    }
}

/// Makes a series exist.
fn touch<L, M, C>(family: &Family<L, M, C>, labels: L)
where
    L: Clone + std::hash::Hash + Eq + EncodeLabelSet,
    C: MetricConstructor<M>,
{
    drop(family.get_or_create(&labels));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(metrics: &Metrics, line: &str) {
        let page = metrics.encode();
        assert!(page.lines().any(|l| l == line), "no line `{line}` in:\n{page}");
    }

    #[test]
    fn closed_sets_start_at_zero() {
        let metrics = Metrics::new();
        has(&metrics, r#"lodestream_read_bytes_total{source="file",path="direct"} 0"#);
        has(&metrics, r#"lodestream_requests_total{method="artifact.attach",code="ok"} 0"#);
        has(&metrics, r#"lodestream_errors_total{code="source.file.short_read"} 0"#);
        has(&metrics, r#"lodestream_jobs{state="queued"} 0"#);
        has(&metrics, "# EOF");
    }

    #[test]
    fn a_failed_request_is_counted_by_method_and_by_code() {
        let metrics = Metrics::new();
        metrics.request(
            Method::from_name("artifact.stat"),
            Some(Code::ArtifactNotFound),
            Duration::from_millis(2),
        );
        has(&metrics, r#"lodestream_requests_total{method="artifact.stat",code="artifact.not_found"} 1"#);
        has(&metrics, r#"lodestream_errors_total{code="artifact.not_found"} 1"#);
        has(&metrics, r#"lodestream_request_duration_seconds_count{method="artifact.stat"} 1"#);
    }

    #[test]
    fn a_made_up_method_is_unknown() {
        assert_eq!(Method::from_name("no.such\nmethod"), Method::Unknown);
        for &method in Method::ALL {
            assert_eq!(Method::from_name(method.as_str()), method);
        }
    }

    #[test]
    fn handles_update_the_table_and_gauges_return_to_zero() {
        let metrics = Metrics::new();
        let shard = metrics.shard(3);
        shard.reads_in_flight.inc();
        shard.wait_seconds.inc_by(1.5);
        has(&metrics, r#"lodestream_shard_reads_in_flight{shard="3"} 1"#);
        has(&metrics, r#"lodestream_shard_seconds_total{shard="3",phase="wait"} 1.5"#);
        metrics.shard(3).reads_in_flight.dec();
        has(&metrics, r#"lodestream_shard_reads_in_flight{shard="3"} 0"#);
    }

    #[test]
    fn info_has_one_series_at_a_time() {
        let metrics = Metrics::new();
        metrics.set_reader("io_uring", "");
        metrics.set_reader("preadv2", "io_uring_setup: EPERM");
        has(&metrics, r#"lodestream_reader_info{reader="preadv2",reason="io_uring_setup: EPERM"} 1"#);
        assert!(!metrics.encode().contains(r#"reader="io_uring""#));
    }

    #[test]
    fn label_values_are_escaped() {
        let metrics = Metrics::new();
        metrics.set_pages("thp", "said \"no\"\n\\");
        has(&metrics, r#"lodestream_pages_info{pages="thp",reason="said \"no\"\n\\"} 1"#);
    }
}
