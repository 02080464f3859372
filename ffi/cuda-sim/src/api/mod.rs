//! The C functions: what of their arguments is checked, and what each does to the simulated machine.
//!
//! No panic leaves them, no argument is taken for valid that C allows to be anything, and each counts for fault injection
//! and for the trace under the name that it is exported by.

mod context;
mod copy;
mod device;
mod events;
mod general;
mod modules;
mod physical;
mod streams;
mod virtual_memory;

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::abi::{Answer, Code};
use crate::context::Context;
use crate::sim::{self, Sim};
use crate::stream::Stream;
use crate::work::Work;

/// Defines C functions, and a table of them.
macro_rules! exported {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            // SAFETY: the name is one of CUDA's driver API, which this library stands in for; nothing else defines it.
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, reason = "the names are those of the C API")]
            extern "C" fn $name($($argument: $type),*) -> $crate::abi::Code $body
        )*

        /// The functions of this file, by name.
        pub(super) fn table() -> Vec<(&'static str, *const std::ffi::c_void)> {
            vec![$((stringify!($name), $name as *const std::ffi::c_void)),*]
        }
    };
}
pub(crate) use exported;

/// All functions, by name.
fn table() -> Vec<(&'static str, *const c_void)> {
    [
        context::table(),
        copy::table(),
        device::table(),
        events::table(),
        general::table(),
        modules::table(),
        physical::table(),
        streams::table(),
        virtual_memory::table(),
    ]
    .concat()
}

/// A call that may come before `cuInit`.
fn early(name: &'static str, body: impl FnOnce() -> Answer) -> Code {
    let guarded = || match sim::faults() {
        None => Err(Code::SYSTEM_NOT_READY),
        Some(faults) => faults.called(name).map_or_else(body, Err),
    };
    finish(name, guarded)
}

fn finish(name: &'static str, body: impl FnOnce() -> Answer) -> Code {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or(Err(Code::UNKNOWN));
    let code = result.err().unwrap_or(Code::SUCCESS);
    sim::trace(name, code);
    code
}

/// A call that answers when it is done. A fault with a sticky code ends the current context.
fn call(name: &'static str, body: impl FnOnce(&'static Sim) -> Answer) -> Code {
    finish(name, || {
        let sim = sim::get()?;
        match sim::faults().and_then(|faults| faults.called(name)) {
            None => body(sim),
            Some(code) => {
                if let Some(context) = sim.current().ok().filter(|_| code.is_sticky()) {
                    context.run(|| Err(code));
                }
                Err(code)
            }
        }
    })
}

/// Whether the caller of a function goes on before the work that it submits is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    No,
    Yes,
}

/// A call that submits work to a stream, and does not wait for it.
fn submit(
    name: &'static str,
    stream: usize,
    body: impl FnOnce(&'static Sim, &Arc<Context>, Option<&Arc<Stream>>) -> Answer,
) -> Code {
    submit_and(name, stream, Wait::No, body)
}

/// A call that submits work to a stream; `body` waits for it if `wait` says so. A fault with a sticky code is submitted in its place, as what is wrong with work
/// shows only when it is done.
fn submit_and(
    name: &'static str,
    stream: usize,
    wait: Wait,
    body: impl FnOnce(&'static Sim, &Arc<Context>, Option<&Arc<Stream>>) -> Answer,
) -> Code {
    finish(name, || {
        let sim = sim::get()?;
        let (context, stream) = target(sim, stream)?;
        match sim::faults().and_then(|faults| faults.called(name)) {
            None => body(sim, &context, stream.as_ref()),
            Some(code) if code.is_sticky() => give(&context, stream.as_ref(), Work::Fail(code), wait),
            Some(code) => Err(code),
        }
    })
}

/// Submits work, and waits for it if that is asked.
fn give(context: &Arc<Context>, stream: Option<&Arc<Stream>>, work: Work, wait: Wait) -> Answer {
    let mark = context.submit(stream, work, Vec::new())?;
    if wait == Wait::No {
        return Ok(());
    }
    mark.wait();
    context.check()
}

/// `CU_STREAM_LEGACY`: the NULL stream by another name.
const STREAM_LEGACY: usize = 1;
/// `CU_STREAM_PER_THREAD`: not simulated.
const STREAM_PER_THREAD: usize = 2;

/// The stream of a handle (none: the NULL stream) and its context, for an operation on its device.
fn target(sim: &Sim, stream: usize) -> Answer<(Arc<Context>, Option<Arc<Stream>>)> {
    match stream {
        0 | STREAM_LEGACY => Ok((sim.usable()?, None)),
        STREAM_PER_THREAD => Err(Code::NOT_SUPPORTED),
        handle => {
            let stream = sim.handles().streams.get(&handle).cloned().ok_or(Code::INVALID_HANDLE)?;
            stream.context.check()?;
            stream.context.device.touch()?;
            Ok((Arc::clone(&stream.context), Some(stream)))
        }
    }
}
