//! What works.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use lodestream::checksum::CHUNK_BYTES;
use lodestream::rdma::{Counters, Fetch, Settings, Source, State};
use lodestream::sys::map::ReadMap;
use lodestream::sys::mem::{HUGE_PAGE_BYTES, Memory};
use lodestream::sys::pages::PageKind;
use lodestream::sys::verbs::{
    Backing, GidKind, Kind, NoGid, NoRoute, PortState, ProtectionDomain, Reason, Registered, Window,
    WorkError,
};

use crate::Node;
use crate::check::{Checked, Wrong, ensure};
use crate::session::{Ask, Receiver, SOURCE_BYTES, Way, chunks};

pub(crate) const SETTINGS: Settings = Settings { pairs: 4, depth: 8 };
/// How long nothing may happen before it counts as hanging, under emulation.
const HANG: Duration = Duration::from_secs(90);

/// What a transfer has come to.
pub(crate) type Ended = (u64, Result<(), WorkError>);

/// A fetch of each chunk of the source, to the same place of the receiver's memory. Tags are the numbers of the chunks.
pub(crate) fn all_chunks(receiver: &Receiver) -> Checked<VecDeque<Fetch>> {
    (0..SOURCE_BYTES / CHUNK_BYTES).map(|chunk| fetch(receiver, chunk)).collect()
}

pub(crate) fn fetch(receiver: &Receiver, chunk: u64) -> Checked<Fetch> {
    let offset = chunk * CHUNK_BYTES;
    let span = receiver.memory.claim(offset, CHUNK_BYTES).ok_or(Wrong("a span was not given back".into()))?;
    Ok(Fetch { offset, span, tag: chunk })
}

/// Runs fetches to the end, in the direction `kind`, or until the rail has failed and given back what was in flight. `each` is called
/// after every completion.
pub(crate) fn transfer(
    receiver: &mut Receiver,
    kind: Kind,
    source: &Source,
    mut fetches: VecDeque<Fetch>,
    mut each: impl FnMut(&mut Receiver, &Ended, &mut VecDeque<Fetch>) -> Checked,
) -> Checked<Vec<Ended>> {
    let (mut all, mut done) = (Vec::new(), Vec::new());
    loop {
        if receiver.rail.credits() > 0 {
            let memory = Arc::clone(&receiver.registered);
            match kind {
                Kind::Read => receiver.rail.read(source, &memory, &mut fetches)?,
                Kind::Write => receiver.rail.write(source, &memory, &mut fetches)?,
            };
        }
        let failed = matches!(receiver.rail.state(), State::Failed(_));
        if receiver.rail.in_flight() == 0 && (failed || fetches.is_empty()) {
            return Ok(all);
        }
        let ended = receiver.rail.wait(&mut done, HANG)?;
        ensure!(ended > 0, "hangs with {} in flight", receiver.rail.in_flight());
        for ended in done.drain(..) {
            drop(ended.span);
            all.push((ended.tag, ended.result));
            each(receiver, &(ended.tag, ended.result), &mut fetches)?;
        }
    }
}

pub(crate) fn nothing(_: &mut Receiver, _: &Ended, _: &mut VecDeque<Fetch>) -> Checked {
    Ok(())
}

/// Reads all, and compares.
pub(crate) fn read_all(receiver: &mut Receiver) -> Checked {
    let (source, fetches) = (receiver.source.clone(), all_chunks(receiver)?);
    let count = fetches.len();
    let ended = transfer(receiver, Kind::Read, &source, fetches, nothing)?;
    let failed = ended.iter().find(|(_, result)| result.is_err());
    ensure!(failed.is_none(), "{failed:?}, the rail: {:?}", receiver.rail.state());
    ensure!(ended.len() == count, "{} of {count} came back", ended.len());
    ensure!(chunks(&receiver.memory)? == receiver.chunks, "other bytes than the source has");
    Ok(())
}

pub(crate) fn devices_are_described(node: &Node) -> Checked<String> {
    let names = node.library.devices()?;
    ensure!(names.iter().any(|name| name == node.context.name()), "{names:?}");
    let port = node.context.port(1)?;
    ensure!(port.state == PortState::Active, "{:?}", port.state);
    ensure!(port.mtu_bytes.is_power_of_two() && (256..=4096).contains(&port.mtu_bytes), "{}", port.mtu_bytes);
    let ours = port.gids.iter().find(|entry| entry.gid.ip() == Some(node.local));
    let ours = ours.ok_or_else(|| Wrong(format!("no GID of {} among {:?}", node.local, port.gids)))?;
    ensure!(ours.kind == GidKind::RoceV2 && ours.netdev.is_some(), "{ours:?}");
    Ok(format!("{}, MTU {}", node.context.name(), port.mtu_bytes))
}

pub(crate) fn the_route_has_the_address_that_was_asked_for(node: &Node) -> Checked<String> {
    let route = node.context.route(Some(node.local))?;
    ensure!(route.choice.reason == Reason::Address(node.local), "{route:?}");
    let any = node.context.route(None)?;
    ensure!(any.choice.entry.gid.ip() == Some(node.local), "{any:?}");
    let strange = node.context.route(Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))));
    let told = matches!(&strange, Err(NoRoute::Gid { reason: NoGid::NotThisAddress { found, .. }, .. }) if found.contains(&node.local));
    ensure!(told, "{strange:?}");
    Ok(format!("GID {}: {}", route.choice.entry.index, route.choice.reason))
}

