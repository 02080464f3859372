//! The real binary against a daemon that answers as each test says.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::process::{Command, Output, Stdio};

use lodestream::error::{Code, Error};
// What the fake daemon is written against.
use lodestream::{api, error};
use serde_json::{Value, json};

#[path = "common/fake_daemon.rs"]
#[allow(dead_code, reason = "shared with the tests of the Rust client")]
mod fake;

use api::methods::{JobInfo, JobState};
use fake::{Fake, Received, SEALED, Step, attach_reply, job, memory, tensor};

fn command(fake: &Fake, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lodestream"));
    command.args(arguments).env("LODESTREAM_SOCKET", fake.path()).stdin(Stdio::null());
    command
}

fn run(answer: impl FnMut(Received) -> Vec<Step> + Send + 'static, arguments: &[&str]) -> Output {
    let fake = Fake::start(answer);
    let output = command(&fake, arguments).output().unwrap();
    fake.join();
    output
}

fn document(output: &Output) -> Value {
    let mut documents = serde_json::Deserializer::from_slice(&output.stdout).into_iter();
    let document = documents.next().unwrap().unwrap();
    assert!(documents.next().is_none(), "exactly one document");
    document
}

fn reply(value: Value) -> Vec<Step> {
    vec![Step::Reply(value, Vec::new())]
}

fn failed(number: u64, code: Code) -> JobInfo {
    JobInfo { error: Some((&Error::new(code, "because")).into()), ..job(number, JobState::Failed) }
}

#[test]
fn an_error_of_the_daemon_is_printed_and_decides_the_exit_code() {
    for (code, exit) in [
        (Code::ArtifactNotResident, 3),
        (Code::SourceFileOutsideRoot, 4),
        (Code::SourceFileShortRead, 5),
        (Code::TierHostOverBudget, 6),
        (Code::DaemonDraining, 7),
        (Code::JobCancelled, 8),
        (Code::Internal, 1),
    ] {
        let answer = move |_| vec![Step::Error(Error::new(code, "because").kept("the lease"))];
        let text = run(answer, &["stat", "/m"]);
        assert_eq!(text.status.code(), Some(exit), "{code}");
        assert!(text.stdout.is_empty());
        let stderr = String::from_utf8(text.stderr).unwrap();
        assert!(stderr.contains(&format!("[{code}]\nkept: the lease\n")), "{stderr}");
        let with_json = run(answer, &["stat", "/m", "--json"]);
        assert_eq!(with_json.status.code(), Some(exit));
        assert!(with_json.stderr.is_empty());
        assert_eq!(document(&with_json)["error"]["code"], code.as_str());
        assert_eq!(document(&with_json)["error"]["kept"], "the lease");
    }
}

#[test]
fn usage_errors_exit_2_with_and_without_json() {
    let run =
        |arguments: &[&str]| Command::new(env!("CARGO_BIN_EXE_lodestream")).args(arguments).output().unwrap();
    let text = run(&["attach"]);
    assert_eq!((text.status.code(), text.stdout.len()), (Some(2), 0));
    let with_json = run(&["attach", "--json"]);
    assert_eq!(with_json.status.code(), Some(2));
    assert_eq!(document(&with_json)["error"]["code"], "cli.usage");
    let nobody = run(&["--socket", "/nonexistent/s", "--json", "ls"]);
    assert_eq!(nobody.status.code(), Some(7));
    assert_eq!(document(&nobody)["error"]["code"], "client.connect");
}

#[test]
fn attach_prints_the_tensors_and_no_descriptor_numbers() {
    let answer = |request: Received| {
        assert_eq!(request.method, "artifact.attach");
        assert_eq!(
            request.params["select"],
            json!(["*.norm", {"name": "*.q", "dim": 0, "of": 2, "index": 1}])
        );
        let mut reply = attach_reply(&[4096]);
        reply.tensors = vec![tensor("a.norm", 0, 64), tensor("evil\u{1b}[2J", 64, 32)];
        vec![Step::Reply(json!(reply), vec![memory(&[0; 4096], SEALED)])]
    };
    let arguments = ["attach", "/m", "--select", "*.norm", "--select", "*.q:0:2:1"];
    let text = run(answer, &arguments);
    assert!(text.status.success(), "{text:?}");
    let stdout = String::from_utf8(text.stdout).unwrap();
    assert!(stdout.contains("a.norm") && stdout.contains("[64]") && stdout.contains("2 tensors"), "{stdout}");
    assert!(!stdout.contains('\u{1b}'), "names do not steer the terminal");
    let document = document(&run(answer, &[&arguments[..], &["--json"]].concat()));
    assert_eq!(document["tensors"][0]["name"], "a.norm");
    assert_eq!(document["regions"], json!([{"device": "host", "bytes": 4096, "pages": "4k"}]));
    assert!(document["timings_ms"]["map"].is_f64());
}

