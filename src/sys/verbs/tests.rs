//! Who owns a span when, on a simulated device: a table of functions that completes what the test says, and goes wrong in ways that
//! no real device does on request. Real (soft-RoCE) devices are used by `ffi/verbs/conformance`.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use lodestream_verbs_abi as abi;
use lodestream_verbs_abi::{Completion, Table, Work};

use super::*;
use crate::sys::mem::{HUGE_PAGE_BYTES, Memory};
use crate::sys::pages::PageKind;

/// The device of one test, which runs on one thread.
#[derive(Default)]
struct Device {
    /// Posted and not completed.
    pending: VecDeque<Work>,
    completions: VecDeque<Completion>,
    /// Work requests that are taken before the device refuses.
    accepts: Option<usize>,
    /// It neither fails a queue pair nor lets go of memory.
    broken: bool,
    /// One of `abi::transport`.
    transport: u32,
    calls: Vec<&'static str>,
}

thread_local! {
    static DEVICE: RefCell<Device> = RefCell::default();
}

fn device<T>(with: impl FnOnce(&mut Device) -> T) -> T {
    DEVICE.with_borrow_mut(with)
}

fn complete(id: u64, status: u32) {
    device(|device| {
        device.pending.retain(|work| work.id > id);
        device.completions.push_back(Completion { id, status, vendor_error: 0 });
    });
}

/// Something to point to: the simulated objects hold nothing.
fn object<T>(place: *mut *mut T) -> i32 {
    // SAFETY: the table's callers give a place to write to.
    unsafe { place.write(NonNull::dangling().as_ptr()) };
    0
}

/// What most functions do: nothing, and say that it is done.
macro_rules! nothing {
    ($($name:ident($($argument:ty),*);)*) => {
        $(unsafe extern "C" fn $name($(_: $argument),*) -> i32 {
            device(|device| device.calls.push(stringify!($name)));
            0
        })*
    };
}

nothing! {
    devices(*mut abi::DeviceName, u32, *mut u32);
    close(*mut abi::Context);
    query_port(*mut abi::Context, u8, *mut abi::PortAttributes);
    query_gid(*mut abi::Context, u8, u32, *mut [u8; 16]);
    take_async_event(*mut abi::Context, *mut abi::AsyncEvent);
    destroy_domain(*mut abi::Domain);
    destroy_channel(*mut abi::Channel);
    destroy_queue(*mut abi::Queue);
    arm(*mut abi::Queue);
    register_dmabuf(*mut abi::Domain, i32, usize, u32, *mut abi::Registration);
    initialise(*mut abi::Pair, u8, u32);
    connect(*mut abi::Pair, *const abi::Connection);
    destroy_pair(*mut abi::Pair);
    create_window(*mut abi::Domain, *mut *mut abi::Window, *mut u32);
    destroy_window(*mut abi::Window);
    bind_window(*mut abi::Pair, *const abi::Bind, *mut u32);
    invalidate(*mut abi::Pair, u64, u32);
}

/// A descriptor that never blocks whoever waits for it.
fn descriptor() -> i32 {
    std::os::fd::IntoRawFd::into_raw_fd(std::fs::File::open("/dev/null").unwrap())
}

unsafe extern "C" fn open(_: *const abi::DeviceName, context: *mut *mut abi::Context) -> i32 {
    object(context)
}

unsafe extern "C" fn query_device(_: *mut abi::Context, attributes: *mut abi::DeviceAttributes) -> i32 {
    let found = abi::DeviceAttributes {
        ports: 1,
        depth_max: 16,
        initiator_depth: 16,
        responder_resources: 16,
        transport: device(|device| device.transport),
        ..Default::default()
    };
    // SAFETY: the caller's place for the result.
    unsafe { attributes.write(found) };
    0
}

unsafe extern "C" fn async_descriptor(_: *mut abi::Context) -> i32 {
    descriptor()
}

unsafe extern "C" fn create_domain(_: *mut abi::Context, domain: *mut *mut abi::Domain) -> i32 {
    object(domain)
}

