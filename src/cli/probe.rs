//! `lodestream probe-direct`: the helper that measures the way from a drive to a GPU, for the daemon and for `doctor`.

use std::io;
use std::os::fd::AsFd;

use super::output::Output;
use crate::error::{Code, Error, Result};
use crate::probe::{self, Settings};

pub(super) fn run(output: Output, settings: &Settings) -> Result<()> {
    let file = io::stdin().as_fd().try_clone_to_owned();
    let file = file.map_err(|error| Error::new(Code::SourceFileIo, format!("no file on stdin: {error}")))?;
    probe::measure(settings, file, |report| {
        // Whoever asked has gone if this cannot be written.
        let _ = serde_json::to_string(report).map(|line| output.text(format!("{line}\n").as_bytes()));
    });
    Ok(())
}
