//! Which devices a simulated machine has: one list for the simulated CUDA driver and the simulated NVML.
//!
//! The list is JSON, in the variable `CUDA_SIM_DEVICES` or in `devices.json` of the directory that all processes of one
//! simulated machine share (`CUDA_SIM_DIR`, else `/dev/shm/cuda-sim-<uid>`); without either there is one device of 1 GiB.
//! What is not given is derived from a device's place in the list, so that every process sees the same.
#![deny(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Devices that a simulated machine may have.
pub const DEVICES_MAX: usize = 64;
/// Memory of the device that there is without a list.
pub const MEMORY_BYTES_DEFAULT: u64 = 1 << 30;
/// Memory is rounded down to a multiple of this.
pub const GRANULARITY_BYTES: u64 = 2 << 20;
/// File of the list in [`directory`].
pub const DEVICES_FILE: &str = "devices.json";

/// One simulated device: a GPU, or an instance of one (MIG).
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// Its place in the list.
    pub index: u32,
    /// Its name. Always says `Simulated`; of an instance always `MIG `.
    pub name: String,
    /// Its UUID without a prefix.
    pub uuid: [u8; 16],
    /// Its memory, bytes.
    pub memory_bytes: u64,
    /// The NUMA node that it is near to.
    pub numa: Option<u32>,
    /// Where it is on PCI.
    pub pci: PciAddress,
    /// Whether it is an instance of a GPU. Instances with one PCI address are instances of one GPU.
    pub mig: bool,
    /// Modelled bandwidth from the host; nothing: as fast as it goes.
    pub h2d_bytes_per_second: Option<u64>,
    /// Modelled bandwidth to the host; nothing: as fast as it goes.
    pub d2h_bytes_per_second: Option<u64>,
    /// Attributes of `cuDeviceGetAttribute` by number, beside the usual ones.
    pub attributes: BTreeMap<i32, i32>,
}

impl Device {
    /// The UUID as tools print it: `GPU-…`, or `MIG-…` for an instance.
    pub fn uuid_text(&self) -> String {
        uuid_text(self.uuid, self.mig)
    }
}

/// A UUID as tools print it: `GPU-…`, or `MIG-…` for an instance.
pub fn uuid_text(uuid: [u8; 16], mig: bool) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let prefix = if mig { "MIG" } else { "GPU" };
    format!("{prefix}-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// The UUID of what has none given: the same in every process. `kind` tells the sorts of things apart; devices have 0.
pub fn derived_uuid(kind: u8, index: u8) -> [u8; 16] {
    [0x51, 0xd0, 0xc0, 0xda, 0, kind, 0x40, 0, 0x80, 0, 0, 0, 0, 0, 0, index]
}

/// Domain, bus, device and function; the latter always 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Domain.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device.
    pub device: u8,
}

impl PciAddress {
    fn parse(text: &str) -> Option<PciAddress> {
        let mut parts = text.strip_suffix(".0")?.split(':');
        let address = PciAddress {
            domain: u32::from_str_radix(parts.next()?, 16).ok()?,
            bus: u8::from_str_radix(parts.next()?, 16).ok()?,
            device: u8::from_str_radix(parts.next()?, 16).ok()?,
        };
        parts.next().is_none().then_some(address)
    }
}

impl fmt::Display for PciAddress {
    /// `0000:3b:00.0`, as the kernel writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.0", self.domain, self.bus, self.device)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    name: Option<String>,
    uuid: Option<String>,
    memory_bytes: u64,
    numa: Option<u32>,
    pci: Option<String>,
    #[serde(default)]
    mig: bool,
    h2d_bytes_per_second: Option<u64>,
    d2h_bytes_per_second: Option<u64>,
    #[serde(default)]
    attributes: BTreeMap<i32, i32>,
}

fn variable(name: &str) -> Option<String> {
    #[allow(clippy::disallowed_methods, reason = "a driver has no other door than its environment")]
    std::env::var(name).ok()
}

/// The directory that all processes of this simulated machine share.
pub fn directory() -> PathBuf {
    variable("CUDA_SIM_DIR").map_or_else(
        || PathBuf::from(format!("/dev/shm/cuda-sim-{}", rustix::process::getuid().as_raw())),
        PathBuf::from,
    )
}

/// The devices of this simulated machine.
///
/// # Errors
/// Says in words what is wrong with the list.
pub fn load() -> Result<Vec<Device>, String> {
    match variable("CUDA_SIM_DEVICES") {
        Some(list) => parse(&list),
        None => from_directory(&directory()),
    }
}

