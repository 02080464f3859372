//! What an operator relies on: reload, readiness told to systemd, the ready pool, a page cache that stays as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use common::daemon::{Daemon, Options};
use common::directory;
use common::model::Model;
use common::wire::{list, number, text};
use lodestream::sys::page_cache;
use serde_json::json;

const MIB: u64 = 1 << 20;

#[test]
fn sighup_takes_up_what_may_change_and_keeps_what_may_not() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 30, 1, MIB);
    let before = "[host]\nbudget_bytes = \"256MiB\"\n";
    let mut daemon = Options::new(root.path()).config(before).start();
    assert_eq!(daemon.host("budget_bytes"), 256 * MIB);
    let preload = format!("[[preload]]\nsource = {:?}\n", model.path);
    daemon.reload(&format!("[host]\nbudget_bytes = \"128MiB\"\n[data_plane]\ndepth = 2\n{preload}"));
    daemon.until("the new budget", |daemon| daemon.host("budget_bytes") == 128 * MIB);
    assert_eq!(number(&daemon.status()["shards"][0]["depth"]), 8, "needs a restart");
    daemon.until("the new preload list", |daemon| {
        list(&daemon.status()["preload"]).first().is_some_and(|entry| entry["state"] == "done")
    });
    // A mistake changes nothing.
    daemon.reload("[host]\nbudget_bytes = \"no size\"\n");
    daemon.until("the refusal", |daemon| daemon.log().contains("config.invalid"));
    assert_eq!(daemon.host("budget_bytes"), 128 * MIB);
}

#[test]
fn systemd_is_told_when_it_is_ready_and_when_it_stops() {
    let root = directory();
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("notify");
    let systemd = UnixDatagram::bind(&socket).unwrap();
    systemd.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut daemon = Options::new(root.path()).notify(&socket).start();
    let mut said = [0; 256];
    let bytes = systemd.recv(&mut said).unwrap();
    assert!(said[..bytes].starts_with(b"READY=1"));
    assert!(daemon.terminate().success());
    let bytes = systemd.recv(&mut said).unwrap();
    assert!(said[..bytes].starts_with(b"STOPPING=1"));
}

#[test]
fn the_ready_pool_is_filled_used_and_filled_again_within_the_budget() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 31, 1, 8 * MIB);
    let mut daemon = Options::new(root.path()).budget("256MiB").pool("128MiB").start();
    daemon.until("a full pool", |daemon| daemon.host("pool_bytes") == 128 * MIB);
    let mut connection = daemon.connect();
    model.assert_equal(&connection.attach(&json!({"source": model.path})).unwrap());
    daemon.until("a full pool again", |daemon| {
        let (pool, regions) = (daemon.host("pool_bytes"), daemon.host("resident_bytes"));
        assert!(pool + regions <= 256 * MIB);
        pool == 128 * MIB
    });
    // A model that needs all of the budget takes the pool's memory too.
    let large = Model::uniform(&root.path().join("large"), 32, 1, 200 * MIB);
    drop(connection);
    let attached = daemon.connect().attach(&json!({"source": large.path})).unwrap();
    large.assert_equal(&attached);
    assert!(daemon.host("pool_bytes") + daemon.host("resident_bytes") <= 256 * MIB);
}

/// Pages of `model`'s only file that the page cache holds.
fn cached(model: &Model) -> u64 {
    let file = File::open(&model.shards()[0]).unwrap();
    page_cache::cached_pages(file.as_fd(), 0, file.metadata().unwrap().len())
}

#[test]
fn the_page_cache_is_used_and_never_left_fuller() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 33, 1, 32 * MIB);
    let file = File::open(&model.shards()[0]).unwrap();
    let bytes = file.metadata().unwrap().len();
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let source = json!({"source": model.path});

    file.sync_all().unwrap();
    page_cache::drop_pages(file.as_fd(), 0, bytes);
    assert_eq!(cached(&model), 0);
    let job = connection.load(&model.path);
    assert!(job["path"].get("cached").is_none(), "{job}");
    assert_eq!(cached(&model), 0, "the header was read through the cache and left it again");
    connection.call("artifact.evict", &source).unwrap();

    fs::read(&model.shards()[0]).unwrap();
    let before = cached(&model);
    assert_eq!(before, bytes.div_ceil(4096));
    let job = connection.load(&model.path);
    assert_eq!(number(&job["path"]["cached"]), bytes, "{job}");
    assert_eq!(cached(&model), before);
    model.assert_equal(&connection.attach(&source).unwrap());
}

#[test]
fn files_of_one_name_that_clients_send_do_not_take_each_others_place() {
    let root = directory();
    let models = [34, 35].map(|seed| Model::uniform(&root.path().join(format!("m{seed}")), seed, 1, MIB));
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    for model in &models {
        let file = File::open(&model.shards()[0]).unwrap();
        let attached = connection.attach_files(&[file], &["model.safetensors"]).unwrap();
        model.assert_equal(&attached);
    }
    drop(connection);
    let artifacts = daemon.connect().call("artifact.list", &json!({})).unwrap();
    let states: Vec<&str> =
        list(&artifacts["artifacts"]).iter().map(|artifact| text(&artifact["state"])).collect();
    assert_eq!(states, ["resident", "resident"]);
}
