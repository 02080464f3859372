//! RDMA verbs for Lodestream: `liblodestream_verbs.so`, which links libibverbs so that Lodestream itself need not.
//!
//! One function is exported, [`lodestream_verbs_table`]. Behind it everything is as thin as can be: arguments become the structures
//! of libibverbs, results become numbers. Who owns what, and until when, is the business of `src/sys/verbs`, which is the only
//! caller and upholds what the table asks for (`lodestream_verbs_abi`).
//!
//! Traps of the bindings that are met here: `ibv_query_port` fills an old structure (`___ibv_query_port` does not); plain
//! `ibv_reg_mr` does not pass optional access flags; `ibv_alloc_mw` gives `Some(null)` when it fails; kinds of asynchronous events
//! are a Rust enum, which a newer kernel's number would not be one of, so they are read as a number.

mod device;
mod memory;
mod queue;

use std::ffi::c_int;
use std::mem::MaybeUninit;

use lodestream_verbs_abi::{Table, VERSION};

static TABLE: Table = Table {
    version: VERSION,
    bytes: size_of::<Table>() as u32,
    devices: device::devices,
    open: device::open,
    close: device::close,
    query_device: device::query_device,
    query_port: device::query_port,
    query_gid: device::query_gid,
    async_descriptor: device::async_descriptor,
    take_async_event: device::take_async_event,
    create_domain: memory::create_domain,
    destroy_domain: memory::destroy_domain,
    create_channel: queue::create_channel,
    destroy_channel: queue::destroy_channel,
    take_event: queue::take_event,
    create_queue: queue::create_queue,
    destroy_queue: queue::destroy_queue,
    arm: queue::arm,
    poll: queue::poll,
    register: memory::register,
    register_dmabuf: memory::register_dmabuf,
    deregister: memory::deregister,
    create_pair: queue::create_pair,
    initialise: queue::initialise,
    connect: queue::connect,
    fail: queue::fail,
    destroy_pair: queue::destroy_pair,
    post: queue::post,
    create_window: memory::create_window,
    destroy_window: memory::destroy_window,
    bind_window: queue::bind_window,
    invalidate: queue::invalidate,
};

/// The table of version `version`, or null.
#[unsafe(no_mangle)]
pub extern "C" fn lodestream_verbs_table(version: u32) -> *const Table {
    if version == VERSION { &TABLE } else { std::ptr::null() }
}

/// A number of errno from what most verbs answer: 0, a number of errno, or -1 with errno set.
fn code(answer: c_int) -> i32 {
    if answer < 0 { errno() } else { answer }
}

/// The calling thread's errno, EIO if a function failed without setting it.
fn errno() -> i32 {
    match std::io::Error::last_os_error().raw_os_error() {
        Some(number) if number != 0 => number,
        _ => libc::EIO,
    }
}

/// Stores a pointer that a verb has made, or tells why it has made none.
///
/// # Safety
/// `place` is valid for writing.
unsafe fn store<T, U>(made: *mut T, place: *mut *mut U) -> i32 {
    if made.is_null() {
        return errno();
    }
    // SAFETY: what this function asks of its caller.
    unsafe { place.write(made.cast()) };
    0
}

/// Structures of libibverbs for which all zeros are a value.
///
/// # Safety
/// The type consists of numbers and pointers that may be null.
unsafe trait Plain: Sized {
    fn zeroed() -> Self {
        // SAFETY: all zeros are a value of such a type (the implementor's promise).
        unsafe { MaybeUninit::zeroed().assume_init() }
    }
}

macro_rules! plain {
    ($($name:ident)*) => {
        $(
            // SAFETY: numbers, and pointers without a promise, in `verbs.h`.
            unsafe impl Plain for rdma_sys::$name {}
        )*
    };
}

plain! { ibv_device_attr ibv_port_attr ibv_qp_init_attr ibv_qp_attr ibv_send_wr ibv_sge ibv_wc ibv_gid }
