//! A machine with two sockets and eight GPUs, as files.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;

struct Machine {
    directory: tempfile::TempDir,
}

impl Machine {
    fn empty() -> Machine {
        Machine { directory: tempfile::tempdir().unwrap() }
    }

    fn read(&self) -> Topology {
        Topology::read(self.directory.path())
    }

    fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(self.directory.path().join(target), path).unwrap();
    }

    /// A PCIe function at a sysfs path.
    fn function(&self, path: &str, class: &str, vendor: &str, socket: i32) {
        self.write(&format!("{path}/class"), format!("{class}\n"));
        self.write(&format!("{path}/vendor"), format!("{vendor}\n"));
        self.write(&format!("{path}/device"), "0x2330\n");
        self.write(&format!("{path}/numa_node"), format!("{socket}\n"));
        self.link(&format!("sys/bus/pci/devices/{}", sysfs::file_name(path)), path);
    }

    /// A whole block device at a sysfs path.
    fn disk(&self, path: &str, number: &str, sectors: &str) {
        self.write(&format!("{path}/size"), format!("{sectors}\n"));
        self.write(&format!("{path}/queue/nr_requests"), "1023\n");
        self.write(&format!("{path}/queue/rotational"), "0\n");
        self.write(&format!("{path}/queue/logical_block_size"), "512\n");
        self.write(&format!("{path}/queue/max_sectors_kb"), "1280\n");
        self.link(&format!("sys/block/{}", sysfs::file_name(path)), path);
        self.link(&format!("sys/dev/block/{number}"), path);
    }

    /// Two sockets with two PCIe switches each; at each switch two GPUs, a network card and a drive.
    fn two_sockets() -> Machine {
        let machine = Machine::empty();
        machine.write("proc/self/status", "Name:\tlodestream\nCpus_allowed_list:\t2-15,20-31\n");
        for node in 0..2 {
            let path = format!("sys/devices/system/node/node{node}");
            machine.write(&format!("{path}/cpulist"), format!("{}-{}\n", node * 16, node * 16 + 15));
            machine.write(&format!("{path}/meminfo"), format!("Node {node} MemTotal:   1048576 kB\n"));
            machine.write(&format!("{path}/distance"), ["10 21\n", "21 10\n"][node]);
            machine.write(&format!("{path}/hugepages/hugepages-2048kB/nr_hugepages"), "512\n");
            machine.write(&format!("{path}/hugepages/hugepages-2048kB/free_hugepages"), "500\n");
            machine.write(&format!("{path}/hugepages/hugepages-1048576kB/nr_hugepages"), "0\n");
            machine.write(&format!("{path}/hugepages/hugepages-1048576kB/free_hugepages"), "0\n");
        }
        machine.write("sys/devices/system/node/online", "0-1\n");
        for switch in 0..4 {
            machine.add_switch(switch);
        }
        machine
    }

    fn add_switch(&self, switch: usize) {
        let socket = i32::try_from(switch / 2).unwrap();
        let bus = format!("{}0", switch + 1);
        let port = format!("sys/devices/pci0000:{bus}/0000:{bus}:01.0/0000:{}1:00.0", switch + 1);
        let slot = |n: usize| format!("{port}/0000:{}2:0{n}.0/0000:{}{}:00.0", switch + 1, switch + 1, n + 3);
        for gpu in 0..2 {
            self.function(&slot(gpu), "0x030200", "0x10de", socket);
            let address = slot(gpu).rsplit('/').next().unwrap().to_owned();
            self.write(
                &format!("proc/driver/nvidia/gpus/{address}/information"),
                format!(
                    "Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-{switch}{gpu}aa\nBus Location: \t {address}\n"
                ),
            );
        }
        self.function(&slot(2), "0x020000", "0x15b3", socket);
        self.write(&format!("{}/net/eth{switch}/speed", slot(2)), "400000\n");
        self.write(&format!("{}/infiniband/mlx5_{switch}/node_type", slot(2)), "1: CA\n");
        self.write("sys/bus/pci/drivers/mlx5_core/uevent", "");
        self.link(&format!("{}/driver", slot(2)), "sys/bus/pci/drivers/mlx5_core");
        self.link(&format!("sys/class/net/eth{switch}"), &format!("{}/net/eth{switch}", slot(2)));
        self.link(&format!("{}/net/eth{switch}/device", slot(2)), &slot(2));
        let rdma = format!("{}/infiniband/mlx5_{switch}", slot(2));
        self.link(&format!("sys/class/infiniband/mlx5_{switch}"), &rdma);
        self.link(&format!("{rdma}/device"), &slot(2));

        self.function(&slot(3), "0x010802", "0x144d", socket);
        let controller = format!("{}/nvme/nvme{switch}", slot(3));
        self.write(&format!("{controller}/model"), "SAMSUNG MZ   \n");
        let drive = format!("{controller}/nvme{switch}n1");
        self.disk(&drive, &format!("259:{}", switch * 2), "7501476528");
        self.link(&format!("{drive}/device"), &controller);
        self.write(&format!("{drive}/nvme{switch}n1p1/partition"), "1\n");
        self.link(&format!("sys/dev/block/259:{}", switch * 2 + 1), &format!("{drive}/nvme{switch}n1p1"));
    }
}

