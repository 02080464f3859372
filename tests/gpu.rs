//! The GPU tier, on simulated GPUs: load, attach, share, evict, fail.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::daemon::{Daemon, Options};
use common::directory;
use common::gpu::{attach, corrupt, gpu_daemon, memory_in_use, on_gpus, set_health, verify};
use common::model::Model;
use lodestream::api::methods::{AttachRequest, PrefetchRequest};
use lodestream::client::Client;
use serde_json::json;

#[test]
fn a_model_is_loaded_once_and_attached_by_descriptor() {
    on_gpus!(256);
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 7);
    let mut daemon = gpu_daemon(root.path(), "128MiB");
    let request = json!({"source": model.path, "device": "gpu:0"});
    let (mut first, attached) = attach(&daemon, &request);
    let attached = attached.unwrap();
    verify(&attached, &model);
    let uuid = attached.reply().regions[0].device.clone();
    let (_second, again) = attach(&daemon, &json!({"source": model.path, "device": uuid}));
    let again = again.unwrap();
    verify(&again, &model);
    let status = daemon.status();
    assert_eq!(status["leases"], 2);
    assert!(status["gpus"][0]["name"].as_str().unwrap().contains("Simulated"));
    let jobs = daemon.connect().call("job.list", &json!({})).unwrap();
    assert_eq!(jobs["jobs"].as_array().unwrap().len(), 1, "loaded once");
    assert_eq!(jobs["jobs"][0]["bytes"].as_u64().unwrap(), model.bytes());
    let digest = first.list().unwrap()[0].digest.clone();
    assert!(digest.is_some(), "every byte was read, headers too");

    // Invariant 9: the daemon dying costs its clients nothing that they had attached.
    daemon.kill();
    verify(&attached, &model);
    verify(&again, &model);
    drop((attached, again));
    assert_eq!(memory_in_use(), 0);
}

#[test]
fn ranks_share_one_read_of_each_byte() {
    on_gpus!(128, 128);
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 11);
    let daemon = gpu_daemon(root.path(), "64MiB");
    let select = |index: u32| json!([{"name": "*.attention.weight", "dim": 0, "of": 2, "index": index}]);
    // Along the inner dimension: a piece of every row.
    let columns = |index: u32| json!([{"name": "head.weight", "dim": 1, "of": 2, "index": index}]);
    let mut client = Client::connect(&daemon.socket).unwrap();
    let request: PrefetchRequest = serde_json::from_value(json!({
        "source": model.path,
        "targets": [{"device": "gpu:0", "select": select(0)}, {"device": "gpu:1", "select": select(1)}],
    }))
    .unwrap();
    let job = client.prefetch(&request, &[], &mut |_| ()).unwrap();
    let wait = serde_json::from_value(json!({"job": job.job})).unwrap();
    let job = client.job_wait(&wait, &mut |_| ()).unwrap();
    assert!(job.error.is_none(), "{job:?}");
    let wanted: Vec<_> =
        model.tensors.iter().filter(|tensor| tensor.name.ends_with("attention.weight")).collect();
    let bytes: u64 = wanted.iter().map(|tensor| tensor.bytes as u64).sum();
    assert!(job.bytes <= bytes + 4 * 4096 * wanted.len() as u64, "{} bytes read for {bytes}", job.bytes);
    for index in 0..2 {
        let request = json!({
            "source": model.path, "device": format!("gpu:{index}"), "select": select(index), "wait": false,
        });
        let (_client, attached) = attach(&daemon, &request);
        let attached = attached.unwrap();
        for tensor in &wanted {
            let whole = tensor.contents(model.seed);
            let half = whole.len() / 2;
            let expected = &whole[index as usize * half..(index as usize + 1) * half];
            assert!(attached.tensor(&tensor.name).unwrap().to_vec().unwrap() == expected, "{}", tensor.name);
        }
    }
    let request: PrefetchRequest = serde_json::from_value(json!({
        "source": model.path,
        "targets": [{"device": "gpu:0", "select": columns(0)}, {"device": "gpu:1", "select": columns(1)}],
    }))
    .unwrap();
    let job = client.prefetch(&request, &[], &mut |_| ()).unwrap();
    let wait = serde_json::from_value(json!({"job": job.job})).unwrap();
    let job = client.job_wait(&wait, &mut |_| ()).unwrap();
    let head = model.tensors.iter().find(|tensor| tensor.name == "head.weight").unwrap();
    assert!(job.bytes <= head.bytes as u64 + 2 * 4096, "{} bytes read for {}", job.bytes, head.bytes);
    for index in 0..2 {
        let request = json!({
            "source": model.path, "device": format!("gpu:{index}"), "select": columns(index), "wait": false,
        });
        let (_client, attached) = attach(&daemon, &request);
        let from = index as usize * 5000;
        let rows = head.contents(model.seed);
        let expected: Vec<u8> = rows.chunks(10_000).flat_map(|row| row[from..from + 5000].to_vec()).collect();
        assert!(attached.unwrap().tensor("head.weight").unwrap().to_vec().unwrap() == expected);
    }
}

