//! `plan spread`: the deterministic simulator of a spread.

use serde::Serialize;

use crate::cli::output::{Column, Output, bytes, milliseconds, table};
use crate::cli::parse;
use crate::config::size;
use crate::error::{Code, Error, Result};
use crate::plan::spread::CHUNKS_MAX;
use crate::plan::spread::simulate::{
    CHUNK_BYTES_MAX, LATENCY_NS_MAX, NODES_MAX, Outcome, RATE_MIN, Scenario,
};

/// Nodes times chunks, at most: each takes a microsecond or so, and the memory of all is bounded.
const TRANSFERS_MAX: u64 = 200_000_000;
/// Version of the JSON document.
const VERSION: u32 = 1;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Nodes that want the artifact
    #[arg(long, value_name = "NUMBER", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=i64::from(NODES_MAX)))]
    nodes: u32,

    /// Nodes that have it
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(NODES_MAX)))]
    sources: u32,

    /// Chunks of the artifact
    #[arg(long, value_name = "NUMBER", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=i64::from(CHUNKS_MAX)))]
    chunks: u32,

    /// Bytes of a chunk
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = chunk_bytes)]
    chunk_bytes: u64,

    /// Bytes per second that a node sends, and that it receives at the same time
    #[arg(long, value_name = "SIZE", default_value = "3GiB", value_parser = link_rate)]
    link_rate: u64,

    /// From one node to another, one way
    #[arg(long, value_name = "DURATION", default_value = "20us", value_parser = duration_ns)]
    latency: u64,

    /// Until a chunk that has arrived is verified and can be passed on
    #[arg(long, value_name = "DURATION", default_value = "20us", value_parser = duration_ns)]
    verify: u64,

    /// Racks that the nodes are in
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(NODES_MAX)))]
    racks: u32,

    /// How many times more the nodes of a rack can send than its uplink carries
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = oversubscription)]
    oversubscription: f64,

    /// Part of the nodes that die in the middle of the spread
    #[arg(long, value_name = "PERCENT", default_value = "0%", value_parser = percent)]
    fail: f64,

    /// Until the others notice that a node has died
    #[arg(long, value_name = "DURATION", default_value = "1ms", value_parser = duration_ns)]
    notice: u64,

    /// Part of the nodes with slow links, and how fast these are, such as 2%:0.1
    #[arg(long, value_name = "PERCENT:RATE", default_value = "0%:1", value_parser = slow)]
    slow: (f64, f64),

    /// Part of the nodes that join when half of the time of one node is over
    #[arg(long, value_name = "PERCENT", default_value = "0%", value_parser = percent)]
    late: f64,

    /// Part of the chunks sent that arrive with wrong bytes
    #[arg(long, value_name = "PERCENT", default_value = "0%", value_parser = percent)]
    corrupt: f64,

    /// Chunks that a node sends at a time
    #[arg(long, value_name = "NUMBER", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    uploads: u32,

    /// Chunks that a node asks for at a time
    #[arg(long, value_name = "NUMBER", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=64))]
    asks: u32,

    /// What is drawn by lot follows from it
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    seed: u64,
}

/// The JSON document.
#[derive(Debug, Serialize)]
struct Document<'a> {
    version: u32,
    /// Nothing here was measured.
    simulated: bool,
    scenario: &'a Scenario,
    outcome: &'a Outcome,
}

pub(super) fn run(output: Output, args: &Args) -> Result<()> {
    if u64::from(args.nodes) * u64::from(args.chunks) > TRANSFERS_MAX {
        return Err(Error::new(
            Code::CliUsage,
            format!("nodes times chunks is more than the limit of {TRANSFERS_MAX}"),
        ));
    }
    let scenario = Scenario {
        nodes: args.nodes,
        sources: args.sources,
        chunks: args.chunks,
        chunk_bytes: args.chunk_bytes,
        link_rate: args.link_rate,
        latency_ns: args.latency,
        verify_ns: args.verify,
        racks: args.racks,
        oversubscription: args.oversubscription,
        fail: args.fail,
        notice_ns: args.notice,
        slow: args.slow.0,
        slow_rate: args.slow.1,
        late: args.late,
        corrupt: args.corrupt,
        uploads_max: args.uploads,
        asks_max: args.asks,
        seed: args.seed,
    };
    // What a flag alone cannot say is wrong: more racks than nodes.
    let outcome = scenario.run().ok_or_else(|| {
        Error::new(Code::CliUsage, "these numbers do not go together: too many racks or sources")
    })?;
    let document = Document { version: VERSION, simulated: true, scenario: &scenario, outcome: &outcome };
    output.result(&document, || text(&scenario, &outcome))
}

