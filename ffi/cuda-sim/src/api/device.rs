//! What devices there are, and what they are like.

use super::{call, exported};
use crate::abi::{Code, Out, OutText, Uuid};
use crate::sim::Device;

/// `CU_DEVICE_ATTRIBUTE_*` are 1 to this; others are unknown to CUDA 12.2.
const ATTRIBUTE_LAST: i32 = 134;

/// Attributes that are not zero, in the order of `CUdevice_attribute`.
const ATTRIBUTES: &[(i32, i32)] = &[
    (1, 1024), // threads of a block
    (2, 1024), // block x, y, z
    (3, 1024),
    (4, 64),
    (5, i32::MAX), // grid x, y, z
    (6, 65_535),
    (7, 65_535),
    (8, 48 << 10),   // shared memory of a block
    (10, 32),        // threads of a warp
    (13, 1_500_000), // clock, kHz
    (15, 1),         // copies beside kernels
    (16, 4),         // multiprocessors
    (19, 1),         // host memory can be mapped
    (31, 1),         // kernels beside each other
    (39, 2048),      // threads of a multiprocessor
    (40, 2),         // copy engines: one for each direction
    (41, 1),         // unified addressing
    (75, 9),         // compute capability
    (76, 0),
    (91, 1),         // registered host memory has one address
    (97, 227 << 10), // shared memory of a block that asks for more
    (99, 1),         // host memory can be registered
    (102, 1),        // virtual memory management
    (103, 1),        // handles that are file descriptors
];

/// `CU_DEVICE_ATTRIBUTE_*` that tell where a device is.
const PCI_BUS: i32 = 33;
const PCI_DEVICE: i32 = 34;
const PCI_DOMAIN: i32 = 50;
const HOST_NUMA: i32 = 134;
/// `CU_DEVICE_ATTRIBUTE_NUMA_ID`, which is -1 where device memory is no NUMA node.
const NUMA: i32 = 131;

fn attribute(device: &Device, number: i32) -> Option<i32> {
    let spec = &device.spec;
    if let Some(value) = spec.attributes.get(&number) {
        return Some(*value);
    }
    let usual = || ATTRIBUTES.iter().find(|entry| entry.0 == number).map_or(0, |entry| entry.1);
    match number {
        PCI_BUS => Some(spec.pci.bus.into()),
        PCI_DEVICE => Some(spec.pci.device.into()),
        PCI_DOMAIN => i32::try_from(spec.pci.domain).ok(),
        HOST_NUMA => Some(spec.numa.and_then(|node| i32::try_from(node).ok()).unwrap_or(-1)),
        NUMA => Some(-1),
        _ => (1..=ATTRIBUTE_LAST).contains(&number).then(usual),
    }
}

exported! {
    fn cuDeviceGetCount(count: Out<i32>) {
        call("cuDeviceGetCount", |sim| count.put(sim.devices.len() as i32))
    }

    fn cuDeviceGet(device: Out<i32>, ordinal: i32) {
        call("cuDeviceGet", |sim| {
            sim.device(ordinal)?;
            device.put(ordinal)
        })
    }

    fn cuDeviceGetName(name: OutText, length: i32, device: i32) {
        call("cuDeviceGetName", |sim| name.put(length, &sim.device(device)?.spec.name))
    }

    fn cuDeviceGetUuid(uuid: Out<Uuid>, device: i32) {
        call("cuDeviceGetUuid", |sim| uuid.put(Uuid(sim.device(device)?.spec.uuid)))
    }

    fn cuDeviceGetUuid_v2(uuid: Out<Uuid>, device: i32) {
        call("cuDeviceGetUuid_v2", |sim| uuid.put(Uuid(sim.device(device)?.spec.uuid)))
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) {
        call("cuDeviceTotalMem_v2", |sim| bytes.put(sim.device(device)?.spec.memory_bytes as usize))
    }

    fn cuDeviceGetAttribute(value: Out<i32>, number: i32, device: i32) {
        call("cuDeviceGetAttribute", |sim| {
            value.put(attribute(sim.device(device)?, number).ok_or(Code::INVALID_VALUE)?)
        })
    }

    fn cuDeviceGetPCIBusId(text: OutText, length: i32, device: i32) {
        call("cuDeviceGetPCIBusId", |sim| {
            let address = sim.device(device)?.spec.pci.to_string();
            // Half an address is none.
            if i64::from(length) <= address.len() as i64 {
                return Err(Code::INVALID_VALUE);
            }
            text.put(length, &address)
        })
    }
}
