//! The parts of the daemon as an engine inside another process: no socket in the file system, no signals, no metrics
//! page, no preload list, and the rights of the process that it is in.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::Sender as Ready;
use tokio::sync::mpsc;

use super::{choose_reader, compose, start_failed, wind_down};
use crate::api::server::Server;
use crate::config::{Config, Direct, Gpu, Host};
use crate::error::Result;
use crate::node::Node;
use crate::shard::ReaderKind;
use crate::telemetry::gpu::Monitor;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::{Readiness, State};

/// Connections that may wait to be served.
const STREAMS_MAX: usize = 16;
/// Most device memory that is taken, bytes: what the device has decides.
const DEVICE_BUDGET_BYTES: u64 = 1 << 60;

/// A node's parts on a thread of this process. Dropping it ends its jobs and connections and stops its threads.
#[derive(Debug)]
pub struct Engine {
    streams: Option<mpsc::Sender<UnixStream>>,
    thread: Option<JoinHandle<()>>,
    /// Threads do not survive a fork.
    process: u32,
}

impl Engine {
    /// Starts the parts. `gpu`: the UUID of the one GPU to use; without it, GPUs are left alone.
    ///
    /// # Errors
    /// `daemon.start`.
    pub fn start(gpu: Option<&str>) -> Result<Engine> {
        let config = config(gpu);
        let (reader, reason) = choose_reader(config.data_plane.reader)?;
        let (streams, inbox) = mpsc::channel(STREAMS_MAX);
        let (ready, started) = crossbeam_channel::bounded(1);
        let body = move || run(config, reader, reason, inbox, &ready);
        let thread = std::thread::Builder::new()
            .name("lodestream".to_owned())
            .spawn(body)
            .map_err(|error| start_failed(format!("the control thread: {error}")))?;
        let engine = Engine { streams: Some(streams), thread: Some(thread), process: std::process::id() };
        started.recv().unwrap_or_else(|_| Err(start_failed("the control thread has ended".to_owned())))?;
        Ok(engine)
    }

    /// A stream to the engine, which speaks the socket API.
    ///
    /// # Errors
    /// What `socketpair` gives; `BrokenPipe` if the engine has ended.
    pub fn connect(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let streams = self.streams.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        streams.blocking_send(theirs).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(ours)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let (streams, thread) = (self.streams.take(), self.thread.take());
        if self.process != std::process::id() {
            // What they refer to has stayed behind in the parent, which goes on using it.
            std::mem::forget((streams, thread));
            return;
        }
        drop(streams);
        if let Some(thread) = thread {
            // A panic there has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Everything of the machine, nothing ready before it is asked for.
fn config(gpu: Option<&str>) -> Config {
    let defaults = Config::default();
    Config {
        node: "in-process".to_owned(),
        roots: vec![PathBuf::from("/")],
        drain_timeout_ms: 0,
        host: Host {
            budget_bytes: rustix::system::sysinfo().totalram as u64,
            ready_pool_bytes: 0,
            ..defaults.host
        },
        gpu: Gpu {
            budget_bytes: gpu.map_or(0, |_| DEVICE_BUDGET_BYTES),
            devices: gpu.map(str::to_owned).into_iter().collect(),
            // It is measured by a helper, which is a daemon's own binary.
            direct: Direct::Off,
            ..defaults.gpu
        },
        ..defaults
    }
}

fn run(
    config: Config,
    reader: ReaderKind,
    reason: Option<String>,
    inbox: mpsc::Receiver<UnixStream>,
    ready: &Ready<Result<()>>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => {
            let body = serve(config, reader, reason, inbox, ready);
            tokio::task::LocalSet::new().block_on(&runtime, body)
        }
        Err(error) => Err(start_failed(format!("the control thread: {error}"))),
    };
    if let Err(error) = outcome {
        // The starter waits for this; it cannot be gone.
        let _ = ready.send(Err(error));
    }
}

async fn serve(
    config: Config,
    reader: ReaderKind,
    reason: Option<String>,
    mut inbox: mpsc::Receiver<UnixStream>,
    ready: &Ready<Result<()>>,
) -> Result<()> {
    let metrics = Arc::new(Metrics::new());
    let readiness = Arc::new(Readiness::new());
    let monitor = Monitor::idle(&metrics);
    let node: Rc<Node> = compose(Rc::new(config), reader, reason, monitor, &metrics, &readiness)?;
    let keeping = tokio::task::spawn_local(Rc::clone(node.residency.host()).keep(|_| ()));
    let server = Server::new(Rc::clone(&node));
    readiness.set(State::Ready);
    let _ = ready.send(Ok(()));
    while let Some(stream) = inbox.recv().await {
        match tokio::net::UnixStream::from_std(stream) {
            Ok(stream) => Rc::clone(&server).admit(stream),
            Err(error) => tracing::warn!(%error, "a connection cannot be served"),
        }
    }
    wind_down(&node, &server, &keeping, Instant::now()).await;
    Ok(())
}
