//! `lodestream serve`: the daemon.

use serde_json::json;

use super::output::Output;
use crate::config::{Config, ServeArgs};
use crate::daemon;
use crate::error::Result;
use crate::telemetry::logging;

pub(super) fn run(args: &ServeArgs, output: Output) -> Result<()> {
    let config = Config::load(args)?;
    if args.check_config {
        let text = config.to_toml()?;
        return output.result(&json!(config), || text);
    }
    let log = logging::init(&config.log)?;
    daemon::run(args, config, &log)
}
