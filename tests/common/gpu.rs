//! Tests on simulated GPUs: a test runs itself again in a process whose libcuda is the simulated one.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use lodestream::api::methods::AttachRequest;
use lodestream::client::{Attached, Client};
use serde_json::{Value, json};

use super::daemon::{Daemon, Options};
use super::model::Model;

/// Set in the process that has the simulated libcuda: where its machine is.
const INSIDE: &str = "CUDA_SIM_DIR";

/// Magic numbers of file systems.
const EXT4: u64 = 0xef53;
const XFS: u64 = 0x5846_5342;

/// Environment variables of one run.
pub type Variables<'a> = &'a [(&'a str, &'a str)];

/// Has the rest of a test run on simulated GPUs of so many MiB each, in a process of its own.
#[allow(unused_macros, reason = "each test binary uses its part of the harness")]
macro_rules! on_gpus {
    ($($mib:literal),+) => {
        fn here() {}
        let devices = serde_json::json!([$($crate::common::gpu::device($mib)),+]);
        if !$crate::common::gpu::simulated(std::any::type_name_of_val(&here), &devices) {
            return;
        }
    };
}
#[allow(unused_imports, reason = "each test binary uses its part of the harness")]
pub(crate) use on_gpus;

/// The same on these devices, with a simulated cuFile on a node that is able to this much (`CUFILE_SIM_MODE`).
#[allow(unused_macros, reason = "each test binary uses its part of the harness")]
macro_rules! on_gpus_with_cufile {
    ($devices:expr, $mode:literal) => {
        fn here() {}
        let more = [("CUFILE_SIM_MODE", $mode)];
        if !$crate::common::gpu::simulated_with_cufile(std::any::type_name_of_val(&here), &$devices, &more) {
            return;
        }
    };
}
#[allow(unused_imports, reason = "each test binary uses its part of the harness")]
pub(crate) use on_gpus_with_cufile;

/// Whether this process has simulated GPUs. If not, the test around `here` is run again in one that has, and must pass
/// there.
#[allow(clippy::disallowed_methods, reason = "how a test process knows which one it is")]
pub fn simulated(here: &str, devices: &Value) -> bool {
    std::env::var(INSIDE).is_ok() || run_on(&Machine::new(), here, devices, &[])
}

/// The same, with a simulated cuFile (`ffi/cuda-sim/cufile`). Does nothing where the files of tests are on a file system that
/// it cannot read directly, as the real one cannot.
#[allow(clippy::disallowed_methods, reason = "how a test process knows which one it is")]
pub fn simulated_with_cufile(here: &str, devices: &Value, more: Variables<'_>) -> bool {
    if std::env::var(INSIDE).is_ok() {
        return true;
    }
    let kind = rustix::fs::statfs(env!("CARGO_TARGET_TMPDIR")).unwrap().f_type;
    if ![EXT4, XFS].contains(&(kind as u64)) {
        eprintln!("skipped: the build is neither on ext4 nor on XFS");
        return false;
    }
    let machine = Machine::new();
    symlink(library("libcufile_sim.so"), machine.libraries().join("libcufile.so.0")).unwrap();
    run_on(&machine, here, devices, more)
}

/// Runs a test again on a machine. → `false`: it has been run.
fn run_on(machine: &Machine, here: &str, devices: &Value, more: Variables<'_>) -> bool {
    let name = here.rsplit("::").nth(1).unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env("LD_LIBRARY_PATH", machine.libraries())
        .env(INSIDE, machine.directory.path())
        .env("CUDA_SIM_DEVICES", devices.to_string())
        .envs(more.iter().copied())
        .status()
        .unwrap();
    assert!(status.success(), "{name} on simulated GPUs: {status}");
    false
}

/// A device of so many MiB.
pub fn device(mib: u64) -> Value {
    json!({"memory_bytes": mib << 20})
}

/// A simulated machine: its memory, and the libraries that stand in for the driver's.
pub struct Machine {
    pub directory: tempfile::TempDir,
}