fn from_directory(directory: &Path) -> Result<Vec<Device>, String> {
    let path = directory.join(DEVICES_FILE);
    match std::fs::read_to_string(&path) {
        Ok(list) => parse(&list),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            parse(&format!(r#"[{{"memory_bytes": {MEMORY_BYTES_DEFAULT}}}]"#))
        }
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// The devices of a list in JSON.
///
/// # Errors
/// Says in words what is wrong with it.
pub fn parse(list: &str) -> Result<Vec<Device>, String> {
    let raw: Vec<Raw> =
        serde_json::from_str(list).map_err(|error| format!("the list of simulated devices: {error}"))?;
    if raw.len() > DEVICES_MAX {
        return Err(format!("{} simulated devices; at most {DEVICES_MAX}", raw.len()));
    }
    let mut devices: Vec<Device> = Vec::with_capacity(raw.len());
    for (index, raw) in (0u8..).zip(raw) {
        let device = device(index, raw)?;
        if devices.iter().any(|other| other.uuid == device.uuid) {
            return Err(format!("two simulated devices with the UUID {}", device.uuid_text()));
        }
        devices.push(device);
    }
    Ok(devices)
}

fn device(index: u8, raw: Raw) -> Result<Device, String> {
    if [raw.h2d_bytes_per_second, raw.d2h_bytes_per_second].contains(&Some(0)) {
        return Err(format!("simulated device {index}: a bandwidth of zero"));
    }
    let pci = match &raw.pci {
        Some(text) => PciAddress::parse(text)
            .ok_or_else(|| format!("{text:?} is no PCI address such as 0000:3b:00.0"))?,
        None => PciAddress { domain: 0, bus: index + 1, device: 0 },
    };
    let mut name = raw.name.unwrap_or_else(|| format!("Simulated GPU {index}"));
    if !name.contains("Simulated") {
        name.insert_str(0, "Simulated ");
    }
    if raw.mig && !name.contains("MIG ") {
        name.push_str(" MIG 1g");
    }
    Ok(Device {
        index: index.into(),
        name,
        uuid: match &raw.uuid {
            Some(text) => parse_uuid(text).ok_or_else(|| format!("{text:?} is no UUID such as GPU-…"))?,
            None => derived_uuid(0, index),
        },
        memory_bytes: raw.memory_bytes / GRANULARITY_BYTES * GRANULARITY_BYTES,
        numa: raw.numa,
        pci,
        mig: raw.mig,
        h2d_bytes_per_second: raw.h2d_bytes_per_second,
        d2h_bytes_per_second: raw.d2h_bytes_per_second,
        attributes: raw.attributes,
    })
}

/// 32 hexadecimal digits, with or without hyphens and a prefix.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let text = text.strip_prefix("GPU-").or_else(|| text.strip_prefix("MIG-")).unwrap_or(text);
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| *c != '-')
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    if digits.len() == 32 { bytes.try_into().ok() } else { None }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn without_a_list_there_is_one_device_and_it_is_always_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let devices = from_directory(directory.path()).unwrap();
        assert_eq!(devices.len(), 1);
        assert_eq!((devices[0].name.as_str(), devices[0].memory_bytes), ("Simulated GPU 0", 1 << 30));
        assert_eq!(devices, from_directory(directory.path()).unwrap());
        std::fs::write(
            directory.path().join(DEVICES_FILE),
            r#"[{"memory_bytes": 1, "numa": 1}, {"memory_bytes": 2}]"#,
        )
        .unwrap();
        let devices = from_directory(directory.path()).unwrap();
        assert_eq!((devices.len(), devices[0].numa), (2, Some(1)));
        assert_ne!(devices[0].uuid, devices[1].uuid);
    }

    #[test]
    fn what_is_given_is_taken_and_simulated_is_always_said() {
        let list = r#"[{"name": "H100", "uuid": "GPU-00112233-4455-6677-8899-aabbccddeeff", "memory_bytes": 4194305,
            "pci": "0001:3b:02.0", "attributes": {"75": 9}}]"#;
        let device = &parse(list).unwrap()[0];
        assert_eq!(device.name, "Simulated H100");
        assert_eq!(device.uuid_text(), "GPU-00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!((device.memory_bytes, device.pci.to_string().as_str()), (4 << 20, "0001:3b:02.0"));
        assert_eq!(device.attributes.get(&75), Some(&9));
    }

    #[test]
    fn an_instance_says_so_in_its_name_and_its_uuid() {
        let device = &parse(r#"[{"memory_bytes": 1, "mig": true, "name": "H200"}]"#).unwrap()[0];
        assert_eq!(device.name, "Simulated H200 MIG 1g");
        assert_eq!(device.uuid_text(), "MIG-51d0c0da-0000-4000-8000-000000000000");
        assert_eq!(device.pci.to_string(), "0000:01:00.0");
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        let many = format!("[{}{{}}]", "{},".repeat(DEVICES_MAX));
        let same =
            r#"[{"uuid": "00000000000000000000000000000000"}, {"uuid": "00000000000000000000000000000000"}]"#;
        for list in ["", "{}", r#"[{"nmae": 1}]"#, r#"[{"pci": "x"}]"#, r#"[{"uuid": "GPU-1"}]"#, &many, same]
        {
            assert!(!parse(list).unwrap_err().is_empty(), "{list}");
        }
    }
}
