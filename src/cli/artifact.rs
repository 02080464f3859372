//! Arguments and loop of the subcommands that name resident artifacts: stat, rm, pin, unpin.

use std::os::fd::BorrowedFd;

use serde_json::json;

use super::Context;
use super::output::{Column, bytes, milliseconds, table};
use super::source::{self, Wanted};
use crate::api::methods::{ArtifactInfo, ArtifactRequest};
use crate::client::Client;
use crate::error::Result;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Path, URI or digest
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<String>,

    #[command(flatten)]
    wanted: Wanted,
}

/// A method of the client that takes an artifact.
pub(super) type Method = fn(&mut Client, &ArtifactRequest, &[BorrowedFd<'_>]) -> Result<ArtifactInfo>;

/// Calls `method` for each source, in order; the first error ends it. `done` says what happened to one.
pub(super) fn each(context: &Context, args: &Args, method: Method, done: &str) -> Result<()> {
    let mut client = context.connect()?;
    let mut artifacts: Vec<ArtifactInfo> = Vec::new();
    for text in &args.sources {
        let one = call(&mut client, args, text, method).map_err(|mut error| {
            if !artifacts.is_empty() && error.kept.is_empty() {
                let names: Vec<&str> = artifacts.iter().map(|artifact| artifact.source.as_str()).collect();
                error.kept = format!("{done} before: {}", names.join(", "));
            }
            error
        });
        artifacts.push(one?);
    }
    context.output.result(&json!({ "artifacts": artifacts }), || {
        artifacts.iter().map(|info| format!("{done}: {} ({})\n", info.source, bytes(info.bytes))).collect()
    })
}

pub(super) fn call(client: &mut Client, args: &Args, text: &str, method: Method) -> Result<ArtifactInfo> {
    let (device, select) = (args.wanted.device.clone(), args.wanted.select());
    let mut request = ArtifactRequest { source: None, digest: None, device, select };
    if let Some(digest) = source::digest(text) {
        request.digest = Some(digest.to_owned());
        return method(client, &request, &[]);
    }
    let opened = args.wanted.source(text)?;
    request.source = Some(opened.source.clone());
    method(client, &request, &opened.files())
}

impl Args {
    pub(super) fn sources(&self) -> &[String] {
        &self.sources
    }
}

/// The table of `ls` and `stat`.
pub(super) fn listing(artifacts: &[ArtifactInfo]) -> String {
    let columns = [
        Column::Left("SOURCE"),
        Column::Left("DEVICE"),
        Column::Left("STATE"),
        Column::Right("SIZE"),
        Column::Right("TENSORS"),
        Column::Right("LEASES"),
        Column::Left("PINNED"),
        Column::Left("PAGES"),
        Column::Right("IDLE"),
        Column::Left("DIGEST"),
    ];
    let rows = artifacts.iter().map(|info| {
        let selected = if info.select.is_some() { " (selection)" } else { "" };
        let packed = if info.packed && info.device == "host" { " (packed)" } else { "" };
        vec![
            format!("{}{selected}", info.source),
            format!("{}{packed}", info.device),
            info.state.clone(),
            bytes(info.bytes),
            info.tensors.to_string(),
            info.leases.to_string(),
            (if info.pinned { "yes" } else { "no" }).to_owned(),
            info.pages.clone(),
            milliseconds(info.idle_ms as f64),
            info.digest.as_deref().map_or("-", short).to_owned(),
        ]
    });
    table(&columns, rows.collect())
}

/// As much of a digest as tells two apart.
fn short(digest: &str) -> &str {
    digest.get(.."sha256:".len() + 12).unwrap_or(digest)
}
