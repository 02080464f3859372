//! One connection: reads requests, runs them side by side, and lets go of everything when it ends.
//!
//! The connection is the lease: what a client holds is stored here and dropped with it (invariant 9).

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::io::Interest as Readiness;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::clients::Clients;
use super::writer::{self, Outgoing};
use crate::api::call::{Call, parse_call};
use crate::api::methods::Source;
use crate::api::scm;
use crate::api::wire::{self, FrameReader};
use crate::config::Limits;
use crate::error::{Code, Error, Result};
use crate::node::Node;
use crate::sys::identity::Tenant;
use crate::sys::peer;
use crate::telemetry::labels::Method;
use crate::tier::gpu::Importer;
use crate::tier::residency::{Hold, Viewer};
use crate::transfer::{Interest, Job, JobId};

/// Bytes read from the socket at a time.
const READ_BYTES: usize = 16 << 10;
/// How often progress is reported.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// How often a client that will send nothing more is checked for being gone, while its requests are answered.
const GONE_INTERVAL: Duration = Duration::from_millis(100);

/// One client.
pub(super) struct Connection {
    pub(super) node: Rc<Node>,
    pub(super) number: u64,
    pub(super) tenant: Tenant,
    /// The process that connected; 0 if the kernel does not say.
    pub(super) process: i32,
    /// What it calls itself.
    pub(super) name: RefCell<String>,
    /// All connections, this one among them.
    pub(super) clients: Rc<Clients>,
    /// The client's process, if the kernel can name it.
    pub(super) importer: Option<Importer>,
    pub(super) limits: Limits,
    pub(super) leases: RefCell<HashMap<u64, Hold>>,
    pub(super) interests: RefCell<HashMap<JobId, Interest>>,
    pub(super) in_flight: Cell<u32>,
    requests: Cell<u64>,
    out: mpsc::Sender<Outgoing>,
}

/// Serves a connection to its end.
pub(super) async fn serve(
    node: &Rc<Node>,
    socket: UnixStream,
    number: u64,
    tenant: Tenant,
    clients: Rc<Clients>,
    mut closing: watch::Receiver<bool>,
) {
    let limits = node.config().limits.clone();
    let (out, queue) = mpsc::channel(limits.requests_in_flight_max as usize + 1);
    tracing::debug!(connection = number, tenant = %tenant, "connected");
    let connection = Rc::new(Connection {
        node: Rc::clone(node),
        number,
        tenant,
        process: peer::process(socket.as_fd()).unwrap_or(0),
        name: RefCell::default(),
        clients,
        importer: peer::pidfd(socket.as_fd()).ok().map(Arc::new),
        limits,
        leases: RefCell::default(),
        interests: RefCell::default(),
        in_flight: Cell::new(0),
        requests: Cell::new(0),
        out,
    });
    connection.clients.enter(&connection);
    let mut tasks = JoinSet::new();
    let mut writing = Box::pin(writer::write(&connection, &socket, queue));
    tokio::select! {
        ended = &mut writing => {
            if ended.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
                node.metrics.error(Code::ApiSlowReader);
                tracing::warn!(connection = number, code = %Code::ApiSlowReader, "closed: the client does not read");
            }
        }
        () = connection.read(&socket, &mut tasks) => {}
        _ = closing.wait_for(|closing| *closing) => {}
    }
    connection.clients.leave(number);
    // Requests first, then the replies that name memory, then what keeps that memory.
    tasks.shutdown().await;
    drop(writing);
    connection.interests.borrow_mut().clear();
    let leases = std::mem::take(&mut *connection.leases.borrow_mut());
    node.leases.set(node.leases.get() - leases.len() as u32);
    node.metrics.leases.dec_by(leases.len() as i64);
    drop(leases);
    tracing::debug!(connection = number, "closed");
}

impl Connection {
    /// Who it may look at: everyone for the daemon's own user and root.
    pub(super) fn viewer(&self) -> Viewer {
        let own = self.node.own_uid;
        (self.tenant.uid != own && self.tenant.uid != 0).then_some(self.tenant.uid)
    }

    /// Ends a lease. `false`: this connection has no such lease.
    pub(super) fn end_lease(&self, lease: u64) -> bool {
        let hold = self.leases.borrow_mut().remove(&lease);
        if let (Some(hold), Some(importer)) = (&hold, &self.importer) {
            self.node.residency.let_go_of(hold.id(), importer);
        }
        if hold.is_some() {
            self.node.leases.set(self.node.leases.get() - 1);
            self.node.metrics.leases.dec();
        }
        hold.is_some()
    }

