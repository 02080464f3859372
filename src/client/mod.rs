//! The Rust client: blocking, one request at a time, over the socket API.
//!
//! What is attached is mapped into this process and stays readable for as long as the [`Attached`] lives, also
//! after its lease was released and after the daemon died (invariant 9). A lease ends with [`Client::release`] or
//! with the client, which is one connection.

mod attached;
mod connection;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;

use attached::Contexts;
pub use attached::{Attached, Data, Region, TensorRef, Timings};
use connection::Connection;
pub use connection::Interrupt;

use crate::api::methods::*;
use crate::api::wire::ErrorObject;
use crate::error::{Code, Error, Result};
use crate::sys::cuda::CudaError;
use crate::topology::Topology;

/// What can go wrong on this side of the socket, and what the daemon answered.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there, or it may not be reached.
    #[error("cannot reach the daemon at {}: {source}; is `lodestream serve` running?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The daemon closed the connection. What is mapped stays readable.
    #[error("the daemon closed the connection: {0}")]
    Disconnected(String),
    /// The connection was opened before this process was forked off.
    #[error(
        "this process was forked after it had connected, and two cannot share a connection: connect anew in the child; \
         what was attached stays readable"
    )]
    Forked,
    /// The call was interrupted while it waited for the daemon.
    #[error("interrupted while the daemon had not answered yet")]
    Interrupted,
    /// The daemon sent something that this client does not understand.
    #[error("the daemon's answer is not understood: {0}")]
    Protocol(String),
    /// What the daemon sent cannot be mapped.
    #[error("cannot map what the daemon sent: {0}")]
    Map(String),
    /// The driver of a GPU refused a call.
    #[error("the GPU cannot be used here: {0}")]
    Device(CudaError),
    /// The request names another number of files than go with it.
    #[error("the source says {said} files, but {given} are sent with it")]
    Files {
        /// What the request says.
        said: u32,
        /// How many there are.
        given: usize,
    },
    /// The daemon refused the request.
    #[error("{}", .0.message)]
    Refused(Error),
}

impl ClientError {
    /// The stable code; the daemon's own if it is the daemon that refused.
    pub fn code(&self) -> Code {
        match self {
            ClientError::Connect { .. } => Code::ClientConnect,
            ClientError::Disconnected(_) => Code::ClientDisconnected,
            ClientError::Forked => Code::ClientForked,
            ClientError::Interrupted => Code::ClientInterrupted,
            ClientError::Protocol(_) => Code::ClientProtocol,
            ClientError::Map(_) => Code::ClientMap,
            ClientError::Device(_) => Code::ClientDevice,
            ClientError::Files { .. } => Code::SourceFdsInvalid,
            ClientError::Refused(error) => error.code,
        }
    }
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(error) => error,
            other => Error::new(other.code(), other.to_string()),
        }
    }
}

/// The error that a daemon described. A code that this build does not know becomes `internal`, its text kept.
pub fn error_of(data: &ErrorData) -> Error {
    let mut message = data.message.clone();
    let code = Code::parse(&data.code).unwrap_or_else(|| {
        message = format!("{message} [{}]", data.code);
        Code::Internal
    });
    if code == Code::Internal && !data.request.is_empty() {
        message = format!("{message} (request {} in the daemon's log)", data.request);
    }
    Error::new(code, message).kept(data.kept.clone())
}

fn refusal(error: ErrorObject) -> ClientError {
    ClientError::Refused(match &error.data {
        Some(data) => error_of(data),
        None => Error::new(Code::Internal, format!("{} ({})", error.message, error.code)),
    })
}

/// Receives what a job reports while a call waits for its reply.
pub type Progress<'a> = &'a mut dyn FnMut(&JobInfo);

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    contexts: Contexts,
}

impl Client {
    /// Connects to the daemon that listens at `path`.
    ///
    /// # Errors
    /// `client.connect`.
    pub fn connect(path: &Path) -> Result<Client> {
        Ok(Client { connection: Connection::open(path)?, contexts: Contexts::new() })
    }

    /// A client over a stream to an engine in this process.
    pub(crate) fn over(stream: UnixStream) -> Client {
        Client { connection: Connection::over(stream), contexts: Contexts::new() }
    }

