//! `lodestream status`: what an operator asks first.

use std::fmt::Write;

use super::Context;
use super::output::{bytes, milliseconds, printable, rate};
use crate::api::methods::{DirectState, DirectStatus, ShardStatus, StatusReply};
use crate::error::Result;

pub(super) fn run(context: &Context) -> Result<()> {
    let status = context.connect()?.status()?;
    context.output.result(&status, || text(&status))
}

fn text(status: &StatusReply) -> String {
    let mut out = String::new();
    let up = milliseconds(status.uptime_s as f64 * 1e3);
    let host = &status.host;
    let because =
        |reason: &Option<String>| reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{} on {}: {}, up {up}", status.server, status.node, status.state);
    let _ = writeln!(
        out,
        "clients   {} connections, {} leases, {} jobs",
        status.connections, status.leases, status.jobs
    );
    let _ = writeln!(
        out,
        "host      {} resident, {} held by clients after eviction, {} of {} ready, {} staging, budget {}",
        bytes(host.resident_bytes),
        bytes(host.held_bytes),
        bytes(host.pool_bytes),
        bytes(host.pool_target_bytes),
        bytes(host.staging_bytes),
        bytes(host.budget_bytes),
    );
    for gpu in &status.gpus {
        let _ = writeln!(
            out,
            "gpu       {} {}: {} resident, {} going to the host tier, {} held by clients after eviction, budget {}{}",
            gpu.device,
            gpu.name,
            bytes(gpu.resident_bytes),
            bytes(gpu.demoting_bytes),
            bytes(gpu.held_bytes),
            bytes(gpu.budget_bytes),
            if gpu.lost { ", LOST" } else { "" },
        );
        for direct in &gpu.direct {
            let _ = writeln!(out, "direct    {}", direct_line(&gpu.device, direct));
        }
    }
    let _ = writeln!(out, "pages     {}{}", host.pages, because(&host.pages_reason));
    let _ = writeln!(out, "reader    {}{}", status.features.reader, because(&status.features.reader_reason));
    for shard in &status.shards {
        out.push_str(&shard_line(shard));
    }
    for preload in &status.preload {
        let error = preload.error.as_ref().map(|error| format!(": {} [{}]", error.message, error.code));
        let _ = writeln!(
            out,
            "preload   {} on {}: {:?}{}",
            preload.source,
            preload.device,
            preload.state,
            error.unwrap_or_default()
        );
    }
    printable(&out)
}

fn direct_line(device: &str, direct: &DirectStatus) -> String {
    let state = match direct.state {
        DirectState::Probing => "being measured",
        DirectState::Used => "used",
        DirectState::NotUsed => "not used",
    };
    let mode = direct.mode.as_ref().map(|mode| format!(", {mode}")).unwrap_or_default();
    let measured = |name: &str, found: Option<f64>| {
        found.map(|found| format!(", {} {name}", rate(found))).unwrap_or_default()
    };
    let reason = direct.reason.as_ref().filter(|_| direct.state == DirectState::NotUsed);
    format!(
        "{} → {device}: {state}{mode}{}{}{}",
        direct.drive,
        measured("direct", direct.direct_bytes_per_second),
        measured("staged", direct.staged_bytes_per_second),
        reason.map(|reason| format!(" ({reason})")).unwrap_or_default()
    )
}

fn shard_line(shard: &ShardStatus) -> String {
    let cpus: Vec<String> = shard.cpus.iter().map(u32::to_string).collect();
    let pinned = if cpus.is_empty() { "not pinned".to_owned() } else { format!("CPUs {}", cpus.join(",")) };
    let nodes: Vec<String> = shard.slot_nodes.keys().map(u32::to_string).collect();
    let slots = if nodes.is_empty() {
        String::new()
    } else {
        format!(", slots on NUMA node {}", nodes.join(" and "))
    };
    format!(
        "shard {:<3} {}: {}, {} × {}, {} in flight, {pinned}{slots}\n",
        shard.shard,
        shard.reader,
        if shard.devices.is_empty() { "any drive".to_owned() } else { shard.devices.join(", ") },
        bytes(shard.block_bytes),
        shard.depth,
        shard.in_flight,
    )
}
