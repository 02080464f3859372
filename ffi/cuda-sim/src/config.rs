//! What the simulated machine is made of: read from the environment once, before the first call is answered.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::fault::Plan;

/// Unit of device memory: sizes, offsets and addresses of physical allocations are multiples of it, bytes.
pub(crate) const GRANULARITY: u64 = 2 << 20;
/// Memory of the device that is simulated when none is configured, bytes.
const MEMORY_DEFAULT: u64 = 1 << 30;
/// More devices than any machine has are a mistake in the configuration.
const DEVICES_MAX: usize = 64;
/// First bytes of the UUIDs of devices that are given none; the last says which device.
const UUID_DEFAULT: [u8; 15] = [0x51, 0xd0, 0xc0, 0xda, 0, 0, 0x40, 0, 0x80, 0, 0, 0, 0, 0, 0];

/// A device as it is configured.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDevice {
    name: Option<String>,
    uuid: Option<String>,
    memory_bytes: u64,
    numa: Option<i32>,
    pci: Option<String>,
    #[serde(default)]
    mig: bool,
    h2d_bytes_per_second: Option<u64>,
    d2h_bytes_per_second: Option<u64>,
    #[serde(default)]
    attributes: BTreeMap<i32, i32>,
}

/// A device, complete.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    /// Contains "Simulated"; and "MIG " for an instance, as a real driver's names do.
    pub(crate) name: String,
    pub(crate) uuid: [u8; 16],
    pub(crate) memory_bytes: u64,
    /// An instance of a GPU.
    pub(crate) mig: bool,
    /// `0000:01:00.0`.
    pub(crate) pci: String,
    pub(crate) h2d_bytes_per_second: Option<u64>,
    pub(crate) d2h_bytes_per_second: Option<u64>,
    /// Device attributes that differ from the default.
    pub(crate) attributes: BTreeMap<i32, i32>,
}

impl Spec {
    /// `GPU-…` or `MIG-…`.
    pub(crate) fn uuid_text(&self) -> String {
        let hex: String = self.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let kind = if self.mig { "MIG" } else { "GPU" };
        format!("{kind}-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }
}

/// Everything that the environment says.
#[derive(Debug)]
pub(crate) struct Config {
    /// Shared by all processes of one simulated machine.
    pub(crate) directory: PathBuf,
    /// Those that this process sees, in its order.
    pub(crate) devices: Vec<Spec>,
    pub(crate) faults: Plan,
    /// A file that gets a line for each call.
    pub(crate) trace: Option<PathBuf>,
}

fn variable(name: &str) -> Option<String> {
    #[allow(
        clippy::disallowed_methods,
        reason = "a driver is configured by its environment: it has no other door"
    )]
    std::env::var(name).ok()
}

impl Config {
    /// Reads the environment. An error says what is wrong with it.
    pub(crate) fn read() -> Result<Config, String> {
        let directory = variable("CUDA_SIM_DIR").map_or_else(
            || PathBuf::from(format!("/dev/shm/cuda-sim-{}", rustix::process::getuid().as_raw())),
            PathBuf::from,
        );
        let text = match variable("CUDA_SIM_DEVICES") {
            Some(text) => Some(text),
            None => match std::fs::read_to_string(directory.join("devices.json")) {
                Ok(text) => Some(text),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(format!("devices.json cannot be read: {error}")),
            },
        };
        let all = devices(text.as_deref())?;
        Ok(Config {
            directory,
            devices: match variable("CUDA_VISIBLE_DEVICES") {
                Some(list) => visible(&all, &list),
                None => all,
            },
            faults: Plan::parse(&variable("CUDA_SIM_FAULT").unwrap_or_default())?,
            trace: variable("CUDA_SIM_TRACE").map(PathBuf::from),
        })
    }
}

fn devices(text: Option<&str>) -> Result<Vec<Spec>, String> {
    let raw: Vec<RawDevice> = match text {
        Some(text) => serde_json::from_str(text).map_err(|error| format!("the list of devices: {error}"))?,
        None => vec![RawDevice {
            name: None,
            uuid: None,
            memory_bytes: MEMORY_DEFAULT,
            numa: None,
            pci: None,
            mig: false,
            h2d_bytes_per_second: None,
            d2h_bytes_per_second: None,
            attributes: BTreeMap::new(),
        }],
    };
    if raw.len() > DEVICES_MAX {
        return Err(format!("the list of devices: more than {DEVICES_MAX}"));
    }
    let devices: Vec<Spec> =
        raw.into_iter().enumerate().map(|(index, raw)| device(index, raw)).collect::<Result<_, _>>()?;
    for (index, device) in devices.iter().enumerate() {
        if devices[..index].iter().any(|other| other.uuid == device.uuid) {
            return Err(format!("two devices have the UUID {}", device.uuid_text()));
        }
    }
    Ok(devices)
}

