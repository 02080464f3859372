//! Completion channels, completion queues and queue pairs.

use std::ffi::{c_int, c_uint};

use lodestream_verbs_abi::{
    Bind, Channel, Completion, Connection, Context, Domain, POLL_MAX, POST_MAX, Pair, Queue, Work, work,
};
use rdma_sys::{
    bind_mw_t, bind_mw_tso_union_t, ibv_ack_cq_events, ibv_comp_channel, ibv_cq, ibv_create_comp_channel,
    ibv_create_cq, ibv_create_qp, ibv_destroy_comp_channel, ibv_destroy_cq, ibv_destroy_qp, ibv_get_cq_event,
    ibv_gid, ibv_modify_qp, ibv_mtu, ibv_mw, ibv_mw_bind_info, ibv_poll_cq, ibv_post_send, ibv_qp,
    ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_req_notify_cq,
    ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wr_opcode, imm_data_invalidated_rkey_union_t, rdma_t,
    wr_t,
};

use crate::memory::flags;
use crate::{Plain, code, errno, store};

/// `min_rnr_timer` 12: 0.64 ms. Nothing that is posted here can meet a receiver that is not ready.
const RNR_TIMER: u8 = 12;
/// How often that would be tried again; 7 would be for ever.
const RNR_RETRIES: u8 = 6;
/// Routers that a packet may pass.
const HOPS: u8 = 64;

pub(crate) unsafe extern "C" fn create_channel(
    context: *mut Context,
    channel: *mut *mut Channel,
    descriptor: *mut i32,
) -> i32 {
    // SAFETY: the context is open.
    let made: *mut ibv_comp_channel = unsafe { ibv_create_comp_channel(context.cast()) };
    if made.is_null() {
        return errno();
    }
    // SAFETY: not null, so libibverbs has filled it.
    let fd = unsafe { (*made).fd };
    // SAFETY: the caller's place for the result.
    unsafe { descriptor.write(fd) };
    // SAFETY: likewise.
    unsafe { store(made, channel) }
}

pub(crate) unsafe extern "C" fn destroy_channel(channel: *mut Channel) -> i32 {
    // SAFETY: the caller gives it back when no queue tells it any more.
    code(unsafe { ibv_destroy_comp_channel(channel.cast()) })
}

pub(crate) unsafe extern "C" fn take_event(channel: *mut Channel) -> i32 {
    let mut queue: *mut ibv_cq = std::ptr::null_mut();
    let mut context = std::ptr::null_mut();
    // SAFETY: the channel is there; both places live through the call.
    if unsafe { ibv_get_cq_event(channel.cast(), &mut queue, &mut context) } != 0 {
        return errno();
    }
    // SAFETY: the queue of the event just taken: its destruction waits for this acknowledgement.
    unsafe { ibv_ack_cq_events(queue, 1) };
    0
}

pub(crate) unsafe extern "C" fn create_queue(
    context: *mut Context,
    entries: u32,
    channel: *mut Channel,
    queue: *mut *mut Queue,
) -> i32 {
    let Ok(entries) = c_int::try_from(entries) else { return libc::EINVAL };
    // SAFETY: context and channel are there; the queue has no context of its own.
    let made = unsafe { ibv_create_cq(context.cast(), entries, std::ptr::null_mut(), channel.cast(), 0) };
    // SAFETY: the caller's place for the result.
    unsafe { store(made, queue) }
}

pub(crate) unsafe extern "C" fn destroy_queue(queue: *mut Queue) -> i32 {
    // SAFETY: the caller gives it back when its queue pair is gone.
    code(unsafe { ibv_destroy_cq(queue.cast()) })
}

pub(crate) unsafe extern "C" fn arm(queue: *mut Queue) -> i32 {
    // SAFETY: the queue is there.
    code(unsafe { ibv_req_notify_cq(queue.cast(), 0) })
}

