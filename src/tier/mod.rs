//! Where bytes live on this node: the host tier, and what is resident in it.
//!
//! [`host`] owns memory and its budget; [`residency`] knows which artifact is in it, who holds a lease on it and
//! what may be evicted. Both belong to the control thread.

pub mod host;
pub mod residency;