fn device(index: usize, raw: RawDevice) -> Result<Spec, String> {
    let wrong = |what: &str| format!("device {index}: {what}");
    let mut name = raw.name.unwrap_or_else(|| format!("Simulated GPU {index}"));
    if !name.contains("Simulated") {
        name.insert_str(0, "Simulated ");
    }
    if raw.mig && !name.contains("MIG ") {
        name.push_str(" MIG 1g");
    }
    let uuid = match raw.uuid {
        Some(text) => uuid(&text).ok_or_else(|| wrong("the uuid is not one"))?,
        None => {
            let mut bytes = [0; 16];
            bytes[..15].copy_from_slice(&UUID_DEFAULT);
            bytes[15] = index as u8;
            bytes
        }
    };
    if [raw.h2d_bytes_per_second, raw.d2h_bytes_per_second].contains(&Some(0)) {
        return Err(wrong("a bandwidth of zero"));
    }
    let pci = raw.pci.unwrap_or_else(|| format!("0000:{:02x}:00.0", index + 1));
    let (domain, bus, slot) = pci_numbers(&pci).ok_or_else(|| wrong("pci is not like 0000:01:00.0"))?;
    // Attributes that tell where the device is: PCI bus, device and domain, and the NUMA node of the host.
    let mut attributes = BTreeMap::from([(33, bus), (34, slot), (50, domain), (134, raw.numa.unwrap_or(-1))]);
    attributes.extend(raw.attributes);
    Ok(Spec {
        name,
        uuid,
        memory_bytes: raw.memory_bytes / GRANULARITY * GRANULARITY,
        mig: raw.mig,
        pci,
        h2d_bytes_per_second: raw.h2d_bytes_per_second,
        d2h_bytes_per_second: raw.d2h_bytes_per_second,
        attributes,
    })
}

/// 16 bytes in hexadecimal, with or without hyphens and a prefix.
fn uuid(text: &str) -> Option<[u8; 16]> {
    let text = text.strip_prefix("GPU-").or_else(|| text.strip_prefix("MIG-")).unwrap_or(text);
    let hex: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let mut bytes = [0; 16];
    if hex.len() != 32 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(hex.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// Domain, bus and device of a PCI address.
fn pci_numbers(text: &str) -> Option<(i32, i32, i32)> {
    let (domain, rest) = text.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (slot, _) = rest.split_once('.')?;
    let number = |text| i32::from_str_radix(text, 16).ok();
    Some((number(domain)?, number(bus)?, number(slot)?))
}

/// `CUDA_VISIBLE_DEVICES`: indices and UUIDs, or beginnings of UUIDs; what is not a device ends the list, as it does for a
/// real driver.
fn visible(all: &[Spec], list: &str) -> Vec<Spec> {
    list.split(',')
        .map(str::trim)
        .map_while(|entry| match entry.parse::<usize>() {
            Ok(index) => all.get(index),
            Err(_) if entry.starts_with("GPU-") || entry.starts_with("MIG-") => all.iter().find(|device| {
                device
                    .uuid_text()
                    .starts_with(&entry.to_ascii_lowercase().replace("gpu-", "GPU-").replace("mig-", "MIG-"))
            }),
            Err(_) => None,
        })
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Vec<Spec> {
        devices(Some(
            r#"[{"memory_bytes": 8388609}, {"memory_bytes": 4194304, "mig": true, "name": "H200"}]"#,
        ))
        .unwrap()
    }

    #[test]
    fn what_is_not_given_is_the_same_in_each_process() {
        let devices = two();
        assert_eq!(devices[0].memory_bytes, 8 << 20);
        assert_eq!(devices[0].uuid_text(), "GPU-51d0c0da-0000-4000-8000-000000000000");
        assert_eq!(devices[1].uuid_text(), "MIG-51d0c0da-0000-4000-8000-000000000001");
        assert_eq!(devices[1].name, "Simulated H200 MIG 1g");
        assert_eq!(devices[1].pci, "0000:02:00.0");
    }

    #[test]
    fn visible_devices_are_named_by_index_or_uuid_until_one_is_not_there() {
        let all = two();
        let names = |list| visible(&all, list).iter().map(|device| device.uuid[15]).collect::<Vec<_>>();
        assert_eq!(names("1,0"), [1, 0]);
        assert_eq!(names("MIG-51D0C0DA-0000-4000-8000-000000000001,0"), [1, 0]);
        assert_eq!(names("0,7,1"), [0]);
        assert_eq!(names(""), [] as [u8; 0]);
    }

    #[test]
    fn a_wrong_device_is_refused() {
        for text in [
            r#"[{"memory_bytes": 1, "unknown": 1}]"#,
            r#"[{"memory_bytes": 1, "uuid": "GPU-12"}]"#,
            r#"[{"memory_bytes": 1, "pci": "1"}]"#,
            r#"[{"memory_bytes": 1, "h2d_bytes_per_second": 0}]"#,
            r#"[{}]"#,
        ] {
            assert!(devices(Some(text)).is_err(), "{text}");
        }
    }
}
