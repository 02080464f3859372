//! What NVML says about a GPU at one moment.
//!
//! Every question may be refused: by an older driver, by a GPU that has no such sensor, to an instance, in a container
//! without the rights. What is refused is absent; only that a GPU is lost counts for more.

use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, PcieUtilCounter, TemperatureSensor};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id;
use nvml_wrapper::{Device, Nvml};
use serde::Serialize;

use crate::sys::nvml;

/// GPUs, and instances of one GPU, that are looked at.
const DEVICES_MAX: u32 = 256;
/// NUMA nodes that the mask of a GPU's nearest may name.
const NUMA_WORDS: usize = 16;
/// `NVML_AFFINITY_SCOPE_NODE`.
const SCOPE_NODE: u32 = 0;

/// One instance of a GPU (MIG).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// `MIG-…`.
    pub uuid: String,
    /// Number of the GPU instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
    /// Its profile, such as `1g.10gb`; empty if the driver does not say.
    pub profile: String,
    /// Its memory, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
}

/// Memory of a GPU or an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// All, bytes.
    pub total_bytes: u64,
    /// In use by anyone, bytes; without what the driver keeps for itself.
    pub used_bytes: u64,
}

/// What does not change while the driver is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// NVML's number.
    pub index: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// Model. A simulated GPU says so here.
    pub name: String,
    /// PCI address as NVML and DCGM write it (`00000000:3B:00.0`).
    pub pci_bus_id: String,
    /// Number of its device file (`/dev/nvidia0`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor: Option<u32>,
    /// The nearest NUMA node, as the driver sees it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// BAR1: how much of its memory other PCI devices can reach at a time, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bar1_bytes: Option<u64>,
}

impl Identity {
    /// PCI address as the kernel writes it (`0000:3b:00.0`).
    pub fn pci_address(&self) -> String {
        let address = self.pci_bus_id.to_ascii_lowercase();
        match address.split_once(':') {
            // NVML gives the domain eight digits, the kernel as few as it needs but four.
            Some((domain, rest)) => {
                format!("{:0>4}:{rest}", domain.trim_start_matches('0'))
            }
            None => address,
        }
    }

    /// Whether it is simulated.
    pub fn simulated(&self) -> bool {
        self.name.contains("Simulated")
    }
}

/// State of the PCIe link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Link {
    /// Generation now. An idle GPU lowers it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// Highest generation of GPU and slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation_max: Option<u32>,
    /// Lanes now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    /// Most lanes of GPU and slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width_max: Option<u32>,
}

/// Counters of memory errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Ecc {
    /// Corrected, since the driver was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrected_volatile: Option<u64>,
    /// Uncorrectable, since the driver was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncorrected_volatile: Option<u64>,
    /// Corrected, ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrected_aggregate: Option<u64>,
    /// Uncorrectable, ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncorrected_aggregate: Option<u64>,
}

/// Rows of memory that were replaced by spare ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Rows {
    /// Because of correctable errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correctable: Option<u64>,
    /// Because of uncorrectable errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncorrectable: Option<u64>,
    /// Whether one waits for a reset of the GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<bool>,
    /// Whether no spare row was left: the GPU has to be replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<bool>,
}

/// Why a GPU runs slower than it could.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Throttle {
    /// It draws as much power as it may.
    PowerCap,
    /// The hardware slows it down, for heat or power.
    Hardware,
    /// It waits for other GPUs of its group.
    SyncBoost,
    /// The driver slows it down, for heat.
    Thermal,
    /// The hardware slows it down, for heat.
    HardwareThermal,
    /// The power supply slows it down.
    PowerBrake,
}

impl Throttle {
    /// Every reason that is not a wish of somebody or idleness.
    pub const ALL: [Throttle; 6] = [
        Throttle::PowerCap,
        Throttle::Hardware,
        Throttle::SyncBoost,
        Throttle::Thermal,
        Throttle::HardwareThermal,
        Throttle::PowerBrake,
    ];

