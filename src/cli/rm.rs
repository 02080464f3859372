//! `lodestream rm`: evicts artifacts that nobody holds.

use super::{Context, artifact};
use crate::client::Client;
use crate::error::Result;

pub(super) fn run(context: &Context, args: &artifact::Args) -> Result<()> {
    artifact::each(context, args, Client::evict, "evicted")
}
