//! What has to leave a GPU goes to the host tier, on simulated GPUs: kept, checked, copied back, given up.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::daemon::{Daemon, Options};
use common::directory;
use common::gpu::{attach, corrupt, gpu_daemon, memory_in_use, on_gpus, verify};
use common::model::Model;
use common::wire::{Failure, number};
use serde_json::{Value, json};

/// Two models, of which one fits onto a GPU of these tests at a time.
fn two(root: &std::path::Path) -> [Model; 2] {
    [0, 1].map(|n| Model::mixed(&root.join(format!("m{n}")), n))
}
const BUDGET: &str = "16MiB";

fn load(daemon: &Daemon, model: &Model, device: &str) -> Result<Value, Failure> {
    daemon.connect().load_on(&json!({"source": model.path, "device": device}))
}

/// What there is on the host tier.
fn on_host(daemon: &Daemon) -> Vec<Value> {
    let reply = daemon.connect().call("artifact.list", &json!({})).unwrap();
    let all = reply["artifacts"].as_array().unwrap().iter();
    all.filter(|artifact| artifact["device"] == "host").cloned().collect()
}

fn paths(job: &Value) -> Vec<&String> {
    job["path"].as_object().unwrap().keys().collect()
}

fn demoted(daemon: &Daemon) -> f64 {
    daemon.metric("lodestream_demoted_bytes_total", &[])
}

#[test]
fn what_makes_room_on_a_gpu_comes_back_from_memory() {
    on_gpus!(64, 64);
    let root = directory();
    let [first, second] = two(root.path());
    // A pool makes regions of several parts.
    let flags = ["--gpu-budget", BUDGET];
    let mut daemon = Options::new(root.path()).budget("512MiB").pool("64MiB").flags(&flags).start();
    let shard = &daemon.status()["shards"][0];
    let slots: u64 = shard["slot_nodes"].as_object().unwrap().values().map(number).sum();
    assert!(
        slots == 0 || slots >= number(&shard["block_bytes"]),
        "where the kernel says that slots are: {shard}"
    );
    let job = load(&daemon, &first, "gpu:0").unwrap();
    assert_eq!(number(&job["demoted_bytes"]), 0);
    let job = load(&daemon, &second, "gpu:0").unwrap();
    let down = number(&job["demoted_bytes"]);
    assert_eq!(down, 12 << 20, "{job}");
    assert_eq!(demoted(&daemon), down as f64);
    let kept = on_host(&daemon);
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(
        (&kept[0]["packed"], &kept[0]["state"], number(&kept[0]["bytes"])),
        (&json!(true), &json!("resident"), down)
    );
    assert!(kept[0]["source"].as_str().unwrap().ends_with("m0"), "{kept:?}");

    // On the GPU that it has left, and on another one.
    for device in ["gpu:0", "gpu:1"] {
        let request = json!({"source": first.path, "device": device, "verify": true});
        let (mut client, attached) = attach(&daemon, &request);
        let attached = attached.unwrap();
        verify(&attached, &first);
        // This process goes on: that it has let go is known only because it says so.
        let lease = attached.lease();
        drop(attached);
        client.release(lease).unwrap();
        let jobs = daemon.connect().call("job.list", &json!({})).unwrap();
        assert_eq!(paths(&jobs["jobs"][0]), ["host"], "{jobs}");
    }
    assert_eq!(on_host(&daemon).len(), 2, "the second had to leave for the first");
    // It is no artifact of the host tier that could be attached: that is another layout.
    let request = json!({"source": first.path, "wait": false});
    assert_eq!(daemon.connect().code("artifact.attach", &request), "artifact.not_resident");

    // What the host tier has already is not copied once more.
    let before = demoted(&daemon);
    let job = load(&daemon, &second, "gpu:0").unwrap();
    assert_eq!((paths(&job), number(&job["demoted_bytes"])), (vec![&"host".to_owned()], 0));
    assert_eq!(demoted(&daemon), before);

    // It is evicted by name like everything else.
    for model in [&first, &second] {
        daemon.connect().call("artifact.evict", &json!({"source": model.path})).unwrap();
    }
    daemon.until("memory given back", |daemon| daemon.host("resident_bytes") == 0);
    assert!(daemon.terminate().success());
    assert_eq!(memory_in_use(), 0);
}

