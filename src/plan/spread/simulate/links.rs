//! Links: who may send when, and when it has arrived.

use super::Scenario;

const NS: f64 = 1e9;

/// What every byte of a rack that leaves it or comes into it passes.
#[derive(Debug, Clone, Default)]
pub(super) struct Uplink {
    out_free_ns: u64,
    in_free_ns: u64,
    pub(super) out_chunks: u64,
    pub(super) in_chunks: u64,
    pub(super) chunk_ns: u64,
}

/// The link of a node.
#[derive(Debug, Clone)]
struct Link {
    up_free_ns: u64,
    down_free_ns: u64,
    chunk_ns: u64,
    rack: usize,
}

/// All links. A chunk leaves in the time that the sender's link takes for it, and then queues before the rack's uplinks and
/// the link of who receives it, each first come, first served: so nothing is faster than any part of its way.
#[derive(Debug)]
pub(super) struct Links {
    nodes: Vec<Link>,
    pub(super) racks: Vec<Uplink>,
}

/// When one chunk is where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Passage {
    /// The sender's link is free again.
    pub(super) left_ns: u64,
    /// The receiver's link has carried the last byte.
    pub(super) received_ns: u64,
}

/// Nanoseconds of `bytes` at `rate`, at least 1.
fn ns(bytes: u64, rate: f64) -> u64 {
    (bytes as f64 / rate * NS).ceil().max(1.0) as u64
}

impl Links {
    pub(super) fn new(scenario: &Scenario, nodes: usize) -> Links {
        let racks = scenario.racks as usize;
        let rate = scenario.link_rate as f64;
        let chunk_ns = ns(scenario.chunk_bytes, rate);
        let link = |node| Link { up_free_ns: 0, down_free_ns: 0, chunk_ns, rack: node % racks };
        let uplink = |rack| {
            let nodes_in_it = (rack..nodes).step_by(racks).count() as f64;
            let chunk_ns = ns(scenario.chunk_bytes, nodes_in_it * rate / scenario.oversubscription);
            Uplink { chunk_ns, ..Uplink::default() }
        };
        Links { nodes: (0..nodes).map(link).collect(), racks: (0..racks).map(uplink).collect() }
    }

    /// Makes the link of `node` slower: `rate` of what it was.
    pub(super) fn slow_down(&mut self, node: usize, rate: f64) {
        let link = &mut self.nodes[node];
        link.chunk_ns = (link.chunk_ns as f64 / rate).ceil() as u64;
    }

    pub(super) fn rack(&self, node: usize) -> u32 {
        self.nodes[node].rack as u32
    }

    pub(super) fn chunk_ns(&self, node: usize) -> u64 {
        self.nodes[node].chunk_ns
    }

    /// Whether `node` can begin to send.
    pub(super) fn is_free(&self, node: usize, now_ns: u64) -> bool {
        self.nodes[node].up_free_ns <= now_ns
    }

    /// Sends a chunk from one to another, beginning now.
    pub(super) fn send(&mut self, from: usize, to: usize, now_ns: u64) -> Passage {
        let left_ns = now_ns + self.nodes[from].chunk_ns;
        self.nodes[from].up_free_ns = left_ns;
        // Each part of the way carries what came first first, and is taken for as long as it needs itself.
        let carry = |free_ns: &mut u64, chunk_ns: u64| {
            *free_ns = (*free_ns).max(now_ns) + chunk_ns;
            *free_ns
        };
        let mut received_ns = left_ns;
        let (rack_from, rack_to) = (self.nodes[from].rack, self.nodes[to].rack);
        if rack_from != rack_to {
            let out = &mut self.racks[rack_from];
            out.out_chunks += 1;
            received_ns = received_ns.max(carry(&mut out.out_free_ns, out.chunk_ns));
            let into = &mut self.racks[rack_to];
            into.in_chunks += 1;
            received_ns = received_ns.max(carry(&mut into.in_free_ns, into.chunk_ns));
        }
        let down = &mut self.nodes[to];
        received_ns = received_ns.max(carry(&mut down.down_free_ns, down.chunk_ns));
        Passage { left_ns, received_ns }
    }
}
