//! Loads in this process, without a daemon.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::directory;
use common::gpu::{device, memory_in_use, simulated};
use common::model::Model;
use lodestream::Code;
use lodestream::api::methods::AttachRequest;
use lodestream::client::Attached;
use lodestream::in_process::{self, Engine};
use serde_json::{Value, json};

/// What a test leaves behind is seen in its process: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn request(request: &Value) -> AttachRequest {
    serde_json::from_value(request.clone()).unwrap()
}

fn load(source: &Value) -> lodestream::Result<Attached> {
    in_process::load(&request(source), &[], &mut |_| ())
}

fn verify(attached: &Attached, model: &Model) {
    assert_eq!(attached.tensors().count(), model.tensors.len());
    for tensor in &model.tensors {
        let found = attached.tensor(&tensor.name).unwrap();
        assert!(found.to_vec().unwrap() == tensor.contents(model.seed), "{}", tensor.name);
    }
}

/// Lines of a file of this process that have `what` in them.
fn count(file: &str, what: &str) -> usize {
    std::fs::read_to_string(file).unwrap().lines().filter(|line| line.contains(what)).count()
}

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// Invariant 11: when what was loaded is dropped, nothing of it is left: no memory, no thread, no descriptor.
#[test]
fn a_load_is_equal_to_its_files_and_leaves_nothing_behind() {
    let _alone = alone();
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 3);
    // What the first load leaves is the runtime's own, once for the process.
    load(&json!({"source": model.path})).unwrap();
    let before = (entries("/proc/self/task"), entries("/proc/self/fd"), count("/proc/self/maps", "memfd:"));
    let attached = load(&json!({"source": model.path})).unwrap();
    assert_eq!(entries("/proc/self/task"), before.0, "the engine has ended");
    assert_eq!(entries("/proc/self/fd"), before.1);
    verify(&attached, &model);
    drop(attached);
    assert_eq!(count("/proc/self/maps", "memfd:"), before.2);
}

#[test]
fn an_engine_serves_clients_until_it_ends() {
    let _alone = alone();
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 4);
    let engine = Engine::start("host").unwrap();
    let mut client = engine.connect().unwrap();
    let resolve = serde_json::from_value(json!({"source": model.path})).unwrap();
    assert_eq!(client.resolve(&resolve, &[]).unwrap().tensors.len(), model.tensors.len());
    let select = json!([{"name": "head.weight", "dim": 0, "of": 4, "index": 1}]);
    let part = json!({"source": model.path, "select": select});
    let attached = in_process::attach(&mut client, &request(&part), &[], &mut |_| ()).unwrap();
    let contents = model.contents("head.weight");
    let quarter = contents.len() / 4;
    let found = attached.tensor("head.weight").unwrap().bytes().unwrap().to_vec();
    assert!(found == contents[quarter..2 * quarter]);
    // Files that this process has opened by itself.
    let shards = model.shards();
    let files: Vec<File> = shards.iter().map(|path| File::open(path).unwrap()).collect();
    let names: Vec<_> = shards.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    let sent = request(&json!({"source": {"fds": files.len(), "names": names}}));
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    verify(&in_process::attach(&mut client, &sent, &files, &mut |_| ()).unwrap(), &model);
    assert!(client.list().unwrap().is_empty(), "nothing stays resident");
    drop(engine);
    assert_eq!(client.list().unwrap_err().code, Code::ClientDisconnected);
    assert!(attached.tensor("head.weight").unwrap().bytes().unwrap() == found);
}

#[test]
fn what_cannot_be_loaded_has_its_code() {
    let _alone = alone();
    assert_eq!(load(&json!({"source": "/nonexistent/model"})).unwrap_err().code, Code::SourceFileNotFound);
    assert_eq!(load(&json!({"source": "models"})).unwrap_err().code, Code::SourceUriInvalid);
    let error = load(&json!({"source": "/m", "device": "gpu:GPU-0"})).unwrap_err();
    assert_eq!(error.code, Code::DaemonStart, "{error}");
}

#[test]
fn a_load_to_a_gpu_touches_no_other() {
    let devices = json!([device(256), device(256)]);
    fn here() {}
    if !simulated(std::any::type_name_of_val(&here), &devices) {
        return;
    }
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 5);
    let lodestream::sys::cuda::Found::Devices(devices) = lodestream::sys::cuda::find() else {
        panic!("devices")
    };
    let uuid = format!("gpu:{}", devices[1].uuid);
    let attached = load(&json!({"source": model.path, "device": uuid})).unwrap();
    verify(&attached, &model);
    assert!(memory_in_use() > 0);
    drop(attached);
    assert_eq!(memory_in_use(), 0);
}
