//! `lodestream plan`: what would be done, by the same planners as in the daemon, without doing it. Needs no daemon.

mod spread;

use super::output::Output;
use crate::error::Result;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Simulate one artifact going to many nodes, each asking others for chunks
    Spread(Box<spread::Args>),
}

pub(super) fn run(output: Output, args: &Args) -> Result<()> {
    match &args.what {
        What::Spread(args) => spread::run(output, args),
    }
}
