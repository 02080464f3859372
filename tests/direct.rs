//! The direct path from drives to GPUs, on a simulated cuFile and simulated GPUs: measured, used, proven, given up.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::path::Path;

use common::daemon::{Daemon, Options};
use common::gpu::{corrupt, memory_in_use, on_gpus_with_cufile};
use common::model::Model;
use common::{directory, wire::number};
use lodestream::api::methods::AttachRequest;
use lodestream::client::{Attached, Client};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// A GPU whose memory drives can reach.
fn gpu() -> Value {
    json!({"memory_bytes": 256 << 20, "attributes": {"110": 1}})
}

/// A daemon with a GPU, and this for `gpu.direct`.
fn daemon(root: &Path, direct: &str, variables: &[(&str, &str)]) -> Daemon {
    let config = format!("[gpu]\ndirect = '{direct}'\ndirect_probe_timeout_ms = 10000\n");
    let options = Options::new(root).budget("256MiB").flags(&["--gpu-budget", "64MiB"]);
    options.config(&config).environment(variables).start()
}

fn attach(daemon: &Daemon, request: &Value) -> lodestream::Result<(Client, Attached)> {
    let mut client = Client::connect(&daemon.socket).unwrap();
    let request: AttachRequest = serde_json::from_value(request.clone()).unwrap();
    client.attach(&request, &[], &mut |_| ()).map(|attached| (client, attached))
}

fn on_gpu(model: &Model) -> Value {
    json!({"source": model.path, "device": "gpu:0"})
}

/// Every tensor on the GPU holds what the model's seed says, and in place it is what it was when it arrived.
#[track_caller]
fn verify(daemon: &Daemon, model: &Model) {
    let request = json!({"source": model.path, "device": "gpu:0", "wait": false, "verify": true});
    let (mut client, attached) = attach(daemon, &request).unwrap();
    for tensor in &model.tensors {
        let found = attached.tensor(&tensor.name).unwrap();
        assert!(found.to_vec().unwrap() == tensor.contents(model.seed), "{}", tensor.name);
    }
    // This process goes on: that it has let go is known only because it says so.
    let lease = attached.lease();
    drop(attached);
    client.release(lease).unwrap();
}

/// Loads to the GPU; → the bytes of the job by path.
#[track_caller]
fn load(daemon: &Daemon, model: &Model) -> Value {
    let job = daemon.connect().load_on(&on_gpu(model)).unwrap();
    assert_eq!(number(&job["bytes"]), model.bytes(), "{job}");
    let paths = job["path"].as_object().unwrap();
    assert_eq!(paths.values().map(number).sum::<u64>(), model.bytes(), "{job}");
    job["path"].clone()
}

fn evict(daemon: &Daemon, model: &Model) {
    daemon.connect().call("artifact.evict", &on_gpu(model)).unwrap();
}

/// What the status says of the first pair of drive and GPU.
fn pair(daemon: &Daemon) -> Value {
    daemon.status()["gpus"][0]["direct"][0].clone()
}

/// Waits until the first pair was measured.
#[track_caller]
fn measured(daemon: &mut Daemon) -> Value {
    daemon.until("a measurement", |daemon| {
        pair(daemon)["state"].is_string() && pair(daemon)["state"] != "probing"
    });
    pair(daemon)
}

/// Loads a model that is measured, and evicts it.
#[track_caller]
fn learn(daemon: &mut Daemon, model: &Model) -> Value {
    let path = load(daemon, model);
    assert!(path["direct"].is_null() && path["compat"].is_null(), "nothing was known yet: {path}");
    let pair = measured(daemon);
    evict(daemon, model);
    pair
}

fn bytes_by(path: &Value, name: &str) -> u64 {
    path[name].as_u64().unwrap_or(0)
}

