//! `lodestream plan spread`: the simulator by way of the command line, without a daemon.
#![allow(clippy::unwrap_used, reason = "a test that cannot set up has failed")]

use std::process::{Command, Output};

use serde_json::Value;

fn plan(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lodestream"));
    command.args(["plan", "spread"]).args(arguments).output().unwrap()
}

#[track_caller]
fn document(arguments: &[&str]) -> Value {
    let output = plan(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_spread_is_simulated_and_said_to_be() {
    let arguments = [
        "--nodes",
        "60",
        "--chunks",
        "64",
        "--chunk-bytes",
        "1MiB",
        "--link-rate",
        "1GiB",
        "--latency",
        "10us",
        "--racks",
        "4",
        "--oversubscription",
        "2",
        "--fail",
        "5%",
        "--slow",
        "5%:0.5",
        "--seed",
        "7",
    ];
    let first = document(&arguments);
    assert_eq!(first["simulated"], true);
    assert_eq!(first["scenario"]["seed"], 7);
    let outcome = &first["outcome"];
    assert_eq!(
        (&outcome["complete"], &outcome["died"], &outcome["incomplete"]),
        (&57.into(), &3.into(), &0.into())
    );
    assert_eq!(outcome["storage_reads"], 1.0);
    assert_eq!(outcome["racks"].as_array().unwrap().len(), 4);
    // 64 chunks over a link that carries 1024 in a second.
    let one_ns = outcome["one_ns"].as_u64().unwrap();
    assert!((62_500_000..64_000_000).contains(&one_ns), "{one_ns}");
    assert_eq!(first, document(&arguments), "the same seed, the same outcome");
    let other = document(&[&arguments[..arguments.len() - 1], &["8"]].concat());
    assert_ne!(first["outcome"], other["outcome"], "other lots");
    let text = String::from_utf8(plan(&arguments).stdout).unwrap();
    assert!(text.starts_with("Simulated: 64.00 MiB to 60 nodes in 64 chunks, seed 7\n"), "{text}");
    assert!(text.contains("the last node") && text.contains("the busiest uplink of a rack"), "{text}");
}

#[test]
fn numbers_out_of_bounds_are_usage_errors() {
    for arguments in [
        &["--nodes", "0"][..],
        &["--chunks", "0"],
        &["--nodes", "500000", "--chunks", "1000"],
        &["--nodes", "3", "--racks", "4"],
        &["--fail", "101%"],
        &["--fail", "NaN%"],
        &["--slow", "1%"],
        &["--slow", "1%:0"],
        &["--latency", "1h"],
        &["--latency", "us"],
        &["--link-rate", "1"],
        &["--oversubscription", "0.5"],
    ] {
        let output = plan(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
}
