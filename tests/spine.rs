//! The spine: from files on a drive to processes that have them attached.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::thread;

use common::daemon::{Daemon, Options};
use common::model::{self, Model};
use common::wire::{list, number, text};
use common::{directory, directory_for_everyone, root_or_skip, set_mode, tenant};
use serde_json::{Value, json};

/// Invariant 6.
#[test]
fn a_prefetched_model_is_attached_equal_to_its_files_by_two_clients() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 1);
    let mut daemon = Daemon::start(root.path());
    let mut first = daemon.connect();
    let job = first.load(&model.path);
    assert_eq!(job["state"], "done", "{job}");
    assert_eq!(number(&job["bytes"]), number(&job["total"]));
    assert!(text(&job["digest"]).starts_with("sha256:"));

    let mut second = daemon.connect();
    let attached = [&mut first, &mut second]
        .map(|connection| connection.attach(&json!({"source": model.path, "wait": false})).unwrap());
    for attached in &attached {
        model.assert_equal(attached);
        assert_eq!(attached.reply["digest"], job["digest"]);
        assert_eq!(attached.reply["format"], "safetensors");
        assert_eq!(attached.reply["metadata"]["seed"], "1");
        for shard in model.shards() {
            let name = shard.file_name().unwrap().to_str().unwrap();
            assert!(attached.file(name) == fs::read(&shard).unwrap(), "{name} differs");
        }
    }
    assert_eq!(number(&daemon.status()["leases"]), 2);
    // One copy for both.
    assert!(daemon.host("resident_bytes") < model.bytes() + (64 << 20));

    let source = json!({"source": model.path});
    assert_eq!(first.code("artifact.evict", &source), "artifact.leased");
    drop((first, second));
    daemon.until("leases given back", |daemon| number(&daemon.status()["leases"]) == 0);
    drop(attached);
    daemon.connect().call("artifact.evict", &source).unwrap();
    daemon.assert_idle();
}

/// Invariant 10: the paths that are reported add up to the bytes that the metrics counted.
#[test]
fn the_reported_path_is_what_the_transfer_did() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 2);
    let daemon = Daemon::start(root.path());
    let job = daemon.connect().load(&model.path);
    let mut reported = 0;
    for (path, bytes) in job["path"].as_object().unwrap() {
        assert_eq!(
            daemon.metric("lodestream_read_bytes_total", &[&format!("path=\"{path}\"")]),
            number(bytes) as f64
        );
        reported += number(bytes);
    }
    assert!(reported >= number(&job["total"]), "{job}");
    assert_eq!(daemon.metric("lodestream_read_bytes_total", &[]), reported as f64);
}

#[test]
fn an_attach_loads_what_is_not_resident_unless_told_not_to_wait() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 3);
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let patient = json!({"source": model.path, "notify": true});
    let impatient = json!({"source": model.path, "wait": false});
    assert_eq!(connection.code("artifact.attach", &impatient), "artifact.not_resident");
    let attached = connection.attach(&patient).unwrap();
    model.assert_equal(&attached);
    assert!(connection.notifications.iter().all(|line| line["method"] == "job.progress"));
    assert!(
        !connection.notifications.is_empty(),
        "a load that was asked to tell of its progress told nothing"
    );

    // By its digest from now on, for this tenant.
    let digest = json!({"digest": attached.reply["digest"]});
    model.assert_equal(&connection.attach(&digest).unwrap());
    assert_eq!(connection.code("artifact.attach", &json!({"digest": "sha256:00"})), "artifact.not_found");
    let both = json!({"digest": attached.reply["digest"], "source": model.path});
    assert_eq!(connection.code("artifact.attach", &both), "api.bad_params");
}

