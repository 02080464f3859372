//! `Node`: the daemon of this node, or an engine in this process, and the connections to it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use lodestream::api::methods::{
    AttachRequest, JobInfo, JobState, JobWaitRequest, PrefetchRequest, ResolveRequest, TargetRequest,
};
use lodestream::client::{self, Client, Interrupt};
use lodestream::in_process::{self, Engine};
use lodestream::{Code, Error};
use pyo3::prelude::*;

use crate::attached::Attached;
use crate::convert;
use crate::error::{Failure, error};
use crate::lease::Lease;
use crate::source::Named;

/// A wait is asked about this often: by Ctrl-C, and for its progress. Milliseconds.
const STEP_MS: u64 = 100;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the daemon's parts are reached.
enum Way {
    Socket(PathBuf),
    Direct(Mutex<Option<Engine>>),
}

struct Slot {
    client: Option<Client>,
    /// Counts connections: leases end with theirs.
    connection: u64,
    closed: bool,
}

/// What a node and everything attached through it share.
pub(crate) struct Shared {
    way: Way,
    slot: Mutex<Slot>,
    /// The thread that has the slot: a signal handler of that thread must not wait for it.
    owner: Mutex<Option<ThreadId>>,
    /// Leases that have ended and that the daemon was not told of yet: connection, number.
    ended: Mutex<Vec<(u64, u64)>>,
    /// What a signal handler raised during a wait.
    raised: Arc<Mutex<Option<PyErr>>>,
    process: u32,
}

impl Shared {
    fn new(way: Way) -> Arc<Shared> {
        Arc::new(Shared {
            way,
            slot: Mutex::new(Slot { client: None, connection: 0, closed: false }),
            owner: Mutex::default(),
            ended: Mutex::default(),
            raised: Arc::default(),
            process: std::process::id(),
        })
    }

    fn is_own(&self) -> bool {
        self.process == std::process::id()
    }

    /// A new connection. Calls on it can be interrupted.
    fn open(&self) -> Result<Client, Error> {
        let mut client = match &self.way {
            Way::Socket(path) => Client::connect(path)?,
            Way::Direct(engine) => match &*lock(engine) {
                Some(engine) => engine.connect()?,
                None => return Err(closed()),
            },
        };
        client.interrupt_with(self.interrupt());
        Ok(client)
    }

    fn interrupt(&self) -> Interrupt {
        let raised = Arc::clone(&self.raised);
        Box::new(move || match Python::try_attach(|py| py.check_signals()) {
            Some(Ok(())) => false,
            Some(Err(error)) => {
                *lock(&raised) = Some(error);
                true
            }
            // The interpreter ends.
            None => true,
        })
    }

    fn failure(&self, error: Error) -> Failure {
        if error.code == Code::ClientInterrupted
            && let Some(raised) = lock(&self.raised).take()
        {
            return Failure::Python(raised);
        }
        Failure::Lodestream(error)
    }

    /// Makes a call on the one connection that leases belong to, and says which one that was. A daemon that has gone away
    /// since the last call is connected to anew. Not with the interpreter's lock: it may wait.
    pub(crate) fn call<T>(
        &self,
        mut act: impl FnMut(&mut Client) -> Result<T, Error>,
    ) -> Result<(T, u64), Failure> {
        if !self.is_own() {
            return Err(Failure::Lodestream(client::ClientError::Forked.into()));
        }
        if *lock(&self.owner) == Some(std::thread::current().id()) {
            return Err(error(
                Code::ClientInterrupted,
                "a signal handler called the node while its thread waits for it",
            ));
        }
        let outcome = {
            let mut slot = lock(&self.slot);
            *lock(&self.owner) = Some(std::thread::current().id());
            let outcome = self.act(&mut slot, &mut act);
            *lock(&self.owner) = None;
            outcome
        };
        self.tell_ended();
        outcome.map_err(|error| self.failure(error))
    }

    fn act<T>(
        &self,
        slot: &mut Slot,
        act: &mut impl FnMut(&mut Client) -> Result<T, Error>,
    ) -> Result<(T, u64), Error> {
        let had = slot.client.as_ref().is_some_and(Client::is_usable);
        match self.act_once(slot, act) {
            Err(error) if had && error.code == Code::ClientDisconnected => self.act_once(slot, act),
            outcome => outcome,
        }
    }

