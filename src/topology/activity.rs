//! What drives and links have moved so far, as the kernel counts it: for everyone on this machine, not for the daemon alone.
//!
//! Which ones there are is found out once. A reading is a few small files of sysfs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Topology;
use super::sysfs::Tree;

/// Unit of the sectors in a block device's `stat`, whatever its logical block is.
const SECTOR_BYTES: u64 = 512;

/// What a drive has done since the machine started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DriveStatus {
    /// Name of the block device (`nvme0n1`).
    pub drive: String,
    /// Bytes read.
    pub read_bytes: u64,
    /// Reads that ended.
    pub reads: u64,
    /// Milliseconds during which something was in flight.
    pub busy_ms: u64,
    /// Reads and writes in flight now.
    pub in_flight: u64,
}

/// A way that bytes take: a network card, or the PCIe link of a drive or a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LinkStatus {
    /// The network interface, the drive, or the GPU's UUID (its PCIe address where that is not known).
    pub link: String,
    /// `network` or `pcie`.
    pub kind: String,
    /// What it could move in one direction as it runs now, bytes per second. An idle GPU runs its link slower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
    /// PCIe lanes in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes: Option<u32>,
    /// PCIe lanes that the device has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes_max: Option<u32>,
    /// Bytes received by a network card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_bytes: Option<u64>,
    /// Bytes sent by a network card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
}

/// Reads what the drives and links of a machine have moved.
#[derive(Debug)]
pub struct Activity {
    tree: Tree,
    drives: Vec<String>,
    networks: Vec<String>,
    /// Name and PCIe address.
    pcie: Vec<(String, String)>,
}

impl Activity {
    /// Of the drives and links that `topology` knows.
    pub fn of(topology: &Topology) -> Activity {
        let drives = topology.drives.iter();
        let behind =
            drives.filter_map(|drive| Some((drive.name.clone(), drive.pcie.as_ref()?.address.clone())));
        let gpus = topology.gpus.iter().map(|gpu| {
            let address = gpu.pcie.address.clone();
            (gpu.uuid.clone().unwrap_or_else(|| address.clone()), address)
        });
        Activity {
            drives: topology.drives.iter().map(|drive| drive.name.clone()).collect(),
            networks: topology.nics.iter().map(|nic| nic.name.clone()).collect(),
            pcie: behind.chain(gpus).collect(),
            tree: topology.tree.clone(),
        }
    }

    /// The drives, by name. One that has gone is left out.
    pub fn drives(&self) -> Vec<DriveStatus> {
        self.drives.iter().filter_map(|drive| self.drive(drive)).collect()
    }

    fn drive(&self, drive: &str) -> Option<DriveStatus> {
        let text = self.tree.text(&format!("sys/block/{drive}/stat"))?;
        let fields: Vec<u64> = text.split_whitespace().map_while(|field| field.parse().ok()).collect();
        // Documentation/admin-guide/iostats.rst: reads, merged, sectors, ms; the same of writes; in flight, busy ms.
        let [reads, _, sectors, _, _, _, _, _, in_flight, busy_ms, ..] = fields[..] else { return None };
        Some(DriveStatus {
            drive: drive.to_owned(),
            read_bytes: sectors.saturating_mul(SECTOR_BYTES),
            reads,
            busy_ms,
            in_flight,
        })
    }

    /// The links. What has gone, or says nothing of its link, is left out.
    pub fn links(&self) -> Vec<LinkStatus> {
        let networks = self.networks.iter().filter_map(|name| self.network(name));
        let pcie = self.pcie.iter().filter_map(|(name, address)| self.pcie(name, address));
        networks.chain(pcie).collect()
    }

    fn network(&self, name: &str) -> Option<LinkStatus> {
        let path = format!("sys/class/net/{name}");
        let mbit: Option<u64> = self.tree.number(&format!("{path}/speed"));
        Some(LinkStatus {
            link: name.to_owned(),
            kind: "network".to_owned(),
            bytes_per_s: mbit.map(|mbit| mbit.saturating_mul(1_000_000 / 8)),
            lanes: None,
            lanes_max: None,
            received_bytes: Some(self.tree.number(&format!("{path}/statistics/rx_bytes"))?),
            sent_bytes: Some(self.tree.number(&format!("{path}/statistics/tx_bytes"))?),
        })
    }

    fn pcie(&self, name: &str, address: &str) -> Option<LinkStatus> {
        let path = format!("sys/bus/pci/devices/{address}");
        // 0: the link is that of something inside the chip, and says nothing.
        let lanes: u32 =
            self.tree.number(&format!("{path}/current_link_width")).filter(|lanes| *lanes > 0)?;
        let speed = self.tree.text(&format!("{path}/current_link_speed")).unwrap_or_default();
        Some(LinkStatus {
            link: name.to_owned(),
            kind: "pcie".to_owned(),
            bytes_per_s: lane_bytes_per_s(&speed).map(|bytes| bytes.saturating_mul(lanes.into())),
            lanes: Some(lanes),
            lanes_max: self.tree.number(&format!("{path}/max_link_width")),
            received_bytes: None,
            sent_bytes: None,
        })
    }
}

/// What one lane moves, bytes per second, by the kernel's words for its speed (`16.0 GT/s PCIe`).
fn lane_bytes_per_s(speed: &str) -> Option<u64> {
    let transfers = speed.split_whitespace().next()?.parse::<f64>().ok().filter(|speed| *speed > 0.0)? * 1e9;
    // Each transfer is a bit; generations 1 and 2 (2.5, 5) send 10 bits for 8, later ones 130 for 128.
    let coding = if transfers <= 5e9 { 8.0 / 10.0 } else { 128.0 / 130.0 };
    Some((transfers * coding / 8.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::lane_bytes_per_s;

    #[test]
    fn lanes_move_what_their_coding_leaves() {
        assert_eq!(lane_bytes_per_s("5.0 GT/s PCIe"), Some(500_000_000));
        assert_eq!(lane_bytes_per_s("16.0 GT/s PCIe"), Some(1_969_230_769));
        for odd in ["", "Unknown", "-1 GT/s", "NaN"] {
            assert_eq!(lane_bytes_per_s(odd), None, "{odd}");
        }
    }
}