    /// The reason as it is written in the metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Throttle::PowerCap => "sw_power_cap",
            Throttle::Hardware => "hw_slowdown",
            Throttle::SyncBoost => "sync_boost",
            Throttle::Thermal => "sw_thermal_slowdown",
            Throttle::HardwareThermal => "hw_thermal_slowdown",
            Throttle::PowerBrake => "hw_power_brake_slowdown",
        }
    }

    const fn flag(self) -> ThrottleReasons {
        match self {
            Throttle::PowerCap => ThrottleReasons::SW_POWER_CAP,
            Throttle::Hardware => ThrottleReasons::HW_SLOWDOWN,
            Throttle::SyncBoost => ThrottleReasons::SYNC_BOOST,
            Throttle::Thermal => ThrottleReasons::SW_THERMAL_SLOWDOWN,
            Throttle::HardwareThermal => ThrottleReasons::HW_THERMAL_SLOWDOWN,
            Throttle::PowerBrake => ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN,
        }
    }
}

/// What a GPU says at one moment.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Reading {
    /// Memory.
    pub memory: Option<Memory>,
    /// Share of the last moments in which it computed, from 0 to 1.
    pub utilization: Option<f64>,
    /// Share of the last moments in which its memory was read or written, from 0 to 1.
    pub memory_utilization: Option<f64>,
    /// Bytes a second that it sends over PCIe.
    pub pcie_sent: Option<u64>,
    /// Bytes a second that it receives over PCIe.
    pub pcie_received: Option<u64>,
    /// PCIe link.
    pub link: Link,
    /// Memory errors.
    pub ecc: Ecc,
    /// Replaced rows.
    pub rows: Rows,
    /// Whether each of [`Throttle::ALL`] slows it down.
    pub throttled: Option<[bool; Throttle::ALL.len()]>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Watts.
    pub power: Option<f64>,
    /// Its instances, if it is cut into some.
    pub instances: Vec<Instance>,
}

/// A GPU that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// The GPUs, each with who it is, and how many there are that cannot say.
///
/// Handles are kept, as a search by UUID fails for all GPUs once one of them is lost.
pub(super) fn devices(nvml: &Nvml) -> (Vec<(Identity, Device<'_>)>, u32) {
    let count = nvml.device_count().unwrap_or(0).min(DEVICES_MAX);
    let device = |index| {
        let device = nvml.device_by_index(index).ok()?;
        Some((identity(&device, index)?, device))
    };
    let devices: Vec<_> = (0..count).filter_map(device).collect();
    let silent = count.saturating_sub(u32::try_from(devices.len()).unwrap_or(u32::MAX));
    (devices, silent)
}

fn identity(device: &Device<'_>, index: u32) -> Option<Identity> {
    let nodes = device.memory_affinity(NUMA_WORDS, SCOPE_NODE).unwrap_or_default();
    let node = (0u32..).zip(&nodes).find(|(_, word)| **word != 0);
    Some(Identity {
        index,
        uuid: device.uuid().ok()?,
        name: device.name().unwrap_or_default(),
        pci_bus_id: device.pci_info().map(|pci| pci.bus_id).unwrap_or_default(),
        minor: device.minor_number().ok(),
        numa_node: node.map(|(place, word)| place * std::ffi::c_ulong::BITS + word.trailing_zeros()),
        bar1_bytes: device.bar1_memory_info().ok().map(|bar1| bar1.total),
    })
}

/// Asks one GPU everything.
pub(super) fn read(device: &Device<'_>) -> Result<Reading, Gone> {
    let utilization = answered(device.utilization_rates())?;
    let share = |percent: u32| f64::from(percent) / 100.0;
    Ok(Reading {
        memory: memory(device)?,
        utilization: utilization.as_ref().map(|rates| share(rates.gpu)),
        memory_utilization: utilization.as_ref().map(|rates| share(rates.memory)),
        pcie_sent: throughput(device, PcieUtilCounter::Send)?,
        pcie_received: throughput(device, PcieUtilCounter::Receive)?,
        link: Link {
            generation: answered(device.current_pcie_link_gen())?,
            generation_max: answered(device.max_pcie_link_gen())?,
            width: answered(device.current_pcie_link_width())?,
            width_max: answered(device.max_pcie_link_width())?,
        },
        ecc: ecc(device)?,
        rows: rows(device)?,
        throttled: answered(device.current_throttle_reasons())?
            .map(|now| Throttle::ALL.map(|reason| now.contains(reason.flag()))),
        temperature: answered(device.temperature(TemperatureSensor::Gpu))?,
        power: answered(device.power_usage())?.map(|milliwatts| f64::from(milliwatts) / 1e3),
        instances: instances(device)?,
    })
}

/// The answer, nothing if there is none, [`Gone`] if the GPU is.
fn answered<T>(answer: Result<T, NvmlError>) -> Result<Option<T>, Gone> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(NvmlError::GpuLost | NvmlError::ResetRequired) => Err(Gone),
        Err(_) => Ok(None),
    }
}

