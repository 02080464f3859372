//! Memory of one GPU: a budget that is never exceeded, and regions, each one allocation of the driver.
//!
//! Everything that takes memory is in one account: regions, what is being freed, and what was evicted but is still
//! mapped by an importer. Whether one has it mapped cannot be asked of the driver; so what was sent to a process counts
//! as held until the process says that it has let go of it (`lease.release`) or has ended.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::sync::Notify;

use super::Shortage;
use crate::error::{Code, Error, Result};
use crate::sys::cuda::{Checksums, Context, CudaError, DeviceMemory};

/// A process that was sent the descriptor of a region: readable once it has ended.
pub type Importer = Arc<OwnedFd>;

/// Bytes, by what they are taken for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Account {
    /// Regions, resident or being filled.
    pub regions: u64,
    /// Regions that are being copied to the host tier, and come back to the driver then.
    pub leaving: u64,
    /// On its way back to the driver.
    pub freeing: u64,
    /// Evicted, but still mapped by an importer.
    pub held: u64,
}

impl Account {
    /// Everything.
    pub fn total(&self) -> u64 {
        self.regions + self.coming() + self.held
    }

    /// What comes back to the driver by itself.
    pub fn coming(&self) -> u64 {
        self.leaving + self.freeing
    }
}

/// Evicted memory that importers may still have mapped.
#[derive(Debug)]
struct Held {
    bytes: u64,
    importers: Vec<Importer>,
}

#[derive(Debug, Default)]
struct State {
    account: Account,
    held: Vec<Held>,
}

/// The memory of one GPU.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<Context>,
    budget: Cell<u64>,
    lost: Cell<bool>,
    state: RefCell<State>,
    checksums: Arc<Checksums>,
    /// Something was freed, or cannot be waited for any more.
    changed: Notify,
}

/// Memory for one region that has been set aside, but not made yet.
#[derive(Debug)]
pub struct Grant {
    bytes: u64,
}

impl Gpu {
    /// A tier of at most `budget` bytes.
    pub fn new(context: Arc<Context>, budget: u64) -> Rc<Gpu> {
        Rc::new(Gpu {
            checksums: Arc::new(Checksums::new(&context)),
            context,
            budget: Cell::new(budget),
            lost: Cell::new(false),
            state: RefCell::default(),
            changed: Notify::new(),
        })
    }

    /// How clients call it: `gpu:GPU-…`.
    pub fn name(&self) -> String {
        format!("gpu:{}", self.context.device().uuid)
    }

    /// Its context.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Checksums of the device's memory.
    pub fn checksums(&self) -> &Arc<Checksums> {
        &self.checksums
    }

    /// The budget, bytes.
    pub fn budget(&self) -> u64 {
        self.budget.get()
    }

    /// Takes over another budget. What is over a smaller one goes as leases end.
    pub fn resize(&self, budget: u64) {
        self.budget.set(budget);
        self.nudge();
    }

    /// What memory is taken for now.
    pub fn account(&self) -> Account {
        self.state.borrow().account
    }

    /// Waits until memory was freed.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Something that a load may wait for has happened.
    pub fn nudge(&self) {
        self.changed.notify_waiters();
    }

    /// The device answers no more: nothing is loaded to it until the daemon is restarted. `false`: this was known.
    pub(super) fn lose(&self) -> bool {
        self.nudge();
        !self.lost.replace(true)
    }

    /// Whether it was lost.
    pub fn lost(&self) -> bool {
        self.lost.get()
    }

    /// The error for a device that was lost.
    pub fn lost_error(&self) -> Error {
        let message = format!(
            "{} was lost: the driver answers its calls with errors; look at its log (dmesg), reset the device, and \
             restart the daemon",
            self.name()
        );
        Error::new(Code::DeviceLost, message)
            .kept("what processes have imported, as far as the device still answers")
    }

