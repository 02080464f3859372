//! Streams: made, waited for, asked, ended.

use super::{STREAM_LEGACY, call, exported, submit};
use crate::abi::{Answer, Code, Out};
use crate::sim::Sim;
use crate::work::Work;

/// `CU_STREAM_NON_BLOCKING`: not ordered with the NULL stream.
const NON_BLOCKING: u32 = 1;

/// Waits for all that was submitted to a stream; then tells the error that ended its context, if one did.
fn synchronize(sim: &Sim, handle: usize) -> Answer {
    let context = match handle {
        0 | STREAM_LEGACY => {
            let context = sim.current()?;
            context.submit(None, Work::Nothing, Vec::new())?.wait();
            context
        }
        handle => {
            let stream = sim.handles().streams.get(&handle).cloned().ok_or(Code::INVALID_HANDLE)?;
            stream.tail().wait();
            stream.context.clone()
        }
    };
    context.check()?;
    context.device.touch()
}

exported! {
    fn cuStreamCreate(stream: Out<usize>, flags: u32) {
        call("cuStreamCreate", |sim| {
            if stream.is_null() || flags & !NON_BLOCKING != 0 {
                return Err(Code::INVALID_VALUE);
            }
            let made = sim.usable()?.stream(flags & NON_BLOCKING == 0)?;
            let handle = sim.handle() as usize;
            sim.handles().streams.insert(handle, made);
            stream.put(handle)
        })
    }

    fn cuStreamDestroy_v2(stream: usize) {
        call("cuStreamDestroy_v2", |sim| {
            let ended = sim.handles().streams.remove(&stream).ok_or(Code::INVALID_HANDLE)?;
            // What was submitted is still done.
            ended.close();
            ended.context.check()
        })
    }

    fn cuStreamSynchronize(stream: usize) {
        call("cuStreamSynchronize", |sim| synchronize(sim, stream))
    }

    fn cuStreamQuery(stream: usize) {
        submit("cuStreamQuery", stream, |_, context, stream| {
            let idle = stream.map_or_else(|| context.null_is_idle(), |stream| stream.tail().is_reached());
            // Asked again: what has ended since may have failed.
            context.check()?;
            if idle { Ok(()) } else { Err(Code::NOT_READY) }
        })
    }

    fn cuStreamWaitEvent(stream: usize, event: usize, flags: u32) {
        submit("cuStreamWaitEvent", stream, |sim, context, stream| {
            if flags > 1 {
                return Err(Code::INVALID_VALUE);
            }
            let event = sim.handles().events.get(&event).cloned().ok_or(Code::INVALID_HANDLE)?;
            // An event that was never recorded holds nobody up.
            let Some(recorded) = crate::sim::lock(&event.recorded).clone() else { return Ok(()) };
            context.submit(stream, Work::Nothing, vec![recorded.mark]).map(|_| ())
        })
    }
}