fn memory(device: &Device<'_>) -> Result<Option<Memory>, Gone> {
    let info = answered(device.memory_info())?;
    Ok(info.map(|info| Memory { total_bytes: info.total, used_bytes: info.used }))
}

fn throughput(device: &Device<'_>, counter: PcieUtilCounter) -> Result<Option<u64>, Gone> {
    // NVML counts in units of 1000 bytes, over 20 ms.
    Ok(answered(device.pcie_throughput(counter))?.map(|kilobytes| u64::from(kilobytes) * 1000))
}

fn ecc(device: &Device<'_>) -> Result<Ecc, Gone> {
    let count = |error, counter| answered(device.total_ecc_errors(error, counter));
    Ok(Ecc {
        corrected_volatile: count(MemoryError::Corrected, EccCounter::Volatile)?,
        uncorrected_volatile: count(MemoryError::Uncorrected, EccCounter::Volatile)?,
        corrected_aggregate: count(MemoryError::Corrected, EccCounter::Aggregate)?,
        uncorrected_aggregate: count(MemoryError::Uncorrected, EccCounter::Aggregate)?,
    })
}

fn rows(device: &Device<'_>) -> Result<Rows, Gone> {
    let fields = [
        field_id::NVML_FI_DEV_REMAPPED_COR,
        field_id::NVML_FI_DEV_REMAPPED_UNC,
        field_id::NVML_FI_DEV_REMAPPED_PENDING,
        field_id::NVML_FI_DEV_REMAPPED_FAILURE,
    ];
    let values = answered(device.field_values_for(&fields.map(FieldId)))?.unwrap_or_default();
    let value = |place: usize| match values.get(place)?.as_ref().ok()?.value.as_ref().ok()? {
        SampleValue::U32(value) => Some(u64::from(*value)),
        SampleValue::U64(value) => Some(*value),
        SampleValue::I64(value) => u64::try_from(*value).ok(),
        SampleValue::F64(_) => None,
    };
    Ok(Rows {
        correctable: value(0),
        uncorrectable: value(1),
        pending: value(2).map(|value| value != 0),
        failed: value(3).map(|value| value != 0),
    })
}

fn instances(device: &Device<'_>) -> Result<Vec<Instance>, Gone> {
    let cut = answered(device.mig_mode())?.is_some_and(|mode| mode.current != 0);
    let most = if cut { answered(device.mig_device_count())?.unwrap_or(0).min(DEVICES_MAX) } else { 0 };
    let mut instances = Vec::new();
    for index in 0..most {
        // There are fewer instances than there could be.
        let Some(instance) = answered(device.mig_device_by_index(index))? else { continue };
        let Some(uuid) = answered(instance.uuid())? else { continue };
        let name = answered(instance.name())?.unwrap_or_default();
        instances.push(Instance {
            uuid,
            id: nvml::gpu_instance(&instance),
            profile: name.split_once("MIG ").map(|(_, profile)| profile.to_owned()).unwrap_or_default(),
            memory: memory(&instance)?,
        });
    }
    Ok(instances)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_the_kernel_writes_them() {
        let address = |pci_bus_id: &str| {
            let (uuid, name) = (String::new(), String::new());
            let pci_bus_id = pci_bus_id.to_owned();
            Identity { index: 0, uuid, name, pci_bus_id, minor: None, numa_node: None, bar1_bytes: None }
                .pci_address()
        };
        assert_eq!(address("00000000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(address("00010000:3B:00.0"), "10000:3b:00.0");
        assert_eq!(address("0000000A:3B:00.0"), "000a:3b:00.0");
        assert_eq!(address(""), "");
    }
}
