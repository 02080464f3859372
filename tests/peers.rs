//! Artifacts from the memory of other nodes: real daemons, real TLS over loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod common;

use std::fs;
use std::net::SocketAddr;

use common::daemon::Daemon;
use common::gate::Gate;
use common::gpu::{self, on_gpus};
use common::model::Model;
use common::peers::{Authority, address, options};
use common::wire::{Connection, list, number, text};
use common::{directory, root_or_skip, tenant};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// A gate that stays open.
const OPEN: u64 = u64::MAX;

/// A node that has a model resident.
struct Holder {
    daemon: Daemon,
    model: Model,
    address: SocketAddr,
    source: String,
    _root: tempfile::TempDir,
}

/// A daemon called `node` that has this model, and serves it.
fn holder(authority: &Authority, node: &str, make: impl FnOnce(&std::path::Path) -> Model) -> Holder {
    let root = directory();
    let model = make(&root.path().join("m"));
    let listen = address();
    let daemon = options(root.path(), &authority.config(node, Some(listen), &[])).start();
    let job = daemon.connect().load(&model.path);
    let source = format!("peer://{}", text(&job["digest"]));
    Holder { daemon, model, address: listen, source, _root: root }
}

/// A model of 64 chunks and a header.
fn large(path: &std::path::Path) -> Model {
    Model::uniform(path, 7, 16, 4 * MIB)
}

/// A daemon that has no model.
fn taker(authority: &Authority, node: &str, listen: Option<SocketAddr>, peers: &[SocketAddr]) -> Daemon {
    let root = directory();
    options(root.path(), &authority.config(node, listen, peers)).start()
}

fn prefetch(connection: &mut Connection, source: &str) -> Value {
    connection.call("artifact.prefetch", &json!({"source": source, "detach": true})).unwrap()["job"].clone()
}

/// Invariants 6, 10 and 11.
#[test]
fn an_artifact_comes_from_the_memory_of_a_peer() {
    let authority = Authority::of(&["a", "b"]);
    let mut a = holder(&authority, "a", |path| Model::mixed(path, 1));
    let read = a.daemon.metric("lodestream_read_bytes_total", &[]);
    let mut b = taker(&authority, "b", None, &[a.address]);
    let mut connection = b.connect();
    let attached = connection.attach(&json!({"source": a.source})).unwrap();
    a.model.assert_equal(&attached);
    for shard in a.model.shards() {
        let name = shard.file_name().unwrap().to_str().unwrap();
        assert!(attached.file(name) == fs::read(&shard).unwrap(), "{name} differs");
    }
    assert_eq!(format!("peer://{}", text(&attached.reply["digest"])), a.source);

    let jobs = connection.call("job.list", &json!({})).unwrap();
    let job = &jobs["jobs"][0];
    assert_eq!(job["source"], "peer", "{job}");
    assert_eq!(job["path"], json!({"tcp": job["total"]}));
    assert_eq!(job["peers"][0]["node"], "a");
    assert_eq!(job["peers"][0]["bytes"], job["total"]);
    let total = number(&job["total"]) as f64;
    assert_eq!(b.metric("lodestream_read_bytes_total", &["source=\"peer\"", "path=\"tcp\""]), total);
    assert_eq!(
        a.daemon.metric("lodestream_read_bytes_total", &[]),
        read,
        "nothing was read from storage again"
    );
    assert_eq!(a.daemon.metric("lodestream_peer_sent_bytes_total", &[]), total);

    // What is resident is attached, also by its digest alone, and not brought again.
    connection.attach(&json!({"source": a.source, "wait": false})).unwrap();
    connection.attach(&json!({"digest": attached.reply["digest"]})).unwrap();
    let described = connection.call("artifact.resolve", &json!({"source": a.source})).unwrap();
    assert_eq!(described["resident"], json!(["host"]));

    // It outlives the node that it came from.
    a.daemon.kill();
    a.model.assert_equal(&attached);
    drop(connection);
    b.until("leases given back", |daemon| number(&daemon.status()["leases"]) == 0);
    b.connect().call("artifact.evict", &json!({"source": a.source})).unwrap();
    drop(attached);
    b.assert_idle();
}

#[test]
fn selected_tensors_come_from_a_peer() {
    let authority = Authority::of(&["a", "b"]);
    let a = holder(&authority, "a", |path| Model::mixed(path, 2));
    let b = taker(&authority, "b", None, &[a.address]);
    let mut connection = b.connect();
    let rows = json!({"name": "layers.1.attention.weight", "dim": 1, "of": 4, "index": 3});
    let request = json!({"source": a.source, "select": ["odd.bias", rows]});
    let attached = connection.attach(&request).unwrap();
    assert!(attached.tensor("odd.bias") == a.model.contents("odd.bias"));
    let whole = a.model.contents("layers.1.attention.weight");
    let last_quarter: Vec<u8> = whole.chunks(4096).flat_map(|row| row[3072..].to_vec()).collect();
    assert!(attached.tensor("layers.1.attention.weight") == last_quarter);
}

