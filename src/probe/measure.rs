//! What the helper does.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::{FILE_BYTES_MIN, Mode, Report, Settings};
use crate::plan::{self, BLOCK_ALIGN, Direct, Layout};
use crate::shard::{
    Assignment, Batch, BatchFile, DeviceRegion, DirectShare, DirectThreads, Handles, Landing, Options,
    Progress, ReaderKind, Regions, Shard,
};
use crate::sys::cuda::{self, Context, DeviceMemory, Found};
use crate::sys::cufile::{Counters, Driver, Handle, Registered};

/// What is read of the file in one round, and memory that is taken on the device.
const ROUND_BYTES_MAX: u64 = 64 << 20;
/// Rounds of each way, in turns.
const ROUNDS_MAX: usize = 8;
/// No round is begun after this time.
const TIME_MAX: Duration = Duration::from_secs(3);

/// What both ways have in common.
struct Bench {
    context: Arc<Context>,
    memory: Arc<DeviceMemory>,
    file: Arc<OwnedFd>,
    layout: Layout,
    bytes: u64,
    block_bytes: u64,
    shard: Shard,
}

/// A direct way that has been opened.
struct Way {
    driver: Arc<Driver>,
    threads: DirectThreads,
    plan: Direct,
    /// Registered: taken into the share of a round and out of it again.
    region: Option<Registered>,
    handle: Option<Handle>,
}

/// Bytes and the time they took.
#[derive(Default)]
struct Sum {
    bytes: u64,
    time: Duration,
}

impl Sum {
    fn add(&mut self, bytes: u64, time: Duration) {
        self.bytes += bytes;
        self.time += time;
    }

    fn rate(&self) -> Option<f64> {
        (self.bytes > 0).then(|| self.bytes as f64 / self.time.as_secs_f64().max(1e-9))
    }
}

/// Measures, and tells what is known whenever it is more than before: the last thing told counts.
///
/// `file` was opened past the page cache.
pub fn measure(settings: &Settings, file: OwnedFd, mut tell: impl FnMut(&Report)) {
    // Nobody waits for a helper whose daemon is gone.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let mut report = Report::default();
    if let Err(reason) = all(settings, file, &mut report, &mut tell) {
        report.reason = Some(reason);
    }
    tell(&report);
}

fn all(
    settings: &Settings,
    file: OwnedFd,
    report: &mut Report,
    tell: &mut impl FnMut(&Report),
) -> Result<(), String> {
    let mut doing = |report: &mut Report, what: &str| {
        report.reason = Some(format!("{what} did not end"));
        tell(report);
    };
    doing(report, "reading by way of slots");
    let bench = Bench::new(settings, file)?;
    let began = Instant::now();
    let (mut staged, mut direct) = (Sum::default(), Sum::default());
    bench.staged(&mut Sum::default())?;
    bench.staged(&mut staged)?;
    report.staged_bytes_per_second = staged.rate();
    doing(report, "opening libcufile");
    let driver = Driver::open().map_err(|error| error.to_string())?;
    report.library = driver.version().ok();
    doing(report, "reading by cuFile");
    let mut way = bench.way(driver)?;
    // The first time is for what is made ready on the way, as for the other.
    let mut seen = bench.direct(&mut way, &mut Sum::default())?;
    for round in 0..ROUNDS_MAX {
        seen = add(seen, bench.direct(&mut way, &mut direct)?);
        if began.elapsed() > TIME_MAX && round > 0 {
            break;
        }
        bench.staged(&mut staged)?;
    }
    report.staged_bytes_per_second = staged.rate();
    report.direct_bytes_per_second = direct.rate();
    report.mode = Some(mode(seen, direct.bytes));
    report.reason = None;
    Ok(())
}

fn add(one: Counters, other: Counters) -> Counters {
    Counters {
        bytes: one.bytes + other.bytes,
        reads: one.reads + other.reads,
        p2p: one.p2p + other.p2p,
        nvfs: one.nvfs + other.nvfs,
        posix: one.posix + other.posix,
    }
}

/// The mode that carried `bytes`.
fn mode(seen: Counters, bytes: u64) -> Mode {
    match seen {
        _ if !seen.prove(bytes) => Mode::Compat,
        Counters { nvfs: 0, .. } => Mode::P2pdma,
        _ => Mode::NvidiaFs,
    }
}