fn text(scenario: &Scenario, outcome: &Outcome) -> String {
    let artifact = u64::from(scenario.chunks).saturating_mul(scenario.chunk_bytes);
    let time = |ns: u64| milliseconds(ns as f64 / 1e6);
    let against = |ns: u64| format!("{} ({:.3} ×)", time(ns), ns as f64 / outcome.one_ns.max(1) as f64);
    let mut rows = vec![
        ("one node", time(outcome.one_ns)),
        ("half of the nodes", against(outcome.p50_ns)),
        ("99 % of the nodes", against(outcome.p99_ns)),
        ("the last node", against(outcome.last_ns)),
        ("the last that is neither slow nor late", against(outcome.last_ordinary_ns)),
        ("nodes that have it", outcome.complete.to_string()),
        ("nodes that do not", outcome.incomplete.to_string()),
        ("nodes that died", outcome.died.to_string()),
        ("read from storage", format!("{:.2} ×", outcome.storage_reads)),
        ("sent by sources", format!("{:.2} ×", outcome.source_sent)),
        ("chunks sent", outcome.sent.to_string()),
        ("sent in vain", outcome.wasted.to_string()),
        ("asked for again", outcome.asked_again.to_string()),
    ];
    let busiest = outcome.racks.iter().max_by(|one, other| one.used.total_cmp(&other.used));
    if let Some(rack) = busiest {
        let used = format!("{:.0} %: {:.2} × out, {:.2} × in", rack.used * 100.0, rack.sent, rack.received);
        rows.push(("the busiest uplink of a rack", used));
    }
    let rows = rows.into_iter().map(|(what, figure)| vec![what.to_owned(), figure]).collect();
    format!(
        "Simulated: {} to {} nodes in {} chunks, seed {}\n{}",
        bytes(artifact),
        scenario.nodes,
        scenario.chunks,
        scenario.seed,
        table(&[Column::Left("WHAT"), Column::Left("FIGURE")], rows)
    )
}

fn chunk_bytes(text: &str) -> std::result::Result<u64, String> {
    let fits = |bytes: &u64| (1..=CHUNK_BYTES_MAX).contains(bytes);
    size::parse(text).filter(fits).ok_or_else(|| format!("{}, at most 1GiB", size::ALLOWED))
}

fn link_rate(text: &str) -> std::result::Result<u64, String> {
    let fits = |rate: &u64| *rate >= RATE_MIN;
    size::parse(text).filter(fits).ok_or_else(|| format!("{}, at least {RATE_MIN}", size::ALLOWED))
}

/// `20us`, or what other durations may be, up to the limit of the simulator.
fn duration_ns(text: &str) -> std::result::Result<u64, String> {
    let ns = match text.strip_suffix("us") {
        Some(number) if number.bytes().all(|byte| byte.is_ascii_digit()) => {
            number.parse::<u64>().ok().and_then(|number| number.checked_mul(1000))
        }
        _ => parse::duration_ms(text).map_err(|error| format!("{error}; or us"))?.checked_mul(1_000_000),
    };
    ns.filter(|ns| *ns <= LATENCY_NS_MAX).ok_or_else(|| "at most 10s".to_owned())
}

/// `2%`, as a part of 1.
fn percent(text: &str) -> std::result::Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    number
        .filter(|number| (0.0..=100.0).contains(number))
        .map(|number| number / 100.0)
        .ok_or_else(|| "a percentage from 0% to 100%".to_owned())
}

/// `2%:0.1`.
fn slow(text: &str) -> std::result::Result<(f64, f64), String> {
    let allowed = || "a percentage and a rate from 0.001 to 1, such as 2%:0.1".to_owned();
    let (part, rate) = text.split_once(':').ok_or_else(allowed)?;
    let rate = rate.parse::<f64>().ok().filter(|rate| (1e-3..=1.0).contains(rate)).ok_or_else(allowed)?;
    Ok((percent(part)?, rate))
}

fn oversubscription(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| (1.0..=1e6).contains(number));
    number.ok_or_else(|| "a number from 1 up".to_owned())
}
