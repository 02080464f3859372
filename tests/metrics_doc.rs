//! `docs/metrics.md` and the metric table say the same: names, types, labels, units; both ways.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;

use lodestream::telemetry::metrics::Metrics;

/// Name, type, sorted labels, unit.
type Row = (String, String, Vec<String>, String);

/// What the registry serves, with the series made that exist only once there is a shard or a device.
fn served() -> BTreeSet<Row> {
    let metrics = Metrics::new();
    drop(metrics.shard(0));
    drop(metrics.device("host"));
    metrics.direct_path("gpu:GPU-1", "nvme0n1", (Some(2e9), Some(1e9)), true);
    metrics.set_reader("io_uring", "");
    metrics.set_pages("thp", "no hugetlb pages");

    show_a_gpu(&metrics);

    let page = metrics.encode();
    let mut rows = BTreeSet::new();
    let mut family = (String::new(), String::new(), "–".to_owned());
    for line in page.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["#", "HELP", name, ..] => family = ((*name).to_owned(), String::new(), "–".to_owned()),
            ["#", "TYPE", _, kind] => family.1 = (*kind).to_owned(),
            ["#", "UNIT", _, unit] => family.2 = (*unit).to_owned(),
            ["#", "EOF"] => {}
            _ => {
                let labels = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}'));
                let mut labels: Vec<String> = labels
                    .map(|(labels, _)| {
                        labels.split("\",").map(|l| l.split('=').next().unwrap().to_owned()).collect()
                    })
                    .unwrap_or_default();
                labels.retain(|label| label != "le");
                labels.sort();
                let name =
                    if family.1 == "counter" { format!("{}_total", family.0) } else { family.0.clone() };
                rows.insert((name, family.1.clone(), labels, family.2.clone()));
            }
        }
    }
    rows
}

/// A GPU that answers everything.
fn show_a_gpu(metrics: &Metrics) {
    use lodestream::telemetry::gpu::{Driver, Ecc, Identity, Link, Memory, Reading, Rows, Throttle};
    let driver = Driver { version: "570".to_owned(), cuda: "12.8".to_owned(), silent: 0 };
    let gpu = Identity {
        index: 0,
        uuid: "GPU-1".to_owned(),
        name: "NVIDIA H100".to_owned(),
        pci_bus_id: "00000000:3B:00.0".to_owned(),
        minor: Some(0),
        numa_node: Some(0),
        bar1_bytes: Some(1),
    };
    let reading = Reading {
        memory: Some(Memory { total_bytes: 2, used_bytes: 1 }),
        utilization: Some(0.5),
        memory_utilization: Some(0.5),
        pcie_sent: Some(1),
        pcie_received: Some(1),
        link: Link { generation: Some(5), generation_max: Some(5), width: Some(16), width_max: Some(16) },
        ecc: Ecc {
            corrected_volatile: Some(0),
            uncorrected_volatile: Some(0),
            corrected_aggregate: Some(0),
            uncorrected_aggregate: Some(0),
        },
        rows: Rows {
            correctable: Some(0),
            uncorrectable: Some(0),
            pending: Some(false),
            failed: Some(false),
        },
        throttled: Some([false; Throttle::ALL.len()]),
        temperature: Some(40),
        power: Some(100.0),
        instances: Vec::new(),
    };
    metrics.gpu.known(&gpu, "node");
    metrics.gpu.read(&driver, "node", [(&gpu, &reading)].into_iter());
}

fn documented() -> BTreeSet<Row> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md")).unwrap();
    text.lines()
        .filter(|line| line.starts_with("| `lodestream_"))
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            assert_eq!(cells.len(), 8, "six columns in: {line}");
            assert!(!cells[5].is_empty() && !cells[6].is_empty(), "meaning and worry in: {line}");
            let mut labels: Vec<String> =
                cells[3].split(", ").filter(|l| *l != "–").map(|l| l.trim_matches('`').to_owned()).collect();
            labels.sort();
            (cells[1].trim_matches('`').to_owned(), cells[2].to_owned(), labels, cells[4].to_owned())
        })
        .collect()
}

#[test]
fn the_page_and_the_document_agree() {
    let (served, documented) = (served(), documented());
    let missing: Vec<_> = served.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&served).collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "every metric needs a row in docs/metrics.md and every row a metric\nserved, not documented: {missing:#?}\ndocumented, not served: {stale:#?}"
    );
}
