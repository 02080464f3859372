//! What a reader needs to judge figures: the machine, without names of hosts or directories.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::sys::pages;
use crate::topology::Topology;

/// Facts in order: what, and how it is here. `path` is a file or directory on the drive that is measured, if one is.
pub fn describe(topology: &Topology, path: Option<&Path>) -> Vec<(String, String)> {
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let (all, free) = pages::huge_pages();
    let mut facts = vec![
        ("processor", format!("{}, {cpus} CPUs", line_of("/proc/cpuinfo", "model name").unwrap_or_default())),
        ("memory", format!("{:.0} GiB", memory_bytes("MemTotal") as f64 / (1u64 << 30) as f64)),
        ("NUMA nodes", topology.numa_nodes.len().max(1).to_string()),
        ("kernel", kernel()),
        ("2 MiB pages", format!("{all} reserved, {free} free")),
        ("shmem_enabled", chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
    ];
    if let Some(path) = path {
        facts.push(("file system", file_system(path).unwrap_or_else(|| "not known".to_owned())));
        facts.push(("drive", drive(topology, path).unwrap_or_else(|| "not known".to_owned())));
    }
    facts.into_iter().map(|(what, how)| (what.to_owned(), how)).collect()
}

/// What stands behind the colon of the first line that begins so.
fn line_of(path: &str, label: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    Some(line.trim_start().strip_prefix(':')?.trim().to_owned())
}

/// A field of /proc/meminfo, bytes; 0 if it is not there.
fn memory_bytes(field: &str) -> u64 {
    let line = line_of("/proc/meminfo", field).unwrap_or_default();
    let kib: u64 = line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
    kib.saturating_mul(1024)
}

/// Memory that this process can take without pushing anything out, bytes: of the machine, and of what control groups allow.
pub fn free_bytes() -> u64 {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let left = |group: &Path| -> Option<u64> {
        let read = |name: &str| -> Option<u64> {
            let path = Path::new("/sys/fs/cgroup").join(group).join(name);
            // `max`, which is no number: no limit.
            fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        Some(read("memory.max")?.saturating_sub(read("memory.current")?))
    };
    Path::new(group).ancestors().filter_map(left).fold(memory_bytes("MemAvailable"), u64::min)
}

/// Whether a hypervisor runs this machine.
pub fn is_virtual() -> bool {
    line_of("/proc/cpuinfo", "flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor"))
}

fn kernel() -> String {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    // What follows names who has built it.
    release.split('-').next().unwrap_or_default().to_owned()
}

/// The word in brackets of a setting with several (`always [advise] never`).
fn chosen(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let word = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    word.map_or_else(|| "absent".to_owned(), |(word, _)| word.to_owned())
}

/// The type of the file system that holds `path`.
fn file_system(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
    });
    // The last one of the longest covers those below it.
    mounts.filter(|(at, _)| path.starts_with(at)).max_by_key(|(at, _)| at.len()).map(|(_, kind)| kind)
}

fn drive(topology: &Topology, path: &Path) -> Option<String> {
    let device = fs::metadata(path).ok()?.dev();
    let drive = topology.drive_of(rustix::fs::major(device), rustix::fs::minor(device))?;
    let kind = match (drive.nvme_controller.is_some(), drive.paravirtual, drive.rotational) {
        (true, _, _) => "NVMe",
        (_, true, _) => "paravirtual (a hypervisor reads for it)",
        (_, _, true) => "turning",
        _ => "solid state",
    };
    let model = drive.model.as_deref().map(|model| format!("{model}, ")).unwrap_or_default();
    let request =
        drive.request_bytes_max.map_or_else(String::new, |most| format!(", requests of {} KiB", most >> 10));
    Some(format!("{model}{kind}{request}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_some_of_all() {
        assert!(free_bytes() > 0);
        assert!(free_bytes() <= memory_bytes("MemTotal"));
        assert_eq!(memory_bytes("Absent"), 0);
    }

    #[test]
    fn a_machine_is_described_without_its_names() {
        let topology = Topology::read(Path::new("/"));
        let facts = describe(&topology, Some(Path::new("/proc")));
        let fact = |what: &str| facts.iter().find(|(name, _)| name == what).unwrap().1.clone();
        assert_eq!(fact("file system"), "proc");
        assert_eq!(fact("drive"), "not known");
        assert!(fact("memory").ends_with(" GiB") && !fact("memory").starts_with('0'));
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        assert!(host.len() < 4 || facts.iter().all(|(_, how)| !how.contains(&host)));
        assert!(describe(&topology, None).len() < facts.len());
    }
}
