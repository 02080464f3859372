//! The table of functions that `liblodestream_verbs.so` gives to Lodestream: the only thing that the two share.
//!
//! All structures are `repr(C)` and hold plain numbers and opaque pointers. A change of any of them changes [`VERSION`]; the library
//! answers another version's request with null. Functions return 0 or a positive number of errno, unless they say otherwise.
//!
//! What every function asks of its caller: pointers to objects came from this table and were not given back yet; pointers to
//! results are valid for writing; an object is given back before the object that it was made of.

use core::ffi::c_void;

/// Version of the table.
pub const VERSION: u32 = 1;
/// The symbol of the one exported function, an [`Entry`].
pub const ENTRY: &[u8] = b"lodestream_verbs_table\0";
/// The table of a version, which lives as long as the library is loaded; null if the library does not have that version.
pub type Entry = unsafe extern "C" fn(version: u32) -> *const Table;

/// Bytes of the name of a device, with the NUL behind it.
pub const NAME_BYTES: usize = 64;
/// Completions that one call of `poll` gives at most.
pub const POLL_MAX: usize = 16;
/// Work requests that one call of `post` takes at most.
pub const POST_MAX: usize = 16;

/// Access to registered memory, or what a queue pair lets its remote side do: bits.
pub mod access {
    /// The device may write what arrives for this process.
    pub const LOCAL_WRITE: u32 = 1;
    /// The remote side may write.
    pub const REMOTE_WRITE: u32 = 2;
    /// The remote side may read.
    pub const REMOTE_READ: u32 = 4;
    /// Memory windows may be bound to it.
    pub const WINDOW: u32 = 8;
    /// PCIe writes may pass each other. A wish: a device that cannot ignores it.
    pub const RELAXED_ORDERING: u32 = 16;
}

/// Kinds of work requests.
pub mod work {
    /// RDMA READ: remote → local.
    pub const READ: u32 = 0;
    /// RDMA WRITE: local → remote.
    pub const WRITE: u32 = 1;
}

/// How a device speaks to others.
pub mod transport {
    /// InfiniBand, and RoCE, which is the same over Ethernet.
    pub const IB: u32 = 0;
    /// iWARP: over TCP.
    pub const IWARP: u32 = 1;
    /// None of these.
    pub const OTHER: u32 = 2;
}

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $($(#[$doc])* #[repr(C)] #[derive(Debug)] pub struct $name { _private: [u8; 0] })*
    };
}

opaque! {
    /// An open device.
    Context;
    /// A protection domain.
    Domain;
    /// A completion channel.
    Channel;
    /// A completion queue.
    Queue;
    /// Registered memory.
    Memory;
    /// A memory window of type 2.
    Window;
    /// A reliable connected queue pair.
    Pair;
}

/// Name of a device, ended by NUL.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DeviceName {
    /// The name.
    pub bytes: [u8; NAME_BYTES],
}

/// What a device can do.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceAttributes {
    /// Number of ports; the first is 1.
    pub ports: u32,
    /// One of [`transport`].
    pub transport: u32,
    /// Work requests in one queue pair at most.
    pub depth_max: u32,
    /// READs that a queue pair may have under way as the one that asks.
    pub initiator_depth: u32,
    /// READs that a queue pair answers at a time.
    pub responder_resources: u32,
    /// Not 0: the device has memory windows of type 2.
    pub windows: u32,
}

/// What a port is in.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PortAttributes {
    /// `ibv_port_state`: 1 down, 2 initialising, 3 armed, 4 active, 5 active and deferred.
    pub state: u32,
    /// Bytes of payload in one packet at most, now.
    pub mtu: u32,
    /// Length of the table of GIDs.
    pub gids: u32,
    /// InfiniBand's local identifier; 0 on Ethernet.
    pub lid: u32,
    /// 1: InfiniBand, 2: Ethernet.
    pub link_layer: u32,
}

/// What happened to a device or a port.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct AsyncEvent {
    /// `ibv_event_type`.
    pub kind: u32,
    /// The port, of events of ports; else 0.
    pub port: u32,
}

