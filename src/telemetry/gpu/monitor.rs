//! The task that watches over GPUs: gathers observations, keeps the health of each, and says its verdicts.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{Absent, Driver, Health, Identity, Nvml, Observation, Readings, Verdict};
use crate::telemetry::metrics::Metrics;

/// A page that is asked for sooner after another shows the same readings: each costs up to 40 ms for each GPU.
const READING_AGE_MIN: Duration = Duration::from_secs(1);
/// How long a page waits for the driver.
const READING_TIMEOUT: Duration = Duration::from_secs(2);
/// GPUs are looked at this often even if nobody asks for a page: a loss must be noticed.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Observations, and verdicts, that may wait for being dealt with.
const LETTERS_MAX: usize = 256;
/// How long the way down waits for the driver.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Verdicts as they are made, each with the UUID of the GPU (`GPU-…`) or of the instance (`MIG-…`) that it is on. A verdict on a GPU is
/// also one on each of its instances, which follow it.
pub type Verdicts = mpsc::Receiver<(String, Verdict)>;

enum Letter {
    /// Of the GPU at this place.
    Event(usize, Observation),
    Readings(Readings),
    /// Of the device with this UUID.
    Report(String, Observation),
    Stop,
}

/// Watches over GPUs until it is stopped.
#[derive(Debug)]
pub struct Monitor {
    letters: mpsc::Sender<Letter>,
    shared: Arc<Shared>,
    gpus: Vec<Identity>,
}

