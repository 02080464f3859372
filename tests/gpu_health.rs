//! GPUs as NVML shows them, simulated: metrics, the health gate, the topology, `lodestream doctor`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::process::{Command, Output};

use serde_json::{Value, json};

mod common;

use common::daemon::{Daemon, Options};
use common::nvml::Machine;

/// A whole GPU and two instances of another.
fn machine() -> Machine {
    Machine::new(&json!([
        {"name": "H100", "uuid": WHOLE, "memory_bytes": 1_u64 << 30, "pci": "0000:e1:00.0", "numa": 70},
        {"memory_bytes": 64 << 20, "pci": "0000:e2:00.0", "mig": true},
        {"memory_bytes": 32 << 20, "pci": "0000:e2:00.0", "mig": true},
    ]))
}

const WHOLE: &str = "GPU-00112233-4455-6677-8899-aabbccddeeff";
/// What the simulation derives for the GPU of the instances.
const CUT: &str = "GPU-51d0c0da-0001-4000-8000-000000000001";

fn start(machine: &Machine) -> Daemon {
    let root = common::directory();
    let variables = machine.environment();
    let variables = [0, 1].map(|place| (variables[place].0, variables[place].1.as_str()));
    Options::new(root.path()).budget("64MiB").environment(&variables).start()
}

/// The value of the one series of a metric that has all these labels.
fn value(page: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let mut series = page
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')))
        .filter(|line| labels.iter().all(|label| line.contains(label)));
    let line = series.next()?;
    assert_eq!(series.next(), None, "two series of {name} with {labels:?}");
    line.rsplit_once(' ').unwrap().1.parse().ok()
}

fn page(daemon: &Daemon) -> String {
    let (status, body) = daemon.page("/metrics");
    assert!(status.contains("200"), "{status}");
    body
}

fn uuid(uuid: &str) -> String {
    format!("UUID=\"{uuid}\"")
}

/// Waits until a metric of the GPU has this value.
#[track_caller]
fn until(daemon: &mut Daemon, name: &str, gpu: &str, label: &str, expected: f64) {
    daemon.until(&format!("{name}{{{gpu}, {label}}} = {expected}"), |daemon| {
        value(&page(daemon), name, &[&uuid(gpu), label]) == Some(expected)
    });
}

#[test]
fn metrics_have_the_labels_of_dcgm_exporter() {
    let mut machine = machine();
    machine.set(WHOLE, json!({
        "memory_used_bytes": 4096, "utilization": 25, "temperature": 61, "power_milliwatts": 123_500, "throttle": 4,
        "ecc_corrected": 3, "remapped_rows": 2, "remap_pending": true, "link_width": 8,
    }));
    let mut daemon = start(&machine);
    let page = page(&daemon);
    let all = [
        &uuid(WHOLE),
        "gpu=\"0\"",
        "pci_bus_id=\"00000000:E1:00.0\"",
        "device=\"nvidia0\"",
        "modelName=\"Simulated H100\"",
        "GPU_I_PROFILE=\"\"",
        "GPU_I_ID=\"\"",
        "Hostname=\"",
    ];
    assert_eq!(value(&page, "lodestream_gpu_memory_bytes", &all), Some(1_073_741_824.0), "{page}");
    let whole =
        |name: &str, label: &str| value(&page, &format!("lodestream_gpu_{name}"), &[&uuid(WHOLE), label]);
    for (name, label, expected) in [
        ("memory_used_bytes", "", 4096.0),
        ("utilization_ratio", "", 0.25),
        ("temperature_celsius", "", 61.0),
        ("power_watts", "", 123.5),
        ("throttled", "reason=\"sw_power_cap\"", 1.0),
        ("throttled", "reason=\"hw_slowdown\"", 0.0),
        ("ecc_errors", "kind=\"corrected\",scope=\"volatile\"", 3.0),
        ("remapped_rows", "cause=\"uncorrectable\"", 2.0),
        ("row_remap_pending", "", 1.0),
        ("row_remap_failed", "", 0.0),
        ("pcie_link_width", "", 8.0),
        ("pcie_link_width_max", "", 16.0),
        ("pcie_bytes_per_second", "direction=\"rx\"", 0.0),
        ("mig_instances", "", 0.0),
        ("health", "state=\"healthy\"", 1.0),
        ("xid_errors_total", "xid=\"94\"", 0.0),
    ] {
        assert_eq!(whole(name, label), Some(expected), "{name} {label}\n{page}");
    }
    for (id, bytes) in [("1", 64 << 20), ("2", 32 << 20)] {
        let labels = [&uuid(CUT), "gpu=\"1\"", "GPU_I_PROFILE=\"1g\"", &format!("GPU_I_ID=\"{id}\"")];
        assert_eq!(value(&page, "lodestream_gpu_memory_bytes", &labels), Some(f64::from(bytes)), "{page}");
    }
    assert_eq!(
        value(&page, "lodestream_gpu_driver_up", &["version=\"550.0-Simulated\"", "cuda=\"12.4\""]),
        Some(1.0)
    );
    assert!(daemon.terminate().success(), "NVML is shut down in order");
}

