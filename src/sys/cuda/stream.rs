//! Asynchronous copies from spans of pinned host memory.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUDA_MEMCPY2D, CUdeviceptr, CUevent, CUmemorytype, CUresult, CUstream};

use super::device::Context;
use super::memory::DeviceMemory;
use super::{CudaError, check, invalid};
use crate::sys::mem::Span;

/// Streams do not wait for the default stream.
const STREAM_NON_BLOCKING: u32 = 1;
/// Events carry no time: cheaper.
const EVENT_DISABLE_TIMING: u32 = 2;

/// Work on one device, in order.
pub struct Stream {
    context: Arc<Context>,
    raw: CUstream,
}

// SAFETY: a handle that the driver lets any thread use; all calls on it are made with the context current.
unsafe impl Send for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.context).finish()
    }
}

impl Stream {
    /// A stream of its own.
    pub fn new(context: &Arc<Context>) -> Result<Stream, CudaError> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` lives through the call; the context is current.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, STREAM_NON_BLOCKING) })?;
        Ok(Stream { context: Arc::clone(context), raw })
    }
}

impl Stream {
    /// Starts a copy of rows that begin with `source` to `address`.
    ///
    /// The caller has made the context current, has checked that all rows are inside both, and keeps both until the copy is
    /// done.
    pub(super) fn start(&self, address: CUdeviceptr, source: &[u8], rows: Rows) -> Result<(), CudaError> {
        if rows.count == 1 {
            // SAFETY: the caller's promise.
            let result = unsafe {
                sys::cuMemcpyHtoDAsync_v2(address, source.as_ptr().cast(), rows.bytes as usize, self.raw)
            };
            return check("cuMemcpyHtoDAsync", result);
        }
        let copy = CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: source.as_ptr().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: rows.stride as usize,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: address,
            dstArray: std::ptr::null_mut(),
            dstPitch: rows.bytes as usize,
            WidthInBytes: rows.bytes as usize,
            Height: rows.count as usize,
        };
        // SAFETY: the caller's promise, for all rows.
        check("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.raw) })
    }

    /// Starts a copy from `address` that fills `target`.
    ///
    /// The caller has checked that the range is inside the device's memory, and keeps both until the copy is done.
    pub(super) fn fetch(&self, address: CUdeviceptr, target: &mut Span) -> Result<(), CudaError> {
        self.context.bind()?;
        let target = target.as_mut_slice();
        // SAFETY: the caller's promise; the span is an exclusive claim on its bytes.
        let result =
            unsafe { sys::cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), address, target.len(), self.raw) };
        check("cuMemcpyDtoHAsync", result)
    }

    /// Waits for all work in it.
    pub(super) fn finish(&self) -> Result<(), CudaError> {
        self.context.bind()?;
        // SAFETY: alive.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> CUstream {
        self.raw
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by `new`; the driver lets work that is under way end first.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A point in a stream that can be asked whether it was reached.
struct Event {
    context: Arc<Context>,
    raw: CUevent,
    /// Recorded, and not yet seen to be reached.
    pending: bool,
}

// SAFETY: as for `Stream`.
unsafe impl Send for Event {}

impl Event {
    fn new(context: &Arc<Context>) -> Result<Event, CudaError> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` lives through the call; the context is current.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, EVENT_DISABLE_TIMING) })?;
        Ok(Event { context: Arc::clone(context), raw, pending: false })
    }

    fn reached(&mut self) -> Result<bool, CudaError> {
        if !self.pending {
            return Ok(true);
        }
        self.context.bind()?;
        // SAFETY: made by `new`.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => {
                self.pending = false;
                check("cuEventQuery", result).map(|()| true)
            }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by `new`; an event that is pending is kept by the driver until it is reached.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

/// Copies out of one span, to one device or several. Owns the span, and keeps the memory that it is copied to, until
/// the devices are done (invariant 2). Used again and again: it allocates nothing after its making (invariant 3).
pub struct Upload {
    span: Option<Span>,
    /// For each device, in the order of the streams.
    events: Vec<Event>,
    /// Which streams have copies that no event follows yet.
    open: Vec<bool>,
    targets: Vec<Arc<DeviceMemory>>,
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upload").field("span", &self.span).finish_non_exhaustive()
    }
}

/// A copy of rows that lie at a distance in a span, to one behind the other in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    /// Offset of the first row in the span.
    pub span_offset: u64,
    /// Offset in the device memory.
    pub target_offset: u64,
    /// Bytes of a row.
    pub bytes: u64,
    /// Distance of rows in the span, bytes; at least `bytes`.
    pub stride: u64,
    /// Number of rows.
    pub count: u64,
}

