//! A spread on modelled links: as many [`Puller`](super::Puller)s and [`Uploads`](super::Uploads) as there are nodes, and
//! events instead of a network. The same scenario with the same seed has the same outcome.
//!
//! What is modelled, and what is not, is in `docs/spread.md`. Times are nanoseconds, rates bytes per second.

mod links;
mod run;

use serde::Serialize;

use super::CHUNKS_MAX;
pub use run::{Outcome, Rack};

/// Nodes that can be simulated: as many as there may be members, less room for those who join late.
pub const NODES_MAX: u32 = super::MEMBERS_MAX / 2;
/// Bytes of a chunk, at most: with [`RATE_MIN`] it takes minutes, and times stay far from 64 bits.
pub const CHUNK_BYTES_MAX: u64 = 1 << 30;
/// The slowest link.
pub const RATE_MIN: u64 = 1_000_000;
/// The longest way between two nodes, nanoseconds.
pub const LATENCY_NS_MAX: u64 = 10_000_000_000;

/// What is simulated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scenario {
    /// Nodes that want the artifact.
    pub nodes: u32,
    /// Nodes that have it.
    pub sources: u32,
    /// Chunks of the artifact.
    pub chunks: u32,
    /// Bytes of each.
    pub chunk_bytes: u64,
    /// Bytes per second of each node's link, each way at once.
    pub link_rate: u64,
    /// From one node to another, one way.
    pub latency_ns: u64,
    /// Until a chunk that has arrived is verified and counts.
    pub verify_ns: u64,
    /// Racks that the nodes are in, in equal shares.
    pub racks: u32,
    /// How many times more the links of a rack's nodes carry together than its uplink, each way.
    pub oversubscription: f64,
    /// Part of the nodes that die in the middle of the spread.
    pub fail: f64,
    /// Until the others notice that one has died.
    pub notice_ns: u64,
    /// Part of the nodes whose links are slow.
    pub slow: f64,
    /// The rate of these, as a part of that of the others.
    pub slow_rate: f64,
    /// Part of the nodes that join when half of the time that one node takes is over.
    pub late: f64,
    /// Part of the chunks sent whose bytes arrive wrong.
    pub corrupt: f64,
    /// Chunks that a node sends at a time.
    pub uploads_max: u32,
    /// Asks that a node has in flight.
    pub asks_max: u32,
    /// What is drawn by lot (who dies and when, who is slow, what arrives wrong) follows from it.
    pub seed: u64,
}

impl Default for Scenario {
    fn default() -> Scenario {
        Scenario {
            nodes: 1000,
            sources: 1,
            chunks: 64,
            chunk_bytes: 1 << 20,
            link_rate: 3_125_000_000,
            latency_ns: 0,
            verify_ns: 0,
            racks: 1,
            oversubscription: 1.0,
            fail: 0.0,
            notice_ns: 0,
            slow: 0.0,
            slow_rate: 1.0,
            late: 0.0,
            corrupt: 0.0,
            uploads_max: 8,
            asks_max: 16,
            seed: 0,
        }
    }
}

impl Scenario {
    /// What one node takes that asks one source, with nobody dying, slow or late: what a spread is compared with.
    pub fn of_one(&self) -> Scenario {
        let racks = 1;
        let (fail, slow, late, corrupt) = (0.0, 0.0, 0.0, 0.0);
        Scenario { nodes: 1, sources: 1, racks, fail, slow, late, corrupt, ..self.clone() }
    }

    /// Runs it. `None` if one of its numbers is out of bounds.
    pub fn run(&self) -> Option<Outcome> {
        let one = run::Run::new(&self.of_one(), 0)?.outcome(0);
        Some(run::Run::new(self, one.last_ns)?.outcome(one.last_ns))
    }

    fn is_sound(&self) -> bool {
        let part = |part: f64| (0.0..=1.0).contains(&part);
        (1..=NODES_MAX).contains(&self.nodes)
            && (1..=NODES_MAX).contains(&self.sources)
            && (1..=CHUNKS_MAX).contains(&self.chunks)
            && (1..=CHUNK_BYTES_MAX).contains(&self.chunk_bytes)
            && (RATE_MIN..).contains(&self.link_rate)
            && [self.latency_ns, self.verify_ns, self.notice_ns].iter().all(|ns| *ns <= LATENCY_NS_MAX)
            && (1..=self.nodes).contains(&self.racks)
            && (1.0..=1e6).contains(&self.oversubscription)
            && [self.fail, self.slow, self.late, self.corrupt].into_iter().all(part)
            && (1e-3..=1.0).contains(&self.slow_rate)
            && self.uploads_max >= 1
            && self.asks_max >= 1
    }
}

#[cfg(test)]
mod tests;