#[test]
fn a_selection_has_whole_tensors_by_glob_and_slices_along_any_dimension() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 4);
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let select = json!([
        "layers.0.*",
        {"name": "layers.1.attention.weight", "dim": 0, "of": 4, "index": 1},
        {"name": "head.weight", "dim": 1, "of": 8, "index": 7},
    ]);
    let attached = connection.attach(&json!({"source": model.path, "select": select})).unwrap();
    let mut names = attached.names();
    names.sort();
    assert_eq!(
        names,
        ["head.weight", "layers.0.attention.weight", "layers.0.mask", "layers.1.attention.weight"]
    );
    for whole in ["layers.0.attention.weight", "layers.0.mask"] {
        assert!(attached.tensor(whole) == model.contents(whole), "{whole} differs");
    }
    let rows = model.contents("layers.1.attention.weight");
    assert_eq!(attached.view("layers.1.attention.weight")["shape"], json!([256, 1024]));
    assert!(attached.tensor("layers.1.attention.weight") == rows[rows.len() / 4..rows.len() / 2]);
    let columns: Vec<u8> = model
        .contents("head.weight")
        .chunks(5000 * 2)
        .flat_map(|row| row[row.len() / 8 * 7..].to_vec())
        .collect();
    assert_eq!(attached.view("head.weight")["shape"], json!([512, 625]));
    assert!(attached.tensor("head.weight") == columns);

    let mut refused = |select: Value| {
        connection.code("artifact.attach", &json!({"source": model.path, "select": [select]}))
    };
    assert_eq!(refused(json!("nothing.*")), "select.no_match");
    assert_eq!(refused(json!("[")), "select.bad_glob");
    assert_eq!(refused(json!({"name": "head.weight", "dim": 2, "of": 2, "index": 0})), "select.bad_slice");
    assert_eq!(refused(json!({"name": "head.weight", "dim": 0, "of": 3, "index": 0})), "select.bad_slice");
    assert_eq!(refused(json!({"name": "head.weight", "dim": 0, "of": 2, "index": 2})), "select.bad_slice");
}

#[test]
fn a_selection_reads_only_its_own_byte_ranges() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 5, 16, 4 << 20);
    let daemon = Daemon::start(root.path());
    let attached = daemon.connect().attach(&json!({"source": model.path, "select": ["t.0003"]})).unwrap();
    assert!(attached.tensor("t.0003") == model.contents("t.0003"));
    let read = daemon.metric("lodestream_read_bytes_total", &[]);
    // 4 MiB, rounded outwards to blocks.
    assert!((4.0..=12.0).contains(&(read / f64::from(1 << 20))), "{read} bytes read for a tensor of 4 MiB");
}

#[test]
fn gguf_files_have_their_tensor_table() {
    let root = directory();
    fs::create_dir(root.path().join("m")).unwrap();
    let path = root.path().join("m/model.gguf");
    let tensors = model::gguf(&path);
    let daemon = Daemon::start(root.path());
    let attached = daemon.connect().attach(&json!({"source": path})).unwrap();
    assert_eq!(attached.reply["format"], "gguf");
    for (name, dtype, shape, contents) in tensors {
        let view = attached.view(&name);
        assert_eq!((text(&view["dtype"]), &view["shape"]), (dtype, &json!(shape)));
        assert!(attached.tensor(&name) == contents, "{name} differs");
    }
    assert!(attached.file("model.gguf") == fs::read(&path).unwrap());
}

#[test]
fn any_other_file_is_plain_bytes() {
    let root = directory();
    let path = root.path().join("vocabulary.bin");
    let contents = model::Tensor::new("plain", "U8", &[3_000_001]).contents(6);
    fs::write(&path, &contents).unwrap();
    let daemon = Daemon::start(root.path());
    let attached = daemon.connect().attach(&json!({"source": path})).unwrap();
    assert_eq!(attached.reply["format"], "plain");
    assert!(attached.names().is_empty());
    assert!(attached.file("vocabulary.bin") == contents);
}

#[test]
fn a_symbolic_link_that_stays_below_the_root_is_followed() {
    let root = directory();
    let model = Model::uniform(&root.path().join("blobs"), 7, 2, 100_000);
    let snapshot = root.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    let name = model.shards()[0].file_name().unwrap().to_owned();
    symlink(std::path::Path::new("../blobs").join(&name), snapshot.join("model.safetensors")).unwrap();
    let daemon = Daemon::start(root.path());
    model.assert_equal(&daemon.connect().attach(&json!({"source": snapshot})).unwrap());
}

#[test]
fn files_that_the_client_opened_are_loaded_with_its_rights() {
    let (root, elsewhere) = (directory(), directory());
    let model = Model::mixed(&elsewhere.path().join("m"), 8);
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let outside = json!({"source": model.path});
    assert_eq!(connection.code("artifact.attach", &outside), "source.file.outside_root");
    let shards = model.shards();
    let files: Vec<File> = shards.iter().map(|path| File::open(path).unwrap()).collect();
    let names: Vec<&str> = shards.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    model.assert_equal(&connection.attach_files(&files, &names).unwrap());
    let missing = connection.code("artifact.attach", &json!({"source": {"fds": 1}}));
    assert_eq!(missing, "source.fds_invalid");
}

#[test]
fn two_requests_for_one_artifact_share_one_job() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 9);
    let daemon = Daemon::start(root.path());
    let (mut first, mut second) = (daemon.connect(), daemon.connect());
    let ids = [&mut first, &mut second]
        .map(|connection| connection.send("artifact.attach", &json!({"source": model.path})));
    model.assert_equal(&first.attached(ids[0]).unwrap());
    model.assert_equal(&second.attached(ids[1]).unwrap());
    assert_eq!(daemon.metric("lodestream_jobs_ended_total", &["state=\"done\""]), 1.0);
    let read = daemon.metric("lodestream_read_bytes_total", &[]);
    assert!(read < 1.5 * model.bytes() as f64, "{read} bytes read for a model of {}", model.bytes());
}

