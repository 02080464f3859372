//! The checks, run against the simulated driver and the simulated cuFile.

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
    assert_eq!(report["skipped"], 0, "{said}");
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

/// Whichever way the node is able to, and in compatibility mode on a file system that can do nothing else.
#[test]
fn the_simulated_cufile_conforms_on_every_node() {
    let machine = tempfile::tempdir_in("/dev/shm").unwrap();
    let listed = checks(machine.path()).arg("--list").output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let names: Vec<_> = listed.lines().filter(|name| name.starts_with("cufile_")).collect();
    assert!(names.len() > 10, "checks are missing: {listed}");
    let drive = env!("CARGO_TARGET_TMPDIR");
    for (mode, folder) in [("nvfs", drive), ("p2pdma", drive), ("nvfs", "/dev/shm")] {
        for name in &names {
            let mut check = checks(machine.path());
            check.args(["--check", name]).env("CUFILE_SIM_MODE", mode).env("TMPDIR", folder);
            let output = check.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}, {mode}, {folder}: {}, {said}", output.status);
        }
    }
}

/// A machine without cuFile, as most are.
#[test]
fn a_cufile_that_cannot_be_loaded_is_skipped_with_a_reason() {
    let machine = tempfile::tempdir_in("/dev/shm").unwrap();
    let libraries = tempfile::tempdir_in("/dev/shm").unwrap();
    let libcuda = library::directory().join("libcuda.so.1");
    std::os::unix::fs::symlink(libcuda.canonicalize().unwrap(), libraries.path().join("libcuda.so.1"))
        .unwrap();
    let mut check = checks(machine.path());
    check.env("LD_LIBRARY_PATH", libraries.path()).args(["--check", "cufile_tells_its_version"]);
    let output = check.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("no libcufile.so.0 can be loaded"), "{said}");
}