/// What goes to a (simulated) GPU is resident on the host tier, too.
#[test]
fn to_a_gpu_it_goes_by_way_of_the_host_tier() {
    on_gpus!(256);
    let authority = Authority::of(&["a", "b"]);
    let a = holder(&authority, "a", |path| Model::mixed(path, 8));
    let root = directory();
    let config = authority.config("b", None, &[a.address]);
    let b = options(root.path(), &config).flags(&["--gpu-budget", "128MiB"]).start();
    let (_client, attached) = gpu::attach(&b, &json!({"source": a.source, "device": "gpu:0"}));
    gpu::verify(&attached.unwrap(), &a.model);
    let mut connection = b.connect();
    let jobs = connection.call("job.list", &json!({})).unwrap();
    let paths = &jobs["jobs"][0]["path"];
    assert_eq!(number(&paths["tcp"]), a.model.bytes(), "{jobs}");
    assert!(number(&paths["host"]) > 0, "{jobs}");
    assert_eq!(number(&jobs["jobs"][0]["bytes"]), number(&jobs["jobs"][0]["total"]), "{jobs}");
    let on_host = connection.attach(&json!({"source": a.source, "wait": false})).unwrap();
    a.model.assert_equal(&on_host);
}

#[test]
fn who_may_load_by_digest_is_configured() {
    if !root_or_skip() {
        return;
    }
    let authority = Authority::of(&["a", "b"]);
    let a = holder(&authority, "a", |path| Model::mixed(path, 3));
    let root = directory();
    let config = authority.config("b", None, &[a.address]);
    let b = options(root.path(), &config).start();
    let request = json!({"source": a.source});
    let refused = tenant::as_nobody(|| b.connect().code("artifact.attach", &request));
    assert_eq!(refused, "api.forbidden");
    let config = config + &format!("tenants = [{}]\n", tenant::NOBODY);
    let b = options(root.path(), &config).start();
    let allowed = tenant::as_nobody(|| b.connect().call("artifact.prefetch", &request).unwrap());
    assert_eq!(allowed["job"]["artifact"], a.source);
}

#[test]
fn what_nobody_has_is_said_and_nothing_is_kept() {
    let authority = Authority::of(&["a", "b"]);
    let a = holder(&authority, "a", |path| Model::mixed(path, 4));
    // One that is not there, and one that has something else.
    let mut b = taker(&authority, "b", None, &[address(), a.address]);
    let mut connection = b.connect();
    let unknown = format!("peer://sha256:{}", "0".repeat(64));
    let code = connection.code("artifact.attach", &json!({"source": unknown}));
    assert!(["peer.not_found", "peer.connect"].contains(&code.as_str()), "{code}");
    for wrong in ["peer://", "peer://sha256:00", "peer://SHA256:x"] {
        assert_eq!(connection.code("artifact.attach", &json!({"source": wrong})), "source.uri_invalid");
    }
    drop(connection);
    b.assert_idle();
}

/// The peer dies in the middle: the next one goes on where it was, and no byte comes twice.
#[test]
fn a_peer_that_dies_in_mid_transfer_is_replaced_by_the_next() {
    let authority = Authority::of(&["a", "b", "c"]);
    let a = holder(&authority, "a", large);
    let c = holder(&authority, "c", large);
    assert_eq!(a.source, c.source);
    let (first, second) = (Gate::to(a.address, 20 * MIB), Gate::to(c.address, 0));
    let b = taker(&authority, "b", None, &[first.address, second.address]);
    let mut connection = b.connect();
    second.allow(MIB / 2);
    let job = prefetch(&mut connection, &a.source);
    first.wait_until_used_up();
    first.cut();
    second.allow(OPEN);
    let job = connection.wait(&job["job"]);
    assert_eq!(job["state"], "done", "{job}");
    assert_eq!(job["path"], json!({"tcp": job["total"]}), "no byte twice");
    let peers = list(&job["peers"]);
    let of = |node: &str| peers.iter().find(|peer| peer["node"] == node).unwrap();
    assert!(number(&of("a")["bytes"]) > 0 && number(&of("c")["bytes"]) > 0, "{job}");
    assert!(text(&of("a")["left"]).starts_with("peer."), "{job}");
    let attached = connection.attach(&json!({"source": a.source})).unwrap();
    a.model.assert_equal(&attached);
}

