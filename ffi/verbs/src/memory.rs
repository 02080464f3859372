//! Protection domains, registered memory and memory windows.

use std::ffi::{c_int, c_uint, c_void};

use lodestream_verbs_abi::{Context, Domain, Memory, Registration, Window, access};
use rdma_sys::{
    ibv_access_flags, ibv_alloc_mw, ibv_alloc_pd, ibv_dealloc_mw, ibv_dealloc_pd, ibv_dereg_mr, ibv_mr,
    ibv_mw, ibv_mw_type, ibv_reg_dmabuf_mr, ibv_reg_mr_iova2,
};

use crate::{code, errno, store};

/// The flags of libibverbs for bits of [`access`].
pub(crate) fn flags(bits: u32) -> c_uint {
    [
        (access::LOCAL_WRITE, ibv_access_flags::IBV_ACCESS_LOCAL_WRITE),
        (access::REMOTE_WRITE, ibv_access_flags::IBV_ACCESS_REMOTE_WRITE),
        (access::REMOTE_READ, ibv_access_flags::IBV_ACCESS_REMOTE_READ),
        (access::WINDOW, ibv_access_flags::IBV_ACCESS_MW_BIND),
        (access::RELAXED_ORDERING, ibv_access_flags::IBV_ACCESS_RELAXED_ORDERING),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |flags, (_, flag)| flags | flag.0)
}

pub(crate) unsafe extern "C" fn create_domain(context: *mut Context, domain: *mut *mut Domain) -> i32 {
    // SAFETY: the context is open.
    let made = unsafe { ibv_alloc_pd(context.cast()) };
    // SAFETY: the caller's place for the result.
    unsafe { store(made, domain) }
}

pub(crate) unsafe extern "C" fn destroy_domain(domain: *mut Domain) -> i32 {
    // SAFETY: the caller gives it back when nothing of it is left; libibverbs refuses otherwise.
    code(unsafe { ibv_dealloc_pd(domain.cast()) })
}

pub(crate) unsafe extern "C" fn register(
    domain: *mut Domain,
    address: *mut c_void,
    bytes: usize,
    access: u32,
    registration: *mut Registration,
) -> i32 {
    // SAFETY: the caller keeps the range mapped until it gives the registration back.
    let made = unsafe { ibv_reg_mr_iova2(domain.cast(), address, bytes, address as u64, flags(access)) };
    // SAFETY: the caller's place for the result.
    unsafe { registered(made, registration) }
}

pub(crate) unsafe extern "C" fn register_dmabuf(
    domain: *mut Domain,
    descriptor: i32,
    bytes: usize,
    access: u32,
    registration: *mut Registration,
) -> i32 {
    let (offset, first) = (0, 0);
    // Relaxed ordering is not among the flags that this call takes.
    let access = flags(access & !access::RELAXED_ORDERING) as c_int;
    // SAFETY: takes numbers; the kernel looks at the descriptor and keeps the memory behind it.
    let made = unsafe { ibv_reg_dmabuf_mr(domain.cast(), offset, bytes, first, descriptor, access) };
    // SAFETY: the caller's place for the result.
    unsafe { registered(made, registration) }
}

/// # Safety
/// `memory` is null or was just made; `registration` is valid for writing.
unsafe fn registered(memory: *mut ibv_mr, registration: *mut Registration) -> i32 {
    if memory.is_null() {
        return errno();
    }
    // SAFETY: not null, so libibverbs has filled it.
    let lkey = unsafe { (*memory).lkey };
    // SAFETY: as above.
    let rkey = unsafe { (*memory).rkey };
    // SAFETY: the caller's place for the result.
    unsafe { registration.write(Registration { memory: memory.cast(), lkey, rkey }) };
    0
}

pub(crate) unsafe extern "C" fn deregister(memory: *mut Memory) -> i32 {
    // SAFETY: the caller gives back what was registered, once.
    code(unsafe { ibv_dereg_mr(memory.cast()) })
}

pub(crate) unsafe extern "C" fn create_window(
    domain: *mut Domain,
    window: *mut *mut Window,
    rkey: *mut u32,
) -> i32 {
    // SAFETY: the domain is there.
    let made = unsafe { ibv_alloc_mw(domain.cast(), ibv_mw_type::IBV_MW_TYPE_2) };
    let made: *mut ibv_mw = made.unwrap_or(std::ptr::null_mut());
    if made.is_null() {
        return errno();
    }
    // SAFETY: not null, so libibverbs has filled it.
    let key = unsafe { (*made).rkey };
    // SAFETY: the caller's place for the result.
    unsafe { rkey.write(key) };
    // SAFETY: likewise.
    unsafe { store(made, window) }
}

pub(crate) unsafe extern "C" fn destroy_window(window: *mut Window) -> i32 {
    // SAFETY: the caller gives back what `create_window` made, once.
    code(unsafe { ibv_dealloc_mw(window.cast()) })
}