#[test]
fn nodes_have_cpus_memory_huge_pages_and_distances() {
    let topology = Machine::two_sockets().read();
    assert_eq!(topology.numa_nodes.len(), 2);
    let node = &topology.numa_nodes[1];
    assert_eq!(node.cpus, (16..32).collect::<Vec<u32>>());
    assert_eq!(node.memory_bytes, Some(1 << 30));
    assert_eq!(node.distances, [(0, 21), (1, 10)].into());
    let huge = |page_bytes, total, free| HugePages { page_bytes, total, free };
    assert_eq!(node.huge_pages, [huge(2 << 20, 512, 500), huge(1 << 30, 0, 0)]);
}

#[test]
fn cpus_near_a_node_are_those_that_may_be_used() {
    let topology = Machine::two_sockets().read();
    assert_eq!(topology.cpus_near(Some(0)), (2..16).collect::<Vec<u32>>());
    assert_eq!(topology.cpus_near(Some(1)), (20..32).collect::<Vec<u32>>());
    assert_eq!(topology.cpus_near(None), topology.cpus_allowed);
    assert_eq!(topology.cpus_near(Some(7)), topology.cpus_allowed);
}

#[test]
fn drives_have_their_controller_and_place() {
    let topology = Machine::two_sockets().read();
    assert_eq!(topology.drives.len(), 4);
    let drive = &topology.drives[2];
    assert_eq!(drive.name, "nvme2n1");
    assert_eq!(drive.model.as_deref(), Some("SAMSUNG MZ"));
    assert_eq!(drive.bytes, 7_501_476_528 * 512);
    assert_eq!(drive.nvme_controller.as_deref(), Some("nvme2"));
    assert_eq!(drive.numa_node, Some(1));
    assert_eq!((drive.queue_depth, drive.rotational), (Some(1023), false));
    assert!(!drive.paravirtual);
    assert_eq!((drive.logical_block_bytes, drive.request_bytes_max), (Some(512), Some(1280 << 10)));
    let place = drive.pcie.as_ref().unwrap();
    assert_eq!(place.address, "0000:36:00.0");
    assert_eq!(place.path, ["pci0000:30", "0000:30:01.0", "0000:31:00.0", "0000:32:03.0", "0000:36:00.0"]);
}

#[test]
fn drives_that_a_hypervisor_reads_are_known() {
    let machine = Machine::empty();
    machine.disk("sys/devices/pci0000:00/0000:00:05.0/virtio2/block/vda", "254:0", "2048");
    machine.disk(
        "sys/devices/pci0000:00/0000:00:06.0/virtio3/host0/target0:0:0/0:0:0:0/block/sda",
        "8:0",
        "2048",
    );
    machine.disk("sys/devices/vbd-51712/block/xvda", "202:0", "2048");
    machine.disk(
        "sys/devices/pci0000:00/0000:00:07.0/ata1/host1/target1:0:0/1:0:0:0/block/sdb",
        "8:16",
        "2048",
    );
    let found: Vec<_> =
        machine.read().drives.iter().map(|drive| (drive.name.clone(), drive.paravirtual)).collect();
    let expected = [("sda", true), ("sdb", false), ("vda", true), ("xvda", true)];
    assert_eq!(found, expected.map(|(name, paravirtual)| (name.to_owned(), paravirtual)));
}

