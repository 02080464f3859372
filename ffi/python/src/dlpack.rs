//! DLPack capsules over memory that Lodestream has mapped: how a framework takes it in without a copy.
//!
//! The layout is that of DLPack before version 1.0, which every framework reads. Memory is exported as bytes; the
//! package gives them their type. The capsule, and what is made of it, keeps the mapping alive.

use std::ffi::c_void;
use std::ptr::NonNull;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use crate::attached::Memory;

const CPU: i32 = 1;
const CUDA: i32 = 2;
const UNSIGNED: u8 = 1;

#[repr(C)]
#[allow(dead_code, reason = "it is read by whoever takes the capsule over; so with the others")]
struct Device {
    kind: i32,
    ordinal: i32,
}

#[repr(C)]
#[allow(dead_code, reason = "as above")]
struct Type {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
#[allow(dead_code, reason = "as above")]
struct Tensor {
    data: *mut c_void,
    device: Device,
    dimensions: i32,
    dtype: Type,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
#[allow(dead_code, reason = "as above")]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// What a capsule points to. `managed` comes first, so that a pointer to it is one to the whole.
#[repr(C)]
struct Exported {
    managed: Managed,
    shape: [i64; 1],
    /// Kept for as long as this.
    _memory: Memory,
}

/// Bytes `offset..offset + nbytes` of a region as a capsule; `None` if they are not in it.
pub(crate) fn capsule<'py>(
    py: Python<'py>,
    memory: Memory,
    offset: u64,
    nbytes: u64,
) -> PyResult<Option<Bound<'py, PyCapsule>>> {
    let Some(address) = memory.address(offset, nbytes) else { return Ok(None) };
    let Ok(length) = i64::try_from(nbytes) else { return Ok(None) };
    let device = match memory.ordinal() {
        None => Device { kind: CPU, ordinal: 0 },
        Some(ordinal) => Device { kind: CUDA, ordinal },
    };
    let tensor = Tensor {
        data: address as *mut c_void,
        device,
        dimensions: 1,
        dtype: Type { code: UNSIGNED, bits: 8, lanes: 1 },
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let managed = Managed { tensor, context: std::ptr::null_mut(), deleter: Some(delete) };
    let mut exported = Box::new(Exported { managed, shape: [length], _memory: memory });
    // In the box it stays where it is.
    exported.managed.tensor.shape = exported.shape.as_mut_ptr();
    let raw = NonNull::from(Box::leak(exported)).cast::<c_void>();
    // SAFETY: `raw` is a `Managed` that lives until its deleter is called: by `unused`, or by whoever takes it over and
    // renames the capsule. The deleter may run on any thread, with or without the interpreter.
    let made = unsafe { PyCapsule::new_with_pointer_and_destructor(py, raw, c"dltensor", Some(unused)) };
    made.map(Some)
}

/// Frees what a capsule points to.
unsafe extern "C" fn delete(managed: *mut Managed) {
    // SAFETY: by DLPack's protocol called once, with the pointer that `capsule` leaked as the start of an `Exported`.
    drop(unsafe { Box::from_raw(managed.cast::<Exported>()) });
}

/// The end of a capsule. One that a framework took over has another name, and is the framework's to delete.
unsafe extern "C" fn unused(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter calls this with the capsule that ends.
    let mine = unsafe { ffi::PyCapsule_IsValid(capsule, c"dltensor".as_ptr()) };
    if mine == 0 {
        return;
    }
    // SAFETY: it has this name, so the pointer is the one that `capsule` gave it.
    let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, c"dltensor".as_ptr()) };
    // SAFETY: nobody took it over, so nobody else deletes it.
    unsafe { delete(managed.cast()) };
}
