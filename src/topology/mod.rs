//! What the machine looks like: NUMA nodes, CPUs, drives, network cards and GPUs, as sysfs and procfs show them.
//!
//! Read once at start and on request; nothing here is on a hot path. What a kernel does not show is absent and
//! what it shows malformed is treated as absent: a strange machine must not keep the daemon from starting.

mod activity;
mod drive;
mod numa;
mod pcie;
mod sysfs;
#[cfg(test)]
mod tests;

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use activity::{Activity, DriveStatus, LinkStatus};
pub use drive::Drive;
pub use numa::{HugePages, NumaNode};
pub use pcie::{Gpu, Nic, PciePlace};

use crate::telemetry::gpu::Identity;
use sysfs::Tree;

/// The machine; also the reply to `node.topology`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Topology {
    /// CPUs that the daemon may run on.
    pub cpus_allowed: Vec<u32>,
    /// NUMA nodes, by number. Empty if the kernel does not show any.
    pub numa_nodes: Vec<NumaNode>,
    /// Drives, by name. Partitions and devices made of others (md, dm, loop, zram, ram) are not drives.
    pub drives: Vec<Drive>,
    /// Network cards with hardware behind them, by name.
    pub nics: Vec<Nic>,
    /// GPUs, by PCIe address.
    pub gpus: Vec<Gpu>,
    /// Where it was read from.
    #[serde(skip)]
    tree: Tree,
}

impl Topology {
    /// Reads `sys` and `proc` below this directory: `/`, or a fixture in tests.
    pub fn read(root: &Path) -> Topology {
        let tree = Tree::new(root);
        Topology {
            cpus_allowed: numa::cpus_allowed(&tree),
            numa_nodes: numa::read(&tree),
            drives: drive::read(&tree),
            nics: pcie::nics(&tree),
            gpus: pcie::gpus(&tree),
            tree,
        }
    }

    /// The same with what NVML knows of GPUs: UUID, name and NUMA node where the kernel does not show them, and GPUs
    /// that it does not show at all.
    #[must_use]
    pub fn with_gpus(mut self, known: &[Identity]) -> Topology {
        pcie::join(&mut self.gpus, known);
        self
    }

    /// The drive below a block device, as `stat` numbers it: through partitions, md and dm. Looked up now, as
    /// devices may have been put together since the start. Of a device made of several drives it is the
    /// first by name. Nothing if no drive is below it (tmpfs, overlay, network file systems).
    pub fn drive_of(&self, major: u32, minor: u32) -> Option<&Drive> {
        let name = drive::name_of(&self.tree, major, minor)?;
        self.drives.iter().find(|drive| drive.name == name)
    }

    /// The CPUs of a NUMA node that the daemon may run on; all that it may run on if the node is not known
    /// or has none of them.
    pub fn cpus_near(&self, numa_node: Option<u32>) -> Vec<u32> {
        let node = self.numa_nodes.iter().find(|node| Some(node.node) == numa_node);
        let near: Vec<u32> = node
            .map(|node| node.cpus.iter().copied().filter(|cpu| self.cpus_allowed.contains(cpu)).collect())
            .unwrap_or_default();
        if near.is_empty() { self.cpus_allowed.clone() } else { near }
    }
}