#[test]
fn gpus_and_cards_at_one_switch_share_the_beginning_of_their_path() {
    let topology = Machine::two_sockets().read();
    assert_eq!((topology.gpus.len(), topology.nics.len()), (8, 4));
    let gpu = &topology.gpus[7];
    assert_eq!(gpu.uuid.as_deref(), Some("GPU-31aa"));
    assert_eq!(gpu.model.as_deref(), Some("NVIDIA H100"));
    assert_eq!((gpu.device_id.as_deref(), gpu.numa_node), (Some("0x2330"), Some(1)));
    let nic = &topology.nics[3];
    assert_eq!((nic.name.as_str(), nic.speed_mbit, nic.numa_node), ("eth3", Some(400_000), Some(1)));
    assert_eq!((nic.driver.as_deref(), nic.rdma_device.as_deref()), (Some("mlx5_core"), Some("mlx5_3")));
    let common =
        |a: &PciePlace, b: &PciePlace| a.path.iter().zip(&b.path).take_while(|(a, b)| a == b).count();
    assert_eq!(common(&gpu.pcie, nic.pcie.as_ref().unwrap()), 3);
    assert_eq!(common(&gpu.pcie, topology.nics[2].pcie.as_ref().unwrap()), 0);
}

#[test]
fn what_nvml_knows_joins_by_address() {
    let machine = Machine::two_sockets();
    let plain = machine.read();
    let identity = |pci_bus_id: &str, uuid: &str| Identity {
        index: 0,
        uuid: uuid.to_owned(),
        name: "NVIDIA H200".to_owned(),
        pci_bus_id: pci_bus_id.to_owned(),
        minor: None,
        numa_node: Some(0),
        bar1_bytes: None,
    };
    let address = plain.gpus[7].pcie.address.clone();
    let information = format!("proc/driver/nvidia/gpus/{address}/information");
    machine.write(&information, "Model: \t\t Unknown\nGPU UUID: \t GPU-????????\n");
    let known = [
        identity(&format!("0000{}", address.to_ascii_uppercase()), "GPU-7"),
        identity("00000000:AA:00.0", "GPU-8"),
    ];
    let joined = machine.read().with_gpus(&known);
    assert_eq!(joined.gpus.len(), 9);
    assert_eq!((joined.gpus[7].uuid.as_deref(), joined.gpus[7].numa_node), (Some("GPU-7"), Some(1)));
    assert_eq!(joined.gpus[7].pcie, plain.gpus[7].pcie);
    let hidden = &joined.gpus[8];
    assert_eq!((hidden.pcie.address.as_str(), hidden.uuid.as_deref()), ("0000:aa:00.0", Some("GPU-8")));
    assert_eq!((hidden.model.as_deref(), hidden.numa_node), (Some("NVIDIA H200"), Some(0)));
    assert_eq!(joined.gpus[..7], plain.gpus[..7]);
}

#[test]
fn what_is_no_gpu_no_drive_and_no_card_is_left_out() {
    let machine = Machine::two_sockets();
    machine.function("sys/devices/pci0000:00/0000:00:01.0", "0x030000", "0x1a03", 0);
    machine.function("sys/devices/pci0000:00/0000:00:02.0", "0x068000", "0x10de", 0);
    for (name, sectors) in [("loop0", "8"), ("zram0", "8"), ("ram0", "8"), ("sdx", "0"), ("nvme9c0n1", "8")] {
        machine.disk(&format!("sys/devices/virtual/block/{name}"), "7:0", sectors);
        fs::remove_file(machine.directory.path().join("sys/dev/block/7:0")).unwrap();
    }
    machine.write("sys/devices/virtual/block/nvme9c0n1/hidden", "1\n");
    machine.write("sys/class/net/lo/speed", "10\n");
    let topology = machine.read();
    assert_eq!((topology.gpus.len(), topology.drives.len(), topology.nics.len()), (8, 4, 4));
}

#[test]
fn a_drive_with_several_paths_is_at_its_first_controller() {
    let machine = Machine::two_sockets();
    let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys5";
    let controller = "sys/devices/pci0000:50/0000:51:00.0/nvme/nvme5";
    machine.function("sys/devices/pci0000:50/0000:51:00.0", "0x010802", "0x144d", 1);
    machine.write(&format!("{controller}/state"), "live\n");
    machine.link(&format!("{subsystem}/nvme5"), controller);
    machine.disk(&format!("{subsystem}/nvme5n1"), "259:20", "4096");
    let topology = machine.read();
    let drive = topology.drive_of(259, 20).unwrap();
    assert_eq!(drive.nvme_controller.as_deref(), Some("nvme5"));
    assert_eq!((drive.pcie.as_ref().unwrap().address.as_str(), drive.numa_node), ("0000:51:00.0", Some(1)));
}