#[test]
fn hold_keeps_the_connection_until_stdin_ends() {
    let (sender, released) = std::sync::mpsc::channel();
    let fake =
        Fake::start(|_| vec![Step::Reply(json!(attach_reply(&[4096])), vec![memory(&[0; 4096], SEALED)])]);
    let mut child = command(&fake, &["attach", "/m", "--hold", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    std::thread::spawn(move || {
        fake.join();
        let _ = sender.send(());
    });
    assert!(released.try_recv().is_err() && child.try_wait().unwrap().is_none(), "it holds");
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    released.recv().unwrap();
}

#[test]
fn sigterm_ends_a_hold_in_order() {
    let fake =
        Fake::start(|_| vec![Step::Reply(json!(attach_reply(&[4096])), vec![memory(&[0; 4096], SEALED)])]);
    let mut child = command(&fake, &["attach", "/m", "--hold", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    fake.join();
}

#[test]
fn prefetch_waits_for_all_and_reports_the_one_that_failed() {
    let answer = |request: Received| match request.method.as_str() {
        "artifact.prefetch" if request.params["source"] == "/good" => {
            assert_eq!(request.params["deadline_ms"], 30_000);
            assert_eq!((&request.params["priority"], &request.params["pin"]), (&json!(-1), &json!(true)));
            reply(json!({"job": job(1, JobState::Running)}))
        }
        "artifact.prefetch" => reply(json!({"job": job(2, JobState::Queued)})),
        "job.wait" if request.params["job"] == 1 => reply(json!({"job": job(1, JobState::Done)})),
        "job.wait" => reply(json!({"job": failed(2, Code::SourceFileShortRead)})),
        method => panic!("{method}"),
    };
    let flags = ["--deadline", "30s", "--priority", "-1", "--pin", "--json"];
    let output = run(answer, &[&["prefetch", "/good", "/bad"][..], &flags].concat());
    assert_eq!(output.status.code(), Some(5));
    let error = &document(&output)["error"];
    assert_eq!(
        (&error["code"], &error["kept"]),
        (&json!("source.file.short_read"), &json!("resident: /models/m"))
    );
    let output = run(answer, &[&["prefetch", "/good"][..], &flags].concat());
    assert!(output.status.success());
    assert_eq!(document(&output)["jobs"][0]["state"], "done");
}

#[test]
fn no_wait_detaches() {
    let answer = |request: Received| {
        assert_eq!((request.method.as_str(), &request.params["detach"]), ("artifact.prefetch", &json!(true)));
        reply(json!({"job": job(9, JobState::Queued)}))
    };
    let output = run(answer, &["prefetch", "/m", "--no-wait"]);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "/models/m: job 9\n");
}

#[test]
fn open_sends_the_files_themselves() {
    let answer = |request: Received| {
        assert_eq!(request.params["source"], json!({"fds": 1, "names": ["w.safetensors"]}));
        assert_eq!(request.files.len(), 1);
        reply(json!({"job": job(1, JobState::Done)}))
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    std::fs::write(&path, "x").unwrap();
    assert!(run(answer, &["prefetch", path.to_str().unwrap(), "--open"]).status.success());
}

#[test]
fn a_job_that_failed_is_shown_and_only_waiting_for_it_fails() {
    let answer = |request: Received| match request.method.as_str() {
        "job.get" | "job.wait" => reply(json!({"job": failed(4, Code::SourceFileChanged)})),
        "job.list" => reply(json!({"jobs": [job(5, JobState::Running), failed(4, Code::SourceFileChanged)]})),
        method => panic!("{method}"),
    };
    let shown = run(answer, &["jobs", "4"]);
    assert!(shown.status.success() && String::from_utf8_lossy(&shown.stdout).contains("source.file.changed"));
    assert_eq!(run(answer, &["jobs", "4", "--wait"]).status.code(), Some(5));
    assert_eq!(document(&run(answer, &["jobs", "--json"]))["jobs"].as_array().unwrap().len(), 2);
}

#[test]
fn digests_and_paths_name_what_is_removed() {
    let artifact = |source: &str| {
        json!({"source": source, "device": "host", "state": "resident", "bytes": 1024, "tensors": 1,
               "leases": 0, "pinned": false, "pages": "4k", "idle_ms": 1})
    };
    let answer = move |request: Received| {
        assert_eq!(request.method, "artifact.evict");
        match &request.params["digest"] {
            Value::Null => vec![Step::Error(Error::new(Code::ArtifactLeased, "leased"))],
            digest => {
                assert_eq!(digest, "sha256:ab");
                reply(json!({"artifact": artifact("/first")}))
            }
        }
    };
    let output = run(answer, &["rm", "sha256:ab", "/second"]);
    assert_eq!(output.status.code(), Some(6));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("kept: evicted before: /first"), "{stderr}");
    let output = run(answer, &["rm", "sha256:ab"]);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "evicted: /first (1.00 KiB)\n");
}

#[test]
fn completions_name_every_subcommand() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_lodestream")).args(["completions", "bash"]).output().unwrap();
    let script = String::from_utf8(output.stdout).unwrap();
    for name in [
        "serve",
        "prefetch",
        "attach",
        "ls",
        "stat",
        "rm",
        "pin",
        "unpin",
        "jobs",
        "status",
        "top",
        "bench",
        "doctor",
        "plan",
        "completions",
    ] {
        assert!(script.contains(name), "{name}");
    }
}
