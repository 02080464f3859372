//! Who asks whom when one artifact goes to many nodes: the planner, for a daemon and for the simulator alike.
//!
//! Every node knows the members of the spread in the same [`Order`], the sources first. From that alone each derives of
//! whom to ask which chunk, and in which turn: the schedule of the binomial pipeline (Ganesan and Seshadri, "On
//! Cooperative Content Distribution and the Price of Barter"), which is the shortest there is: `k` chunks reach `n` nodes
//! in `k + ⌈log2(n + 1)⌉ - 1` times of one chunk, if every link is as fast as the other. Nothing is pushed: a node asks
//! a few turns ahead, and who is asked answers when it has the chunk. Nobody has to keep the schedule: an ask that is in
//! vain or late goes to somebody else who is due to have the chunk earlier, and in the end to a source.
//!
//! [`Puller`] is the side that asks, [`Uploads`] the side that answers. Neither does I/O, has a clock, or draws lots:
//! same calls, same answers. [`mod@simulate`] runs thousands of them against modelled links. `docs/spread.md` says more.

mod chunks;
mod order;
mod pair;
mod puller;
pub mod simulate;
mod turns;
mod uploads;
mod way;

pub use chunks::Chunks;
pub use order::{MEMBERS_MAX, Order};
pub use puller::{Limits, Puller, Refusal};
pub use uploads::{REQUESTS_MAX, Request, Uploads};

/// Chunks of one artifact, at most: 256 TiB of them. Keeps the arithmetic of turns far from its bounds.
pub const CHUNKS_MAX: u32 = 1 << 28;

/// A node of a spread: its place in the [`Order`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(pub u32);

/// One chunk, asked of one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Who is asked.
    pub member: Member,
    /// Which chunk, counted through all files of the artifact.
    pub chunk: u32,
    /// When it is due by the schedule. Who is asked sends what is due earliest first.
    pub turn: u32,
    /// Whether who is asked may wait with its answer until it has the chunk. Members who wait on each other by such
    /// asks never do so in a circle.
    pub waits: bool,
}

#[cfg(test)]
mod tests;
