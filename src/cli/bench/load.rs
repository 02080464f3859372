//! `bench load`: cold loads by a running daemon against fio, and against nothing but reading, on the same files.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::daemon::Subject;
use super::fio::Fio;
use super::plot::{Bar, Plot};
use super::report::{Report, Table, VERSION, gib, spread};
use crate::cli::Context;
use crate::cli::doctor::read::unreadable;
use crate::cli::output::{self, Column, bytes};
use crate::config::size;
use crate::error::{Code, Error, Result};
use crate::measure::Run;
use crate::measure::drive::{DriveError, Setting, Target, best};
use crate::measure::machine;
use crate::measure::rounds::{Rounds, Summary};
use crate::sys::mem::HUGE_PAGE_BYTES;
use crate::sys::warm::Warm;
use crate::topology::Topology;

const MIB: u64 = 1 << 20;
/// Block sizes and depths that the references are tried with.
const BLOCKS: [u64; 2] = [MIB, 4 * MIB];
const DEPTHS: [u32; 3] = [4, 8, 16];
/// How long one setting of the own reader is tried.
const TRIAL_TIME: Duration = Duration::from_millis(500);
/// Memory that is left alone when memory is made warm.
const SPARE_BYTES: u64 = 2 << 30;
/// As long as it takes.
const WHOLE: Duration = Duration::from_secs(3600);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Path or URI of what is loaded, evicted and loaded again; this process must see its files, too
    source: String,

    /// Where to: `host`, `gpu:GPU-<uuid>` or `gpu:<index>`
    #[arg(long, value_name = "DEVICE", default_value = "host")]
    device: String,

    /// Rounds; each contestant runs once in each
    #[arg(long, value_name = "NUMBER", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Memory to touch and give back just before each run, so that all find it as warm; 0: none [default: twice the artifact on a
    /// virtual machine, none on others; never more than is free, less 2 GiB]
    #[arg(long, value_name = "SIZE", value_parser = hold)]
    hold: Option<u64>,
}

fn hold(text: &str) -> Result<u64, String> {
    size::parse(text).ok_or_else(|| size::ALLOWED.to_owned())
}

/// What is touched before each run: whole huge pages of what was asked for or is the default, as far as memory is free.
fn held(asked: Option<u64>, artifact: u64, free: u64, is_virtual: bool) -> u64 {
    let default = if is_virtual { artifact.saturating_mul(2) } else { 0 };
    let room = free.saturating_sub(SPARE_BYTES);
    asked.unwrap_or(default).min(room) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
}

/// Makes memory warm: a hypervisor takes back what has been free for seconds, and touching that costs up to seconds for each GiB.
fn warm(bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    Warm::new(bytes).map(drop).map_err(|error| {
        let message = format!("{} cannot be touched before a run (--hold): {error}", output::bytes(bytes));
        Error::new(Code::TierHostOutOfMemory, message)
    })
}

/// Who runs in each round.
enum Contestant {
    /// The reference, if it is installed.
    Fio(Fio),
    /// The daemon's ring alone: reads into slots, and nothing is done with the bytes.
    Reads(Vec<Target>, Setting),
    /// The daemon.
    Load,
}

