//! `bench drive`: reads of the drive below a file, by size of a block and depth.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::plot::{Plot, Series};
use super::report::{Report, Table, VERSION, gib, spread};
use crate::cli::doctor::read::unreadable;
use crate::cli::output::{Column, bytes};
use crate::cli::parse;
use crate::error::{Code, Error, Result};
use crate::measure::Run;
use crate::measure::drive::{DriveError, FILE_BYTES_MIN, Setting, Target, best};
use crate::measure::machine;
use crate::measure::rounds::{Rounds, Summary};
use crate::topology::Topology;

/// Most that one trial reads, bytes: a fast drive must not read for the whole time into what a slow machine has to copy.
const TRIAL_BYTES: u64 = 16 << 30;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A file of 64 MiB or more, or a directory with one
    path: PathBuf,

    /// Sizes of a read
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', value_parser = block, default_value = "256KiB,1MiB,2MiB,4MiB")]
    blocks: Vec<u64>,

    /// Reads in flight
    #[arg(long, value_name = "NUMBER,…", value_delimiter = ',', default_value = "1,2,4,8,16,32",
        value_parser = clap::value_parser!(u32).range(1..=256))]
    depths: Vec<u32>,

    /// How long each setting reads in each round
    #[arg(long, value_name = "DURATION", value_parser = parse::duration_ms, default_value = "300ms")]
    time: u64,

    /// Rounds; every setting runs once in each
    #[arg(long, value_name = "NUMBER", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

/// A size that O_DIRECT can read and one request of the ring can hold.
fn block(text: &str) -> Result<u64, String> {
    const MIB: u64 = 1 << 20;
    let bytes = super::bytes(text)?;
    if bytes.is_multiple_of(4096) && bytes <= 64 * MIB {
        Ok(bytes)
    } else {
        Err("a multiple of 4KiB, at most 64MiB".to_owned())
    }
}

pub(super) fn run(args: &Args) -> Result<Report> {
    let topology = Topology::read(Path::new("/"));
    let target = Target::open(&args.path, &topology, FILE_BYTES_MIN).map_err(refused)?;
    let settings = Setting::all(&args.blocks, &args.depths);
    let time = Duration::from_millis(args.time);
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); settings.len()];
    let rounds = Rounds::run(args.rounds, settings.len(), |_, place| {
        let run = target.read(settings[place], time, TRIAL_BYTES);
        let run = run.map_err(|error| unreadable(&target.path, &error))?;
        runs[place].push(run);
        Ok::<_, Error>(Some(run.rate()))
    })?;
    let figures: Vec<(Setting, f64)> = settings
        .iter()
        .enumerate()
        .filter_map(|(place, setting)| Some((*setting, rounds.to_mean(place)?.median)))
        .collect();
    let chosen = best(&figures);
    let fastest = figures.iter().max_by(|one, other| one.1.total_cmp(&other.1)).map(|(setting, _)| *setting);
    let place_of = |wanted: Setting| settings.iter().position(|setting| *setting == wanted);
    let rate_of = |wanted: Option<Setting>| wanted.and_then(place_of).and_then(|place| rounds.of(place));
    let words = |setting: Option<Setting>| {
        setting.map_or_else(
            || "nothing".to_owned(),
            |setting| format!("{} × {}", bytes(setting.block_bytes), setting.depth),
        )
    };
    let rows = settings.iter().enumerate().map(|(place, setting)| {
        let cpu = Summary::of(runs[place].iter().map(|run| run.cpu_seconds_per_gib()));
        vec![
            bytes(setting.block_bytes),
            setting.depth.to_string(),
            spread(rounds.of(place).map(in_gib), 2),
            spread(rounds.to_mean(place), 2),
            spread(cpu, 3),
            (if Some(*setting) == chosen { "use this" } else { "" }).to_owned(),
        ]
    });
    let series = args.blocks.iter().map(|block_bytes| Series {
        name: bytes(*block_bytes),
        points: args
            .depths
            .iter()
            .map(|depth| {
                let place = place_of(Setting { block_bytes: *block_bytes, depth: *depth })?;
                rounds.of(place).map(in_gib)
            })
            .collect(),
    });
    let plot = Plot::Lines {
        title: "Reads past the page cache, by size of a read".to_owned(),
        unit: "GiB/s",
        across: "reads in flight",
        places: args.depths.iter().map(u32::to_string).collect(),
        series: series.collect(),
    };
    let fast = rate_of(fastest).map_or(0.0, |summary| gib(summary.median));
    let also = if chosen == fastest {
        "and nothing that keeps less memory in flight is as good within 5 %".to_owned()
    } else {
        format!("{} is as good within 5 % and keeps least memory in flight", words(chosen))
    };
    let found = format!(
        "{}: fastest with {} ({fast:.2} GiB/s); {also} (data_plane.block_bytes, data_plane.depth).",
        target.drive.as_deref().unwrap_or("the drive below the file"),
        words(fastest),
    );
    Ok(Report {
        bench: "drive",
        version: VERSION,
        found,
        machine: machine::describe(&topology, Some(&target.path)),
        table: Table {
            columns: &[
                Column::Right("READ"),
                Column::Right("DEPTH"),
                Column::Right("GiB/s"),
                Column::Right("TO THE ROUND'S MEAN"),
                Column::Right("CPU-s/GiB"),
                Column::Left(""),
            ],
            rows: rows.collect(),
        },
        plots: vec![plot],
        notes: vec![
            format!(
                "Sequential reads with O_DIRECT by the daemon's own io_uring into registered slots; {} rounds in shuffled \
                 order, {} ms each; median (least–most).",
                args.rounds, args.time
            ),
            "Settings are compared within their round: a drive, above all a virtual one, drifts.".to_owned(),
            "Nothing is done with the bytes: no checksum, nothing is kept. A hypervisor may hold the file in a cache of its own."
                .to_owned(),
        ],
        figures: json!({"best": chosen, "fastest": fastest, "settings": settings, "bytes_per_s": rounds.figures, "runs": runs}),
    })
}

fn in_gib(summary: Summary) -> Summary {
    Summary {
        median: gib(summary.median),
        least: gib(summary.least),
        most: gib(summary.most),
        count: summary.count,
    }
}

fn refused(error: DriveError) -> Error {
    match error {
        DriveError::Open { path, error } => unreadable(&path, &error),
        other => Error::new(Code::CliUsage, other.to_string()),
    }
}
