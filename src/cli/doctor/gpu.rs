//! Checks of GPUs, their driver, and what the direct path would need.

use std::fs;
use std::path::Path;

use super::super::output::bytes;
use super::{Check, Gpus};
use crate::telemetry::gpu::{Absent, Driver, Gone, Identity, Reading, Throttle};
use crate::topology::Topology;

/// The oldest CUDA that has what the daemon uses, as (major, minor).
const CUDA_MIN: (u32, u32) = (12, 2);
/// Where distributions and NVIDIA's packages put libraries.
const LIBRARY_DIRECTORIES: [&str; 7] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/cuda/lib64",
    "usr/local/cuda/targets/x86_64-linux/lib",
    "usr/local/cuda/targets/sbsa-linux/lib",
];

pub(super) fn checks(root: &Path, topology: &Topology, gpus: &Gpus) -> Vec<Check> {
    let mut checks = vec![driver(topology, gpus)];
    for (gpu, reading) in &gpus.found {
        checks.push(found(gpu, reading.as_ref()));
        let Some(Ok(reading)) = reading else { continue };
        checks.push(health(reading).of(&gpu.uuid));
        checks.push(link(reading).of(&gpu.uuid));
        checks.push(bar1(gpu, reading).of(&gpu.uuid));
    }
    let any = !topology.gpus.is_empty();
    checks.push(iommu(root, any));
    checks.push(direct(root, any));
    checks
}

