//! The simulated machine as one process sees it: devices, their contexts, and all that handles stand for.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use cuda_sim_model::Link;

use crate::abi::{Answer, Code};
use crate::config::{Config, Spec};
use crate::context::Context;
use crate::fault::Plan;
use crate::host::Registrations;
use crate::kernels::Kernel;
use crate::space::Space;
use crate::store::{Allocation, Store};
use crate::stream::{Event, Stream};

/// A mutex whose holder has panicked is as good as any other: nothing is left half-changed under one.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Handles of contexts, which count up from here by device.
const CONTEXTS: usize = 0x51d0_0000;
/// Handles of all else, which count up from here.
const HANDLES: u64 = 0x51e0_0000;
/// Distance of handles: they look like addresses of something.
const HANDLE_STEP: u64 = 0x40;

/// A device of this process.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) index: usize,
    pub(crate) spec: Spec,
    pub(crate) store: Store,
    pub(crate) to_device: Link,
    pub(crate) to_host: Link,
    operations: AtomicU64,
    lost_after: Option<u64>,
}

impl Device {
    /// Counts an operation on the device; an error if it is lost.
    pub(crate) fn touch(&self) -> Answer {
        self.operations.fetch_add(1, Ordering::Relaxed);
        if self.is_lost() { Err(Code::DEVICE_UNAVAILABLE) } else { Ok(()) }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost_after.is_some_and(|after| self.operations.load(Ordering::Relaxed) > after)
    }
}

/// The primary context of a device, while somebody retains it.
#[derive(Debug, Default)]
struct Primary {
    retained: u64,
    context: Option<Arc<Context>>,
}

/// What handles stand for.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    /// With the number of times that each has to be released.
    pub(crate) allocations: HashMap<u64, (Arc<Allocation>, u64)>,
    /// By the allocation's handle, so that a mapping's handle can be had again after its release.
    pub(crate) streams: HashMap<usize, Arc<Stream>>,
    pub(crate) events: HashMap<usize, Arc<Event>>,
    /// With the context's device.
    pub(crate) modules: HashMap<usize, (usize, Arc<str>)>,
    /// With the module.
    pub(crate) functions: HashMap<usize, (usize, Option<&'static Kernel>)>,
}

#[derive(Debug)]
pub(crate) struct Sim {
    pid: u32,
    pub(crate) devices: Vec<Arc<Device>>,
    primaries: Vec<Mutex<Primary>>,
    /// Contexts that have been, too: their work may still run.
    contexts: Mutex<Vec<Weak<Context>>>,
    space: RwLock<Space>,
    registrations: Mutex<Registrations>,
    handles: Mutex<Handles>,
    next: AtomicU64,
}

thread_local! {
    /// The device whose context is current on this thread.
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

static CONFIG: OnceLock<Option<Config>> = OnceLock::new();
static SIM: OnceLock<Answer<Sim>> = OnceLock::new();
static TRACE: OnceLock<Option<File>> = OnceLock::new();

/// What the environment says, read at the first call. None if it is wrong, which was said then.
fn config() -> Option<&'static Config> {
    CONFIG
        .get_or_init(|| {
            Config::read()
                .inspect_err(|error| {
                    #[allow(clippy::print_stderr, reason = "a driver has no other way to say what is wrong")]
                    {
                        eprintln!("cuda-sim: {error}");
                    }
                })
                .ok()
        })
        .as_ref()
}

/// The faults that are asked for.
pub(crate) fn faults() -> Option<&'static Plan> {
    config().map(|config| &config.faults)
}

/// Notes a call and its answer where the environment asks for it.
pub(crate) fn trace(function: &str, answer: Code) {
    let open = || {
        let path = config()?.trace.as_ref()?;
        OpenOptions::new().create(true).append(true).open(path).ok()
    };
    if let Some(mut file) = TRACE.get_or_init(open).as_ref() {
        let name = answer.name().map_or("CUDA_ERROR_UNKNOWN".into(), |name| name.to_string_lossy());
        // One write, so that lines of several threads and processes do not mix. A trace that cannot be written is short.
        let _ = file.write_all(format!("{function} {name}\n").as_bytes());
    }
}

/// `cuInit`.
pub(crate) fn init() -> Answer {
    SIM.get_or_init(|| {
        let config = config().ok_or(Code::SYSTEM_NOT_READY)?;
        if config.devices.is_empty() {
            return Err(Code::NO_DEVICE);
        }
        Sim::new(config)
    });
    get().map(|_| ())
}

/// The machine, after `cuInit`. Not in a process that was forked after it: as with a real driver.
pub(crate) fn get() -> Answer<&'static Sim> {
    match SIM.get() {
        None => Err(Code::NOT_INITIALIZED),
        Some(Err(code)) => Err(*code),
        Some(Ok(sim)) if sim.pid != std::process::id() => Err(Code::NOT_INITIALIZED),
        Some(Ok(sim)) => Ok(sim),
    }
}

