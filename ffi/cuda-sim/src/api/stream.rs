//! Streams and events.

use std::sync::Arc;

use super::{STREAMS, export, give, healthy, stream};
use crate::code;
use crate::machine::machine;
use crate::stream::{Event, Handles, Stream};

static EVENTS: Handles<Event> = Handles::new();

export! {
    fn cuStreamCreate(place: *mut usize, flags: u32) {
        let (machine, index, device) = healthy()?;
        if flags > 1 {
            return Err(code::INVALID_VALUE);
        }
        let made = Stream::start(index, Arc::clone(&device.sticky));
        give(place, STREAMS.put(machine.number(), made))
    }

    /// What is under way ends first.
    fn cuStreamDestroy_v2(handle: usize) { STREAMS.take(handle).map(drop).ok_or(code::INVALID_HANDLE) }

    fn cuStreamSynchronize(handle: usize) {
        healthy()?;
        stream(handle)?.wait();
        healthy().map(|_| ())
    }

    fn cuStreamQuery(handle: usize) {
        let idle = stream(handle)?.idle();
        healthy()?;
        if idle { Ok(()) } else { Err(code::NOT_READY) }
    }

    fn cuStreamWaitEvent(handle: usize, event: usize, _flags: u32) {
        healthy()?;
        let event = EVENTS.get(event).ok_or(code::INVALID_HANDLE)?;
        stream(handle)?.push(move || {
            event.wait();
            Ok(())
        });
        Ok(())
    }

    fn cuEventCreate(place: *mut usize, _flags: u32) {
        healthy()?;
        give(place, EVENTS.put(machine()?.number(), Arc::new(Event::default())))
    }

    fn cuEventDestroy_v2(handle: usize) { EVENTS.take(handle).map(drop).ok_or(code::INVALID_HANDLE) }

    fn cuEventRecord(handle: usize, on: usize) {
        healthy()?;
        let event = EVENTS.get(handle).ok_or(code::INVALID_HANDLE)?;
        event.record(&*stream(on)?);
        Ok(())
    }

    fn cuEventQuery(handle: usize) {
        let reached = EVENTS.get(handle).ok_or(code::INVALID_HANDLE)?.is_reached();
        healthy()?;
        if reached { Ok(()) } else { Err(code::NOT_READY) }
    }

    fn cuEventSynchronize(handle: usize) {
        EVENTS.get(handle).ok_or(code::INVALID_HANDLE)?.wait();
        healthy().map(|_| ())
    }

    fn cuEventElapsedTime(milliseconds: *mut f32, from: usize, to: usize) {
        let (from, to) = EVENTS.get(from).zip(EVENTS.get(to)).ok_or(code::INVALID_HANDLE)?;
        if !from.is_reached() || !to.is_reached() {
            return Err(code::NOT_READY);
        }
        let (from, to) = from.at().zip(to.at()).ok_or(code::INVALID_HANDLE)?;
        give(milliseconds, to.saturating_duration_since(from).as_secs_f32() * 1e3)
    }
}