fn driver(topology: &Topology, gpus: &Gpus) -> Check {
    let there = topology.gpus.len();
    let driver = match &gpus.driver {
        Ok(driver) => driver,
        Err(Absent::NoLibrary) if there == 0 => {
            return Check::ok("nvidia_driver", "none, and no NVIDIA GPU: the host tier is all there is");
        }
        Err(absent @ Absent::Hung) => {
            return Check::fail(
                "nvidia_driver",
                absent.to_string(),
                "look at the kernel's log for Xid; restart the node",
            );
        }
        Err(absent) if there == 0 => {
            return Check::warn(
                "nvidia_driver",
                absent.to_string(),
                "nothing, if this node has no NVIDIA GPU",
            );
        }
        Err(absent) => {
            return Check::fail(
                "nvidia_driver",
                format!("{there} NVIDIA GPUs on PCIe, but: {absent}"),
                "install or load the NVIDIA driver; in a container, run it with the NVIDIA runtime and \
                 NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            );
        }
    };
    let simulated = if simulated(driver, gpus) { " (simulated: there is no GPU behind it)" } else { "" };
    let found = format!("{}, CUDA {}{simulated}", driver.version, driver.cuda);
    if driver.silent > 0 {
        return Check::fail(
            "nvidia_driver",
            format!("{found}; {} GPUs do not say who they are", driver.silent),
            "they are lost, or not shown to this container: reset them or restart the node, and look at the kernel's log for Xid",
        );
    }
    match version(&driver.cuda) {
        Some(cuda) if cuda < CUDA_MIN => Check::fail(
            "nvidia_driver",
            found,
            format!("GPUs cannot be used: a driver with CUDA {}.{} or newer (535)", CUDA_MIN.0, CUDA_MIN.1),
        ),
        _ => Check::ok("nvidia_driver", found),
    }
}

fn simulated(driver: &Driver, gpus: &Gpus) -> bool {
    driver.version.contains("Simulated") || gpus.found.iter().any(|(gpu, _)| gpu.simulated())
}

fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn found(gpu: &Identity, reading: Option<&Result<Reading, Gone>>) -> Check {
    let node = gpu.numa_node.map(|node| format!(", NUMA node {node}")).unwrap_or_default();
    let name = format!("{} at {}{node}", gpu.name, gpu.pci_address());
    let reading = match reading {
        Some(Ok(reading)) => reading,
        Some(Err(Gone)) => {
            return Check::fail(
                "gpu",
                format!("{name}: lost"),
                "reset the GPU or restart the node; if it comes back, have it replaced",
            )
            .of(&gpu.uuid);
        }
        None => {
            return Check::fail(
                "gpu",
                format!("{name}: the driver does not answer"),
                "look at the kernel's log for Xid; restart the node",
            )
            .of(&gpu.uuid);
        }
    };
    let memory = reading
        .memory
        .map(|memory| format!(", {} of {} in use", bytes(memory.used_bytes), bytes(memory.total_bytes)));
    let mig = match reading.instances.as_slice() {
        [] => String::new(),
        some => format!(", cut into {} instances (MIG)", some.len()),
    };
    Check::ok("gpu", format!("{name}{}{mig}", memory.unwrap_or_default())).of(&gpu.uuid)
}

fn health(reading: &Reading) -> Check {
    let uncorrected = reading.ecc.uncorrected_volatile.unwrap_or(0);
    let slowed: Vec<&str> = Throttle::ALL
        .iter()
        .zip(reading.throttled.iter().flatten())
        .filter(|(reason, now)| **now && **reason != Throttle::SyncBoost)
        .map(|(reason, _)| reason.as_str())
        .collect();
    if reading.rows.failed == Some(true) {
        return Check::fail("gpu_health", "a row of memory could not be replaced", "have the GPU replaced");
    }
    if reading.rows.pending == Some(true) {
        return Check::warn(
            "gpu_health",
            "a row of memory waits for being replaced",
            "reset the GPU when it is idle",
        );
    }
    if uncorrected > 0 {
        return Check::warn(
            "gpu_health",
            format!("{uncorrected} uncorrectable memory errors since the driver was loaded"),
            "if they become more, drain the node and run NVIDIA's field diagnostics",
        );
    }
    if !slowed.is_empty() {
        return Check::warn(
            "gpu_health",
            format!("slowed down: {}", slowed.join(", ")),
            "cooling, power supply or power limit: nvidia-smi -q -d PERFORMANCE",
        );
    }
    let temperature = reading.temperature.map(|degrees| format!(", {degrees} °C")).unwrap_or_default();
    Check::ok("gpu_health", format!("no errors{temperature}"))
}

fn link(reading: &Reading) -> Check {
    let link = reading.link;
    let show = |value: Option<u32>| value.map_or_else(|| "?".to_owned(), |value| value.to_string());
    let found = format!(
        "PCIe {} × {} of {} × {}",
        show(link.generation),
        show(link.width),
        show(link.generation_max),
        show(link.width_max)
    );
    match (link.width, link.width_max) {
        (Some(now), Some(most)) if now < most => Check::warn(
            "gpu_link",
            found,
            format!(
                "every copy to the GPU takes {} times as long: seat the card anew, check the riser and the slot",
                most / now.max(1)
            ),
        ),
        // An idle GPU lowers the generation, so a low one says nothing.
        _ => Check::ok("gpu_link", found),
    }
}

fn bar1(gpu: &Identity, reading: &Reading) -> Check {
    let Some(bar1) = gpu.bar1_bytes else { return Check::ok("gpu_bar1", "the driver does not say") };
    let memory = reading.memory.map_or(0, |memory| memory.total_bytes);
    if bar1 < memory {
        return Check::warn(
            "gpu_bar1",
            format!("{} for {} of memory", bytes(bar1), bytes(memory)),
            "drives and network cards reach only part of its memory at a time: switch on Resizable BAR and Above 4G \
             Decoding in the firmware",
        );
    }
    Check::ok("gpu_bar1", bytes(bar1))
}

fn iommu(root: &Path, gpus: bool) -> Check {
    let units = fs::read_dir(root.join("sys/class/iommu")).map_or(0, Iterator::count);
    let line = super::host::text(root, "proc/cmdline");
    let has = |word: &str| line.split_whitespace().any(|argument| argument == word);
    let through = has("iommu=pt");
    let found = match (units, through) {
        (0, _) => "off".to_owned(),
        (units, true) => format!("on ({units} units), passing devices through"),
        (units, false) => format!("on ({units} units), translating"),
    };
    if units > 0 && !through && gpus {
        return Check::warn(
            "iommu",
            found,
            "transfers between drives and GPUs go by way of the root complex or are refused: iommu=pt on the kernel's \
             command line, or off, where nobody needs it",
        );
    }
    Check::ok("iommu", found)
}

fn direct(root: &Path, gpus: bool) -> Check {
    let module = root.join("proc/driver/nvidia-fs/stats").exists();
    let library = LIBRARY_DIRECTORIES.iter().find(|path| root.join(path).join("libcufile.so.0").exists());
    let found = format!(
        "nvidia-fs {}, libcufile.so.0 {}",
        if module { "loaded" } else { "not loaded" },
        library.map_or_else(|| "not in the usual places".to_owned(), |path| format!("in /{path}"))
    );
    if gpus && library.is_none() {
        return Check::warn(
            "direct_path",
            found,
            "files reach GPUs by way of host memory, which is no slower with one drive: install libcufile and nvidia-fs \
             to have the direct path measured",
        );
    }
    Check::ok("direct_path", found)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::telemetry::gpu::{Link, Memory, Rows};

    fn gpu() -> Identity {
        Identity {
            index: 0,
            uuid: "GPU-1".to_owned(),
            name: "NVIDIA H100".to_owned(),
            pci_bus_id: "00000000:3B:00.0".to_owned(),
            minor: Some(0),
            numa_node: Some(1),
            bar1_bytes: Some(256 << 20),
        }
    }

    fn with_driver(version: &str, cuda: &str) -> Gpus {
        let driver = Driver { version: version.to_owned(), cuda: cuda.to_owned(), silent: 0 };
        Gpus { driver: Ok(driver), found: vec![(gpu(), Some(Ok(Reading::default())))] }
    }

    fn empty() -> Topology {
        Topology::read(tempfile::tempdir().unwrap().path())
    }

    #[test]
    fn a_driver_is_missed_only_where_there_is_a_gpu() {
        let absent = |absent| Gpus { driver: Err(absent), found: Vec::new() };
        let with = empty().with_gpus(&[gpu()]);
        assert_eq!(driver(&empty(), &absent(Absent::NoLibrary)).verdict, Verdict::Ok);
        assert_eq!(driver(&with, &absent(Absent::NoLibrary)).verdict, Verdict::Fail);
        assert_eq!(driver(&empty(), &absent(Absent::Unusable(String::new()))).verdict, Verdict::Warn);
        assert_eq!(driver(&empty(), &absent(Absent::Hung)).verdict, Verdict::Fail);
        assert_eq!(driver(&with, &with_driver("570.86", "12.8")).verdict, Verdict::Ok);
        assert_eq!(driver(&with, &with_driver("525.60", "12.0")).verdict, Verdict::Fail);
        assert!(driver(&with, &with_driver("550.0-Simulated", "12.4")).found.contains("simulated"));
    }

    #[test]
    fn what_is_wrong_with_a_gpu_is_said() {
        assert_eq!(found(&gpu(), Some(&Err(Gone))).verdict, Verdict::Fail);
        assert_eq!(found(&gpu(), None).verdict, Verdict::Fail);
        let rows = |pending, failed| {
            let rows = Rows { pending: Some(pending), failed: Some(failed), ..Rows::default() };
            health(&Reading { rows, ..Reading::default() }).verdict
        };
        assert_eq!(
            (rows(false, false), rows(true, false), rows(true, true)),
            (Verdict::Ok, Verdict::Warn, Verdict::Fail)
        );
        let narrow = Link { width: Some(4), width_max: Some(16), ..Link::default() };
        let narrow = link(&Reading { link: narrow, ..Reading::default() });
        assert!(narrow.verdict == Verdict::Warn && narrow.change.unwrap().contains("4 times"));
        assert_eq!(link(&Reading::default()).verdict, Verdict::Ok);
        let memory = Some(Memory { total_bytes: 80 << 30, used_bytes: 0 });
        assert_eq!(bar1(&gpu(), &Reading { memory, ..Reading::default() }).verdict, Verdict::Warn);
    }

    #[test]
    fn the_kernel_is_asked_for_what_peers_need() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        assert_eq!((iommu(root, true).verdict, direct(root, true).verdict), (Verdict::Ok, Verdict::Warn));
        assert_eq!(direct(root, false).verdict, Verdict::Ok);
        fs::create_dir_all(root.join("sys/class/iommu/dmar0")).unwrap();
        fs::create_dir_all(root.join("usr/lib64")).unwrap();
        fs::create_dir_all(root.join("proc")).unwrap();
        fs::write(root.join("usr/lib64/libcufile.so.0"), "").unwrap();
        assert_eq!((iommu(root, true).verdict, iommu(root, false).verdict), (Verdict::Warn, Verdict::Ok));
        fs::write(root.join("proc/cmdline"), "quiet iommu=pt\n").unwrap();
        assert_eq!((iommu(root, true).verdict, direct(root, true).verdict), (Verdict::Ok, Verdict::Ok));
    }
}