impl Sim {
    fn new(config: &Config) -> Answer<Sim> {
        let device = |(index, spec): (usize, &Spec)| {
            let store = Store::open(&config.directory, spec.uuid_text(), spec.memory_bytes);
            Ok(Arc::new(Device {
                index,
                spec: spec.clone(),
                store: store.map_err(|_| Code::OPERATING_SYSTEM)?,
                to_device: Link::new(spec.h2d_bytes_per_second),
                to_host: Link::new(spec.d2h_bytes_per_second),
                operations: AtomicU64::new(0),
                lost_after: config.faults.lost_after(index),
            }))
        };
        let devices: Vec<_> = config.devices.iter().enumerate().map(device).collect::<Answer<_>>()?;
        Ok(Sim {
            pid: std::process::id(),
            primaries: devices.iter().map(|_| Mutex::default()).collect(),
            devices,
            contexts: Mutex::default(),
            space: RwLock::default(),
            registrations: Mutex::default(),
            handles: Mutex::default(),
            next: AtomicU64::new(HANDLES),
        })
    }

    /// A handle that was not given before.
    pub(crate) fn handle(&self) -> u64 {
        self.next.fetch_add(HANDLE_STEP, Ordering::Relaxed)
    }

    pub(crate) fn handles(&self) -> MutexGuard<'_, Handles> {
        lock(&self.handles)
    }

    pub(crate) fn registrations(&self) -> MutexGuard<'_, Registrations> {
        lock(&self.registrations)
    }

    pub(crate) fn space(&self) -> RwLockReadGuard<'_, Space> {
        self.space.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn space_mut(&self) -> RwLockWriteGuard<'_, Space> {
        self.space.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device of a `CUdevice`.
    pub(crate) fn device(&self, device: i32) -> Answer<&Arc<Device>> {
        usize::try_from(device).ok().and_then(|index| self.devices.get(index)).ok_or(Code::INVALID_DEVICE)
    }

    /// The directory that the processes of the machine share.
    pub(crate) fn directory(&self) -> Answer<&'static std::path::Path> {
        config().map(|config| config.directory.as_path()).ok_or(Code::NOT_INITIALIZED)
    }

    /// Retains the primary context of a device; its handle.
    pub(crate) fn retain(&self, device: &Arc<Device>) -> usize {
        let mut primary = lock(&self.primaries[device.index]);
        primary.retained += 1;
        if primary.context.is_none() {
            let context = Context::new(Arc::clone(device));
            let mut contexts = lock(&self.contexts);
            contexts.retain(|context| context.strong_count() > 0);
            contexts.push(Arc::downgrade(&context));
            primary.context = Some(context);
        }
        CONTEXTS + device.index
    }

    /// Releases it; the last release ends all that was made in it.
    pub(crate) fn release(&self, device: &Device) -> Answer {
        let mut primary = lock(&self.primaries[device.index]);
        primary.retained = primary.retained.checked_sub(1).ok_or(Code::INVALID_CONTEXT)?;
        if primary.retained > 0 {
            return Ok(());
        }
        let Some(context) = primary.context.take() else { return Ok(()) };
        context.close();
        let mut handles = self.handles();
        handles.streams.retain(|_, stream| !Arc::ptr_eq(&stream.context, &context));
        handles.events.retain(|_, event| !Arc::ptr_eq(&event.context, &context));
        handles.modules.retain(|_, (owner, _)| *owner != device.index);
        let Handles { functions, modules, .. } = &mut *handles;
        functions.retain(|_, (module, _)| modules.contains_key(module));
        drop(handles);
        self.registrations().forget(device.index);
        let plain = self.space().plain_of(device.index);
        for start in plain {
            let freed = self.space_mut().free_plain(start);
            drop(freed);
        }
        Ok(())
    }

    /// Whether the primary context of a device is there.
    pub(crate) fn is_active(&self, device: &Device) -> bool {
        lock(&self.primaries[device.index]).context.is_some()
    }

    /// Makes a context current on this thread; zero: none.
    pub(crate) fn set_current(&self, context: usize) -> Answer {
        let current = match context {
            0 => None,
            handle => {
                let index = handle.checked_sub(CONTEXTS).filter(|index| *index < self.devices.len());
                Some(index.ok_or(Code::INVALID_CONTEXT)?)
            }
        };
        CURRENT.set(current);
        Ok(())
    }

    /// The handle of the current context; zero: none.
    pub(crate) fn current_handle(&self) -> usize {
        CURRENT.get().map_or(0, |index| CONTEXTS + index)
    }

    /// The handle of a device's context.
    pub(crate) fn handle_of_device(&self, index: usize) -> usize {
        CONTEXTS + index
    }

    /// The current context, in whatever state.
    pub(crate) fn current(&self) -> Answer<Arc<Context>> {
        let index = CURRENT.get().ok_or(Code::INVALID_CONTEXT)?;
        lock(&self.primaries[index]).context.clone().ok_or(Code::CONTEXT_IS_DESTROYED)
    }

    /// The current context, for an operation on its device.
    pub(crate) fn usable(&self) -> Answer<Arc<Context>> {
        let context = self.current()?;
        context.check()?;
        context.device.touch()?;
        Ok(context)
    }

    /// An error if the current context, where there is one, has been ended by one.
    pub(crate) fn healthy(&self) -> Answer {
        self.current().map_or(Ok(()), |context| context.check())
    }

    /// Waits until all work of this process has ended.
    pub(crate) fn settle(&self) {
        let contexts: Vec<_> = lock(&self.contexts).iter().filter_map(Weak::upgrade).collect();
        contexts.iter().for_each(|context| context.settle());
    }
}
