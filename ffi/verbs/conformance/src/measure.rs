//! READs by a rail against ib_read_bw: same device, sizes and queue pairs, one after the other, several times.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::Instant;

use lodestream::checksum::CHUNK_BYTES;
use lodestream::rdma::{Fetch, Settings};
use lodestream::sys::verbs::Kind;

use crate::Node;
use crate::check::{Checked, ensure};
use crate::session::{Ask, Perftest, Receiver, SOURCE_BYTES, Way};
use crate::transfers::{fetch, transfer};

const ROUNDS: usize = 7;
const SETTINGS: Settings = Settings { pairs: 4, depth: 8 };
/// READs of each queue pair in one round.
const EACH: u64 = 32;

/// Writes the rates and their ratio as JSON.
pub(crate) fn measure(node: &Node) -> Checked {
    let route = node.context.route(Some(node.local))?;
    let (pairs, depth) = (SETTINGS.pairs, SETTINGS.depth);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut receiver = node.connect(Way::Key, SETTINGS)?;
        // Who is first changes from round to round.
        for turn in [round % 2, (round + 1) % 2] {
            if turn == 0 {
                ours.push(rail(&mut receiver)?);
            } else {
                receiver.ask(Ask::Perftest { pairs, depth, each: EACH })?;
                let gid = route.choice.entry.index;
                theirs.push(Perftest::client(node.context.name(), gid, pairs, depth, EACH, node.peer)?);
            }
        }
    }
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
    let result = serde_json::json!({
        "what": "RDMA READ by a rail, as a ratio to ib_read_bw in the same rounds",
        "device": "soft-RoCE in a virtual machine, reading from itself: only the ratio means anything",
        "message_bytes": CHUNK_BYTES,
        "queue_pairs": pairs,
        "depth": depth,
        "bytes_in_a_round": EACH * u64::from(pairs) * CHUNK_BYTES,
        "rounds": ROUNDS,
        "ratios": ratios.iter().map(|ratio| rounded(*ratio)).collect::<Vec<_>>(),
        "ratio_median": rounded(median(ratios)),
        "rail_mib_per_s_median": rounded(median(ours)),
        "ib_read_bw_mib_per_s_median": rounded(median(theirs)),
    });
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&result)?)?;
    Ok(())
}

/// MiB/s of one round by the rail; each span is read into again as soon as it comes back.
fn rail(receiver: &mut Receiver) -> Checked<f64> {
    let total = EACH * u64::from(SETTINGS.pairs);
    let places = u64::from(SETTINGS.pairs * SETTINGS.depth).min(SOURCE_BYTES / CHUNK_BYTES);
    let fetches = (0..places).map(|chunk| fetch(receiver, chunk)).collect::<Checked<VecDeque<Fetch>>>()?;
    let (mut left, source) = (total - places, receiver.source.clone());
    let begin = Instant::now();
    let ended = transfer(receiver, Kind::Read, &source, fetches, |receiver, (chunk, _), fetches| {
        if left > 0 {
            left -= 1;
            fetches.push_back(fetch(receiver, *chunk)?);
        }
        Ok(())
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(ended.len() as u64 == total && ended.iter().all(|(_, result)| result.is_ok()), "reads failed");
    Ok((total * CHUNK_BYTES) as f64 / (1 << 20) as f64 / seconds)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
