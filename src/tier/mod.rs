//! Where bytes live on this node: the host tier, the memory of GPUs, and what is resident in them.
//!
//! [`host`] and [`gpu`] own memory and its budget; [`residency`] knows which artifact is where, who holds a lease on it
//! and what may be evicted. All belong to the control thread.

pub mod gpu;
pub mod host;
pub mod residency;

/// A place where artifacts can be resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceId {
    /// The memory of the node.
    Host,
    /// The memory of a GPU: its place among those that the daemon uses.
    Gpu(usize),
}

/// What a grant of memory had to wait for or could not get.
#[derive(Debug, PartialEq, Eq)]
pub enum Shortage {
    /// Memory is on its way back: ask again when the tier says that something has changed.
    Wait,
    /// It would fit if importers let go of what they hold.
    Held,
    /// Something has to be evicted.
    Evict,
}
