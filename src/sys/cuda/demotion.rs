//! Copies from a device to memory of the host tier, by the device itself.

use std::sync::Arc;

use super::memory::{DeviceMemory, Pinned};
use super::stream::Stream;
use super::{CudaError, invalid};
use crate::sys::mem::{Memory, Span};

/// Copies from one region on a device to memory of the host tier, one at a time. Owns the span that is being filled, and
/// keeps both memories, until the device is done (invariant 2).
#[derive(Debug)]
pub struct Demotion {
    stream: Stream,
    source: Arc<DeviceMemory>,
    target: Arc<Memory>,
    under_way: Option<Span>,
    _pinned: Pinned,
}

impl Demotion {
    /// Registers `target`, whose pages have been touched, with the device. Nothing is copied yet.
    pub fn new(source: &Arc<DeviceMemory>, target: &Arc<Memory>) -> Result<Demotion, CudaError> {
        let pinned = Pinned::new(source.context(), target)?;
        let stream = Stream::new(source.context())?;
        let (source, target) = (Arc::clone(source), Arc::clone(target));
        Ok(Demotion { stream, source, target, under_way: None, _pinned: pinned })
    }

    /// Waits for the copy that is under way, and starts one of what the device holds from `offset` on, which fills
    /// `next`. Gives what has arrived.
    ///
    /// # Errors
    /// The driver's; `CUDA_ERROR_INVALID_VALUE` if `next` is of other memory, or longer than what the device holds.
    pub fn copy(&mut self, offset: u64, next: Span) -> Result<Option<Span>, CudaError> {
        const CALL: &str = "cuMemcpyDtoHAsync";
        let address = self.source.address_of(offset, next.bytes());
        let address = address.filter(|_| Arc::ptr_eq(next.memory(), &self.target)).ok_or(invalid(CALL))?;
        let arrived = self.finish()?;
        let next = self.under_way.insert(next);
        // The range is inside the device's memory (checked above); `self` keeps it and the span until the copy is done.
        self.stream.fetch(address, next)?;
        Ok(arrived)
    }

    /// Waits for the copy that is under way, and gives what has arrived.
    pub fn finish(&mut self) -> Result<Option<Span>, CudaError> {
        self.stream.finish()?;
        Ok(self.under_way.take())
    }
}

impl Drop for Demotion {
    fn drop(&mut self) {
        // On an error the driver has stopped the device's work.
        let _ = self.stream.finish();
    }
}