/// All peers are gone in the middle: what is missing comes from the files.
#[test]
fn files_give_what_peers_do_not() {
    let authority = Authority::of(&["a", "b"]);
    let a = holder(&authority, "a", large);
    let gate = Gate::to(a.address, OPEN);
    let root = directory();
    let model = large(&root.path().join("m"));
    let config = authority.config("b", None, &[gate.address]) + "prefer = true\n";
    let b = options(root.path(), &config).start();
    let mut connection = b.connect();
    // The first time nobody knows the digest.
    assert_eq!(connection.load(&model.path)["source"], "file");
    let evict = json!({"source": model.path});
    connection.call("artifact.evict", &evict).unwrap();
    assert_eq!(connection.load(&model.path)["source"], "peer");
    connection.call("artifact.evict", &evict).unwrap();

    gate.limit(20 * MIB);
    let job = prefetch(&mut connection, model.path.to_str().unwrap());
    gate.wait_until_used_up();
    gate.cut();
    let job = connection.wait(&job["job"]);
    assert_eq!((job["state"].clone(), job["source"].clone()), (json!("done"), json!("peer,file")), "{job}");
    let paths = job["path"].as_object().unwrap();
    assert_eq!(paths.values().map(number).sum::<u64>(), number(&job["total"]), "no byte twice: {job}");
    let attached = connection.attach(&json!({"source": model.path})).unwrap();
    model.assert_equal(&attached);
}

/// A node that is still loading gives on what it has.
#[test]
fn a_node_that_still_loads_already_serves() {
    let authority = Authority::of(&["a", "b", "c"]);
    let a = holder(&authority, "a", large);
    let gate = Gate::to(a.address, 0);
    gate.allow(MIB / 2);
    let middle = address();
    let mut b = taker(&authority, "b", Some(middle), &[gate.address]);
    let mut at_b = b.connect();
    let first = prefetch(&mut at_b, &a.source);
    gate.allow(16 * MIB);
    b.until("bytes at b", |b| came(b) > 4 * MIB);

    let mut c = taker(&authority, "c", None, &[middle]);
    let mut at_c = c.connect();
    let second = prefetch(&mut at_c, &a.source);
    c.until("bytes at c", |c| came(c) > 4 * MIB);
    assert_eq!(at_b.call("job.get", &json!({"job": first["job"]})).unwrap()["job"]["state"], "running");

    gate.allow(OPEN);
    for (connection, job) in [(&mut at_b, first), (&mut at_c, second)] {
        let job = connection.wait(&job["job"]);
        assert_eq!(job["state"], "done", "{job}");
        let attached = connection.attach(&json!({"source": a.source})).unwrap();
        a.model.assert_equal(&attached);
    }
    // What a sent came once.
    let sent = a.daemon.metric("lodestream_peer_sent_bytes_total", &[]);
    assert_eq!(sent, b.metric("lodestream_read_bytes_total", &["path=\"tcp\""]));
}

/// Bytes that have come to the first job of a daemon.
fn came(daemon: &Daemon) -> u64 {
    number(&daemon.connect().call("job.list", &json!({})).unwrap()["jobs"][0]["bytes"])
}

/// One node has the model on its drive, three others want it at once, and one of those dies.
#[test]
fn storage_is_read_once_whoever_dies() {
    let authority = Authority::of(&["a", "b", "c", "d"]);
    for victim in [0, 1] {
        let a = holder(&authority, "a", large);
        let gates = [0, 1, 2].map(|_| Gate::to(a.address, MIB));
        let mut listening = Vec::new();
        let mut takers = Vec::new();
        for (node, gate) in ["b", "c", "d"].iter().zip(&gates) {
            let peers: Vec<_> = listening.iter().copied().chain([gate.address]).collect();
            let own = address();
            let taker = taker(&authority, node, Some(own), &peers);
            let mut connection = taker.connect();
            let job = prefetch(&mut connection, &a.source);
            listening.push(own);
            takers.push((taker, connection, job));
            if takers.len() == 1 {
                gate.allow(20 * MIB);
            }
            takers.last_mut().unwrap().0.until("the first bytes", |daemon| came(daemon) > 2 * MIB);
        }
        let (mut dead, _, _) = takers.remove(victim);
        dead.kill();
        gates.iter().for_each(|gate| gate.allow(OPEN));
        for (taker, connection, job) in &mut takers {
            let job = connection.wait(&job["job"]);
            assert_eq!(job["state"], "done", "{job}");
            assert_eq!(job["path"], json!({"tcp": job["total"]}), "no byte twice");
            a.model.assert_equal(&connection.attach(&json!({"source": a.source})).unwrap());
            assert_eq!(taker.metric("lodestream_read_bytes_total", &["source=\"file\""]), 0.0);
        }
        let read = a.daemon.metric("lodestream_read_bytes_total", &["source=\"file\""]);
        assert_eq!(read, a.model.bytes() as f64, "storage is read once");
    }
}