#[test]
fn what_is_on_the_host_tier_is_copied_from_there_and_not_read_again() {
    on_gpus!(64, 64);
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 9);
    // A pool makes regions of several parts.
    let options = Options::new(root.path()).budget("512MiB").pool("64MiB").flags(&["--gpu-budget", "48MiB"]);
    let daemon = options.start();
    daemon.connect().load(&model.path);
    let (_first, attached) = attach(&daemon, &json!({"source": model.path, "device": "gpu:0"}));
    verify(&attached.unwrap(), &model);
    let select = json!([{"name": "head.weight", "dim": 1, "of": 4, "index": 2}, "embed.*"]);
    let request = json!({"source": model.path, "device": "gpu:1", "select": select});
    let (_second, part) = attach(&daemon, &request);
    let part = part.unwrap();
    let head = model.tensors.iter().find(|tensor| tensor.name == "head.weight").unwrap().contents(9);
    let expected: Vec<u8> = head.chunks(10_000).flat_map(|row| row[5000..7500].to_vec()).collect();
    assert!(part.tensor("head.weight").unwrap().to_vec().unwrap() == expected);
    let jobs = daemon.connect().call("job.list", &json!({})).unwrap();
    for job in &jobs["jobs"].as_array().unwrap()[..2] {
        let path = job["path"].as_object().unwrap();
        assert_eq!(path.keys().collect::<Vec<_>>(), ["host"], "{job}");
    }
    assert!(daemon.metric("lodestream_promoted_bytes_total", &[]) > 12e6);
}

#[test]
fn memory_is_bounded_evicted_and_given_back() {
    on_gpus!(64);
    let root = directory();
    let models: Vec<_> = (0..3).map(|n| Model::mixed(&root.path().join(format!("m{n}")), n)).collect();
    let mut daemon = gpu_daemon(root.path(), "32MiB");
    // Each takes about 12 MiB: the third pushes out the first.
    for model in &models {
        let (mut client, attached) = attach(&daemon, &json!({"source": model.path, "device": "gpu:0"}));
        let attached = attached.unwrap();
        verify(&attached, model);
        // This process goes on: that it has let go is known only because it says so.
        let lease = attached.lease();
        drop(attached);
        client.release(lease).unwrap();
    }
    assert!(daemon.metric("lodestream_evictions_total", &["reason=\"budget\"", "device=\"gpu:"]) >= 1.0);
    let gpu = |daemon: &Daemon| daemon.status()["gpus"][0].clone();
    let used = gpu(&daemon);
    let total = used["resident_bytes"].as_u64().unwrap() + used["held_bytes"].as_u64().unwrap();
    assert!(total <= 32 << 20, "{used}");

    // Out of budget is not out of memory.
    let (_client, refused) = attach(&daemon, &json!({"source": root.path().join("m0"), "device": "gpu:1"}));
    assert_eq!(refused.unwrap_err().code.as_str(), "device.unavailable");
    let large = Model::uniform(&root.path().join("large"), 1, 4, 10 << 20);
    let (_client, refused) = attach(&daemon, &json!({"source": large.path, "device": "gpu:0"}));
    assert_eq!(refused.unwrap_err().code.as_str(), "tier.gpu.over_budget");

    for model in &models {
        let _ = daemon.connect().call("artifact.evict", &json!({"source": model.path, "device": "gpu:0"}));
    }
    daemon.until("memory given back", |daemon| gpu(daemon)["resident_bytes"] == 0);
    assert!(daemon.terminate().success());
    assert_eq!(memory_in_use(), 0);
}