unsafe extern "C" fn create_channel(
    _: *mut abi::Context,
    channel: *mut *mut abi::Channel,
    fd: *mut i32,
) -> i32 {
    // SAFETY: the caller's place for the result.
    unsafe { fd.write(descriptor()) };
    object(channel)
}

unsafe extern "C" fn take_event(_: *mut abi::Channel) -> i32 {
    libc::EAGAIN
}

unsafe extern "C" fn create_queue(
    _: *mut abi::Context,
    _: u32,
    _: *mut abi::Channel,
    queue: *mut *mut abi::Queue,
) -> i32 {
    object(queue)
}

unsafe extern "C" fn poll(_: *mut abi::Queue, completions: *mut Completion, capacity: u32) -> i32 {
    let found: Vec<Completion> = device(|device| {
        let count = device.completions.len().min(capacity as usize);
        device.completions.drain(..count).collect()
    });
    for (place, completion) in found.iter().enumerate() {
        // SAFETY: below the caller's capacity.
        let target = unsafe { completions.add(place) };
        // SAFETY: as above.
        unsafe { target.write(*completion) };
    }
    found.len() as i32
}

unsafe extern "C" fn register(
    _: *mut abi::Domain,
    _: *mut c_void,
    _: usize,
    _: u32,
    registration: *mut abi::Registration,
) -> i32 {
    let made = abi::Registration { memory: NonNull::dangling().as_ptr(), lkey: 1, rkey: 2 };
    // SAFETY: the caller's place for the result.
    unsafe { registration.write(made) };
    0
}

unsafe extern "C" fn deregister(_: *mut abi::Memory) -> i32 {
    device(|device| if device.broken { libc::EIO } else { 0 })
}

unsafe extern "C" fn create_pair(
    _: *mut abi::Domain,
    _: *mut abi::Queue,
    _: u32,
    pair: *mut *mut abi::Pair,
    qpn: *mut u32,
) -> i32 {
    // SAFETY: the caller's place for the result.
    unsafe { qpn.write(17) };
    object(pair)
}

unsafe extern "C" fn fail(_: *mut abi::Pair) -> i32 {
    device(|device| {
        if device.broken {
            return libc::EIO;
        }
        for work in std::mem::take(&mut device.pending) {
            device.completions.push_back(Completion { id: work.id, status: 5, vendor_error: 0 });
        }
        0
    })
}

unsafe extern "C" fn post(_: *mut abi::Pair, list: *const Work, count: u32, posted: *mut u32) -> i32 {
    // SAFETY: the caller gives so many.
    let list = unsafe { std::slice::from_raw_parts(list, count as usize) };
    let (taken, answer) = device(|device| {
        let taken = device.accepts.map_or(list.len(), |accepts| accepts.min(list.len()));
        device.pending.extend(&list[..taken]);
        (taken, if taken < list.len() { libc::ENOMEM } else { 0 })
    });
    // SAFETY: the caller's place for the result.
    unsafe { posted.write(taken as u32) };
    answer
}

static TABLE: Table = Table {
    version: abi::VERSION,
    bytes: size_of::<Table>() as u32,
    devices,
    open,
    close,
    query_device,
    query_port,
    query_gid,
    async_descriptor,
    take_async_event,
    create_domain,
    destroy_domain,
    create_channel,
    destroy_channel,
    take_event,
    create_queue,
    destroy_queue,
    arm,
    poll,
    register,
    register_dmabuf,
    deregister,
    create_pair,
    initialise,
    connect,
    fail,
    destroy_pair,
    post,
    create_window,
    destroy_window,
    bind_window,
    invalidate,
};

/// A queue pair of the simulated device, and memory to read into.
struct Bench {
    library: Arc<Library>,
    pair: QueuePair,
    memory: Arc<Memory>,
    domain: Arc<ProtectionDomain>,
    registered: Arc<Registered>,
}

const PIECE: u64 = 4096;

