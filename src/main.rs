//! `lodestream`: the daemon and its command line.
use clap::Parser;
#[derive(Parser)]
enum Cli { Serve(lodestream::config::ServeArgs) }
fn main() {
    let Cli::Serve(args) = Cli::parse();
    let config = lodestream::config::Config::load(&args).unwrap();
    let log = lodestream::telemetry::logging::init(&config.log).unwrap();
    lodestream::daemon::run(&args, config, &log).unwrap();
}