pub(crate) unsafe extern "C" fn poll(queue: *mut Queue, completions: *mut Completion, capacity: u32) -> i32 {
    let mut found: [ibv_wc; POLL_MAX] = std::array::from_fn(|_| ibv_wc::zeroed());
    let capacity = POLL_MAX.min(capacity as usize);
    // SAFETY: the queue is there; `found` has room for `capacity`.
    let count = unsafe { ibv_poll_cq(queue.cast(), capacity as i32, found.as_mut_ptr()) };
    let Ok(polled) = usize::try_from(count) else { return -errno() };
    for (place, from) in found.iter().take(polled).enumerate() {
        let out = Completion { id: from.wr_id, status: from.status, vendor_error: from.vendor_err };
        // SAFETY: below the caller's capacity.
        let target = unsafe { completions.add(place) };
        // SAFETY: as above.
        unsafe { target.write(out) };
    }
    count
}

pub(crate) unsafe extern "C" fn create_pair(
    domain: *mut Domain,
    queue: *mut Queue,
    depth: u32,
    pair: *mut *mut Pair,
    qpn: *mut u32,
) -> i32 {
    let mut attributes = ibv_qp_init_attr::zeroed();
    attributes.send_cq = queue.cast();
    attributes.recv_cq = queue.cast();
    attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
    attributes.cap.max_send_wr = depth;
    attributes.cap.max_send_sge = 1;
    // Nothing is ever received; some devices refuse a queue of none.
    attributes.cap.max_recv_wr = 1;
    attributes.cap.max_recv_sge = 1;
    // SAFETY: domain and queue are there; `attributes` lives through the call.
    let made: *mut ibv_qp = unsafe { ibv_create_qp(domain.cast(), &mut attributes) };
    if made.is_null() {
        return errno();
    }
    // SAFETY: not null, so libibverbs has filled it.
    let number = unsafe { (*made).qp_num };
    // SAFETY: the caller's place for the result.
    unsafe { qpn.write(number) };
    // SAFETY: likewise.
    unsafe { store(made, pair) }
}

/// # Safety
/// The queue pair is there.
unsafe fn modify(pair: *mut Pair, mut attributes: ibv_qp_attr, mask: ibv_qp_attr_mask) -> i32 {
    // SAFETY: what this function asks of its caller; `attributes` lives through the call.
    code(unsafe { ibv_modify_qp(pair.cast(), &mut attributes, mask.0 as c_int) })
}

pub(crate) unsafe extern "C" fn initialise(pair: *mut Pair, port: u8, access: u32) -> i32 {
    let mut attributes = ibv_qp_attr::zeroed();
    attributes.qp_state = ibv_qp_state::IBV_QPS_INIT;
    attributes.port_num = port;
    attributes.qp_access_flags = flags(access) as c_uint;
    let mask = ibv_qp_attr_mask::IBV_QP_STATE
        | ibv_qp_attr_mask::IBV_QP_PKEY_INDEX
        | ibv_qp_attr_mask::IBV_QP_PORT
        | ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS;
    // SAFETY: the queue pair is there.
    unsafe { modify(pair, attributes, mask) }
}

pub(crate) unsafe extern "C" fn connect(pair: *mut Pair, connection: *const Connection) -> i32 {
    // SAFETY: the caller's structure lives through the call.
    let connection = unsafe { &*connection };
    let (receive, send) = match (ready_to_receive(connection), ready_to_send(connection)) {
        (Some(receive), Some(send)) => (receive, send),
        _ => return libc::EINVAL,
    };
    let mask = ibv_qp_attr_mask::IBV_QP_STATE
        | ibv_qp_attr_mask::IBV_QP_AV
        | ibv_qp_attr_mask::IBV_QP_PATH_MTU
        | ibv_qp_attr_mask::IBV_QP_DEST_QPN
        | ibv_qp_attr_mask::IBV_QP_RQ_PSN
        | ibv_qp_attr_mask::IBV_QP_MAX_DEST_RD_ATOMIC
        | ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER;
    // SAFETY: the queue pair is there.
    let answer = unsafe { modify(pair, receive, mask) };
    if answer != 0 {
        return answer;
    }
    let mask = ibv_qp_attr_mask::IBV_QP_STATE
        | ibv_qp_attr_mask::IBV_QP_TIMEOUT
        | ibv_qp_attr_mask::IBV_QP_RETRY_CNT
        | ibv_qp_attr_mask::IBV_QP_RNR_RETRY
        | ibv_qp_attr_mask::IBV_QP_SQ_PSN
        | ibv_qp_attr_mask::IBV_QP_MAX_QP_RD_ATOMIC;
    // SAFETY: likewise.
    unsafe { modify(pair, send, mask) }
}

