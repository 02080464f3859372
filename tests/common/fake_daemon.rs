//! A daemon for tests: one connection on a real socket, real sealed memory, answers as the test says.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use serde_json::Value;

use crate::api::methods::*;
use crate::api::scm;
use crate::api::wire::{self, FrameReader, Id};
use crate::error::Error;

/// What the fake daemon sends.
pub(crate) enum Step {
    /// The reply, with descriptors.
    Reply(Value, Vec<OwnedFd>),
    /// An error reply.
    Error(Error),
    /// A notification of progress.
    Progress(Box<JobInfo>),
    /// These bytes.
    Raw(Vec<u8>),
    /// Nothing more: the connection is closed.
    Close,
}

/// One request as it came.
pub(crate) struct Received {
    pub(crate) method: String,
    pub(crate) params: Value,
    pub(crate) files: Vec<OwnedFd>,
}

pub(crate) struct Fake {
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Fake {
    /// Answers each request of the first connection with what `answer` gives.
    pub(crate) fn start(answer: impl FnMut(Received) -> Vec<Step> + Send + 'static) -> Fake {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || serve(&listener.accept().unwrap().0, answer));
        Fake { path, thread: Some(thread), _directory: directory }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the daemon has gone.
    pub(crate) fn join(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

fn serve(stream: &UnixStream, mut answer: impl FnMut(Received) -> Vec<Step>) {
    let mut frames = FrameReader::new(1 << 20);
    let mut files = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let request = loop {
            if let Some(frame) = frames.next_frame().unwrap() {
                break wire::parse_request(frame).unwrap();
            }
            match scm::recv(stream, &mut buffer, &mut files, scm::FDS_MAX) {
                Ok(0) | Err(_) => return,
                Ok(count) => frames.push(&buffer[..count]),
            }
        };
        let params = request.params.map_or(Value::Null, |params| serde_json::from_str(params.get()).unwrap());
        let id = request.id.unwrap_or(Id::Null);
        let received = Received { method: request.method, params, files: std::mem::take(&mut files) };
        for step in answer(received) {
            let (line, fds) = match step {
                Step::Reply(result, fds) => (wire::reply(&id, &result, usize::MAX).unwrap(), fds),
                Step::Error(error) => (wire::error_reply(&id, &error, "r-1"), Vec::new()),
                Step::Progress(job) => (wire::progress(&job, usize::MAX).unwrap(), Vec::new()),
                Step::Raw(bytes) => (bytes, Vec::new()),
                Step::Close => return,
            };
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let sent = scm::send(stream, &line, &borrowed).unwrap();
            std::io::Write::write_all(&mut &*stream, &line[sent..]).unwrap();
        }
    }
}

pub(crate) const SEALED: SealFlags =
    SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE).union(SealFlags::SEAL);

/// Memory with this content, padded to whole pages, and these seals.
pub(crate) fn memory(content: &[u8], seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("fake", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, content.len().next_multiple_of(4096) as u64).unwrap();
    assert_eq!(rustix::io::pwrite(&fd, content, 0).unwrap(), content.len());
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// A job in this state.
pub(crate) fn job(number: u64, state: JobState) -> JobInfo {
    JobInfo {
        job: number,
        state,
        artifact: "/models/m".to_owned(),
        device: "host".to_owned(),
        bytes: 512 << 20,
        total: 1 << 30,
        rate: 1e9,
        source: "file".to_owned(),
        peers: Vec::new(),
        path: BTreeMap::new(),
        demoted_bytes: 0,
        eta_ms: Some(500),
        bottleneck: Some("storage".to_owned()),
        elapsed_ms: 500,
        digest: None,
        error: None,
    }
}

/// An attach reply: one region of parts with these sizes, and no tensors yet.
pub(crate) fn attach_reply(parts: &[u64]) -> AttachReply {
    AttachReply {
        lease: 7,
        digest: Some("sha256:00".to_owned()),
        format: "safetensors".to_owned(),
        regions: vec![RegionView {
            device: "host".to_owned(),
            bytes: parts.iter().sum(),
            pages: "4k".to_owned(),
            parts: parts.iter().zip(0..).map(|(&bytes, fd)| PartView { fd, bytes }).collect(),
        }],
        tensors: Vec::new(),
        files: Vec::new(),
        metadata: BTreeMap::from([("format".to_owned(), "pt".to_owned())]),
        timings_ms: BTreeMap::from([("total".to_owned(), 0.5)]),
    }
}

/// A tensor of bytes in region 0.
pub(crate) fn tensor(name: &str, offset: u64, nbytes: u64) -> TensorView {
    TensorView {
        name: name.to_owned(),
        dtype: "U8".to_owned(),
        shape: vec![nbytes],
        region: 0,
        offset,
        nbytes,
    }
}