    /// Sets memory aside for a region of `bytes`. The account never goes above the budget.
    pub fn grant(self: &Rc<Self>, bytes: u64) -> Result<Grant, Shortage> {
        self.look_at_held();
        let mut state = self.state.borrow_mut();
        let missing = (state.account.total().saturating_add(bytes)).saturating_sub(self.budget.get());
        match missing {
            0 => {
                state.account.regions += bytes;
                Ok(Grant { bytes })
            }
            missing if missing <= state.account.coming() => Err(Shortage::Wait),
            missing if missing <= state.account.coming() + state.account.held => Err(Shortage::Held),
            _ => Err(Shortage::Evict),
        }
    }

    /// Makes the memory of a grant, all zeros. On failure the grant is given back.
    pub async fn make(self: &Rc<Self>, grant: Grant) -> Result<DeviceMemory> {
        let (context, bytes) = (Arc::clone(&self.context), grant.bytes);
        let made = tokio::task::spawn_blocking(move || DeviceMemory::new(&context, bytes)).await;
        let error = match made {
            Ok(Ok(memory)) => return Ok(memory),
            Ok(Err(error)) => self.error_of(error, bytes),
            Err(_) => Error::new(Code::Internal, "the thread that makes memory failed"),
        };
        self.state.borrow_mut().account.regions -= bytes;
        self.nudge();
        Err(error)
    }

    fn error_of(&self, error: CudaError, bytes: u64) -> Error {
        let name = self.name();
        if error.is_fatal() {
            return self.lost_error();
        }
        if error.is_out_of_memory() {
            let free = self.context.memory().map_or(0, |(free, _)| free);
            let message = format!(
                "{name} has no {bytes} bytes left, though the budget has: {free} bytes are free, the rest is other \
                 processes'; lower what they take, or gpu.budget_bytes ({error})"
            );
            return Error::new(Code::TierGpuOutOfMemory, message);
        }
        Error::new(Code::DeviceUnavailable, format!("{name} gives no memory: {error}"))
    }

    /// A region of `bytes` is being copied to the host tier: loads wait for its memory rather than evict more.
    pub(super) fn leaves(&self, bytes: u64) {
        let mut state = self.state.borrow_mut();
        state.account.regions -= bytes;
        state.account.leaving += bytes;
    }

    /// It has been copied, or cannot be: it is a region again, to be given back.
    pub(super) fn has_left(&self, bytes: u64) {
        let mut state = self.state.borrow_mut();
        state.account.leaving -= bytes;
        state.account.regions += bytes;
    }

    /// Gives back the memory of a region that was never shared.
    pub fn discard(self: &Rc<Self>, memory: Arc<DeviceMemory>) {
        self.release(memory, Vec::new());
    }

    /// Gives back the memory of a region. What processes among `importers` may still have mapped stays in the account
    /// until they end. It is never used again for another region (invariant 8): the driver takes it back, and new memory
    /// is cleared.
    pub fn release(self: &Rc<Self>, memory: Arc<DeviceMemory>, importers: Vec<Importer>) {
        let bytes = memory.bytes();
        let mut state = self.state.borrow_mut();
        state.account.regions -= bytes;
        state.account.freeing += bytes;
        drop(state);
        let gpu = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let _ = tokio::task::spawn_blocking(move || drop(memory)).await;
            let mut state = gpu.state.borrow_mut();
            state.account.freeing -= bytes;
            state.account.held += bytes;
            state.held.push(Held { bytes, importers });
            drop(state);
            gpu.look_at_held();
            gpu.nudge();
        });
    }

    /// Takes out of the account what importers have let go of.
    pub fn look_at_held(&self) {
        let mut state = self.state.borrow_mut();
        let mut let_go = 0;
        state.held.retain_mut(|held| {
            held.importers.retain(lives);
            let_go += if held.importers.is_empty() { held.bytes } else { 0 };
            !held.importers.is_empty()
        });
        state.account.held -= let_go;
        drop(state);
        if let_go > 0 {
            self.nudge();
        }
    }
}

/// Whether the process of a pidfd has not ended.
fn lives(importer: &Importer) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(importer.as_fd(), PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(ready) if ready > 0)
}
