//! How many shard threads there are, which drive belongs to which, and where each runs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use crate::config::{self, DataPlane, PageCache};
use crate::error::Result;
use crate::shard::{Landing, Options, ReaderKind, Shard};
use crate::sys::cuda::Context;
use crate::topology::Topology;
use crate::transfer::{Lane, LaneOf};

/// The NUMA node of the GPU at a PCI address.
fn node_of(topology: &Topology, address: Option<&str>) -> Option<u32> {
    topology.gpus.iter().find(|gpu| Some(gpu.pcie.address.as_str()) == address)?.numa_node
}

/// The node that all of them are on, if there is one.
fn shared(mut nodes: impl Iterator<Item = Option<u32>>) -> Option<u32> {
    let first = nodes.next()??;
    nodes.all(|node| node == Some(first)).then_some(first)
}

/// The data plane.
pub(super) struct Plane {
    pub(super) shards: Vec<Shard>,
    /// Drives of each shard thread.
    pub(super) devices: Vec<Vec<String>>,
    pub(super) lane_of: Box<LaneOf>,
}

/// Starts one shard thread for each NVMe drive (or as many as are configured), near its drive. `gpus` are those in use.
pub(super) fn start(
    config: &DataPlane,
    reader: ReaderKind,
    topology: Topology,
    gpus: &[Arc<Context>],
) -> Result<Plane> {
    let nvme = topology.drives.iter().filter(|drive| drive.nvme_controller.is_some()).count();
    let count = if config.shards == 0 { nvme.max(1) } else { config.shards as usize };
    let mut drives: Vec<_> = topology.drives.iter().collect();
    // NVMe drives first, so that each has a thread of its own before others share one.
    drives.sort_by_key(|drive| (drive.nvme_controller.is_none(), drive.name.clone()));
    let mut devices = vec![Vec::new(); count];
    let mut of_drives = vec![None; count];
    let mut places = HashMap::new();
    for (number, drive) in drives.iter().enumerate() {
        let shard = number % count;
        devices[shard].push(drive.name.clone());
        of_drives[shard] = of_drives[shard].or(drive.numa_node);
        places.insert(drive.name.clone(), shard);
    }
    let mut shards = Vec::with_capacity(count);
    let of_gpus = shared(gpus.iter().map(|gpu| node_of(&topology, gpu.device().pci_address.as_deref())));
    for (index, of_drives) in (0u32..).zip(of_drives) {
        // On a machine of one node there is nothing to choose.
        let numa_node = of_drives.or(of_gpus).filter(|_| topology.numa_nodes.len() > 1);
        let near = topology.cpus_near(numa_node);
        // Pinning to all CPUs would say nothing.
        let cpus = if config.pin && near.len() < topology.cpus_allowed.len() { near } else { Vec::new() };
        shards.push(Shard::start(Options {
            index,
            reader,
            block_bytes: config.block_bytes,
            depth: config.depth,
            slots: config.slots,
            cpus,
            numa_node,
            page_cache: config.page_cache == PageCache::Auto,
            devices: gpus.to_vec(),
        })?);
    }
    let known = RefCell::new(HashMap::new());
    let landing = config.landing;
    let lane_of = move |major: u32, minor: u32| {
        *known.borrow_mut().entry((major, minor)).or_insert_with(|| {
            let drive = topology.drive_of(major, minor);
            // A file system without a drive that we know, as a network one: spread by device number.
            let place = drive.and_then(|drive| places.get(&drive.name)).copied();
            let shard = place.unwrap_or(minor as usize % count);
            let copied = drive.is_some_and(|drive| drive.paravirtual);
            let landing = match landing {
                config::Landing::Slots => Landing::Slot,
                config::Landing::Auto if copied => Landing::Slot,
                config::Landing::Auto | config::Landing::InPlace => Landing::InPlace,
            };
            Lane { shard, landing }
        })
    };
    Ok(Plane { shards, devices, lane_of: Box::new(lane_of) })
}

#[cfg(test)]
mod tests {
    use super::shared;

    #[test]
    fn gpus_share_a_node_only_if_all_of_them_are_known_to_be_there() {
        assert_eq!(shared([Some(1), Some(1)].into_iter()), Some(1));
        assert_eq!(shared([Some(1), Some(0)].into_iter()), None);
        assert_eq!(shared([Some(1), None].into_iter()), None);
        assert_eq!(shared([].into_iter()), None);
    }
}