    fn act_once<T>(
        &self,
        slot: &mut Slot,
        act: &mut impl FnMut(&mut Client) -> Result<T, Error>,
    ) -> Result<(T, u64), Error> {
        if slot.closed {
            return Err(closed());
        }
        let client = match slot.client.take().filter(Client::is_usable) {
            Some(client) => client,
            None => {
                let client = self.open()?;
                slot.connection += 1;
                client
            }
        };
        let done = act(slot.client.insert(client))?;
        Ok((done, slot.connection))
    }

    /// Gives a lease back and waits for the answer.
    pub(crate) fn release(&self, connection: u64, lease: u64) -> Result<(), Failure> {
        let gone = {
            let slot = lock(&self.slot);
            slot.closed || slot.connection != connection
        };
        if gone || !self.is_own() {
            return Ok(());
        }
        match self.call(|client| client.release(lease)) {
            // On a connection that is newer than the lease, nobody knows of it.
            Err(Failure::Lodestream(error))
                if matches!(
                    error.code,
                    Code::LeaseNotFound | Code::ClientDisconnected | Code::ClientConnect
                ) =>
            {
                Ok(())
            }
            outcome => outcome.map(|_| ()),
        }
    }

    /// Gives a lease back and waits for nothing.
    pub(crate) fn let_go(&self, connection: u64, lease: u64) {
        if self.is_own() {
            lock(&self.ended).push((connection, lease));
            self.tell_ended();
        }
    }

    /// Tells the daemon of leases that have ended. Whoever uses the connection now does so afterwards.
    fn tell_ended(&self) {
        while !lock(&self.ended).is_empty() {
            let mut slot = match self.slot.try_lock() {
                Ok(slot) => slot,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            let current = slot.connection;
            let ended = std::mem::take(&mut *lock(&self.ended));
            if let Some(client) = &mut slot.client {
                ended
                    .into_iter()
                    .filter(|(connection, _)| *connection == current)
                    .for_each(|(_, lease)| client.let_go(lease));
            }
        }
    }

    /// Loads on a connection of its own, so that the others are not kept waiting, and so that the job ends with it when
    /// the wait is interrupted. The connection is given back: the job's interest ends with it.
    fn load(
        &self,
        request: &PrefetchRequest,
        named: &Named,
        progress: Option<&Py<PyAny>>,
    ) -> Result<(JobInfo, Client), Failure> {
        if !self.is_own() {
            return Err(Failure::Lodestream(client::ClientError::Forked.into()));
        }
        let files = named.files()?;
        let mut client = self.open()?;
        let job = client.prefetch(request, &files.borrow(), &mut |_| ());
        let mut job = job.map_err(|error| self.failure(error))?;
        report(progress, &job)?;
        while !job.state.ended() {
            let request = JobWaitRequest { job: job.job, timeout_ms: Some(STEP_MS), notify: false };
            job = client.job_wait(&request, &mut |_| ()).map_err(|error| self.failure(error))?;
            report(progress, &job)?;
        }
        Ok((succeeded(job)?, client))
    }

    /// Attaches; loads first if it must and `wait`.
    fn attach(
        self: &Arc<Self>,
        named: &Named,
        wait: bool,
        verify: bool,
        progress: Option<&Py<PyAny>>,
    ) -> Result<(client::Attached, Lease), Failure> {
        let resident = named.attach_request(false, verify)?;
        match self.attach_once(&resident, named) {
            Err(Failure::Lodestream(error))
                if error.code == Code::ArtifactNotResident && wait && resident.digest.is_none() =>
            {
                let _loaded = self.make_resident(named, progress)?;
                self.attach_once(&AttachRequest { wait: true, ..resident }, named)
            }
            outcome => outcome,
        }
    }

    fn attach_once(
        self: &Arc<Self>,
        request: &AttachRequest,
        named: &Named,
    ) -> Result<(client::Attached, Lease), Failure> {
        let files = named.files()?;
        let files = files.borrow();
        if let Way::Direct(_) = self.way {
            if !self.is_own() {
                return Err(Failure::Lodestream(client::ClientError::Forked.into()));
            }
            let attached = in_process::attach(&mut self.open()?, request, &files, &mut |_| ());
            let attached = attached.map_err(|error| self.failure(error))?;
            let lease = Lease::ended(self, attached.lease());
            return Ok((attached, lease));
        }
        let (attached, connection) = self.call(|client| client.attach(request, &files, &mut |_| ()))?;
        let lease = Lease::new(self, connection, attached.lease());
        Ok((attached, lease))
    }

    /// Loads if it must. The result keeps the job, if there is one, from being cancelled.
    pub(crate) fn make_resident(
        &self,
        named: &Named,
        progress: Option<&Py<PyAny>>,
    ) -> Result<Client, Failure> {
        Ok(self.load(&prefetch_request(named)?, named, progress)?.1)
    }

    /// Takes the memory of what sleeps in again; gives its new lease.
    pub(crate) fn wake(
        self: &Arc<Self>,
        attached: &mut client::Attached,
        named: &Named,
    ) -> Result<Lease, Failure> {
        let request = named.attach_request(true, false)?;
        let files = named.files()?;
        let files = files.borrow();
        let (_, connection) = self.call(|client| client.wake(attached, &request, &files, &mut |_| ()))?;
        Ok(Lease::new(self, connection, attached.lease()))
    }
}

fn closed() -> Error {
    Error::new(Code::ClientDisconnected, "the node was closed: connect again")
}

/// Tells the caller of progress, and lets signal handlers run.
fn report(progress: Option<&Py<PyAny>>, job: &JobInfo) -> Result<(), Failure> {
    Python::attach(|py| {
        py.check_signals()?;
        if let Some(progress) = progress {
            progress.call1(py, (convert::reply(py, job)?,))?;
        }
        Ok(())
    })
}

fn succeeded(job: JobInfo) -> Result<JobInfo, Failure> {
    match (&job.error, job.state) {
        (Some(error), _) => Err(client::error_of(error).into()),
        (None, JobState::Failed | JobState::Cancelled) => {
            Err(error(Code::JobCancelled, "the job was cancelled"))
        }
        (None, _) => Ok(job),
    }
}

fn prefetch_request(named: &Named) -> Result<PrefetchRequest, Error> {
    let request = PrefetchRequest::new(named.source()?, named.device.clone());
    Ok(PrefetchRequest { select: named.select.clone(), ..request })
}

/// A connection to a daemon, or to an engine in this process.
#[pyclass(frozen, module = "lodestream._native")]
pub(crate) struct Node {
    shared: Arc<Shared>,
}

impl Node {
    fn ask<'py, R: serde::Serialize + Send>(
        &self,
        py: Python<'py>,
        act: impl FnMut(&mut Client) -> Result<R, Error> + Send,
    ) -> Result<Bound<'py, PyAny>, Failure> {
        let (reply, _) = py.detach(|| self.shared.call(act))?;
        convert::reply(py, &reply)
    }
}

