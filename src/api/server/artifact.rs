//! Opening, finding and attaching artifacts on behalf of a client.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::connection::Connection;
use super::writer::Attached;
use crate::api::methods::{
    ArtifactInfo, ArtifactReply, ArtifactRequest, AttachRequest, FileInfo, ResolveReply, ResolveRequest,
    Source, TensorInfo,
};
use crate::catalog;
use crate::error::{Code, Error, Result};
use crate::json::shown;
use crate::source::{Opened, file};
use crate::tier::DeviceId;
use crate::tier::residency::{Content, Entry, EntryId, Form, Hold, Key, Region, Residency, State};
use crate::transfer::{self, Claim, Name, Target, Wanted};

impl Connection {
    /// Opens a source with the client's own rights (invariant 7). Gives it and what to call it.
    async fn open(&self, source: Source, fds: Vec<OwnedFd>) -> Result<(Opened, String)> {
        if let Source::Uri(uri) = &source
            && let Some(digest) = transfer::digest(uri)
        {
            self.may_load_by_digest()?;
            return Ok((Opened::Digest(digest?.to_string()), shown(uri)));
        }
        let (roots, tenant, limits) =
            (Arc::clone(&self.node.roots), self.tenant.clone(), self.limits.clone());
        transfer::blocking(move || match source {
            Source::Uri(uri) => {
                let files = roots.open_artifact(&uri, &tenant, &limits)?;
                Ok((Opened::Files(files), shown(&uri)))
            }
            Source::Fds(sent) => {
                let files = file::from_fds(fds, &sent.names, &limits)?;
                let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
                let shown = format!("fds:{}", names.join(","));
                Ok((Opened::Files(files), shown))
            }
        })
        .await
    }

    /// What comes from peers has no files whose rights could decide.
    fn may_load_by_digest(&self) -> Result<()> {
        let config = self.node.config();
        let uid = self.tenant.uid;
        if uid != self.node.own_uid && !config.peer.tenants.contains(&uid) {
            let message = format!(
                "{} may not load by digest: name a path that you may read, or ask for peer.tenants to contain {uid}",
                self.tenant
            );
            return Err(Error::new(Code::ApiForbidden, message));
        }
        Ok(())
    }

    /// Opens a source and says what is wanted of it.
    pub(super) async fn wanted(
        &self,
        source: Source,
        fds: Vec<OwnedFd>,
        targets: Vec<Target>,
        priority: i32,
    ) -> Result<Wanted> {
        let origin = origin(&source);
        let (opened, source) = self.open(source, fds).await?;
        let devices = targets.iter().map(|target| self.node.residency.device_name(target.device));
        let name = Name { source, origin, device: devices.collect::<Vec<_>>().join(",") };
        Ok(Wanted { opened, name, targets, priority, tenant: self.tenant.uid })
    }

    pub(super) async fn resolve(&self, request: ResolveRequest, fds: Vec<OwnedFd>) -> Result<ResolveReply> {
        let (opened, _) = self.open(request.source, fds).await?;
        let devices: Vec<DeviceId> = self.node.device_ids().collect();
        let keys: Vec<_> = devices.iter().map(|device| transfer::key(&opened, *device, None)).collect();
        let (limits, store) = (self.limits.clone(), self.node.store.clone());
        let entered = self.node.headers.enter().await;
        let (description, known) = match opened {
            Opened::Files(files) => {
                let described = transfer::blocking(move || {
                    let known = store.and_then(|store| store.get(&files));
                    let digest = known.map(|manifest| manifest.digest().to_owned());
                    Ok((catalog::describe(&files, &limits)?, digest))
                });
                described.await?
            }
            Opened::Digest(digest) => {
                let manifest = self.node.jobs.peers().manifest(&digest).await?;
                (manifest.description().clone(), Some(digest))
            }
        };
        drop(entered);
        let residency = &self.node.residency;
        let states = devices.iter().zip(&keys).filter_map(|(device, key)| {
            let entry = residency.known(key, self.tenant.uid)?;
            Some((*device, residency.with(entry, |entry| entry.state.clone()).ok()?))
        });
        let resident: Vec<_> = states.filter(|(_, state)| state.is_resident()).collect();
        let tensors = description.tensors.iter().map(|tensor| TensorInfo {
            name: tensor.name.clone(),
            dtype: tensor.dtype.as_str().to_owned(),
            shape: tensor.shape.clone(),
            file: tensor.file,
            nbytes: tensor.nbytes,
        });
        Ok(ResolveReply {
            digest: known.or_else(|| resident.iter().find_map(|(_, state)| state.digest())),
            format: description.format.as_str().to_owned(),
            bytes: description.files.iter().map(|file| file.bytes).sum(),
            files: description
                .files
                .iter()
                .map(|file| FileInfo { name: file.name.clone(), bytes: file.bytes })
                .collect(),
            tensors: tensors.collect(),
            metadata: description.metadata.clone(),
            resident: resident.iter().map(|(device, _)| residency.device_name(*device)).collect(),
        })
    }

