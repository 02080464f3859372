//! Copies from the host tier to a device, by the device itself.

use std::sync::Arc;

use super::memory::{DeviceMemory, PinnedMap};
use super::stream::{Rows, Stream};
use super::{CudaError, invalid};

/// Copies from one region of the host tier to one on a device. Keeps both until the device is done (invariant 2).
#[derive(Debug)]
pub struct Promotion {
    stream: Stream,
    source: Arc<PinnedMap>,
    target: Arc<DeviceMemory>,
}

impl Promotion {
    /// Nothing is copied yet.
    pub fn new(source: &Arc<PinnedMap>, target: &Arc<DeviceMemory>) -> Result<Promotion, CudaError> {
        let stream = Stream::new(target.context())?;
        Ok(Promotion { stream, source: Arc::clone(source), target: Arc::clone(target) })
    }

    /// Starts a copy of rows, none of which crosses the border of a part.
    pub fn copy(&self, rows: Rows) -> Result<(), CudaError> {
        const CALL: &str = "cuMemcpyHtoDAsync";
        let (end, total) = rows.extent().ok_or(invalid(CALL))?;
        let whole = self.source.as_slice();
        let inside = end <= whole.len() as u64;
        let address =
            self.target.address_of(rows.target_offset, total).filter(|_| inside).ok_or(invalid(CALL))?;
        self.stream.context().bind()?;
        self.stream.start(address, &whole[rows.span_offset as usize..], rows)
    }

    /// Waits for all copies.
    pub fn finish(&self) -> Result<(), CudaError> {
        self.stream.finish()
    }
}

impl Drop for Promotion {
    fn drop(&mut self) {
        // On an error the driver has stopped the device's work.
        let _ = self.stream.finish();
    }
}
