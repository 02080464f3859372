//! `lodestream stat`: one or several resident artifacts.

use serde_json::json;

use super::{Context, artifact};
use crate::client::Client;
use crate::error::Result;

pub(super) fn run(context: &Context, args: &artifact::Args) -> Result<()> {
    let mut client = context.connect()?;
    let artifacts = args.sources().iter().map(|text| artifact::call(&mut client, args, text, Client::stat));
    let artifacts = artifacts.collect::<Result<Vec<_>>>()?;
    context.output.result(&json!({ "artifacts": artifacts }), || artifact::listing(&artifacts))
}
