//! A raw client: JSON-RPC lines over a Unix socket, descriptors by SCM_RIGHTS, and regions read through their descriptors.
//! It shares no code with the product's own client, so that neither can hide a mistake of the other.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::SealFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde_json::{Value, json};

/// Descriptors that one message can carry: the kernel's SCM_MAX_FD.
const FDS_MAX: usize = 253;
/// How long a reply may take before the test fails.
const REPLY_SECONDS_MAX: u64 = 60;

/// An error reply.
#[derive(Debug)]
pub struct Failure {
    pub code: String,
    pub message: String,
    pub retryable: bool,
}

/// A connection to the daemon.
pub struct Connection {
    stream: UnixStream,
    pending: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    next_id: u64,
    /// `job.progress` and other notifications, as they came.
    pub notifications: Vec<Value>,
}

impl Connection {
    pub fn open(socket: &Path) -> io::Result<Connection> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(REPLY_SECONDS_MAX)))?;
        stream.set_write_timeout(Some(Duration::from_secs(REPLY_SECONDS_MAX)))?;
        Ok(Connection {
            stream,
            pending: Vec::new(),
            fds: VecDeque::new(),
            next_id: 0,
            notifications: Vec::new(),
        })
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends a request and returns its id without waiting.
    pub fn send(&mut self, method: &str, params: &Value) -> u64 {
        self.send_with_fds(method, params, &[])
    }

    /// The same with descriptors.
    pub fn send_with_fds(&mut self, method: &str, params: &Value, fds: &[BorrowedFd<'_>]) -> u64 {
        self.next_id += 1;
        let request = json!({"jsonrpc": "2.0", "id": self.next_id, "method": method, "params": params});
        self.send_raw_with_fds(format!("{request}\n").as_bytes(), fds);
        self.next_id
    }

    /// Sends bytes as they are; the descriptors go with the first.
    pub fn send_raw_with_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut sent = 0;
        if !fds.is_empty() {
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
            let first = [IoSlice::new(bytes)];
            sent = rustix::net::sendmsg(&self.stream, &first, &mut control, SendFlags::NOSIGNAL).unwrap();
        }
        match self.stream.write_all(&bytes[sent..]) {
            // A daemon that has closed may have said why: the answer tells.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written.unwrap(),
        }
    }

    /// Takes at most this many bytes of what came, whatever they are.
    pub fn take(&mut self, bytes: usize) -> io::Result<usize> {
        self.stream.read(&mut vec![0; bytes])
    }

    /// The next line; nothing if the daemon has closed the connection.
    pub fn line(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let mut buffer = [0; 1 << 16];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(&mut buffer)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let received = match received {
                Ok(message) => message.bytes,
                Err(rustix::io::Errno::AGAIN) => panic!("no answer within {REPLY_SECONDS_MAX} s"),
                // A peer that was killed with our bytes unread resets the connection instead of closing it.
                Err(rustix::io::Errno::CONNRESET) => 0,
                Err(error) => panic!("recvmsg: {error}"),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            if received == 0 {
                return None;
            }
            self.pending.extend_from_slice(&buffer[..received]);
        }
    }

    /// The reply with this id; others that come before it are notifications.
    pub fn reply(&mut self, id: u64) -> Result<Value, Failure> {
        loop {
            let Some(mut line) = self.line() else {
                return Err(Failure {
                    code: "closed".to_owned(),
                    message: "the daemon closed the connection".to_owned(),
                    retryable: false,
                });
            };
            assert_eq!(line["jsonrpc"], "2.0", "{line}");
            if line.get("method").is_some() {
                assert!(line.get("id").is_none(), "a notification has no id: {line}");
                self.notifications.push(line);
            } else if line["id"] == id || line["id"].is_null() {
                // Without an id the daemon says why it ends the connection.
                let Some(error) = line.get("error") else { return Ok(line["result"].take()) };
                return Err(failure(error));
            } else {
                panic!("a reply to something else: {line}");
            }
        }
    }

    pub fn call(&mut self, method: &str, params: &Value) -> Result<Value, Failure> {
        let id = self.send(method, params);
        self.reply(id)
    }

    /// The code of the error that a request must be answered with.
    #[track_caller]
    pub fn code(&mut self, method: &str, params: &Value) -> String {
        match self.call(method, params) {
            Ok(result) => panic!("{method} {params} succeeded: {result}"),
            Err(failure) => failure.code,
        }
    }

    /// Attaches and takes the descriptors of the reply.
    pub fn attach(&mut self, params: &Value) -> Result<Attached, Failure> {
        let id = self.send("artifact.attach", params);
        self.attached(id)
    }

    /// Attaches to files that this process has opened.
    pub fn attach_files(&mut self, files: &[File], names: &[&str]) -> Result<Attached, Failure> {
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let source = json!({"source": {"fds": files.len(), "names": names}});
        let id = self.send_with_fds("artifact.attach", &source, &fds);
        self.attached(id)
    }

    /// The reply to an attach, with its descriptors.
    pub fn attached(&mut self, id: u64) -> Result<Attached, Failure> {
        let reply = self.reply(id)?;
        let count: usize = list(&reply["regions"]).iter().map(|region| list(&region["parts"]).len()).sum();
        assert!(self.fds.len() >= count, "{count} descriptors announced, {} came", self.fds.len());
        let mut fds: Vec<Option<File>> = self.fds.drain(..count).map(|fd| Some(File::from(fd))).collect();
        let regions = list(&reply["regions"])
            .iter()
            .map(|region| {
                let parts = list(&region["parts"])
                    .iter()
                    .map(|part| {
                        let index = usize::try_from(number(&part["fd"])).unwrap();
                        (fds[index].take().unwrap(), number(&part["bytes"]))
                    })
                    .collect();
                Region::new(parts, number(&region["bytes"]))
            })
            .collect();
        Ok(Attached { reply, regions })
    }

    /// Makes it resident; the job as it ended.
    pub fn load(&mut self, source: &Path) -> Value {
        let job = self.call("artifact.prefetch", &json!({"source": source})).unwrap();
        self.wait(&job["job"]["job"])
    }

    /// Makes resident what a prefetch with these parameters asks for; how it failed, if it did.
    pub fn load_on(&mut self, params: &Value) -> Result<Value, Failure> {
        let job = self.call("artifact.prefetch", params)?;
        let job = self.wait(&job["job"]["job"]);
        match job.get("error") {
            Some(error) => Err(Failure {
                code: text(&error["code"]).to_owned(),
                message: text(&error["message"]).to_owned(),
                retryable: error["retryable"].as_bool().unwrap(),
            }),
            None => Ok(job),
        }
    }

    /// The job once it has ended.
    pub fn wait(&mut self, job: &Value) -> Value {
        let mut reply = self.call("job.wait", &json!({"job": job})).unwrap();
        reply["job"].take()
    }
}

