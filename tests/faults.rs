//! What goes wrong in the world, and the code that each fault is answered with.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use common::daemon::{Daemon, Options};
use common::model::{self, Model};
use common::wire::{Connection, list, number, text};
use common::{directory, directory_for_everyone, root_or_skip, set_mode, tenant};
use serde_json::{Value, json};

/// Large enough to be caught in mid-load: some hundred milliseconds, of which the first block takes a few.
const CATCHABLE_BYTES: u64 = 1 << 30;
/// A load may be over before the fault is there; then it is tried again.
const ATTEMPTS: usize = 10;

/// Starts loads of fresh sparse models until `fault` has struck one in the middle; how that job ended, and its file.
fn struck_in_mid_load(daemon: &Daemon, root: &Path, fault: impl Fn(&Path)) -> (Value, PathBuf) {
    let mut connection = daemon.connect();
    for attempt in 0..ATTEMPTS {
        let file = model::sparse(&root.join(format!("m{attempt}")), CATCHABLE_BYTES);
        let job = connection.call("artifact.prefetch", &json!({"source": file})).unwrap()["job"].take();
        let mut seen = job.clone();
        while seen["state"] == "queued" || (seen["state"] == "running" && number(&seen["bytes"]) == 0) {
            seen = connection.call("job.get", &json!({"job": job["job"]})).unwrap()["job"].take();
        }
        let struck = seen["state"] == "running" && number(&seen["bytes"]) < CATCHABLE_BYTES / 2;
        if struck {
            fault(&file);
        }
        let ended = connection.wait(&job["job"]);
        if struck {
            return (ended, file);
        }
        connection.call("artifact.evict", &json!({"source": file})).unwrap();
    }
    panic!("no load could be caught in the middle");
}

fn large(root: &Path) -> Options {
    Options::new(root).budget("2GiB")
}

/// Invariant 5: a read that ends early is noticed in one place, whatever the reader.
#[test]
fn a_file_truncated_in_mid_read_fails_the_load_and_gives_its_memory_back() {
    for reader in ["io_uring", "preadv2"] {
        let root = directory();
        let mut daemon = large(root.path()).flags(&["--reader", reader]).start();
        let (job, _) = struck_in_mid_load(&daemon, root.path(), |file| {
            File::options().write(true).open(file).unwrap().set_len(1 << 20).unwrap();
        });
        assert_eq!(job["state"], "failed", "{reader}: {job}");
        let code = text(&job["error"]["code"]);
        assert!(["source.file.short_read", "source.file.changed"].contains(&code), "{reader}: {job}");
        assert_eq!(job["error"]["retryable"], true);
        assert!(daemon.metric("lodestream_errors_total", &[&format!("code=\"{code}\"")]) >= 1.0);
        daemon.assert_idle();
    }
}

#[test]
fn a_file_deleted_in_mid_read_is_loaded_whole_or_not_at_all() {
    let root = directory();
    let mut daemon = large(root.path()).start();
    let (job, file) = struck_in_mid_load(&daemon, root.path(), |file| fs::remove_file(file).unwrap());
    // The open file has all its bytes still, but its time of change is another: either answer is right.
    assert!(job["state"] == "done" || job["error"]["code"] == "source.file.changed", "{job}");
    let code = daemon.connect().code("artifact.attach", &json!({"source": file}));
    assert_eq!(code, "source.file.not_found", "what is gone from the drive cannot be opened any more");
    // What nobody can name any more takes no memory for ever: the next load takes it.
    let next = model::sparse(&root.path().join("next"), 1800 << 20);
    assert_eq!(daemon.connect().load(&next)["state"], "done");
    daemon.connect().call("artifact.evict", &json!({"source": next})).unwrap();
    daemon.assert_idle();
}

#[test]
fn a_file_replaced_in_mid_read_is_never_mixed_with_its_successor() {
    let root = directory();
    let daemon = large(root.path()).start();
    let successor = Model::uniform(&root.path().join("new"), 1, 2, 1 << 20);
    let replacement = &successor.shards()[0];
    let (job, file) = struck_in_mid_load(&daemon, root.path(), |file| fs::rename(replacement, file).unwrap());
    assert!(job["state"] == "done" || job["error"]["code"] == "source.file.changed", "{job}");
    successor.assert_equal(&daemon.connect().attach(&json!({"source": file})).unwrap());
}

