//! From a GPU to the host tier: what has to make room there is kept in memory, packed as it was
//! (docs/decisions/0010-demotion.md).
//!
//! Nothing depends on it: where the host tier has no room, or anything goes wrong, the artifact is evicted.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use super::{Content, DeviceId, Entry, EntryId, Form, Key, Parted, Region, Residency, State, Table};
use crate::checksum;
use crate::error::{Code, Error, Result};
use crate::sys::cuda::{CudaError, Demotion, DeviceMemory};
use crate::sys::mem::{HUGE_PAGE_BYTES, Memory};
use crate::tier::Shortage;
use crate::tier::host::{self, Host, Parts};

/// Bytes of one copy: its checksum is computed while the device makes the next.
const COPY_BYTES: u64 = 16 << 20;

/// Why a region was not copied.
enum Failure {
    /// The host tier has no room: nothing is wrong.
    NoRoom,
    /// The device was lost.
    Lost(CudaError),
    /// Anything else.
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Other(error)
    }
}

impl From<CudaError> for Failure {
    fn from(error: CudaError) -> Failure {
        if error.is_fatal() {
            return Failure::Lost(error);
        }
        Failure::Other(Error::new(Code::DeviceCopyFailed, format!("copying from a GPU failed: {error}")))
    }
}

impl Table {
    /// Makes the entry of the copy on the host tier of what is about to leave a GPU. `None`: the host tier has it, or it
    /// does not leave a GPU.
    pub(super) fn copy_below(&mut self, id: EntryId) -> Option<EntryId> {
        let entry = self.entries.get(&id).filter(|entry| matches!(entry.key.device, DeviceId::Gpu(_)))?;
        let packed = Key { device: DeviceId::Host, ..entry.key.clone() };
        let whole = Key { select: None, form: Form::Files, ..packed.clone() };
        if self.by_key.contains_key(&packed) || self.by_key.contains_key(&whole) {
            return None;
        }
        let copy = Entry {
            id: self.next + 1,
            key: packed.clone(),
            source: entry.source.clone(),
            origin: entry.origin.clone(),
            state: State::Loading,
            bytes: 0,
            leases: 0,
            pins: Default::default(),
            stale: false,
            used: entry.used,
            tenants: entry.tenants.clone(),
            importers: Vec::new(),
        };
        self.next = copy.id;
        self.by_key.insert(packed, copy.id);
        self.entries.insert(copy.id, copy);
        Some(self.next)
    }
}

impl Residency {
    /// Copies what was evicted from a GPU to the host tier, as `copy`; then its memory there is given back. `demoted` is
    /// told how many bytes went down.
    pub(super) fn demote(self: &Rc<Self>, parted: Parted, copy: EntryId, demoted: Rc<Cell<u64>>) {
        let (DeviceId::Gpu(index), Region::Gpu(memory)) = (parted.device, &parted.content.region) else {
            self.forget(copy);
            return self.let_go(Some(parted));
        };
        let (residency, gpu, memory) = (Rc::clone(self), Rc::clone(&self.gpus[index]), Arc::clone(memory));
        let bytes = memory.bytes();
        gpu.leaves(bytes);
        tokio::task::spawn_local(async move {
            match residency.bring_down(copy, &parted.content, memory).await {
                Ok(content) => {
                    demoted.set(demoted.get() + bytes);
                    residency.demoted.set(residency.demoted.get() + bytes);
                    residency.arrived(copy, content);
                }
                Err(failure) => {
                    residency.forget(copy);
                    residency.not_demoted(index, failure);
                }
            }
            gpu.has_left(bytes);
            residency.let_go(Some(parted));
            residency.nudge();
        });
    }

    fn not_demoted(&self, index: usize, failure: Failure) {
        let device = self.device_name(DeviceId::Gpu(index));
        match failure {
            Failure::NoRoom => tracing::debug!(device, "not kept: the host tier has no room"),
            Failure::Lost(error) => {
                tracing::warn!(device, %error, "not kept");
                self.lose(index);
            }
            Failure::Other(error) => tracing::warn!(device, code = %error.code, %error, "not kept"),
        }
    }

