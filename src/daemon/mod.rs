//! The only composition root: makes the parts in order, runs them, and takes them down in order.
//!
//! Start: socket and metrics listener (so that a mistake shows at once), page kinds, memory, shard threads, jobs,
//! server, preload list. Drain: readiness, no new connections, jobs until the timeout, connections, memory, threads.

mod engine;
mod gpus;
mod preload;
mod publish;
mod shards;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use engine::Engine;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::api::methods::Features;
use crate::api::server::{self, Server};
use crate::catalog::store::Store;
use crate::config::{Config, Reader, ServeArgs, diff_reloadable};
use crate::error::{Code, Error, Result};
use crate::node::{Node, SERVER};
use crate::shard::ReaderKind;
use crate::source::file::Roots;
use crate::sys::{identity, pages, uring};
use crate::telemetry::gpu::Monitor;
use crate::telemetry::http::{self, Collector, HttpLimits};
use crate::telemetry::logging::LogControl;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::{Readiness, State};
use crate::tier::host::{Host, PageChoice};
use crate::tier::residency::Residency;
use crate::topology::{Activity, Topology};
use crate::transfer::{HeaderGate, Jobs, Peers};

/// Below so many open descriptors an ordinary number of artifacts and clients may not fit.
const DESCRIPTORS_MIN: u64 = 4096;
/// Manifests that are remembered from one run to the next.
const MANIFESTS_MAX: usize = 1024;
/// How long the way down waits for memory to be free again.
const FREE_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the daemon until SIGTERM or SIGINT.
pub fn run(args: &ServeArgs, config: Config, log: &LogControl) -> Result<()> {
    raise_descriptors();
    let (reader, reason) = choose_reader(config.data_plane.reader)?;
    let body = serve(args, config, log, reader, reason);
    match reader {
        ReaderKind::IoUring => tokio_uring::start(body),
        ReaderKind::Preadv2 => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| start_failed(format!("the control thread: {error}")))?;
            tokio::task::LocalSet::new().block_on(&runtime, body)
        }
    }
}

fn start_failed(what: String) -> Error {
    Error::new(Code::DaemonStart, what)
}

/// Takes as many descriptors as the system allows: each resident part and each open file of a job is one.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "the limit on open descriptors stays");
    }
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    if most < DESCRIPTORS_MIN {
        tracing::warn!(
            most,
            wanted = DESCRIPTORS_MIN,
            "few open descriptors are allowed (LimitNOFILE, ulimit -n)"
        );
    }
}

/// Finds out by trying whether io_uring may be used.
fn choose_reader(wanted: Reader) -> Result<(ReaderKind, Option<String>)> {
    let probed = match wanted {
        Reader::Preadv2 => return Ok((ReaderKind::Preadv2, Some("data_plane.reader is preadv2".to_owned()))),
        Reader::Auto | Reader::IoUring => uring::probe(),
    };
    match probed {
        Ok(()) => Ok((ReaderKind::IoUring, None)),
        Err(error) if wanted == Reader::IoUring => {
            Err(start_failed(format!("data_plane.reader is io_uring, but the kernel refuses it: {error}")))
        }
        Err(error) => Ok((ReaderKind::Preadv2, Some(format!("the kernel refuses io_uring: {error}")))),
    }
}

async fn serve(
    args: &ServeArgs,
    config: Config,
    log: &LogControl,
    reader: ReaderKind,
    reader_reason: Option<String>,
) -> Result<()> {
    let config = Rc::new(config);
    let metrics = Arc::new(Metrics::new());
    let readiness = Arc::new(Readiness::new());
    let mut terminate = signals(SignalKind::terminate())?;
    let mut interrupt = signals(SignalKind::interrupt())?;
    let mut reload = signals(SignalKind::hangup())?;

    let listener = server::bind(&config.socket, config.socket_mode)?;
    let _unlink = Unlink::of(&config.socket);
    let (stop, stopped) = watch::channel(false);
    let (collector, collections) = Collector::new();
    let page = page(&config, collector, &metrics, &readiness, stopped).await?;

    let reserved = HugePages::reserve(&config);
    let (monitor, verdicts) = Monitor::start(&config.node, &metrics).await;
    let node = compose(Rc::clone(&config), reader, reader_reason, monitor, &metrics, &readiness)?;
    let host = Rc::clone(node.residency.host());
    let filled = {
        let metrics = Arc::clone(&metrics);
        move |time| metrics.pool_filled(time)
    };
    let keeping = tokio::task::spawn_local(Rc::clone(&host).keep(filled));
    let publishing = tokio::task::spawn_local(publish::run(Rc::clone(&node), collections));
    let judging = tokio::task::spawn_local(gpus::act_on(verdicts, Rc::clone(&node)));
    let reporting = tokio::task::spawn_local(gpus::report_losses(Rc::clone(&node)));
    let server = Server::new(Rc::clone(&node));
    let accepting = tokio::task::spawn_local(Rc::clone(&server).accept(listener));
    let mut preloading = tokio::task::spawn_local(preload::run(Rc::clone(&node)));
    if !config.ready_after_preload {
        readiness.set(State::Ready);
    }
    tracing::info!(socket = %config.socket.display(), "serving");
    let ready = async { readiness.reached().await };
    tokio::pin!(ready);
    let mut told = false;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = &mut ready, if !told => {
                told = true;
                tell(&[NotifyState::Ready]);
            }
            _ = reload.recv() => {
                if reconfigure(args, &node, log) {
                    preloading.abort();
                    preloading = tokio::task::spawn_local(preload::run(Rc::clone(&node)));
                }
            }
        }
    }

    tell(&[NotifyState::Stopping]);
    tracing::info!("draining");
    readiness.set(State::Draining);
    accepting.abort();
    preloading.abort();
    let deadline = Instant::now() + Duration::from_millis(node.config().drain_timeout_ms);
    wind_down(&node, &server, &keeping, deadline).await;
    judging.abort();
    reporting.abort();
    publishing.abort();
    node.monitor.stop().await;
    stop.send_replace(true);
    if let Some(page) = page {
        // It has ended, or its exchanges have a deadline.
        let _ = page.await;
    }
    reserved.give_back();
    tracing::info!("stopped");
    Ok(())
}