/// Invariants 6 and 10: what agrees with its file comes directly, which cuFile's counters prove, and every byte is checked.
#[test]
fn aligned_tensors_come_directly_and_the_rest_by_slots() {
    on_gpus_with_cufile!(json!([gpu()]), "p2pdma");
    let root = directory();
    let first = Model::aligned(&root.path().join("first"), 1);
    let second = Model::aligned(&root.path().join("second"), 2);
    let mut daemon = daemon(root.path(), "on", &[]);
    let pair = learn(&mut daemon, &first);
    assert_eq!((&pair["state"], &pair["mode"]), (&json!("used"), &json!("p2pdma")), "{pair}");
    assert!(pair["direct_bytes_per_second"].as_f64().unwrap() > 0.0, "{pair}");
    assert!(pair["staged_bytes_per_second"].as_f64().unwrap() > 0.0, "{pair}");
    for model in [&second, &first] {
        let path = load(&daemon, model);
        // 17 of 20 MiB agree; two blocks at the edges do not.
        assert!(bytes_by(&path, "direct") >= (17 << 20) - 2 * 4096, "{path}");
        assert!(bytes_by(&path, "staged") + bytes_by(&path, "cached") > 3 << 20, "{path}");
        assert!(path["compat"].is_null(), "{path}");
        verify(&daemon, model);
    }
    // The manifest was made of what came directly: bytes that come another way are compared with it.
    daemon.connect().load(&second.path);
    let listed = daemon.connect().call("artifact.list", &json!({})).unwrap();
    let of = |artifact: &&Value| artifact["source"].as_str().unwrap().ends_with("second");
    let digests: Vec<_> =
        listed["artifacts"].as_array().unwrap().iter().filter(of).map(|a| &a["digest"]).collect();
    assert!(digests.len() == 2 && digests[0].is_string() && digests[0] == digests[1], "{listed}");
    let direct = daemon.metric("lodestream_read_bytes_total", &["path=\"direct\""]);
    assert!(direct >= 2.0 * 17.0 * 1e6, "{direct}");
    assert_eq!(daemon.metric("lodestream_read_bytes_total", &["path=\"compat\""]), 0.0);
    assert_eq!(daemon.metric("lodestream_direct_used", &[]), 1.0);
    assert_eq!(daemon.metric("lodestream_direct_fallback_bytes_total", &[]), 0.0);

    // What is registered for a load is given back.
    let again = |daemon: &mut Daemon| {
        evict(daemon, &first);
        daemon.until("memory given back", |_| memory_in_use() < 48 << 20);
        assert!(bytes_by(&load(daemon, &first), "direct") > 0);
        daemon.fds()
    };
    let before = again(&mut daemon);
    for _ in 0..3 {
        again(&mut daemon);
    }
    // Connections of the questions may still be closing; what each load leaves would be more.
    daemon.until("as few descriptors as before", |daemon| daemon.fds() <= before);

    // In place, too: the checksums that the device has made are those of the tensors.
    let place = |tensor: &str| {
        let (_client, attached) = attach(&daemon, &on_gpu(&first)).unwrap();
        attached.reply().tensors.iter().find(|found| found.name == tensor).unwrap().offset
    };
    corrupt(place("layers.0.weight") + 5_000_000);
    let request = json!({"source": first.path, "device": "gpu:0", "verify": true});
    let damaged = attach(&daemon, &request).map(|_| ()).err();
    // One of the two artifacts was hit.
    let request = json!({"source": second.path, "device": "gpu:0", "verify": true});
    let damaged = damaged.or_else(|| attach(&daemon, &request).map(|_| ()).err()).unwrap();
    assert_eq!(damaged.code.as_str(), "catalog.checksum_mismatch");
    assert!(daemon.terminate().success());
    assert_eq!(memory_in_use(), 0);
}

#[test]
fn compat_mode_is_found_out_and_not_used() {
    on_gpus_with_cufile!(json!([gpu()]), "compat");
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    let mut daemon = daemon(root.path(), "on", &[]);
    let pair = learn(&mut daemon, &model);
    assert_eq!((&pair["state"], &pair["mode"]), (&json!("not_used"), &json!("compat")), "{pair}");
    assert!(pair["reason"].as_str().unwrap().contains("host memory"), "{pair}");
    let path = load(&daemon, &model);
    assert!(path["direct"].is_null() && path["compat"].is_null(), "{path}");
    verify(&daemon, &model);
    assert_eq!(daemon.metric("lodestream_direct_used", &[]), 0.0);
}

