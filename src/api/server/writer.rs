//! What goes out on one connection, in order.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::connection::Connection;
use crate::api::methods::{AttachReply, FileView, JobInfo, PartView, RegionView, TensorView};
use crate::api::{scm, wire};
use crate::error::Result;
use crate::sys::mem::Sealed;
use crate::tier::residency::{Content, Region};
use crate::transfer;

/// Replies that name more tensors are written off the control thread, which others wait for.
const TENSORS_AT_ONCE_MAX: usize = 4096;
/// A message may take the timeout once for each of these that it has begun.
const PACE_BYTES: usize = 1 << 20;

/// One message to the client. It is turned into bytes only when its turn comes, so that a client that does not read
/// costs little memory.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// A reply that is written already.
    Line(Vec<u8>),
    /// The reply to an attach.
    Attached(wire::Id, Box<Attached>),
    /// A notification.
    Progress(Box<JobInfo>),
    /// Nothing follows: the connection ends once everything before is written.
    Close,
}

/// What the reply to an attach is made of.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) lease: u64,
    pub(super) content: Arc<Content>,
    /// Where it is, as clients call it.
    pub(super) device: String,
    /// The descriptor of memory on a GPU.
    pub(super) exported: Option<OwnedFd>,
    pub(super) timings_ms: BTreeMap<String, f64>,
}

impl Attached {
    /// The reply as bytes. A large one is written off the control thread; the content stays here, so that its memory
    /// is free at once when the connection ends meanwhile.
    async fn line(&self, id: &wire::Id, bytes_max: usize) -> Result<Vec<u8>> {
        let reply = self.reply();
        if reply.tensors.len() <= TENSORS_AT_ONCE_MAX {
            return Ok(wire::reply(id, &reply, bytes_max)?);
        }
        let id = id.clone();
        transfer::blocking(move || Ok(wire::reply(&id, &reply, bytes_max)?)).await
    }

    /// The descriptors that travel with the reply, in the order in which it names them.
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match &self.content.region {
            Region::Host(parts) => parts.iter().map(AsFd::as_fd).collect(),
            Region::Gpu(_) => self.exported.iter().map(AsFd::as_fd).collect(),
        }
    }

    fn reply(&self) -> AttachReply {
        let Content { description, files, tensors, region, .. } = &*self.content;
        let parts: Vec<u64> = match region {
            Region::Host(parts) => parts.iter().map(Sealed::bytes).collect(),
            Region::Gpu(memory) => vec![memory.bytes()],
        };
        let region = RegionView {
            device: self.device.clone(),
            bytes: self.content.bytes(),
            pages: self.content.pages().to_owned(),
            parts: (0..).zip(parts).map(|(fd, bytes)| PartView { fd, bytes }).collect(),
        };
        let tensors = tensors.iter().map(|placed| {
            let tensor = &description.tensors[placed.tensor];
            TensorView {
                name: tensor.name.clone(),
                dtype: tensor.dtype.as_str().to_owned(),
                shape: placed.shape.clone(),
                region: 0,
                offset: placed.offset,
                nbytes: placed.nbytes,
            }
        });
        let whole = description.files.iter().zip(files);
        let files = whole.filter_map(|(file, place)| {
            let offset = (*place)?;
            Some(FileView { name: file.name.clone(), region: 0, offset, nbytes: file.bytes })
        });
        AttachReply {
            lease: self.lease,
            digest: self.content.digest().map(str::to_owned),
            format: description.format.as_str().to_owned(),
            regions: vec![region],
            tensors: tensors.collect(),
            files: files.collect(),
            metadata: description.metadata.clone(),
            timings_ms: self.timings_ms.clone(),
        }
    }
}

/// Writes what comes, until it is told to close, the client does not take it in time, or it is gone.
pub(super) async fn write(
    connection: &Connection,
    socket: &UnixStream,
    mut queue: mpsc::Receiver<Outgoing>,
) -> io::Result<()> {
    let bytes_max = connection.limits.reply_bytes_max as usize;
    let timeout = Duration::from_millis(connection.limits.write_timeout_ms);
    while let Some(message) = queue.recv().await {
        match message {
            Outgoing::Line(line) => send(socket, &line, Vec::new(), timeout).await?,
            Outgoing::Close => break,
            Outgoing::Progress(job) => {
                if let Ok(line) = wire::progress(&job, bytes_max) {
                    send(socket, &line, Vec::new(), timeout).await?;
                }
            }
            Outgoing::Attached(id, attached) => match attached.line(&id, bytes_max).await {
                Ok(line) => send(socket, &line, attached.fds(), timeout).await?,
                Err(error) => {
                    // The client never learns of this lease.
                    let lease = attached.lease;
                    drop(attached);
                    connection.end_lease(lease);
                    connection.node.metrics.error(error.code);
                    send(socket, &wire::error_reply(&id, &error, ""), Vec::new(), timeout).await?
                }
            },
        }
    }
    Ok(())
}

/// Sends all of `line`; the descriptors go with its first byte. The timeout is for each step forward,
/// and for each [`PACE_BYTES`] of the whole, so that a client which takes a byte now and then holds no memory for ever.
async fn send(
    socket: &UnixStream,
    line: &[u8],
    mut fds: Vec<BorrowedFd<'_>>,
    timeout: Duration,
) -> io::Result<()> {
    let paces = u32::try_from(line.len() / PACE_BYTES + 1).unwrap_or(u32::MAX);
    let deadline = Instant::now() + timeout.saturating_mul(paces);
    let mut sent = 0;
    while sent < line.len() {
        let step = socket.async_io(Interest::WRITABLE, || scm::send(socket, &line[sent..], &fds));
        match tokio::time::timeout_at(deadline.min(Instant::now() + timeout).into(), step).await {
            Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => sent += bytes?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
        fds.clear();
    }
    Ok(())
}
