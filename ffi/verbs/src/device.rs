//! Devices, their ports and what happens to them.

use std::ffi::{CStr, c_int};
use std::mem::MaybeUninit;
use std::ptr::{addr_of, addr_of_mut};

use lodestream_verbs_abi::{
    AsyncEvent, Context, DeviceAttributes, DeviceName, NAME_BYTES, PortAttributes, transport,
};
use rdma_sys::{
    ibv_ack_async_event, ibv_async_event, ibv_close_device, ibv_context, ibv_device, ibv_device_attr,
    ibv_device_cap_flags, ibv_free_device_list, ibv_get_async_event, ibv_get_device_list,
    ibv_get_device_name, ibv_gid, ibv_mtu, ibv_open_device, ibv_port_attr, ibv_query_device, ibv_query_gid,
};

use crate::{Plain, code, errno, store};

/// `IBV_EVENT_PORT_ACTIVE` … `SM_CHANGE`, `CLIENT_REREGISTER`, `GID_CHANGE`: the events whose element is a port.
const PORT_EVENTS: [u32; 7] = [9, 10, 11, 12, 13, 17, 18];

/// The list of devices, given back on drop.
struct Devices {
    list: *mut *mut ibv_device,
    count: usize,
}

impl Devices {
    fn new() -> Result<Devices, i32> {
        let mut count: c_int = 0;
        // SAFETY: `count` lives through the call.
        let list = unsafe { ibv_get_device_list(&mut count) };
        if list.is_null() {
            return Err(errno());
        }
        Ok(Devices { list, count: usize::try_from(count).unwrap_or(0) })
    }

    fn all(&self) -> &[*mut ibv_device] {
        // SAFETY: libibverbs gave a list of so many devices, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.list, self.count) }
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // SAFETY: the list came from `ibv_get_device_list`; no device of it is used any more, other than opened.
        unsafe { ibv_free_device_list(self.list) };
    }
}

/// # Safety
/// `device` is one of a list that lives for `'a`.
unsafe fn name<'a>(device: *mut ibv_device) -> Option<&'a CStr> {
    // SAFETY: what this function asks of its caller.
    let name = unsafe { ibv_get_device_name(device) };
    if name.is_null() {
        return None;
    }
    // SAFETY: a string inside the device, which lives as long as it.
    Some(unsafe { CStr::from_ptr(name) })
}

pub(crate) unsafe extern "C" fn devices(names: *mut DeviceName, capacity: u32, count: *mut u32) -> i32 {
    let devices = match Devices::new() {
        Ok(devices) => devices,
        Err(code) => return code,
    };
    for (place, device) in devices.all().iter().take(capacity as usize).enumerate() {
        let mut out = DeviceName { bytes: [0; NAME_BYTES] };
        // SAFETY: the list lives until this function ends.
        if let Some(name) = unsafe { name(*device) } {
            // The last byte stays NUL.
            for (to, from) in out.bytes[..NAME_BYTES - 1].iter_mut().zip(name.to_bytes()) {
                *to = *from;
            }
        }
        // SAFETY: `place` is below `capacity`, and the caller has room for so many.
        let target = unsafe { names.add(place) };
        // SAFETY: as above.
        unsafe { target.write(out) };
    }
    // SAFETY: the caller's place for the result.
    unsafe { count.write(devices.count as u32) };
    0
}

pub(crate) unsafe extern "C" fn open(wanted: *const DeviceName, context: *mut *mut Context) -> i32 {
    // SAFETY: the caller gives a name that lives through the call.
    let wanted = unsafe { &*wanted };
    let Ok(wanted) = CStr::from_bytes_until_nul(&wanted.bytes) else { return libc::EINVAL };
    let devices = match Devices::new() {
        Ok(devices) => devices,
        Err(code) => return code,
    };
    // SAFETY: the list lives until this function ends.
    let found = devices.all().iter().find(|device| unsafe { name(**device) } == Some(wanted));
    let Some(device) = found else { return libc::ENODEV };
    // SAFETY: a device of a list that is still there.
    let opened = unsafe { ibv_open_device(*device) };
    // SAFETY: the caller's place for the result.
    unsafe { store(opened, context) }
}

pub(crate) unsafe extern "C" fn close(context: *mut Context) -> i32 {
    // SAFETY: the caller gives back what `open` made, when all that was made of it is gone.
    code(unsafe { ibv_close_device(context.cast()) })
}

