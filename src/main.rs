//! `lodestream`: the daemon and its command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    lodestream::cli::main()
}