impl Rows {
    /// Bytes of the span up to the end of the last row, and bytes in the device memory.
    pub(super) fn extent(&self) -> Option<(u64, u64)> {
        let last = self.count.checked_sub(1)?.checked_mul(self.stride)?;
        let span_end = self.span_offset.checked_add(last)?.checked_add(self.bytes)?;
        let fits = self.stride >= self.bytes && self.bytes > 0;
        Some((span_end, self.count.checked_mul(self.bytes)?)).filter(|_| fits)
    }
}

impl Upload {
    /// For copies by any of `streams`, each of another device.
    pub fn new(streams: &[Stream]) -> Result<Upload, CudaError> {
        let events: Result<Vec<_>, _> = streams.iter().map(|stream| Event::new(&stream.context)).collect();
        Ok(Upload {
            span: None,
            events: events?,
            open: vec![false; streams.len()],
            targets: Vec::with_capacity(streams.len()),
        })
    }

    /// Takes over the span that is copied from. No copy is under way.
    pub fn load(&mut self, span: Span) {
        debug_assert!(self.span.is_none(), "a span is still being copied");
        self.span = Some(span);
    }

    /// The bytes that are being copied.
    pub fn bytes(&self) -> &[u8] {
        self.span.as_ref().map_or(&[], Span::as_slice)
    }

    /// Starts copies: each to the device of `streams[lane]`. From here on [`Upload::done`] may be asked.
    ///
    /// # Errors
    /// The driver's. Some of the copies may be under way then; [`Upload::unload`] waits for them.
    pub fn start<'m>(
        &mut self,
        streams: &[Stream],
        copies: impl IntoIterator<Item = (usize, &'m Arc<DeviceMemory>, Rows)>,
    ) -> Result<(), CudaError> {
        // Making a context current costs about as much as starting a copy.
        let mut current = None;
        for (lane, target, rows) in copies {
            if current.replace(lane) != Some(lane) {
                streams.get(lane).map_or(Ok(()), |stream| stream.context.bind())?;
            }
            self.copy(streams, lane, target, rows)?;
        }
        self.record(streams)
    }

    /// Starts one copy. The context of its device is current.
    fn copy(
        &mut self,
        streams: &[Stream],
        lane: usize,
        target: &Arc<DeviceMemory>,
        rows: Rows,
    ) -> Result<(), CudaError> {
        const CALL: &str = "cuMemcpyHtoDAsync";
        let (stream, span) = streams.get(lane).zip(self.span.as_ref()).ok_or(invalid(CALL))?;
        let (span_end, total) = rows.extent().ok_or(invalid(CALL))?;
        let inside = span_end <= span.bytes() && Arc::ptr_eq(target.context(), &stream.context);
        let address = target.address_of(rows.target_offset, total).filter(|_| inside).ok_or(invalid(CALL))?;
        let source = &span.as_slice()[rows.span_offset as usize..];
        if !self.targets.iter().any(|known| Arc::ptr_eq(known, target)) {
            self.targets.push(Arc::clone(target));
        }
        self.open[lane] = true;
        // Both ranges are inside their memories (checked above), and `self` keeps both until the copy is done.
        stream.start(address, source, rows)
    }

    /// All copies are started.
    fn record(&mut self, streams: &[Stream]) -> Result<(), CudaError> {
        for ((event, stream), open) in self.events.iter_mut().zip(streams).zip(&mut self.open) {
            if !std::mem::take(open) {
                continue;
            }
            stream.context.bind()?;
            // SAFETY: both are of the same context and alive.
            check("cuEventRecord", unsafe { sys::cuEventRecord(event.raw, stream.raw) })?;
            event.pending = true;
        }
        Ok(())
    }

    /// Whether all copies have ended. An error: the device's context is lost, and no copy goes on.
    pub fn done(&mut self) -> Result<bool, CudaError> {
        let mut all = Ok(true);
        for event in &mut self.events {
            match event.reached() {
                Ok(reached) => all = all.map(|so_far| so_far && reached),
                Err(error) => all = Err(error),
            }
        }
        all
    }

    /// Waits for all copies, and gives the span back.
    pub fn unload(&mut self, streams: &[Stream]) -> Option<Span> {
        for ((event, stream), open) in self.events.iter_mut().zip(streams).zip(&mut self.open) {
            let begun = std::mem::take(open);
            if (begun || std::mem::take(&mut event.pending)) && stream.context.bind().is_ok() {
                // SAFETY: alive. Its answer changes nothing: on an error the driver has stopped the device's work.
                let _ = unsafe { sys::cuStreamSynchronize(stream.raw) };
            }
        }
        self.targets.clear();
        self.span.take()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        for event in self.events.iter_mut().filter(|event| event.pending) {
            if event.context.bind().is_ok() {
                // SAFETY: made by `Event::new`; waits, so that the span is not given back under a copy.
                let _ = unsafe { sys::cuEventSynchronize(event.raw) };
            }
        }
    }
}
