//! Protection domains, registered memory and the windows into it.
//!
//! What a peer may do is decided here, by the kind of registration: nothing, read, or write. A registration is the right to access
//! that its key stands for; dropping it makes the key void.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use lodestream_verbs_abi::{
    Domain as RawDomain, Memory as RawMemory, Registration, Window as RawWindow, access,
};
use serde::{Deserialize, Serialize};

use super::device::Context;
use super::{VerbsError, check, invalid};
use crate::sys::map::ReadMap;
use crate::sys::mem::{Memory, Retired, Span};

/// Memory and queue pairs of one tenant or trust class: keys of another domain's memory are refused by the device.
#[derive(Debug)]
pub struct ProtectionDomain {
    context: Arc<Context>,
    raw: NonNull<RawDomain>,
}

// SAFETY: libibverbs lets any thread use a protection domain.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above, several at a time.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// A new one.
    pub fn new(context: &Arc<Context>) -> Result<Arc<ProtectionDomain>, VerbsError> {
        const CALL: &str = "making a protection domain";
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is open; the place for the result lives through the call.
        check(CALL, unsafe { (context.library().create_domain)(context.raw(), &mut raw) })?;
        let raw = NonNull::new(raw).ok_or(invalid(CALL))?;
        Ok(Arc::new(ProtectionDomain { context: Arc::clone(context), raw }))
    }

    /// The device that it is of.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> *mut RawDomain {
        self.raw.as_ptr()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: made by `new`; all that was made in it holds an `Arc` of this and is gone.
        let _ = unsafe { (self.context.library().destroy_domain)(self.raw()) };
    }
}

/// Where a peer finds bytes, and the key to them.
///
/// The key is a secret: it travels inside an authenticated session only, and `Debug` does not show it.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    address: u64,
    rkey: u32,
    bytes: u64,
}

impl Remote {
    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// `bytes` from `offset` on. `None` if that is not inside.
    pub fn part(&self, offset: u64, bytes: u64) -> Option<Remote> {
        offset.checked_add(bytes).filter(|end| *end <= self.bytes)?;
        Some(Remote { address: self.address.checked_add(offset)?, rkey: self.rkey, bytes })
    }

    pub(super) fn place(&self) -> (u64, u32) {
        (self.address, self.rkey)
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// What a registration keeps: the bytes stay where they are as long as a device may reach them.
#[derive(Debug)]
pub enum Backing {
    /// Memory that is being filled, or was.
    Memory(Arc<Memory>),
    /// Sealed memory, by the mapping that it was filled through.
    Retired(Arc<Retired>),
    /// Sealed memory, mapped read-only. Kernels before 6.3 refuse it with EFAULT: they ask for a mapping that can be written to.
    Map(Arc<ReadMap>),
    /// Memory of a device, by its dma-buf; so many bytes from its beginning on.
    DmaBuf(OwnedFd, u64),
}

/// What a registration is for.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    /// This side READs into it, and WRITEs from it: no peer has any right to it.
    Own,
    /// Peers read it by its key.
    Source,
    /// Peers read what windows into it show; its own key is good for nothing.
    Windowed,
    /// Peers write to it.
    Target,
}

impl Purpose {
    /// Relaxed ordering for all: what arrives is looked at only when a completion says that it is there.
    fn access(self) -> u32 {
        access::RELAXED_ORDERING
            | match self {
                Purpose::Own => access::LOCAL_WRITE,
                Purpose::Source => access::REMOTE_READ,
                Purpose::Windowed => access::WINDOW,
                Purpose::Target => access::LOCAL_WRITE | access::REMOTE_WRITE,
            }
    }
}

/// Memory that a device may reach.
#[derive(Debug)]
pub struct Registered {
    handle: Handle,
    purpose: Purpose,
    address: u64,
    bytes: u64,
    /// Behind `handle`: what it registers is there until it is gone.
    backing: Backing,
}

/// The device's side of it.
struct Handle {
    domain: Arc<ProtectionDomain>,
    raw: Registration,
    registered: bool,
    /// What peers write to: it keeps everybody else of this process away until the device has let go of it.
    target: Option<Span>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

// SAFETY: libibverbs lets any thread use registered memory.
unsafe impl Send for Handle {}
// SAFETY: as above, several at a time.
unsafe impl Sync for Handle {}

impl Handle {
    /// Makes the keys void. → the target's span, unless the device does not let go of it: then it is lost, and counted.
    fn release(&mut self) -> Option<Span> {
        if !std::mem::take(&mut self.registered) {
            return None;
        }
        let library = self.domain.context.library();
        // SAFETY: registered once, and taken back once: windows into it and operations on it hold the `Registered`.
        let answer = unsafe { (library.deregister)(self.raw.memory) };
        let span = self.target.take()?;
        if answer != 0 {
            library.count_leak(span.bytes());
            std::mem::forget(span);
            return None;
        }
        Some(span)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.release();
    }
}

impl Registered {
    /// All of `memory`, for READs into its spans and WRITEs from them. No peer can reach it by itself.
    pub fn own(domain: &Arc<ProtectionDomain>, memory: &Arc<Memory>) -> Result<Arc<Registered>, VerbsError> {
        Registered::new(domain, Purpose::Own, Backing::Memory(Arc::clone(memory)), None).map(Arc::new)
    }