    /// Asks `interrupt` again and again while a call waits for its reply. If it says so, the call ends with
    /// `client.interrupted`, and the connection cannot be used further.
    pub fn interrupt_with(&mut self, interrupt: Interrupt) {
        self.connection.interrupt_with(interrupt);
    }

    /// Whether requests can be made: not after a disconnect, an interrupted call or in a forked child.
    pub fn is_usable(&self) -> bool {
        self.connection.is_usable()
    }

    /// Gives a lease back and does not wait for the daemon. Nothing happens if the connection is gone, and the lease with it.
    pub fn let_go(&mut self, lease: u64) {
        self.connection.tell("lease.release", &ReleaseRequest { lease });
    }

    /// The daemon's process, as this one sees it; `None` where it does not.
    pub fn process(&self) -> Option<i32> {
        self.connection.process()
    }

    /// `hello`: picks the API version and says who and what the daemon is.
    pub fn hello(&mut self) -> Result<HelloReply> {
        let request = HelloRequest {
            client: concat!("lodestream ", env!("CARGO_PKG_VERSION")).to_owned(),
            versions: VERSIONS.to_vec(),
        };
        self.call("hello", &request)
    }

    /// `artifact.resolve`. `files` are the open files of a [`Source::Fds`], else empty; so in the other methods.
    pub fn resolve(&mut self, request: &ResolveRequest, files: &[BorrowedFd<'_>]) -> Result<ResolveReply> {
        check_files(Some(&request.source), files)?;
        Ok(self.send("artifact.resolve", request, files, &mut |_| ())?.0)
    }

    /// `artifact.prefetch`: starts or joins a job, and does not wait for it.
    pub fn prefetch(
        &mut self,
        request: &PrefetchRequest,
        files: &[BorrowedFd<'_>],
        progress: Progress<'_>,
    ) -> Result<JobInfo> {
        check_files(Some(&request.source), files)?;
        let (reply, _): (PrefetchReply, _) = self.send("artifact.prefetch", request, files, progress)?;
        Ok(reply.job)
    }

    /// `artifact.attach`: waits until it is resident, takes a lease and maps its regions.
    ///
    /// # Errors
    /// The daemon's, or `client.map`; then the lease is given back.
    pub fn attach(
        &mut self,
        request: &AttachRequest,
        files: &[BorrowedFd<'_>],
        progress: Progress<'_>,
    ) -> Result<Attached> {
        check_files(request.source.as_ref(), files)?;
        let begin = Instant::now();
        let (reply, fds): (AttachReply, _) = self.send("artifact.attach", request, files, progress)?;
        let lease = reply.lease;
        match Attached::map(reply, fds, begin, &mut self.contexts) {
            Ok(attached) => Ok(attached),
            Err(error) => {
                // The first error is the one to report; if this one fails too, the connection is gone and the
                // lease with it.
                let _ = self.release(lease);
                Err(error.into())
            }
        }
    }

    /// Gives up the memory on GPUs of what is attached, and its lease. The addresses stay, for [`Client::wake`].
    ///
    /// # Errors
    /// `lease.not_found` if the lease was released before; the memory is given up all the same.
    pub fn sleep(&mut self, attached: &mut Attached) -> Result<()> {
        attached.sleep();
        self.release(attached.lease())
    }

    /// Attaches again what sleeps, at the same addresses on its GPU. `request` is the one that it was attached by.
    ///
    /// # Errors
    /// The daemon's; `client.map` if the artifact is another now; `client.device`. What sleeps goes on sleeping.
    pub fn wake(
        &mut self,
        attached: &mut Attached,
        request: &AttachRequest,
        files: &[BorrowedFd<'_>],
        progress: Progress<'_>,
    ) -> Result<()> {
        check_files(request.source.as_ref(), files)?;
        let (reply, fds): (AttachReply, _) = self.send("artifact.attach", request, files, progress)?;
        let lease = reply.lease;
        attached.take_in(reply, fds).map_err(|error| {
            let _ = self.release(lease);
            error.into()
        })
    }

    /// `artifact.list`.
    pub fn list(&mut self) -> Result<Vec<ArtifactInfo>> {
        let reply: ListReply = self.call("artifact.list", &ListRequest {})?;
        Ok(reply.artifacts)
    }

    /// `artifact.stat`.
    pub fn stat(&mut self, request: &ArtifactRequest, files: &[BorrowedFd<'_>]) -> Result<ArtifactInfo> {
        self.artifact("artifact.stat", request, files)
    }

    /// `artifact.pin`.
    pub fn pin(&mut self, request: &ArtifactRequest, files: &[BorrowedFd<'_>]) -> Result<ArtifactInfo> {
        self.artifact("artifact.pin", request, files)
    }

    /// `artifact.unpin`.
    pub fn unpin(&mut self, request: &ArtifactRequest, files: &[BorrowedFd<'_>]) -> Result<ArtifactInfo> {
        self.artifact("artifact.unpin", request, files)
    }

    /// `artifact.evict`: gives the artifact as it was.
    pub fn evict(&mut self, request: &ArtifactRequest, files: &[BorrowedFd<'_>]) -> Result<ArtifactInfo> {
        self.artifact("artifact.evict", request, files)
    }

    /// `lease.release`. What is mapped stays readable.
    pub fn release(&mut self, lease: u64) -> Result<()> {
        let _: EmptyReply = self.call("lease.release", &ReleaseRequest { lease })?;
        Ok(())
    }

    /// `job.get`.
    pub fn job_get(&mut self, job: u64) -> Result<JobInfo> {
        let reply: JobReply = self.call("job.get", &JobRequest { job })?;
        Ok(reply.job)
    }

    /// `job.wait`: gives the job when it has ended or the time is over.
    pub fn job_wait(&mut self, request: &JobWaitRequest, progress: Progress<'_>) -> Result<JobInfo> {
        let (reply, _): (JobReply, _) = self.send("job.wait", request, &[], progress)?;
        Ok(reply.job)
    }

    /// `job.cancel`.
    pub fn job_cancel(&mut self, job: u64) -> Result<JobInfo> {
        let reply: JobReply = self.call("job.cancel", &JobRequest { job })?;
        Ok(reply.job)
    }

    /// `job.list`.
    pub fn job_list(&mut self) -> Result<Vec<JobInfo>> {
        let reply: JobListReply = self.call("job.list", &JobListRequest {})?;
        Ok(reply.jobs)
    }

    /// `node.status`.
    pub fn status(&mut self) -> Result<StatusReply> {
        self.call("node.status", &StatusRequest {})
    }

    /// `node.peers`.
    ///
    /// # Errors
    /// [`Error`]; `api.forbidden` unless the client is of the daemon's own user.
    pub fn peers(&mut self) -> Result<PeersReply, Error> {
        self.call("node.peers", &PeersRequest {})
    }

    /// `node.topology`.
    pub fn topology(&mut self) -> Result<Topology> {
        self.call("node.topology", &TopologyRequest {})
    }

    fn artifact(
        &mut self,
        method: &'static str,
        request: &ArtifactRequest,
        files: &[BorrowedFd<'_>],
    ) -> Result<ArtifactInfo> {
        check_files(request.source.as_ref(), files)?;
        let (reply, _): (ArtifactReply, _) = self.send(method, request, files, &mut |_| ())?;
        Ok(reply.artifact)
    }

    fn call<R: DeserializeOwned>(&mut self, method: &'static str, request: &impl Serialize) -> Result<R> {
        Ok(self.send(method, request, &[], &mut |_| ())?.0)
    }

    fn send<R: DeserializeOwned>(
        &mut self,
        method: &'static str,
        request: &impl Serialize,
        files: &[BorrowedFd<'_>],
        progress: Progress<'_>,
    ) -> Result<(R, Vec<OwnedFd>)> {
        Ok(self.connection.call(method, request, files, progress)?)
    }
}

fn check_files(source: Option<&Source>, files: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
    let said = match source {
        Some(Source::Fds(source)) => source.fds,
        Some(Source::Uri(_)) | None => 0,
    };
    if usize::try_from(said) == Ok(files.len()) {
        Ok(())
    } else {
        Err(ClientError::Files { said, given: files.len() })
    }
}

#[cfg(test)]
#[path = "../../tests/common/fake_daemon.rs"]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