#[test]
fn a_file_written_in_place_in_mid_read_fails_the_load() {
    use std::os::unix::fs::FileExt;
    let root = directory();
    let daemon = large(root.path()).start();
    let (job, _) = struck_in_mid_load(&daemon, root.path(), |file| {
        let file = File::options().write(true).open(file).unwrap();
        file.write_all_at(b"changed", CATCHABLE_BYTES - 100).unwrap();
    });
    assert_eq!(job["error"]["code"], "source.file.changed", "{job}");
}

#[test]
fn a_killed_daemon_leaves_nothing_that_the_next_one_trips_over() {
    let root = directory();
    let socket = root.path().join("s");
    let model = Model::mixed(&root.path().join("model"), 2);
    let mut daemon = large(root.path()).socket(&socket).start();
    let file = model::sparse(&root.path().join("m"), CATCHABLE_BYTES);
    let mut connection = daemon.connect();
    connection.call("artifact.prefetch", &json!({"source": file})).unwrap();
    daemon.kill();
    assert_eq!(connection.call("node.status", &json!({})).unwrap_err().code, "closed");
    let daemon = large(root.path()).socket(&socket).start();
    assert_eq!(daemon.host("resident_bytes"), 0);
    model.assert_equal(&daemon.connect().attach(&json!({"source": model.path})).unwrap());
    assert_eq!(daemon.connect().load(&file)["state"], "done");
}

/// Invariant 7.
#[test]
fn revoked_permission_holds_from_the_next_request_on() {
    if !root_or_skip() {
        return;
    }
    let root = directory_for_everyone();
    let model = Model::uniform(&root.path().join("m"), 3, 2, 1 << 20);
    let daemon = Daemon::start(root.path());
    let source = json!({"source": model.path});
    // Who a connection is was settled when it was made.
    let mut connection = tenant::as_nobody(|| daemon.connect());
    let attached = connection.attach(&source).unwrap();
    set_mode(&model.path, 0o700);
    assert_eq!(connection.code("artifact.attach", &source), "source.file.permission_denied");
    // What was attached is attached: the memory is the client's.
    model.assert_equal(&attached);
    model.assert_equal(&daemon.connect().attach(&source).unwrap());
}

/// Invariant 7.
#[test]
fn no_path_leads_out_of_the_root() {
    let (root, outside) = (directory(), directory());
    let secret = Model::uniform(&outside.path().join("secret"), 4, 1, 4096);
    let file = &secret.shards()[0];
    let inside = root.path().join("m");
    fs::create_dir(&inside).unwrap();
    symlink(file, inside.join("model.safetensors")).unwrap();
    symlink(outside.path(), root.path().join("directory")).unwrap();
    let up = format!("../../{}/secret", outside.path().file_name().unwrap().to_str().unwrap());
    symlink(&up, root.path().join("up")).unwrap();
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    for source in [
        path(&inside),
        path(&inside.join("model.safetensors")),
        path(&root.path().join("directory/secret")),
        path(&root.path().join("up")),
        format!("{}/m/../../{}", path(root.path()), up),
        format!("{}x/m", path(root.path())),
        path(&secret.path),
        format!("file://{}", path(&secret.path)),
        "/proc/self/environ".to_owned(),
    ] {
        assert_eq!(
            connection.code("artifact.attach", &json!({"source": source})),
            "source.file.outside_root",
            "{source}"
        );
    }
    assert_eq!(
        connection.code("artifact.attach", &json!({"source": "s3://bucket/m"})),
        "source.scheme_unsupported"
    );
    assert_eq!(connection.code("artifact.attach", &json!({"source": "relative/m"})), "source.uri_invalid");
    let missing = json!({"source": root.path().join("missing")});
    assert_eq!(connection.code("artifact.attach", &missing), "source.file.not_found");
}

#[test]
fn a_pipe_is_refused_and_does_not_hang() {
    let root = directory();
    let pipe = root.path().join("model.safetensors");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
    let daemon = Daemon::start(root.path());
    assert_eq!(daemon.connect().code("artifact.attach", &json!({"source": pipe})), "source.file.not_regular");
}

