//! The simulated machine as NVML sees it: physical GPUs with their instances, and the health that a file decides.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cuda_sim_devices::{Device, PciAddress, derived_uuid, directory, load, uuid_text};
use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED as DRIVER_NOT_LOADED,
    nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST as GPU_IS_LOST,
    nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT as INVALID_ARGUMENT,
    nvmlReturn_enum_NVML_ERROR_UNINITIALIZED as UNINITIALIZED, nvmlReturn_enum_NVML_ERROR_UNKNOWN as UNKNOWN,
    nvmlReturn_t,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use serde::Deserialize;

/// File of the devices' health in the directory of the simulated machine, by the UUID of the physical GPU.
const HEALTH_FILE: &str = "health.json";
/// Kind of derived UUID of the GPU that simulated instances are part of; devices of the list have kind 0.
const PARENT: u8 = 1;
/// In a handle the instance is below, the GPU above; both count from 1, so that no handle is null.
const INSTANCE_BITS: usize = 8;

/// What the file says about one GPU; what it does not say is in order.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Health {
    pub(crate) ecc_corrected: u64,
    pub(crate) ecc_uncorrected: u64,
    pub(crate) remapped_rows: u64,
    pub(crate) remapped_rows_corrected: u64,
    pub(crate) remap_pending: bool,
    pub(crate) remap_failed: bool,
    pub(crate) temperature: Option<u32>,
    pub(crate) power_milliwatts: Option<u32>,
    pub(crate) utilization: u32,
    pub(crate) memory_used_bytes: u64,
    pub(crate) throttle: u64,
    pub(crate) link_width: Option<u32>,
    /// The GPU has fallen off the bus.
    pub(crate) lost: bool,
    /// Calls about this GPU do not return until this is taken back.
    pub(crate) hung: bool,
    /// XIDs in the order in which they happened; tests append.
    pub(crate) xid: Vec<u64>,
}

/// One instance of a GPU (MIG).
#[derive(Debug, Clone)]
pub(crate) struct Instance {
    pub(crate) uuid: String,
    pub(crate) name: String,
    pub(crate) memory_bytes: u64,
}

/// One physical GPU.
#[derive(Debug, Clone)]
pub(crate) struct Gpu {
    pub(crate) index: u32,
    pub(crate) uuid: String,
    pub(crate) name: String,
    pub(crate) memory_bytes: u64,
    pub(crate) numa: Option<u32>,
    pub(crate) pci: PciAddress,
    pub(crate) instances: Vec<Instance>,
}

struct Machine {
    /// Calls of nvmlInit without their nvmlShutdown.
    users: u32,
    gpus: Vec<Gpu>,
}

static MACHINE: Mutex<Machine> = Mutex::new(Machine { users: 0, gpus: Vec::new() });

fn machine() -> std::sync::MutexGuard<'static, Machine> {
    // Nothing panics while it holds the lock; if it did, the list is still whole.
    MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// nvmlInit: the first one reads the list of devices.
pub(crate) fn start() -> Result<(), nvmlReturn_t> {
    let mut machine = machine();
    if machine.users == 0 {
        machine.gpus = gpus(&load().map_err(|_| DRIVER_NOT_LOADED)?);
    }
    machine.users = machine.users.saturating_add(1);
    Ok(())
}

/// nvmlShutdown.
pub(crate) fn stop() -> Result<(), nvmlReturn_t> {
    let mut machine = machine();
    machine.users = machine.users.checked_sub(1).ok_or(UNINITIALIZED)?;
    Ok(())
}

/// All GPUs, while initialised.
pub(crate) fn all() -> Result<Vec<Gpu>, nvmlReturn_t> {
    let machine = machine();
    if machine.users == 0 { Err(UNINITIALIZED) } else { Ok(machine.gpus.clone()) }
}

/// Puts instances with one PCI address together as instances of one GPU.
fn gpus(devices: &[Device]) -> Vec<Gpu> {
    let mut gpus: Vec<Gpu> = Vec::new();
    for device in devices {
        if !device.mig {
            gpus.push(Gpu {
                index: gpus.len() as u32,
                uuid: device.uuid_text(),
                name: device.name.clone(),
                memory_bytes: device.memory_bytes,
                numa: device.numa,
                pci: device.pci,
                instances: Vec::new(),
            });
            continue;
        }
        let place = match gpus.iter().position(|gpu| gpu.pci == device.pci && !gpu.instances.is_empty()) {
            Some(place) => place,
            None => {
                gpus.push(Gpu {
                    index: gpus.len() as u32,
                    uuid: uuid_text(derived_uuid(PARENT, device.index as u8), false),
                    name: device.name.split(" MIG ").next().unwrap_or(&device.name).to_owned(),
                    memory_bytes: 0,
                    numa: device.numa,
                    pci: device.pci,
                    instances: Vec::new(),
                });
                gpus.len() - 1
            }
        };
        let Some(gpu) = gpus.get_mut(place) else { continue };
        gpu.memory_bytes = gpu.memory_bytes.saturating_add(device.memory_bytes);
        gpu.instances.push(Instance {
            uuid: device.uuid_text(),
            name: device.name.clone(),
            memory_bytes: device.memory_bytes,
        });
    }
    gpus
}