    /// What has come down is resident. It was not used by that.
    fn arrived(&self, id: EntryId, content: Content) {
        if let Some(entry) = self.table.borrow_mut().entries.get_mut(&id) {
            tracing::info!(source = entry.source, bytes = content.bytes(), "kept on the host tier");
            entry.bytes = content.bytes();
            entry.state = State::Resident(Arc::new(content));
        }
        // Its files may have been replaced meanwhile.
        self.sweep();
    }

    /// Copies a region of a GPU to the host tier and compares what arrives with its checksums (invariant 6).
    async fn bring_down(
        &self,
        copy: EntryId,
        content: &Arc<Content>,
        memory: Arc<DeviceMemory>,
    ) -> Result<Content, Failure> {
        let bytes = memory.bytes().checked_next_multiple_of(HUGE_PAGE_BYTES).ok_or(Failure::NoRoom)?;
        let grant = room(&self.host, bytes).await.ok_or(Failure::NoRoom)?;
        self.takes(copy, bytes);
        let Parts { parts } = self.host.make(grant).await?;
        let parts: Vec<_> =
            parts.into_iter().map(|(memory, populated)| (Arc::new(memory), populated)).collect();
        let (content, targets) = (Arc::clone(content), parts.clone());
        let copied = tokio::task::spawn_blocking(move || {
            let (found, wanted) = (fetch(&memory, &targets)?, content.packed_sum());
            if found == wanted {
                return Ok(content);
            }
            let message = format!("what a GPU held has checksum {found:016x}, and had {wanted:016x}");
            Err(Failure::Other(Error::new(Code::CatalogChecksumMismatch, message)))
        });
        let failed = || Failure::Other(Error::new(Code::Internal, "a thread of the control plane failed"));
        let copied = copied.await.unwrap_or_else(|_| Err(failed()));
        let memories: Option<Vec<Memory>> =
            parts.into_iter().map(|(memory, _)| Arc::into_inner(memory)).collect();
        let Some(memories) = memories else {
            // It stays in the account of regions: lost, but never handed to anyone else.
            tracing::error!("memory leaked: a copy from a GPU still owns it");
            return Err(failed());
        };
        let content = match copied {
            Ok(content) => content,
            Err(failure) => {
                self.host.discard(memories);
                return Err(failure);
            }
        };
        let region = Region::Host(self.host.seal(memories)?);
        let Content { description, files, tensors, manifest, checks, .. } = &*content;
        Ok(Content {
            description: description.clone(),
            files: files.clone(),
            tensors: tensors.clone(),
            manifest: manifest.clone(),
            checks: checks.clone(),
            chunks: Box::default(),
            region,
            offered: None,
        })
    }
}

/// Memory of the host tier, if it can be had without evicting anything.
async fn room(host: &Rc<Host>, bytes: u64) -> Option<host::Grant> {
    loop {
        match host.grant(bytes) {
            Ok(grant) => return Some(grant),
            Err(Shortage::Wait) => host.changed().await,
            Err(Shortage::Held | Shortage::Evict) => return None,
        }
    }
}

/// Copies `source` to the beginning of `targets`, which are at least as long; gives the checksum of what arrived.
fn fetch(source: &Arc<DeviceMemory>, targets: &[(Arc<Memory>, bool)]) -> Result<u64, Failure> {
    let inside = |what| Failure::Other(Error::new(Code::Internal, what));
    let mut sum = checksum::Running::new();
    let mut at = 0;
    for (target, populated) in targets {
        if !populated {
            target.populate(0, target.bytes()).map_err(|error| {
                Error::new(Code::TierHostOutOfMemory, format!("the kernel withholds memory: {error}"))
            })?;
        }
        let length = target.bytes().min(source.bytes() - at);
        let mut demotion = Demotion::new(source, target)?;
        for offset in (0..length).step_by(COPY_BYTES as usize) {
            let span = target.claim(offset, COPY_BYTES.min(length - offset));
            let span = span.ok_or_else(|| inside("memory that was just made is in use"))?;
            if let Some(arrived) = demotion.copy(at + offset, span)? {
                sum.update(arrived.as_slice());
            }
        }
        if let Some(arrived) = demotion.finish()? {
            sum.update(arrived.as_slice());
        }
        at += length;
    }
    Ok(sum.finish())
}
