//! `lodestream attach`: maps an artifact, prints its tensors, and can hold the lease.

use std::io::Read;

use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Context;
use super::output::{Column, bytes, milliseconds, table};
use super::progress::Progress;
use super::source::{self, Wanted};
use crate::api::methods::AttachRequest;
use crate::client::{Attached, Client};
use crate::error::{Code, Error, Result};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Path, URI or digest
    source: String,

    #[command(flatten)]
    wanted: Wanted,

    /// Fail if it is not resident, instead of loading it
    #[arg(long)]
    no_wait: bool,

    /// Before it is handed out, compare what is in memory with the checksums of when it arrived
    #[arg(long)]
    verify: bool,

    /// Keep the lease until SIGINT, SIGTERM or the end of stdin
    #[arg(long)]
    hold: bool,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let mut client = context.connect()?;
    let attached = attach(context, args, &mut client)?;
    // Before anything is printed: who reads it may send the signal at once.
    let hold = args.hold.then(Hold::new).transpose();
    let hold =
        hold.map_err(|error| Error::new(Code::Internal, format!("cannot wait for signals: {error}")))?;
    context.output.result(&document(&attached)?, || text(&attached))?;
    if let Some(hold) = hold {
        hold.wait();
    }
    Ok(())
}

fn attach(context: &Context, args: &Args, client: &mut Client) -> Result<Attached> {
    let progress = Progress::new(context.output);
    let mut request = AttachRequest {
        source: None,
        digest: None,
        device: args.wanted.device.clone(),
        select: args.wanted.select(),
        wait: !args.no_wait,
        verify: args.verify,
        notify: progress.wanted(),
    };
    if let Some(digest) = source::digest(&args.source) {
        request.digest = Some(digest.to_owned());
        return client.attach(&request, &[], &mut |job| progress.update(job));
    }
    let opened = args.wanted.source(&args.source)?;
    request.source = Some(opened.source.clone());
    client.attach(&request, &opened.files(), &mut |job| progress.update(job))
}

/// The reply without its descriptors, and the client's own times among the others.
fn document(attached: &Attached) -> Result<Value> {
    let mut document = serde_json::to_value(attached.reply())
        .map_err(|error| Error::new(Code::Internal, error.to_string()))?;
    for region in document["regions"].as_array_mut().into_iter().flatten() {
        if let Some(region) = region.as_object_mut() {
            region.remove("parts");
        }
    }
    let timings = attached.timings();
    document["timings_ms"]["request"] = json!(timings.request.as_secs_f64() * 1e3);
    document["timings_ms"]["map"] = json!(timings.map.as_secs_f64() * 1e3);
    Ok(document)
}

fn text(attached: &Attached) -> String {
    let columns = [
        Column::Left("TENSOR"),
        Column::Left("DTYPE"),
        Column::Left("SHAPE"),
        Column::Right("SIZE"),
        Column::Right("REGION"),
        Column::Right("OFFSET"),
    ];
    let reply = attached.reply();
    let rows = reply.tensors.iter().map(|tensor| {
        let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
        vec![
            tensor.name.clone(),
            tensor.dtype.clone(),
            format!("[{}]", shape.join(", ")),
            bytes(tensor.nbytes),
            tensor.region.to_string(),
            tensor.offset.to_string(),
        ]
    });
    let total = reply.regions.iter().map(|region| region.bytes).sum();
    let timings = attached.timings();
    let daemon = reply.timings_ms.iter().map(|(phase, time)| format!("{phase} {}", milliseconds(*time)));
    format!(
        "{}{} tensors, {} files, {} mapped, {}\nattached in {} (daemon: {}), mapped in {}\n",
        table(&columns, rows.collect()),
        reply.tensors.len(),
        reply.files.len(),
        bytes(total),
        reply.digest.as_deref().unwrap_or("no digest"),
        milliseconds(timings.request.as_secs_f64() * 1e3),
        daemon.collect::<Vec<_>>().join(", "),
        milliseconds(timings.map.as_secs_f64() * 1e3),
    )
}

/// Waits for SIGINT, SIGTERM or the end of stdin.
struct Hold {
    runtime: Runtime,
    interrupt: Signal,
    terminate: Signal,
}

impl Hold {
    /// From now on the signals end the wait and not the process.
    fn new() -> std::io::Result<Hold> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        drop(entered);
        Ok(Hold { runtime, interrupt, terminate })
    }

    fn wait(mut self) {
        let (sender, ended) = tokio::sync::oneshot::channel();
        // A thread, because a terminal can only be read blocking; it ends with the process.
        std::thread::spawn(move || {
            let mut bytes = [0; 256];
            while std::io::stdin().read(&mut bytes).is_ok_and(|count| count > 0) {}
            let _ = sender.send(());
        });
        self.runtime.block_on(async {
            tokio::select! {
                _ = self.interrupt.recv() => {}
                _ = self.terminate.recv() => {}
                _ = ended => {}
            }
        });
    }
}
