//! The checks, run against the simulated driver.

#[path = "../../tests/common/library.rs"]
mod library;

use std::path::Path;
use std::process::Command;

/// The checksum kernel. The simulation looks for its name, and computes what it computes.
const PTX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../src/sys/cuda/crc64.ptx");

/// The program, on a simulated machine.
fn checks(machine: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cuda-conformance"));
    command.env("LD_LIBRARY_PATH", library::directory()).env("CUDA_SIM_DIR", machine);
    command
}

#[test]
fn the_simulated_driver_conforms() {
    let machine = tempfile::tempdir_in("/dev/shm").unwrap();
    let output = checks(machine.path()).args(["--json", "--ptx", PTX]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let report: serde_json::Value =
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said} {:?}", output.stderr));
    let failed: Vec<_> =
        report["checks"].as_array().unwrap().iter().filter(|check| check["ok"] != true).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(output.status.success());
    assert_eq!(report["simulated"], true, "the checks were not run on the simulated driver");
    assert!(report["checks"].as_array().unwrap().len() > 40, "checks are missing");
    // Nothing of it is left: every process has ended, and who comes next clears what a killed one has left.
    let next = checks(machine.path()).args(["--check", "granularity_is_a_power_of_two"]).status().unwrap();
    assert!(next.success());
    let folders = std::fs::read_dir(machine.path()).unwrap().map(|entry| entry.unwrap().path());
    let left: Vec<_> = folders
        .filter(|path| path.is_dir())
        .flat_map(|folder| std::fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().ends_with(".memory"))
        .collect();
    assert!(left.is_empty(), "memory of processes that have ended: {left:?}");
}