    /// Reads requests until the client closes, breaks a limit, or is told to go.
    async fn read(self: &Rc<Self>, socket: &UnixStream, tasks: &mut JoinSet<()>) {
        let mut frames = FrameReader::new(self.limits.request_bytes_max as usize);
        let mut fds = VecDeque::new();
        let mut buffer = vec![0; READ_BYTES];
        let mut began: Option<Instant> = None;
        loop {
            let mut received = Vec::new();
            let fds_max = self.limits.fds_per_message_max as usize;
            let step = socket
                .async_io(Readiness::READABLE, || scm::recv(socket, &mut buffer, &mut received, fds_max));
            let step = async {
                match began {
                    None => Some(step.await),
                    Some(began) => {
                        let deadline = began + Duration::from_millis(self.limits.frame_timeout_ms);
                        tokio::time::timeout_at(deadline.into(), step).await.ok()
                    }
                }
            };
            let outcome = tokio::select! {
                outcome = step => outcome,
                Some(_) = tasks.join_next() => continue,
            };
            match outcome {
                Some(Ok(0)) => return self.finish(socket, tasks).await,
                Some(Ok(bytes)) => frames.push(&buffer[..bytes]),
                Some(Err(error)) => {
                    if scm::too_many_fds(&error).is_some() {
                        self.last_words(Error::new(Code::ApiTooManyFds, error.to_string())).await;
                    }
                    return;
                }
                None => {
                    let most = self.limits.frame_timeout_ms;
                    let message =
                        format!("a request was not complete after {most} ms (limits.frame_timeout_ms)");
                    return self.last_words(Error::new(Code::ApiFrameTimeout, message)).await;
                }
            }
            fds.extend(received);
            if fds.len() > fds_max {
                let message = format!("more than {fds_max} descriptors wait for their requests");
                return self.last_words(Error::new(Code::ApiTooManyFds, message)).await;
            }
            loop {
                match frames.next_frame() {
                    Ok(Some(frame)) => {
                        // What follows is another frame, with a time of its own.
                        began = None;
                        self.dispatch(frame, &mut fds, tasks).await
                    }
                    Ok(None) => break,
                    Err(error) => return self.last_words(error.into()).await,
                }
            }
            began = match (frames.mid_frame(), began) {
                (false, _) => None,
                (true, before) => before.or_else(|| Some(Instant::now())),
            };
            if began.is_none() {
                // Descriptors belong to the request that they came with: nobody has asked for these.
                fds.clear();
            }
        }
    }

    /// The client sends nothing more: its requests are answered, unless it is gone.
    async fn finish(&self, socket: &UnixStream, tasks: &mut JoinSet<()>) {
        let mut tick = tokio::time::interval(GONE_INTERVAL);
        while !tasks.is_empty() {
            tokio::select! {
                _ = tasks.join_next() => {}
                _ = tick.tick() => if gone(socket) { return },
            }
        }
        self.close().await
    }

    /// Has the writer end the connection after what it still has to write.
    async fn close(&self) {
        self.say(Outgoing::Close).await;
        std::future::pending().await
    }

    /// Answers an error that ends the connection.
    async fn last_words(&self, error: Error) {
        self.node.metrics.error(error.code);
        tracing::info!(connection = self.number, code = %error.code, %error, "closed for an error");
        self.say(Outgoing::Line(wire::error_reply(&wire::Id::Null, &error, ""))).await;
        self.close().await;
    }

