//! Where drives and GPUs are, seen from each other.

use super::super::output::bytes;
use super::Check;
use crate::topology::{Drive, Gpu, Topology};

/// How far a drive is from a GPU, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Switch,
    Bridge,
    Node,
    OtherNode(Option<u32>),
    Unknown,
}

pub(super) fn checks(topology: &Topology) -> Vec<Check> {
    let drives: Vec<&Drive> =
        topology.drives.iter().filter(|drive| drive.nvme_controller.is_some()).collect();
    if drives.is_empty() {
        let others: Vec<String> =
            topology.drives.iter().map(|drive| format!("{} ({})", drive.name, device(drive))).collect();
        let found = match others.as_slice() {
            [] => "no drive is visible".to_owned(),
            names => format!("no NVMe drive; {}", names.join(", ")),
        };
        return vec![Check::warn(
            "drives",
            found,
            "loads go at the speed of what the files lie on: use local NVMe drives",
        )];
    }
    drives.into_iter().map(|drive| one(topology, drive)).collect()
}

fn one(topology: &Topology, drive: &Drive) -> Check {
    let node =
        drive.numa_node.map_or_else(|| "NUMA node not known".to_owned(), |node| format!("NUMA node {node}"));
    let ways: Vec<(&Gpu, Way)> = topology.gpus.iter().map(|gpu| (gpu, way(topology, drive, gpu))).collect();
    let seen = ways.iter().map(|(gpu, way)| {
        let name = gpu.uuid.as_deref().unwrap_or(&gpu.pcie.address);
        format!("; to {name}: {}", words(*way))
    });
    let found = format!("{}, {node}{}", device(drive), seen.collect::<String>());
    let far = !ways.is_empty() && ways.iter().all(|(_, way)| matches!(way, Way::OtherNode(_)));
    let check = if far {
        Check::warn(
            "drives",
            found,
            "every byte for a GPU crosses between NUMA nodes: put drives at the GPUs' node, or models on drives that are",
        )
    } else {
        Check::ok("drives", found)
    };
    check.of(&drive.name)
}

/// What a block device takes, as its queue says.
fn device(drive: &Drive) -> String {
    let mut facts = Vec::new();
    if drive.paravirtual {
        facts.push("read by a hypervisor".to_owned());
    }
    // Of what a hypervisor reads, the kernel does not know.
    if drive.rotational && !drive.paravirtual {
        facts.push("turning".to_owned());
    }
    facts.extend(drive.request_bytes_max.map(|most| format!("requests of {} at most", bytes(most))));
    facts.extend(drive.queue_depth.map(|depth| format!("{depth} queued")));
    if facts.is_empty() { "its queue says nothing".to_owned() } else { facts.join(", ") }
}

fn way(topology: &Topology, drive: &Drive, gpu: &Gpu) -> Way {
    let common = drive.pcie.as_ref().map_or(0, |drive| {
        drive.path.iter().zip(&gpu.pcie.path).take_while(|(drive, gpu)| drive == gpu).count()
    });
    match (common, drive.numa_node, gpu.numa_node) {
        // The bridge itself, and at least one port below it.
        (2.., _, _) => Way::Switch,
        (1, _, _) => Way::Bridge,
        (_, Some(drive), Some(gpu)) if drive == gpu => Way::Node,
        (_, Some(drive), Some(gpu)) => {
            let node = topology.numa_nodes.iter().find(|node| node.node == drive);
            Way::OtherNode(node.and_then(|node| node.distances.get(&gpu).copied()))
        }
        _ => Way::Unknown,
    }
}

fn words(way: Way) -> String {
    match way {
        Way::Switch => "one PCIe switch".to_owned(),
        Way::Bridge => "one host bridge".to_owned(),
        Way::Node => "one NUMA node".to_owned(),
        Way::OtherNode(Some(distance)) => format!("another NUMA node, distance {distance}"),
        Way::OtherNode(None) => "another NUMA node".to_owned(),
        Way::Unknown => "not known".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::topology::{NumaNode, PciePlace};

    fn place(path: &[&str]) -> PciePlace {
        let path: Vec<String> = path.iter().map(|&part| part.to_owned()).collect();
        PciePlace { address: path.last().cloned().unwrap_or_default(), path }
    }

    fn drive(path: &[&str], node: Option<u32>) -> Drive {
        Drive {
            name: "nvme0n1".to_owned(),
            model: None,
            bytes: 1,
            nvme_controller: Some("nvme0".to_owned()),
            pcie: Some(place(path)),
            numa_node: node,
            queue_depth: Some(1023),
            paravirtual: false,
            rotational: false,
            logical_block_bytes: None,
            request_bytes_max: Some(1280 << 10),
        }
    }

    #[test]
    fn a_drive_is_near_to_a_gpu_or_not() {
        let mut topology = Topology::read(tempfile::tempdir().unwrap().path());
        assert_eq!(checks(&topology)[0].verdict, Verdict::Warn, "no drive");
        topology.numa_nodes.push(NumaNode {
            node: 0,
            cpus: Vec::new(),
            memory_bytes: None,
            huge_pages: Vec::new(),
            distances: [(0, 10), (1, 21)].into(),
        });
        let pcie = place(&["pci0000:10", "0000:10:01.0", "0000:11:00.0"]);
        topology.gpus.push(Gpu {
            pcie,
            numa_node: Some(1),
            device_id: None,
            uuid: Some("GPU-1".to_owned()),
            model: None,
        });
        for (path, node, expected, verdict) in [
            (&["pci0000:10", "0000:10:01.0", "0000:12:00.0"][..], Some(1), "one PCIe switch", Verdict::Ok),
            (&["pci0000:10", "0000:10:02.0"], Some(1), "one host bridge", Verdict::Ok),
            (&["pci0000:20"], Some(1), "one NUMA node", Verdict::Ok),
            (&["pci0000:20"], Some(0), "another NUMA node, distance 21", Verdict::Warn),
            (&["pci0000:20"], None, "not known", Verdict::Ok),
        ] {
            topology.drives = vec![drive(path, node)];
            let check = &checks(&topology)[0];
            assert!(check.found.ends_with(&format!("to GPU-1: {expected}")), "{}", check.found);
            assert!(check.found.contains("requests of 1.25 MiB at most, 1023 queued"), "{}", check.found);
            assert_eq!(check.verdict, verdict, "{expected}");
        }
    }
}
