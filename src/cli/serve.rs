//! `lodestream serve`: the daemon.

use serde_json::json;

use super::output::Output;
use crate::config::{Config, ServeArgs};
use crate::error::{Code, Error, Result};

pub(super) fn run(args: &ServeArgs, output: Output) -> Result<()> {
    let config = Config::load(args)?;
    if args.check_config {
        let text = config.to_toml()?;
        return output.result(&json!(config), || text);
    }
    Err(Error::new(Code::DaemonStart, "this build has no daemon"))
}
