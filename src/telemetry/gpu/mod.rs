//! Health of GPUs: what NVML says of them, as metrics and as verdicts on whether their memory can be trusted.
//!
//! NVML is loaded at run time; a node without it has no GPU metrics, and that is all. A driver that hangs takes its caller
//! along, so only threads of this module ask it ([`Nvml`]), and whoever waits for them has a deadline.

pub mod health;
mod monitor;
mod read;
mod table;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::event::EventSet;
use serde::Serialize;

use crate::sys::nvml;
pub use health::{Health, Observation, Verdict};
pub use monitor::{Monitor, Verdicts};
pub use read::{Ecc, Gone, Identity, Instance, Link, Memory, Reading, Rows, Throttle};
pub use table::GpuMetrics;

/// How long the driver may take to start, which a GPU without persistence mode does within seconds.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// A thread that waits for events looks so often whether it is to stop, milliseconds.
const EVENT_WAIT_MS: u32 = 250;
/// NVML's number for an XID that it does not know.
const XID_UNKNOWN: u64 = 999;

/// Why there is nothing to ask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Absent {
    /// There is no `libnvidia-ml.so.1`.
    #[error(
        "there is no libnvidia-ml.so.1: no NVIDIA driver is installed, or it is not shown to this container"
    )]
    NoLibrary,
    /// There is one, but it cannot be used.
    #[error("NVML cannot be used: {0}")]
    Unusable(String),
    /// It did not start in time.
    #[error("NVML did not start within {} s: the NVIDIA driver hangs", START_TIMEOUT.as_secs())]
    Hung,
}

/// The driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Driver {
    /// Version of the NVIDIA driver. A simulated one says so here.
    pub version: String,
    /// Newest CUDA that it serves, as `12.4`; empty if it does not say.
    pub cuda: String,
    /// GPUs that it counts and that did not say who they are when it was asked first: lost, or not allowed to this process.
    pub silent: u32,
}

/// What each GPU said, in the order of [`Nvml::gpus`].
pub type Readings = Vec<Result<Reading, Gone>>;
/// Takes the answer; called on a thread of [`Nvml`].
type Reply = Box<dyn FnOnce(Readings) + Send>;
/// Takes what happened: the GPU's place among [`Nvml::gpus`], and what. Called on a thread of [`Nvml`].
type Tell = Box<dyn Fn(usize, Observation) + Send>;

/// NVML, and the threads that ask it. Dropping it has them shut NVML down as soon as it answers.
pub struct Nvml {
    requests: Sender<Reply>,
    ended: Receiver<()>,
    gpus: Vec<Identity>,
    driver: Driver,
}

impl fmt::Debug for Nvml {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nvml").field("driver", &self.driver).field("gpus", &self.gpus).finish_non_exhaustive()
    }
}

impl Nvml {
    /// Loads and starts NVML.
    pub fn start() -> Result<Nvml, Absent> {
        Nvml::launch(None)
    }

    /// The same, and says of each XID and each loss that the driver reports from now on.
    pub fn start_with_events(tell: impl Fn(usize, Observation) + Send + 'static) -> Result<Nvml, Absent> {
        Nvml::launch(Some(Box::new(tell)))
    }

    fn launch(tell: Option<Tell>) -> Result<Nvml, Absent> {
        // One request at a time: a second one would have to wait for the same answer.
        let (requests, asked) = crossbeam_channel::bounded(1);
        let (ready, started) = crossbeam_channel::bounded(1);
        let (running, ended) = crossbeam_channel::bounded::<()>(0);
        let body = move || {
            serve(&ready, &asked, tell);
            drop(running);
        };
        let thread = std::thread::Builder::new().name("nvml".to_owned()).spawn(body);
        thread.map_err(|error| Absent::Unusable(error.to_string()))?;
        match started.recv_timeout(START_TIMEOUT) {
            Ok(Ok((gpus, driver))) => Ok(Nvml { requests, ended, gpus, driver }),
            Ok(Err(absent)) => Err(absent),
            Err(RecvTimeoutError::Timeout) => Err(Absent::Hung),
            Err(RecvTimeoutError::Disconnected) => Err(Absent::Unusable("its thread ended".to_owned())),
        }
    }

    /// The GPUs that there were at the start.
    pub fn gpus(&self) -> &[Identity] {
        &self.gpus
    }

    /// The driver.
    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    /// Has all GPUs read; `reply` gets what they said. `false`: an earlier request still waits for its turn.
    pub fn ask(&self, reply: impl FnOnce(Readings) + Send + 'static) -> bool {
        self.requests.try_send(Box::new(reply)).is_ok()
    }

