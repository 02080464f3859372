//! `bench attach`: what it takes to attach what is resident, and what is not.

use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::daemon::Subject;
use super::plot::{Bar, Plot};
use super::report::{Report, Table, VERSION, spread};
use crate::api::methods::AttachRequest;
use crate::cli::Context;
use crate::cli::output::{Column, bytes};
use crate::client::{Attached, Client, Region};
use crate::error::Result;
use crate::measure::machine;
use crate::measure::rounds::Summary;
use crate::topology::Topology;

/// One byte of each of these is read to touch a page.
const PAGE_BYTES: usize = 4096;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Path or URI; it is evicted and loaded again for the cold attaches
    source: String,

    /// Where to: `host`, `gpu:GPU-<uuid>` or `gpu:<index>`
    #[arg(long, value_name = "DEVICE", default_value = "host")]
    device: String,

    /// Attaches of what is resident, each on a connection of its own
    #[arg(long, value_name = "NUMBER", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,

    /// Attaches of what was evicted before
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=1000))]
    cold: u32,
}

/// What one attach took, milliseconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
struct Times {
    connect: f64,
    request: f64,
    map: f64,
    touch: f64,
    release: f64,
}

/// One of the times.
type Phase = fn(&Times) -> f64;

pub(super) fn run(context: &Context, args: &Args) -> Result<Report> {
    let topology = Topology::read(Path::new("/"));
    let mut subject = Subject::open(context, &args.source, &args.device)?;
    let request = AttachRequest {
        source: Some(subject.source()),
        digest: None,
        device: args.device.clone(),
        select: None,
        wait: true,
        verify: false,
        notify: false,
    };
    let mut cold = Vec::new();
    for _ in 0..args.cold {
        subject.cool()?;
        cold.push(once(context, &request)?.0);
    }
    // Also without a cold one: from here on it is resident.
    let (_, first) = once(context, &request)?;
    let tensors = first.reply().tensors.len();
    let size: u64 = first.reply().regions.iter().map(|region| region.bytes).sum();
    let pages = first.reply().regions.first().map_or_else(String::new, |region| region.pages.clone());
    drop(first);
    let mut warm = Vec::new();
    for _ in 0..args.rounds {
        warm.push(once(context, &request)?.0);
    }
    let phases: [(&str, Phase); 5] = [
        ("connect", |times| times.connect),
        ("request", |times| times.request),
        ("map", |times| times.map),
        ("touch every page", |times| times.touch),
        ("release", |times| times.release),
    ];
    let ready = |times: &Times| times.request + times.map;
    let values = |of: &[Times], phase: fn(&Times) -> f64| -> Vec<f64> { of.iter().map(phase).collect() };
    let mut rows = Vec::new();
    for (what, all) in [("resident", &warm), ("evicted before", &cold)] {
        for (name, phase) in phases {
            if let Some(summary) = Summary::of(values(all, phase)) {
                rows.push(vec![what.to_owned(), name.to_owned(), spread(Some(summary), 3)]);
            }
        }
        if let Some(summary) = Summary::of(all.iter().map(ready)) {
            rows.push(vec![what.to_owned(), "request and map".to_owned(), spread(Some(summary), 3)]);
        }
    }
    let bars = phases.iter().filter_map(|(name, phase)| {
        let values = values(&warm, *phase);
        Some(Bar { name: (*name).to_owned(), summary: Summary::of(values.clone())?, values })
    });
    let middle = |all: &[Times]| Summary::of(all.iter().map(ready)).map(|summary| summary.median);
    let cold_words = middle(&cold).map_or_else(String::new, |ms| format!("; loaded first, in {ms:.0} ms"));
    let found = format!(
        "{tensors} tensors of {} are attached (request and map) in {:.2} ms when resident{cold_words}.",
        bytes(size),
        middle(&warm).unwrap_or(0.0),
    );
    Ok(Report {
        bench: "attach",
        version: VERSION,
        found,
        machine: machine::describe(&topology, subject.files.first().map(std::path::PathBuf::as_path)),
        table: Table {
            columns: &[Column::Left("ARTIFACT"), Column::Left("PHASE"), Column::Right("ms")],
            rows,
        },
        plots: vec![Plot::Bars {
            title: "Attach of what is resident".to_owned(),
            unit: "ms, less is better",
            bars: bars.collect(),
        }],
        notes: vec![
            format!(
                "{} attaches of what is resident, {} of what was evicted and dropped from the page cache before; each on a \
                 connection of its own; median (least–most).",
                args.rounds, args.cold
            ),
            format!(
                "Pages: {pages}. \"touch every page\" reads one byte of each 4 KiB; memory of GPUs is not touched."
            ),
            "Map is the client's own part: checking the seals, mapping, the table of tensors.".to_owned(),
        ],
        figures: json!({"bytes": size, "tensors": tensors, "resident_ms": warm, "evicted_ms": cold}),
    })
}

/// One attach from a connection of its own; what was attached stays mapped.
fn once(context: &Context, request: &AttachRequest) -> Result<(Times, Attached)> {
    let lap = |from: Instant| from.elapsed().as_secs_f64() * 1e3;
    let begun = Instant::now();
    let mut client: Client = context.connect()?;
    let connect = lap(begun);
    let attached = client.attach(request, &[], &mut |_| ())?;
    let begun = Instant::now();
    for region in attached.regions() {
        if let Region::Host(map) = region {
            let sum =
                map.as_slice().iter().step_by(PAGE_BYTES).fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            std::hint::black_box(sum);
        }
    }
    let touch = lap(begun);
    let begun = Instant::now();
    client.release(attached.lease())?;
    let release = lap(begun);
    let timings = attached.timings();
    let (request, map) = (timings.request.as_secs_f64() * 1e3, timings.map.as_secs_f64() * 1e3);
    Ok((Times { connect, request, map, touch, release }, attached))
}
