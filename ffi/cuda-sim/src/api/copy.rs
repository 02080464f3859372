//! Copies and fills.

use std::sync::Arc;

use super::{Wait, exported, give, submit, submit_and};
use crate::abi::{Answer, Code, Host, In, MEMORY_DEVICE, MEMORY_HOST, MEMORY_UNIFIED, Memcpy2D, Plane};
use crate::context::Context;
use crate::memory;
use crate::sim::Sim;
use crate::stream::Stream;
use crate::work::{Copy, Place, Rows, Work};

/// Copies from host memory that is not registered are submitted without waiting up to this size, bytes: the limit that
/// the CUDA documentation gives.
const STAGED_MAX: usize = 64 << 10;

/// Submits a copy. Host memory that is not registered is not used any more when this returns.
fn copy(
    sim: &Sim,
    context: &Arc<Context>,
    stream: Option<&Arc<Stream>>,
    copy: Copy,
    mut wait: Wait,
) -> Answer {
    let Copy { mut from, to, rows } = copy;
    if rows.bytes == 0 || rows.count == 0 {
        return Ok(());
    }
    let (from_extent, to_extent) = rows.extents().ok_or(Code::INVALID_VALUE)?;
    for (place, extent) in [(&from, from_extent), (&to, to_extent)] {
        let start = match place {
            Place::Host(host) => host.number(),
            Place::Device(address) => *address,
            Place::Staged(_) => continue,
        };
        if start == 0 || start.checked_add(extent as u64).is_none() {
            return Err(Code::INVALID_VALUE);
        }
    }
    let pageable = |place: &Place, extent: usize| {
        matches!(place, Place::Host(host)
            if !sim.registrations().covers(*host, extent as u64, context.device.index))
    };
    if pageable(&to, to_extent) {
        wait = Wait::Yes;
    }
    if pageable(&from, from_extent) {
        match from {
            Place::Host(host) if wait == Wait::No && from_extent <= STAGED_MAX => {
                from = Place::Staged(memory::stage(host, from_extent));
            }
            _ => wait = Wait::Yes,
        }
    }
    give(context, stream, Work::Copy(Copy { from, to, rows }), wait)
}

/// One row from host to device.
fn upload(name: &'static str, target: u64, source: Host, bytes: usize, stream: usize, wait: Wait) -> Code {
    let from_to = (Place::Host(source), Place::Device(target));
    one(name, from_to, bytes, stream, wait)
}

/// One row from device to host.
fn download(name: &'static str, target: Host, source: u64, bytes: usize, stream: usize, wait: Wait) -> Code {
    let from_to = (Place::Device(source), Place::Host(target));
    one(name, from_to, bytes, stream, wait)
}

/// One row inside devices. The caller never waits, as the CUDA documentation has it.
fn inside(name: &'static str, target: u64, source: u64, bytes: usize, stream: usize) -> Code {
    let from_to = (Place::Device(source), Place::Device(target));
    one(name, from_to, bytes, stream, Wait::No)
}

fn one(name: &'static str, (from, to): (Place, Place), bytes: usize, stream: usize, wait: Wait) -> Code {
    submit_and(name, stream, wait, |sim, context, stream| {
        copy(sim, context, stream, Copy { from, to, rows: Rows::one(bytes) }, wait)
    })
}

fn fill(name: &'static str, address: u64, pattern: &[u8], count: usize, stream: usize) -> Code {
    submit(name, stream, |_, context, stream| {
        if count == 0 {
            return Ok(());
        }
        if address == 0 || !address.is_multiple_of(pattern.len() as u64) {
            return Err(Code::INVALID_VALUE);
        }
        let work = Work::Fill { address, pattern: pattern.to_vec(), count: count as u64 };
        give(context, stream, work, Wait::No)
    })
}

/// Where the first row of one side of a two-dimensional copy starts.
fn start(sim: &Sim, plane: &Plane) -> Answer<Place> {
    let skipped = plane.y.checked_mul(plane.pitch).and_then(|rows| rows.checked_add(plane.x_bytes));
    let skipped = skipped.ok_or(Code::INVALID_VALUE)?;
    let device =
        |address: u64| Ok(Place::Device(address.checked_add(skipped as u64).ok_or(Code::INVALID_VALUE)?));
    match plane.memory {
        MEMORY_HOST => Ok(Place::Host(plane.host.offset(skipped))),
        MEMORY_DEVICE => device(plane.device),
        // One address space: the address says what it is.
        MEMORY_UNIFIED if sim.space().is_reserved(plane.device) => device(plane.device),
        MEMORY_UNIFIED => Err(Code::NOT_SUPPORTED),
        _ => Err(Code::INVALID_VALUE),
    }
}

exported! {
    fn cuMemcpyHtoD_v2(target: u64, source: Host, bytes: usize) {
        upload("cuMemcpyHtoD_v2", target, source, bytes, 0, Wait::Yes)
    }

    fn cuMemcpyHtoDAsync_v2(target: u64, source: Host, bytes: usize, stream: usize) {
        upload("cuMemcpyHtoDAsync_v2", target, source, bytes, stream, Wait::No)
    }

    fn cuMemcpyDtoH_v2(target: Host, source: u64, bytes: usize) {
        download("cuMemcpyDtoH_v2", target, source, bytes, 0, Wait::Yes)
    }

    fn cuMemcpyDtoHAsync_v2(target: Host, source: u64, bytes: usize, stream: usize) {
        download("cuMemcpyDtoHAsync_v2", target, source, bytes, stream, Wait::No)
    }

    fn cuMemcpyDtoD_v2(target: u64, source: u64, bytes: usize) {
        inside("cuMemcpyDtoD_v2", target, source, bytes, 0)
    }

    fn cuMemcpyDtoDAsync_v2(target: u64, source: u64, bytes: usize, stream: usize) {
        inside("cuMemcpyDtoDAsync_v2", target, source, bytes, stream)
    }

    fn cuMemcpy2DAsync_v2(description: In<Memcpy2D>, stream: usize) {
        submit("cuMemcpy2DAsync_v2", stream, |sim, context, stream| {
            let Memcpy2D { source, target, width, height } = description.get()?;
            let pitch = |plane: &Plane| if plane.pitch == 0 { width } else { plane.pitch };
            let rows =
                Rows { bytes: width, count: height, from_pitch: pitch(&source), to_pitch: pitch(&target) };
            let (from, to) = (start(sim, &source)?, start(sim, &target)?);
            copy(sim, context, stream, Copy { from, to, rows }, Wait::No)
        })
    }

    fn cuMemsetD8_v2(address: u64, value: u8, count: usize) {
        fill("cuMemsetD8_v2", address, &[value], count, 0)
    }

    fn cuMemsetD8Async(address: u64, value: u8, count: usize, stream: usize) {
        fill("cuMemsetD8Async", address, &[value], count, stream)
    }

    fn cuMemsetD32_v2(address: u64, value: u32, count: usize) {
        fill("cuMemsetD32_v2", address, &value.to_le_bytes(), count, 0)
    }

    fn cuMemsetD32Async(address: u64, value: u32, count: usize, stream: usize) {
        fill("cuMemsetD32Async", address, &value.to_le_bytes(), count, stream)
    }
}
