//! From the slots of a shard thread to the memory of GPUs.
//!
//! One stream for each device. A slot whose read has ended is handed to an [`Upload`], which starts the copies that the
//! plan wants of it; its checksums are computed while the device copies. The slot comes back when an event behind the
//! copies was reached.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::batch::{Batch, DeviceRegion};
use super::settle::{expected, mismatch};
use crate::checksum;
use crate::error::{Code, Error};
use crate::plan::{Copy, Move};
use crate::staging;
use crate::sys::cuda::{Context, CudaError, Pinned, Rows, Stream, Upload};
use crate::sys::mem::Span;

/// The way of one shard thread to the devices.
#[derive(Debug)]
pub(super) struct Uplink<P> {
    streams: Vec<Stream>,
    idle: Vec<Upload>,
    /// Under way: what for, and the copies.
    sending: Vec<(P, Upload)>,
    _pinned: Pinned,
}

impl<P> Uplink<P> {
    /// Registers the slots with the devices and makes what the copies need. `None` without devices.
    pub(super) fn new(
        contexts: &[Arc<Context>],
        slots: &staging::Pool,
    ) -> Result<Option<Uplink<P>>, CudaError> {
        let Some(first) = contexts.first() else { return Ok(None) };
        let pinned = Pinned::new(first, slots.memory())?;
        let streams: Vec<Stream> = contexts.iter().map(Stream::new).collect::<Result<_, _>>()?;
        let idle = (0..slots.slots()).map(|_| Upload::new(&streams)).collect::<Result<Vec<_>, _>>()?;
        let sending = Vec::with_capacity(idle.len());
        Ok(Some(Uplink { streams, idle, sending, _pinned: pinned }))
    }

    /// Slots that are being copied from.
    pub(super) fn sending(&self) -> usize {
        self.sending.len()
    }

    /// Starts the copies that `step` wants of `slot`, and computes their checksums and those of its chunks meanwhile.
    /// `checked` is given the bytes. On an error the slot is given back at once.
    pub(super) fn send(
        &mut self,
        purpose: P,
        batch: &Batch,
        regions: &[DeviceRegion],
        step: &Move,
        slot: Span,
        checked: impl FnOnce(&[u8]),
    ) -> Result<(), (P, Span, Error)> {
        let Some(mut upload) = self.idle.pop() else {
            let message = "more slots are under way to GPUs than there are";
            return Err((purpose, slot, Error::new(Code::Internal, message)));
        };
        upload.load(slot);
        let copies = batch.plan.copies_of(step);
        let begun = if copies.iter().all(|copy| (copy.region as usize) < regions.len()) {
            let copies = copies.iter().map(|copy| {
                let region = &regions[copy.region as usize];
                (region.device, &region.memory, rows(copy))
            });
            upload.start(&self.streams, copies).map_err(copy_error)
        } else {
            Err(Error::new(Code::Internal, "a copy has no place in its region"))
        };
        match begun {
            Ok(()) => {
                checked(upload.bytes());
                self.sending.push((purpose, upload));
                Ok(())
            }
            Err(error) => {
                let span = upload.unload(&self.streams);
                self.idle.push(upload);
                match span {
                    Some(span) => Err((purpose, span, error)),
                    // Cannot be: it was loaded above.
                    None => Ok(()),
                }
            }
        }
    }

    /// Waits for all copies and puts the slots out of use: the thread ends.
    pub(super) fn wait_all(&mut self) {
        for (_, mut upload) in self.sending.drain(..) {
            drop(upload.unload(&self.streams));
        }
    }

    /// Takes out one slot whose copies have ended, with what it was for and what became of them.
    pub(super) fn landed(&mut self) -> Option<(P, Span, Result<(), Error>)> {
        let mut ended = None;
        for (at, (_, upload)) in self.sending.iter_mut().enumerate() {
            match upload.done() {
                Ok(false) => {}
                Ok(true) => {
                    ended = Some((at, Ok(())));
                    break;
                }
                Err(error) => {
                    ended = Some((at, Err(copy_error(error))));
                    break;
                }
            }
        }
        let (at, result) = ended?;
        let (purpose, mut upload) = self.sending.swap_remove(at);
        let span = upload.unload(&self.streams);
        self.idle.push(upload);
        span.map(|span| (purpose, span, result))
    }
}

fn rows(copy: &Copy) -> Rows {
    Rows {
        span_offset: u64::from(copy.slot_offset),
        target_offset: copy.region_offset,
        bytes: copy.bytes,
        stride: copy.stride,
        count: copy.count,
    }
}

/// What a call to the driver that failed means for a load.
pub fn copy_error(error: CudaError) -> Error {
    let (code, rest) = match error.is_fatal() {
        true => (Code::DeviceLost, "the device is not used any more until the daemon is restarted"),
        false => (Code::DeviceCopyFailed, "ask again; if it stays, look at the driver's log (dmesg)"),
    };
    Error::new(code, format!("copying to a GPU failed: {error}; {rest}"))
}

/// Computes the checksums of the chunks in a slot, compares them with what is known of the file, and computes those of
/// the copies that are made of it.
pub(super) fn check(batch: &Batch, step: &Move, slot: &[u8]) {
    let file = &batch.files[step.file as usize];
    let mut copies = batch.plan.copies_of(step).iter().zip(batch.copies_from(step)).peekable();
    for (number, piece) in step.pieces().enumerate() {
        let range = (piece.start - step.offset) as usize..(piece.end - step.offset) as usize;
        let sum = checksum::chunk(&slot[range.clone()]);
        if let Some(expected) = expected(file, &piece).filter(|expected| *expected != sum) {
            batch.progress.fail(mismatch(&file.name, &piece, sum, expected));
        }
        batch.checks[step.first_check as usize + number].store(sum, Ordering::Release);
        // Most slots hold a piece of one large tensor: the same bytes need no second look.
        let same = |copy: &Copy| {
            copy.count == 1 && copy.slot_offset as usize == range.start && copy.bytes as usize == range.len()
        };
        if let Some((_, place)) = copies.next_if(|(copy, _)| same(copy)) {
            place.store(sum, Ordering::Release);
        }
    }
    for (copy, place) in copies {
        match checksum_of(copy, slot) {
            Some(sum) => place.store(sum, Ordering::Release),
            None => batch.progress.fail(Error::new(Code::Internal, "a copy lies outside its slot")),
        }
    }
}

/// The checksum of what `copy` puts into its region, where its rows lie one behind the other. `None` if the slot does
/// not hold it.
fn checksum_of(copy: &Copy, slot: &[u8]) -> Option<u64> {
    let mut sum = checksum::Running::new();
    for row in 0..copy.count {
        let start = usize::try_from(u64::from(copy.slot_offset) + row * copy.stride).ok()?;
        sum.update(slot.get(start..start.checked_add(usize::try_from(copy.bytes).ok()?)?)?);
    }
    Some(sum.finish())
}
