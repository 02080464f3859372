//! `lodestream ls`: what is resident or loading.

use serde_json::json;

use super::{Context, artifact};
use crate::error::Result;

pub(super) fn run(context: &Context) -> Result<()> {
    let artifacts = context.connect()?.list()?;
    context.output.result(&json!({ "artifacts": artifacts }), || artifact::listing(&artifacts))
}