    pub(super) async fn attach(
        self: &Rc<Self>,
        request: AttachRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<Attached> {
        let began = Instant::now();
        let device = self.node.device(&request.device)?;
        if self.leases.borrow().len() >= self.limits.leases_per_connection_max as usize {
            let most = self.limits.leases_per_connection_max;
            let message = format!("this connection holds {most} leases, as many as it may: release one");
            return Err(Error::new(Code::LeaseTooMany, message).kept("the leases that it holds"));
        }
        let mut timings = BTreeMap::new();
        let mut lap = Instant::now();
        let mut timed = |phase: &str| {
            timings.insert(phase.to_owned(), lap.elapsed().as_secs_f64() * 1e3);
            lap = Instant::now();
        };
        let mut loaded = false;
        let hold = match (request.source, request.digest) {
            (Some(source), None) => {
                let target = Target { device, select: request.select };
                let wanted = self.wanted(source, fds, vec![target], 0).await?;
                timed("resolve");
                if !request.wait {
                    self.resident(&wanted)?
                } else {
                    let Claim { holds, job } = self.node.jobs.want(wanted, Some(self.number), None)?;
                    if let Some((job, _interest)) = job {
                        loaded = true;
                        if request.notify {
                            self.report(&job).await;
                        }
                        job.ended().await;
                        if let Some(error) = job.error() {
                            return Err(error);
                        }
                    }
                    holds.into_iter().next().ok_or_else(crate::tier::residency::not_resident)?
                }
            }
            (None, Some(digest)) => {
                let select = request.select.as_deref();
                let entry = self.node.residency.find_digest(&digest, device, select, self.viewer())?;
                timed("resolve");
                self.node.residency.hold(entry)?
            }
            _ => return Err(Error::new(Code::ApiBadParams, "name exactly one of \"source\" and \"digest\"")),
        };
        let content = hold.content()?;
        timed("load");
        if request.verify {
            self.node.jobs.verify(&hold, &content).await?;
            timed("verify");
        }
        let exported = self.export(&hold, &content).await?;
        let metrics = &self.node.metrics;
        if loaded {
            metrics.waited(began.elapsed())
        } else {
            metrics.attached(began.elapsed())
        }
        timings.insert("total".to_owned(), began.elapsed().as_secs_f64() * 1e3);
        let lease = self.node.next_lease();
        self.leases.borrow_mut().insert(lease, hold);
        let device = self.node.residency.device_name(device);
        Ok(Attached { lease, content, device, exported, timings_ms: timings })
    }

    /// The descriptor of memory on a GPU. From here on the client's process counts as one that may have it mapped.
    async fn export(&self, hold: &Hold, content: &Arc<Content>) -> Result<Option<OwnedFd>> {
        let Region::Gpu(memory) = &content.region else { return Ok(None) };
        let memory = Arc::clone(memory);
        let exported = transfer::blocking(move || {
            memory.export().map_err(|error| {
                let message = format!("the memory of the GPU cannot be shared: {error}");
                Error::new(Code::DeviceUnavailable, message)
            })
        });
        let exported = exported.await?;
        if let Some(importer) = &self.importer {
            self.node.residency.imported(hold.id(), importer);
        }
        Ok(Some(exported))
    }

    /// A hold on what is wanted if it is resident already.
    fn resident(&self, wanted: &Wanted) -> Result<Hold> {
        let residency = &self.node.residency;
        let entry = wanted.keys().next().and_then(|key| residency.known(&key, self.tenant.uid));
        let entry =
            entry.filter(|entry| residency.with(*entry, |entry| entry.state.is_resident()).unwrap_or(false));
        residency.hold(entry.ok_or_else(crate::tier::residency::not_resident)?)
    }

    /// The entry that a request names. If its files are others now, or gone, by what they were loaded from.
    pub(super) async fn find(&self, request: ArtifactRequest, fds: Vec<OwnedFd>) -> Result<EntryId> {
        let device = self.node.device(&request.device)?;
        let residency = &self.node.residency;
        let select = request.select.as_deref();
        match (request.source, request.digest) {
            (Some(source), None) => {
                let origin = origin(&source);
                // Loaded from files that were there before.
                let old = || residency.find_origin(origin.as_deref()?, device, select, self.viewer());
                match self.open(source, fds).await {
                    Ok((opened, _)) => {
                        let key = transfer::key(&opened, device, select);
                        let known = |key: &Key| residency.known(key, self.tenant.uid);
                        // On the host tier there may be what has left a GPU instead.
                        let entry = known(&key).or_else(|| known(&Key { form: Form::Packed, ..key.clone() }));
                        entry.or_else(old).ok_or_else(crate::tier::residency::not_resident)
                    }
                    Err(error) => old().ok_or(error),
                }
            }
            (None, Some(digest)) => residency.find_digest(&digest, device, select, self.viewer()),
            _ => Err(Error::new(Code::ApiBadParams, "name exactly one of \"source\" and \"digest\"")),
        }
    }

    pub(super) fn described(&self, entry: EntryId) -> Result<ArtifactReply> {
        let residency = &self.node.residency;
        Ok(ArtifactReply { artifact: residency.with(entry, |entry| info(residency, entry))? })
    }
}

/// An entry, as clients see it.
pub(super) fn info(residency: &Residency, entry: &Entry) -> ArtifactInfo {
    let content = match &entry.state {
        State::Resident(content) => Some(content),
        State::Loading => None,
    };
    ArtifactInfo {
        source: entry.source.clone(),
        digest: entry.state.digest(),
        select: entry.key.select.clone(),
        device: residency.device_name(entry.key.device),
        state: entry.state_name().to_owned(),
        bytes: entry.bytes,
        tensors: content.map_or(0, |content| content.tensors.len() as u64),
        leases: entry.leases,
        pinned: !entry.pins.is_empty(),
        pages: content.map_or("", |content| content.pages()).to_owned(),
        packed: entry.key.form == Form::Packed,
        idle_ms: entry.used.elapsed().as_millis() as u64,
    }
}

/// The path that a source names, in full.
fn origin(source: &Source) -> Option<String> {
    match source {
        Source::Uri(uri) if transfer::digest(uri).is_some() => None,
        Source::Uri(uri) => Some(uri.strip_prefix("file://").unwrap_or(uri).to_owned()),
        Source::Fds(_) => None,
    }
}