#[test]
fn malformed_files_have_codes_of_their_own_and_are_not_loaded() {
    let root = directory();
    let write = |name: &str, bytes: &[u8]| {
        let path = root.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let cases = [
        write("short.safetensors", b"\x08\0\0"),
        write("long.safetensors", &u64::MAX.to_le_bytes()),
        write("text.safetensors", b"\x08\0\0\0\0\0\0\0not json"),
        write("magic.gguf", b"GGML\x03\0\0\0"),
    ];
    let mut daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    let codes: Vec<String> =
        cases.iter().map(|path| connection.code("artifact.attach", &json!({"source": path}))).collect();
    assert!(codes.iter().all(|code| code.starts_with("catalog.")), "{codes:?}");
    let distinct: std::collections::BTreeSet<_> = codes.iter().collect();
    assert_eq!(distinct.len(), codes.len(), "{codes:?}");
    drop(connection);
    daemon.assert_idle();
}

/// Invariant 4.
#[test]
fn a_budget_that_is_too_small_refuses_and_keeps_what_is_resident() {
    let root = directory();
    let small = Model::uniform(&root.path().join("small"), 5, 2, 4 << 20);
    let large = model::sparse(&root.path().join("large"), 200 << 20);
    let daemon = Options::new(root.path()).budget("64MiB").start();
    let mut connection = daemon.connect();
    let attached = connection.attach(&json!({"source": small.path})).unwrap();
    let refused = connection.call("artifact.attach", &json!({"source": large})).unwrap_err();
    assert_eq!(refused.code, "tier.host.over_budget");
    assert!(daemon.host("resident_bytes") <= 64 << 20);
    small.assert_equal(&attached);
    small.assert_equal(&connection.attach(&json!({"source": small.path, "wait": false})).unwrap());
}

/// A client keeps its mapping after its lease: the memory counts until it is really free.
#[test]
fn memory_that_a_client_still_maps_counts_against_the_budget() {
    let root = directory();
    let models: Vec<Model> = (0..2)
        .map(|index| Model::uniform(&root.path().join(format!("m{index}")), index, 4, 10 << 20))
        .collect();
    let mut daemon = Options::new(root.path()).budget("64MiB").start();
    let mut connection = daemon.connect();
    let attached = connection.attach(&json!({"source": models[0].path})).unwrap();
    connection.call("lease.release", &json!({"lease": attached.lease()})).unwrap();
    connection.call("artifact.evict", &json!({"source": models[0].path})).unwrap();
    assert!(daemon.host("held_bytes") >= 40 << 20);
    let second = json!({"source": models[1].path});
    assert_eq!(connection.code("artifact.attach", &second), "tier.host.over_budget");
    models[0].assert_equal(&attached);
    drop(attached);
    models[1].assert_equal(&connection.attach(&second).unwrap());
    drop(connection);
    daemon.connect().call("artifact.evict", &second).ok();
    daemon.until("memory given back", |daemon| daemon.host("held_bytes") == 0);
}

#[test]
fn a_socket_that_cannot_be_made_is_an_error_that_says_where() {
    let root = directory();
    for (socket, code) in
        [("/proc/lodestream.sock", "daemon.socket_directory"), ("/missing/s", "daemon.socket_directory")]
    {
        let (status, output) = Options::new(root.path()).socket(Path::new(socket)).start_and_fail();
        assert_eq!(status.code(), Some(7), "{output}");
        assert!(
            output.contains(code) && output.contains(Path::new(socket).parent().unwrap().to_str().unwrap()),
            "{output}"
        );
    }
}

#[test]
fn a_directory_that_is_not_writable_is_an_error_for_an_ordinary_user() {
    if !root_or_skip() {
        return;
    }
    let (root, place) = (directory_for_everyone(), directory_for_everyone());
    set_mode(place.path(), 0o755);
    let (status, output) =
        Options::new(root.path()).nobody().socket(&place.path().join("s")).start_and_fail();
    assert_eq!(status.code(), Some(7), "{output}");
    assert!(output.contains("daemon.socket_directory"), "{output}");
}

#[test]
fn a_stale_socket_is_taken_over_and_a_living_one_is_not() {
    let root = directory();
    let socket = root.path().join("s");
    drop(UnixListener::bind(&socket).unwrap());
    assert!(socket.exists());
    let daemon = Options::new(root.path()).socket(&socket).start();
    let (status, output) = Options::new(root.path()).socket(&socket).start_and_fail();
    assert_eq!(status.code(), Some(7), "{output}");
    assert!(output.contains("daemon.socket_in_use"), "{output}");
    assert_eq!(daemon.status()["state"], "ready", "the first is not disturbed");
}

#[test]
fn a_file_in_the_place_of_the_socket_is_not_removed() {
    let root = directory();
    let socket = root.path().join("s");
    fs::write(&socket, "precious").unwrap();
    let (status, output) = Options::new(root.path()).socket(&socket).start_and_fail();
    assert_eq!(status.code(), Some(7), "{output}");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
}

/// Invariant 10: the reader that is reported is the one that was found to work.
#[test]
fn where_io_uring_is_refused_files_are_read_by_preadv2() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 6);
    let daemon = Options::new(root.path()).budget("512MiB").io_uring_refused().start();
    let features = daemon.status()["features"].clone();
    assert_eq!(features["reader"], "preadv2");
    assert!(!text(&features["reader_reason"]).is_empty());
    assert_eq!(daemon.metric("lodestream_reader_info", &["reader=\"preadv2\""]), 1.0);
    model.assert_equal(&daemon.connect().attach(&json!({"source": model.path})).unwrap());

    let (status, output) =
        Options::new(root.path()).flags(&["--reader", "io_uring"]).io_uring_refused().start_and_fail();
    assert_eq!(status.code(), Some(7), "{output}");
    assert!(output.contains("daemon.start"), "{output}");
}

