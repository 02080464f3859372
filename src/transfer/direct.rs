//! Where the direct path is used: what was measured of each pair of file system and GPU, and what came of it since.
//!
//! Nothing is known at the start, and nothing waits: files are loaded by way of slots until a helper ([`crate::probe`])
//! has measured a pair on one of its files. A transfer whose path cuFile's counters do not prove switches its pair off
//! (invariant 10).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};

use super::load::blocking;
use crate::api::methods::{DirectState, DirectStatus};
use crate::config;
use crate::error::{Code, Error, Result};
use crate::plan::Direct as Reads;
use crate::probe::{self, Mode, Report, Settings};
use crate::shard::{Batch, DirectShare, DirectThreads, Options, Path, Progress, ReaderKind};
use crate::source::file::OpenFile;
use crate::sys::cuda::{Context, DeviceMemory};
use crate::sys::cufile::{Counters, Driver, Handle, Registered};
use crate::telemetry::metrics::Metrics;

/// By how much the direct path must beat the other to be used: less is within what a measurement of seconds is worth.
const ADVANTAGE: f64 = 1.05;

/// A block device, by its numbers.
type Drive = (u32, u32);

/// A file system's block device and a GPU.
type Pair = (Drive, usize);

fn drive_of(file: &OpenFile) -> Drive {
    (file.stamp.dev_major, file.stamp.dev_minor)
}

/// How a pair stands.
#[derive(Debug, Clone)]
struct Known {
    state: DirectState,
    report: Report,
    /// Why it is not used, if it is not.
    reason: Option<String>,
}

/// cuFile, and the threads of each GPU.
#[derive(Debug)]
struct Opened {
    driver: Arc<Driver>,
    threads: BTreeMap<usize, DirectThreads>,
}

/// The direct path of this daemon. Belongs to the control thread.
#[derive(Debug)]
pub struct DirectPath {
    choice: config::Direct,
    timeout: Duration,
    /// As the shard threads that it is compared with; `None`: there are none.
    options: Option<Options>,
    contexts: Vec<Arc<Context>>,
    metrics: Arc<Metrics>,
    pairs: RefCell<BTreeMap<Pair, Known>>,
    opened: RefCell<Option<Opened>>,
    /// One measurement at a time.
    turn: Semaphore,
    /// cuFile was asked to open, and has not answered.
    opening: Cell<bool>,
}

/// What of a load goes directly, ready to be read.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) share: DirectShare,
    /// Counters of each GPU that takes part, before.
    pub(super) before: Vec<(usize, Counters)>,
}

impl DirectPath {
    /// Nothing is known yet.
    pub(super) fn new(
        config: &config::Gpu,
        contexts: Vec<Arc<Context>>,
        options: Option<Options>,
        metrics: Arc<Metrics>,
    ) -> Rc<DirectPath> {
        Rc::new(DirectPath {
            choice: config.direct,
            timeout: Duration::from_millis(config.direct_probe_timeout_ms),
            options,
            contexts,
            metrics,
            pairs: RefCell::default(),
            opened: RefCell::default(),
            turn: Semaphore::new(1),
            opening: Cell::new(false),
        })
    }

    /// What is known of a GPU.
    pub fn status(&self, gpu: usize) -> Vec<DirectStatus> {
        let pairs = self.pairs.borrow();
        let own = pairs.iter().filter(|((_, device), _)| *device == gpu);
        own.map(|((drive, _), known)| DirectStatus {
            drive: name_of(*drive),
            state: known.state,
            mode: known.report.mode.map(|mode| mode.as_str().to_owned()),
            direct_bytes_per_second: known.report.direct_bytes_per_second,
            staged_bytes_per_second: known.report.staged_bytes_per_second,
            reason: known.reason.clone(),
        })
        .collect()
    }

    /// Whether files of a drive go to a GPU directly now.
    pub(super) fn used(&self, file: &OpenFile, gpu: usize) -> bool {
        let pairs = self.pairs.borrow();
        let used = pairs.get(&(drive_of(file), gpu)).is_some_and(|known| known.state == DirectState::Used);
        used && file.direct.is_some()
            && self.opened.borrow().as_ref().is_some_and(|opened| opened.threads.contains_key(&gpu))
    }

