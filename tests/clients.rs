//! Clients that go wrong, or go far: what each is answered, and that it takes nothing from the others.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Options};
use common::model::Model;
use common::wire::list;
use common::{directory, directory_for_everyone, root_or_skip, tenant};
use serde_json::{Value, json};

/// Invariant 4: replies that wait for their reader count as unanswered requests.
#[test]
fn a_client_that_asks_on_and_never_reads_is_refused() {
    const IN_FLIGHT_MAX: usize = 4;
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 9, 8000, 64);
    let limits = format!("[limits]\nrequests_in_flight_max = {IN_FLIGHT_MAX}\nwrite_timeout_ms = 60000\n");
    let mut daemon = Options::new(root.path()).config(&limits).start();
    let mut deaf = daemon.connect();
    // One reply is being written, one more than the limit wait in the queue, as many as the limit for the queue.
    for sent in 1..=1 + (IN_FLIGHT_MAX + 1) + IN_FLIGHT_MAX + 1 {
        deaf.send("artifact.resolve", &json!({"source": model.path}));
        daemon.until("the request's end", |daemon| {
            let ended = daemon.metric("lodestream_requests_total", &["method=\"artifact.resolve\""]);
            ended >= sent as f64
        });
    }
    assert_eq!(daemon.metric("lodestream_errors_total", &["code=\"api.too_many_requests\""]), 1.0);
    drop(deaf);
    daemon.assert_idle();
}

/// Invariant 4: taking a little now and then does not make a reply last for ever.
#[test]
fn a_client_that_takes_a_reply_in_morsels_is_cut_off() {
    const MORSEL_BYTES: usize = 4 << 10;
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 17, 12_000, 64);
    let mut daemon = Options::new(root.path()).config("[limits]\nwrite_timeout_ms = 300\n").start();
    let mut slow = daemon.connect();
    slow.send("artifact.resolve", &json!({"source": model.path}));
    daemon.until("the end of the slow connection", |daemon| {
        let _ = slow.take(MORSEL_BYTES);
        daemon.metric("lodestream_errors_total", &["code=\"api.slow_reader\""]) >= 1.0
    });
}

/// A lease that the client cannot learn of is none.
#[test]
fn an_attach_whose_reply_is_too_large_keeps_no_lease() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 12, 4000, 64);
    let daemon = Options::new(root.path()).config("[limits]\nreply_bytes_max = 65536\n").start();
    let mut connection = daemon.connect();
    let source = json!({"source": model.path});
    assert_eq!(connection.code("artifact.attach", &source), "api.reply_too_large");
    assert_eq!(daemon.status()["leases"], 0);
    assert_eq!(daemon.metric("lodestream_leases", &[]), 0.0);
    assert_eq!(daemon.metric("lodestream_errors_total", &["code=\"api.reply_too_large\""]), 1.0);
    connection.call("artifact.evict", &source).unwrap();
}

/// Each request has its own time: one that began is not charged for those before it.
#[test]
fn a_client_that_always_has_a_request_under_way_is_served() {
    let root = directory();
    let daemon = Options::new(root.path()).config("[limits]\nframe_timeout_ms = 300\n").start();
    let mut busy = daemon.connect();
    let line = br#"{"jsonrpc": "2.0", "id": 1, "method": "hello"}"#;
    let (head, tail) = line.split_at(10);
    busy.send_raw(head).unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(900) {
        busy.send_raw(&[tail, b"\n", head].concat()).unwrap();
        let reply = busy.line().expect("an open connection");
        assert!(reply["error"].is_null(), "{reply}");
    }
}

/// A descriptor is never taken for one of another request.
#[test]
fn the_descriptors_of_a_refused_request_are_not_those_of_the_next() {
    let root = directory();
    let models = [13, 14].map(|seed| Model::uniform(&root.path().join(format!("m{seed}")), seed, 1, 4096));
    let files = models.each_ref().map(|model| File::open(&model.shards()[0]).unwrap());
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let source = json!({"fds": 1, "names": ["model.safetensors"]});
    let refusals = [
        ("artifact.attach", json!({"source": source, "misspelt": 1})),
        ("artifact.attach", json!({"source": {"fds": 2}})),
        ("artifact.nothing", json!({"source": source})),
    ];
    for (number, (method, params)) in (0_u64..).zip(refusals) {
        let line = |id: u64, method: &str, params: &Value| {
            json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).to_string() + "\n"
        };
        let refused = line(2 * number, method, &params);
        let next = line(2 * number + 1, "artifact.attach", &json!({"source": source}));
        // The next request has begun when this one is refused.
        let (head, tail) = next.split_at(20);
        connection.send_raw_with_fds((refused + head).as_bytes(), &[files[0].as_fd()]);
        assert!(connection.reply(2 * number).is_err(), "{method} {params}");
        connection.send_raw_with_fds(tail.as_bytes(), &[files[1].as_fd()]);
        models[1].assert_equal(&connection.attached(2 * number + 1).unwrap());
    }
}

/// JSON-RPC 2.0: who gives no id wants no answer.
#[test]
fn a_request_without_an_id_is_not_answered_and_leaves_no_lease() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 15, 1, 4096);
    let mut daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    connection.attach(&json!({"source": model.path})).unwrap();
    for (method, params) in [
        ("node.status", json!({})),
        ("node.nothing", json!({})),
        ("job.get", json!({"job": 99})),
        ("artifact.attach", json!({"source": model.path})),
    ] {
        let line = json!({"jsonrpc": "2.0", "method": method, "params": params});
        connection.send_raw(format!("{line}\n").as_bytes()).unwrap();
    }
    daemon.until("all four", |daemon| {
        daemon.metric("lodestream_requests_total", &["method=\"artifact.attach\""]) >= 2.0
    });
    // Replies are answered in the order in which they are ready: were there others, they would come first.
    let id = connection.send("hello", &json!({}));
    assert_eq!(connection.line().unwrap()["id"], id);
    assert_eq!(daemon.status()["leases"], 1);
}

#[test]
fn what_is_preloaded_is_for_the_operator_only() {
    if !root_or_skip() {
        return;
    }
    let root = directory_for_everyone();
    let model = Model::uniform(&root.path().join("m"), 16, 1, 4096);
    let path = model.path.to_str().unwrap();
    let daemon = Options::new(root.path()).budget("512MiB").flags(&["--preload", path]).start();
    assert_eq!(list(&daemon.status()["preload"]).len(), 1);
    assert!(list(&tenant::as_nobody(|| daemon.status())["preload"]).is_empty());
}
