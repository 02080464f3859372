//! `lodestream completions`: a completion script on stdout.

use clap_complete::Shell;

use super::output::Output;
use crate::error::Result;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Shell
    shell: Shell,
}

pub(super) fn run(command: &mut clap::Command, args: &Args, output: Output) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "lodestream", &mut script);
    output.text(&script)
}