    /// Files were loaded to a GPU: what is not known yet of their drives is measured on the largest of each.
    pub(super) fn learn(self: &Rc<Self>, files: &[OpenFile], gpu: usize) {
        if self.choice == config::Direct::Off || self.options.is_none() {
            return;
        }
        let mut largest: BTreeMap<Drive, &OpenFile> = BTreeMap::new();
        for file in files.iter().filter(|file| file.stamp.bytes >= probe::FILE_BYTES_MIN) {
            let best = largest.entry(drive_of(file)).or_insert(file);
            if file.stamp.bytes > best.stamp.bytes {
                *best = file;
            }
        }
        for (drive, file) in largest {
            // A file system that refuses O_DIRECT has nothing to measure.
            let Some(file) = &file.direct else { continue };
            let pair = (drive, gpu);
            if self.pairs.borrow().contains_key(&pair) {
                continue;
            }
            let known = Known {
                state: DirectState::Probing,
                report: Report::default(),
                reason: Some("it is being measured".to_owned()),
            };
            self.pairs.borrow_mut().insert(pair, known);
            tokio::task::spawn_local(Rc::clone(self).probe(pair, Arc::clone(file)));
        }
    }

    async fn probe(self: Rc<Self>, pair: Pair, file: Arc<OwnedFd>) {
        // Never closed.
        let _turn = self.turn.acquire().await;
        let (drive, gpu) = pair;
        let report = self.ask(gpu, file).await;
        let mut reason = refusal(self.choice, &report);
        if reason.is_none() {
            reason = self.open(gpu).await.err();
        }
        let state = if reason.is_none() { DirectState::Used } else { DirectState::NotUsed };
        let uuid = &self.contexts[gpu].device().uuid;
        tracing::info!(
            drive = name_of(drive),
            device = uuid,
            library = report.library,
            mode = report.mode.map(Mode::as_str),
            direct_bytes_per_second = report.direct_bytes_per_second,
            staged_bytes_per_second = report.staged_bytes_per_second,
            used = state == DirectState::Used,
            reason,
            "direct path measured"
        );
        self.publish(pair, &report, state);
        self.pairs.borrow_mut().insert(pair, Known { state, report, reason });
    }

    /// Has a helper measure, on a thread of its own: it may take as long as the helper.
    async fn ask(&self, gpu: usize, file: Arc<OwnedFd>) -> Report {
        let nobody = |reason: &str| Report { reason: Some(reason.to_owned()), ..Report::default() };
        let Some(options) = &self.options else { return nobody("there is no shard thread") };
        let settings = Settings {
            device: self.contexts[gpu].device().uuid.clone(),
            preadv2: options.reader == ReaderKind::Preadv2,
            block_bytes: options.block_bytes,
            depth: options.depth,
            slots: options.slots,
        };
        let timeout = self.timeout;
        apart("direct-probe", move || probe::ask(&settings, file.as_fd(), timeout))
            .await
            .unwrap_or_else(|| nobody("the thread that measures has failed"))
    }

    /// Opens cuFile in this process, in which the helper has seen it open, and starts the threads of a GPU.
    async fn open(&self, gpu: usize) -> Result<(), String> {
        let known = self.opened.borrow().as_ref().map(|opened| Arc::clone(&opened.driver));
        let driver = match known {
            Some(driver) => driver,
            None if self.opening.get() => return Err("libcufile has not opened so far".to_owned()),
            None => {
                self.opening.set(true);
                // A thread of its own: if it never comes back, nothing waits for it.
                let opening = apart("direct-open", Driver::open);
                let opened = tokio::time::timeout(self.timeout, opening).await;
                let opened = opened.map_err(|_| "libcufile did not open in the daemon".to_owned())?;
                self.opening.set(false);
                opened
                    .ok_or_else(|| "the thread that opens libcufile has failed".to_owned())?
                    .map_err(|error| error.to_string())?
            }
        };
        let context = Arc::clone(&self.contexts[gpu]);
        let threads =
            blocking(move || DirectThreads::start(&context)).await.map_err(|error| error.message)?;
        let mut opened = self.opened.borrow_mut();
        let opened = opened.get_or_insert_with(|| Opened { driver, threads: BTreeMap::new() });
        opened.threads.insert(gpu, threads);
        Ok(())
    }

    /// Registers what is read directly. `None`: it cannot be, which is said, and all goes by way of slots.
    pub(super) async fn prepare(
        &self,
        reads: Reads,
        files: &[OpenFile],
        regions: &[(usize, Arc<DeviceMemory>)],
    ) -> Result<Option<Ready>> {
        let driver = self.opened.borrow().as_ref().map(|opened| Arc::clone(&opened.driver));
        let Some(driver) = driver.filter(|_| !reads.reads.is_empty()) else { return Ok(None) };
        let bytes = reads.bytes();
        let into = |region: u32| reads.reads.iter().any(|read| read.region == region);
        let of = |file: u32| reads.reads.iter().any(|read| read.file == file);
        let regions: Vec<_> = (0u32..)
            .zip(regions)
            .map(|(region, (gpu, memory))| into(region).then(|| (*gpu, Arc::clone(memory))))
            .collect();
        let files: Vec<_> =
            (0u32..).zip(files).map(|(number, file)| file.direct.clone().filter(|_| of(number))).collect();
        let made = blocking(move || Ok(register(&driver, reads, &regions, &files)));
        match made.await? {
            Ok(ready) => Ok(Some(ready)),
            Err(reason) => {
                self.fell_back(bytes, &reason);
                Ok(None)
            }
        }
    }

