//! What each method does.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::writer::Outgoing;
use crate::api::call::Call;
use crate::api::methods::{
    EmptyReply, HelloReply, HelloRequest, JobListReply, JobReply, JobWaitRequest, ListReply, PrefetchReply,
    PrefetchRequest, ReleaseRequest, StatusReply, VERSIONS,
};
use crate::api::wire;
use crate::error::{Code, Error, Result};
use crate::json::shown;
use crate::tier::DeviceId;
use crate::tier::residency::Hold;
use crate::tier::residency::not_resident;
use crate::transfer::{Claim, Target};

/// Targets of one prefetch at most: more GPUs than a node has, with a slice or two for each.
const TARGETS_MAX: usize = 64;

impl Connection {
    /// Carries out a request and says what to answer.
    pub(super) async fn answer(
        self: &Rc<Self>,
        call: Call,
        fds: Vec<OwnedFd>,
        id: &wire::Id,
    ) -> Result<Outgoing> {
        let node = &self.node;
        match call {
            Call::Hello(request) => self.reply(id, &self.hello(&request)?),
            Call::ArtifactResolve(request) => self.reply(id, &self.resolve(request, fds).await?),
            Call::ArtifactPrefetch(request) => self.reply(id, &self.prefetch(request, fds).await?),
            Call::ArtifactAttach(request) => {
                Ok(Outgoing::Attached(id.clone(), Box::new(self.attach(request, fds).await?)))
            }
            Call::ArtifactList(_) => {
                let residency = &node.residency;
                let artifacts =
                    residency.list(self.viewer(), |entry| super::artifact::info(residency, entry));
                self.reply(id, &ListReply { artifacts })
            }
            Call::ArtifactStat(request) => {
                let entry = self.find(request, fds).await?;
                self.reply(id, &self.described(entry)?)
            }
            Call::ArtifactPin(request) => {
                let entry = self.find(request, fds).await?;
                if node.residency.with(entry, |entry| entry.stale)? {
                    return Err(not_resident());
                }
                node.residency.pin(entry, self.tenant.uid)?;
                self.reply(id, &self.described(entry)?)
            }
            Call::ArtifactUnpin(request) => {
                let entry = self.find(request, fds).await?;
                node.residency.unpin(entry, self.viewer())?;
                self.reply(id, &self.described(entry)?)
            }
            Call::ArtifactEvict(request) => {
                let entry = self.find(request, fds).await?;
                let before = self.described(entry)?;
                node.residency.evict(entry)?;
                self.reply(id, &before)
            }
            Call::LeaseRelease(request) => self.reply(id, &self.release(&request)?),
            Call::JobGet(request) => {
                let job = node.jobs.get(request.job, self.viewer())?;
                self.reply(id, &JobReply { job: job.info() })
            }
            Call::JobWait(request) => self.reply(id, &self.wait(&request).await?),
            Call::JobCancel(request) => {
                let job = node.jobs.get(request.job, self.viewer())?;
                self.interests.borrow_mut().remove(&job.id);
                job.cancel(self.viewer());
                // Cancelled at once, or still running for somebody else.
                tokio::task::yield_now().await;
                self.reply(id, &JobReply { job: job.info() })
            }
            Call::JobList(_) => {
                let jobs = node.jobs.list(self.viewer()).iter().map(|job| job.info()).collect();
                self.reply(id, &JobListReply { jobs })
            }
            Call::NodeStatus(_) => {
                let clients = self.clients.list(self.viewer());
                self.reply(id, &StatusReply { clients, ..node.status(self.viewer()) })
            }
            Call::NodePeers(_) => {
                if self.viewer().is_some() {
                    let message =
                        "only the daemon's own user may ask which nodes it exchanges artifacts with";
                    return Err(Error::new(Code::ApiForbidden, message));
                }
                self.reply(id, &node.jobs.peers().status())
            }
            Call::NodeTopology(_) => self.reply(id, &node.topology().await?),
        }
    }

