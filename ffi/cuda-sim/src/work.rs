//! What streams do: copies, fills, kernels, and the moments that events note.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use cuda_sim_model::wait_until;

use crate::abi::{Answer, Code, Host};
use crate::context::Context;
use crate::fault;
use crate::kernels::{Kernel, Launch};
use crate::memory;
use crate::sim;
use crate::space::{Access, Span};

/// Bytes that a copy inside the device moves at a time.
const BOUNCE_BYTES: usize = 256 << 10;

/// One piece of work.
#[derive(Debug)]
pub(crate) enum Work {
    Copy(Copy),
    /// `count` times `pattern`.
    Fill {
        address: u64,
        pattern: Vec<u8>,
        count: u64,
    },
    Launch(&'static Kernel, Launch),
    Record(Arc<OnceLock<Instant>>),
    /// A point to wait for.
    Nothing,
    /// A fault that was asked for.
    Fail(Code),
}

/// Rows of bytes from one place to another.
#[derive(Debug)]
pub(crate) struct Copy {
    pub(crate) from: Place,
    pub(crate) to: Place,
    pub(crate) rows: Rows,
}

#[derive(Debug)]
pub(crate) enum Place {
    Host(Host),
    /// Host memory as it was when the copy was submitted; rows lie as they did there.
    Staged(Vec<u8>),
    Device(u64),
}

/// `count` rows of `bytes`, whose starts lie so far apart on each side. `extents` are known not to overflow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) bytes: usize,
    pub(crate) count: usize,
    pub(crate) from_pitch: usize,
    pub(crate) to_pitch: usize,
}

impl Rows {
    pub(crate) fn one(bytes: usize) -> Rows {
        Rows { bytes, count: 1, from_pitch: bytes, to_pitch: bytes }
    }

    /// Bytes from the first to the last on the side that is copied from and on the other. None if a pitch is less than a
    /// row, or a number too large.
    pub(crate) fn extents(self) -> Option<(usize, usize)> {
        let extent = |pitch: usize| {
            let last = self.count.checked_sub(1)?.checked_mul(pitch)?;
            last.checked_add(self.bytes).filter(|_| self.count == 1 || pitch >= self.bytes)
        };
        self.count.checked_mul(self.bytes)?;
        Some((extent(self.from_pitch)?, extent(self.to_pitch)?))
    }
}

impl Work {
    /// Does it, on the stream's thread.
    pub(crate) fn run(&self, context: &Context) -> Answer {
        match self {
            Work::Copy(copy) => match sim::faults().and_then(|faults| faults.called(fault::COPY)) {
                None => copy.run(context),
                Some(code) => Err(code),
            },
            Work::Fill { address, pattern, count } => fill(context, *address, pattern, *count),
            Work::Launch(kernel, launch) => {
                (kernel.run)(launch, &|start, bytes, need| span(context, start, bytes, need))
            }
            Work::Record(time) => {
                // Set once: each recording has its own.
                let _ = time.set(Instant::now());
                Ok(())
            }
            Work::Nothing => Ok(()),
            Work::Fail(code) => Err(*code),
        }
    }
}

fn span(context: &Context, start: u64, bytes: u64, need: Access) -> Answer<Span> {
    sim::get()?.space().span(context.device.index, start, bytes, need)
}

impl Copy {
    fn run(&self, context: &Context) -> Answer {
        let Rows { bytes, count, from_pitch, to_pitch } = self.rows;
        let (from_extent, to_extent) = self.rows.extents().ok_or(Code::INVALID_VALUE)?;
        let source = |start: &u64| span(context, *start, from_extent as u64, Access::Read);
        let target = |start: &u64| span(context, *start, to_extent as u64, Access::ReadWrite);
        let links = &context.device;
        let total = (bytes * count) as u64;
        // A row at a time, or all at once where nothing lies between them.
        let dense = count == 1 || (from_pitch == bytes && to_pitch == bytes);
        let (rows, length) = if dense { (1, bytes * count) } else { (count, bytes) };
        let offsets = (0..rows).map(|row| (row * from_pitch, row * to_pitch));
        let end = match (&self.from, &self.to) {
            (Place::Host(from), Place::Device(to)) => {
                let (to, end) = (target(to)?, links.to_device.take(total));
                for (at, to_at) in offsets {
                    to.write_from(to_at, from.offset(at), length)?;
                }
                end
            }
            (Place::Staged(from), Place::Device(to)) => {
                let (to, end) = (target(to)?, links.to_device.take(total));
                for (at, to_at) in offsets {
                    to.write(to_at, from.get(at..at + length).ok_or(Code::INVALID_VALUE)?)?;
                }
                end
            }
            (Place::Device(from), Place::Host(to)) => {
                let (from, end) = (source(from)?, links.to_host.take(total));
                for (at, to_at) in offsets {
                    from.read_into(at, to.offset(to_at), length)?;
                }
                end
            }
            (Place::Device(from), Place::Device(to)) => {
                let (from, to) = (source(from)?, target(to)?);
                for (at, to_at) in offsets {
                    bounce(&from, at, &to, to_at, length)?;
                }
                None
            }
            (Place::Host(from), Place::Host(to)) => {
                for (at, to_at) in offsets {
                    memory::move_host(from.offset(at), to.offset(to_at), length);
                }
                None
            }
            (Place::Staged(_), _) | (_, Place::Staged(_)) => return Err(Code::INVALID_VALUE),
        };
        end.into_iter().for_each(wait_until);
        Ok(())
    }
}

/// Copies between two places of a device.
fn bounce(from: &Span, from_at: usize, to: &Span, to_at: usize, length: usize) -> Answer {
    let mut buffer = vec![0; BOUNCE_BYTES.min(length)];
    for offset in (0..length).step_by(BOUNCE_BYTES) {
        let piece = &mut buffer[..BOUNCE_BYTES.min(length - offset)];
        from.read(from_at + offset, piece)?;
        to.write(to_at + offset, piece)?;
    }
    Ok(())
}

fn fill(context: &Context, address: u64, pattern: &[u8], count: u64) -> Answer {
    let bytes = count.checked_mul(pattern.len() as u64).ok_or(Code::INVALID_VALUE)?;
    let target = span(context, address, bytes, Access::ReadWrite)?;
    let total = usize::try_from(bytes).map_err(|_| Code::INVALID_VALUE)?;
    // A multiple of every pattern's length.
    let buffer: Vec<u8> = pattern.iter().copied().cycle().take(BOUNCE_BYTES.min(total)).collect();
    for offset in (0..total).step_by(BOUNCE_BYTES) {
        target.write(offset, &buffer[..BOUNCE_BYTES.min(total - offset)])?;
    }
    Ok(())
}