/// Makes the parts of a node that serves nobody yet. On a runtime.
fn compose(
    config: Rc<Config>,
    reader: ReaderKind,
    reader_reason: Option<String>,
    monitor: Monitor,
    metrics: &Arc<Metrics>,
    readiness: &Arc<Readiness>,
) -> Result<Rc<Node>> {
    let choice = PageChoice::probe(&config.host)?;
    tracing::info!(
        reader = reader.as_str(),
        reason = reader_reason.as_deref().unwrap_or(""),
        pages = choice.best().as_str(),
        pages_reason = choice.reason.as_deref().unwrap_or(""),
        budget_bytes = config.host.budget_bytes,
        "{SERVER} starts"
    );
    let reason = |reason: &Option<String>| reason.clone().unwrap_or_default();
    metrics.set_reader(reader.as_str(), &reason(&reader_reason));
    metrics.set_pages(choice.best().as_str(), &reason(&choice.reason));
    let features = Features {
        reader: reader.as_str().to_owned(),
        reader_reason,
        pages: choice.best().as_str().to_owned(),
        pages_reason: choice.reason.clone(),
        acts_as_tenant: identity::can_act_as(),
    };

    let roots = Arc::new(Roots::open(&config.roots)?);
    let store = config.state_dir.as_deref().map(|state| {
        let opened = Store::open(&state.join("manifests"), MANIFESTS_MAX, &config.limits);
        opened.map_err(|error| start_failed(format!("state_dir {} cannot be used: {error}", state.display())))
    });
    let store = store.transpose()?.map(Arc::new);
    let host = Host::new(&config.host, choice);
    let (gpus, no_gpus) = gpus::open(&config.gpu)?;
    let contexts: Vec<_> = gpus.iter().map(|gpu| Arc::clone(gpu.context())).collect();
    let residency = Residency::new(host, gpus);
    let topology = Topology::read(std::path::Path::new("/")).with_gpus(monitor.gpus());
    let activity = Activity::of(&topology);
    let plane = shards::start(&config.data_plane, reader, topology, &contexts)?;
    let shards = Rc::new(plane.shards);
    let headers = Rc::new(HeaderGate::default());
    let peers = Peers::start(&config, metrics)?;
    let jobs = Jobs::new(
        Rc::clone(&residency),
        (Rc::clone(&shards), plane.lane_of),
        store.clone(),
        Rc::clone(&headers),
        Arc::clone(metrics),
        peers,
        Rc::clone(&config),
    );
    Ok(Rc::new(Node {
        roots,
        residency,
        jobs,
        headers,
        shards,
        store,
        metrics: Arc::clone(metrics),
        readiness: Arc::clone(readiness),
        own_uid: rustix::process::geteuid().as_raw(),
        connections: Cell::new(0),
        leases: Cell::new(0),
        features,
        no_gpus,
        activity,
        monitor,
        shard_devices: plane.devices,
        preload: RefCell::default(),
        config: RefCell::new(Rc::clone(&config)),
        started: Instant::now(),
        lease: Cell::new(0),
    }))
}

/// Lets jobs end until `deadline`, then connections; and waits until memory is free again.
async fn wind_down(node: &Node, server: &Server, keeping: &JoinHandle<()>, deadline: Instant) {
    node.jobs.drain(deadline).await;
    server.close().await;
    keeping.abort();
    node.residency.clear();
    let freed = async {
        let host = node.residency.host();
        while host.account().freeing > 0 {
            host.changed().await
        }
        for gpu in node.residency.gpus() {
            while gpu.account().coming() > 0 {
                gpu.changed().await
            }
        }
    };
    if tokio::time::timeout(FREE_TIMEOUT, freed).await.is_err() {
        tracing::warn!("memory is still being freed");
    }
}