    /// Hands what goes directly to the threads of its GPUs. What cannot be handed over fails the batch.
    pub(super) fn send(
        &self,
        batch: &Arc<Batch>,
        device_of: impl Fn(u32) -> Option<usize>,
        home: &mpsc::Sender<Arc<Batch>>,
    ) {
        let Some(share) = &batch.direct else { return };
        let opened = self.opened.borrow();
        for region in share.regions_used() {
            let threads =
                device_of(region).zip(opened.as_ref()).and_then(|(gpu, opened)| opened.threads.get(&gpu));
            match threads {
                Some(threads) => threads.send(batch, region, home),
                None => {
                    batch.progress.fail(Error::new(Code::Internal, "a GPU has no threads of the direct path"))
                }
            }
        }
    }

    /// Says by which path bytes came, as cuFile's counters have it; a pair of which they say otherwise is not used any more.
    /// → the reads that were not carried out.
    pub(super) async fn settle(
        &self,
        came: Settling,
        progress: &Progress,
        files: &[OpenFile],
    ) -> Result<Vec<u32>> {
        let driver = self.opened.borrow().as_ref().map(|opened| Arc::clone(&opened.driver));
        let driver = driver.ok_or_else(|| Error::new(Code::Internal, "cuFile is not open"))?;
        let devices: Vec<_> =
            came.before.iter().map(|(gpu, _)| self.contexts[*gpu].device().clone()).collect();
        let after =
            blocking(move || Ok(devices.iter().map(|device| driver.counters(device)).collect::<Vec<_>>()));
        let after = after.await?;
        for ((gpu, before), after) in came.before.iter().zip(after) {
            let bytes: u64 = came.arrived.iter().filter(|(of, _)| of == gpu).map(|(_, bytes)| bytes).sum();
            if bytes == 0 {
                continue;
            }
            let seen = after.ok().flatten().unwrap_or_default().since(*before);
            let proven = seen.prove(bytes);
            let reads = self.metrics.file_reads();
            if proven {
                progress.prove(Path::Direct, bytes);
                reads.direct_bytes.inc_by(bytes);
                continue;
            }
            progress.prove(Path::Compat, bytes);
            reads.compat_bytes.inc_by(bytes);
            let reason = format!(
                "of {} reads cuFile counts {} by way of host memory and {} by the drive itself, for {bytes} bytes of a load \
                 ({} counted): not used any more until the daemon is restarted",
                seen.reads,
                seen.posix,
                seen.p2p.saturating_add(seen.nvfs),
                seen.bytes
            );
            files.iter().for_each(|file| self.switch_off((drive_of(file), *gpu), &reason));
        }
        let missed = came.missed_bytes;
        if let Some(why) = came.why {
            self.fell_back(missed, &why);
            // Not one has succeeded: the next load need not find that out again.
            for (gpu, _) in
                came.before.iter().filter(|(gpu, _)| !came.arrived.iter().any(|(of, _)| of == gpu))
            {
                let reason = format!("no read of a load succeeded: {why}");
                files.iter().for_each(|file| self.switch_off((drive_of(file), *gpu), &reason));
            }
        }
        Ok(came.missed)
    }

    fn fell_back(&self, bytes: u64, reason: &str) {
        tracing::warn!(bytes, reason, "the direct path failed: read by way of slots instead");
        self.metrics.direct_fallback_bytes.inc_by(bytes);
    }

    fn switch_off(&self, pair: Pair, reason: &str) {
        let mut pairs = self.pairs.borrow_mut();
        let Some(known) = pairs.get_mut(&pair).filter(|known| known.state == DirectState::Used) else {
            return;
        };
        known.state = DirectState::NotUsed;
        known.reason = Some(reason.to_owned());
        let (report, uuid) = (known.report.clone(), &self.contexts[pair.1].device().uuid);
        drop(pairs);
        tracing::warn!(drive = name_of(pair.0), device = uuid, reason, "direct path switched off");
        self.publish(pair, &report, DirectState::NotUsed);
    }

