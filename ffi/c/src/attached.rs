//! Attaching, and the table of tensors.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;

use lodestream::api::methods::{AttachRequest, Selector};
use lodestream::client::{Attached, Data};
use lodestream::{Code, Error, Result};
use serde::Deserialize;

use crate::error::{guard, string};
use crate::{host, lodestream_client, named, null, text};

/// An artifact that is mapped into this process. Independent of the client that it came by.
#[derive(Debug)]
pub struct lodestream_attached {
    attached: Attached,
    /// Name and type of each tensor, as C has them.
    names: Vec<(CString, CString)>,
}

/// One tensor. Its pointers are valid until what it belongs to is freed.
#[repr(C)]
#[derive(Debug)]
pub struct lodestream_tensor {
    /// Its name.
    pub name: *const c_char,
    /// safetensors' name of the type ("BF16"), or GGUF's ("Q4_K").
    pub dtype: *const c_char,
    /// Length of each dimension, slowest first; of the slice, if it is one.
    pub shape: *const u64,
    /// Number of dimensions; 0 for a scalar.
    pub rank: usize,
    /// Its bytes, row-major, read-only; NULL if they are on a GPU.
    pub data: *const c_void,
    /// Its address on its GPU; 0 if it is in this process.
    pub device_address: u64,
    /// Its length, bytes.
    pub nbytes: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    #[serde(default = "host")]
    device: String,
    #[serde(default)]
    select: Option<Vec<Selector>>,
    #[serde(default = "yes")]
    wait: bool,
    #[serde(default)]
    verify: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { device: host(), select: None, wait: true, verify: false }
    }
}

fn yes() -> bool {
    true
}

/// Attaches to what `source` names: an absolute path, a file:// URI, or the digest ("sha256:…") of what is resident. Loads it
/// first if it must.
///
/// `options` is NULL or a JSON object with any of: "device" ("host", or "gpu:" and a UUID), "select" (a list of globs over tensor names, or of
/// {"name", "dim", "of", "index"}), "wait" (false: fail instead of loading), "verify". To be freed with
/// lodestream_attached_free(). NULL on failure.
///
/// # Safety
/// `client` is NULL or open; `source` and `options` are NULL or strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_attach(
    client: *mut lodestream_client,
    source: *const c_char,
    options: *const c_char,
) -> *mut lodestream_attached {
    guard(ptr::null_mut(), || {
        // SAFETY: the caller says so.
        let client = unsafe { crate::client(client) }?;
        // SAFETY: the caller says so.
        let (source, digest) = named(unsafe { text(source, "source") }?);
        // SAFETY: the caller says so.
        let Options { device, select, wait, verify } = unsafe { crate::options(options) }?;
        let request = AttachRequest { source, digest, device, select, wait, verify, notify: false };
        let attached = client.attach(&request, &[], &mut |_| ())?;
        let names = attached.tensors().map(|tensor| (string(tensor.name), string(tensor.dtype))).collect();
        Ok(Box::into_raw(Box::new(lodestream_attached { attached, names })))
    })
}

/// Gives the lease back, so that the daemon may evict the artifact. What is attached stays readable until it is freed.
///
/// 0, or -1: `lease.not_found` if it was given back before, or came by another client.
///
/// # Safety
/// `client` is NULL or open; `attached` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_release(
    client: *mut lodestream_client,
    attached: *const lodestream_attached,
) -> c_int {
    guard(-1, || {
        // SAFETY: the caller says so.
        let client = unsafe { crate::client(client) }?;
        // SAFETY: the caller says so.
        let attached = unsafe { reference(attached) }?;
        client.release(attached.attached.lease())?;
        Ok(0)
    })
}

/// Unmaps what is attached. Its lease lasts until it is given back or its client is closed. NULL is ignored.
///
/// # Safety
/// `attached` is NULL or came from lodestream_attach(), and neither it nor its tensors are used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_attached_free(attached: *mut lodestream_attached) {
    guard((), || {
        if !attached.is_null() {
            // SAFETY: the caller says that it came from `Box::into_raw` in `lodestream_attach` and is not used any more.
            drop(unsafe { Box::from_raw(attached) });
        }
        Ok(())
    });
}

/// How many tensors there are; 0 for NULL.
///
/// # Safety
/// `attached` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_tensor_count(attached: *const lodestream_attached) -> usize {
    guard(0, || {
        // SAFETY: the caller says so.
        Ok(unsafe { reference(attached) }?.names.len())
    })
}

/// Describes the tensor with this number, from 0, in the daemon's order. 0, or -1.
///
/// # Safety
/// `attached` is NULL or not freed; `tensor` is NULL or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_tensor_at(
    attached: *const lodestream_attached,
    index: usize,
    tensor: *mut lodestream_tensor,
) -> c_int {
    guard(-1, || {
        // SAFETY: the caller says so.
        let attached = unsafe { reference(attached) }?;
        let view = view(attached, index)?;
        // SAFETY: the caller says so.
        unsafe { put(tensor, view) }
    })
}

/// Describes the tensor with this name. 0, or -1 if there is none.
///
/// # Safety
/// `attached` is NULL or not freed; `name` is NULL or a string; `tensor` is NULL or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lodestream_tensor_by_name(
    attached: *const lodestream_attached,
    name: *const c_char,
    tensor: *mut lodestream_tensor,
) -> c_int {
    guard(-1, || {
        // SAFETY: the caller says so.
        let attached = unsafe { reference(attached) }?;
        // SAFETY: the caller says so.
        let name = unsafe { text(name, "name") }?;
        let index = attached.attached.index_of(name);
        let index =
            index.ok_or_else(|| Error::new(Code::SelectNoMatch, format!("there is no tensor {name:?}")))?;
        let view = view(attached, index)?;
        // SAFETY: the caller says so.
        unsafe { put(tensor, view) }
    })
}

/// # Safety
/// `attached` is null or from [`lodestream_attach`], and not freed during `'a`.
unsafe fn reference<'a>(attached: *const lodestream_attached) -> Result<&'a lodestream_attached> {
    // SAFETY: what this function asks of its caller.
    unsafe { attached.as_ref() }.ok_or_else(|| null("attached"))
}

/// # Safety
/// `place` is null or may be written to.
unsafe fn put(place: *mut lodestream_tensor, tensor: lodestream_tensor) -> Result<c_int> {
    if place.is_null() {
        return Err(null("tensor"));
    }
    // SAFETY: not null; what this function asks of its caller.
    unsafe { place.write(tensor) };
    Ok(0)
}

fn view(of: &lodestream_attached, index: usize) -> Result<lodestream_tensor> {
    let none = || {
        Error::new(Code::ApiBadParams, format!("there is no tensor {index}: there are {}", of.names.len()))
    };
    let (name, dtype) = of.names.get(index).ok_or_else(none)?;
    let tensor = of.attached.tensor_at(index).ok_or_else(none)?;
    let data = match tensor.data {
        Data::Host(bytes) => bytes.as_ptr().cast(),
        Data::Gpu(..) => ptr::null(),
    };
    Ok(lodestream_tensor {
        name: name.as_ptr(),
        dtype: dtype.as_ptr(),
        shape: tensor.shape.as_ptr(),
        rank: tensor.shape.len(),
        data,
        device_address: tensor.device_address().unwrap_or(0),
        nbytes: tensor.nbytes,
    })
}