pub(crate) unsafe extern "C" fn query_device(
    context: *mut Context,
    attributes: *mut DeviceAttributes,
) -> i32 {
    let context = context.cast::<ibv_context>();
    let mut found = ibv_device_attr::zeroed();
    // SAFETY: the context is open; `found` lives through the call.
    let answer = unsafe { ibv_query_device(context, &mut found) };
    if answer != 0 {
        return code(answer);
    }
    // SAFETY: an open context has its device.
    let device = unsafe { (*context).device };
    // SAFETY: as above; the device lives as long as a context of it.
    let kind = unsafe { (*device).transport_type };
    let number = |value: c_int| u32::try_from(value).unwrap_or(0);
    let windows = ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW_TYPE_2A.0
        | ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW_TYPE_2B.0;
    let out = DeviceAttributes {
        ports: found.phys_port_cnt.into(),
        transport: match kind {
            0 => transport::IB,
            1 => transport::IWARP,
            _ => transport::OTHER,
        },
        depth_max: number(found.max_qp_wr).min(number(found.max_cqe)),
        initiator_depth: number(found.max_qp_init_rd_atom),
        responder_resources: number(found.max_qp_rd_atom),
        windows: u32::from(found.device_cap_flags & windows != 0),
    };
    // SAFETY: the caller's place for the result.
    unsafe { attributes.write(out) };
    0
}

pub(crate) unsafe extern "C" fn query_port(
    context: *mut Context,
    port: u8,
    attributes: *mut PortAttributes,
) -> i32 {
    let mut found = ibv_port_attr::zeroed();
    // SAFETY: the context is open; `found` is of the newest form, lives through the call and was cleared for older ones.
    let answer = unsafe { rdma_sys::___ibv_query_port(context.cast(), port, &mut found) };
    if answer != 0 {
        return code(answer);
    }
    let out = PortAttributes {
        state: found.state,
        mtu: match found.active_mtu {
            ibv_mtu::IBV_MTU_256 => 256,
            ibv_mtu::IBV_MTU_512 => 512,
            ibv_mtu::IBV_MTU_1024 => 1024,
            ibv_mtu::IBV_MTU_2048 => 2048,
            ibv_mtu::IBV_MTU_4096 => 4096,
            _ => 0,
        },
        gids: u32::try_from(found.gid_tbl_len).unwrap_or(0),
        lid: found.lid.into(),
        link_layer: found.link_layer.into(),
    };
    // SAFETY: the caller's place for the result.
    unsafe { attributes.write(out) };
    0
}

pub(crate) unsafe extern "C" fn query_gid(
    context: *mut Context,
    port: u8,
    index: u32,
    gid: *mut [u8; 16],
) -> i32 {
    let Ok(index) = c_int::try_from(index) else { return libc::EINVAL };
    let mut found = ibv_gid::zeroed();
    // SAFETY: the context is open; `found` lives through the call.
    let answer = unsafe { ibv_query_gid(context.cast(), port, index, &mut found) };
    if answer != 0 {
        return code(answer);
    }
    // SAFETY: any 16 bytes are a GID.
    let raw = unsafe { found.raw };
    // SAFETY: the caller's place for the result.
    unsafe { gid.write(raw) };
    0
}

pub(crate) unsafe extern "C" fn async_descriptor(context: *mut Context) -> i32 {
    // SAFETY: the context is open.
    unsafe { (*context.cast::<ibv_context>()).async_fd }
}

pub(crate) unsafe extern "C" fn take_async_event(context: *mut Context, event: *mut AsyncEvent) -> i32 {
    let mut found = MaybeUninit::<ibv_async_event>::zeroed();
    // SAFETY: the context is open; `found` lives through the call.
    let answer = unsafe { ibv_get_async_event(context.cast(), found.as_mut_ptr()) };
    if answer != 0 {
        return errno();
    }
    let found = found.as_mut_ptr();
    // SAFETY: inside `found`; no reference is made to what may be no value of the enum.
    let kind = unsafe { addr_of!((*found).event_type) };
    // SAFETY: filled by libibverbs with a number of this size.
    let kind = unsafe { kind.cast::<u32>().read() };
    let mut port = 0;
    if PORT_EVENTS.contains(&kind) {
        // SAFETY: inside `found`.
        let element = unsafe { addr_of_mut!((*found).element) };
        // SAFETY: of these events the element is the number of a port; all bits of it were written.
        port = u32::try_from(unsafe { element.cast::<c_int>().read() }).unwrap_or(0);
    }
    // SAFETY: the event that was just taken, acknowledged once.
    unsafe { ibv_ack_async_event(found) };
    // SAFETY: the caller's place for the result.
    unsafe { event.write(AsyncEvent { kind, port }) };
    0
}
