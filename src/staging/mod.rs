//! Staging memory: slots of one size, allocated, populated and claimed once at start (invariant 3).

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crate::sys::mem::{HUGE_PAGE_BYTES, Memory, Span};
use crate::sys::numa;
use crate::sys::pages::PageKind;

/// The slots of one shard thread. A slot is a [`Span`]: move-only, it comes back when its read has been dealt with.
#[derive(Debug)]
pub struct Pool {
    memory: Arc<Memory>,
    idle: Vec<Span>,
    slots: usize,
}

impl Pool {
    /// `slots` slots of `slot_bytes` (a multiple of 4 KiB) in huge pages where they can be had, on a NUMA node where the
    /// kernel lets them be placed.
    pub fn new(slots: u32, slot_bytes: u64, numa_node: Option<u32>) -> io::Result<Pool> {
        let bytes = u64::from(slots)
            .checked_mul(slot_bytes)
            .and_then(|bytes| bytes.checked_next_multiple_of(HUGE_PAGE_BYTES))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let populated = |pages| {
            let memory = Memory::new(bytes, pages)?;
            if let Some(node) = numa_node
                && let Err(error) = numa::prefer(&memory, node)
            {
                // Costs speed only; and a thread that is pinned near gets near memory by default.
                tracing::debug!(node, %error, "slots are not placed");
            }
            memory.populate(0, bytes).map(|()| memory)
        };
        let memory = populated(PageKind::Hugetlb).or_else(|_| populated(PageKind::Thp))?;
        let memory = Arc::new(memory);
        let idle: Option<Vec<Span>> =
            (0..u64::from(slots)).map(|slot| memory.claim(slot * slot_bytes, slot_bytes)).collect();
        let idle = idle.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Pool { slots: idle.len(), memory, idle })
    }

    /// The memory that all slots are ranges of, to be registered.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Bytes of the slots on each NUMA node, as observed. Empty: the kernel does not say.
    pub fn numa_nodes(&self) -> BTreeMap<u32, u64> {
        numa::nodes(&self.memory).unwrap_or_default()
    }

    /// A slot, if one is idle.
    pub fn take(&mut self) -> Option<Span> {
        self.idle.pop()
    }

    /// Puts a slot back.
    pub fn give(&mut self, slot: Span) {
        debug_assert!(Arc::ptr_eq(slot.memory(), &self.memory), "a slot of another pool");
        self.idle.push(slot);
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Slots in use.
    pub fn used(&self) -> usize {
        self.slots - self.idle.len()
    }
}
