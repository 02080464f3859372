//! Events: recorded in streams, asked, waited for, compared.

use std::sync::{Arc, Mutex, OnceLock};

use super::{call, exported, submit};
use crate::abi::{Answer, Code, Out};
use crate::sim::{Sim, lock};
use crate::stream::{Event, Recorded};
use crate::work::Work;

/// `CU_EVENT_BLOCKING_SYNC`, `CU_EVENT_DISABLE_TIMING`.
const BLOCKING_SYNC: u32 = 1;
const DISABLE_TIMING: u32 = 2;

fn event(sim: &Sim, handle: usize) -> Answer<Arc<Event>> {
    sim.handles().events.get(&handle).cloned().ok_or(Code::INVALID_HANDLE)
}

/// When an event that carries times was reached, after the origin of the process's clock.
fn moment(event: &Event) -> Answer<std::time::Instant> {
    let recorded = lock(&event.recorded).clone().filter(|_| event.timing).ok_or(Code::INVALID_HANDLE)?;
    if !recorded.mark.is_reached() {
        return Err(Code::NOT_READY);
    }
    recorded.time.get().copied().ok_or(Code::NOT_READY)
}

fn elapsed(name: &'static str, milliseconds: Out<f32>, start: usize, end: usize) -> Code {
    call(name, |sim| {
        let (start, end) = (event(sim, start)?, event(sim, end)?);
        start.context.check()?;
        let (start, end) = (moment(&start)?, moment(&end)?);
        let seconds = if end >= start { (end - start).as_secs_f64() } else { -(start - end).as_secs_f64() };
        milliseconds.put((seconds * 1000.0) as f32)
    })
}

exported! {
    fn cuEventCreate(handle: Out<usize>, flags: u32) {
        call("cuEventCreate", |sim| {
            if handle.is_null() || flags & !(BLOCKING_SYNC | DISABLE_TIMING) != 0 {
                return Err(Code::INVALID_VALUE);
            }
            let timing = flags & DISABLE_TIMING == 0;
            let event = Event { context: sim.usable()?, timing, recorded: Mutex::new(None) };
            let made = sim.handle() as usize;
            sim.handles().events.insert(made, Arc::new(event));
            handle.put(made)
        })
    }

    fn cuEventDestroy_v2(handle: usize) {
        call("cuEventDestroy_v2", |sim| {
            // Streams that wait for its last recording still do.
            let event = sim.handles().events.remove(&handle).ok_or(Code::INVALID_HANDLE)?;
            event.context.check()
        })
    }

    fn cuEventRecord(handle: usize, stream: usize) {
        submit("cuEventRecord", stream, |sim, context, stream| {
            let event = event(sim, handle)?;
            if !Arc::ptr_eq(&event.context, context) {
                return Err(Code::INVALID_HANDLE);
            }
            let time = Arc::new(OnceLock::new());
            let mut recorded = lock(&event.recorded);
            let mark = context.submit(stream, Work::Record(Arc::clone(&time)), Vec::new())?;
            *recorded = Some(Recorded { mark, time });
            Ok(())
        })
    }

    fn cuEventQuery(handle: usize) {
        call("cuEventQuery", |sim| {
            let event = event(sim, handle)?;
            event.context.device.touch()?;
            let reached = lock(&event.recorded).as_ref().is_none_or(|recorded| recorded.mark.is_reached());
            event.context.check()?;
            if reached { Ok(()) } else { Err(Code::NOT_READY) }
        })
    }

    fn cuEventSynchronize(handle: usize) {
        call("cuEventSynchronize", |sim| {
            let event = event(sim, handle)?;
            let recorded = lock(&event.recorded).clone();
            recorded.iter().for_each(|recorded| recorded.mark.wait());
            event.context.check()?;
            event.context.device.touch()
        })
    }

    fn cuEventElapsedTime(milliseconds: Out<f32>, start: usize, end: usize) {
        elapsed("cuEventElapsedTime", milliseconds, start, end)
    }

    fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: usize, end: usize) {
        elapsed("cuEventElapsedTime_v2", milliseconds, start, end)
    }
}
