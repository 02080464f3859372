//! Copies and fills, on streams.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;

use super::memory::is_registered;
use super::{export, healthy, stream, take};
use crate::code::{self, Outcome};
use crate::machine::machine;
use crate::space::{self, Access, Piece};
use crate::stream::{Link, Stream};

/// `CU_MEMORYTYPE_HOST` and `CU_MEMORYTYPE_DEVICE`.
const HOST: u32 = 1;
const DEVICE: u32 = 2;

/// Host memory of the caller. It is trusted to stay as long as the API demands.
#[derive(Clone, Copy)]
struct HostPlace(*mut u8);

// SAFETY: the API hands such an address to another engine by design; the caller keeps the memory until that is done.
unsafe impl Send for HostPlace {}

impl HostPlace {
    fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

/// Equal rows: bytes, count, and their distances on either side.
#[derive(Clone, Copy)]
struct Rows {
    bytes: usize,
    count: usize,
    source_pitch: usize,
    target_pitch: usize,
}

impl Rows {
    fn one(bytes: usize) -> Rows {
        Rows { bytes, count: 1, source_pitch: bytes, target_pitch: bytes }
    }

    fn total(self) -> u64 {
        self.bytes as u64 * self.count as u64
    }
}

/// Copies to what `pieces` are, from `from` on.
fn fill(pieces: &[Piece], mut from: *const u8) {
    for piece in pieces {
        // SAFETY: the piece is mapped as long as it lives; the source is the caller's, which has that many bytes.
        unsafe { std::ptr::copy(from, piece.start(), piece.bytes) };
        from = from.wrapping_add(piece.bytes);
    }
}

/// Copies what `pieces` are to `to`.
fn drain(pieces: &[Piece], mut to: *mut u8) {
    for piece in pieces {
        // SAFETY: as in `fill`, the other way round.
        unsafe { std::ptr::copy(piece.start(), to, piece.bytes) };
        to = to.wrapping_add(piece.bytes);
    }
}

/// An injected fault of a copy that is under way already: `CUDA_SIM_FAULT=copy:3=LAUNCH_FAILED`.
fn fault() -> Outcome {
    machine()?.fault("copy").map_or(Ok(()), Err)
}

fn link(stream: &Stream, to_device: bool) -> Outcome<Arc<Link>> {
    let device = machine()?.devices.get(stream.device).ok_or(code::INVALID_CONTEXT)?;
    Ok(Arc::clone(if to_device { &device.h2d } else { &device.d2h }))
}

/// Host to device. Memory that is not registered is taken over at once, as by the real driver's own staging.
fn upload(stream: &Stream, target: u64, source: *const c_void, rows: Rows) -> Outcome {
    if rows.total() == 0 {
        return Ok(());
    }
    if source.is_null() {
        return Err(code::INVALID_VALUE);
    }
    let link = link(stream, true)?;
    let hull = rows.source_pitch * (rows.count - 1) + rows.bytes;
    let pinned = is_registered(source.addr(), hull);
    let place = HostPlace(source.cast_mut().cast());
    let mut taken = Vec::new();
    if !pinned {
        // SAFETY: the caller's memory, which has that many bytes by the API's contract.
        taken.extend_from_slice(unsafe { std::slice::from_raw_parts(source.cast::<u8>(), hull) });
    }
    stream.push(move || {
        let began = Instant::now();
        fault()?;
        let place = if pinned { place } else { HostPlace(taken.as_ptr().cast_mut()) };
        for row in 0..rows.count {
            let address = target + (row * rows.target_pitch) as u64;
            let pieces = space::pieces(address, rows.bytes as u64, Access::ReadWrite)?;
            fill(&pieces, place.at(row * rows.source_pitch));
        }
        link.carry(rows.total(), began);
        Ok(())
    });
    Ok(())
}

fn download(stream: &Stream, target: *mut c_void, source: u64, bytes: usize) -> Outcome {
    if target.is_null() && bytes > 0 {
        return Err(code::INVALID_VALUE);
    }
    let link = link(stream, false)?;
    let place = HostPlace(target.cast());
    stream.push(move || {
        let began = Instant::now();
        fault()?;
        drain(&space::pieces(source, bytes as u64, Access::Read)?, place.at(0));
        link.carry(bytes as u64, began);
        Ok(())
    });
    Ok(())
}

fn between(stream: &Stream, target: u64, source: u64, bytes: usize) {
    stream.push(move || {
        fault()?;
        let from = space::pieces(source, bytes as u64, Access::Read)?;
        let mut target = target;
        for piece in from {
            fill(&space::pieces(target, piece.bytes as u64, Access::ReadWrite)?, piece.start());
            target += piece.bytes as u64;
        }
        Ok(())
    });
}

fn set(stream: &Stream, target: u64, value: u8, bytes: usize) {
    stream.push(move || {
        for piece in space::pieces(target, bytes as u64, Access::ReadWrite)? {
            // SAFETY: the piece is mapped as long as it lives, and has that many bytes.
            unsafe { std::ptr::write_bytes(piece.start(), value, piece.bytes) };
        }
        Ok(())
    });
}

/// Waits for a stream, and says what the context has met meanwhile.
fn finish(stream: &Stream) -> Outcome {
    stream.wait();
    healthy().map(|_| ())
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "as in the driver's header")]
pub(super) struct Copy2d {
    source_x: usize,
    source_y: usize,
    source_kind: u32,
    source_host: *const c_void,
    source_device: u64,
    source_array: *const c_void,
    source_pitch: usize,
    target_x: usize,
    target_y: usize,
    target_kind: u32,
    target_host: *mut c_void,
    target_device: u64,
    target_array: *const c_void,
    target_pitch: usize,
    width: usize,
    height: usize,
}