impl Bench {
    fn new() -> Bench {
        let library = Library::simulated(&TABLE);
        let context = Context::open(&library, "simulated").unwrap();
        let domain = ProtectionDomain::new(&context).unwrap();
        let channel = Channel::new(&context).unwrap();
        let gid = Gid([1; 16]);
        let entry = GidEntry { index: 0, gid, kind: GidKind::RoceV2, netdev: None };
        let choice = Choice { entry, reason: Reason::FirstIpv6 };
        let route = Route { port: 1, mtu_bytes: 1024, lid: 0, choice, global: true };
        let pair = QueuePair::new(&domain, &channel, &route, Role::Initiator, 16).unwrap();
        let memory = Arc::new(Memory::new(HUGE_PAGE_BYTES, PageKind::Small).unwrap());
        let registered = Registered::own(&domain, &memory).unwrap();
        Bench { library, pair, memory, domain, registered }
    }

    /// So many reads of one piece each; tags count from 0.
    fn reads(&self, count: u64) -> VecDeque<Transfer> {
        let remote: Remote =
            serde_json::from_value(serde_json::json!({ "address": 0, "rkey": 3, "bytes": PIECE })).unwrap();
        (0..count)
            .map(|tag| {
                let span = self.memory.claim(tag * PIECE, PIECE).unwrap();
                Transfer::new(Kind::Read, span, &self.registered, remote, tag).unwrap()
            })
            .collect()
    }

    fn poll(&mut self) -> Vec<(u64, Result<(), WorkError>)> {
        let mut done = Vec::new();
        self.pair.poll(&mut done).unwrap();
        done.into_iter().map(|done| (done.tag, done.result)).collect()
    }
}

#[test]
fn a_signalled_success_vouches_for_those_before_it() {
    let mut bench = Bench::new();
    let mut reads = bench.reads(3);
    assert_eq!(bench.pair.post(&mut reads).unwrap(), 3);
    let signalled: Vec<u32> = device(|device| device.pending.iter().map(|work| work.signalled).collect());
    assert_eq!(signalled, [0, 0, 1], "the last of a call");
    assert_eq!((bench.pair.in_flight(), bench.poll()), (3, vec![]));
    complete(2, 0);
    assert_eq!(bench.poll(), [(0, Ok(())), (1, Ok(())), (2, Ok(()))]);
    assert_eq!(bench.pair.room(), 16);
}

#[test]
fn an_error_vouches_for_nothing() {
    let mut bench = Bench::new();
    let mut reads = bench.reads(3);
    bench.pair.post(&mut reads).unwrap();
    complete(1, 10);
    complete(2, 5);
    let flushed = Err(WorkError::Flushed);
    assert_eq!(bench.poll(), [(0, flushed), (1, Err(WorkError::RemoteAccess)), (2, flushed)]);
}

#[test]
fn what_a_device_does_not_take_stays_with_the_caller_and_the_rest_comes_back() {
    let mut bench = Bench::new();
    let mut reads = bench.reads(4);
    device(|device| device.accepts = Some(1));
    assert_eq!(bench.pair.post(&mut reads).unwrap_err().errno, libc::ENOMEM);
    assert_eq!((reads.len(), bench.pair.in_flight()), (3, 1));
    let tags: Vec<u64> = reads.into_iter().map(|read| read.give_up().tag).collect();
    assert_eq!(tags, [1, 2, 3], "in their order");
    // It was not signalled: without giving the queue pair up, it would be in flight for ever.
    assert_eq!(bench.poll(), [(0, Err(WorkError::Flushed))]);
}

#[test]
fn more_than_there_is_room_for_stays_with_the_caller() {
    let mut bench = Bench::new();
    let mut reads = bench.reads(20);
    assert_eq!(bench.pair.post(&mut reads).unwrap(), 16);
    assert_eq!((reads.len(), bench.pair.room()), (4, 0));
    complete(15, 0);
    assert_eq!(bench.poll().len(), 16);
    assert_eq!(bench.pair.post(&mut reads).unwrap(), 4);
}

#[test]
fn a_completion_of_what_was_not_posted_is_an_error() {
    let mut bench = Bench::new();
    let mut reads = bench.reads(1);
    bench.pair.post(&mut reads).unwrap();
    device(|device| device.completions.push_back(Completion { id: 1, status: 0, vendor_error: 0 }));
    assert_eq!(bench.pair.poll(&mut Vec::new()).unwrap_err().errno, libc::EPROTO);
    assert_eq!(bench.pair.in_flight(), 1, "its span is not given back");
}