#[test]
fn the_least_recently_used_goes_first_and_a_pinned_one_stays() {
    let root = directory();
    let models: Vec<Model> = (0..4)
        .map(|index| Model::uniform(&root.path().join(format!("m{index}")), index, 4, 10 << 20))
        .collect();
    // Room for two of the four.
    let daemon = Options::new(root.path()).budget("100MiB").start();
    let mut connection = daemon.connect();
    let resident = |connection: &mut common::wire::Connection| {
        let reply = connection.call("artifact.list", &json!({})).unwrap();
        let mut names: Vec<String> = list(&reply["artifacts"])
            .iter()
            .filter(|artifact| artifact["state"] == "resident")
            .map(|artifact| text(&artifact["source"]).rsplit('/').next().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    connection.load(&models[0].path);
    connection.load(&models[1].path);
    let first = json!({"source": models[0].path});
    assert_eq!(connection.call("artifact.pin", &first).unwrap()["artifact"]["pinned"], true);
    connection.load(&models[2].path);
    assert_eq!(resident(&mut connection), ["m0", "m2"], "m0 is older than m1, but pinned");
    assert_eq!(connection.code("artifact.evict", &first), "artifact.pinned");
    assert_eq!(connection.call("artifact.unpin", &first).unwrap()["artifact"]["pinned"], false);
    // Used by an attach just now: m2 is the older one.
    let attached = connection.attach(&first).unwrap();
    connection.call("lease.release", &json!({"lease": attached.lease()})).unwrap();
    drop(attached);
    connection.load(&models[3].path);
    assert_eq!(resident(&mut connection), ["m0", "m3"]);
    assert!(daemon.host("resident_bytes") <= 100 << 20);
    assert_eq!(daemon.metric("lodestream_evictions_total", &["reason=\"budget\""]), 2.0);
}

/// Invariant 2: what a cancelled job had taken comes back, once the kernel is done with it.
#[test]
fn a_cancelled_load_gives_everything_back() {
    const BYTES: u64 = 1 << 30;
    let root = directory();
    let mut daemon = Options::new(root.path()).budget("2GiB").start();
    let mut connection = daemon.connect();
    // A load may be faster than its cancellation; then the next one is tried.
    let cancelled = (0..8).any(|attempt| {
        let file = model::sparse(&root.path().join(format!("m{attempt}")), BYTES);
        let job =
            connection.call("artifact.prefetch", &json!({"source": file})).unwrap()["job"]["job"].clone();
        connection.call("job.cancel", &json!({"job": job})).unwrap();
        let ended = connection.wait(&job);
        if ended["state"] == "cancelled" {
            assert_eq!(ended["error"]["code"], "job.cancelled");
            return true;
        }
        connection.call("artifact.evict", &json!({"source": file})).unwrap();
        false
    });
    assert!(cancelled, "no job could be cancelled");
    // A job that nobody waits for any more is cancelled, too; one that was detached goes on.
    let (left, kept) =
        (model::sparse(&root.path().join("left"), BYTES), model::sparse(&root.path().join("kept"), 8 << 20));
    let ids = [
        connection.call("artifact.prefetch", &json!({"source": left})).unwrap()["job"]["job"].clone(),
        connection.call("artifact.prefetch", &json!({"source": kept, "detach": true})).unwrap()["job"]["job"]
            .clone(),
    ];
    drop(connection);
    let mut observer = daemon.connect();
    let states = ids.map(|job| observer.wait(&job)["state"].clone());
    assert!(states[0] == "cancelled" || states[0] == "done", "{states:?}");
    assert_eq!(states[1], "done");
    for file in [left, kept] {
        let _ = observer.call("artifact.evict", &json!({"source": file}));
    }
    drop(observer);
    daemon.assert_idle();
}

#[test]
fn a_job_past_its_deadline_fails_and_the_next_one_does_not() {
    let root = directory();
    let file = model::sparse(&root.path().join("m"), 1 << 30);
    let daemon = Options::new(root.path()).budget("2GiB").start();
    let mut connection = daemon.connect();
    let reply = connection.call("artifact.prefetch", &json!({"source": file, "deadline_ms": 1})).unwrap();
    let job = connection.wait(&reply["job"]["job"]);
    assert_eq!(job["error"]["code"], "job.deadline_exceeded", "{job}");
    assert_eq!(connection.load(&file)["state"], "done");
}

/// Invariant 9: the daemon dying costs its clients nothing that they had attached.
#[test]
fn what_is_attached_stays_after_the_daemon_is_killed_and_the_next_one_loads_again() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 10);
    let socket = root.path().join("s");
    let mut daemon = Options::new(root.path()).budget("512MiB").socket(&socket).start();
    let attached = daemon.connect().attach(&json!({"source": model.path})).unwrap();
    daemon.kill();
    model.assert_equal(&attached);
    // The socket that the dead daemon left behind is taken over.
    let daemon = Options::new(root.path()).budget("512MiB").socket(&socket).start();
    model.assert_equal(&daemon.connect().attach(&json!({"source": model.path})).unwrap());
    model.assert_equal(&attached);
}