#[pymethods]
impl Node {
    /// Connects to the daemon that listens at `socket`.
    #[new]
    fn new(py: Python<'_>, socket: PathBuf) -> Result<Node, Failure> {
        let shared = Shared::new(Way::Socket(socket));
        // Nothing is asked yet: this only finds out whether somebody listens.
        py.detach(|| shared.call(|_| Ok(())))?;
        Ok(Node { shared })
    }

    /// Starts an engine in this process for loads to `device`.
    #[staticmethod]
    fn direct(py: Python<'_>, device: String) -> Result<Node, Failure> {
        let engine = py.detach(|| Engine::start(&device))?;
        Ok(Node { shared: Shared::new(Way::Direct(Mutex::new(Some(engine)))) })
    }

    /// Ends the connection and its leases. What is attached stays readable.
    fn close(&self, py: Python<'_>) {
        if !self.shared.is_own() {
            return;
        }
        py.detach(|| {
            let mut slot = lock(&self.shared.slot);
            slot.closed = true;
            slot.client = None;
            drop(slot);
            if let Way::Direct(engine) = &self.shared.way {
                let engine = lock(engine).take();
                drop(engine);
            }
        });
    }

    fn hello<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>, Failure> {
        self.ask(py, Client::hello)
    }

    fn status<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>, Failure> {
        self.ask(py, Client::status)
    }

    fn topology<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>, Failure> {
        self.ask(py, Client::topology)
    }

    fn list<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>, Failure> {
        self.ask(py, Client::list)
    }

    fn jobs<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>, Failure> {
        self.ask(py, Client::job_list)
    }