/// Invariant 2.
#[test]
fn a_dropped_queue_pair_drains_before_it_frees() {
    let mut bench = Bench::new();
    let mut reads = bench.reads(3);
    bench.pair.post(&mut reads).unwrap();
    assert!(bench.memory.claim(0, PIECE).is_none());
    drop(bench.pair);
    assert!(device(|device| device.completions.is_empty()), "dropped without its completions");
    assert!(bench.memory.claim(0, 3 * PIECE).is_some());
    assert_eq!(bench.library.leaked_bytes(), 0);
    let calls = device(|device| device.calls.clone());
    let place = |name| calls.iter().position(|call| *call == name).unwrap();
    assert!(place("destroy_pair") < place("destroy_queue"), "{calls:?}");
}

/// Invariant 2.
#[test]
fn a_device_that_does_not_let_go_costs_the_memory_and_is_counted() {
    let mut bench = Bench::new();
    let mut reads = bench.reads(2);
    bench.pair.post(&mut reads).unwrap();
    device(|device| device.broken = true);
    drop(bench.pair);
    assert!(bench.memory.claim(0, PIECE).is_none(), "freed under the device");
    assert_eq!(bench.library.leaked_bytes(), 2 * PIECE);
    assert!(!device(|device| device.calls.contains(&"destroy_pair")));

    let target = Registered::target(&bench.domain, bench.memory.claim(4 * PIECE, PIECE).unwrap()).unwrap();
    assert!(target.into_span().is_none());
    assert!(bench.memory.claim(4 * PIECE, PIECE).is_none(), "peers can still write to it");
    assert_eq!(bench.library.leaked_bytes(), 3 * PIECE);
}

#[test]
fn transfers_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    let other = Arc::new(Memory::new(HUGE_PAGE_BYTES, PageKind::Small).unwrap());
    let remote = |bytes: u64| -> Remote {
        serde_json::from_value(serde_json::json!({ "address": 0, "rkey": 3, "bytes": bytes })).unwrap()
    };
    let made = |span, remote| Transfer::new(Kind::Read, span, &bench.registered, remote, 0).map(drop);
    assert!(made(bench.memory.claim(0, PIECE).unwrap(), remote(PIECE)).is_ok());
    assert!(made(bench.memory.claim(0, PIECE).unwrap(), remote(PIECE - 1)).is_err(), "another length");
    assert!(made(other.claim(0, PIECE).unwrap(), remote(PIECE)).is_err(), "other memory");
    let long = WORK_BYTES_MAX + 1;
    assert!(made(bench.memory.claim(0, long).unwrap(), remote(long)).is_err(), "too long");
    let target = Arc::new(Registered::target(&bench.domain, other.claim(0, PIECE).unwrap()).unwrap());
    let span = other.claim(PIECE, PIECE).unwrap();
    assert!(Transfer::new(Kind::Read, span, &target, remote(PIECE), 0).is_err(), "a peer's target");
}

#[test]
fn endpoints_from_outside_are_checked() {
    let good = Bench::new().pair.endpoint();
    for bad in [
        Endpoint { qpn: 1 << 24, ..good },
        Endpoint { psn: 1 << 24, ..good },
        Endpoint { mtu_bytes: 0, ..good },
        Endpoint { mtu_bytes: 257, ..good },
    ] {
        assert_eq!(Bench::new().pair.connect(&bad).unwrap_err().errno, libc::EINVAL, "{bad:?}");
    }
    Bench::new().pair.connect(&good).unwrap();
}

#[test]
fn iwarp_is_refused() {
    device(|device| device.transport = abi::transport::IWARP);
    let context = Context::open(&Library::simulated(&TABLE), "simulated").unwrap();
    let error = context.route(None).unwrap_err();
    assert!(matches!(error, NoRoute::Transport { transport: Transport::Iwarp, .. }), "{error}");
}
