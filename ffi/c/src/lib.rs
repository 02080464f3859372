//! The C ABI of Lodestream's client. `include/lodestream.h` is generated from here; a test compares the two.
//!
//! Upholds invariant 1: a pointer from C is looked at in `unsafe` blocks only, and each says who upholds it. Nothing unwinds into C:
//! every function runs in `error::guard` (a release build aborts at a panic anyway).
#![allow(non_camel_case_types, reason = "names as C has them")]

pub mod attached;
pub mod error;
pub mod prefetch;

use std::ffi::{CStr, c_char};
use std::path::Path;

use lodestream::api::methods::Source;
use lodestream::client::Client;
use lodestream::config::Config;
use lodestream::{Code, Error, Result};

use error::guard;

/// Version of the library.
const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => c"",
};

/// A connection to the daemon. Leases end with it.
#[derive(Debug)]
pub struct lodestream_client {
    client: Client,
}

/// The version of this library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn lodestream_version() -> *const c_char {
    VERSION.as_ptr()
}

/// Connects to the daemon that listens at `socket`; NULL is "/run/lodestream/lodestream.sock".
///
/// To be closed with lodestream_close(). NULL on failure: `client.connect`.
///
/// # Safety
/// `socket` is NULL or a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_connect(socket: *const c_char) -> *mut lodestream_client {
    guard(std::ptr::null_mut(), || {
        let client = if socket.is_null() {
            Client::connect(&Config::default().socket)
        } else {
            // SAFETY: not null; the caller says that it is a string.
            Client::connect(Path::new(unsafe { text(socket, "socket") }?))
        }?;
        Ok(Box::into_raw(Box::new(lodestream_client { client })))
    })
}

/// Closes a connection; its leases end. What is attached stays readable. NULL is ignored.
///
/// # Safety
/// `client` is NULL or came from lodestream_connect(), and is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_close(client: *mut lodestream_client) {
    guard((), || {
        if !client.is_null() {
            // SAFETY: the caller says that it came from `Box::into_raw` in `lodestream_connect` and is not used any more.
            drop(unsafe { Box::from_raw(client) });
        }
        Ok(())
    });
}

/// The client behind a pointer.
///
/// # Safety
/// `client` is null or from [`lodestream_connect`], not closed, and used by nobody else for `'a`.
unsafe fn client<'a>(client: *mut lodestream_client) -> Result<&'a mut Client> {
    // SAFETY: what this function asks of its caller.
    match unsafe { client.as_mut() } {
        Some(client) => Ok(&mut client.client),
        None => Err(null("client")),
    }
}

/// The string behind a pointer.
///
/// # Safety
/// `pointer` is null or points to a string that stays as it is for `'a`.
unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(null(what));
    }
    // SAFETY: not null, and a string: what this function asks of its caller.
    let string = unsafe { CStr::from_ptr(pointer) };
    string.to_str().map_err(|_| Error::new(Code::ApiBadParams, format!("{what} is not UTF-8")))
}

fn null(what: &str) -> Error {
    Error::new(Code::ApiBadParams, format!("{what} is NULL"))
}

/// Options that came as JSON, or as nothing.
///
/// # Safety
/// As [`text`].
unsafe fn options<T: Default + for<'d> serde::Deserialize<'d>>(pointer: *const c_char) -> Result<T> {
    if pointer.is_null() {
        return Ok(T::default());
    }
    // SAFETY: as this function.
    let json = unsafe { text(pointer, "options") }?;
    serde_json::from_str(json)
        .map_err(|error| Error::new(Code::ApiBadParams, format!("the options are not understood: {error}")))
}

/// A source, or a digest (`sha256:…`) of what is resident.
fn named(text: &str) -> (Option<Source>, Option<String>) {
    if text.starts_with("sha256:") {
        (None, Some(text.to_owned()))
    } else {
        (Some(Source::Uri(text.to_owned())), None)
    }
}

fn host() -> String {
    "host".to_owned()
}