    fn reply(&self, id: &wire::Id, result: &impl serde::Serialize) -> Result<Outgoing> {
        Ok(Outgoing::Line(wire::reply(id, result, self.limits.reply_bytes_max as usize)?))
    }

    fn hello(&self, request: &HelloRequest) -> Result<HelloReply> {
        let both =
            VERSIONS.iter().rev().find(|own| request.versions.is_empty() || request.versions.contains(own));
        let Some(version) = both else {
            let message =
                format!("this daemon speaks API versions {VERSIONS:?}, the client {:?}", request.versions);
            return Err(Error::new(Code::ApiVersionUnsupported, message));
        };
        tracing::debug!(connection = self.number, client = request.client, version, "hello");
        *self.name.borrow_mut() = shown(&request.client);
        Ok(self.node.hello(*version, &self.tenant, &self.limits))
    }

    async fn prefetch(self: &Rc<Self>, request: PrefetchRequest, fds: Vec<OwnedFd>) -> Result<PrefetchReply> {
        let deadline =
            request.deadline_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
        let targets = self.targets(&request)?;
        let wanted = self.wanted(request.source, fds, targets, request.priority).await?;
        let name = wanted.name.clone();
        let connection = (!request.detach).then_some(self.number);
        let Claim { holds, job } = self.node.jobs.want(wanted, connection, deadline)?;
        if request.pin {
            holds.iter().try_for_each(|hold| self.node.residency.pin(hold.id(), self.tenant.uid))?;
        }
        let entry = holds.first().map(Hold::id).ok_or_else(not_resident)?;
        let job = match job {
            None => self.node.jobs.done(entry, &name, self.tenant.uid),
            Some((job, interest)) => {
                let mut interests = self.interests.borrow_mut();
                interests.retain(|_, interest| !interest.job().state().ended());
                interests.insert(job.id, interest);
                job
            }
        };
        if request.notify {
            let (connection, job) = (Rc::clone(self), Rc::clone(&job));
            tokio::task::spawn_local(async move { connection.report(&job).await });
        }
        Ok(PrefetchReply { job: job.info() })
    }

    /// What a prefetch is asked for: one device, or several GPUs.
    fn targets(&self, request: &PrefetchRequest) -> Result<Vec<Target>> {
        if request.targets.is_empty() {
            let device = self.node.device(&request.device)?;
            return Ok(vec![Target { device, select: request.select.clone() }]);
        }
        let bad = |message: String| Error::new(Code::ApiBadParams, message);
        if request.targets.len() > TARGETS_MAX {
            let message =
                format!("{} targets are named, and {TARGETS_MAX} are allowed", request.targets.len());
            return Err(bad(message));
        }
        if request.select.is_some() || request.device != "host" {
            return Err(bad("name either \"targets\", or \"device\" and \"select\"".to_owned()));
        }
        let targets = request.targets.iter().map(|target| {
            let device = self.node.device(&target.device)?;
            if device == DeviceId::Host {
                return Err(bad("targets are GPUs: prefetch to the host tier by itself".to_owned()));
            }
            Ok(Target { device, select: target.select.clone() })
        });
        targets.collect()
    }

    async fn wait(&self, request: &JobWaitRequest) -> Result<JobReply> {
        let job = self.node.jobs.get(request.job, self.viewer())?;
        let began = Instant::now();
        let ended = async { if request.notify { self.report(&job).await } else { job.ended().await } };
        match request.timeout_ms {
            None => ended.await,
            Some(ms) => drop(tokio::time::timeout(Duration::from_millis(ms), ended).await),
        }
        self.node.metrics.waited(began.elapsed());
        Ok(JobReply { job: job.info() })
    }

    fn release(&self, request: &ReleaseRequest) -> Result<EmptyReply> {
        if self.end_lease(request.lease) {
            return Ok(EmptyReply {});
        }
        let message = format!("this connection has no lease {}", request.lease);
        Err(Error::new(Code::LeaseNotFound, message))
    }
}
