//! Devices and faults, from the environment.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::code;

/// Memory of the device that there is when nothing is configured.
const DEFAULT_MEMORY_BYTES: u64 = 1 << 30;

/// One simulated device, as `CUDA_SIM_DEVICES` describes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Device {
    /// Always contains "Simulated".
    #[serde(default)]
    pub(crate) name: String,
    /// `GPU-…` or `MIG-…`; default: a fixed one for each place in the list.
    #[serde(default)]
    pub(crate) uuid: String,
    pub(crate) memory_bytes: u64,
    #[serde(default)]
    pub(crate) pci: Option<String>,
    /// NUMA node that it is near.
    #[serde(default)]
    pub(crate) numa: Option<i32>,
    /// Stands for an instance of a partitioned GPU.
    #[serde(default)]
    pub(crate) mig: bool,
    /// Modelled bandwidth; absent: as fast as this machine copies.
    #[serde(default)]
    pub(crate) h2d_bytes_per_second: Option<u64>,
    #[serde(default)]
    pub(crate) d2h_bytes_per_second: Option<u64>,
    /// Device attributes by number that differ from the usual ones.
    #[serde(default)]
    pub(crate) attributes: HashMap<i32, i32>,
}

/// When a call fails, counted from 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) call: u64,
    /// Every later one, too.
    pub(crate) onwards: bool,
    pub(crate) code: u32,
}

/// Everything that the environment says.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) directory: PathBuf,
    pub(crate) devices: Vec<Device>,
    pub(crate) faults: HashMap<String, Fault>,
    pub(crate) trace: Option<PathBuf>,
}

impl Config {
    /// Reads the environment. `None`: something in it is wrong; said on stderr, as nobody else would.
    #[allow(
        clippy::print_stderr,
        clippy::disallowed_methods,
        reason = "a library that is configured by the environment alone"
    )]
    pub(crate) fn read() -> Option<Config> {
        let wrong = |what: &str| eprintln!("simulated CUDA driver: {what}");
        let variable = |name: &str| std::env::var(name).ok();
        let directory = variable("CUDA_SIM_DIR").map_or_else(
            || PathBuf::from(format!("/dev/shm/cuda-sim-{}", rustix::process::getuid().as_raw())),
            PathBuf::from,
        );
        let described = variable("CUDA_SIM_DEVICES")
            .or_else(|| std::fs::read_to_string(directory.join("devices.json")).ok());
        let devices = match described.as_deref().map(serde_json::from_str::<Vec<Device>>) {
            None => vec![Device {
                name: String::new(),
                uuid: String::new(),
                memory_bytes: DEFAULT_MEMORY_BYTES,
                pci: None,
                numa: None,
                mig: false,
                h2d_bytes_per_second: None,
                d2h_bytes_per_second: None,
                attributes: HashMap::new(),
            }],
            Some(Ok(devices)) => devices,
            Some(Err(error)) => {
                wrong(&format!("CUDA_SIM_DEVICES is not understood: {error}"));
                return None;
            }
        };
        let devices: Vec<Device> =
            devices.into_iter().enumerate().map(|(index, device)| completed(device, index)).collect();
        let devices = match variable("CUDA_VISIBLE_DEVICES") {
            Some(visible) => shown(&devices, &visible),
            None => devices,
        };
        let mut faults = HashMap::new();
        for text in variable("CUDA_SIM_FAULT").unwrap_or_default().split(';').filter(|text| !text.is_empty())
        {
            let Some((name, fault)) = fault(text) else {
                wrong(&format!("CUDA_SIM_FAULT is not understood: {text}"));
                return None;
            };
            faults.insert(name, fault);
        }
        Some(Config { directory, devices, faults, trace: variable("CUDA_SIM_TRACE").map(PathBuf::from) })
    }
}

fn completed(mut device: Device, index: usize) -> Device {
    if device.name.is_empty() {
        device.name = format!("Simulated GPU {index}");
    } else if !device.name.contains("Simulated") {
        device.name = format!("Simulated {}", device.name);
    }
    if device.mig && !device.name.contains("MIG ") {
        device.name += " MIG 1g.1gb";
    }
    if device.uuid.is_empty() {
        // "SIMULATED" in ASCII, then the place.
        let prefix = if device.mig { "MIG" } else { "GPU" };
        device.uuid = format!("{prefix}-53494d55-4c41-5445-4400-{index:012x}");
    }
    device
}

/// What `CUDA_VISIBLE_DEVICES` leaves: indices or UUIDs, up to the first that is not there.
fn shown(devices: &[Device], visible: &str) -> Vec<Device> {
    let find = |text: &str| match text.trim().parse::<usize>() {
        Ok(index) => devices.get(index).cloned(),
        Err(_) => {
            devices.iter().find(|device| !text.is_empty() && device.uuid.starts_with(text.trim())).cloned()
        }
    };
    visible.split(',').map_while(find).collect()
}

/// `cuMemCreate:3=OUT_OF_MEMORY`, `cuMemCreate:3+=…` for every later one too.
fn fault(text: &str) -> Option<(String, Fault)> {
    let (place, code) = text.split_once('=')?;
    let (place, onwards) = place.strip_suffix('+').map_or((place, false), |place| (place, true));
    let (name, call) = place.rsplit_once(':')?;
    Some((name.to_owned(), Fault { call: call.parse().ok()?, onwards, code: code::parse(code)? }))
}