impl Machine {
    pub fn new() -> Machine {
        // In memory, as the memory of a GPU is.
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let machine = Machine { directory };
        std::fs::create_dir(machine.libraries()).unwrap();
        symlink(library("libcuda_sim.so"), machine.libraries().join("libcuda.so.1")).unwrap();
        symlink(library("libnvml_sim.so"), machine.libraries().join("libnvidia-ml.so.1")).unwrap();
        machine
    }

    pub fn libraries(&self) -> PathBuf {
        self.directory.path().join("lib")
    }
}

/// A library that was built beside the tests.
fn library(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let built = own.parent().map(|folder| folder.join(name)).unwrap();
    assert!(built.exists(), "{} was not built", built.display());
    built
}

/// Bytes of device memory that are in use on the machine of this process, whoever uses them.
#[allow(clippy::disallowed_methods, reason = "how a test process knows which one it is")]
pub fn memory_in_use() -> u64 {
    let machine = PathBuf::from(std::env::var(INSIDE).unwrap());
    let folders = std::fs::read_dir(machine).unwrap().flatten().map(|entry| entry.path());
    folders.filter(|path| path.is_dir()).map(|folder| in_use(&folder)).sum()
}

fn in_use(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let memory = files.filter(|path| path.extension().is_some_and(|extension| extension == "memory"));
    let held = memory.filter_map(|path| {
        let file = std::fs::File::open(path).ok()?;
        let free = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok();
        (!free).then(|| file.metadata().unwrap().len())
    });
    held.sum()
}

/// From now on the GPU with this UUID is in this state (`ffi/cuda-sim/nvml/README.md`).
#[allow(clippy::disallowed_methods, reason = "how a test process knows which one it is")]
pub fn set_health(uuid: &str, health: &Value) {
    let machine = PathBuf::from(std::env::var(INSIDE).unwrap());
    let new = machine.join("new");
    std::fs::write(&new, json!({uuid: health}).to_string()).unwrap();
    std::fs::rename(new, machine.join("health.json")).unwrap();
}

/// Flips a bit of the byte at `offset` of the largest allocation in use: what a memory error does.
#[allow(clippy::disallowed_methods, reason = "how a test process knows which one it is")]
pub fn corrupt(offset: u64) {
    use std::os::unix::fs::FileExt;
    let machine = PathBuf::from(std::env::var(INSIDE).unwrap());
    let folders = std::fs::read_dir(machine).unwrap().flatten().map(|entry| entry.path());
    let files =
        folders.filter(|path| path.is_dir()).flat_map(|path| std::fs::read_dir(path).unwrap().flatten());
    let memory =
        files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|kind| kind == "memory"));
    let largest = memory.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(largest).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

/// Attaches as a client with a connection of its own.
pub fn attach(daemon: &Daemon, request: &Value) -> (Client, lodestream::Result<Attached>) {
    let mut client = Client::connect(&daemon.socket).unwrap();
    let request: AttachRequest = serde_json::from_value(request.clone()).unwrap();
    let attached = client.attach(&request, &[], &mut |_| ());
    (client, attached)
}

/// Every tensor holds what the model's seed says.
pub fn verify(attached: &Attached, model: &Model) {
    assert_eq!(attached.tensors().count(), model.tensors.len());
    for tensor in &model.tensors {
        let found = attached.tensor(&tensor.name).unwrap();
        assert!(found.bytes().is_none(), "the CPU cannot read the memory of a GPU");
        if tensor.bytes > 0 {
            assert_eq!(found.device_address().unwrap() % 512, 0, "{} is aligned", tensor.name);
        }
        assert!(found.to_vec().unwrap() == tensor.contents(model.seed), "{}", tensor.name);
    }
}

/// A daemon with this budget on each GPU.
pub fn gpu_daemon(root: &Path, budget: &str) -> Daemon {
    Options::new(root).budget("512MiB").flags(&["--gpu-budget", budget]).start()
}
