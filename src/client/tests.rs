use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};

use serde_json::{Value, json};

use super::fake::*;
use super::*;

fn attach_request() -> AttachRequest {
    serde_json::from_value(json!({"source": "/models/m"})).unwrap()
}

fn attach_answered(reply: AttachReply, fds: Vec<OwnedFd>) -> Result<Attached> {
    let mut once = Some((json!(reply), fds));
    let fake = Fake::start(move |request| match request.method.as_str() {
        "artifact.attach" => once.take().map(|(reply, fds)| Step::Reply(reply, fds)).into_iter().collect(),
        "lease.release" => vec![Step::Reply(json!({}), Vec::new())],
        method => panic!("{method}"),
    });
    let attached = Client::connect(fake.path()).unwrap().attach(&attach_request(), &[], &mut |_| ());
    fake.join();
    attached
}

#[test]
fn tensors_lie_across_parts_and_outlive_the_daemon_invariant_9() {
    let content: Vec<u8> = (0..3 * 4096u32).map(|place| (place / 7) as u8).collect();
    let fds = vec![memory(&content[..4096], SEALED), memory(&content[4096..], SEALED)];
    let mut reply = attach_reply(&[4096, 8192]);
    reply.tensors = vec![tensor("a", 0, 100), tensor("b", 4000, 5000), tensor("empty", 3 * 4096, 0)];
    reply.files =
        vec![FileView { name: "model.safetensors".to_owned(), region: 0, offset: 0, nbytes: 12000 }];
    let attached = attach_answered(reply, fds).unwrap();
    // `attach_answered` has joined the daemon: the connection is closed on both sides.
    assert!(attached.tensor("b").unwrap().bytes().unwrap() == &content[4000..9000]);
    assert!(attached.file("model.safetensors").unwrap() == &content[..12000]);
    assert_eq!(attached.tensor("a").unwrap().shape, [100]);
    assert!(attached.tensor("empty").unwrap().bytes().unwrap().is_empty());
    assert!(attached.tensor("c").is_none() && attached.file("x").is_none());
    assert_eq!(attached.tensors().map(|tensor| tensor.name).collect::<Vec<_>>(), ["a", "b", "empty"]);
    assert_eq!(attached.metadata()["format"], "pt");
    let Region::Host(region) = &attached.regions()[0] else { panic!("on the host tier") };
    let region = Arc::clone(region);
    drop(attached);
    assert!(region.as_slice() == content);
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_mapped() {
    let good = || vec![memory(&[1; 4096], SEALED)];
    let with = |change: fn(&mut AttachReply)| {
        let mut reply = attach_reply(&[4096]);
        change(&mut reply);
        reply
    };
    let shrinkable = rustix::fs::SealFlags::FUTURE_WRITE;
    let cases: Vec<(&str, AttachReply, Vec<OwnedFd>)> = vec![
        ("no descriptor", attach_reply(&[4096]), Vec::new()),
        ("a descriptor too many", attach_reply(&[4096]), [good(), good()].concat_fds()),
        ("an index past the end", with(|reply| reply.regions[0].parts[0].fd = 1), good()),
        (
            "one descriptor twice",
            with(|reply| {
                let part = reply.regions[0].parts[0].clone();
                reply.regions[0].parts.push(part);
                reply.regions[0].bytes = 8192;
            }),
            good(),
        ),
        ("parts that do not add up", with(|reply| reply.regions[0].bytes = 8192), good()),
        ("more bytes than the memory has", attach_reply(&[8192]), good()),
        ("memory that can shrink", attach_reply(&[4096]), vec![memory(&[1; 4096], shrinkable)]),
        ("a file", attach_reply(&[4096]), vec![OwnedFd::from(tempfile::tempfile().unwrap())]),
        ("another tier", with(|reply| reply.regions[0].device = "gpu:GPU-0".to_owned()), good()),
        ("a tensor past the end", with(|reply| reply.tensors = vec![tensor("t", 4000, 97)]), good()),
        ("a tensor past 2^64", with(|reply| reply.tensors = vec![tensor("t", u64::MAX, 2)]), good()),
        (
            "a tensor in no region",
            with(|reply| {
                reply.tensors = vec![tensor("t", 0, 0)];
                reply.tensors[0].region = 1;
            }),
            good(),
        ),
        (
            "a file past the end",
            with(|reply| {
                reply.files = vec![FileView { name: "f".to_owned(), region: 0, offset: 1, nbytes: 4096 }];
            }),
            good(),
        ),
    ];
    for (what, reply, fds) in cases {
        let error = attach_answered(reply, fds).expect_err(what);
        assert_eq!(error.code, Code::ClientMap, "{what}: {error}");
    }
    let twice = with(|reply| reply.tensors = vec![tensor("t", 0, 1), tensor("t", 1, 1)]);
    assert_eq!(attach_answered(twice, good()).unwrap_err().code, Code::ClientProtocol);
}

trait Concat {
    fn concat_fds(self) -> Vec<OwnedFd>;
}

impl Concat for [Vec<OwnedFd>; 2] {
    fn concat_fds(self) -> Vec<OwnedFd> {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn a_lease_that_cannot_be_mapped_is_given_back() {
    let (sender, released) = mpsc::channel();
    let fake = Fake::start(move |request| match request.method.as_str() {
        "artifact.attach" => vec![Step::Reply(json!(attach_reply(&[4096])), Vec::new())],
        _ => {
            sender.send((request.method, request.params)).unwrap();
            vec![Step::Reply(json!({}), Vec::new())]
        }
    });
    let mut client = Client::connect(fake.path()).unwrap();
    assert_eq!(client.attach(&attach_request(), &[], &mut |_| ()).unwrap_err().code, Code::ClientMap);
    assert_eq!(released.recv().unwrap(), ("lease.release".to_owned(), json!({"lease": 7})));
}

#[test]
fn progress_comes_before_the_reply_and_other_notifications_are_ignored() {
    let fake = Fake::start(|request| {
        assert_eq!(request.params, json!({"job": 3, "notify": true}));
        vec![
            Step::Progress(Box::new(job(3, JobState::Queued))),
            Step::Raw(b"{\"jsonrpc\":\"2.0\",\"method\":\"new.thing\",\"params\":{}}\n".to_vec()),
            Step::Progress(Box::new(job(3, JobState::Running))),
            Step::Reply(json!({"job": job(3, JobState::Done)}), Vec::new()),
        ]
    });
    let mut client = Client::connect(fake.path()).unwrap();
    let mut seen = Vec::new();
    let request = JobWaitRequest { job: 3, timeout_ms: None, notify: true };
    let done = client.job_wait(&request, &mut |job| seen.push(job.state)).unwrap();
    assert_eq!((seen, done.state), (vec![JobState::Queued, JobState::Running], JobState::Done));
}

#[test]
fn files_travel_with_the_request() {
    let fake = Fake::start(|mut request| {
        assert_eq!(request.params["source"], json!({"fds": 2, "names": ["a.safetensors", "b.safetensors"]}));
        let mut text = String::new();
        File::from(request.files.remove(1)).read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), request.files.len()), ("two", 1));
        vec![Step::Reply(json!({"job": job(1, JobState::Queued)}), Vec::new())]
    });
    let mut client = Client::connect(fake.path()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let open = |text: &str| {
        let path = directory.path().join(text);
        std::fs::write(&path, text).unwrap();
        File::open(path).unwrap()
    };
    let (one, two) = (open("one"), open("two"));
    let request: PrefetchRequest =
        serde_json::from_value(json!({"source": {"fds": 2, "names": ["a.safetensors", "b.safetensors"]}}))
            .unwrap();
    let error = client.prefetch(&request, &[one.as_fd()], &mut |_| ()).unwrap_err();
    assert_eq!(error.code, Code::SourceFdsInvalid);
    client.prefetch(&request, &[one.as_fd(), two.as_fd()], &mut |_| ()).unwrap();
}

#[test]
fn a_request_longer_than_the_socket_takes_at_once() {
    let fake = Fake::start(|request| {
        let length = request.params["select"][0].as_str().map(str::len);
        assert_eq!((length, request.files.len()), (Some(900_000), 1));
        vec![Step::Reply(json!({"job": job(1, JobState::Queued)}), Vec::new())]
    });
    let mut client = Client::connect(fake.path()).unwrap();
    let null = File::open("/dev/null").unwrap();
    let request: PrefetchRequest =
        serde_json::from_value(json!({"source": {"fds": 1}, "select": ["x".repeat(900_000)]})).unwrap();
    client.prefetch(&request, &[null.as_fd()], &mut |_| ()).unwrap();
}

#[test]
fn the_daemons_errors_keep_their_code_and_the_connection() {
    let mut errors = vec![
        Step::Raw(error_line("daemon.from_the_future", "r-9")),
        Step::Error(Error::new(Code::LeaseNotFound, "no such lease").kept("your other leases")),
    ];
    let fake = Fake::start(move |_| errors.pop().into_iter().collect());
    let mut client = Client::connect(fake.path()).unwrap();
    let error = client.release(1).unwrap_err();
    assert_eq!((error.code, error.message.as_str()), (Code::LeaseNotFound, "no such lease"));
    assert_eq!(error.kept, "your other leases");
    let error = client.release(1).unwrap_err();
    assert_eq!(error.code, Code::Internal);
    assert!(error.message.contains("daemon.from_the_future") && error.message.contains("r-9"), "{error}");
}

fn error_line(code: &str, request: &str) -> Vec<u8> {
    let data = json!({"code": code, "message": "new", "retryable": true, "request": request});
    let reply =
        json!({"jsonrpc": "2.0", "id": null, "error": {"code": -32000, "message": "new", "data": data}});
    format!("{reply}\n").into_bytes()
}

#[test]
fn a_stream_that_cannot_be_followed_is_not_used_again() {
    let replies: [(&str, Code); 5] = [
        ("{\"jsonrpc\":\"2.0\",\"id\":99,\"result\":{}}\n", Code::ClientProtocol),
        ("nonsense\n", Code::ClientProtocol),
        ("{\"jsonrpc\":\"2.0\",\"method\":\"job.progress\",\"params\":{}}\n", Code::ClientProtocol),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,", Code::ClientDisconnected),
        ("", Code::ClientDisconnected),
    ];
    for (text, code) in replies {
        let fake = Fake::start(move |_| match text {
            "" => vec![Step::Close],
            _ => vec![Step::Raw(text.as_bytes().to_vec()), Step::Close],
        });
        let mut client = Client::connect(fake.path()).unwrap();
        assert_eq!(client.list().unwrap_err().code, code, "{text}");
        assert_eq!(client.list().unwrap_err().code, Code::ClientDisconnected);
    }
}

/// A lease that is given back without waiting: the answer comes before that of the next request, and is not taken for it.
#[test]
fn a_lease_that_is_let_go_keeps_the_connection_in_step() {
    let (sender, requests) = mpsc::channel();
    let fake = Fake::start(move |request| {
        sender.send((request.method.clone(), request.params)).unwrap();
        match request.method.as_str() {
            "lease.release" => vec![Step::Error(Error::new(Code::LeaseNotFound, "no such lease"))],
            _ => vec![Step::Reply(json!({"artifacts": []}), Vec::new())],
        }
    });
    let mut client = Client::connect(fake.path()).unwrap();
    client.let_go(7);
    client.let_go(8);
    assert!(client.list().unwrap().is_empty());
    client.let_go(9);
    assert!(client.list().unwrap().is_empty());
    let leases: Vec<_> = requests.try_iter().filter(|(method, _)| method == "lease.release").collect();
    assert_eq!(leases.len(), 3);
    assert_eq!(leases[0].1, json!({"lease": 7}));
}

#[test]
fn a_call_that_is_interrupted_ends_and_so_does_its_connection() {
    let (answer, wait) = mpsc::channel::<()>();
    let fake = Fake::start(move |_| {
        // Until the client has gone.
        let _ = wait.recv();
        vec![Step::Close]
    });
    let mut client = Client::connect(fake.path()).unwrap();
    let mut asked = 0;
    client.interrupt_with(Box::new(move || {
        asked += 1;
        asked == 2
    }));
    assert!(client.is_usable());
    assert_eq!(client.list().unwrap_err().code, Code::ClientInterrupted);
    assert!(!client.is_usable());
    assert_eq!(client.list().unwrap_err().code, Code::ClientDisconnected);
    drop(answer);
    fake.join();
}

#[test]
fn a_reply_may_have_fields_that_this_build_does_not_know() {
    let mut reply: Value = json!({"artifacts": []});
    reply["new"] = json!(1);
    let fake = Fake::start(move |_| vec![Step::Reply(reply.clone(), Vec::new())]);
    assert!(Client::connect(fake.path()).unwrap().list().unwrap().is_empty());
}

#[test]
fn nobody_listening_is_said_with_the_path() {
    let error = Client::connect(Path::new("/nonexistent/lodestream.sock")).unwrap_err();
    assert_eq!(error.code, Code::ClientConnect);
    assert!(error.message.contains("/nonexistent/lodestream.sock"));
}
