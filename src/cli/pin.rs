//! `lodestream pin`: artifacts are not evicted until they are unpinned.

use super::{Context, artifact};
use crate::client::Client;
use crate::error::Result;

pub(super) fn run(context: &Context, args: &artifact::Args) -> Result<()> {
    artifact::each(context, args, Client::pin, "pinned")
}
