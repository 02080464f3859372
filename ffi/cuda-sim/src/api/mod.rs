//! The exported functions, under the names that the real library has.
//!
//! Handles are numbers and every pointer is checked for null; beyond that a caller is trusted as the real driver trusts
//! it: an address of host memory must be one.

mod copy;
mod device;
mod memory;
mod module;
mod stream;

use std::cell::Cell;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::code::{self, Outcome};
use crate::machine::{DeviceState, Machine, machine};
use crate::stream::{Handles, Stream};

thread_local! {
    /// The current context of this thread: the place of its device plus one; 0: none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// All streams of this process.
static STREAMS: Handles<Stream> = Handles::new();

/// Carries out one call of the API: injects what is to fail, keeps panics inside, traces.
fn call(name: &'static str, act: impl FnOnce() -> Outcome) -> u32 {
    let machine = machine().ok();
    let result = match machine.and_then(|machine| machine.fault(name)) {
        Some(code) => {
            if code::is_sticky(code)
                && let Ok((_, device)) = current()
            {
                device.sticky.store(code, Ordering::Release);
            }
            Err(code)
        }
        None => catch_unwind(AssertUnwindSafe(act)).unwrap_or(Err(code::UNKNOWN)),
    };
    let code = result.err().unwrap_or(0);
    if let Some(path) = machine.and_then(|machine| machine.config.trace.as_deref())
        && let Ok(mut file) = std::fs::File::options().append(true).create(true).open(path)
    {
        // A trace that cannot be written changes nothing else.
        let _ = file.write_all(format!("{name} {code}\n").as_bytes());
    }
    code
}

/// The current device, whatever state it is in.
fn current() -> Outcome<(usize, &'static DeviceState)> {
    let machine = machine()?;
    let index = CURRENT.get().checked_sub(1).ok_or(code::INVALID_CONTEXT)?;
    machine.devices.get(index).map(|device| (index, device)).ok_or(code::INVALID_CONTEXT)
}

/// The current device, if its context has met no error.
fn healthy() -> Outcome<(&'static Machine, usize, &'static DeviceState)> {
    let (index, device) = current()?;
    let machine = machine()?;
    if let Some(code) = machine.fault(&format!("device:{index}")) {
        device.sticky.store(code, Ordering::Release);
    }
    match device.sticky.load(Ordering::Acquire) {
        0 => Ok((machine, index, device)),
        code => Err(code),
    }
}

/// A stream by its handle; 0, 1 and 2 are the default stream of the current device.
fn stream(handle: usize) -> Outcome<Arc<Stream>> {
    match handle {
        0..=2 => {
            let (machine, index, _) = healthy()?;
            Ok(machine.default_stream(index))
        }
        handle => STREAMS.get(handle).ok_or(code::INVALID_HANDLE),
    }
}

/// Writes a result to where the caller wants it.
fn give<T>(place: *mut T, value: T) -> Outcome {
    if place.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: not null, and the caller says by the API's contract that it is a place for a `T`.
    unsafe { place.write_unaligned(value) };
    Ok(())
}

/// Reads what the caller points at.
fn take<T: Copy>(place: *const T) -> Outcome<T> {
    if place.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: not null, and the caller says by the API's contract that it is a `T`.
    Ok(unsafe { place.read_unaligned() })
}

/// Defines exported functions: each body is an [`Outcome`].
macro_rules! export {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        // SAFETY: the name is the real library's; a process loads one of the two.
        #[unsafe(no_mangle)]
        #[allow(
            non_snake_case,
            missing_docs,
            unreachable_pub,
            private_interfaces,
            clippy::not_unsafe_ptr_arg_deref,
            clippy::too_many_arguments,
            reason = "the API of a C library"
        )]
        pub extern "C" fn $name($($argument: $type),*) -> u32 {
            $crate::api::call(stringify!($name), || $body)
        }
    )*};
}
use export;
