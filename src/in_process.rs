//! Loads without a daemon: its parts run in this process for as long as they are needed, read with this process's own
//! rights, and leave the memory to whoever attached it.
//!
//! For when no daemon runs. Nothing is shared with other processes, and nothing stays resident: what is attached is
//! read anew each time.

use std::io;
use std::os::fd::BorrowedFd;

use crate::api::methods::{ArtifactRequest, AttachRequest};
use crate::client::{Attached, Client, Progress};
use crate::daemon;
use crate::error::{Code, Error, Result};

/// The parts of a daemon in this process. Dropping it ends what they do; what was attached stays readable.
#[derive(Debug)]
pub struct Engine {
    engine: daemon::Engine,
}

impl Engine {
    /// Starts the parts for loads to `device`: `host`, or `gpu:` and a UUID, then that GPU and no other is touched.
    ///
    /// # Errors
    /// `daemon.start`.
    pub fn start(device: &str) -> Result<Engine> {
        Ok(Engine { engine: daemon::Engine::start(device.strip_prefix("gpu:"))? })
    }

    /// A client of the engine. It can do what a client of a daemon can.
    ///
    /// # Errors
    /// `client.connect`.
    pub fn connect(&self) -> Result<Client> {
        let failed = |error: io::Error| {
            Error::new(Code::ClientConnect, format!("the engine in this process cannot be reached: {error}"))
        };
        Ok(Client::over(self.engine.connect().map_err(failed)?))
    }
}

/// Attaches through a client of an engine, and leaves the memory to the mapping alone: it is free once `Attached` is
/// dropped. The lease has ended when this returns.
///
/// # Errors
/// Those of [`Client::attach`].
pub fn attach(
    client: &mut Client,
    request: &AttachRequest,
    files: &[BorrowedFd<'_>],
    progress: Progress<'_>,
) -> Result<Attached> {
    let attached = client.attach(request, files, progress)?;
    client.release(attached.lease())?;
    let resident = ArtifactRequest {
        source: request.source.clone(),
        digest: request.digest.clone(),
        device: request.device.clone(),
        select: request.select.clone(),
    };
    match client.evict(&resident, files) {
        // Somebody else attaches it at this moment, and evicts it after that; or has done so before.
        Err(error) if !matches!(error.code, Code::ArtifactLeased | Code::ArtifactNotResident) => Err(error),
        _ => Ok(attached),
    }
}

/// Loads what `request` names with an engine of its own, which has ended when this returns.
///
/// # Errors
/// `daemon.start`, and those of [`Client::attach`].
pub fn load(request: &AttachRequest, files: &[BorrowedFd<'_>], progress: Progress<'_>) -> Result<Attached> {
    let engine = Engine::start(&request.device)?;
    attach(&mut engine.connect()?, request, files, progress)
}
