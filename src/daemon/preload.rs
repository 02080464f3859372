//! The preload list: models that the configuration names are made resident at start, highest priority first.

use std::rc::Rc;
use std::sync::Arc;

use crate::api::methods::{ErrorData, JobState, PreloadStatus};
use crate::config::Preload;
use crate::error::{Error, Result};
use crate::json::shown;
use crate::node::Node;
use crate::source::Opened;
use crate::sys::identity::Tenant;
use crate::telemetry::readiness::State;
use crate::transfer::{self, Claim, Name, Target, Wanted};

/// Makes the list resident, one after the other, so that each has the whole bandwidth. Ready when all are.
pub(super) async fn run(node: Rc<Node>) {
    let config = node.config();
    let mut list = config.preload.clone();
    list.sort_by_key(|entry| std::cmp::Reverse(entry.priority));
    let status = |entry: &Preload| PreloadStatus {
        source: entry.source.clone(),
        device: entry.device.clone(),
        state: JobState::Queued,
        error: None,
    };
    *node.preload.borrow_mut() = list.iter().map(status).collect();
    let total = list.len() as u32;
    let mut done = 0;
    for (number, entry) in list.iter().enumerate() {
        if config.ready_after_preload {
            node.readiness.set(State::Preloading { done, total });
        }
        set(&node, number, JobState::Running, None);
        match load(&node, entry).await {
            Ok(()) => {
                done += 1;
                set(&node, number, JobState::Done, None);
            }
            Err(error) => {
                tracing::error!(source = entry.source, code = %error.code, %error, "preload failed");
                node.metrics.error(error.code);
                set(&node, number, JobState::Failed, Some(error));
            }
        }
    }
    if done == total {
        node.readiness.set(State::Ready);
    } else if config.ready_after_preload {
        node.readiness.set(State::Preloading { done, total });
    }
}

fn set(node: &Node, number: usize, state: JobState, error: Option<Error>) {
    if let Some(status) = node.preload.borrow_mut().get_mut(number) {
        status.state = state;
        status.error = error.as_ref().map(ErrorData::from);
    }
}

/// Loads one entry with the daemon's own rights, and pins it if so configured.
async fn load(node: &Rc<Node>, entry: &Preload) -> Result<()> {
    let device = node.device(&entry.device)?;
    let (roots, limits, uri) = (Arc::clone(&node.roots), node.config().limits.clone(), entry.source.clone());
    let tenant = Tenant { uid: node.own_uid, gid: rustix::process::getegid().as_raw(), groups: Vec::new() };
    let uid = tenant.uid;
    let opened = match transfer::digest(&uri) {
        Some(digest) => Opened::Digest(digest?.to_string()),
        None => {
            let files = transfer::blocking(move || roots.open_artifact(&uri, &tenant, &limits)).await?;
            Opened::Files(files)
        }
    };
    let origin = Some(entry.source.strip_prefix("file://").unwrap_or(&entry.source).to_owned());
    let name = Name { source: shown(&entry.source), origin, device: entry.device.clone() };
    let wanted = Wanted {
        opened,
        name,
        targets: vec![Target { device, select: None }],
        priority: entry.priority,
        tenant: uid,
    };
    let Claim { holds, job } = node.jobs.want(wanted, None, None)?;
    if entry.pin {
        holds.iter().try_for_each(|hold| node.residency.pin(hold.id(), uid))?;
    }
    if let Some((job, _interest)) = job {
        job.ended().await;
        if let Some(error) = job.error() {
            return Err(error);
        }
    }
    Ok(())
}
