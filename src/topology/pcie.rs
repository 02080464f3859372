//! PCIe devices: where they are, and which of them are network cards or GPUs.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sysfs::Tree;
use crate::telemetry::gpu::Identity;

/// PCI vendor of GPUs that the daemon can use.
const NVIDIA: &str = "0x10de";
/// PCI base class of display controllers; NVIDIA's audio functions and switches have others.
const DISPLAY_CLASS: &str = "0x03";

/// Where a device is. Of two devices, those with the longer common beginning of `path` are nearer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PciePlace {
    /// Address: domain, bus, device, function (`0000:3b:00.0`).
    pub address: String,
    /// From the host bridge (`pci0000:3a`) by way of root port and switches down to the device itself.
    pub path: Vec<String>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Nic {
    /// Network interface (`eth0`); the RDMA device's name where no interface is visible.
    pub name: String,
    /// Kernel driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Speed of the link in Mbit/s; absent while it is down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed_mbit: Option<u32>,
    /// NUMA node, if the firmware says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// Where it is; absent for a card that is not on PCIe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcie: Option<PciePlace>,
    /// RDMA device (`mlx5_0`), if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdma_device: Option<String>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Gpu {
    /// Where it is.
    pub pcie: PciePlace,
    /// NUMA node, if the firmware says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// PCI device number (`0x2330`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// UUID (`GPU-…`), where the driver is loaded and has asked the GPU for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Name, where the driver is loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// The innermost PCIe function on a resolved sysfs path, and its NUMA node.
pub(super) fn place(tree: &Tree, resolved: &str) -> (Option<PciePlace>, Option<u32>) {
    let mut path = Vec::new();
    let mut directory = String::new();
    let mut walked = String::new();
    for component in resolved.split('/') {
        if !walked.is_empty() {
            walked.push('/');
        }
        walked.push_str(component);
        let bridge = component.strip_prefix("pci").is_some_and(|bus| bus.contains(':'));
        if is_address(component) || (bridge && path.is_empty()) {
            path.push(component.to_owned());
            directory.clone_from(&walked);
        }
    }
    let Some(address) = path.last().filter(|last| is_address(last)).cloned() else { return (None, None) };
    // The kernel says -1 where the firmware says nothing: not a u32, so absent.
    let numa_node = tree.number(&format!("{directory}/numa_node"));
    (Some(PciePlace { address, path }), numa_node)
}

/// Domain, bus, device and function: `0000:3b:00.0`. Domains have four digits or, behind VMD, more.
fn is_address(text: &str) -> bool {
    let hex = |part: &str, lengths: RangeInclusive<usize>| {
        lengths.contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let Some((rest, function)) = text.split_once('.') else { return false };
    let parts: Vec<&str> = rest.split(':').collect();
    let [domain, bus, device] = parts.as_slice() else { return false };
    hex(domain, 4..=8) && hex(bus, 2..=2) && hex(device, 2..=2) && hex(function, 1..=1)
}

pub(super) fn nics(tree: &Tree) -> Vec<Nic> {
    let mut nics = Vec::new();
    for name in tree.names("sys/class/net") {
        let device = format!("sys/class/net/{name}/device");
        // Without a device it is virtual: lo, veth, bond, vlan.
        let Some(resolved) = tree.resolve(&device) else { continue };
        let (pcie, numa_node) = place(tree, &resolved);
        nics.push(Nic {
            driver: tree.target_name(&format!("{device}/driver")),
            // The kernel says -1, or refuses to answer, while the link is down.
            speed_mbit: tree.number(&format!("sys/class/net/{name}/speed")),
            numa_node,
            pcie,
            rdma_device: tree.names(&format!("{device}/infiniband")).into_iter().next(),
            name,
        });
    }
    let seen: BTreeSet<String> = nics.iter().filter_map(|nic| nic.rdma_device.clone()).collect();
    // InfiniBand without IPoIB, and pods that do not see the node's interfaces.
    for name in tree.names("sys/class/infiniband").into_iter().filter(|name| !seen.contains(name)) {
        let device = format!("sys/class/infiniband/{name}/device");
        let Some(resolved) = tree.resolve(&device) else { continue };
        let (pcie, numa_node) = place(tree, &resolved);
        nics.push(Nic {
            driver: tree.target_name(&format!("{device}/driver")),
            speed_mbit: None,
            numa_node,
            pcie,
            rdma_device: Some(name.clone()),
            name,
        });
    }
    nics
}

pub(super) fn gpus(tree: &Tree) -> Vec<Gpu> {
    let mut gpus = Vec::new();
    for address in tree.names("sys/bus/pci/devices") {
        let device = format!("sys/bus/pci/devices/{address}");
        let attribute = |name: &str| tree.text(&format!("{device}/{name}"));
        let display = attribute("class").is_some_and(|class| class.starts_with(DISPLAY_CLASS));
        if !display || attribute("vendor").as_deref() != Some(NVIDIA) {
            continue;
        }
        let Some((Some(pcie), numa_node)) = tree.resolve(&device).map(|path| place(tree, &path)) else {
            continue;
        };
        let information = tree.text(&format!("proc/driver/nvidia/gpus/{address}/information"));
        let information = information.unwrap_or_default();
        gpus.push(Gpu {
            pcie,
            numa_node,
            device_id: attribute("device"),
            // Question marks stand there until something has opened the GPU.
            uuid: line_of(&information, "GPU UUID:")
                .filter(|uuid| uuid.starts_with("GPU-") && !uuid.contains('?')),
            model: line_of(&information, "Model:"),
        });
    }
    gpus
}

/// Adds what NVML knows of GPUs, by their PCI address.
pub(super) fn join(gpus: &mut Vec<Gpu>, known: &[Identity]) {
    for identity in known {
        let address = identity.pci_address();
        let place = gpus.iter().position(|gpu| gpu.pcie.address == address).unwrap_or_else(|| {
            let pcie = PciePlace { path: vec![address.clone()], address };
            gpus.push(Gpu { pcie, numa_node: None, device_id: None, uuid: None, model: None });
            gpus.len() - 1
        });
        let Some(gpu) = gpus.get_mut(place) else { continue };
        gpu.uuid.get_or_insert_with(|| identity.uuid.clone());
        gpu.model.get_or_insert_with(|| identity.name.clone());
        gpu.numa_node = gpu.numa_node.or(identity.numa_node);
    }
}

/// What stands behind a label at the start of a line.
fn line_of(text: &str, label: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix(label))?.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::is_address;

    #[test]
    fn addresses() {
        for text in ["0000:3b:00.0", "10000:01:1f.7"] {
            assert!(is_address(text), "{text}");
        }
        for text in
            ["", "pci0000:3a", "0000:3b:00", "0000:3b.00.0", "0000:3b:00:0", "0000:3g:00.0", "eth0", "::."]
        {
            assert!(!is_address(text), "{text}");
        }
    }
}
