//! What fails, and how.

use std::collections::VecDeque;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lodestream::checksum::CHUNK_BYTES;
use lodestream::rdma::{Fault, Fetch, Source, State};
use lodestream::sys::verbs::{Event, Kind, ProtectionDomain, Registered, WorkError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Node;
use crate::check::{Checked, Wrong, ensure};
use crate::session::{Ask, Receiver, SOURCE_BYTES, Way, chunks};
use crate::transfers::{Ended, SETTINGS, all_chunks, fetch, nothing, read_all, transfer};

/// How long the kernel may take to tell that a port has changed.
const EVENT_MAX: Duration = Duration::from_secs(30);
/// Transfers that succeed before something happens to the rail.
const BEFORE: usize = 8;

/// The source as the receiver knows it, with one number of its keys changed.
fn forged(source: &Source, field: &str, change: impl Fn(u64) -> u64) -> Checked<Source> {
    let mut value = serde_json::to_value(source)?;
    let remotes = value["remotes"].as_array_mut().ok_or(Wrong("no keys".into()))?;
    for remote in remotes {
        let number = remote[field].as_u64().ok_or_else(|| Wrong(format!("no {field}")))?;
        remote[field] = change(number).into();
    }
    Ok(serde_json::from_value(value)?)
}

/// Reads that must fail with `expected`; the rest is flushed, and all spans come back.
fn fails(
    receiver: &mut Receiver,
    kind: Kind,
    source: &Source,
    fetches: VecDeque<Fetch>,
    expected: WorkError,
) -> Checked {
    let ended = transfer(receiver, kind, source, fetches, nothing)?;
    failed(receiver, &ended, &[expected])
}

fn failed(receiver: &Receiver, ended: &[Ended], expected: &[WorkError]) -> Checked {
    let faults: Vec<WorkError> = ended.iter().filter_map(|(_, result)| result.err()).collect();
    let by_itself: Vec<&WorkError> = faults.iter().filter(|error| **error != WorkError::Flushed).collect();
    ensure!(!by_itself.is_empty() && by_itself.iter().all(|error| expected.contains(error)), "{ended:?}");
    let state = receiver.rail.state();
    ensure!(by_itself.iter().any(|error| state == State::Failed(Fault::Work(**error))), "{state:?}");
    let counters = receiver.rail.counters();
    ensure!(counters.faults == by_itself.len() as u64, "{counters:?}");
    ensure!(counters.flushed == (faults.len() - by_itself.len()) as u64, "{counters:?}");
    ensure!(receiver.rail.credits() == 0, "a rail that has failed has credits");
    chunks(&receiver.memory).map(drop)
}

pub(crate) fn a_wrong_key_is_refused(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    let source = forged(&receiver.source, "rkey", |key| key ^ 0x0055_aa00)?;
    let fetches = all_chunks(&receiver)?;
    fails(&mut receiver, Kind::Read, &source, fetches, WorkError::RemoteAccess)?;
    let counters = receiver.rail.counters();
    ensure!(counters.read_bytes == 0, "{counters:?}");
    Ok(format!("{} flushed, which are no faults", counters.flushed))
}

pub(crate) fn what_lies_behind_the_memory_is_refused(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    let span = receiver.memory.claim(0, CHUNK_BYTES).ok_or(Wrong("claimed".into()))?;
    let fetches = VecDeque::from([Fetch { offset: SOURCE_BYTES - 1, span, tag: 0 }]);
    let honest = receiver.source.clone();
    let refused = transfer(&mut receiver, Kind::Read, &honest, fetches, nothing);
    ensure!(refused.is_err() && receiver.rail.state() == State::Up, "not refused before it was sent");
    let source = forged(&receiver.source, "bytes", |bytes| 2 * bytes)?;
    let span = receiver.memory.claim(0, CHUNK_BYTES).ok_or(Wrong("claimed".into()))?;
    let fetches = VecDeque::from([Fetch { offset: SOURCE_BYTES - 1, span, tag: 0 }]);
    fails(&mut receiver, Kind::Read, &source, fetches, WorkError::RemoteAccess)?;
    Ok(String::new())
}

pub(crate) fn a_revoked_key_is_void(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    read_all(&mut receiver)?;
    receiver.ask(Ask::Revoke)?;
    let (source, fetches) = (receiver.source.clone(), VecDeque::from([fetch(&receiver, 3)?]));
    let ended = transfer(&mut receiver, Kind::Read, &source, fetches, nothing)?;
    failed(&receiver, &ended, &[WorkError::RemoteAccess])?;
    Ok(String::new())
}

pub(crate) fn a_source_cannot_be_written_to(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    let (source, pieces) = (receiver.source.clone(), VecDeque::from([fetch(&receiver, 0)?]));
    let ended = transfer(&mut receiver, Kind::Write, &source, pieces, nothing)?;
    // Devices differ in what they call it.
    let refused = matches!(ended.as_slice(), [(0, Err(error))] if *error != WorkError::Flushed && *error != WorkError::Unanswered);
    ensure!(refused, "{ended:?}");
    Ok(format!("{ended:?}"))
}

pub(crate) fn memory_of_another_domain_is_refused(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    let other = ProtectionDomain::new(&node.context)?;
    receiver.registered = Registered::own(&other, &receiver.memory)?;
    let (source, fetches) = (receiver.source.clone(), VecDeque::from([fetch(&receiver, 0)?]));
    fails(&mut receiver, Kind::Read, &source, fetches, WorkError::LocalAccess)?;
    Ok(String::new())
}

/// Invariant 2: the spans of what is in flight are freed, and only after the device has given them back.
pub(crate) fn a_dropped_rail_gives_its_spans_back(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    let (source, mut fetches) = (receiver.source.clone(), all_chunks(&receiver)?);
    let memory = Arc::clone(&receiver.memory);
    let registered = Arc::clone(&receiver.registered);
    let started = receiver.rail.read(&source, &registered, &mut fetches)?;
    ensure!(started > 0 && receiver.rail.in_flight() == started, "{started} started");
    ensure!(memory.claim(0, SOURCE_BYTES).is_none(), "spans in flight can be claimed");
    drop((receiver, fetches));
    ensure!(memory.claim(0, SOURCE_BYTES).is_some(), "spans were not given back");
    ensure!(node.library.leaked_bytes() == 0, "leaked");
    Ok(format!("{started} were in flight"))
}

/// Reads for ever, and calls `strike` when some have succeeded.
fn until_struck(
    receiver: &mut Receiver,
    mut strike: impl FnMut(&mut Receiver) -> Checked,
) -> Checked<Vec<Ended>> {
    let (source, fetches) = (receiver.source.clone(), all_chunks(receiver)?);
    let mut count = 0;
    transfer(receiver, Kind::Read, &source, fetches, |receiver, (chunk, result), fetches| {
        if result.is_ok() {
            count += 1;
            fetches.push_back(fetch(receiver, *chunk)?);
        }
        if count == BEFORE && result.is_ok() {
            strike(receiver)?;
        }
        Ok(())
    })
}

pub(crate) fn a_killed_peer_fails_the_rail(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    let ended = until_struck(&mut receiver, |receiver| receiver.tell(Ask::Die))?;
    node.bury();
    // A dying process loses its memory and its queue pairs, in any order.
    failed(&receiver, &ended, &[WorkError::Unanswered, WorkError::RemoteAccess])?;
    drop(receiver);
    // A new rail to a new source.
    read_all(&mut node.connect(Way::Key, SETTINGS)?)?;
    Ok(format!("{} had ended", ended.iter().filter(|(_, result)| result.is_ok()).count()))
}

fn link(state: &str) -> Checked {
    let status = Command::new("ip").args(["link", "set", "eth0", state]).status()?;
    ensure!(status.success(), "ip link set eth0 {state}: {status}");
    Ok(())
}

fn wait_for(node: &Node, wanted: Event) -> Checked {
    let deadline = Instant::now() + EVENT_MAX;
    loop {
        while let Some(event) = node.context.next_event()? {
            if event == wanted {
                return Ok(());
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "no {wanted:?}");
        let timeout = Timespec::try_from(left).map_err(|_| Wrong("a timeout".into()))?;
        poll(&mut [PollFd::new(&node.context.events(), PollFlags::IN)], Some(&timeout))?;
    }
}

pub(crate) fn a_link_that_goes_down_fails_the_rail(node: &Node) -> Checked<String> {
    if !node.pair {
        return Ok("between two machines only: what a machine sends to itself needs no link".into());
    }
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    while node.context.next_event()?.is_some() {}
    let struck = until_struck(&mut receiver, |_| link("down"));
    let told = wait_for(node, Event::PortDown(1));
    link("up")?;
    let ended = struck?;
    told?;
    failed(&receiver, &ended, &[WorkError::Unanswered, WorkError::Unsendable])?;
    wait_for(node, Event::PortActive(1))?;
    drop(receiver);
    read_all(&mut node.connect(Way::Key, SETTINGS)?)?;
    Ok(format!("{} had ended", ended.iter().filter(|(_, result)| result.is_ok()).count()))
}
