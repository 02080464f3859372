//! Checks of kernel, limits and memory.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;

use super::super::output::bytes;
use super::Check;
use crate::staging::Pool;
use crate::sys::mem::HUGE_PAGE_BYTES;
use crate::sys::pages::{self, PageKind};
use crate::sys::{page_cache, uring};
use crate::topology::Topology;

/// Slots of four shard threads with the default sizes: what a limit on locked memory should allow at least.
const LOCKED_BYTES_WANTED: u64 = 64 << 20;
/// How much of a file is looked up in the page cache.
const CACHE_LOOK_BYTES: u64 = 1 << 20;

pub(super) fn checks(root: &Path, topology: &Topology) -> Vec<Check> {
    let refused = uring::probe().err().map(|error| error.to_string());
    vec![
        io_uring(refused.as_deref()),
        seccomp(&text(root, "proc/self/status"), refused.is_some()),
        memlock(),
        huge_pages(root),
        page_cache(),
        numa(topology),
    ]
}

/// A small file of the kernel, without white space around it; empty if it is not there.
pub(super) fn text(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap_or_default().trim().to_owned()
}

fn io_uring(refused: Option<&str>) -> Check {
    match refused {
        None => Check::ok("io_uring", "works"),
        Some(why) => Check::warn(
            "io_uring",
            format!("refused: {why}"),
            "files are read by preadv2 threads, which costs CPU: allow io_uring_setup, io_uring_enter and \
             io_uring_register in the seccomp profile, and kernel.io_uring_disabled = 0",
        ),
    }
}

fn seccomp(status: &str, io_uring_refused: bool) -> Check {
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:")).map(str::trim);
    match mode {
        Some("0") => Check::ok("seccomp", "off"),
        Some("2") if io_uring_refused => Check::warn(
            "seccomp",
            "a filter is on, and io_uring is refused",
            "use a profile that allows the three io_uring calls beside the runtime's default ones",
        ),
        Some("2") => Check::ok("seccomp", "a filter is on, and allows io_uring"),
        Some(mode) => Check::warn("seccomp", format!("mode {mode}"), "run without strict seccomp"),
        None => Check::warn("seccomp", "the kernel does not say", "mount /proc"),
    }
}

fn memlock() -> Check {
    let may =
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    memlock_of(getrlimit(Resource::Memlock).current, may)
}

fn memlock_of(limit: Option<u64>, may_exceed: bool) -> Check {
    match limit {
        None => Check::ok("memlock", "no limit"),
        Some(limit) if may_exceed => {
            Check::ok("memlock", format!("{}, and CAP_IPC_LOCK to exceed it", bytes(limit)))
        }
        Some(limit) if limit >= LOCKED_BYTES_WANTED => Check::ok("memlock", bytes(limit)),
        Some(limit) => Check::warn(
            "memlock",
            bytes(limit),
            format!(
                "slots cannot be registered with io_uring, which costs CPU: raise it to {} or more (LimitMEMLOCK, \
                 ulimit -l), or grant CAP_IPC_LOCK",
                bytes(LOCKED_BYTES_WANTED)
            ),
        ),
    }
}

fn huge_pages(root: &Path) -> Check {
    let (all, free) = pages::huge_pages();
    let setting = text(root, "sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let found = format!("{free} of {all} reserved 2 MiB pages free, shmem_enabled is \"{setting}\"");
    let why_not = |kind| pages::probe(kind).err();
    match (why_not(PageKind::Hugetlb), why_not(PageKind::Thp)) {
        (None, _) => Check::ok("huge_pages", format!("hugetlb: {found}")),
        (_, None) => Check::ok("huge_pages", format!("transparent: {found}")),
        (Some(hugetlb), Some(thp)) => Check::warn(
            "huge_pages",
            found,
            format!("loads and readers pay for page faults. Either of: {hugetlb}. Or: {thp}"),
        ),
    }
}

/// Whether the kernel says what the page cache holds, asked of the program's own file, which is being executed.
fn page_cache() -> Check {
    let file = std::env::current_exe().and_then(fs::File::open);
    let cached = file.map_or(0, |file| page_cache::cached_pages(file.as_fd(), 0, CACHE_LOOK_BYTES));
    let may_drop = fs::OpenOptions::new().write(true).open("/proc/sys/vm/drop_caches").is_ok();
    let drop = if may_drop { "may be dropped as a whole" } else { "may be dropped file by file only" };
    if cached > 0 {
        Check::ok("page_cache", format!("the kernel says what it holds; it {drop}"))
    } else {
        Check::warn(
            "page_cache",
            format!("the kernel does not say what it holds; it {drop}"),
            "what it holds is read from the drive all the same: Linux 6.5 or newer, and cachestat in the seccomp profile",
        )
    }
}

fn numa(topology: &Topology) -> Check {
    let nodes = topology.numa_nodes.len();
    let unknown: Vec<&str> = topology
        .drives
        .iter()
        .filter(|drive| drive.nvme_controller.is_some() && drive.numa_node.is_none())
        .map(|drive| drive.name.as_str())
        .collect();
    let found = match nodes {
        0 => "the kernel shows no node".to_owned(),
        1 => format!("1 node{}", placed(topology)),
        _ => format!("{nodes} nodes{}", placed(topology)),
    };
    if nodes > 1 && !unknown.is_empty() {
        return Check::warn(
            "numa",
            format!("{found}; it is not known which {} belong to", unknown.join(", ")),
            "shard threads may run far from their drives: let the firmware (or hypervisor) say where they are",
        );
    }
    Check::ok("numa", found)
}

/// Where slots come to lie that are wanted on each node with memory.
fn placed(topology: &Topology) -> String {
    let nodes = topology.numa_nodes.iter().filter(|node| node.memory_bytes.is_some_and(|bytes| bytes > 0));
    let found = nodes.map(|node| {
        let pool = Pool::new(1, HUGE_PAGE_BYTES, Some(node.node)).map(|pool| pool.numa_nodes());
        let on: Vec<u32> = pool.map(|nodes| nodes.into_keys().collect()).unwrap_or_default();
        match on[..] {
            [] => format!("; of slots for node {} it is not known where they are", node.node),
            _ => format!(
                "; slots for node {} are on {}",
                node.node,
                on.iter().map(u32::to_string).collect::<Vec<_>>().join(" and ")
            ),
        }
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn what_is_refused_is_a_warning_that_says_what_to_change() {
        assert_eq!(io_uring(None).verdict, Verdict::Ok);
        assert_eq!(io_uring(Some("EPERM")).verdict, Verdict::Warn);
        assert!(io_uring(Some("EPERM")).change.unwrap().contains("seccomp"));
        let mode = |mode: &str, refused| seccomp(&format!("Name:\tx\nSeccomp:\t{mode}\n"), refused).verdict;
        assert_eq!((mode("0", true), mode("2", false)), (Verdict::Ok, Verdict::Ok));
        assert_eq!((mode("2", true), mode("1", false)), (Verdict::Warn, Verdict::Warn));
        assert_eq!(seccomp("", false).verdict, Verdict::Warn);
    }

    #[test]
    fn a_low_limit_on_locked_memory_is_one_only_without_the_capability() {
        assert_eq!(memlock_of(None, false).verdict, Verdict::Ok);
        assert_eq!(memlock_of(Some(8 << 20), false).verdict, Verdict::Warn);
        assert_eq!(memlock_of(Some(8 << 20), true).verdict, Verdict::Ok);
        assert_eq!(memlock_of(Some(LOCKED_BYTES_WANTED), false).verdict, Verdict::Ok);
    }
}