/// Registered memory and its keys.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Registration {
    /// To be given back.
    pub memory: *mut Memory,
    /// Key for this side.
    pub lkey: u32,
    /// Key for the remote side.
    pub rkey: u32,
}

/// What a queue pair needs to know to be connected.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    /// GID of the remote port.
    pub remote_gid: [u8; 16],
    /// Number of the remote queue pair.
    pub remote_qpn: u32,
    /// The first packet sequence number of the remote side.
    pub remote_psn: u32,
    /// The first of this side.
    pub local_psn: u32,
    /// Bytes of payload in one packet: 256, 512, 1024, 2048 or 4096.
    pub mtu: u32,
    /// InfiniBand's local identifier of the remote port.
    pub remote_lid: u32,
    /// Port of this side.
    pub port: u32,
    /// Place of this side's GID in the table of its port.
    pub gid_index: u32,
    /// 0: the route goes by LID alone.
    pub global: u32,
    /// READs that this side may have under way.
    pub initiator_depth: u32,
    /// READs of the remote side that this one answers at a time.
    pub responder_resources: u32,
    /// Time until a packet is sent again: 4.096 µs · 2^n.
    pub timeout: u32,
    /// How often a packet is sent again.
    pub retries: u32,
}

/// One READ or WRITE.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    /// Comes back with the completion.
    pub id: u64,
    /// Where the bytes are in this process.
    pub local_address: u64,
    /// Where they are in the remote one.
    pub remote_address: u64,
    /// Number of bytes.
    pub bytes: u32,
    /// Key of the local memory.
    pub lkey: u32,
    /// Key of the remote memory.
    pub rkey: u32,
    /// One of [`work`].
    pub kind: u32,
    /// Not 0: there is a completion also if it succeeds.
    pub signalled: u32,
}

/// What a window is to show.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Bind {
    /// Comes back with the completion.
    pub id: u64,
    /// A window that shows nothing.
    pub window: *mut Window,
    /// Memory that was registered for windows.
    pub memory: *mut Memory,
    /// Where the range begins in this process.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
    /// What the remote side may do to it.
    pub access: u32,
}

/// A work request that has ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Completion {
    /// That of the work request.
    pub id: u64,
    /// `ibv_wc_status`: 0 is success.
    pub status: u32,
    /// The device's own number for what failed.
    pub vendor_error: u32,
}