#[test]
fn a_device_that_is_full_says_so_and_nothing_is_lost() {
    on_gpus!(8);
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 3);
    let mut daemon = gpu_daemon(root.path(), "64MiB");
    let (client, refused) = attach(&daemon, &json!({"source": model.path, "device": "gpu:0"}));
    assert_eq!(refused.unwrap_err().code.as_str(), "tier.gpu.out_of_memory");
    drop(client);
    assert_eq!(daemon.status()["gpus"][0]["resident_bytes"], 0);
    daemon.assert_idle();
    // The host tier goes on.
    daemon.connect().load(&model.path);
    assert_eq!(memory_in_use(), 0);
}

#[test]
fn asleep_and_awake_at_the_same_addresses() {
    on_gpus!(64);
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 5);
    let daemon = gpu_daemon(root.path(), "32MiB");
    let request = json!({"source": model.path, "device": "gpu:0"});
    let (mut client, attached) = attach(&daemon, &request);
    let mut attached = attached.unwrap();
    let address = attached.tensor("head.weight").unwrap().device_address();
    client.sleep(&mut attached).unwrap();
    assert!(attached.tensor("head.weight").unwrap().to_vec().is_err(), "asleep");
    // Nobody has it mapped any more: evicted, its memory is free at once.
    daemon.connect().call("artifact.evict", &request).unwrap();
    let mut daemon = daemon;
    daemon.until("memory given back", |_| memory_in_use() == 0);
    let again: AttachRequest = serde_json::from_value(request).unwrap();
    client.wake(&mut attached, &again, &[], &mut |_| ()).unwrap();
    assert_eq!(attached.tensor("head.weight").unwrap().device_address(), address);
    verify(&attached, &model);
}

#[test]
fn weights_replaced_on_disk_are_a_new_version_and_old_leases_are_unharmed() {
    on_gpus!(64);
    let root = directory();
    let old = Model::mixed(&root.path().join("m"), 1);
    let daemon = gpu_daemon(root.path(), "48MiB");
    let request = json!({"source": old.path, "device": "gpu:0"});
    let (_first, before) = attach(&daemon, &request);
    let new = Model::mixed(&root.path().join("m"), 2);
    let (_second, after) = attach(&daemon, &request);
    verify(&before.unwrap(), &old);
    verify(&after.unwrap(), &new);
}

#[test]
fn what_a_process_that_goes_on_still_has_mapped_counts_as_held() {
    on_gpus!(64);
    let root = directory();
    let models: Vec<_> = (0..2).map(|n| Model::mixed(&root.path().join(format!("m{n}")), n)).collect();
    let daemon = gpu_daemon(root.path(), "16MiB");
    let (client, attached) = attach(&daemon, &json!({"source": models[0].path, "device": "gpu:0"}));
    let attached = attached.unwrap();
    // The lease ends with the connection; the mapping does not.
    drop(client);
    let other = json!({"source": models[1].path, "device": "gpu:0"});
    let (_client, refused) = attach(&daemon, &other);
    assert_eq!(refused.unwrap_err().code.as_str(), "tier.gpu.over_budget");
    let gpu = daemon.status()["gpus"][0].clone();
    assert!(gpu["held_bytes"].as_u64().unwrap() > 0, "{gpu}");
    verify(&attached, &models[0]);
}

/// Invariants 2 and 11: whichever call to the driver fails, a load fails with a code or succeeds, and all memory comes
/// back.
#[test]
fn a_fault_at_each_call_to_the_driver_costs_only_its_load() {
    on_gpus!(64);
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 1);
    let trace = root.path().join("trace");
    let start = |variables: &[(&str, &str)]| {
        let options = Options::new(root.path()).budget("64MiB").flags(&["--gpu-budget", "32MiB"]);
        options.environment(variables)
    };
    let request = json!({"source": model.path, "device": "gpu:0"});
    // Which calls a load makes of which function, beyond those of the start.
    let counts = |text: &str| {
        let mut counts = std::collections::BTreeMap::<String, u64>::new();
        for line in text.lines() {
            *counts.entry(line.split(' ').next().unwrap().to_owned()).or_default() += 1;
        }
        counts
    };
    let mut daemon = start(&[("CUDA_SIM_TRACE", trace.to_str().unwrap())]).start();
    let before = counts(&std::fs::read_to_string(&trace).unwrap());
    daemon.connect().load_on(&request).unwrap();
    assert!(daemon.terminate().success());
    let after = counts(&std::fs::read_to_string(&trace).unwrap());
    let mut cases = vec![("copy".to_owned(), 1), ("copy".to_owned(), 5)];
    for (name, count) in &after {
        let first = before.get(name).copied().unwrap_or(0) + 1;
        // The first and the last call of a load stand for those between.
        cases.extend(
            [first, *count]
                .into_iter()
                .filter(|call| *call >= first && call <= count)
                .map(|call| (name.clone(), call)),
        );
    }
    cases.dedup();
    assert!(cases.iter().any(|(name, _)| name == "cuMemcpyHtoDAsync_v2"), "{cases:?}");
    let mut failures = 0;
    for (name, call) in cases {
        for code in ["OUT_OF_MEMORY", "LAUNCH_FAILED", "LOST"] {
            let fault = format!("{name}:{call}={code}");
            let mut daemon = start(&[("CUDA_SIM_FAULT", &fault)]).start();
            let failed = daemon.connect().load_on(&request);
            if let Err(failure) = failed {
                let expected =
                    ["device.copy_failed", "device.lost", "device.unavailable", "tier.gpu.out_of_memory"];
                assert!(expected.contains(&failure.code.as_str()), "{fault}: {failure:?}");
                failures += 1;
            }
            let _ = daemon.connect().call("artifact.evict", &request);
            daemon.until("memory given back", |daemon| daemon.status()["gpus"][0]["resident_bytes"] == 0);
            // The host tier is not concerned.
            daemon.connect().load(&model.path);
            assert!(daemon.terminate().success(), "{fault}");
            assert_eq!(memory_in_use(), 0, "{fault}");
        }
    }
    assert!(failures > 20, "only {failures} faults made a load fail");
}

