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
/// Memory of a device for which none is given.
pub const MEMORY_BYTES_DEFAULT: u64 = 1 << 30;
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

/// The UUID of what has no UUID given: the same in every process. `kind` tells the sorts of things apart.
pub fn derived_uuid(kind: u64, index: u32) -> [u8; 16] {
    let mut state = kind.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(index);
    let mut uuid = [0; 16];
    for half in uuid.chunks_exact_mut(8) {
        // splitmix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        half.copy_from_slice(&(mixed ^ (mixed >> 31)).to_be_bytes());
    }
    uuid
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

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    name: Option<String>,
    uuid: Option<String>,
    memory_bytes: Option<u64>,
    numa: Option<u32>,
    pci: Option<String>,
    mig: bool,
    h2d_bytes_per_second: Option<u64>,
    d2h_bytes_per_second: Option<u64>,
    attributes: BTreeMap<i32, i32>,
}

/// The directory that all processes of this simulated machine share.
pub fn directory() -> PathBuf {
    match std::env::var_os("CUDA_SIM_DIR") {
        Some(directory) if !directory.is_empty() => PathBuf::from(directory),
        _ => PathBuf::from(format!("/dev/shm/cuda-sim-{}", rustix::process::getuid().as_raw())),
    }
}

/// The devices of this simulated machine.
///
/// # Errors
/// Says in words what is wrong with the list.
pub fn load() -> Result<Vec<Device>, String> {
    match std::env::var("CUDA_SIM_DEVICES") {
        Ok(list) if !list.is_empty() => parse(&list),
        _ => from_directory(&directory()),
    }
}

fn from_directory(directory: &Path) -> Result<Vec<Device>, String> {
    let path = directory.join(DEVICES_FILE);
    match std::fs::read_to_string(&path) {
        Ok(list) => parse(&list),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => parse("[{}]"),
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
    for (index, raw) in (0u32..).zip(raw) {
        let device = device(index, raw, devices.last())?;
        if devices.iter().any(|other| other.uuid == device.uuid) {
            return Err(format!("two simulated devices with the UUID {}", device.uuid_text()));
        }
        devices.push(device);
    }
    Ok(devices)
}

fn device(index: u32, raw: Raw, before: Option<&Device>) -> Result<Device, String> {
    let pci = match &raw.pci {
        Some(text) => PciAddress::parse(text)
            .ok_or_else(|| format!("{text:?} is no PCI address such as 0000:3b:00.0"))?,
        // Instances that follow each other are instances of one GPU.
        None => match before.filter(|before| before.mig && raw.mig) {
            Some(before) => before.pci,
            None => PciAddress { domain: 0, bus: index as u8 + 1, device: 0 },
        },
    };
    let memory_bytes = raw.memory_bytes.unwrap_or(MEMORY_BYTES_DEFAULT);
    let mut name = raw.name.unwrap_or_else(|| format!("Simulated GPU {index}"));
    if !name.contains("Simulated") {
        name = format!("Simulated {name}");
    }
    if raw.mig && !name.contains("MIG ") {
        name = format!("{name} MIG 1g.{}gb", memory_bytes >> 30);
    }
    Ok(Device {
        index,
        name,
        uuid: match &raw.uuid {
            Some(text) => parse_uuid(text).ok_or_else(|| format!("{text:?} is no UUID such as GPU-…"))?,
            None => derived_uuid(0, index),
        },
        memory_bytes,
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
        std::fs::write(directory.path().join(DEVICES_FILE), r#"[{"numa": 1}, {}]"#).unwrap();
        let devices = from_directory(directory.path()).unwrap();
        assert_eq!((devices.len(), devices[0].numa), (2, Some(1)));
        assert_ne!(devices[0].uuid, devices[1].uuid);
    }

    #[test]
    fn what_is_given_is_taken_and_simulated_is_always_said() {
        let list = r#"[{"name": "H100", "uuid": "GPU-00112233-4455-6677-8899-aabbccddeeff", "memory_bytes": 4096,
            "pci": "0001:3b:02.0", "attributes": {"75": 9}}]"#;
        let device = &parse(list).unwrap()[0];
        assert_eq!(device.name, "Simulated H100");
        assert_eq!(device.uuid_text(), "GPU-00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!((device.memory_bytes, device.pci.to_string().as_str()), (4096, "0001:3b:02.0"));
        assert_eq!(device.attributes.get(&75), Some(&9));
    }

    #[test]
    fn instances_that_follow_each_other_are_of_one_gpu() {
        let devices = parse(r#"[{}, {"mig": true}, {"mig": true}, {}]"#).unwrap();
        assert_eq!(devices[1].pci, devices[2].pci);
        assert!(devices[1].name.ends_with("MIG 1g.1gb") && devices[1].uuid_text().starts_with("MIG-"));
        assert!(devices[0].pci != devices[1].pci && devices[2].pci != devices[3].pci);
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