    fn job<'py>(&self, py: Python<'py>, job: u64) -> Result<Bound<'py, PyAny>, Failure> {
        self.ask(py, |client| client.job_get(job))
    }

    fn cancel<'py>(&self, py: Python<'py>, job: u64) -> Result<Bound<'py, PyAny>, Failure> {
        self.ask(py, |client| client.job_cancel(job))
    }

    /// Waits until a job has ended or `timeout` seconds are over.
    #[pyo3(signature = (job, timeout, progress))]
    fn wait<'py>(
        &self,
        py: Python<'py>,
        job: u64,
        timeout: Option<f64>,
        progress: Option<Py<PyAny>>,
    ) -> Result<Bound<'py, PyAny>, Failure> {
        let deadline = timeout.map(seconds).transpose()?.and_then(|time| Instant::now().checked_add(time));
        let ended = py.detach(|| {
            loop {
                let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                let step = left.map_or(STEP_MS, |left| (left.as_millis() as u64).min(STEP_MS));
                let request = JobWaitRequest { job, timeout_ms: Some(step), notify: false };
                let (info, _) = self.shared.call(|client| client.job_wait(&request, &mut |_| ()))?;
                report(progress.as_ref(), &info)?;
                if info.state.ended() || left.is_some_and(|left| left.is_zero()) {
                    return Ok::<_, Failure>(info);
                }
            }
        })?;
        convert::reply(py, &ended)
    }

    /// `action`: `stat`, `pin`, `unpin` or `evict`.
    fn artifact<'py>(
        &self,
        py: Python<'py>,
        action: &str,
        source: String,
        open: Vec<PathBuf>,
        device: String,
        select: Option<Bound<'py, PyAny>>,
    ) -> Result<Bound<'py, PyAny>, Failure> {
        let act = match action {
            "stat" => Client::stat,
            "pin" => Client::pin,
            "unpin" => Client::unpin,
            _ => Client::evict,
        };
        let named = Named::new(source, open, device, select.as_ref())?;
        let request = named.artifact_request()?;
        let files = named.files()?;
        self.ask(py, |client| act(client, &request, &files.borrow()))
    }

    fn resolve<'py>(
        &self,
        py: Python<'py>,
        source: String,
        open: Vec<PathBuf>,
    ) -> Result<Bound<'py, PyAny>, Failure> {
        let named = Named::new(source, open, "host".to_owned(), None)?;
        let request = ResolveRequest { source: named.source()? };
        let files = named.files()?;
        self.ask(py, |client| client.resolve(&request, &files.borrow()))
    }

    #[allow(clippy::too_many_arguments, reason = "they are the API's")]
    #[pyo3(signature = (source, open, device, select, targets, priority, deadline, detach, pin, wait, progress))]
    fn prefetch<'py>(
        &self,
        py: Python<'py>,
        source: String,
        open: Vec<PathBuf>,
        device: String,
        select: Option<Bound<'py, PyAny>>,
        targets: Option<Bound<'py, PyAny>>,
        priority: i32,
        deadline: Option<f64>,
        detach: bool,
        pin: bool,
        wait: bool,
        progress: Option<Py<PyAny>>,
    ) -> Result<Bound<'py, PyAny>, Failure> {
        let named = Named::new(source, open, device, select.as_ref())?;
        let targets: Option<Vec<TargetRequest>> = convert::argument("targets", targets.as_ref())?;
        let request = PrefetchRequest {
            targets: targets.unwrap_or_default(),
            priority,
            deadline_ms: deadline.map(seconds).transpose()?.map(|time| time.as_millis() as u64),
            detach,
            pin,
            ..prefetch_request(&named)?
        };
        if wait {
            let (job, _) = py.detach(|| self.shared.load(&request, &named, progress.as_ref()))?;
            return convert::reply(py, &job);
        }
        let files = named.files()?;
        self.ask(py, |client| client.prefetch(&request, &files.borrow(), &mut |_| ()))
    }

    #[allow(clippy::too_many_arguments, reason = "they are the API's")]
    #[pyo3(signature = (source, open, device, select, wait, verify, progress))]
    fn attach(
        &self,
        py: Python<'_>,
        source: String,
        open: Vec<PathBuf>,
        device: String,
        select: Option<Bound<'_, PyAny>>,
        wait: bool,
        verify: bool,
        progress: Option<Py<PyAny>>,
    ) -> Result<Attached, Failure> {
        let named = Named::new(source, open, device, select.as_ref())?;
        let (attached, lease) = py.detach(|| self.shared.attach(&named, wait, verify, progress.as_ref()))?;
        Attached::new(&self.shared, named, attached, lease)
    }
}

fn seconds(time: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(time)
        .map_err(|why| error(Code::ApiBadParams, format!("{time} is no time in seconds: {why}")))
}
