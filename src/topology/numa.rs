//! NUMA nodes and CPUs.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sysfs::Tree;

/// CPU numbers from here on are not believed: the largest kernels are built for 8192 CPUs.
const CPUS_MAX: u32 = 65_536;

const NODES: &str = "sys/devices/system/node";

/// One NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NumaNode {
    /// Its number.
    pub node: u32,
    /// Its CPUs. Empty for a node of memory only.
    pub cpus: Vec<u32>,
    /// Its memory, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Its huge pages, smallest size first.
    pub huge_pages: Vec<HugePages>,
    /// Distance to each node as the firmware states it, 10 being itself.
    pub distances: BTreeMap<u32, u32>,
}

/// Huge pages of one size on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HugePages {
    /// Bytes of one page.
    pub page_bytes: u64,
    /// Pages that are reserved.
    pub total: u64,
    /// Pages of them that are free.
    pub free: u64,
}

pub(super) fn read(tree: &Tree) -> Vec<NumaNode> {
    let mut numbers: Vec<u32> =
        tree.names(NODES).iter().filter_map(|name| number_after("node", name)).collect();
    numbers.sort_unstable();
    numbers.iter().map(|&node| read_node(tree, node, &numbers)).collect()
}

fn read_node(tree: &Tree, node: u32, all: &[u32]) -> NumaNode {
    let path = format!("{NODES}/node{node}");
    // One figure for each node that is online, in the order of their numbers.
    let distances = tree.text(&format!("{path}/distance")).unwrap_or_default();
    let distances = distances.split_whitespace().map(|figure| figure.parse().ok());
    let mut huge_pages: Vec<HugePages> = tree
        .names(&format!("{path}/hugepages"))
        .iter()
        .filter_map(|name| {
            let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            Some(HugePages {
                page_bytes: kib.checked_mul(1024)?,
                total: tree.number(&format!("{path}/hugepages/{name}/nr_hugepages"))?,
                free: tree.number(&format!("{path}/hugepages/{name}/free_hugepages"))?,
            })
        })
        .collect();
    huge_pages.sort_by_key(|pages| pages.page_bytes);
    NumaNode {
        node,
        cpus: cpu_list(&tree.text(&format!("{path}/cpulist")).unwrap_or_default()),
        memory_bytes: memory_bytes(&tree.text(&format!("{path}/meminfo")).unwrap_or_default()),
        huge_pages,
        distances: all.iter().copied().zip(distances).filter_map(|(to, d)| Some((to, d?))).collect(),
    }
}

/// CPUs that this process may run on.
pub(super) fn cpus_allowed(tree: &Tree) -> Vec<u32> {
    let status = tree.text("proc/self/status").unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map(cpu_list).unwrap_or_default()
}

/// `Node 0 MemTotal:  7563468 kB`.
fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.contains("MemTotal:"))?;
    let (_, figure) = line.split_once("MemTotal:")?;
    let kib: u64 = figure.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// The number in a name such as `node3`.
fn number_after(prefix: &str, name: &str) -> Option<u32> {
    name.strip_prefix(prefix).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

/// CPUs of a list such as `0-3,8,10-11`, sorted. Parts that are malformed are left out.
fn cpu_list(text: &str) -> Vec<u32> {
    let mut cpus: Vec<u32> = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>())
            && last < CPUS_MAX
            // Lists are in order; a repetition could make a short text long.
            && cpus.last().is_none_or(|cpu| first > *cpu)
        {
            cpus.extend(first..=last);
        }
    }
    cpus
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_lists_of_cpus() {
        assert_eq!(cpu_list("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(cpu_list(""), Vec::<u32>::new());
        assert_eq!(cpu_list("0-4294967295,3-1,x,-,2,2-3"), [2]);
    }

    #[test]
    fn reads_memory() {
        assert_eq!(memory_bytes("Node 1 MemTotal:  4 kB\nNode 1 MemFree: 1 kB"), Some(4096));
        assert_eq!(memory_bytes("Node 1 MemTotal:  18446744073709551615 kB"), None);
        assert_eq!(memory_bytes("MemTotal: kB"), None);
    }

    proptest! {
        #[test]
        fn any_text_gives_a_sorted_bounded_list(text in "[0-9,x -]{0,60}") {
            let cpus = cpu_list(&text);
            prop_assert!(cpus.is_sorted_by(|a, b| a < b));
            prop_assert!(cpus.last().is_none_or(|cpu| *cpu < CPUS_MAX));
        }
    }
}