    /// What peers in connection with a queue pair of `domain` may read, whole and until it is dropped.
    ///
    /// # Errors
    /// [`VerbsError::is_unsupported`] for a dma-buf where device or kernel cannot register one.
    pub fn source(domain: &Arc<ProtectionDomain>, backing: Backing) -> Result<Arc<Registered>, VerbsError> {
        Registered::new(domain, Purpose::Source, backing, None).map(Arc::new)
    }

    /// What peers may read through [`Window`]s, for devices that have them.
    pub fn windowed(domain: &Arc<ProtectionDomain>, backing: Backing) -> Result<Arc<Registered>, VerbsError> {
        Registered::new(domain, Purpose::Windowed, backing, None).map(Arc::new)
    }

    /// Bytes that peers may write to, until [`Registered::into_span`] takes them back.
    pub fn target(domain: &Arc<ProtectionDomain>, span: Span) -> Result<Registered, VerbsError> {
        let memory = Arc::clone(span.memory());
        Registered::new(domain, Purpose::Target, Backing::Memory(memory), Some(span))
    }

    fn new(
        domain: &Arc<ProtectionDomain>,
        purpose: Purpose,
        backing: Backing,
        target: Option<Span>,
    ) -> Result<Registered, VerbsError> {
        const CALL: &str = "registering memory";
        let (start, bytes) = match (&target, &backing) {
            (Some(span), _) => (span.address().as_ptr(), span.bytes()),
            (_, Backing::Memory(memory)) => (memory.address().as_ptr(), memory.bytes()),
            (_, Backing::Retired(retired)) => {
                let memory = retired.memory();
                (memory.address().as_ptr(), memory.bytes())
            }
            (_, Backing::Map(map)) => (map.as_slice().as_ptr().cast_mut(), map.as_slice().len() as u64),
            // Its addresses begin with 0.
            (_, Backing::DmaBuf(_, bytes)) => (std::ptr::null_mut(), *bytes),
        };
        let length = usize::try_from(bytes).ok().filter(|length| *length > 0).ok_or(invalid(CALL))?;
        let mut raw = Registration { memory: std::ptr::null_mut(), lkey: 0, rkey: 0 };
        let (library, access) = (domain.context.library(), purpose.access());
        let answer = match &backing {
            // SAFETY: the kernel looks at the descriptor; the place for the result lives through the call.
            Backing::DmaBuf(buffer, _) => unsafe {
                (library.register_dmabuf)(domain.raw(), buffer.as_raw_fd(), length, access, &mut raw)
            },
            // SAFETY: the range is mapped as long as `backing`, which `Registered` keeps until it is taken back. Whom it lets
            // write to it: only the device, for an operation that owns a span of it (`Own`) or a peer that has the only claim on
            // it (`Target`).
            Backing::Memory(_) | Backing::Retired(_) | Backing::Map(_) => unsafe {
                (library.register)(domain.raw(), start.cast(), length, access, &mut raw)
            },
        };
        check(CALL, answer)?;
        let handle = Handle { domain: Arc::clone(domain), raw, registered: true, target };
        Ok(Registered { handle, purpose, address: start as u64, bytes, backing })
    }