export! {
    fn cuMemcpyHtoDAsync_v2(target: u64, source: *const c_void, bytes: usize, handle: usize) {
        healthy()?;
        upload(&*stream(handle)?, target, source, Rows::one(bytes))
    }

    fn cuMemcpyDtoHAsync_v2(target: *mut c_void, source: u64, bytes: usize, handle: usize) {
        healthy()?;
        download(&*stream(handle)?, target, source, bytes)
    }

    fn cuMemcpyDtoDAsync_v2(target: u64, source: u64, bytes: usize, handle: usize) {
        healthy()?;
        between(&*stream(handle)?, target, source, bytes);
        Ok(())
    }

    fn cuMemcpyHtoD_v2(target: u64, source: *const c_void, bytes: usize) {
        let stream = stream(0)?;
        upload(&stream, target, source, Rows::one(bytes))?;
        finish(&stream)
    }

    fn cuMemcpyDtoH_v2(target: *mut c_void, source: u64, bytes: usize) {
        let stream = stream(0)?;
        download(&stream, target, source, bytes)?;
        finish(&stream)
    }

    fn cuMemcpyDtoD_v2(target: u64, source: u64, bytes: usize) {
        let stream = stream(0)?;
        between(&stream, target, source, bytes);
        finish(&stream)
    }

    /// Host to device only.
    fn cuMemcpy2DAsync_v2(copy: *const Copy2d, handle: usize) {
        healthy()?;
        let copy = take(copy)?;
        let plain = copy.source_kind == HOST && copy.target_kind == DEVICE;
        let at_start = [copy.source_x, copy.source_y, copy.target_x, copy.target_y] == [0; 4];
        if !plain || !at_start || copy.source_pitch < copy.width || copy.target_pitch < copy.width {
            return Err(code::INVALID_VALUE);
        }
        let rows = Rows {
            bytes: copy.width,
            count: copy.height,
            source_pitch: copy.source_pitch,
            target_pitch: copy.target_pitch,
        };
        upload(&*stream(handle)?, copy.target_device, copy.source_host, rows)
    }

    fn cuMemsetD8Async(target: u64, value: u8, bytes: usize, handle: usize) {
        healthy()?;
        set(&*stream(handle)?, target, value, bytes);
        Ok(())
    }

    fn cuMemsetD8_v2(target: u64, value: u8, bytes: usize) {
        let stream = stream(0)?;
        set(&stream, target, value, bytes);
        finish(&stream)
    }
}
