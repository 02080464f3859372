//! Memory for new regions: from the budget of a device, from what is on its way back, or by eviction.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::{Eviction, Residency, State};
use crate::error::{Code, Error, Result};
use crate::tier::gpu::{self, Gpu};
use crate::tier::{DeviceId, Shortage, host};

/// How long a load waits for memory that importers hold before more is evicted for it.
const HELD_PATIENCE: Duration = Duration::from_millis(500);
/// How often it looks meanwhile.
const HELD_INTERVAL: Duration = Duration::from_millis(10);

/// Memory that was set aside on a device.
#[derive(Debug)]
pub enum Grant {
    /// On the host tier.
    Host(host::Grant),
    /// On this GPU.
    Gpu(Rc<Gpu>, gpu::Grant),
}

impl Residency {
    /// Sets memory aside for a new region of `bytes`; evicts and waits as needed. The budget is never exceeded.
    ///
    /// `demoted` is told of the bytes that went to the host tier for it.
    pub async fn reserve(
        self: &Rc<Self>,
        device: DeviceId,
        bytes: u64,
        demoted: &Rc<Cell<u64>>,
    ) -> Result<Grant> {
        let began = Instant::now();
        loop {
            if bytes > self.budget(device)? {
                return Err(self.over_budget(device, bytes));
            }
            match self.grant(device, bytes)? {
                Ok(grant) => return Ok(grant),
                Err(Shortage::Wait) => self.changed(device).await,
                // What was evicted or let go of a moment ago may still be mapped for another: by the daemon itself,
                // or by a client that is ending.
                Err(Shortage::Held) if began.elapsed() < HELD_PATIENCE => {
                    self.sweep();
                    let _ = tokio::time::timeout(HELD_INTERVAL, self.changed(device)).await;
                }
                Err(Shortage::Held | Shortage::Evict) if self.evict_oldest(device, demoted) => {}
                Err(_) if self.memory_may_come(device) => self.changed(device).await,
                Err(_) => return Err(self.over_budget(device, bytes)),
            }
        }
    }

    fn gpu(&self, index: usize) -> Result<&Rc<Gpu>> {
        let gpu = self.gpus.get(index);
        let gpu =
            gpu.ok_or_else(|| Error::new(Code::Internal, "a device that is not there was asked for"))?;
        if gpu.lost() { Err(gpu.lost_error()) } else { Ok(gpu) }
    }

    fn budget(&self, device: DeviceId) -> Result<u64> {
        match device {
            DeviceId::Host => Ok(self.host.budget()),
            DeviceId::Gpu(index) => Ok(self.gpu(index)?.budget()),
        }
    }

    fn grant(&self, device: DeviceId, bytes: u64) -> Result<Result<Grant, Shortage>> {
        match device {
            DeviceId::Host => Ok(self.host.grant(bytes).map(Grant::Host)),
            DeviceId::Gpu(index) => {
                let gpu = self.gpu(index)?;
                Ok(gpu.grant(bytes).map(|grant| Grant::Gpu(Rc::clone(gpu), grant)))
            }
        }
    }

    async fn changed(&self, device: DeviceId) {
        match device {
            DeviceId::Gpu(index) if index < self.gpus.len() => self.gpus[index].changed().await,
            _ => self.host.changed().await,
        }
    }

    /// Whether a load that will end binds memory, or a reply that names an evicted region is still on its way.
    fn memory_may_come(&self, device: DeviceId) -> bool {
        let table = self.table.borrow();
        let here = table.entries.values().filter(|entry| entry.key.device == device);
        let mut loading = here.filter(|entry| matches!(entry.state, State::Loading));
        let parting = || self.parting.borrow().iter().any(|parted| parted.device == device);
        loading.any(|entry| entry.bytes > 0) || parting()
    }

    fn over_budget(&self, device: DeviceId, bytes: u64) -> Error {
        let (code, what, budget, key) = match device {
            DeviceId::Host => {
                (Code::TierHostOverBudget, "host".to_owned(), self.host.budget(), "host.budget_bytes")
            }
            DeviceId::Gpu(_) => {
                let budget = self.budget(device).unwrap_or_default();
                (Code::TierGpuOverBudget, self.device_name(device), budget, "gpu.budget_bytes")
            }
        };
        let message = format!(
            "{bytes} bytes do not fit into the {what} budget of {budget} beside what is leased, pinned or still mapped by \
             clients; release or unpin some, select fewer tensors, or raise {key}"
        );
        Error::new(code, message).kept("everything that was resident and in use")
    }

    /// Evicts the least recently used entry that nobody has leased or pinned, from a GPU to the host tier if that has room.
    /// `false`: there is none.
    fn evict_oldest(self: &Rc<Self>, device: DeviceId, demoted: &Rc<Cell<u64>>) -> bool {
        let mut table = self.table.borrow_mut();
        let here = table.entries.values().filter(|entry| entry.key.device == device);
        let idle = here.filter(|entry| entry.idle() && entry.pins.is_empty());
        let Some(id) = idle.min_by_key(|entry| entry.used).map(|entry| entry.id) else { return false };
        let copy = table.copy_below(id);
        let parted = table.evict(id, Eviction::Budget);
        drop(table);
        match (parted, copy) {
            (Some(parted), Some(copy)) => self.demote(parted, copy, Rc::clone(demoted)),
            (parted, _) => self.let_go(parted),
        }
        true
    }
}