/// What INIT → RTR takes. `None`: a number is out of range.
fn ready_to_receive(connection: &Connection) -> Option<ibv_qp_attr> {
    let mut attributes = ibv_qp_attr::zeroed();
    attributes.qp_state = ibv_qp_state::IBV_QPS_RTR;
    attributes.path_mtu = match connection.mtu {
        256 => ibv_mtu::IBV_MTU_256,
        512 => ibv_mtu::IBV_MTU_512,
        1024 => ibv_mtu::IBV_MTU_1024,
        2048 => ibv_mtu::IBV_MTU_2048,
        4096 => ibv_mtu::IBV_MTU_4096,
        _ => return None,
    };
    attributes.dest_qp_num = connection.remote_qpn;
    attributes.rq_psn = connection.remote_psn;
    attributes.max_dest_rd_atomic = u8::try_from(connection.responder_resources).ok()?;
    attributes.min_rnr_timer = RNR_TIMER;
    attributes.ah_attr.port_num = u8::try_from(connection.port).ok()?;
    attributes.ah_attr.dlid = u16::try_from(connection.remote_lid).ok()?;
    if connection.global != 0 {
        attributes.ah_attr.is_global = 1;
        attributes.ah_attr.grh.dgid = ibv_gid { raw: connection.remote_gid };
        attributes.ah_attr.grh.sgid_index = u8::try_from(connection.gid_index).ok()?;
        attributes.ah_attr.grh.hop_limit = HOPS;
    }
    Some(attributes)
}

/// What RTR → RTS takes.
fn ready_to_send(connection: &Connection) -> Option<ibv_qp_attr> {
    let mut attributes = ibv_qp_attr::zeroed();
    attributes.qp_state = ibv_qp_state::IBV_QPS_RTS;
    attributes.sq_psn = connection.local_psn;
    attributes.timeout = u8::try_from(connection.timeout).ok()?;
    attributes.retry_cnt = u8::try_from(connection.retries).ok()?;
    attributes.rnr_retry = RNR_RETRIES;
    attributes.max_rd_atomic = u8::try_from(connection.initiator_depth).ok()?;
    Some(attributes)
}

pub(crate) unsafe extern "C" fn fail(pair: *mut Pair) -> i32 {
    let mut attributes = ibv_qp_attr::zeroed();
    attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
    // SAFETY: the queue pair is there.
    unsafe { modify(pair, attributes, ibv_qp_attr_mask::IBV_QP_STATE) }
}

pub(crate) unsafe extern "C" fn destroy_pair(pair: *mut Pair) -> i32 {
    // SAFETY: the caller gives back what `create_pair` made, once.
    code(unsafe { ibv_destroy_qp(pair.cast()) })
}