#[test]
fn a_file_that_was_replaced_is_loaded_anew_while_the_old_one_stays_with_its_leases() {
    let root = directory();
    let old = Model::uniform(&root.path().join("m"), 11, 3, 1 << 20);
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let before = connection.attach(&json!({"source": old.path})).unwrap();
    let new = Model::uniform(&root.path().join("m"), 12, 3, 1 << 20);
    let after = connection.attach(&json!({"source": new.path})).unwrap();
    new.assert_equal(&after);
    old.assert_equal(&before);
    assert_ne!(before.reply["digest"], after.reply["digest"]);
}

#[test]
fn resolve_describes_without_loading() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 13);
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let described = connection.call("artifact.resolve", &json!({"source": model.path})).unwrap();
    assert_eq!(number(&described["bytes"]), model.bytes());
    assert_eq!(list(&described["tensors"]).len(), model.tensors.len());
    assert_eq!(described["resident"], json!([]));
    assert_eq!(daemon.host("resident_bytes"), 0);
    connection.load(&model.path);
    let described = connection.call("artifact.resolve", &json!({"source": model.path})).unwrap();
    assert_eq!(described["resident"], json!(["host"]));
}

#[test]
fn a_preload_list_is_resident_and_pinned_and_readiness_waits_for_it() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 14);
    let mut daemon = Options::new(root.path())
        .config(&format!("ready_after_preload = true\n[[preload]]\nsource = {:?}\n", model.path))
        .start();
    daemon.until("a ready preload list", |daemon| daemon.page("/ready").0.contains("200"));
    let status = daemon.status();
    assert_eq!(status["preload"][0]["state"], "done", "{status}");
    let reply = daemon.connect().call("artifact.stat", &json!({"source": model.path}));
    // The daemon itself has opened it, so a client names it by source as ever.
    assert_eq!(reply.unwrap()["artifact"]["pinned"], true);
    assert!(daemon.page("/live").0.contains("200"));
}

#[test]
fn sigterm_drains_and_ends_well() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 15);
    let mut daemon = Daemon::start(root.path());
    let attached = daemon.connect().attach(&json!({"source": model.path})).unwrap();
    assert!(daemon.terminate().success());
    assert!(!daemon.socket.exists(), "a daemon that ends well takes its socket away");
    model.assert_equal(&attached);
}

/// Invariant 7: resident or not, a model is for those who may read its files.
#[test]
fn another_tenant_sees_only_what_it_could_read_itself() {
    if !root_or_skip() {
        return;
    }
    let root = directory_for_everyone();
    let model = Model::mixed(&root.path().join("m"), 16);
    let shard = &model.shards()[0];
    set_mode(shard, 0o600);
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let digest = connection.load(&model.path)["digest"].clone();
    let source = json!({"source": model.path});
    tenant::as_nobody(|| {
        let mut nobody = daemon.connect();
        assert_eq!(nobody.call("hello", &json!({})).unwrap()["tenant"], format!("uid:{}", tenant::NOBODY));
        assert_eq!(nobody.code("artifact.attach", &source), "source.file.permission_denied");
        assert_eq!(nobody.code("artifact.attach", &json!({"digest": digest})), "artifact.not_found");
        assert_eq!(nobody.call("artifact.list", &json!({})).unwrap()["artifacts"], json!([]));
    });
    set_mode(shard, 0o644);
    tenant::as_nobody(|| model.assert_equal(&daemon.connect().attach(&source).unwrap()));
}

#[test]
fn many_clients_at_once_share_one_copy() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 17);
    let mut daemon = Daemon::start(root.path());
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut connection = daemon.connect();
                model.assert_equal(&connection.attach(&json!({"source": model.path})).unwrap());
            });
        }
    });
    assert_eq!(daemon.metric("lodestream_jobs_ended_total", &["state=\"done\""]), 1.0);
    daemon.connect().call("artifact.evict", &json!({"source": model.path})).unwrap();
    daemon.assert_idle();
}
