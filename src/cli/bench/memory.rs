//! `bench memory`: copies, checksums and making pages ready.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::json;

use super::plot::{Bar, Plot};
use super::report::{Report, Table, VERSION, gib, spread};
use crate::cli::output::{Column, bytes};
use crate::error::{Code, Error, Result};
use crate::measure::Run;
use crate::measure::machine;
use crate::measure::memory::{Bench, Work};
use crate::measure::rounds::{Rounds, Summary};
use crate::topology::Topology;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Memory to work on; copies take twice as much
    #[arg(long, value_name = "SIZE", value_parser = super::bytes, default_value = "256MiB")]
    bytes: u64,

    /// Rounds; each kind of work runs once in each
    #[arg(long, value_name = "NUMBER", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

pub(super) fn run(args: &Args) -> Result<Report> {
    let failed = |error: std::io::Error| {
        Error::new(Code::TierHostOutOfMemory, format!("{} cannot be worked on: {error}", bytes(args.bytes)))
    };
    let mut bench = Bench::new(args.bytes).map_err(failed)?;
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); Work::ALL.len()];
    let mut notes = vec![
        format!(
            "One thread, as a shard thread does it, on {} in {} pages; {} rounds in shuffled order; median (least–most).",
            bytes(args.bytes),
            bench.pages,
            args.rounds
        ),
        "A streaming copy leaves the target out of the CPU's caches. Populating is what a load pays for memory that was not \
         made ready before."
            .to_owned(),
        "A virtual machine gives freed memory back to its host; touching it again is slower than here, where it was in use a \
         moment ago."
            .to_owned(),
    ];
    let rounds = Rounds::run(args.rounds, Work::ALL.len(), |_, place| match bench.run(Work::ALL[place]) {
        Ok(run) => {
            runs[place].push(run);
            Ok(Some(run.rate()))
        }
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            notes.push(format!("{}: not measured: {error}.", Work::ALL[place].as_str()));
            Ok(None)
        }
        Err(error) => Err(failed(error)),
    })?;
    let rate = |work: Work| {
        let place = Work::ALL.iter().position(|other| *other == work)?;
        let values: Vec<f64> = runs[place].iter().map(|run| gib(run.rate())).collect();
        Some((Summary::of(values.clone())?, values))
    };
    let rows = Work::ALL.iter().enumerate().map(|(place, work)| {
        let cpu = Summary::of(runs[place].iter().map(|run| run.cpu_seconds_per_gib()));
        vec![
            work.as_str().to_owned(),
            spread(rate(*work).map(|(summary, _)| summary), 2),
            spread(rounds.ratio(place, 0), 2),
            spread(cpu, 3),
        ]
    });
    let bars = Work::ALL.iter().filter_map(|work| {
        let (summary, values) = rate(*work)?;
        Some(Bar { name: work.as_str().to_owned(), summary, values })
    });
    let median = |work| rate(work).map_or(0.0, |(summary, _)| summary.median);
    let found = format!(
        "One thread copies {:.1} GiB/s past the caches ({:.1} by way of them) and checksums {:.1} GiB/s.",
        median(Work::StreamingCopy),
        median(Work::Copy),
        median(Work::Checksum),
    );
    Ok(Report {
        bench: "memory",
        version: VERSION,
        found,
        machine: machine::describe(&Topology::read(Path::new("/")), None),
        table: Table {
            columns: &[
                Column::Left("WORK"),
                Column::Right("GiB/s"),
                Column::Right("TO A COPY OF THE ROUND"),
                Column::Right("CPU-s/GiB"),
            ],
            rows: rows.collect(),
        },
        plots: vec![Plot::Bars {
            title: "Memory, one thread".to_owned(),
            unit: "GiB/s",
            bars: bars.collect(),
        }],
        notes,
        figures: json!({"work": Work::ALL, "pages": bench.pages.as_str(), "bytes_per_s": rounds.figures, "runs": runs}),
    })
}