#[test]
fn a_slice_comes_back_as_that_slice() {
    on_gpus!(64);
    let root = directory();
    let [first, second] = two(root.path());
    let daemon = gpu_daemon(root.path(), "6MiB");
    let slice = |index: u32| json!([{"name": "head.weight", "dim": 1, "of": 2, "index": index}, "embed.*"]);
    let request =
        |model: &Model, index| json!({"source": model.path, "device": "gpu:0", "select": slice(index)});
    for (model, index) in [(&first, 1), (&second, 1), (&first, 1), (&first, 0)] {
        daemon.connect().load_on(&request(model, index)).unwrap();
    }
    let jobs = daemon.connect().call("job.list", &json!({})).unwrap();
    assert_eq!(paths(&jobs["jobs"][1]), ["host"], "{jobs}");
    assert_ne!(paths(&jobs["jobs"][0]), ["host"], "another slice: {jobs}");
    let (_client, attached) = attach(&daemon, &request(&first, 1));
    let attached = attached.unwrap();
    let rows = first.contents("head.weight");
    let expected: Vec<u8> = rows.chunks(10_000).flat_map(|row| row[5000..].to_vec()).collect();
    assert!(attached.tensor("head.weight").unwrap().to_vec().unwrap() == expected);
    assert!(attached.tensor("embed.weight").unwrap().to_vec().unwrap() == first.contents("embed.weight"));
}

#[test]
fn without_room_on_the_host_tier_it_is_evicted() {
    on_gpus!(64);
    let root = directory();
    let [first, second] = two(root.path());
    let options = Options::new(root.path()).budget("64MiB").flags(&["--gpu-budget", BUDGET]);
    let daemon = options.start();
    // Nobody uses it, but for a copy from a GPU nothing else is evicted.
    let filling = Model::uniform(&root.path().join("filling"), 3, 6, 10 << 20);
    daemon.connect().load(&filling.path);
    load(&daemon, &first, "gpu:0").unwrap();
    let job = load(&daemon, &second, "gpu:0").unwrap();
    assert_eq!(number(&job["demoted_bytes"]), 0, "{job}");
    let kept = on_host(&daemon);
    assert!(kept.len() == 1 && kept[0]["source"].as_str().unwrap().ends_with("filling"), "{kept:?}");
    let job = load(&daemon, &first, "gpu:0").unwrap();
    assert_ne!(paths(&job), ["host"]);
}

#[test]
fn nothing_is_copied_that_the_host_tier_has_as_files() {
    on_gpus!(64);
    let root = directory();
    let [first, second] = two(root.path());
    let daemon = gpu_daemon(root.path(), BUDGET);
    daemon.connect().load(&first.path);
    load(&daemon, &first, "gpu:0").unwrap();
    let job = load(&daemon, &second, "gpu:0").unwrap();
    assert_eq!(number(&job["demoted_bytes"]), 0, "{job}");
    let kept = on_host(&daemon);
    assert_eq!((kept.len(), &kept[0]["packed"]), (1, &json!(false)), "{kept:?}");
}

/// Invariant 6: bytes that are not what they were when they arrived are not kept.
#[test]
fn what_was_changed_in_the_memory_of_a_gpu_is_not_kept() {
    on_gpus!(64);
    let root = directory();
    let [first, second] = two(root.path());
    let daemon = gpu_daemon(root.path(), BUDGET);
    load(&daemon, &first, "gpu:0").unwrap();
    corrupt(3_000_000);
    let job = load(&daemon, &second, "gpu:0").unwrap();
    assert_eq!((number(&job["demoted_bytes"]), on_host(&daemon).len()), (0, 0), "{job}");
    assert!(daemon.log().contains("catalog.checksum_mismatch"), "{}", daemon.log());
    let (_client, attached) = attach(&daemon, &json!({"source": first.path, "device": "gpu:0"}));
    verify(&attached.unwrap(), &first);
}