#[test]
fn errors_lead_to_verdicts_and_what_programs_do_does_not() {
    let mut machine = machine();
    // What was before the start is not this daemon's concern.
    machine.set(WHOLE, json!({"xid": [94], "ecc_uncorrected": 5}));
    let mut daemon = start(&machine);
    let (health, verdicts) = ("lodestream_gpu_health", "lodestream_gpu_verdicts_total");
    let xids = "lodestream_gpu_xid_errors_total";
    until(&mut daemon, health, WHOLE, "state=\"healthy\"", 1.0);

    machine.set(WHOLE, json!({"xid": [94, 13, 31, 777], "ecc_uncorrected": 5}));
    until(&mut daemon, xids, WHOLE, "xid=\"777\"", 1.0);
    until(&mut daemon, xids, WHOLE, "xid=\"13\"", 1.0);
    until(&mut daemon, xids, WHOLE, "xid=\"94\"", 0.0);
    until(&mut daemon, verdicts, WHOLE, "verdict=\"contained\"", 0.0);

    machine.set(WHOLE, json!({"xid": [94, 13, 31, 777, 94], "ecc_uncorrected": 5}));
    until(&mut daemon, verdicts, WHOLE, "verdict=\"contained\"", 1.0);
    until(&mut daemon, health, WHOLE, "state=\"healthy\"", 1.0);
    // An error that no XID told of.
    machine.set(WHOLE, json!({"xid": [94, 13, 31, 777, 94], "ecc_uncorrected": 6}));
    until(&mut daemon, verdicts, WHOLE, "verdict=\"contained\"", 2.0);
    until(&mut daemon, verdicts, WHOLE, "verdict=\"healthy\"", 2.0);

    machine.set(WHOLE, json!({"lost": true}));
    until(&mut daemon, health, WHOLE, "state=\"lost\"", 1.0);
    until(&mut daemon, health, WHOLE, "state=\"healthy\"", 0.0);
    machine.set(CUT, json!({"xid": [79]}));
    until(&mut daemon, health, CUT, "state=\"lost\"", 1.0);
    let page = page(&daemon);
    assert_eq!(
        value(&page, "lodestream_gpu_memory_bytes", &[&uuid(WHOLE)]),
        None,
        "a lost GPU has no readings"
    );
    assert_eq!(value(&page, "lodestream_gpu_driver_up", &[]), Some(1.0));
    let log = daemon.log();
    assert_eq!(log.matches("the GPU is lost").count(), 2, "{log}");
    assert!(daemon.terminate().success());
}

#[test]
fn a_driver_that_hangs_does_not_hang_the_page() {
    let mut machine = machine();
    let mut daemon = start(&machine);
    daemon.until("readings", |daemon| value(&page(daemon), "lodestream_gpu_driver_up", &[]) == Some(1.0));
    machine.set(CUT, json!({"hung": true}));
    daemon.until("silence", |daemon| value(&page(daemon), "lodestream_gpu_driver_up", &[]) == Some(0.0));
    assert!(!page(&daemon).contains("lodestream_gpu_memory_bytes{"), "what was read before is not shown");
    assert_eq!(daemon.status()["state"], "ready");
    machine.set(CUT, json!({}));
    daemon
        .until("readings again", |daemon| value(&page(daemon), "lodestream_gpu_driver_up", &[]) == Some(1.0));
    assert_eq!(value(&page(&daemon), "lodestream_gpu_health", &[&uuid(CUT), "state=\"healthy\""]), Some(1.0));
    machine.set(WHOLE, json!({"hung": true}));
    assert!(daemon.terminate().success(), "it stops without the driver");
}

#[test]
fn without_nvml_there_are_no_gpu_metrics() {
    let root = common::directory();
    let mut daemon = Options::new(root.path()).budget("64MiB").start();
    if daemon.log().contains("GPUs are watched") {
        // This machine has a driver.
        return;
    }
    assert!(!page(&daemon).lines().any(|line| line.starts_with("lodestream_gpu_")));
    assert_eq!(daemon.log().matches("GPUs are not watched").count(), 1);
    assert!(daemon.terminate().success());
}

#[test]
fn the_topology_knows_what_nvml_knows() {
    let machine = machine();
    let daemon = start(&machine);
    let topology = daemon.connect().call("node.topology", &json!({})).unwrap();
    let gpus = topology["gpus"].as_array().unwrap();
    let gpu = gpus.iter().find(|gpu| gpu["pcie"]["address"] == "0000:e1:00.0").unwrap();
    assert_eq!((&gpu["uuid"], &gpu["model"]), (&json!(WHOLE), &json!("Simulated H100")));
    assert_eq!(gpu["numa_node"], 70);
}

