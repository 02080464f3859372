//! The last error of each thread.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use lodestream::{Code, Error, Result};

thread_local! {
    static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
}

struct Last {
    code: CString,
    message: CString,
    retryable: bool,
}

impl Last {
    fn of(error: &Error) -> Last {
        Last {
            code: string(error.code.as_str()),
            message: string(&error.message),
            retryable: error.code.retryable(),
        }
    }
}

/// As C has it. A zero byte, which would end it, is left out.
pub(crate) fn string(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

/// Runs what a function does: its result, or `failed`, and the error for who asks.
pub(crate) fn guard<T>(failed: T, body: impl FnOnce() -> Result<T>) -> T {
    // What a panic leaves half done is a client or an object that its owner can still only close.
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        Err(Error::new(
            Code::Internal,
            "a defect of the library: close the client, and report what was said on stderr",
        ))
    });
    let (value, last) = match outcome {
        Ok(value) => (value, None),
        Err(error) => (failed, Some(Last::of(&error))),
    };
    // A thread that ends has no place for it any more.
    let _ = LAST.try_with(|cell| *cell.borrow_mut() = last);
    value
}

fn last<T>(none: T, of: impl FnOnce(&Last) -> T) -> T {
    LAST.try_with(|cell| cell.borrow().as_ref().map(of)).ok().flatten().unwrap_or(none)
}

/// The stable code of the error of this thread's last call ("source.file.not_found"); NULL if it did not fail.
#[unsafe(no_mangle)]
pub extern "C" fn lodestream_error_code() -> *const c_char {
    last(std::ptr::null(), |last| last.code.as_ptr())
}

/// What happened and what to do, for people; NULL if this thread's last call did not fail. Not to be printed to a terminal
/// unescaped: it may have names of files in it.
#[unsafe(no_mangle)]
pub extern "C" fn lodestream_error_message() -> *const c_char {
    last(std::ptr::null(), |last| last.message.as_ptr())
}

/// Whether the call that failed may succeed later as it is.
#[unsafe(no_mangle)]
pub extern "C" fn lodestream_error_retryable() -> bool {
    last(false, |last| last.retryable)
}