fn signals(kind: SignalKind) -> Result<tokio::signal::unix::Signal> {
    signal(kind).map_err(|error| start_failed(format!("signals cannot be received: {error}")))
}

/// Tells systemd, if it started us.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd was not told");
    }
}

/// Serves the metrics page, if it is configured.
async fn page(
    config: &Config,
    collector: Collector,
    metrics: &Arc<Metrics>,
    readiness: &Arc<Readiness>,
    mut stopped: watch::Receiver<bool>,
) -> Result<Option<JoinHandle<()>>> {
    let Some(address) = config.metrics_listen else { return Ok(None) };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|error| {
        Error::new(Code::DaemonListen, format!("the metrics page cannot listen on {address}: {error}"))
    })?;
    tracing::info!(address = %listener.local_addr().unwrap_or(address), "metrics page");
    let limits = HttpLimits {
        connections_max: config.metrics_connections_max,
        exchange_timeout: Duration::from_millis(config.metrics_timeout_ms),
    };
    let shutdown = async move { drop(stopped.wait_for(|stop| *stop).await) };
    let page = http::serve(listener, collector, Arc::clone(metrics), Arc::clone(readiness), limits, shutdown);
    Ok(Some(tokio::task::spawn_local(page)))
}

/// Takes over what a changed configuration allows to change while running. `true`: the preload list has changed.
fn reconfigure(args: &ServeArgs, node: &Node, log: &LogControl) -> bool {
    let before = node.config();
    let after = match Config::load(args) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(code = %error.code, %error, "not reloaded: the configuration in force stays");
            return false;
        }
    };
    let (changed, restart) = diff_reloadable(&before, &after);
    // What needs a restart keeps its old value.
    let merged = Rc::new(Config {
        limits: after.limits,
        log: crate::config::Log { level: after.log.level, ..before.log.clone() },
        host: crate::config::Host {
            budget_bytes: after.host.budget_bytes,
            ready_pool_bytes: after.host.ready_pool_bytes,
            ..before.host.clone()
        },
        gpu: crate::config::Gpu { budget_bytes: after.gpu.budget_bytes, ..before.gpu.clone() },
        drain_timeout_ms: after.drain_timeout_ms,
        preload: after.preload,
        ready_after_preload: after.ready_after_preload,
        ..(*before).clone()
    });
    if let Err(error) = log.set_level(&merged.log.level) {
        tracing::error!(%error, "the log level stays");
    }
    node.residency.host().resize(&merged.host);
    for gpu in node.residency.gpus() {
        gpu.resize(merged.gpu.budget_bytes);
    }
    node.jobs.reconfigure(Rc::clone(&merged));
    let preload = merged.preload != before.preload;
    *node.config.borrow_mut() = merged;
    tracing::info!(?changed, needs_restart = ?restart, "reloaded");
    preload
}

/// Removes the socket when the daemon stops.
///
/// Only if it is still the one that was bound: while this daemon drains, the next one may have put its own there.
struct Unlink {
    path: std::path::PathBuf,
    bound: Option<(u64, u64)>,
}

impl Unlink {
    fn of(path: &std::path::Path) -> Unlink {
        Unlink { path: path.to_owned(), bound: identity_of(path) }
    }
}

impl Drop for Unlink {
    fn drop(&mut self) {
        if self.bound.is_some() && identity_of(&self.path) == self.bound {
            // Somebody may have removed it since.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at `path`.
fn identity_of(path: &std::path::Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Huge pages that the daemon has had the kernel reserve.
struct HugePages {
    added: u64,
}

impl HugePages {
    /// Raises the number of huge pages so that the budget and the slots fit, if the configuration allows it.
    fn reserve(config: &Config) -> HugePages {
        use crate::config::Pages;
        if !config.host.reserve_huge_pages || !matches!(config.host.pages, Pages::Auto | Pages::Hugetlb) {
            return HugePages { added: 0 };
        }
        let plane = &config.data_plane;
        let slots = plane.block_bytes * u64::from(plane.slots) * u64::from(plane.shards.max(1));
        let wanted = (config.host.budget_bytes + slots).div_ceil(crate::sys::mem::HUGE_PAGE_BYTES);
        let (all, free) = pages::huge_pages();
        let missing = wanted.saturating_sub(free);
        if missing == 0 {
            return HugePages { added: 0 };
        }
        match pages::set_huge_pages(all + missing) {
            Ok(now) => {
                let added = now.saturating_sub(all);
                tracing::info!(added, wanted = missing, "huge pages reserved");
                HugePages { added }
            }
            Err(error) => {
                tracing::warn!(%error, "huge pages cannot be reserved: the daemon may not write vm.nr_hugepages");
                HugePages { added: 0 }
            }
        }
    }

    /// Gives back what was added. Pages that importers still map go when they let go of them.
    fn give_back(self) {
        let (all, _) = pages::huge_pages();
        if self.added > 0
            && let Err(error) = pages::set_huge_pages(all.saturating_sub(self.added))
        {
            tracing::warn!(%error, "reserved huge pages could not be given back");
        }
    }
}