    /// Starts one request, or answers why not.
    async fn dispatch(self: &Rc<Self>, frame: &[u8], fds: &mut VecDeque<OwnedFd>, tasks: &mut JoinSet<()>) {
        let began = Instant::now();
        let serial = self.requests.replace(self.requests.get() + 1);
        let name = format!("{}.{}.{serial}", self.node.name(), self.number);
        let request = match wire::parse_request(frame) {
            Ok(request) => request,
            Err(refused) => {
                fds.clear();
                let error = Error::from(refused.error);
                self.node.metrics.error(error.code);
                return self.say(Outgoing::Line(wire::error_reply(&refused.id, &error, &name))).await;
            }
        };
        let silent = request.id.is_none();
        let id = request.id.unwrap_or(wire::Id::Null);
        let parsed = parse_call(&request.method, request.params.as_deref());
        let call = parsed
            .inspect_err(|_| drop_fds(request.params.as_deref(), fds))
            .map_err(Error::from)
            .and_then(|call| {
                let sent = take_fds(&call, fds)?;
                let most = self.limits.requests_in_flight_max;
                if self.in_flight.get() >= most {
                    let message = format!("{most} requests of this connection are unanswered: wait for one");
                    return Err(Error::new(Code::ApiTooManyRequests, message));
                }
                Ok((call, sent))
            });
        match call {
            Ok((call, sent)) => {
                self.in_flight.set(self.in_flight.get() + 1);
                let connection = Rc::clone(self);
                tasks.spawn_local(async move {
                    let method = Method::from_name(call.name());
                    let answer = connection.answer(call, sent, &id).await;
                    connection.node.metrics.request(method, answer.as_ref().err().map(|e| e.code), began.elapsed());
                    let message = answer.unwrap_or_else(|error| {
                        tracing::info!(request = name, method = request.method, code = %error.code, %error, "refused");
                        Outgoing::Line(wire::error_reply(&id, &error, &name))
                    });
                    if silent {
                        connection.swallow(message);
                    } else {
                        connection.say(message).await;
                    }
                    // Not before it is queued: a client that does not read must run into the limit.
                    connection.in_flight.set(connection.in_flight.get() - 1);
                });
            }
            Err(error) => {
                let method = Method::from_name(&request.method);
                self.node.metrics.request(method, Some(error.code), began.elapsed());
                if !silent {
                    self.say(Outgoing::Line(wire::error_reply(&id, &error, &name))).await;
                }
            }
        }
    }

    /// Drops the reply to a request without an id. Nobody can end a lease that nobody was told of.
    fn swallow(&self, message: Outgoing) {
        if let Outgoing::Attached(_, attached) = message {
            let lease = attached.lease;
            drop(attached);
            self.end_lease(lease);
        }
    }

    /// Queues a message; waits if the client is slow to read.
    async fn say(&self, message: Outgoing) {
        // Without a writer the connection is ending.
        let _ = self.out.send(message).await;
    }

    /// Reports a job's progress until it ends. A client that reads slowly gets fewer reports.
    pub(super) async fn report(&self, job: &Job) {
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        while !job.state().ended() && !self.out.is_closed() {
            tokio::select! {
                _ = tick.tick() => {
                    let _ = self.out.try_send(Outgoing::Progress(Box::new(job.info())));
                }
                () = job.ended() => {}
            }
        }
        self.say(Outgoing::Progress(Box::new(job.info()))).await;
    }
}

/// The descriptors that a request names.
fn take_fds(call: &Call, fds: &mut VecDeque<OwnedFd>) -> Result<Vec<OwnedFd>> {
    let source = match call {
        Call::ArtifactResolve(request) => Some(&request.source),
        Call::ArtifactPrefetch(request) => Some(&request.source),
        Call::ArtifactAttach(request) => request.source.as_ref(),
        Call::ArtifactStat(request)
        | Call::ArtifactPin(request)
        | Call::ArtifactUnpin(request)
        | Call::ArtifactEvict(request) => request.source.as_ref(),
        _ => None,
    };
    let Some(Source::Fds(wanted)) = source else { return Ok(Vec::new()) };
    let count = wanted.fds as usize;
    // Refused or not: none of them is left for the next request.
    let sent: Vec<_> = fds.drain(..count.min(fds.len())).collect();
    if count == 0 || count > sent.len() {
        let message = format!("the request names {count} descriptors, and {} came with it", sent.len());
        return Err(Error::new(Code::SourceFdsInvalid, message));
    }
    Ok(sent)
}

/// Drops the descriptors that a refused request names, or all if that cannot be told.
fn drop_fds(params: Option<&RawValue>, fds: &mut VecDeque<OwnedFd>) {
    #[derive(Deserialize)]
    struct Named {
        source: Count,
    }
    #[derive(Deserialize)]
    struct Count {
        fds: usize,
    }
    let named = params.and_then(|params| serde_json::from_str::<Named>(params.get()).ok());
    let count = named.map_or(fds.len(), |named| named.source.fds.min(fds.len()));
    fds.drain(..count);
}

/// Whether the other end is closed in both directions.
fn gone(socket: &UnixStream) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut poll, Some(&now)).is_ok() && poll[0].revents().contains(PollFlags::HUP)
}