#[test]
fn weights_replaced_on_disk_are_not_taken_from_what_was_kept() {
    on_gpus!(64);
    let root = directory();
    let [first, second] = two(root.path());
    let mut daemon = gpu_daemon(root.path(), BUDGET);
    load(&daemon, &first, "gpu:0").unwrap();
    load(&daemon, &second, "gpu:0").unwrap();
    assert_eq!(on_host(&daemon).len(), 1);
    let new = Model::mixed(&first.path, 9);
    let (_client, attached) = attach(&daemon, &json!({"source": new.path, "device": "gpu:0"}));
    verify(&attached.unwrap(), &new);
    // What was kept of the old files is of no use to anyone; what had to leave for the new ones is.
    daemon.until("the old version to go", |daemon| {
        let kept = on_host(daemon);
        kept.len() == 1 && kept[0]["source"].as_str().unwrap().ends_with("m1")
    });
}

/// Invariants 2 and 11: whichever call to the driver fails while an artifact leaves a GPU, the load that needs its room
/// goes on if the device does, and all memory comes back.
#[test]
fn a_fault_on_the_way_down_costs_only_what_was_to_be_kept() {
    on_gpus!(64);
    let root = directory();
    let [first, second] = two(root.path());
    let trace = root.path().join("trace");
    let start = |variables: &[(&str, &str)]| {
        let options = Options::new(root.path()).budget("64MiB").flags(&["--gpu-budget", BUDGET]);
        options.environment(variables).start()
    };
    let calls = |name: &str| {
        let text = std::fs::read_to_string(&trace).unwrap();
        text.lines().filter(|line| line.split(' ').next() == Some(name)).count()
    };
    let mut daemon = start(&[("CUDA_SIM_TRACE", trace.to_str().unwrap())]);
    load(&daemon, &first, "gpu:0").unwrap();
    let (registered, streams) = (calls("cuMemHostRegister_v2"), calls("cuStreamCreate"));
    assert_eq!(calls("cuMemcpyDtoHAsync_v2"), 0);
    load(&daemon, &second, "gpu:0").unwrap();
    assert!(calls("cuMemcpyDtoHAsync_v2") > 0);
    assert!(daemon.terminate().success());
    let cases = [
        format!("cuMemHostRegister_v2:{}", registered + 1),
        format!("cuStreamCreate:{}", streams + 1),
        "cuMemcpyDtoHAsync_v2:1".to_owned(),
    ];
    for call in cases {
        for code in ["OUT_OF_MEMORY", "LAUNCH_FAILED", "LOST"] {
            let fault = format!("{call}={code}");
            let mut daemon = start(&[("CUDA_SIM_FAULT", &fault)]);
            load(&daemon, &first, "gpu:0").unwrap();
            let loaded = load(&daemon, &second, "gpu:0");
            let lost = daemon.status()["gpus"][0]["lost"] == true;
            match &loaded {
                Ok(job) => assert_eq!(number(&job["demoted_bytes"]), 0, "{fault}"),
                Err(failure) => assert!(lost && failure.code == "device.lost", "{fault}: {failure:?}"),
            }
            assert_eq!(loaded.is_err(), lost, "{fault}");
            assert_eq!(on_host(&daemon).len(), 0, "{fault}");
            let _ =
                daemon.connect().call("artifact.evict", &json!({"source": second.path, "device": "gpu:0"}));
            daemon.until("memory given back", |daemon| daemon.status()["gpus"][0]["resident_bytes"] == 0);
            daemon.assert_idle();
            assert!(daemon.terminate().success(), "{fault}");
            assert_eq!(memory_in_use(), 0, "{fault}");
        }
    }
}

#[test]
fn a_device_that_cuda_finds_lost_is_lost_for_the_metrics_too() {
    on_gpus!(64);
    let root = directory();
    let [first, second] = two(root.path());
    let options = Options::new(root.path()).budget("64MiB").flags(&["--gpu-budget", "32MiB"]);
    let mut daemon = options.environment(&[("CUDA_SIM_FAULT", "cuMemCreate:2=LOST")]).start();
    load(&daemon, &first, "gpu:0").unwrap();
    assert_eq!(load(&daemon, &second, "gpu:0").unwrap_err().code, "device.lost");
    let gpu = daemon.status()["gpus"][0].clone();
    assert_eq!((&gpu["lost"], &gpu["resident_bytes"]), (&json!(true), &json!(0)), "{gpu}");
    daemon.until("the metric to say so", |daemon| {
        daemon.metric("lodestream_gpu_health", &["state=\"lost\""]) == 1.0
    });
    assert_eq!(daemon.metric("lodestream_gpu_verdicts_total", &["verdict=\"lost\""]), 1.0);
}