    /// What a peer needs to read it, or to write to it. `None`: no peer may.
    pub fn remote(&self) -> Option<Remote> {
        match self.purpose {
            Purpose::Source | Purpose::Target => {
                Some(Remote { address: self.address, rkey: self.handle.raw.rkey, bytes: self.bytes })
            }
            Purpose::Own | Purpose::Windowed => None,
        }
    }

    /// Makes the key void and takes back what peers could write to. `None`: it was not registered for that, or the device does not
    /// let go of it ([`super::Library::leaked_bytes`]).
    pub fn into_span(mut self) -> Option<Span> {
        self.handle.release()
    }

    /// Key for operations on `span`. `None`: it is not of this memory, or peers may reach it.
    pub(super) fn key_for(&self, span: &Span) -> Option<u32> {
        match (&self.purpose, &self.backing) {
            (Purpose::Own, Backing::Memory(memory)) if Arc::ptr_eq(memory, span.memory()) => {
                Some(self.handle.raw.lkey)
            }
            _ => None,
        }
    }

    pub(super) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.handle.domain
    }
}

/// A window of type 2: a key of its own to a range of registered memory, for the peer of one queue pair, which can be made void
/// without touching the registration.
#[derive(Debug)]
pub struct Window {
    memory: Arc<Registered>,
    raw: NonNull<RawWindow>,
    /// While it is bound.
    pub(super) bound: Option<u32>,
}

// SAFETY: libibverbs lets any thread use a window.
unsafe impl Send for Window {}

impl Window {
    /// A window into `memory` ([`Registered::windowed`]) that shows nothing yet; [`super::QueuePair::bind`] opens it.
    ///
    /// # Errors
    /// [`VerbsError::is_unsupported`]: the device has none.
    pub fn new(memory: &Arc<Registered>) -> Result<Window, VerbsError> {
        const CALL: &str = "making a memory window";
        if !matches!(memory.purpose, Purpose::Windowed) {
            return Err(invalid(CALL));
        }
        let domain = memory.domain();
        let (mut raw, mut rkey) = (std::ptr::null_mut(), 0);
        // SAFETY: the domain is there; the places for the results live through the call.
        check(CALL, unsafe { (domain.context.library().create_window)(domain.raw(), &mut raw, &mut rkey) })?;
        let raw = NonNull::new(raw).ok_or(invalid(CALL))?;
        Ok(Window { memory: Arc::clone(memory), raw, bound: None })
    }

    /// Whether a peer can read through it.
    pub fn is_bound(&self) -> bool {
        self.bound.is_some()
    }

    pub(super) fn domain(&self) -> &Arc<ProtectionDomain> {
        self.memory.domain()
    }

    pub(super) fn raw(&self) -> *mut RawWindow {
        self.raw.as_ptr()
    }

    pub(super) fn memory(&self) -> *mut RawMemory {
        self.memory.handle.raw.memory
    }

    /// What it shows once it is bound to `bytes` from `offset` on. `None`: that is not inside the memory.
    pub(super) fn range(&self, offset: u64, bytes: u64) -> Option<Remote> {
        Remote { address: self.memory.address, rkey: 0, bytes: self.memory.bytes }.part(offset, bytes)
    }
}

impl Remote {
    /// The same range under another key.
    pub(super) fn under(self, rkey: u32) -> Remote {
        Remote { rkey, ..self }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: made by `new`; a bind of it borrows `self` until it has ended.
        let _ = unsafe { (self.domain().context.library().destroy_window)(self.raw()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_remote_range_stay_inside_it() {
        let remote = Remote { address: u64::MAX - 15, rkey: 7, bytes: 16 };
        assert_eq!(remote.part(8, 8).unwrap().place(), (u64::MAX - 7, 7));
        for (offset, bytes) in [(0, 17), (16, 1), (u64::MAX, 2), (1, u64::MAX)] {
            assert_eq!(remote.part(offset, bytes), None, "{offset} {bytes}");
        }
        let hostile = Remote { address: u64::MAX, rkey: 7, bytes: u64::MAX };
        assert_eq!(hostile.part(1, 1), None);
    }

    #[test]
    fn keys_are_not_shown() {
        let remote = Remote { address: 0xabcd, rkey: 0x1234_5678, bytes: 9 };
        let text = format!("{remote:?}");
        assert!(!text.contains("305419896") && !text.contains("43981") && text.contains('9'), "{text}");
    }
}