    /// Has all GPUs read and waits; nothing if the driver does not answer in time.
    pub fn read(&self, timeout: Duration) -> Option<Readings> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        // Nobody waits for an answer that comes late.
        self.ask(move |readings| drop(reply.send(readings)));
        answer.recv_timeout(timeout).ok()
    }

    /// Shuts NVML down and waits for that. `false`: it did not answer in time and is left to itself.
    pub fn stop(self, timeout: Duration) -> bool {
        drop(self.requests);
        self.ended.recv_timeout(timeout) == Err(RecvTimeoutError::Disconnected)
    }
}

type Started = Result<(Vec<Identity>, Driver), Absent>;

/// The thread that asks: starts NVML, answers requests until there can be none, shuts NVML down.
fn serve(ready: &Sender<Started>, asked: &Receiver<Reply>, tell: Option<Tell>) {
    let nvml = match nvml_wrapper::Nvml::init() {
        Ok(nvml) => nvml,
        Err(error) => {
            let absent = match error {
                NvmlError::LibloadingError(_) => Absent::NoLibrary,
                other => Absent::Unusable(other.to_string()),
            };
            // Whoever started this may have given up.
            drop(ready.send(Err(absent)));
            return;
        }
    };
    let (devices, silent) = read::devices(&nvml);
    let (gpus, handles): (Vec<_>, Vec<_>) = devices.into_iter().unzip();
    // Before anyone is told of the start, so that nothing is missed from then on.
    let events = tell.map(|tell| (tell, register(&nvml, &handles)));
    let driver = Driver {
        version: nvml.sys_driver_version().unwrap_or_default(),
        cuda: nvml
            .sys_cuda_driver_version()
            .map(|version| format!("{}.{}", version / 1000, version % 1000 / 10))
            .unwrap_or_default(),
        silent,
    };
    drop(ready.send(Ok((gpus, driver))));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        if let Some((tell, Some(set))) = events {
            let body = || wait_for_events(&handles, set, tell, &stop);
            if let Err(error) =
                std::thread::Builder::new().name("nvml-events".to_owned()).spawn_scoped(scope, body)
            {
                tracing::warn!(%error, "XIDs are not watched");
            }
        }
        for reply in asked {
            reply(handles.iter().map(read::read).collect());
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(handles);
    if let Err(error) = nvml.shutdown() {
        tracing::debug!(%error, "NVML was not shut down in order");
    }
}

/// A set of the XIDs of all GPUs that report them; nothing if none does.
fn register<'n>(nvml: &'n nvml_wrapper::Nvml, handles: &[nvml_wrapper::Device<'n>]) -> Option<EventSet<'n>> {
    let kind = EventTypes::CRITICAL_XID_ERROR;
    let supports = |device: &&nvml_wrapper::Device<'n>| {
        device.supported_event_types().is_ok_and(|types| types.contains(kind))
    };
    let mut willing: Vec<_> = handles.iter().filter(supports).collect();
    // A refusal takes the whole set along: begin anew without who refused.
    'anew: while !willing.is_empty() {
        let mut set = nvml.create_event_set().ok()?;
        for place in 0..willing.len() {
            set = match willing[place].register_events(kind, set) {
                Ok(set) => set,
                Err(error) => {
                    tracing::warn!(%error, "a GPU does not report XIDs");
                    willing.remove(place);
                    continue 'anew;
                }
            };
        }
        return Some(set);
    }
    None
}

fn wait_for_events(handles: &[nvml_wrapper::Device<'_>], set: EventSet<'_>, tell: Tell, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match set.wait(EVENT_WAIT_MS) {
            Ok(event) => {
                let place = handles.iter().position(|device| nvml::same(device, &event.device));
                let xid = match event.event_data {
                    Some(XidError::Value(xid)) => xid,
                    Some(XidError::Unknown) => XID_UNKNOWN,
                    None => continue,
                };
                match place {
                    Some(place) => tell(place, Observation::Xid(xid)),
                    None => tracing::warn!(xid, "an XID of a GPU that there was not at the start"),
                }
            }
            Err(NvmlError::Timeout) => {}
            // It does not say which one; the readings do. Others of the set may still report.
            Err(NvmlError::GpuLost) => std::thread::park_timeout(Duration::from_millis(EVENT_WAIT_MS.into())),
            Err(error) => {
                tracing::error!(%error, "XIDs are no longer watched");
                return;
            }
        }
    }
}