#[test]
fn a_daemon_that_cannot_act_as_its_client_takes_open_files_only() {
    if !root_or_skip() {
        return;
    }
    let root = directory_for_everyone();
    let model = Model::uniform(&root.path().join("m"), 7, 2, 1 << 20);
    let daemon = Options::new(root.path()).nobody().start();
    assert_eq!(daemon.status()["features"]["acts_as_tenant"], false);
    let source = json!({"source": model.path});
    assert_eq!(daemon.connect().code("artifact.attach", &source), "identity.cannot_act_as");
    let shards = model.shards();
    let name = shards[0].file_name().unwrap().to_str().unwrap();
    model.assert_equal(&daemon.connect().attach_files(&[File::open(&shards[0]).unwrap()], &[name]).unwrap());
    // Its own user is another matter.
    tenant::as_nobody(|| model.assert_equal(&daemon.connect().attach(&source).unwrap()));
}

/// Invariant 4: a line that was begun must be ended in time.
#[test]
fn half_a_frame_ends_the_connection_and_disturbs_no_one() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 8);
    let mut daemon = Options::new(root.path()).config("[limits]\nframe_timeout_ms = 300\n").start();
    let mut stuck = daemon.connect();
    stuck.send_raw(b"{\"jsonrpc\": \"2.0\", \"id\": 1, \"meth").unwrap();
    // An idle connection without a frame begun is no fault.
    let mut idle = daemon.connect();
    model.assert_equal(&daemon.connect().attach(&json!({"source": model.path})).unwrap());
    let last = stuck.line().map(|line| line["error"]["data"]["code"].clone());
    assert!(last.is_none_or(|code| code == "api.frame_timeout"));
    assert!(stuck.line().is_none());
    assert_eq!(daemon.metric("lodestream_errors_total", &["code=\"api.frame_timeout\""]), 1.0);
    assert_eq!(idle.call("node.status", &json!({})).unwrap()["state"], "ready");
    drop((stuck, idle));
    daemon.connect().call("artifact.evict", &json!({"source": model.path})).unwrap();
    daemon.assert_idle();
}

/// Invariant 4: a reply must be taken in time.
#[test]
fn a_client_that_never_reads_is_cut_off_and_disturbs_no_one() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 9, 4000, 64);
    let mut daemon = Options::new(root.path()).config("[limits]\nwrite_timeout_ms = 300\n").start();
    let mut deaf = daemon.connect();
    // Each reply describes thousands of tensors: together far more than a socket holds.
    for _ in 0..16 {
        deaf.send("artifact.resolve", &json!({"source": model.path}));
    }
    daemon.until("the end of the deaf connection", |daemon| {
        model.assert_equal(&daemon.connect().attach(&json!({"source": model.path})).unwrap());
        daemon.metric("lodestream_errors_total", &["code=\"api.slow_reader\""]) >= 1.0
    });
    daemon.connect().call("artifact.evict", &json!({"source": model.path})).unwrap();
    // The deaf one is still open on its side, and holds nothing of the daemon.
    daemon.assert_idle();
    drop(deaf);
}