#[derive(Debug)]
struct Shared {
    nvml: Mutex<Option<Nvml>>,
    /// Without NVML nothing.
    driver: Option<Driver>,
    times: Mutex<Times>,
    /// Counts readings.
    readings: watch::Sender<u64>,
    letters: mpsc::WeakSender<Letter>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Times {
    /// When the reading that is on its way was asked for.
    asked: Option<Instant>,
    /// When the last one came.
    read: Option<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Monitor {
    /// Starts watching over the GPUs that NVML shows; without NVML only what is reported counts. On a runtime. `hostname` is a label
    /// of the metrics.
    pub async fn start(hostname: &str, metrics: &Arc<Metrics>) -> (Monitor, Verdicts) {
        let (letters, inbox) = mpsc::channel(LETTERS_MAX);
        let (verdicts, judged) = mpsc::channel(LETTERS_MAX);
        let to = letters.clone().downgrade();
        let tell = move |place, observation| {
            // Gone: the daemon stops. Full: the thread that reports waits.
            if let Some(letters) = to.upgrade() {
                drop(letters.blocking_send(Letter::Event(place, observation)));
            }
        };
        let nvml = tokio::task::spawn_blocking(|| Nvml::start_with_events(tell)).await;
        let nvml = match nvml.unwrap_or_else(|error| Err(Absent::Unusable(error.to_string()))) {
            Ok(nvml) => Some(nvml),
            Err(absent) => {
                tracing::info!(reason = %absent, "GPUs are not watched");
                None
            }
        };
        let gpus = nvml.as_ref().map(|nvml| nvml.gpus().to_vec()).unwrap_or_default();
        let driver = nvml.as_ref().map(|nvml| nvml.driver().clone());
        if let Some(driver) = &driver {
            tracing::info!(driver = driver.version, gpus = gpus.len(), "GPUs are watched");
            if driver.silent > 0 {
                tracing::error!(
                    gpus = driver.silent,
                    "GPUs do not say who they are: lost, or not allowed to the daemon"
                );
            }
        }
        for gpu in &gpus {
            metrics.gpu.known(gpu, hostname);
        }
        let shared = Arc::new(Shared {
            nvml: Mutex::new(nvml),
            driver,
            times: Mutex::default(),
            readings: watch::Sender::new(0),
            letters: letters.downgrade(),
            metrics: Arc::clone(metrics),
        });
        let watcher = Watcher {
            shared: Arc::clone(&shared),
            instances: vec![Vec::new(); gpus.len()],
            gpus: gpus.clone(),
            health: HashMap::new(),
            hostname: hostname.to_owned(),
            verdicts,
        };
        tokio::spawn(watcher.run(inbox));
        (Monitor { letters, shared, gpus }, judged)
    }

    /// Watches over nothing: for an engine in a process that is not the node's daemon.
    pub fn idle(metrics: &Arc<Metrics>) -> Monitor {
        let (letters, _) = mpsc::channel(1);
        let shared = Arc::new(Shared {
            nvml: Mutex::new(None),
            driver: None,
            times: Mutex::default(),
            readings: watch::Sender::new(0),
            letters: letters.downgrade(),
            metrics: Arc::clone(metrics),
        });
        Monitor { letters, shared, gpus: Vec::new() }
    }

    /// The GPUs that NVML showed at the start.
    pub fn gpus(&self) -> &[Identity] {
        &self.gpus
    }

    /// Reports an observation of the device with this UUID, such as a loss that CUDA noticed.
    pub async fn observe(&self, uuid: &str, observation: Observation) {
        // Gone only while it stops.
        drop(self.letters.send(Letter::Report(uuid.to_owned(), observation)).await);
    }

    /// Brings the metrics up to date: with readings of this moment, or without any if the driver does not answer in time.
    pub async fn collect(&self) {
        let mut readings = self.shared.readings.subscribe();
        let Some(wait) = self.shared.ask() else { return };
        if timeout(wait, readings.changed()).await.is_err() {
            self.shared.unread();
        }
    }

    /// Stops watching and shuts NVML down, unless the driver hangs.
    pub async fn stop(&self) {
        let nvml = lock(&self.shared.nvml).take();
        drop(self.letters.send(Letter::Stop).await);
        let Some(nvml) = nvml else { return };
        let stopped = tokio::task::spawn_blocking(|| nvml.stop(STOP_TIMEOUT)).await;
        if !matches!(stopped, Ok(true)) {
            tracing::warn!("the NVIDIA driver does not answer: it is left to itself");
        }
    }
}

impl Shared {
    /// Asks for readings if there are none of this moment: how long to wait for them.
    fn ask(&self) -> Option<Duration> {
        let nvml = lock(&self.nvml);
        let nvml = nvml.as_ref()?;
        let mut times = lock(&self.times);
        if let Some(asked) = times.asked {
            return Some(READING_TIMEOUT.saturating_sub(asked.elapsed()));
        }
        if times.read.is_some_and(|read| read.elapsed() < READING_AGE_MIN) {
            return None;
        }
        let letters = self.letters.clone();
        let asked = nvml.ask(move |readings| {
            if let Some(letters) = letters.upgrade() {
                drop(letters.blocking_send(Letter::Readings(readings)));
            }
        });
        if asked {
            times.asked = Some(Instant::now());
        }
        Some(READING_TIMEOUT)
    }

    /// The driver does not answer.
    fn unread(&self) {
        if let Some(driver) = &self.driver {
            self.metrics.gpu.unread(driver);
        }
    }

    /// Whether readings are overdue.
    fn overdue(&self) -> bool {
        lock(&self.times).asked.is_some_and(|asked| asked.elapsed() >= READING_TIMEOUT)
    }
}

/// What the task owns.
struct Watcher {
    shared: Arc<Shared>,
    gpus: Vec<Identity>,
    /// UUIDs of the instances of each GPU, as last read.
    instances: Vec<Vec<String>>,
    /// By UUID; of devices that NVML does not show too, once they are reported.
    health: HashMap<String, Health>,
    hostname: String,
    verdicts: mpsc::Sender<(String, Verdict)>,
}

impl Watcher {
    async fn run(mut self, mut letters: mpsc::Receiver<Letter>) {
        let mut looks = interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = false;
        loop {
            let letter = tokio::select! {
                letter = letters.recv() => letter,
                _ = looks.tick() => {
                    let _ = self.shared.ask();
                    if self.shared.overdue() && !std::mem::replace(&mut silent, true) {
                        tracing::error!("the NVIDIA driver does not answer");
                        self.shared.unread();
                    }
                    continue;
                }
            };
            match letter {
                None | Some(Letter::Stop) => return,
                Some(Letter::Event(place, observation)) => self.event(place, observation).await,
                Some(Letter::Report(uuid, observation)) => {
                    let place = self.gpus.iter().position(|gpu| gpu.uuid == uuid);
                    self.observe(place, uuid, observation).await;
                }
                Some(Letter::Readings(readings)) => {
                    silent = false;
                    self.read(readings).await;
                }
            }
        }
    }

    async fn event(&mut self, place: usize, observation: Observation) {
        let Some(gpu) = self.gpus.get(place) else { return };
        if let Observation::Xid(xid) = observation {
            tracing::warn!(gpu = gpu.uuid, xid, "the driver reports an XID");
            self.shared.metrics.gpu.xid(gpu, &self.hostname, xid);
        }
        let uuid = gpu.uuid.clone();
        self.observe(Some(place), uuid, observation).await;
    }

    async fn read(&mut self, readings: Readings) {
        let answered =
            self.gpus.iter().zip(&readings).filter_map(|(gpu, reading)| Some((gpu, reading.as_ref().ok()?)));
        if let Some(driver) = &self.shared.driver {
            self.shared.metrics.gpu.read(driver, &self.hostname, answered);
        }
        for (place, reading) in readings.into_iter().enumerate() {
            let Some(gpu) = self.gpus.get(place) else { break };
            let uuid = gpu.uuid.clone();
            let observation = match reading {
                Err(_) => Observation::Lost,
                Ok(reading) => {
                    if let Some(known) = self.instances.get_mut(place) {
                        *known = reading.instances.into_iter().map(|instance| instance.uuid).collect();
                    }
                    Observation::Answered { ecc_uncorrected: reading.ecc.uncorrected_volatile }
                }
            };
            self.observe(Some(place), uuid, observation).await;
        }
        *lock(&self.shared.times) = Times { asked: None, read: Some(Instant::now()) };
        self.shared.readings.send_modify(|count| *count += 1);
    }

    /// Takes in an observation of the GPU at `place`, or of a device that NVML does not show.
    async fn observe(&mut self, place: Option<usize>, uuid: String, observation: Observation) {
        let Some(verdict) = self.health.entry(uuid.clone()).or_default().observe(observation) else { return };
        let gpu = place.and_then(|place| self.gpus.get(place));
        if let Some(gpu) = gpu {
            self.shared.metrics.gpu.verdict(gpu, &self.hostname, verdict);
        }
        match verdict {
            Verdict::Healthy => tracing::info!(gpu = uuid, "the GPU is in order again"),
            Verdict::Contained => tracing::error!(gpu = uuid, ?observation, "the GPU's memory had an error"),
            Verdict::Lost => tracing::error!(gpu = uuid, ?observation, "the GPU is lost"),
        }
        let instances = place.and_then(|place| self.instances.get(place)).cloned().unwrap_or_default();
        for uuid in std::iter::once(uuid).chain(instances) {
            // Nobody listens only while the daemon stops.
            drop(self.verdicts.send((uuid, verdict)).await);
        }
    }
}