#[test]
fn an_rdma_device_without_an_interface_is_a_card() {
    let machine = Machine::empty();
    let function = "sys/devices/pci0000:50/0000:51:00.0";
    machine.function(function, "0x020700", "0x15b3", -1);
    machine.link(&format!("{function}/infiniband/mlx5_9/device"), function);
    machine.link("sys/class/infiniband/mlx5_9", &format!("{function}/infiniband/mlx5_9"));
    let nics = machine.read().nics;
    assert_eq!(nics.len(), 1);
    assert_eq!((nics[0].name.as_str(), nics[0].rdma_device.as_deref()), ("mlx5_9", Some("mlx5_9")));
    assert_eq!(nics[0].numa_node, None, "the firmware says nothing");
}

#[test]
fn the_drive_is_found_through_partitions_md_and_dm() {
    let machine = Machine::two_sockets();
    let topology = machine.read();
    let name = |major, minor| topology.drive_of(major, minor).map(|drive| drive.name.as_str());
    assert_eq!(name(259, 4), Some("nvme2n1"));
    assert_eq!(name(259, 5), Some("nvme2n1"));
    assert_eq!(name(0, 42), None);
    // Put together after the start: dm on a partition of md on two partitions.
    let (md, dm) = ("sys/devices/virtual/block/md0", "sys/devices/virtual/block/dm-0");
    machine.disk(md, "9:0", "8");
    machine.write(&format!("{md}/md0p1/partition"), "1\n");
    for number in [3, 7] {
        let partition = format!("nvme{}n1p1", number / 2);
        let target =
            fs::canonicalize(machine.directory.path().join(format!("sys/dev/block/259:{number}"))).unwrap();
        fs::create_dir_all(machine.directory.path().join(md).join("slaves")).unwrap();
        symlink(target, machine.directory.path().join(md).join("slaves").join(partition)).unwrap();
    }
    machine.disk(dm, "253:0", "8");
    machine.link(&format!("{dm}/slaves/md0p1"), &format!("{md}/md0p1"));
    assert_eq!(name(9, 0), Some("nvme1n1"));
    assert_eq!(name(253, 0), Some("nvme1n1"));
    // Devices that are made of each other do not exist; if they did, the search would end.
    machine.disk("sys/devices/virtual/block/dm-8", "253:8", "8");
    machine.link("sys/devices/virtual/block/dm-8/slaves/dm-9", "sys/devices/virtual/block/dm-9");
    machine.link("sys/devices/virtual/block/dm-9/slaves/dm-8", "sys/devices/virtual/block/dm-8");
    assert_eq!(name(253, 8), None);
}

#[test]
fn a_machine_that_shows_nothing_or_nonsense_is_read() {
    let empty = Machine::empty().read();
    assert_eq!((empty.numa_nodes.len(), empty.drives.len(), empty.cpus_allowed.len()), (0, 0, 0));
    assert_eq!(empty.cpus_near(Some(0)), Vec::<u32>::new());

    let nonsense: [&[u8]; 4] = [b"", b"\xff\xfe\0", b"-1", b"99999999999999999999999999"];
    for content in nonsense {
        let machine = Machine::two_sockets();
        let mut directories = vec![machine.directory.path().to_path_buf()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                match entry.file_type().unwrap() {
                    kind if kind.is_dir() => directories.push(entry.path()),
                    kind if kind.is_file() => fs::write(entry.path(), content).unwrap(),
                    _ => {}
                }
            }
        }
        let topology = machine.read();
        assert_eq!((topology.drives.len(), topology.gpus.len()), (0, 0));
        assert_eq!(topology.numa_nodes.len(), 2);
        assert!(topology.nics.iter().all(|nic| nic.speed_mbit.is_none() && nic.numa_node.is_none()));
    }
}

#[test]
fn it_travels_as_json() {
    let topology = Machine::two_sockets().read();
    let json = serde_json::to_value(&topology).unwrap();
    assert_eq!(json["drives"][0]["name"], "nvme0n1");
    assert_eq!(json["numa_nodes"][0]["distances"]["1"], 21);
    assert!(json.get("tree").is_none());
    let back: Topology = serde_json::from_value(json).unwrap();
    assert_eq!(back.gpus, topology.gpus);
}

#[test]
fn this_machine_has_cpus() {
    let topology = Topology::read(Path::new("/"));
    assert!(!topology.cpus_allowed.is_empty());
    assert!(!topology.cpus_near(Some(0)).is_empty());
}