pub(crate) unsafe extern "C" fn post(
    pair: *mut Pair,
    requests: *const Work,
    count: u32,
    posted: *mut u32,
) -> i32 {
    let count = count as usize;
    if count == 0 || count > POST_MAX {
        return libc::EINVAL;
    }
    // SAFETY: the caller gives so many.
    let requests = unsafe { std::slice::from_raw_parts(requests, count) };
    let mut pieces: [ibv_sge; POST_MAX] = std::array::from_fn(|_| ibv_sge::zeroed());
    let mut list: [ibv_send_wr; POST_MAX] = std::array::from_fn(|_| ibv_send_wr::zeroed());
    for ((request, piece), entry) in requests.iter().zip(&mut pieces).zip(&mut list) {
        *piece = ibv_sge { addr: request.local_address, length: request.bytes, lkey: request.lkey };
        entry.wr_id = request.id;
        entry.sg_list = piece;
        entry.num_sge = 1;
        entry.opcode = match request.kind {
            work::READ => ibv_wr_opcode::IBV_WR_RDMA_READ,
            work::WRITE => ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            _ => return libc::EINVAL,
        };
        if request.signalled != 0 {
            entry.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        entry.wr = wr_t { rdma: rdma_t { remote_addr: request.remote_address, rkey: request.rkey } };
    }
    let first = list.as_mut_ptr();
    for place in 1..count {
        // In pointers of one origin, as libibverbs walks the list by them.
        // SAFETY: below `count`, which is not more than the list has.
        let entry = unsafe { first.add(place) };
        // SAFETY: as above; `place` is at least 1.
        let before = unsafe { first.add(place - 1) };
        // SAFETY: an entry of the list, which nobody else refers to.
        unsafe { (*before).next = entry };
    }
    let mut refused = std::ptr::null_mut();
    // SAFETY: the queue pair is there; list and pieces live through the call. The caller leaves the memory alone that they name.
    let answer = unsafe { ibv_post_send(pair.cast(), first, &mut refused) };
    let taken = if answer == 0 {
        count
    } else {
        let offset = (refused as usize).wrapping_sub(first as usize) / size_of::<ibv_send_wr>();
        // A provider that does not say which one it refused may have taken any.
        if refused.is_null() || offset > count { count } else { offset }
    };
    // SAFETY: the caller's place for the result.
    unsafe { posted.write(taken as u32) };
    code(answer)
}

/// # Safety
/// The queue pair is there, and so is what the request names.
unsafe fn post_one(pair: *mut Pair, request: &mut ibv_send_wr) -> i32 {
    let mut refused = std::ptr::null_mut();
    // SAFETY: what this function asks of its caller; the request lives through the call.
    code(unsafe { ibv_post_send(pair.cast(), request, &mut refused) })
}

pub(crate) unsafe extern "C" fn bind_window(pair: *mut Pair, bind: *const Bind, rkey: *mut u32) -> i32 {
    // SAFETY: the caller's structure lives through the call.
    let bind = unsafe { &*bind };
    let window = bind.window.cast::<ibv_mw>();
    // SAFETY: the window is there.
    let before = unsafe { (*window).rkey };
    // The lowest byte is the owner's to choose, and must change with each bind.
    let key = before & !0xff | before.wrapping_add(1) & 0xff;
    let bind_info = ibv_mw_bind_info {
        mr: bind.memory.cast(),
        addr: bind.address,
        length: bind.bytes,
        mw_access_flags: flags(bind.access),
    };
    let mut request = ibv_send_wr::zeroed();
    request.wr_id = bind.id;
    request.opcode = ibv_wr_opcode::IBV_WR_BIND_MW;
    request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
    request.bind_mw_tso_union =
        bind_mw_tso_union_t { bind_mw: bind_mw_t { mw: window, rkey: key, bind_info } };
    // SAFETY: queue pair, window and memory are there.
    let answer = unsafe { post_one(pair, &mut request) };
    if answer == 0 {
        // SAFETY: the window is there; libibverbs leaves it to the caller of a bind of type 2 to keep the key.
        unsafe { (*window).rkey = key };
        // SAFETY: the caller's place for the result.
        unsafe { rkey.write(key) };
    }
    answer
}

pub(crate) unsafe extern "C" fn invalidate(pair: *mut Pair, id: u64, rkey: u32) -> i32 {
    let mut request = ibv_send_wr::zeroed();
    request.wr_id = id;
    request.opcode = ibv_wr_opcode::IBV_WR_LOCAL_INV;
    request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
    request.imm_data_invalidated_rkey_union = imm_data_invalidated_rkey_union_t { invalidated_rkey: rkey };
    // SAFETY: the queue pair is there; the request names no memory.
    unsafe { post_one(pair, &mut request) }
}