impl Contestant {
    fn words(&self) -> String {
        match self {
            Contestant::Fio(fio) => fio.words(),
            Contestant::Reads(_, setting) => {
                format!("reads alone ({} × {})", bytes(setting.block_bytes), setting.depth)
            }
            Contestant::Load => "load".to_owned(),
        }
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<Report> {
    let topology = Topology::read(Path::new("/"));
    let mut subject = Subject::open(context, &args.source, &args.device)?;
    let status = context.connect()?.status()?;
    let settings = Setting::all(&BLOCKS, &DEPTHS);
    subject.cool()?;
    let mut notes = Vec::new();
    let mut contestants = Vec::new();
    match Fio::best(&subject.files, &settings) {
        Ok(fio) => contestants.push(Contestant::Fio(fio)),
        Err(why) => notes.push(format!("fio is not the reference: {why}.")),
    }
    match targets(&subject, &topology, &settings)? {
        Some((targets, setting)) => contestants.push(Contestant::Reads(targets, setting)),
        None => notes.push(
            "The file system has no O_DIRECT: nothing is compared with reads past the page cache.".to_owned(),
        ),
    }
    contestants.push(Contestant::Load);
    let load = contestants.len() - 1;
    let held = held(args.hold, subject.bytes, machine::free_bytes(), machine::is_virtual());

    let runs: RefCell<Vec<Vec<Run>>> = RefCell::new(vec![Vec::new(); contestants.len()]);
    let mut paths: BTreeMap<String, u64> = BTreeMap::new();
    let mut held_up: BTreeMap<String, u32> = BTreeMap::new();
    let rounds = Rounds::run(args.rounds, contestants.len(), |_, place| {
        subject.cool()?;
        warm(held)?;
        let run = match &contestants[place] {
            Contestant::Fio(fio) => {
                fio.read(&subject.files).map_err(|why| Error::new(Code::Internal, why))?
            }
            Contestant::Reads(targets, setting) => read_all(targets, *setting)?,
            Contestant::Load => {
                let (run, job) = subject.load()?;
                for (path, moved) in job.path {
                    *paths.entry(path).or_default() += moved;
                }
                if let Some(bottleneck) = job.bottleneck {
                    *held_up.entry(bottleneck).or_default() += 1;
                }
                run
            }
        };
        runs.borrow_mut()[place].push(run);
        Ok::<_, Error>(Some(run.rate()))
    })?;

    let runs = runs.into_inner();
    let rate = |place: usize| Summary::of(runs[place].iter().map(|run| gib(run.rate())));
    let rows = contestants.iter().enumerate().map(|(place, contestant)| {
        let cpu =
            runs[place].iter().map(|run| run.cpu_seconds_per_gib()).filter(|seconds| seconds.is_finite());
        vec![
            contestant.words(),
            spread(rounds.ratio(place, 0), 2),
            spread(rate(place), 2),
            spread(Summary::of(cpu), 3),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let bars = |figure: &dyn Fn(usize) -> Vec<f64>| -> Vec<Bar> {
        let bar = |(place, contestant): (usize, &Contestant)| {
            let values = figure(place);
            let words = contestant.words();
            let name = words.split(" (").next().unwrap_or_default().to_owned();
            Some(Bar { name, summary: Summary::of(values.clone())?, values })
        };
        contestants.iter().enumerate().filter_map(bar).collect()
    };
    let ratios = |place: usize| -> Vec<f64> {
        rounds.figures.iter().filter_map(|row| Some(row[place]? / row[0]?)).collect()
    };
    let cpu = |place: usize| -> Vec<f64> {
        runs[place]
            .iter()
            .map(|run| run.cpu_seconds_per_gib())
            .filter(|seconds| seconds.is_finite())
            .collect()
    };
    let plots = vec![
        Plot::Bars {
            title: "Rate to the reference of the same round".to_owned(),
            unit: "ratio, more is better",
            bars: bars(&ratios),
        },
        Plot::Bars { title: "CPU".to_owned(), unit: "CPU-seconds per GiB, less is better", bars: bars(&cpu) },
    ];
    let reference = contestants[0].words();
    let most = held_up.iter().max_by_key(|(_, count)| **count).map_or("-", |(name, _)| name.as_str());
    let ratio = rounds.ratio(load, 0).map_or(0.0, |summary| summary.median);
    let all: u64 = paths.values().sum();
    let shares: Vec<String> = paths
        .iter()
        .map(|(path, moved)| format!("{path} {:.1} %", *moved as f64 * 100.0 / all.max(1) as f64))
        .collect();
    let found = if load == 0 {
        format!("A cold load of {} is {most}-bound.", bytes(subject.bytes))
    } else {
        format!(
            "A cold load of {} reaches {ratio:.2} of {reference}, and is {most}-bound.",
            bytes(subject.bytes)
        )
    };
    notes.splice(0..0, [
        format!(
            "{} rounds in shuffled order; median (least–most). Before each run the artifact is evicted, the ready pool is waited \
             for, and the files are dropped from the page cache (posix_fadvise; a hypervisor may hold them in a cache of its own).",
            args.rounds
        ),
        match held {
            0 => "No memory was touched beforehand: where a hypervisor has taken back what was free, a load pays for it (--hold)."
                .to_owned(),
            _ => format!(
                "Just before each run {} are touched and given back, so that all contestants find memory equally warm (--hold).",
                bytes(held)
            ),
        },
        "Ratios are to the reference of the same round: absolute rates of different rounds, or of another day, say nothing.".to_owned(),
        format!(
            "The load: every byte checksummed and kept, to {}, pages {}, reader {}, {} of the ready pool wanted; {}.",
            args.device,
            status.host.pages,
            status.features.reader,
            bytes(status.host.pool_target_bytes),
            shares.join(", ")
        ),
        "Nothing is done with what fio and the reads alone bring in.".to_owned(),
        "CPU of the daemon is that of its whole process, filling the pool while it loads included, if this user may see it.".to_owned(),
    ]);
    Ok(Report {
        bench: "load",
        version: VERSION,
        found,
        machine: machine::describe(&topology, subject.files.first().map(std::path::PathBuf::as_path)),
        table: Table {
            columns: &[
                Column::Left("CONTESTANT"),
                Column::Right("TO THE REFERENCE"),
                Column::Right("GiB/s"),
                Column::Right("CPU-s/GiB"),
            ],
            rows,
        },
        plots,
        notes,
        figures: json!({
            "contestants": contestants.iter().map(Contestant::words).collect::<Vec<_>>(),
            "bytes": subject.bytes,
            "held_bytes": held,
            "bytes_per_s": rounds.figures,
            "runs": runs,
            "path": paths,
            "bottleneck": held_up,
        }),
    })
}

/// The files for the own reader, and the setting that it is best with. `None`: they cannot be read past the page cache.
fn targets(
    subject: &Subject,
    topology: &Topology,
    settings: &[Setting],
) -> Result<Option<(Vec<Target>, Setting)>> {
    let mut targets = Vec::with_capacity(subject.files.len());
    for file in &subject.files {
        match Target::open(file, topology, 1) {
            Ok(target) => targets.push(target),
            // An empty file: nothing to read.
            Err(DriveError::TooSmall(_)) => {}
            Err(DriveError::NoDirect(_)) => return Ok(None),
            Err(DriveError::Open { path, error }) => return Err(unreadable(&path, &error)),
        }
    }
    let Some(largest) = targets.iter().max_by_key(|target| target.bytes()) else { return Ok(None) };
    let mut figures = Vec::new();
    for setting in settings {
        let run = largest
            .read(*setting, TRIAL_TIME, u64::MAX)
            .map_err(|error| unreadable(&largest.path, &error))?;
        figures.push((*setting, run.rate()));
    }
    Ok(best(&figures).map(|setting| (targets, setting)))
}

/// Reads each file once.
fn read_all(targets: &[Target], setting: Setting) -> Result<Run> {
    let mut all = Run { bytes: 0, seconds: 0.0, cpu_seconds: 0.0 };
    for target in targets {
        let run =
            target.read(setting, WHOLE, target.bytes()).map_err(|error| unreadable(&target.path, &error))?;
        all.bytes += run.bytes;
        all.seconds += run.seconds;
        all.cpu_seconds += run.cpu_seconds;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::held;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_is_touched_fits_and_is_none_where_no_hypervisor_takes_memory() {
        for (asked, artifact, free, is_virtual, expected) in [
            (None, 4 * GIB, 20 * GIB, true, 8 * GIB),
            (None, 4 * GIB, 20 * GIB, false, 0),
            (None, 4 * GIB, 6 * GIB, true, 4 * GIB),
            (None, 4 * GIB, GIB, true, 0),
            (None, (3 << 20) + 7, 20 * GIB, true, 6 << 20),
            (None, u64::MAX, 20 * GIB, true, 18 * GIB),
            (Some(0), 4 * GIB, 20 * GIB, true, 0),
            (Some(GIB), 4 * GIB, 20 * GIB, false, GIB),
            (Some(30 * GIB), 4 * GIB, 20 * GIB, false, 18 * GIB),
        ] {
            assert_eq!(held(asked, artifact, free, is_virtual), expected, "{asked:?}, {artifact}, {free}");
        }
    }
}