#[test]
fn a_memory_error_is_found_in_place_and_the_artifact_loaded_anew() {
    on_gpus!(64);
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 4);
    let plain = root.path().join("plain.bin");
    std::fs::write(&plain, vec![3; 3_000_001]).unwrap();
    let daemon = gpu_daemon(root.path(), "48MiB");
    for (source, select) in
        [(&model.path, json!(null)), (&plain, json!(null)), (&model.path, json!(["layers.*"]))]
    {
        for device in ["host", "gpu:0"] {
            let request = json!({"source": source, "device": device, "select": select, "verify": true});
            let (_client, attached) = attach(&daemon, &request);
            let timings = attached.unwrap().reply().timings_ms.clone();
            assert!(timings.contains_key("verify"), "{timings:?}");
        }
    }
    let request = json!({"source": model.path, "device": "gpu:0"});
    let (_client, before) = attach(&daemon, &request);
    let before = before.unwrap();
    let place = before.reply().tensors.iter().find(|tensor| tensor.name == "head.weight").unwrap().offset;
    corrupt(place + 12_345);
    let (_client, refused) =
        attach(&daemon, &json!({"source": model.path, "device": "gpu:0", "verify": true}));
    let refused = refused.unwrap_err();
    assert_eq!(refused.code.as_str(), "catalog.checksum_mismatch");
    assert!(refused.message.contains("head.weight"), "{refused}");
    let (_client, again) = attach(&daemon, &json!({"source": model.path, "device": "gpu:0", "verify": true}));
    verify(&again.unwrap(), &model);
}

#[test]
fn after_a_contained_error_nothing_old_is_handed_out_and_a_lost_device_is_not_used() {
    on_gpus!(64);
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 6);
    let mut daemon = gpu_daemon(root.path(), "48MiB");
    let request = json!({"source": model.path, "device": "gpu:0"});
    let (_first, before) = attach(&daemon, &request);
    let before = before.unwrap();
    let uuid = before.reply().regions[0].device.strip_prefix("gpu:").unwrap().to_owned();
    set_health(&uuid, &json!({"xid": [94]}));
    daemon.until("what was resident to be doubted", |daemon| {
        let reply = daemon.connect().call("artifact.list", &json!({})).unwrap();
        reply["artifacts"].as_array().unwrap().iter().all(|artifact| artifact["state"] == "stale")
    });
    let (_second, after) = attach(&daemon, &request);
    let after = after.unwrap();
    assert_ne!(after.lease(), before.lease());
    verify(&after, &model);
    let jobs = daemon.connect().call("job.list", &json!({})).unwrap();
    assert_eq!(jobs["jobs"].as_array().unwrap().len(), 2, "loaded anew");

    set_health(&uuid, &json!({"xid": [94, 79]}));
    daemon.until("the device to be lost", |daemon| daemon.status()["gpus"][0]["lost"] == true);
    let (_third, refused) = attach(&daemon, &request);
    assert_eq!(refused.unwrap_err().code.as_str(), "device.lost");
    daemon.connect().load(&model.path);
}