fn doctor(machine: Option<&Machine>, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lodestream"));
    command.arg("doctor").args(arguments).env("LODESTREAM_SOCKET", "/nonexistent");
    if let Some(machine) = machine {
        command.envs(machine.environment());
    }
    command.output().unwrap()
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

fn check<'a>(report: &'a Value, name: &str, of: Option<&str>) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    let found = checks.iter().find(|check| check["check"] == name && of.is_none_or(|of| check["of"] == of));
    found.unwrap_or_else(|| panic!("no check {name} of {of:?} in {report:#}"))
}

#[test]
fn the_doctor_examines_this_machine() {
    let output = doctor(None, &["--json"]);
    let report = report(&output);
    assert_eq!(output.status.code(), Some(i32::from(report["verdict"] == "fail")), "{report:#}");
    for name in [
        "io_uring",
        "seccomp",
        "memlock",
        "huge_pages",
        "page_cache",
        "numa",
        "nvidia_driver",
        "iommu",
        "direct_path",
        "drives",
    ] {
        let check = check(&report, name, None);
        assert!(!check["found"].as_str().unwrap().is_empty(), "{name}");
        assert_eq!(
            check["verdict"] == "ok",
            check["change"].is_null(),
            "what is not in order says what to change: {check}"
        );
    }
    let numa = check(&report, "numa", None)["found"].as_str().unwrap();
    assert!(numa == "the kernel shows no node" || numa.contains("slots for node "), "{numa}");
    let text = doctor(None, &[]);
    assert_eq!(text.status.code(), output.status.code());
    assert!(String::from_utf8(text.stdout).unwrap().contains("io_uring: "));
}

#[test]
fn the_doctor_examines_gpus_and_says_that_they_are_simulated() {
    let mut machine = machine();
    let output = doctor(Some(&machine), &["--json"]);
    let sound = report(&output);
    assert!(output.status.success(), "{sound:#}");
    assert!(check(&sound, "nvidia_driver", None)["found"].as_str().unwrap().contains("simulated"));
    let gpu = check(&sound, "gpu", Some(WHOLE));
    assert!(gpu["found"].as_str().unwrap().contains("Simulated H100 at 0000:e1:00.0, NUMA node 70"), "{gpu}");
    assert!(check(&sound, "gpu", Some(CUT))["found"].as_str().unwrap().contains("2 instances"));
    assert_eq!((&sound["gpus"][0]["uuid"], &sound["gpus"][0]["simulated"]), (&json!(WHOLE), &json!(true)));
    assert_eq!(sound["gpus"][1]["reading"]["instances"][0]["profile"], "1g");

    machine.set(WHOLE, json!({"link_width": 4}));
    machine.set(CUT, json!({"remap_failed": true}));
    let output = doctor(Some(&machine), &["--json"]);
    let worn = report(&output);
    assert_eq!((output.status.code(), &worn["verdict"]), (Some(1), &json!("fail")));
    assert_eq!(check(&worn, "gpu_link", Some(WHOLE))["verdict"], "warn");
    assert_eq!(check(&worn, "gpu_health", Some(CUT))["verdict"], "fail");

    machine.set(CUT, json!({}));
    machine.set(WHOLE, json!({"lost": true}));
    let output = doctor(Some(&machine), &["--json"]);
    let lost = report(&output);
    // A lost GPU does not even say who it is.
    assert_eq!(lost["gpus"].as_array().unwrap().len(), 1, "{lost:#}");
    assert_eq!(
        (output.status.code(), &check(&lost, "nvidia_driver", None)["verdict"]),
        (Some(1), &json!("fail"))
    );
}

#[test]
fn the_doctor_measures_reads_of_the_largest_file() {
    let directory = common::directory();
    std::fs::write(directory.path().join("small"), "x").unwrap();
    let path = directory.path().join("large");
    std::fs::write(&path, vec![7; 65 << 20]).unwrap();
    let output = doctor(None, &["--json", "--read", directory.path().to_str().unwrap()]);
    let report = report(&output);
    let read = check(&report, "read", None);
    assert!(read["of"].as_str().unwrap().starts_with(path.to_str().unwrap()), "{read}");
    if check(&report, "io_uring", None)["verdict"] == "ok" && read["verdict"] == "ok" {
        let reads = report["reads"].as_array().unwrap();
        assert!(
            !reads.is_empty() && reads.iter().all(|read| read["bytes_per_second"].as_f64().unwrap() > 0.0)
        );
    }
    let output = doctor(None, &["--json", "--read", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["error"]["code"],
        "source.file.not_found"
    );
}
