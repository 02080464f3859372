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