impl Bench {
    fn new(settings: &Settings, file: OwnedFd) -> Result<Bench, String> {
        let stat = rustix::fs::fstat(&file).map_err(|error| error.to_string())?;
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if file_bytes < FILE_BYTES_MIN {
            return Err(format!("the file has fewer than {FILE_BYTES_MIN} bytes"));
        }
        let bytes = ROUND_BYTES_MAX.min(file_bytes - file_bytes % BLOCK_ALIGN);
        let devices = match cuda::find() {
            Found::NoLibrary => return Err("there is no libcuda.so.1".to_owned()),
            Found::Unusable(error) => return Err(format!("the NVIDIA driver cannot be used: {error}")),
            Found::Devices(devices) => devices,
        };
        let device = devices.into_iter().find(|device| device.uuid == settings.device);
        let device = device.ok_or_else(|| format!("the NVIDIA driver does not show {}", settings.device))?;
        let context = Context::new(device).map_err(|error| error.to_string())?;
        let memory = DeviceMemory::rounded(&context, bytes).map_err(|error| error.to_string())?;
        let memory = memory.ok_or("the bytes to read cannot be counted")?;
        let memory = DeviceMemory::new(&context, memory)
            .map_err(|error| format!("the device has no {memory} bytes for the measurement: {error}"))?;
        let layout = plan::packed(&[bytes], &[], None).ok_or("the bytes to read cannot be counted")?;
        let shard = Shard::start(Options {
            index: 0,
            reader: if settings.preadv2 { ReaderKind::Preadv2 } else { ReaderKind::IoUring },
            block_bytes: settings.block_bytes,
            depth: settings.depth,
            slots: settings.slots,
            cpus: Vec::new(),
            numa_node: None,
            page_cache: false,
            devices: vec![Arc::clone(&context)],
        });
        let shard = shard.map_err(|error| error.to_string())?;
        let (memory, file) = (Arc::new(memory), Arc::new(file));
        Ok(Bench { context, memory, file, layout, bytes, block_bytes: settings.block_bytes, shard })
    }

    fn batch(&self, direct: &Direct) -> Result<Batch, String> {
        let layouts = std::slice::from_ref(&self.layout);
        let plan = plan::scatter(layouts, &[self.bytes], direct, self.block_bytes);
        let plan = plan.ok_or("the reads cannot be counted")?;
        let file = BatchFile { name: "the file".to_owned(), bytes: self.bytes, expected: None };
        let handles = Handles {
            file: Arc::clone(&self.file),
            direct: Some(Arc::clone(&self.file)),
            landing: Landing::Slot,
        };
        let regions = Regions::Devices(vec![DeviceRegion { device: 0, memory: Arc::clone(&self.memory) }]);
        Ok(Batch::new(plan, (vec![file], vec![handles]), regions, Arc::new(Progress::default())))
    }

    fn staged(&self, sum: &mut Sum) -> Result<(), String> {
        let batch = Arc::new(self.batch(&Direct::default())?);
        let moves = 0..batch.plan.moves.len() as u32;
        let (home, mut back) = mpsc::channel(1);
        let began = Instant::now();
        let assignment = Assignment {
            batch: Arc::clone(&batch),
            moves: std::iter::once(moves).collect(),
            priority: 0,
            home,
        };
        self.shard.send(assignment).map_err(|_| "the shard thread has ended")?;
        while back.blocking_recv().is_some() {}
        sum.add(self.bytes, began.elapsed());
        self.arrived(&batch)
    }

    fn way(&self, driver: Arc<Driver>) -> Result<Way, String> {
        let plan = plan::direct(std::slice::from_ref(&self.layout), 1, |_, _| true);
        let plan = plan.ok_or("the reads cannot be counted")?;
        let region = Registered::new(&driver, &self.memory).map_err(|error| error.to_string())?;
        let handle = Handle::new(&driver, &self.file).map_err(|error| error.to_string())?;
        let threads = DirectThreads::start(&self.context).map_err(|error| error.message)?;
        Ok(Way { driver, threads, plan, region: Some(region), handle: Some(handle) })
    }

    /// One round by cuFile; → what its counters say of it.
    fn direct(&self, way: &mut Way, sum: &mut Sum) -> Result<Counters, String> {
        let before = self.counters(&way.driver)?;
        let mut batch = self.batch(&way.plan)?;
        batch.direct =
            Some(DirectShare::new(way.plan.clone(), vec![way.region.take()], vec![way.handle.take()]));
        let batch = Arc::new(batch);
        let (home, mut back) = mpsc::channel(1);
        let began = Instant::now();
        way.threads.send(&batch, 0, &home);
        drop(home);
        while back.blocking_recv().is_some() {}
        sum.add(self.bytes, began.elapsed());
        self.arrived(&batch)?;
        let share = Arc::into_inner(batch).and_then(|batch| batch.direct);
        let share = share.ok_or("a thread did not give the measurement back")?;
        if let (_, Some(why)) = share.missed() {
            return Err(why);
        }
        way.region = share.regions.into_iter().next().flatten();
        way.handle = share.handles.into_iter().next().flatten();
        Ok(self.counters(&way.driver)?.since(before))
    }

    fn counters(&self, driver: &Driver) -> Result<Counters, String> {
        let found = driver.counters(self.context.device()).map_err(|error| error.to_string())?;
        found.ok_or_else(|| "cuFile's counters do not name this device".to_owned())
    }

    fn arrived(&self, batch: &Batch) -> Result<(), String> {
        match batch.progress.failure() {
            Some(error) => Err(error.message.clone()),
            None => Ok(()),
        }
    }
}