fn failure(error: &Value) -> Failure {
    let data = &error["data"];
    assert!(error["code"].is_i64(), "{error}");
    assert!(lodestream::Code::parse(text(&data["code"])).is_some(), "an error without a known code: {error}");
    Failure {
        code: text(&data["code"]).to_owned(),
        message: text(&error["message"]).to_owned(),
        retryable: data["retryable"].as_bool().unwrap(),
    }
}

/// What an attach gave: the reply, and the regions that its descriptors name.
pub struct Attached {
    pub reply: Value,
    pub regions: Vec<Region>,
}

impl Attached {
    /// Names of the tensors, in the reply's order.
    pub fn names(&self) -> Vec<String> {
        list(&self.reply["tensors"]).iter().map(|tensor| text(&tensor["name"]).to_owned()).collect()
    }

    /// The entry of a tensor.
    #[track_caller]
    pub fn view(&self, name: &str) -> &Value {
        list(&self.reply["tensors"])
            .iter()
            .find(|tensor| tensor["name"] == name)
            .unwrap_or_else(|| panic!("no tensor {name} in {:?}", self.names()))
    }

    /// The bytes of a tensor.
    #[track_caller]
    pub fn tensor(&self, name: &str) -> Vec<u8> {
        self.bytes(self.view(name))
    }

    /// The bytes of a whole file.
    #[track_caller]
    pub fn file(&self, name: &str) -> Vec<u8> {
        let file = list(&self.reply["files"]).iter().find(|file| file["name"] == name);
        self.bytes(file.unwrap_or_else(|| panic!("no file {name} in {}", self.reply["files"])))
    }

    fn bytes(&self, view: &Value) -> Vec<u8> {
        let region = &self.regions[usize::try_from(number(&view["region"])).unwrap()];
        region.read(number(&view["offset"]), number(&view["nbytes"]))
    }

    pub fn lease(&self) -> u64 {
        number(&self.reply["lease"])
    }
}

/// A region: its parts one behind the other.
pub struct Region {
    parts: Vec<(File, u64)>,
}

impl Region {
    /// Invariant 8: what is shared was sealed before, against shrinking, growing, new writers and unsealing.
    fn new(parts: Vec<(File, u64)>, bytes: u64) -> Region {
        let wanted = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        for (file, size) in &parts {
            let seals = rustix::fs::fcntl_get_seals(file).unwrap();
            assert!(seals.contains(wanted), "a shared descriptor is not sealed: {seals:?}");
            assert_eq!(file.metadata().unwrap().len(), *size);
            assert!(file.write_at(&[0], 0).is_err(), "a shared descriptor can be written to");
        }
        assert_eq!(parts.iter().map(|(_, size)| size).sum::<u64>(), bytes);
        Region { parts }
    }

    /// `nbytes` from `offset`, over as many parts as it takes.
    #[track_caller]
    pub fn read(&self, offset: u64, nbytes: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(nbytes).unwrap()];
        let (mut done, mut start) = (0, 0);
        for (file, size) in &self.parts {
            let at = offset + done as u64;
            if done < bytes.len() && at < start + size {
                let length = usize::try_from((start + size - at).min((bytes.len() - done) as u64)).unwrap();
                file.read_exact_at(&mut bytes[done..done + length], at - start).unwrap();
                done += length;
            }
            start += size;
        }
        assert_eq!(done, bytes.len(), "{offset} + {nbytes} lies outside the region of {start} bytes");
        bytes
    }
}

#[track_caller]
pub fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

#[track_caller]
pub fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"))
}

#[track_caller]
pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}"))
}
