//! Completion channels: what a thread waits at that has nothing else to do.

use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use lodestream_verbs_abi::Channel as RawChannel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::device::Context;
use super::{VerbsError, check, invalid};

/// Wakes a thread that waits for completions: one for all queue pairs that it looks after.
#[derive(Debug)]
pub struct Channel {
    context: Arc<Context>,
    raw: NonNull<RawChannel>,
    descriptor: RawFd,
}

// SAFETY: libibverbs lets any thread use a completion channel.
unsafe impl Send for Channel {}
// SAFETY: as above, several at a time.
unsafe impl Sync for Channel {}

impl Channel {
    /// A new one.
    pub fn new(context: &Arc<Context>) -> Result<Arc<Channel>, VerbsError> {
        const CALL: &str = "making a completion channel";
        let (mut raw, mut descriptor) = (std::ptr::null_mut(), -1);
        // SAFETY: the context is open; the places for the results live through the call.
        check(CALL, unsafe { (context.library().create_channel)(context.raw(), &mut raw, &mut descriptor) })?;
        let raw = NonNull::new(raw).ok_or(invalid(CALL))?;
        let channel = Channel { context: Arc::clone(context), raw, descriptor };
        rustix::io::ioctl_fionbio(channel.descriptor(), true)
            .map_err(|error| VerbsError { call: CALL, errno: error.raw_os_error() })?;
        Ok(Arc::new(channel))
    }

    /// Readable when a queue pair that was armed has a completion.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the channel, which is as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.descriptor) }
    }

    /// Blocks until a queue pair that was armed has a completion, or for `timeout`. May wake for nothing.
    pub fn wait(&self, timeout: Duration) -> Result<(), VerbsError> {
        const CALL: &str = "waiting for a completion";
        let failed = |errno| VerbsError { call: CALL, errno };
        let timeout = Timespec::try_from(timeout).map_err(|_| invalid(CALL))?;
        let descriptor = self.descriptor();
        match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.raw_os_error())),
        }
        loop {
            // SAFETY: the channel is there as long as `self`.
            match unsafe { (self.context.library().take_event)(self.raw.as_ptr()) } {
                0 => {}
                libc::EAGAIN => return Ok(()),
                errno => return Err(failed(errno)),
            }
        }
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> *mut RawChannel {
        self.raw.as_ptr()
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: made by `new`; queue pairs that tell it hold an `Arc` of this and are gone.
        let _ = unsafe { (self.context.library().destroy_channel)(self.raw.as_ptr()) };
    }
}