    fn publish(&self, (drive, gpu): Pair, report: &Report, state: DirectState) {
        let device = format!("gpu:{}", self.contexts[gpu].device().uuid);
        let rates = (report.direct_bytes_per_second, report.staged_bytes_per_second);
        self.metrics.direct_path(&device, &name_of(drive), rates, state == DirectState::Used);
    }
}

/// What came of a share, taken out of its batch.
#[derive(Debug)]
pub(super) struct Settling {
    before: Vec<(usize, Counters)>,
    /// GPU and bytes of each read that was carried out.
    arrived: Vec<(usize, u64)>,
    missed: Vec<u32>,
    missed_bytes: u64,
    why: Option<String>,
}

impl Settling {
    /// Of the share that `before` was taken for.
    pub(super) fn of(
        share: &DirectShare,
        before: Vec<(usize, Counters)>,
        device_of: impl Fn(u32) -> Option<usize>,
    ) -> Settling {
        let carried = share.carried_out();
        let arrived = carried.filter_map(|read| Some((device_of(read.region)?, read.bytes)));
        let (missed, why) = share.missed();
        Settling { arrived: arrived.collect(), missed_bytes: share.missed_bytes(), missed, why, before }
    }
}

/// Registers regions and files, and looks at the counters. In words, if it cannot.
fn register(
    driver: &Arc<Driver>,
    reads: Reads,
    regions: &[Option<(usize, Arc<DeviceMemory>)>],
    files: &[Option<Arc<OwnedFd>>],
) -> Result<Ready, String> {
    let mut before = BTreeMap::new();
    for (gpu, memory) in regions.iter().flatten() {
        let counters = driver.counters(memory.context().device()).map_err(|error| error.to_string())?;
        before.insert(*gpu, counters.ok_or("cuFile's counters do not name the device")?);
    }
    let handle =
        |file: &Option<Arc<OwnedFd>>| file.as_ref().map(|file| Handle::new(driver, file)).transpose();
    let region = |region: &Option<(usize, Arc<DeviceMemory>)>| {
        region.as_ref().map(|(_, memory)| Registered::new(driver, memory)).transpose()
    };
    let handles = files.iter().map(handle).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let regions = regions.iter().map(region).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    Ok(Ready { share: DirectShare::new(reads, regions, handles), before: before.into_iter().collect() })
}

/// Why a pair of which this was found is not used; `None`: it is.
fn refusal(choice: config::Direct, report: &Report) -> Option<String> {
    let (Some(mode), Some(direct)) = (report.mode, report.direct_bytes_per_second) else {
        return Some(report.reason.clone().unwrap_or_else(|| "nothing was found out".to_owned()));
    };
    if !mode.is_direct() {
        return Some("cuFile reads by way of host memory here (compat mode)".to_owned());
    }
    let staged = report.staged_bytes_per_second.unwrap_or_default();
    if choice == config::Direct::Auto && direct < staged * ADVANTAGE {
        return Some(format!(
            "{:.2} GB/s directly, {:.2} GB/s by way of host memory: no gain",
            direct / 1e9,
            staged / 1e9
        ));
    }
    None
}

/// Runs something that may never come back on a thread that nobody waits for at the end.
async fn apart<T: Send + 'static>(name: &str, act: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (done, result) = oneshot::channel();
    let body = move || drop(done.send(act()));
    std::thread::Builder::new().name(name.to_owned()).spawn(body).ok()?;
    result.await.ok()
}

/// The kernel's name of a block device, else its numbers.
fn name_of((major, minor): Drive) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let name = link.ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
    name.unwrap_or_else(|| format!("{major}:{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Direct::{Auto, On};

    #[test]
    fn only_what_is_direct_and_faster_is_used_unless_it_is_demanded() {
        let report = |mode, direct, staged| Report {
            mode: Some(mode),
            direct_bytes_per_second: Some(direct),
            staged_bytes_per_second: Some(staged),
            ..Report::default()
        };
        assert_eq!(refusal(Auto, &report(Mode::NvidiaFs, 6e9, 5e9)), None);
        assert_eq!(refusal(On, &report(Mode::P2pdma, 4e9, 5e9)), None);
        assert!(refusal(Auto, &report(Mode::P2pdma, 5.1e9, 5e9)).unwrap().contains("no gain"));
        assert!(refusal(On, &report(Mode::Compat, 9e9, 5e9)).unwrap().contains("compat"));
        let hung = Report { reason: Some("opening did not end".to_owned()), ..Report::default() };
        assert_eq!(refusal(On, &hung).unwrap(), "opening did not end");
    }
}
