//! The command line: one file per subcommand. Every subcommand but `serve`, `doctor` and `plan` is a client of the daemon.
//!
//! With `--json` a subcommand prints exactly one JSON document to stdout, its result or `{"error": …}`. The exit code
//! is that of the error's class.

mod artifact;
mod attach;
mod bench;
mod completions;
mod doctor;
mod jobs;
mod ls;
mod output;
mod parse;
mod peers;
mod pin;
mod plan;
mod prefetch;
mod probe;
mod progress;
mod rm;
mod serve;
mod source;
mod stat;
mod status;
mod top;
mod unpin;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::client::Client;
use crate::config::{Config, ServeArgs};
use crate::error::{Code, Error, Result};
use crate::probe::{SUBCOMMAND, Settings};
use output::Output;

const AFTER_HELP: &str = "\
SOURCE is a path, file:///path, peer://sha256:… for what other nodes have, or the digest of an artifact that is
resident (sha256:…).
Exit code: 0 done; 1 internal; 2 usage; 3 not found; 4 denied; 5 bad data; 6 limit reached; 7 unavailable; \
8 cancelled or past its deadline.";

/// Keeps models resident in the memory of a node and hands them to processes without a copy.
#[derive(Debug, Parser)]
#[command(name = "lodestream", version, after_help = AFTER_HELP)]
struct Cli {
    /// Socket of the daemon [default: /run/lodestream/lodestream.sock]
    // A String: `serve` has a flag of the same name and type, to which this one is passed on.
    #[arg(long, global = true, value_name = "PATH", env = "LODESTREAM_SOCKET")]
    socket: Option<String>,

    /// Print one JSON document instead of text
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    Serve(Box<ServeArgs>),
    /// Make artifacts resident
    Prefetch(prefetch::Args),
    /// Attach to an artifact, loading it first if needed, and print its tensors
    Attach(attach::Args),
    /// List what is resident or loading
    Ls,
    /// Describe one resident artifact
    Stat(artifact::Args),
    /// Evict artifacts
    Rm(artifact::Args),
    /// Pin artifacts: they are not evicted until unpinned
    Pin(artifact::Args),
    /// Unpin artifacts
    Unpin(artifact::Args),
    /// List jobs, or show, wait for or cancel one
    Jobs(jobs::Args),
    /// Show how the daemon is doing
    Status,
    /// Show which nodes artifacts come from and go to
    Peers,
    /// Watch what the daemon does, live
    Top(top::Args),
    /// Measure loads, attaches, the drive and memory
    Bench(bench::Args),
    /// Say what limits this node and what to change; needs no daemon
    Doctor(doctor::Args),
    /// Simulate what the daemon's planners would do; needs no daemon
    Plan(plan::Args),
    /// Print a completion script for a shell
    Completions(completions::Args),
    /// Measure the way from the file on stdin to a GPU
    #[command(hide = true, name = SUBCOMMAND)]
    Probe(Settings),
}

/// What every client subcommand needs.
struct Context {
    output: Output,
    socket: PathBuf,
}

impl Context {
    fn connect(&self) -> Result<Client> {
        Client::connect(&self.socket)
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    run(std::env::args_os().collect())
}

fn run(arguments: Vec<OsString>) -> ExitCode {
    let json = arguments.iter().any(|argument| argument == "--json");
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        // Help and version are no errors.
        Err(error) if !error.use_stderr() || !json => {
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
        Err(error) => {
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
            let error = Error::new(Code::CliUsage, text);
            return Output::new(true).failed(&error);
        }
    };
    let output = Output::new(cli.json);
    let socket = cli.socket.map_or_else(|| Config::default().socket, PathBuf::from);
    let context = Context { output, socket };
    match dispatch(&context, cli.command) {
        Ok(code) => code,
        Err(error) => output.failed(&error),
    }
}

fn dispatch(context: &Context, command: Command) -> Result<ExitCode> {
    let done = match command {
        Command::Serve(args) => serve::run(&args, context.output),
        Command::Prefetch(args) => prefetch::run(context, &args),
        Command::Attach(args) => attach::run(context, &args),
        Command::Ls => ls::run(context),
        Command::Stat(args) => stat::run(context, &args),
        Command::Rm(args) => rm::run(context, &args),
        Command::Pin(args) => pin::run(context, &args),
        Command::Unpin(args) => unpin::run(context, &args),
        Command::Jobs(args) => jobs::run(context, &args),
        Command::Status => status::run(context),
        Command::Peers => peers::run(context),
        Command::Top(args) => top::run(context, &args),
        Command::Bench(args) => bench::run(context, &args),
        // What it finds decides its exit code.
        Command::Doctor(args) => return doctor::run(context.output, &args),
        Command::Plan(args) => plan::run(context.output, &args),
        Command::Probe(settings) => probe::run(context.output, &settings),
        Command::Completions(args) => completions::run(&mut Cli::command(), &args, context.output),
    };
    done.map(|()| ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests;