/// A load that fails takes its memory back from those that it served, and they go elsewhere.
#[test]
fn a_load_that_fails_lets_go_of_those_that_it_served() {
    let authority = Authority::of(&["a", "b", "c"]);
    let a = holder(&authority, "a", large);
    let gate = Gate::to(a.address, 8 * MIB);
    let middle = address();
    let mut b = taker(&authority, "b", Some(middle), &[gate.address]);
    let mut at_b = b.connect();
    let first = at_b.call("artifact.prefetch", &json!({"source": a.source})).unwrap()["job"].clone();
    gate.wait_until_used_up();
    let c = taker(&authority, "c", None, &[middle, a.address]);
    let mut at_c = c.connect();
    let second = prefetch(&mut at_c, &a.source);
    at_b.call("job.cancel", &json!({"job": first["job"]})).unwrap();
    let job = at_c.wait(&second["job"]);
    assert_eq!(job["state"], "done", "{job}");
    drop(at_b);
    b.assert_idle();
}

#[test]
fn the_operator_sees_who_gave_what() {
    let authority = Authority::of(&["a", "b"]);
    let a = holder(&authority, "a", |path| Model::mixed(path, 5));
    let b = taker(&authority, "b", None, &[a.address]);
    let mut connection = b.connect();
    connection.attach(&json!({"source": a.source})).unwrap();
    let peers = connection.call("node.peers", &json!({})).unwrap();
    let peer = &peers["peers"][0];
    assert_eq!((peer["address"].clone(), peer["node"].clone()), (json!(a.address.to_string()), json!("a")));
    assert_eq!((number(&peer["jobs"]), number(&peer["left"])), (1, 0));
    assert_eq!(peers["directory"]["backend"], "static");
    let at_a = a.daemon.connect().call("node.peers", &json!({})).unwrap();
    assert_eq!(at_a["listen"], a.address.to_string());
    assert_eq!(number(&at_a["offers"]), 1);
    assert_eq!(number(&at_a["sent_bytes"]), number(&peer["bytes"]));
}

/// What `lodestream doctor peer` found, by the name of the check.
fn doctor(authority: &Authority, node: &str, peer: &str, digest: Option<&str>) -> Vec<(String, String)> {
    let config = authority.path("doctor.toml");
    fs::write(&config, authority.config(node, None, &[])).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lodestream"));
    command.args(["--json", "doctor", "peer", peer, "--config"]).arg(config);
    command.args(digest.map(|digest| ["--digest", digest]).iter().flatten());
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let failed = list(&report["checks"]).iter().any(|check| check["verdict"] == "fail");
    assert_eq!(output.status.success(), !failed, "{report}");
    let checks = list(&report["checks"]).iter();
    checks.map(|check| (text(&check["check"]).to_owned(), text(&check["verdict"]).to_owned())).collect()
}

#[test]
fn the_doctor_goes_to_a_peer_step_by_step() {
    let authority = Authority::of(&["a", "b"]);
    let a = holder(&authority, "a", |path| Model::mixed(path, 6));
    let digest = a.source.strip_prefix("peer://");
    let named = |checks: &[(&str, &str)]| -> Vec<(String, String)> {
        checks.iter().map(|(name, verdict)| ((*name).to_owned(), (*verdict).to_owned())).collect()
    };
    let well = named(&[("peer_name", "ok"), ("peer_tcp", "ok"), ("peer_tls", "ok"), ("peer_rate", "ok")]);
    assert_eq!(doctor(&authority, "b", &a.address.to_string(), digest), well);
    let unknown =
        named(&[("peer_name", "ok"), ("peer_tcp", "ok"), ("peer_tls", "ok"), ("peer_artifact", "fail")]);
    let other = format!("sha256:{}", "0".repeat(64));
    assert_eq!(doctor(&authority, "b", &a.address.to_string(), Some(&other)), unknown);
    let nobody = named(&[("peer_name", "ok"), ("peer_tcp", "fail")]);
    assert_eq!(doctor(&authority, "b", &address().to_string(), None), nobody);
    let strangers = Authority::of(&["b"]);
    let refused = named(&[("peer_name", "ok"), ("peer_tcp", "ok"), ("peer_tls", "fail")]);
    assert_eq!(doctor(&strangers, "b", &a.address.to_string(), None), refused);
    assert_eq!(doctor(&authority, "b", "no-such-host.invalid:1", None), named(&[("peer_name", "fail")]));
}
