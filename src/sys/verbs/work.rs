//! What a queue pair is given to do, and what becomes of it.

use std::sync::Arc;

use lodestream_verbs_abi::{Work, work};

use super::memory::{Registered, Remote};
use super::{VerbsError, invalid};
use crate::sys::mem::Span;

/// Bytes of one work request at most. From 512 KiB on a NIC reaches its line rate; what is larger only takes longer to fail.
pub const WORK_BYTES_MAX: u64 = 1 << 20;

/// Direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Remote → span.
    Read,
    /// Span → remote.
    Write,
}

/// One READ or WRITE. Owns its span.
#[derive(Debug)]
pub struct Transfer {
    kind: Kind,
    span: Span,
    /// Keeps the key valid.
    _memory: Arc<Registered>,
    lkey: u32,
    bytes: u32,
    remote: Remote,
    tag: u64,
}

impl Transfer {
    /// Between all of `span`, which lies in `memory` ([`Registered::own`]), and all of `remote`. `tag` is the owner's.
    ///
    /// # Errors
    /// EINVAL: the two are not equally long or longer than [`WORK_BYTES_MAX`], or the span is not of this memory.
    pub fn new(
        kind: Kind,
        span: Span,
        memory: &Arc<Registered>,
        remote: Remote,
        tag: u64,
    ) -> Result<Transfer, VerbsError> {
        const CALL: &str = "a transfer";
        let lkey = memory.key_for(&span).ok_or(invalid(CALL))?;
        if span.bytes() != remote.bytes() || span.bytes() > WORK_BYTES_MAX {
            return Err(invalid(CALL));
        }
        let bytes = u32::try_from(span.bytes()).map_err(|_| invalid(CALL))?;
        Ok(Transfer { kind, span, _memory: Arc::clone(memory), lkey, bytes, remote, tag })
    }

    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.into()
    }

    /// Ends it without having been posted.
    pub fn give_up(self) -> Done {
        self.end(Err(WorkError::Flushed))
    }

    pub(super) fn end(self, result: Result<(), WorkError>) -> Done {
        Done { kind: self.kind, span: self.span, tag: self.tag, result }
    }

    pub(super) fn request(&self, id: u64, signalled: bool) -> Work {
        let (remote_address, rkey) = self.remote.place();
        Work {
            id,
            local_address: self.span.address().as_ptr() as u64,
            remote_address,
            bytes: self.bytes,
            lkey: self.lkey,
            rkey,
            kind: match self.kind {
                Kind::Read => work::READ,
                Kind::Write => work::WRITE,
            },
            signalled: signalled.into(),
        }
    }
}

/// A transfer that has ended.
#[derive(Debug)]
pub struct Done {
    /// Direction.
    pub kind: Kind,
    /// Its span, given back.
    pub span: Span,
    /// The owner's.
    pub tag: u64,
    /// Whether all bytes have arrived.
    pub result: Result<(), WorkError>,
}

/// Why a work request has failed; the queue pair is in the error state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// Another one has failed before, or the queue pair was given up. No fault by itself.
    #[error("given up with its queue pair")]
    Flushed,
    /// The remote side has no such memory, or not for this: its key is wrong, void or of another protection domain.
    #[error("the peer's device refuses the access")]
    RemoteAccess,
    /// The remote side does not answer: it, its link or its device is down.
    #[error("the peer's device does not answer")]
    Unanswered,
    /// The local memory is not registered as it needs to be.
    #[error("the device may not access the local memory")]
    LocalAccess,
    /// A window could not be bound.
    #[error("the device refuses the memory window")]
    WindowBind,
    /// This side's device cannot send: soft-RoCE says so when its link has gone.
    #[error("the device cannot send")]
    Unsendable,
    /// Another `ibv_wc_status`.
    #[error("the device answers {0}")]
    Other(u32),
}

impl WorkError {
    /// Numbers of `ibv_wc_status`.
    pub(super) fn of(status: u32) -> Result<(), WorkError> {
        Err(match status {
            0 => return Ok(()),
            2 => WorkError::Unsendable,
            4 | 8 => WorkError::LocalAccess,
            5 => WorkError::Flushed,
            6 => WorkError::WindowBind,
            10 => WorkError::RemoteAccess,
            12 | 21 => WorkError::Unanswered,
            other => WorkError::Other(other),
        })
    }
}