/// What a handle stands for.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) gpu: Gpu,
    /// Which of its instances, if it is one.
    pub(crate) instance: Option<usize>,
    pub(crate) health: Health,
}

impl Target {
    pub(crate) fn instance(&self) -> Option<&Instance> {
        self.gpu.instances.get(self.instance?)
    }

    pub(crate) fn uuid(&self) -> &str {
        self.instance().map_or(&self.gpu.uuid, |instance| &instance.uuid)
    }

    pub(crate) fn name(&self) -> &str {
        self.instance().map_or(&self.gpu.name, |instance| &instance.name)
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.instance().map_or(self.gpu.memory_bytes, |instance| instance.memory_bytes)
    }
}

/// The handle of a GPU or of one of its instances. It is never followed.
pub(crate) fn handle(gpu: u32, instance: Option<usize>) -> nvmlDevice_t {
    let number = (gpu as usize + 1) << INSTANCE_BITS | instance.map_or(0, |instance| instance + 1);
    std::ptr::without_provenance_mut(number)
}

/// The GPU and the instance of a handle, without a question to the GPU itself.
pub(crate) fn decode(handle: nvmlDevice_t) -> Result<(Gpu, Option<usize>), nvmlReturn_t> {
    let number = handle.addr();
    let gpu = (number >> INSTANCE_BITS).checked_sub(1).ok_or(INVALID_ARGUMENT)?;
    let instance = (number & ((1 << INSTANCE_BITS) - 1)).checked_sub(1);
    let gpu = all()?.into_iter().nth(gpu).ok_or(INVALID_ARGUMENT)?;
    if instance.is_some_and(|instance| instance >= gpu.instances.len()) {
        return Err(INVALID_ARGUMENT);
    }
    Ok((gpu, instance))
}

/// Asks the GPU of a handle: not while it hangs, and in vain if it is lost.
pub(crate) fn ask(handle: nvmlDevice_t) -> Result<Target, nvmlReturn_t> {
    let (gpu, instance) = decode(handle)?;
    let mut health = health(&gpu.uuid);
    if health.hung {
        let changes = Changes::watch().map_err(|_| UNKNOWN)?;
        health = self::health(&gpu.uuid);
        while health.hung {
            changes.wait(None).map_err(|_| UNKNOWN)?;
            health = self::health(&gpu.uuid);
        }
    }
    if health.lost { Err(GPU_IS_LOST) } else { Ok(Target { gpu, instance, health }) }
}

/// Changes of the files of the machine. Those from the beginning of the watch on are told.
#[derive(Debug)]
struct Changes(OwnedFd);

impl Changes {
    fn watch() -> Result<Changes, Errno> {
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&changes, directory(), WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE)?;
        Ok(Changes(changes))
    }

    /// Waits until something has changed since the last call, or for so long.
    fn wait(&self, timeout: Option<Duration>) -> Result<(), Errno> {
        let timeout = timeout.map(|time| Timespec {
            tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        // What it was does not matter: the file is read.
        while rustix::io::read(&self.0, &mut [0u8; 4096]).is_ok() {}
        Ok(())
    }
}

fn health_file() -> PathBuf {
    directory().join(HEALTH_FILE)
}

/// What the file says now. Tests replace it by rename; one that cannot be read says nothing.
pub(crate) fn health(uuid: &str) -> Health {
    let Ok(text) = std::fs::read_to_string(health_file()) else { return Health::default() };
    let all: BTreeMap<String, Health> = serde_json::from_str(&text).unwrap_or_default();
    all.get(uuid).cloned().unwrap_or_default()
}

/// GPUs whose events somebody waits for, each with the number of its XIDs that have been delivered.
#[derive(Debug)]
pub(crate) struct Events {
    delivered: BTreeMap<u32, (String, usize)>,
    changes: Changes,
}

impl Events {
    pub(crate) fn new() -> Result<Events, nvmlReturn_t> {
        Ok(Events { delivered: BTreeMap::new(), changes: Changes::watch().map_err(|_| UNKNOWN)? })
    }

    /// From now on: what has happened before is not delivered.
    pub(crate) fn register(&mut self, gpu: &Gpu) {
        let happened = health(&gpu.uuid).xid.len();
        self.delivered.insert(gpu.index, (gpu.uuid.clone(), happened));
    }

    /// The next XID: (GPU, XID). Nothing within the time: nothing.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<Option<(u32, u64)>, nvmlReturn_t> {
        let begin = Instant::now();
        loop {
            for (gpu, (uuid, delivered)) in &mut self.delivered {
                let happened = health(uuid).xid;
                *delivered = (*delivered).min(happened.len());
                if let Some(xid) = happened.get(*delivered) {
                    *delivered += 1;
                    return Ok(Some((*gpu, *xid)));
                }
            }
            let Some(left) = timeout.checked_sub(begin.elapsed()) else { return Ok(None) };
            self.changes.wait(Some(left)).map_err(|_| UNKNOWN)?;
        }
    }
}
