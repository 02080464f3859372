//! `lodestream bench`: that it measures what it says, on small files; not how fast anything is.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::daemon::Daemon;
use common::directory;
use common::model::Model;
use common::wire::{list, number, text};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn bench(socket: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lodestream"));
    command.arg("--socket").arg(socket).arg("bench").args(arguments).output().unwrap()
}

#[track_caller]
fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The figures of each round: as many as were asked for, each contestant in each.
#[track_caller]
fn assert_rounds(rounds: &Value, count: usize, contestants: usize) {
    let rounds = list(rounds);
    assert_eq!(rounds.len(), count);
    for round in rounds {
        let ran = list(round).iter().filter(|rate| rate.as_f64().is_some_and(|rate| rate > 0.0)).count();
        assert_eq!(ran, contestants, "{round}");
    }
}

#[test]
fn load_is_cold_each_time_and_compared_with_the_reference_of_its_round() {
    let root = directory();
    let model = Model::uniform(&root.path().join("m"), 70, 3, 8 * MIB);
    let mut daemon = Daemon::start(root.path());
    let html = root.path().join("report.html");
    let path = model.path.to_str().unwrap();
    let arguments =
        ["load", path, "--rounds", "2", "--hold", "5MiB", "--json", "--html", html.to_str().unwrap()];
    let report = report(&bench(&daemon.socket, &arguments));
    let figures = &report["figures"];
    let contestants: Vec<&str> = list(&figures["contestants"]).iter().map(text).collect();
    assert_eq!(contestants.last(), Some(&"load"));
    assert_rounds(&figures["bytes_per_s"], 2, contestants.len());
    assert_eq!(number(&figures["held_bytes"]), 4 * MIB, "whole huge pages");
    assert!(list(&report["notes"]).iter().any(|note| text(note).contains("equally warm")));
    // Every byte of both loads was read anew, past the page cache if the file system can.
    let read: u64 = figures["path"].as_object().unwrap().values().map(number).sum();
    assert_eq!(read, 2 * number(&figures["bytes"]));
    for run in list(&figures["runs"]).iter().flat_map(list) {
        assert!(number(&run["bytes"]) > 23 * MIB, "each contestant reads all: {run}");
    }
    let page = std::fs::read_to_string(&html).unwrap();
    assert_eq!(page.matches("<svg").count(), 2);
    assert!(page.contains("reference of the same round") && !page.contains("<script"));
    // What somebody has pinned is left alone.
    let source = json!({"source": path});
    daemon.connect().load(&model.path);
    daemon.connect().call("artifact.pin", &source).unwrap();
    let refused = bench(&daemon.socket, &["load", path, "--json"]);
    assert_eq!(refused.status.code(), Some(6), "{refused:?}");
    assert_eq!(serde_json::from_slice::<Value>(&refused.stdout).unwrap()["error"]["code"], "artifact.pinned");
    daemon.connect().call("artifact.unpin", &source).unwrap();
    daemon.connect().call("artifact.evict", &source).unwrap();
    daemon.assert_idle();
}

#[test]
fn attach_is_measured_resident_and_evicted_and_leaves_no_lease() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 71);
    let mut daemon = Daemon::start(root.path());
    let path = model.path.to_str().unwrap();
    let report = report(&bench(&daemon.socket, &["attach", path, "--rounds", "3", "--cold", "2", "--json"]));
    let figures = &report["figures"];
    assert_eq!((list(&figures["resident_ms"]).len(), list(&figures["evicted_ms"]).len()), (3, 2));
    assert_eq!(number(&figures["tensors"]), model.tensors.len() as u64);
    assert_eq!(
        daemon.metric("lodestream_jobs_ended_total", &[r#"state="done""#]),
        2.0,
        "loaded for the cold ones only"
    );
    daemon.connect().call("artifact.evict", &json!({"source": path})).unwrap();
    daemon.assert_idle();
}

#[test]
fn drive_tries_every_setting_in_every_round_and_names_one() {
    let directory = directory();
    std::fs::write(directory.path().join("file"), vec![7; 64 << 20]).unwrap();
    let path = directory.path().to_str().unwrap();
    let html = directory.path().join("report.html");
    let settings = ["--blocks", "256KiB,1MiB", "--depths", "1,4", "--rounds", "2", "--time", "20ms"];
    let arguments = [&["drive", path][..], &settings, &["--json", "--html", html.to_str().unwrap()]].concat();
    let output = bench(Path::new("/nonexistent"), &arguments);
    if !output.status.success() {
        // No O_DIRECT here, or io_uring is refused: said so.
        let error = &serde_json::from_slice::<Value>(&output.stdout).unwrap()["error"];
        assert!(
            ["cli.usage", "source.file.io", "source.file.permission_denied"].contains(&text(&error["code"])),
            "{error}"
        );
        return;
    }
    let report = report(&output);
    let figures = &report["figures"];
    assert_rounds(&figures["bytes_per_s"], 2, 4);
    assert!(list(&figures["settings"]).contains(&figures["best"]), "{figures}");
    assert!(std::fs::read_to_string(&html).unwrap().contains("<polyline"));
    let small = bench(Path::new("/nonexistent"), &["drive", env!("CARGO_MANIFEST_DIR"), "--blocks", "5000"]);
    assert_eq!(small.status.code(), Some(2), "no multiple of 4 KiB");
}

#[test]
fn memory_is_measured_without_a_daemon_and_says_what_it_could_not() {
    let output = bench(Path::new("/nonexistent"), &["memory", "--bytes", "4MiB", "--rounds", "2", "--json"]);
    let report = report(&output);
    let figures = &report["figures"];
    let work = list(&figures["work"]);
    for (place, name) in work.iter().enumerate() {
        let runs = list(&list(&figures["runs"])[place]);
        let unsaid =
            runs.is_empty() && !list(&report["notes"]).iter().any(|note| text(note).contains("not measured"));
        assert!(!unsaid && runs.iter().all(|run| number(&run["bytes"]) == 4 * MIB), "{name}");
    }
    assert_eq!(list(&list(&figures["runs"])[0]).len(), 2);
    let text = bench(Path::new("/nonexistent"), &["memory", "--bytes", "4MiB", "--rounds", "1"]);
    assert!(String::from_utf8(text.stdout).unwrap().contains("streaming copy"));
}