/// Invariant 10: what was direct when it was measured and is not any more is not called direct.
#[test]
fn a_silent_fallback_is_noticed_reported_and_not_tried_again() {
    on_gpus_with_cufile!(json!([gpu()]), "nvfs");
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    // More reads than the helper makes, which is another process and counts for itself.
    let mut daemon = daemon(root.path(), "on", &[("CUFILE_SIM_FAULT", "read:32=COMPAT")]);
    assert_eq!(learn(&mut daemon, &model)["mode"], "nvidia_fs");
    let mut loads = 0;
    let path = loop {
        let path = load(&daemon, &model);
        verify(&daemon, &model);
        loads += 1;
        if !path["compat"].is_null() {
            break path;
        }
        assert!(bytes_by(&path, "direct") > 0 && loads < 60, "{path}");
        evict(&daemon, &model);
    };
    assert!(path["direct"].is_null(), "not all of it was direct, and nobody knows what was not: {path}");
    let after = pair(&daemon);
    assert_eq!(after["state"], "not_used", "{after}");
    let reason = after["reason"].as_str().unwrap();
    assert!(reason.contains("by way of host memory") && !reason.contains("counts 0 by way"), "{after}");
    assert!(daemon.log().contains("direct path switched off"));
    evict(&daemon, &model);
    let path = load(&daemon, &model);
    assert!(path["direct"].is_null() && path["compat"].is_null(), "{path}");
    assert!(daemon.metric("lodestream_read_bytes_total", &["path=\"compat\""]) > 0.0);
    assert_eq!(daemon.metric("lodestream_direct_used", &[]), 0.0);
}

#[test]
fn a_library_that_never_opens_costs_nothing_but_the_direct_path() {
    on_gpus_with_cufile!(json!([gpu()]), "nvfs");
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    let other = Model::aligned(&root.path().join("other"), 2);
    let mut daemon = daemon(root.path(), "auto", &[("CUFILE_SIM_FAULT", "cuFileDriverOpen:1+=HANG")]);
    load(&daemon, &model);
    assert_eq!(pair(&daemon)["state"], "probing");
    // Loads go on meanwhile.
    assert!(load(&daemon, &other)["direct"].is_null());
    verify(&daemon, &other);
    let pair = measured(&mut daemon);
    assert_eq!(pair["state"], "not_used", "{pair}");
    let reason = pair["reason"].as_str().unwrap();
    assert!(reason.contains("opening libcufile did not end") && reason.contains("was ended"), "{pair}");
    assert!(
        pair["staged_bytes_per_second"].as_f64().unwrap() > 0.0,
        "what was found out before counts: {pair}"
    );
    assert!(daemon.terminate().success());
    assert_eq!(memory_in_use(), 0);
}

#[test]
fn what_is_slower_is_not_used_and_what_is_faster_is() {
    // The link between host and GPU is slow: what the direct path saves. Far slower than the checksums of a simulated GPU, which
    // this machine's CPU computes.
    let mut slow = gpu();
    slow["h2d_bytes_per_second"] = json!(40_000_000);
    on_gpus_with_cufile!(json!([slow]), "p2pdma");
    for (rate, state) in [("10000000", "not_used"), ("1000000000", "used")] {
        let root = directory();
        let model = Model::aligned(&root.path().join("m"), 1);
        let mut daemon = daemon(root.path(), "auto", &[("CUFILE_SIM_RATE", rate)]);
        let pair = learn(&mut daemon, &model);
        assert_eq!((&pair["state"], &pair["mode"]), (&json!(state), &json!("p2pdma")), "{pair}");
        let path = load(&daemon, &model);
        assert_eq!(bytes_by(&path, "direct") > 0, state == "used", "{path}");
        if state == "not_used" {
            assert!(pair["reason"].as_str().unwrap().contains("no gain"), "{pair}");
        }
        verify(&daemon, &model);
    }
}

