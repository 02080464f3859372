//! What the simulator shows of the planner: times are simulated, so they are the same on every machine.

use proptest::prelude::*;

use super::*;

fn run(scenario: &Scenario) -> Outcome {
    scenario.run().unwrap()
}

#[track_caller]
fn everyone_has_it(scenario: &Scenario) -> Outcome {
    let outcome = run(scenario);
    assert_eq!(outcome.incomplete, 0, "{scenario:?}: {outcome:?}");
    outcome
}

/// The bound of what is possible: k + ⌈log2(n + 1)⌉ - 1 times of a chunk.
fn shortest(nodes: u32, chunks: u32) -> f64 {
    f64::from(chunks + (nodes + 1).next_power_of_two().ilog2() - 1)
}

#[test]
fn without_latency_it_takes_the_shortest_time_there_is() {
    for (nodes, chunks) in
        [(1, 1), (2, 1), (3, 1), (4, 64), (5, 64), (9, 64), (100, 64), (1000, 64), (1000, 1)]
    {
        let scenario = Scenario { nodes, chunks, ..Scenario::default() };
        let outcome = everyone_has_it(&scenario);
        let rounds = outcome.ratio * f64::from(chunks);
        assert!((rounds - shortest(nodes, chunks)).abs() < 0.01, "{nodes} nodes, {chunks} chunks: {rounds}");
        assert_eq!((outcome.storage_reads, outcome.wasted, outcome.asked_again), (1.0, 0, 0));
        assert_eq!(outcome.sent, u64::from(nodes) * u64::from(chunks), "nothing is sent twice");
    }
}

/// The bound that is asked for: 1.15 × the time of one at 1000 nodes.
#[test]
fn a_thousand_nodes_take_little_longer_than_one() {
    let chunk_ns = 335_545;
    for (chunks, latency_ns) in [(64, chunk_ns / 100), (256, chunk_ns / 20)] {
        let outcome = everyone_has_it(&Scenario { chunks, latency_ns, ..Scenario::default() });
        assert!(outcome.ratio <= 1.15, "{chunks} chunks: {outcome:?}");
        assert_eq!(outcome.storage_reads, 1.0);
    }
}

/// With 256 chunks, deaths of 1 % cost at most 20 % until the last of the others has everything.
#[test]
fn deaths_cost_little() {
    let whole = Scenario { chunks: 256, notice_ns: 335_545, ..Scenario::default() };
    let without = everyone_has_it(&whole).last_ns as f64;
    for seed in [1, 2] {
        let outcome = everyone_has_it(&Scenario { fail: 0.01, seed, ..whole.clone() });
        assert_eq!((outcome.died, outcome.storage_reads), (10, 1.0));
        assert!(outcome.last_ns as f64 <= without * 1.2, "seed {seed}: {outcome:?}");
    }
}

#[test]
fn the_uplinks_of_racks_are_counted_and_limit() {
    let racks = Scenario { nodes: 99, racks: 4, oversubscription: 1.0, ..Scenario::default() };
    let wide = everyone_has_it(&racks);
    let narrow = everyone_has_it(&Scenario { oversubscription: 8.0, ..racks.clone() });
    assert!(narrow.last_ns > wide.last_ns);
    for outcome in [&wide, &narrow] {
        let (sent, received): (f64, f64) = outcome
            .racks
            .iter()
            .map(|rack| (rack.sent, rack.received))
            .fold((0.0, 0.0), |sum, rack| (sum.0 + rack.0, sum.1 + rack.1));
        assert!((sent - received).abs() < 1e-9 && outcome.racks.iter().all(|rack| rack.used <= 1.0 + 1e-9));
        // Of 99 artifacts that are received, three quarters would cross if racks were not looked at.
        assert!(sent < 60.0, "{sent}");
    }
}

#[test]
fn bounds_are_checked() {
    let sound = Scenario { nodes: 4, ..Scenario::default() };
    assert!(sound.run().is_some());
    for scenario in [
        Scenario { nodes: 0, ..sound.clone() },
        Scenario { sources: 0, ..sound.clone() },
        Scenario { chunks: 0, ..sound.clone() },
        Scenario { chunk_bytes: 0, ..sound.clone() },
        Scenario { link_rate: 0, ..sound.clone() },
        Scenario { racks: 5, ..sound.clone() },
        Scenario { fail: f64::NAN, ..sound.clone() },
        Scenario { slow_rate: 0.0, ..sound.clone() },
        Scenario { latency_ns: u64::MAX, ..sound.clone() },
    ] {
        assert!(scenario.run().is_none(), "{scenario:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever dies, is slow, late or noticed late: as long as a source lives, all that live get everything; and storage is
    /// read at most once for each source.
    #[test]
    fn all_that_live_get_everything(
        (nodes, sources, chunks, seed) in (1u32..60, 1u32..4, 1u32..50, any::<u64>()),
        (fail, slow, late, corrupt) in (0.0..0.8, 0.0..0.3, 0.0..0.5, prop::sample::select(vec![0.0, 0.0, 0.01])),
        (latency_ns, notice_ns) in (0u64..700_000, 0u64..20_000_000),
        (uploads_max, asks_max) in (1u32..9, 1u32..20),
    ) {
        // One that bars every source because of wrong bytes may be left without.
        let corrupt = if nodes >= 20 && fail < 0.1 { corrupt } else { 0.0 };
        let scenario = Scenario {
            nodes, sources, chunks, seed, fail, slow, late, corrupt, latency_ns, notice_ns, uploads_max, asks_max,
            slow_rate: 0.2,
            ..Scenario::default()
        };
        let outcome = run(&scenario);
        prop_assert_eq!(outcome.incomplete, 0, "{:?}: {:?}", scenario, outcome);
        prop_assert!(outcome.storage_reads <= f64::from(sources));
        prop_assert_eq!(&outcome, &run(&scenario), "the same scenario has the same outcome");
    }
}
