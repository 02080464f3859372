//! Devices, their memory, and its account across processes.
//!
//! An allocation is a file below the machine's directory, in the folder of its device. Whoever has it open or mapped
//! shares one open file description, which holds a shared lock: so the allocation is in use exactly as long as the lock
//! is, whatever processes die. A file whose lock can be had exclusively is dead, and is removed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fs::{FlockOperation, flock};

use crate::code::{self, Outcome};
use crate::config::{Config, Device};
use crate::stream::{Link, Stream};

/// Unit of sizes and addresses of device memory, bytes.
pub(crate) const GRANULARITY: u64 = 2 << 20;
/// What new memory is filled with: a user who forgets to clear or to fill is seen.
pub(crate) const POISON: u8 = 0xa5;

/// The simulated machine, as this process sees it.
pub(crate) struct Machine {
    pub(crate) config: Config,
    pub(crate) devices: Vec<DeviceState>,
    pub(crate) allocations: Mutex<HashMap<u64, Arc<Allocation>>>,
    next: AtomicU64,
    calls: Mutex<HashMap<String, u64>>,
}

/// One device in this process.
pub(crate) struct DeviceState {
    pub(crate) device: Device,
    /// The error that its context has met; 0: none.
    pub(crate) sticky: Arc<AtomicU32>,
    pub(crate) h2d: Arc<Link>,
    pub(crate) d2h: Arc<Link>,
    default_stream: OnceLock<Arc<Stream>>,
    /// How often its context was retained.
    pub(crate) retained: AtomicU32,
}

/// Memory of a device.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) file: OwnedFd,
    pub(crate) bytes: u64,
    pub(crate) device: usize,
}

static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();

/// The machine, once `cuInit` was called.
pub(crate) fn machine() -> Outcome<&'static Machine> {
    MACHINE.get().and_then(Option::as_ref).ok_or(code::NOT_INITIALIZED)
}

/// Reads the environment, the first time.
pub(crate) fn init() -> Outcome {
    let made = MACHINE.get_or_init(|| Config::read().map(Machine::new));
    let machine = made.as_ref().ok_or(code::UNKNOWN)?;
    if machine.devices.is_empty() { Err(code::NO_DEVICE) } else { Ok(()) }
}

impl Machine {
    fn new(config: Config) -> Machine {
        let state = |device: &Device| {
            let sticky = Arc::new(AtomicU32::new(0));
            DeviceState {
                device: device.clone(),
                sticky,
                h2d: Arc::new(Link::new(device.h2d_bytes_per_second)),
                d2h: Arc::new(Link::new(device.d2h_bytes_per_second)),
                default_stream: OnceLock::new(),
                retained: AtomicU32::new(0),
            }
        };
        Machine {
            devices: config.devices.iter().map(state).collect(),
            config,
            allocations: Mutex::default(),
            next: AtomicU64::new(1),
            calls: Mutex::default(),
        }
    }

    /// A number that was not given out before.
    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn device(&self, ordinal: i32) -> Outcome<(usize, &DeviceState)> {
        let index = usize::try_from(ordinal).map_err(|_| code::INVALID_DEVICE)?;
        self.devices.get(index).map(|device| (index, device)).ok_or(code::INVALID_DEVICE)
    }

    /// Counts a call of `name`; the code that it is to fail with, if it is.
    pub(crate) fn fault(&self, name: &str) -> Option<u32> {
        let fault = self.config.faults.get(name)?;
        let mut calls = lock(&self.calls);
        let count = calls.entry(name.to_owned()).or_default();
        *count += 1;
        (*count == fault.call || fault.onwards && *count > fault.call).then_some(fault.code)
    }

    fn folder(&self, device: usize) -> PathBuf {
        self.config.directory.join(&self.devices[device].device.uuid)
    }

    /// New memory, filled with [`POISON`].
    pub(crate) fn allocate(&self, device: usize, bytes: u64) -> Outcome<Arc<Allocation>> {
        let folder = self.folder(device);
        fs::create_dir_all(&folder).map_err(|_| code::UNKNOWN)?;
        let _turn = turn(&folder)?;
        let used = used(&folder)?;
        if bytes > self.devices[device].device.memory_bytes.saturating_sub(used) {
            return Err(code::OUT_OF_MEMORY);
        }
        let path = folder.join(format!("{}-{}.memory", std::process::id(), self.number()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .map_err(|_| code::UNKNOWN)?;
        flock(&file, FlockOperation::LockShared).map_err(|_| code::UNKNOWN)?;
        file.set_len(bytes).map_err(|_| code::OUT_OF_MEMORY)?;
        Ok(Arc::new(Allocation { file: file.into(), bytes, device }))
    }

    /// Free bytes of a device, all processes counted.
    pub(crate) fn free(&self, device: usize) -> Outcome<u64> {
        let folder = self.folder(device);
        fs::create_dir_all(&folder).map_err(|_| code::UNKNOWN)?;
        let _turn = turn(&folder)?;
        Ok(self.devices[device].device.memory_bytes.saturating_sub(used(&folder)?))
    }

    /// The allocation that a descriptor of another process stands for.
    pub(crate) fn import(&self, fd: OwnedFd, current: usize) -> Outcome<Arc<Allocation>> {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let path = fs::read_link(link).map_err(|_| code::INVALID_VALUE)?;
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        let inside = path.starts_with(&self.config.directory);
        let device = folder
            .filter(|_| inside)
            .and_then(|uuid| self.devices.iter().position(|known| known.device.uuid == uuid));
        let device = device.ok_or(code::INVALID_VALUE)?;
        // The importer must be on the same device.
        if device != current {
            return Err(code::INVALID_DEVICE);
        }
        let bytes = rustix::fs::fstat(&fd).map_err(|_| code::INVALID_VALUE)?.st_size;
        let bytes = u64::try_from(bytes).map_err(|_| code::INVALID_VALUE)?;
        Ok(Arc::new(Allocation { file: fd, bytes, device }))
    }

    /// Work of a device without a stream of its own.
    pub(crate) fn default_stream(&self, device: usize) -> Arc<Stream> {
        let state = &self.devices[device];
        Arc::clone(state.default_stream.get_or_init(|| Stream::start(device, Arc::clone(&state.sticky))))
    }
}

/// Locks a mutex that no panic can have left half-changed: nothing here panics while it holds one.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Only one process at a time counts or allocates memory of a device.
fn turn(folder: &Path) -> Outcome<File> {
    let file = File::options().create(true).truncate(false).write(true).open(folder.join("turn"));
    let file = file.map_err(|_| code::UNKNOWN)?;
    flock(&file, FlockOperation::LockExclusive).map_err(|_| code::UNKNOWN)?;
    Ok(file)
}

/// Bytes in use in the folder of a device. Removes what nobody has any more.
fn used(folder: &Path) -> Outcome<u64> {
    let mut used = 0;
    for entry in fs::read_dir(folder).map_err(|_| code::UNKNOWN)?.flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "memory") {
            continue;
        }
        let Ok(file) = File::open(&path) else { continue };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => drop(fs::remove_file(&path)),
            Err(_) => used += file.metadata().map_or(0, |metadata| metadata.len()),
        }
    }
    Ok(used)
}