#[test]
fn doctor_measures_each_drive_to_each_gpu() {
    on_gpus_with_cufile!(json!([gpu()]), "p2pdma");
    let root = directory();
    // What `doctor` reads has to be of 64 MiB.
    let model = Model::uniform(&root.path().join("m"), 1, 9, 8 << 20);
    let mut doctor = std::process::Command::new(env!("CARGO_BIN_EXE_lodestream"));
    let output = doctor.args(["doctor", "--json", "--read"]).arg(&model.path).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["check"] == "drive_to_gpu").unwrap();
    let found = check["found"].as_str().unwrap();
    assert!(found.contains("by way of host memory") && found.contains("directly (p2pdma)"), "{check}");
    assert!(check["of"].as_str().unwrap().contains("GPU-51d0c0da"), "{check}");
    assert_eq!(memory_in_use(), 0);
}

#[test]
fn off_means_that_nothing_is_measured() {
    on_gpus_with_cufile!(json!([gpu()]), "p2pdma");
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    let daemon = daemon(root.path(), "off", &[]);
    load(&daemon, &model);
    assert_eq!(daemon.status()["gpus"][0]["direct"], json!([]));
}

#[test]
fn misaligned_files_go_by_slots_where_the_direct_path_is_used() {
    on_gpus_with_cufile!(json!([gpu()]), "p2pdma");
    let root = directory();
    let mixed = Model::mixed(&root.path().join("mixed"), 3);
    let aligned = Model::aligned(&root.path().join("aligned"), 1);
    let mut daemon = daemon(root.path(), "on", &[]);
    assert_eq!(learn(&mut daemon, &aligned)["state"], "used");
    let path = load(&daemon, &mixed);
    assert!(path["direct"].is_null(), "{path}");
    verify(&daemon, &mixed);
    // A slice along the first dimension is one piece, and agrees; along the second it is not.
    for (dim, direct) in [(0, true), (1, false)] {
        let select = json!([{"name": "embed.weight", "dim": dim, "of": 2, "index": 1}]);
        let request = json!({"source": aligned.path, "device": "gpu:0", "select": select, "verify": true});
        let (_client, attached) = attach(&daemon, &request).unwrap();
        let whole = aligned.contents("embed.weight");
        let expected: Vec<u8> = match dim {
            0 => whole[whole.len() / 2..].to_vec(),
            _ => whole.chunks(2048).flat_map(|row| row[1024..].to_vec()).collect(),
        };
        assert!(attached.tensor("embed.weight").unwrap().to_vec().unwrap() == expected);
        let jobs = daemon.connect().call("job.list", &json!({})).unwrap();
        assert_eq!(jobs["jobs"][0]["path"]["direct"].is_u64(), direct, "{jobs}");
    }
}

#[test]
fn ranks_get_their_own_directly_and_what_both_want_by_slots() {
    on_gpus_with_cufile!(json!([gpu(), gpu()]), "p2pdma");
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    let mut daemon = daemon(root.path(), "on", &[]);
    assert_eq!(learn(&mut daemon, &model)["state"], "used");
    let second = json!({"source": model.path, "device": "gpu:1"});
    daemon.connect().load_on(&second).unwrap();
    daemon.until("the other pair", |daemon| daemon.status()["gpus"][1]["direct"][0]["state"] == "used");
    daemon.connect().call("artifact.evict", &second).unwrap();
    let half =
        |rank: u64| json!([{"name": "embed.weight", "dim": 0, "of": 2, "index": rank}, "layers.0.weight"]);
    let targets: Vec<_> =
        (0..2).map(|rank| json!({"device": format!("gpu:{rank}"), "select": half(rank)})).collect();
    let job = daemon.connect().load_on(&json!({"source": model.path, "targets": targets})).unwrap();
    let (direct, other) =
        (bytes_by(&job["path"], "direct"), number(&job["bytes"]) - bytes_by(&job["path"], "direct"));
    let halves = (8 << 20) - 4 * 4096..=8 << 20;
    assert!(halves.contains(&direct), "a half of the 8 MiB for each: {job}");
    let shared = 9 << 20..=(9 << 20) + 8 * 4096;
    assert!(shared.contains(&other), "9 MiB for both, read once: {job}");
    for rank in 0..2 {
        let request = json!({
            "source": model.path, "device": format!("gpu:{rank}"), "select": half(rank), "wait": false, "verify": true,
        });
        let (_client, attached) = attach(&daemon, &request).unwrap();
        let embed = model.contents("embed.weight");
        let own = &embed[rank as usize * (4 << 20)..][..4 << 20];
        assert!(attached.tensor("embed.weight").unwrap().to_vec().unwrap() == own);
        let both = model.contents("layers.0.weight");
        assert!(attached.tensor("layers.0.weight").unwrap().to_vec().unwrap() == both);
    }
}

