//! `lodestream unpin`: artifacts may be evicted again.

use super::{Context, artifact};
use crate::client::Client;
use crate::error::Result;

pub(super) fn run(context: &Context, args: &artifact::Args) -> Result<()> {
    artifact::each(context, args, Client::unpin, "unpinned")
}
