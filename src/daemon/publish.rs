//! Brings the state of the parts into the metrics whenever the page is asked for. Counters that a hot loop keeps for
//! itself are brought over as differences.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use crate::api::methods::JobState;
use crate::node::Node;
use crate::shard::{Path, Phase};
use crate::telemetry::http::Collections;
use crate::telemetry::labels::OpenJob;
use crate::telemetry::metrics::{DeviceMetrics, ReadMetrics, ShardMetrics};
use crate::tier::DeviceId;
use crate::tier::residency::Eviction;

/// Publishes as long as pages are served.
pub(super) async fn run(node: Rc<Node>, mut collections: Collections) {
    let mut publisher = Publisher::new(&node);
    while let Some(done) = collections.recv().await {
        node.monitor.collect().await;
        publisher.publish(&node);
        // The page may have run into its deadline meanwhile.
        let _ = done.send(());
    }
}

/// Handles of the metrics, and what was published before.
struct Publisher {
    reads: ReadMetrics,
    /// The host tier, then the GPUs.
    devices: Vec<DeviceMetrics>,
    shards: Vec<(ShardMetrics, Before)>,
    sent_to_peers: u64,
}

#[derive(Default)]
struct Before {
    bytes: [u64; Path::ALL.len()],
    nanos: [u64; Phase::ALL.len()],
    leaked: u64,
}

/// What was added since `before`, which is brought up to date.
fn since(before: &mut u64, now: u64) -> u64 {
    now.saturating_sub(std::mem::replace(before, now))
}

impl Publisher {
    fn new(node: &Node) -> Publisher {
        let shards =
            (0..node.shards.len() as u32).map(|index| (node.metrics.shard(index), Before::default()));
        Publisher {
            reads: node.metrics.file_reads(),
            devices: node
                .device_ids()
                .map(|id| node.metrics.device(&node.residency.device_name(id)))
                .collect(),
            shards: shards.collect(),
            sent_to_peers: 0,
        }
    }

    fn publish(&mut self, node: &Node) {
        self.publish_devices(node);
        self.publish_shards(node);
        let peers = node.jobs.peers().status();
        node.metrics.peer_sent_bytes.inc_by(since(&mut self.sent_to_peers, peers.sent_bytes));
        node.metrics.peer_connections.set(peers.connections.into());
        node.metrics.peer_offers.set(peers.offers.into());
        let open = |state| node.jobs.list(None).iter().filter(|job| job.state() == state).count() as i64;
        node.metrics.jobs(OpenJob::Queued).set(open(JobState::Queued));
        node.metrics.jobs(OpenJob::Running).set(open(JobState::Running));
    }

    fn publish_devices(&self, node: &Node) {
        let host = node.residency.host();
        node.metrics.pool_bytes.set(host.account().pool as i64);
        let states = node.residency.list(None, |entry| (entry.key.device, entry.state_name()));
        for (id, metrics) in node.device_ids().zip(&self.devices) {
            let (resident, held, budget) = match id {
                DeviceId::Host => (host.account().regions, host.account().held, host.budget()),
                DeviceId::Gpu(index) => {
                    let gpu = &node.residency.gpus()[index];
                    gpu.look_at_held();
                    (gpu.account().regions, gpu.account().held, gpu.budget())
                }
            };
            metrics.resident_bytes.set(resident as i64);
            metrics.held_bytes.set(held as i64);
            metrics.budget_bytes.set(budget as i64);
            let count = |name| states.iter().filter(|state| **state == (id, name)).count() as i64;
            metrics.loading.set(count("loading"));
            metrics.resident.set(count("resident"));
            metrics.stale.set(count("stale"));
        }
        node.metrics.demoted_bytes.inc_by(node.residency.take_demoted());
        for (id, eviction) in node.residency.take_evictions() {
            let place = node.device_ids().position(|known| known == id);
            let Some(metrics) = place.and_then(|place| self.devices.get(place)) else { continue };
            match eviction {
                Eviction::Budget => metrics.evicted_for_budget.inc(),
                Eviction::Request => metrics.evicted_by_request.inc(),
                Eviction::Stale => metrics.evicted_stale.inc(),
                Eviction::Lost => metrics.evicted_lost.inc(),
            };
        }
    }

    fn publish_shards(&mut self, node: &Node) {
        for (shard, (metrics, before)) in node.shards.iter().zip(&mut self.shards) {
            let (stats, options) = (shard.stats(), shard.options());
            metrics.queue_depth.set(stats.waiting.load(Ordering::Relaxed) as i64);
            metrics.reads_in_flight.set(stats.in_flight.load(Ordering::Relaxed).into());
            let slots = u64::from(stats.slots_used.load(Ordering::Relaxed));
            metrics.slots_bytes.set((slots * options.block_bytes) as i64);
            for (path, before) in Path::ALL.iter().zip(&mut before.bytes) {
                let bytes = since(before, stats.bytes[*path as usize].load(Ordering::Relaxed));
                match path {
                    Path::Direct => self.reads.direct_bytes.inc_by(bytes),
                    Path::Staged => self.reads.staged_bytes.inc_by(bytes),
                    Path::Cached => self.reads.cached_bytes.inc_by(bytes),
                    Path::Buffered => self.reads.buffered_bytes.inc_by(bytes),
                    // No shard thread takes part in these.
                    Path::Host | Path::Compat | Path::Tcp | Path::Rdma => continue,
                };
            }
            for (phase, before) in Phase::ALL.iter().zip(&mut before.nanos) {
                let nanos = since(before, stats.nanos[*phase as usize].load(Ordering::Relaxed));
                let seconds = match phase {
                    Phase::Submit => &metrics.submit_seconds,
                    Phase::Wait => &metrics.wait_seconds,
                    Phase::Checksum => &metrics.checksum_seconds,
                    Phase::Copy => &metrics.copy_seconds,
                };
                seconds.inc_by(nanos as f64 / 1e9);
            }
            let leaked = since(&mut before.leaked, stats.leaked.load(Ordering::Relaxed));
            node.metrics.staging_leaked_bytes.inc_by(leaked);
        }
    }
}