/// Invariant 2: a load that is given up waits for what is under way, and gives everything back.
#[test]
fn a_load_that_is_given_up_in_mid_read_gives_everything_back() {
    on_gpus_with_cufile!(json!([gpu()]), "nvfs");
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    // A load takes a second and more.
    let mut daemon = daemon(root.path(), "on", &[("CUFILE_SIM_RATE", "16000000")]);
    assert_eq!(learn(&mut daemon, &model)["state"], "used");
    let mut request = on_gpu(&model);
    request["deadline_ms"] = json!(200);
    assert_eq!(daemon.connect().load_on(&request).unwrap_err().code, "job.deadline_exceeded");
    daemon.until("memory given back", |_| memory_in_use() < 20 << 20);
    assert_eq!(daemon.status()["gpus"][0]["resident_bytes"], 0);
    assert!(bytes_by(&load(&daemon, &model), "direct") > 0);
    verify(&daemon, &model);
    assert!(daemon.terminate().success());
}

/// Invariants 2 and 11: whichever call to cuFile fails, every byte is right, and all memory comes back.
#[track_caller]
fn loads_survive(fault: &str, loads: usize, check: impl Fn(&Daemon, &Value)) {
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    let mut daemon = daemon(root.path(), "on", &[("CUFILE_SIM_FAULT", fault)]);
    learn(&mut daemon, &model);
    let mut seen = json!({});
    for _ in 0..loads {
        seen = load(&daemon, &model);
        evict(&daemon, &model);
    }
    load(&daemon, &model);
    verify(&daemon, &model);
    check(&daemon, &seen);
    evict(&daemon, &model);
    // What the threads of the direct path keep for themselves is less than the artifact.
    daemon.until("memory given back", |_| memory_in_use() < 20 << 20);
    assert_eq!(daemon.status()["gpus"][0]["resident_bytes"], 0, "{fault}");
    assert!(daemon.terminate().success(), "{fault}");
    assert_eq!(memory_in_use(), 0, "{fault}");
}

#[test]
fn a_fault_at_each_call_to_cufile_costs_no_load() {
    on_gpus_with_cufile!(json!([gpu()]), "nvfs");
    // In the helper and in the daemon.
    for fault in [
        "cuFileSetParameterBool:1=INVALID_VALUE",
        "cuFileSetStatsLevel:1=INVALID_VALUE",
        "cuFileDriverOpen:1=NVFS_SETUP_ERROR",
        "cuFileStatsStart:1=INTERNAL_ERROR",
        "cuFileGetVersion:1=DRIVER_VERSION_READ_ERROR",
        "cuFileGetStatsL3:1=INTERNAL_ERROR",
        "cuFileBufRegister:1=GPU_MEMORY_PINNING_FAILED",
        "cuFileHandleRegister:1=IO_NOT_SUPPORTED",
        "cuFileBufDeregister:1=INTERNAL_ERROR",
        "cuFileHandleDeregister:1=INTERNAL_ERROR",
        "cuFileDriverClose_v2:1=DRIVER_CLOSING",
        "read:1+=EIO",
        "read:2=SHORT",
    ] {
        loads_survive(fault, 2, |_, _| ());
    }
}