/// Invariant 4: everything that comes over the socket has a limit or a check, and each its code.
#[test]
fn requests_that_make_no_sense_are_answered_with_their_code() {
    let root = directory();
    let daemon = Options::new(root.path())
        .config("[limits]\nrequest_bytes_max = 4096\nconnections_per_tenant_max = 8\nleases_per_connection_max = 1\n")
        .start();
    let mut connection = daemon.connect();
    let mut raw = |line: &str| {
        connection.send_raw(line.as_bytes()).unwrap();
        connection.send_raw(b"\n").unwrap();
        text(&connection.line().unwrap()["error"]["data"]["code"]).to_owned()
    };
    assert_eq!(raw("nonsense"), "api.bad_json");
    assert_eq!(raw("\u{7f}"), "api.bad_json");
    assert_eq!(raw("[]"), "api.bad_request");
    assert_eq!(raw(r#"{"id": 1, "method": "node.status"}"#), "api.bad_request");
    assert_eq!(raw(r#"{"jsonrpc": "2.0", "id": {}, "method": "node.status"}"#), "api.bad_request");
    assert_eq!(connection.code("node.nothing", &json!({})), "api.unknown_method");
    assert_eq!(connection.code("node.status", &json!({"verbose": true})), "api.bad_params");
    assert_eq!(connection.code("hello", &json!({"versions": [99]})), "api.version_unsupported");
    assert_eq!(connection.code("job.get", &json!({"job": 99})), "job.not_found");
    assert_eq!(connection.code("lease.release", &json!({"lease": 99})), "lease.not_found");
    assert_eq!(
        connection.code("artifact.attach", &json!({"source": "/m", "device": "gpu:0"})),
        "device.unavailable"
    );

    let model = Model::uniform(&root.path().join("m"), 10, 1, 4096);
    let _attached = connection.attach(&json!({"source": model.path})).unwrap();
    assert_eq!(connection.code("artifact.attach", &json!({"source": model.path})), "lease.too_many");

    let mut long = daemon.connect();
    // The daemon may close before it has been sent all of this.
    let _ = long.send_raw("x".repeat(64 << 10).as_bytes());
    let code = long.line().map(|line| text(&line["error"]["data"]["code"]).to_owned());
    assert!(code.is_none_or(|code| code == "api.frame_too_large"));
    assert_eq!(daemon.metric("lodestream_errors_total", &["code=\"api.frame_too_large\""]), 1.0);
}

/// Invariant 4.
#[test]
fn connections_past_the_limit_are_refused_and_come_back() {
    let root = directory();
    let mut daemon = Options::new(root.path()).config("[limits]\nconnections_per_tenant_max = 4\n").start();
    // The connection that asked for readiness may still be on its way out.
    daemon.until("no connection", |daemon| daemon.metric("lodestream_connections", &[]) == 0.0);
    let mut held: Vec<Connection> = (0..4).map(|_| daemon.connect()).collect();
    for connection in &mut held {
        connection.call("node.status", &json!({})).unwrap();
    }
    let mut refused = daemon.connect();
    let code = refused.line().map(|line| text(&line["error"]["data"]["code"]).to_owned());
    assert!(code.is_none_or(|code| code == "api.too_many_connections"));
    assert!(refused.line().is_none(), "a refused connection is closed");
    drop(held);
    daemon.until("room for connections", |daemon| daemon.connect().call("node.status", &json!({})).is_ok());
    daemon.assert_idle();
}

#[test]
fn descriptors_that_are_no_files_are_refused_and_closed() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 11, 1, 4096);
    let daemon = Daemon::start(root.path());
    let mut connection = daemon.connect();
    connection.call("node.status", &json!({})).unwrap();
    let before = daemon.fds();
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    let path_only = rustix::fs::open(
        &model.shards()[0],
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    // What it shows depends on who opens it.
    let procfs = File::open("/proc/self/status").unwrap();
    for file in [pipe, File::from(path_only), File::open(root.path()).unwrap(), procfs] {
        let refused = connection.attach_files(&[file], &["model.safetensors"]).map(|_| ()).unwrap_err();
        assert_eq!(refused.code, "source.fds_invalid");
    }
    // Descriptors beside a request that asks for none are closed as well.
    let stray = File::open(&model.shards()[0]).unwrap();
    let id = connection.send_with_fds("node.status", &json!({}), &[std::os::fd::AsFd::as_fd(&stray)]);
    let _ = connection.reply(id);
    let listed = connection.call("artifact.list", &json!({}));
    assert!(list(&listed.unwrap()["artifacts"]).is_empty());
    assert_eq!(daemon.fds(), before);
}
