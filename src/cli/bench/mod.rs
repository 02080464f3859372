//! `lodestream bench`: measures loads and attaches of a running daemon, and this machine's drive and memory.
//!
//! Absolute rates hold for their run only; what can be compared with another day is a ratio to the reference of the same
//! round. `benches/load` measures more kinds of memory, each with a daemon of its own.

mod attach;
mod daemon;
mod drive;
mod fio;
mod html;
mod load;
mod memory;
mod plot;
mod report;

use std::path::PathBuf;

use super::Context;
use crate::config::size;
use crate::error::{Code, Error, Result};
use report::Report;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,

    /// Write a report with plots to this file, too
    #[arg(long, global = true, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Cold loads by the daemon against fio on the same files; what is measured is evicted each time
    Load(load::Args),
    /// Attaching what is resident, and what is not
    Attach(attach::Args),
    /// Reads of the drive below a file, by size of a block and depth; needs no daemon
    Drive(drive::Args),
    /// Copies, checksums and making pages ready; needs no daemon
    Memory(memory::Args),
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let mut report = match &args.what {
        What::Load(args) => load::run(context, args),
        What::Attach(args) => attach::run(context, args),
        What::Drive(args) => drive::run(args),
        What::Memory(args) => memory::run(args),
    }?;
    if cfg!(debug_assertions) {
        report.notes.insert(
            0,
            "This program was built without optimisation: its CPU figures say nothing.".to_owned(),
        );
    }
    if let Some(path) = &args.html {
        std::fs::write(path, html::document(&report)).map_err(|error| {
            Error::new(Code::Internal, format!("{} cannot be written: {error}", path.display()))
        })?;
    }
    context.output.result(&report, || Report::text(&report))
}

/// `256KiB`, `4MiB`: a positive size.
fn bytes(text: &str) -> Result<u64, String> {
    size::parse(text).filter(|bytes| *bytes > 0).ok_or_else(|| size::ALLOWED.to_owned())
}