/// The functions.
#[repr(C)]
#[derive(Debug)]
pub struct Table {
    /// [`VERSION`].
    pub version: u32,
    /// Size of this structure.
    pub bytes: u32,
    /// Writes the names of up to `capacity` devices to `names`, and to `count` how many there are.
    pub devices: unsafe extern "C" fn(names: *mut DeviceName, capacity: u32, count: *mut u32) -> i32,
    /// Opens a device.
    pub open: unsafe extern "C" fn(name: *const DeviceName, context: *mut *mut Context) -> i32,
    /// Closes it.
    pub close: unsafe extern "C" fn(context: *mut Context) -> i32,
    /// What the device can do.
    pub query_device: unsafe extern "C" fn(context: *mut Context, attributes: *mut DeviceAttributes) -> i32,
    /// What a port is in.
    pub query_port:
        unsafe extern "C" fn(context: *mut Context, port: u8, attributes: *mut PortAttributes) -> i32,
    /// One entry of a port's table of GIDs.
    pub query_gid:
        unsafe extern "C" fn(context: *mut Context, port: u8, index: u32, gid: *mut [u8; 16]) -> i32,
    /// The descriptor that is readable when there is an asynchronous event; open as long as the context.
    pub async_descriptor: unsafe extern "C" fn(context: *mut Context) -> i32,
    /// Takes one asynchronous event; blocks, or EAGAIN, as the descriptor is set.
    pub take_async_event: unsafe extern "C" fn(context: *mut Context, event: *mut AsyncEvent) -> i32,
    /// Makes a protection domain.
    pub create_domain: unsafe extern "C" fn(context: *mut Context, domain: *mut *mut Domain) -> i32,
    /// Gives it back.
    pub destroy_domain: unsafe extern "C" fn(domain: *mut Domain) -> i32,
    /// Makes a completion channel, whose descriptor is open as long as it.
    pub create_channel:
        unsafe extern "C" fn(context: *mut Context, channel: *mut *mut Channel, descriptor: *mut i32) -> i32,
    /// Gives it back.
    pub destroy_channel: unsafe extern "C" fn(channel: *mut Channel) -> i32,
    /// Takes one event of the channel; blocks, or EAGAIN, as the descriptor is set.
    pub take_event: unsafe extern "C" fn(channel: *mut Channel) -> i32,
    /// Makes a completion queue that tells `channel`.
    pub create_queue: unsafe extern "C" fn(
        context: *mut Context,
        entries: u32,
        channel: *mut Channel,
        queue: *mut *mut Queue,
    ) -> i32,
    /// Gives it back.
    pub destroy_queue: unsafe extern "C" fn(queue: *mut Queue) -> i32,
    /// Has the next completion tell the channel.
    pub arm: unsafe extern "C" fn(queue: *mut Queue) -> i32,
    /// Takes up to `capacity` completions, [`POLL_MAX`] at most. → how many, or a negative number of errno.
    pub poll: unsafe extern "C" fn(queue: *mut Queue, completions: *mut Completion, capacity: u32) -> i32,
    /// Registers memory, which stays mapped until it is given back.
    pub register: unsafe extern "C" fn(
        domain: *mut Domain,
        address: *mut c_void,
        bytes: usize,
        access: u32,
        registration: *mut Registration,
    ) -> i32,
    /// Registers the memory behind a dma-buf, from its beginning on; remote addresses begin at 0. EOPNOTSUPP where there is no such thing.
    pub register_dmabuf: unsafe extern "C" fn(
        domain: *mut Domain,
        descriptor: i32,
        bytes: usize,
        access: u32,
        registration: *mut Registration,
    ) -> i32,
    /// Gives registered memory back: its keys are void when this returns.
    pub deregister: unsafe extern "C" fn(memory: *mut Memory) -> i32,
    /// Makes a reliable connected queue pair for `depth` work requests, and writes its number.
    pub create_pair: unsafe extern "C" fn(
        domain: *mut Domain,
        queue: *mut Queue,
        depth: u32,
        pair: *mut *mut Pair,
        qpn: *mut u32,
    ) -> i32,
    /// RESET → INIT, with what the remote side may do.
    pub initialise: unsafe extern "C" fn(pair: *mut Pair, port: u8, access: u32) -> i32,
    /// INIT → RTR → RTS.
    pub connect: unsafe extern "C" fn(pair: *mut Pair, connection: *const Connection) -> i32,
    /// Any state → ERR: all that is posted completes, with an error unless it had succeeded.
    pub fail: unsafe extern "C" fn(pair: *mut Pair) -> i32,
    /// Gives a queue pair back.
    pub destroy_pair: unsafe extern "C" fn(pair: *mut Pair) -> i32,
    /// Posts `count` work requests, [`POST_MAX`] at most, in this order, and writes how many it has posted. The local memory of
    /// each is left alone until its completion, or that of a later one of the same queue pair, was polled.
    pub post: unsafe extern "C" fn(pair: *mut Pair, work: *const Work, count: u32, posted: *mut u32) -> i32,
    /// Makes a memory window of type 2, which is bound to nothing.
    pub create_window:
        unsafe extern "C" fn(domain: *mut Domain, window: *mut *mut Window, rkey: *mut u32) -> i32,
    /// Gives it back: its key is void when this returns.
    pub destroy_window: unsafe extern "C" fn(window: *mut Window) -> i32,
    /// Posts a signalled request to bind a window, under a new key, to a range of registered memory, and writes that key.
    pub bind_window: unsafe extern "C" fn(pair: *mut Pair, bind: *const Bind, rkey: *mut u32) -> i32,
    /// Posts a signalled request that makes the key of a window void.
    pub invalidate: unsafe extern "C" fn(pair: *mut Pair, id: u64, rkey: u32) -> i32,
}