#[test]
fn a_fault_after_the_measurement_is_made_good_by_slots() {
    on_gpus_with_cufile!(json!([gpu()]), "nvfs");
    let fell_back = |daemon: &Daemon| daemon.metric("lodestream_direct_fallback_bytes_total", &[]) > 0.0;
    let direct = |path: &Value| bytes_by(path, "direct") > 0;
    // The helper makes fewer of these calls: at most nine rounds of three reads.
    loads_survive("cuFileGetStatsL3:20=INTERNAL_ERROR", 12, |_, _| ());
    loads_survive("cuFileBufRegister:2+=GPU_MEMORY_PINNING_FAILED", 2, |daemon, path| {
        assert!(fell_back(daemon) && !direct(path), "{path}");
    });
    loads_survive("cuFileHandleRegister:3=IO_NOT_SUPPORTED", 3, |daemon, path| {
        assert!(fell_back(daemon) && !direct(path), "{path}");
    });
    loads_survive("read:32=EIO", 12, |daemon, path| assert!(fell_back(daemon) && direct(path), "{path}"));
    loads_survive("read:33=SHORT", 12, |daemon, path| assert!(!fell_back(daemon) && direct(path), "{path}"));
    loads_survive("read:32+=CUDA_DRIVER_ERROR", 12, |daemon, path| {
        assert!(fell_back(daemon) && pair(daemon)["state"] == "not_used" && !direct(path), "{path}");
    });
}

/// Invariant 2: a device that is lost in the middle of a read ends the load with a code, and all is given back.
#[test]
fn a_device_that_is_lost_in_mid_read_ends_the_load() {
    on_gpus_with_cufile!(json!([gpu()]), "nvfs");
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    // After the helper is done, whose operations count for themselves.
    let mut daemon = daemon(root.path(), "on", &[("CUDA_SIM_FAULT", "device:0:2000=LOST")]);
    assert_eq!(learn(&mut daemon, &model)["state"], "used");
    let failure = (0..200).find_map(|_| {
        let failed = daemon.connect().load_on(&on_gpu(&model)).err();
        let _ = daemon.connect().call("artifact.evict", &on_gpu(&model));
        failed
    });
    assert_eq!(failure.unwrap().code, "device.lost");
    daemon.until("memory given back", |daemon| daemon.status()["gpus"][0]["resident_bytes"] == 0);
    // The host tier is not concerned.
    daemon.connect().load(&model.path);
    assert!(daemon.terminate().success());
    assert_eq!(memory_in_use(), 0);
}

/// Invariant 6: bytes that the drive has written to the GPU are compared with what the file was, like all others.
#[test]
fn bytes_that_differ_from_the_manifest_are_noticed_on_the_device() {
    on_gpus_with_cufile!(json!([gpu()]), "p2pdma");
    let root = directory();
    let model = Model::aligned(&root.path().join("m"), 1);
    let mut daemon = daemon(root.path(), "on", &[]);
    assert_eq!(learn(&mut daemon, &model)["state"], "used");
    daemon.until("memory given back", |daemon| daemon.status()["gpus"][0]["resident_bytes"] == 0);
    // As if the bytes had been others: the sixth chunk is all of one tensor that comes directly.
    forge(&daemon.state(), 5);
    let refused = daemon.connect().load_on(&on_gpu(&model)).unwrap_err();
    assert_eq!(refused.code, "catalog.checksum_mismatch", "{refused:?}");
    assert!(refused.message.contains("5242880..6291456"), "{refused:?}");
    daemon.until("memory given back", |daemon| daemon.status()["gpus"][0]["resident_bytes"] == 0);
    // Whichever was wrong: the next load starts without the memory of it.
    assert!(bytes_by(&load(&daemon, &model), "direct") > 0);
    verify(&daemon, &model);
}

/// Changes the checksum of one chunk in the only manifest that is remembered.
fn forge(state: &Path, chunk: usize) {
    let entry = std::fs::read_dir(state.join("manifests")).unwrap().next().unwrap().unwrap().path();
    let text = String::from_utf8(std::fs::read(&entry).unwrap()).unwrap();
    let (_, rest) = text.split_once('\n').unwrap();
    let (key, manifest) = rest.split_once('\n').unwrap();
    let value: Value = serde_json::from_str(manifest).unwrap();
    // 16 digits each.
    let sum = &value["files"][0]["chunks"].as_str().unwrap()[chunk * 16..][..16];
    let forged = manifest.replacen(sum, &format!("{:016x}", !u64::from_str_radix(sum, 16).unwrap()), 1);
    assert_ne!(forged, manifest);
    let rest = format!("{key}\n{forged}");
    let hash: String = Sha256::digest(&rest).iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(&entry, format!("{hash}\n{rest}")).unwrap();
}