/// Invariant 10: the counters say what has come this way.
pub(crate) fn reads_bring_what_the_source_has(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    read_all(&mut receiver)?;
    let expected = Counters { read_bytes: SOURCE_BYTES, ..Counters::default() };
    ensure!(receiver.rail.counters() == expected, "{:?}", receiver.rail.counters());
    ensure!(receiver.rail.state() == State::Up, "{:?}", receiver.rail.state());
    let credits = (SETTINGS.pairs * SETTINGS.depth) as usize;
    ensure!(receiver.rail.credits() == credits, "{} credits", receiver.rail.credits());
    Ok(String::new())
}

pub(crate) fn writes_arrive(node: &Node) -> Checked<String> {
    let mut receiver = node.connect(Way::Target, SETTINGS)?;
    for (chunk, fetch) in all_chunks(&receiver)?.iter_mut().enumerate() {
        fetch.span.as_mut_slice().fill(chunk as u8 + 1);
    }
    let (target, pieces) = (receiver.source.clone(), all_chunks(&receiver)?);
    let ended = transfer(&mut receiver, Kind::Write, &target, pieces, nothing)?;
    ensure!(ended.iter().all(|(_, result)| result.is_ok()), "{ended:?}");
    ensure!(receiver.rail.counters().written_bytes == SOURCE_BYTES, "{:?}", receiver.rail.counters());
    let theirs = receiver.ask(Ask::Chunks)?;
    ensure!(theirs == chunks(&receiver.memory)?, "other bytes than were written");
    Ok(String::new())
}

pub(crate) fn a_chunk_of_an_odd_length_is_read(node: &Node) -> Checked<String> {
    const BYTES: u64 = 4097;
    let mut receiver = node.connect(Way::Key, SETTINGS)?;
    let span = receiver.memory.claim(0, BYTES).ok_or(Wrong("claimed".into()))?;
    let fetches = VecDeque::from([Fetch { offset: 0, span, tag: 0 }]);
    let source = receiver.source.clone();
    let ended = transfer(&mut receiver, Kind::Read, &source, fetches, nothing)?;
    ensure!(ended == [(0, Ok(()))], "{ended:?}");
    let head = receiver.memory.claim(0, 2 * BYTES).ok_or(Wrong("a span was not given back".into()))?;
    let (read, behind) = head.as_slice().split_at(BYTES as usize);
    ensure!(read.iter().rev().take(9).any(|byte| *byte != 0), "the last bytes did not arrive");
    ensure!(behind.iter().all(|byte| *byte == 0), "more than was asked for has arrived");
    Ok(String::new())
}

pub(crate) fn windows_show_what_they_are_bound_to(node: &Node) -> Checked<String> {
    if !node.context.has_windows() {
        let domain = ProtectionDomain::new(&node.context)?;
        let memory = Arc::new(Memory::new(HUGE_PAGE_BYTES, PageKind::Small)?);
        let memory = Registered::windowed(&domain, Backing::Memory(memory))?;
        let refused = Window::new(&memory).map_err(|error| error.is_unsupported());
        ensure!(matches!(refused, Err(true)), "a device without windows made one: {refused:?}");
        return Ok("the device has none, and says so".into());
    }
    let mut receiver = node.connect(Way::Windows, SETTINGS)?;
    ensure!(receiver.source.remotes.len() == SETTINGS.pairs as usize, "one for each queue pair");
    read_all(&mut receiver)?;
    receiver.ask(Ask::Revoke)?;
    let fetches = VecDeque::from([fetch(&receiver, 0)?]);
    let source = receiver.source.clone();
    let ended = transfer(&mut receiver, Kind::Read, &source, fetches, nothing)?;
    ensure!(ended == [(0, Err(WorkError::RemoteAccess))], "a window that is void: {ended:?}");
    Ok("memory windows of type 2".into())
}

/// What the host tier shares stays a source, by the mapping that it was filled through.
pub(crate) fn sealed_memory_can_be_a_source(node: &Node) -> Checked<String> {
    let memory = Memory::new(HUGE_PAGE_BYTES, PageKind::Small)?;
    let (sealed, retired) = memory.seal().map_err(|failed| Wrong(failed.1.to_string()))?;
    let descriptor: OwnedFd = std::os::fd::AsFd::as_fd(&sealed).try_clone_to_owned()?;
    let domain = ProtectionDomain::new(&node.context)?;
    let registered = Registered::source(&domain, Backing::Retired(Arc::new(retired)))?;
    ensure!(registered.remote().is_some_and(|remote| remote.bytes() == HUGE_PAGE_BYTES), "not to be read");
    let map = Arc::new(ReadMap::from_parts(vec![(descriptor, HUGE_PAGE_BYTES)])?);
    match Registered::source(&domain, Backing::Map(map)) {
        Ok(_) => Ok("mapped read-only as well".into()),
        Err(error) if error.errno == rustix::io::Errno::FAULT.raw_os_error() => {
            Ok("not by a read-only mapping: the kernel is older than 6.3".into())
        }
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn dma_bufs_are_refused_where_there_are_none(node: &Node) -> Checked<String> {
    let domain = ProtectionDomain::new(&node.context)?;
    let file = OwnedFd::from(std::fs::File::open("/dev/null")?);
    match Registered::source(&domain, Backing::DmaBuf(file, HUGE_PAGE_BYTES)) {
        Ok(_) => Err(Wrong("/dev/null was registered as a dma-buf".into())),
        Err(error) if error.is_unsupported() => Ok("not supported by this device".into()),
        Err(error) => Ok(format!("supported; what is none is refused: {error}")),
    }
}
