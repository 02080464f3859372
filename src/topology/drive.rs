//! Drives, and which of them is below a block device.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pcie::{PciePlace, place};
use super::sysfs::{Tree, file_name, parent};

/// Unit of a block device's `size`, whatever its logical block is.
const SECTOR_BYTES: u64 = 512;
/// md on dm on partitions on md …: deeper than this is a loop.
const STACK_DEPTH_MAX: u32 = 8;
/// Names of block devices that are not drives: memory, files, others put together, removable media.
const NOT_DRIVES: [&str; 8] = ["loop", "zram", "ram", "dm-", "md", "sr", "fd", "nbd"];

/// A drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Drive {
    /// Name of the block device (`nvme0n1`).
    pub name: String,
    /// Model, as the drive states it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Size, bytes.
    pub bytes: u64,
    /// NVMe controller (`nvme0`); the first of a drive with several paths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_controller: Option<String>,
    /// Where it, or its controller, is; absent for a drive that is not on PCIe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcie: Option<PciePlace>,
    /// NUMA node, if the firmware says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// Requests that each of the kernel's queues for it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_depth: Option<u32>,
    /// Whether a hypervisor reads for it and copies into this machine's memory, instead of the drive writing there.
    pub paravirtual: bool,
    /// Whether it turns.
    pub rotational: bool,
    /// Bytes of a logical block: what O_DIRECT must be aligned to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logical_block_bytes: Option<u32>,
    /// Largest request that the kernel sends it in one piece, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_bytes_max: Option<u64>,
}

pub(super) fn read(tree: &Tree) -> Vec<Drive> {
    tree.names("sys/block").into_iter().filter_map(|name| read_drive(tree, name)).collect()
}

fn read_drive(tree: &Tree, name: String) -> Option<Drive> {
    if NOT_DRIVES.iter().any(|prefix| name.starts_with(prefix)) {
        return None;
    }
    let path = format!("sys/block/{name}");
    let attribute = |attribute: &str| tree.text(&format!("{path}/{attribute}"));
    let bytes = attribute("size")?.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)?;
    // Hidden: one path of a drive that has its own block device. Empty: a slot without a medium.
    if bytes == 0 || attribute("hidden").as_deref() == Some("1") {
        return None;
    }
    let resolved = tree.resolve(&path)?;
    let controller = nvme_controller(tree, &resolved);
    let (pcie, numa_node) = place(tree, controller.as_deref().unwrap_or(&resolved));
    let kib: Option<u64> = tree.number(&format!("{path}/queue/max_sectors_kb"));
    Some(Drive {
        model: attribute("device/model").filter(|model| !model.is_empty()),
        bytes,
        nvme_controller: controller.map(|path| file_name(&path).to_owned()),
        pcie,
        numa_node,
        queue_depth: tree.number(&format!("{path}/queue/nr_requests")),
        paravirtual: resolved.split('/').any(is_paravirtual_bus),
        rotational: attribute("queue/rotational").as_deref() == Some("1"),
        logical_block_bytes: tree.number(&format!("{path}/queue/logical_block_size")),
        request_bytes_max: kib.and_then(|kib| kib.checked_mul(1024)),
        name,
    })
}

/// Whether devices below this one are a hypervisor's own: virtio (blk and scsi), Xen, Hyper-V.
fn is_paravirtual_bus(component: &str) -> bool {
    let numbered = |prefix: &str| {
        let number = component.strip_prefix(prefix);
        number.is_some_and(|number| number.bytes().next().is_some_and(|byte| byte.is_ascii_digit()))
    };
    numbered("virtio") || numbered("vbd-") || numbered("VMBUS:")
}

/// The resolved path of the controller of an NVMe drive.
fn nvme_controller(tree: &Tree, resolved: &str) -> Option<String> {
    let above = parent(resolved);
    if is_controller(file_name(above)) {
        return Some(above.to_owned());
    }
    // With native multipath the drive hangs below its subsystem, which has links to its controllers.
    if !file_name(above).starts_with("nvme-subsys") {
        return None;
    }
    let name = tree.names(above).into_iter().find(|name| is_controller(name))?;
    tree.resolve(&format!("{above}/{name}"))
}

/// `nvme0`, but not `nvme0n1` and not `nvme-subsys0`.
fn is_controller(name: &str) -> bool {
    name.strip_prefix("nvme").is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The name of the (first) drive below a block device.
pub(super) fn name_of(tree: &Tree, major: u32, minor: u32) -> Option<String> {
    below(tree, &tree.resolve(&format!("sys/dev/block/{major}:{minor}"))?, STACK_DEPTH_MAX)
}

fn below(tree: &Tree, resolved: &str, depth: u32) -> Option<String> {
    let depth = depth.checked_sub(1)?;
    let whole = if tree.exists(&format!("{resolved}/partition")) { parent(resolved) } else { resolved };
    let made_of = tree.names(&format!("{whole}/slaves"));
    if made_of.is_empty() {
        return Some(file_name(whole).to_owned());
    }
    let made_of = made_of.iter().filter_map(|name| tree.resolve(&format!("{whole}/slaves/{name}")));
    made_of.into_iter().find_map(|path| below(tree, &path, depth))
}
