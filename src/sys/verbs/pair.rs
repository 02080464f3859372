//! Queue pairs, and the spans that they own.

use std::collections::VecDeque;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lodestream_verbs_abi::{
    Bind, Completion, Connection, POLL_MAX, POST_MAX, Pair as RawPair, Queue as RawQueue, Work, access,
};
use serde::{Deserialize, Serialize};

use super::channel::Channel;
use super::device::Route;
use super::library::Library;
use super::memory::{ProtectionDomain, Remote, Window};
use super::work::{Done, Transfer, WorkError};
use super::{VerbsError, check, invalid};

/// Every so many work requests one is signalled, and so is the last of each call: its completion vouches for those before it.
const SIGNAL_EVERY: u64 = 8;
/// Queue pair numbers and packet sequence numbers have 24 bits.
const BITS_24: u32 = 0xff_ffff;
/// 4.096 µs · 2^17 = 0.5 s until a packet is sent again. Much less, and a source that is busy with the READs of others is asked for the
/// same bytes again, which makes it no faster; much more, and a peer that is gone is noticed late.
const TIMEOUT: u32 = 17;
/// As often as there are bits for it.
const RETRIES: u32 = 7;
/// How long a queue pair in the error state may take to give its operations back.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// How long a bind or an invalidation may take: neither leaves the device.
const CONTROL_MAX: Duration = Duration::from_secs(10);
/// The id of these; those of transfers count from 0.
const CONTROL: u64 = u64::MAX;

/// What the remote side of a queue pair may do by it, to memory that it has a key of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Nothing: this side reads and writes.
    Initiator,
    /// Read.
    Source,
    /// Write.
    Target,
}

/// One side of a connection, as the other needs to know it. Travels inside an authenticated session only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Number of the queue pair, 24 bits.
    pub qpn: u32,
    /// Its first packet sequence number, 24 bits.
    pub psn: u32,
    /// GID of its port.
    pub gid: [u8; 16],
    /// InfiniBand's local identifier of its port; 0 on Ethernet.
    pub lid: u16,
    /// Bytes of payload in a packet: the smaller one of the two sides is taken.
    pub mtu_bytes: u32,
    /// READs that it can have under way.
    pub initiator_depth: u8,
    /// READs that it answers at a time.
    pub responder_resources: u8,
}

/// A reliable connected queue pair with a completion queue of its own.
pub struct QueuePair {
    domain: Arc<ProtectionDomain>,
    channel: Arc<Channel>,
    queue: NonNull<RawQueue>,
    raw: NonNull<RawPair>,
    local: Endpoint,
    route: Route,
    /// Transfers posted, in that order; the last one's id is `next - 1`.
    flight: VecDeque<Transfer>,
    depth: usize,
    next: u64,
}

// SAFETY: libibverbs lets any thread use a queue pair; `&mut self` keeps it to one at a time.
unsafe impl Send for QueuePair {}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair").field("in_flight", &self.flight.len()).finish_non_exhaustive()
    }
}

/// What is made of a queue pair before it is one: given back in the right order if the rest fails.
struct HalfMade<'a> {
    library: &'a Library,
    queue: NonNull<RawQueue>,
}

impl Drop for HalfMade<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `QueuePair::new`, which did not get as far as a queue pair that uses it.
        let _ = unsafe { (self.library.destroy_queue)(self.queue.as_ptr()) };
    }
}

impl QueuePair {
    /// A queue pair for `depth` transfers at a time that goes by `route`. It is to be connected next.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        channel: &Arc<Channel>,
        route: &Route,
        role: Role,
        depth: u32,
    ) -> Result<QueuePair, VerbsError> {
        const CALL: &str = "making a queue pair";
        let context = domain.context();
        if depth == 0 || depth > context.depth_max() || !Arc::ptr_eq(context, channel.context()) {
            return Err(invalid(CALL));
        }
        let library = context.library();
        let mut queue = std::ptr::null_mut();
        // SAFETY: context and channel are there; the place for the result lives through the call.
        let answer = unsafe { (library.create_queue)(context.raw(), depth, channel.raw(), &mut queue) };
        check("making a completion queue", answer)?;
        let half = HalfMade { library, queue: NonNull::new(queue).ok_or(invalid(CALL))? };
        let (mut raw, mut qpn) = (std::ptr::null_mut(), 0);
        // SAFETY: domain and queue are there; the places for the results live through the call.
        let answer = unsafe { (library.create_pair)(domain.raw(), queue, depth, &mut raw, &mut qpn) };
        check(CALL, answer)?;
        let raw = NonNull::new(raw).ok_or(invalid(CALL))?;
        let queue = half.queue;
        std::mem::forget(half);
        let local = Endpoint {
            qpn,
            // Each `RandomState` has keys that nobody can foretell.
            psn: RandomState::new().hash_one(qpn) as u32 & BITS_24,
            gid: route.choice.entry.gid.0,
            lid: route.lid,
            mtu_bytes: route.mtu_bytes,
            initiator_depth: context.initiator_depth(),
            responder_resources: context.responder_resources(),
        };
        let pair = QueuePair {
            domain: Arc::clone(domain),
            channel: Arc::clone(channel),
            queue,
            raw,
            local,
            route: route.clone(),
            flight: VecDeque::with_capacity(depth as usize),
            depth: depth as usize,
            next: 0,
        };
        let allowed = match role {
            Role::Initiator => 0,
            Role::Source => access::REMOTE_READ,
            Role::Target => access::REMOTE_WRITE,
        };
        // SAFETY: the queue pair is there.
        let answer = unsafe { (library.initialise)(pair.raw.as_ptr(), pair.route.port, allowed) };
        check("RESET to INIT", answer)?;
        Ok(pair)
    }

    /// What the remote side has to know.
    pub fn endpoint(&self) -> Endpoint {
        self.local
    }

    /// Connects to the queue pair that `remote` describes. After both sides have done so, transfers may be posted.
    ///
    /// # Errors
    /// EINVAL: `remote` is out of range. Else what the device answers; the queue pair is then of no use.
    pub fn connect(&mut self, remote: &Endpoint) -> Result<(), VerbsError> {
        const CALL: &str = "connecting a queue pair";
        let mtu = self.local.mtu_bytes.min(remote.mtu_bytes);
        if remote.qpn > BITS_24
            || remote.psn > BITS_24
            || !(256..=4096).contains(&mtu)
            || !mtu.is_power_of_two()
        {
            return Err(invalid(CALL));
        }
        let connection = Connection {
            remote_gid: remote.gid,
            remote_qpn: remote.qpn,
            remote_psn: remote.psn,
            local_psn: self.local.psn,
            mtu,
            remote_lid: remote.lid.into(),
            port: self.route.port.into(),
            gid_index: self.route.choice.entry.index.into(),
            global: self.route.global.into(),
            initiator_depth: self.local.initiator_depth.min(remote.responder_resources).into(),
            responder_resources: self.local.responder_resources.min(remote.initiator_depth).into(),
            timeout: TIMEOUT,
            retries: RETRIES,
        };
        // SAFETY: the queue pair is there; the structure lives through the call.
        check(CALL, unsafe { (self.library().connect)(self.raw.as_ptr(), &connection) })
    }

    /// Transfers that may be posted before one has to end.
    pub fn room(&self) -> usize {
        self.depth - self.flight.len()
    }

    /// Transfers that have not ended.
    pub fn in_flight(&self) -> usize {
        self.flight.len()
    }

    /// Posts transfers from the front of `transfers` while there is room. → how many.
    ///
    /// # Errors
    /// What the device answers. What it did not take is still in `transfers`; what it took comes back as [`WorkError::Flushed`],
    /// as the queue pair is given up.
    pub fn post(&mut self, transfers: &mut VecDeque<Transfer>) -> Result<usize, VerbsError> {
        let mut total = 0;
        loop {
            let left = transfers.len().min(self.room());
            if left == 0 {
                return Ok(total);
            }
            let count = left.min(POST_MAX);
            let mut list = [Work::default(); POST_MAX];
            for ((transfer, place), id) in transfers.iter().zip(&mut list[..count]).zip(self.next..) {
                *place = transfer.request(id, (id + 1).is_multiple_of(SIGNAL_EVERY));
            }
            if let Some(last) = list[..count].last_mut().filter(|_| count == left) {
                last.signalled = 1;
            }
            // First the spans, then the call: from now on they are the device's.
            self.flight.extend(transfers.drain(..count));
            let mut posted = 0;
            // SAFETY: the queue pair is there, and the list lives through the call. The spans that it names are owned by `flight`
            // until the completion of each was polled, or are leaked; their memory is registered as long as that.
            let answer =
                unsafe { (self.library().post)(self.raw.as_ptr(), list.as_ptr(), count as u32, &mut posted) };
            let posted = count.min(posted as usize);
            for transfer in self.flight.drain(self.flight.len() - (count - posted)..).rev() {
                // The device has not seen it.
                transfers.push_front(transfer);
            }
            self.next += posted as u64;
            total += posted;
            if let Err(error) = check("posting", answer) {
                // The last one that it took may not be signalled.
                self.fail()?;
                return Err(error);
            }
        }
    }

    /// Hands back the transfers that have ended, by appending them to `done`. → how many.
    ///
    /// # Errors
    /// What the device answers; EPROTO if it completes what was not posted.
    pub fn poll(&mut self, done: &mut Vec<Done>) -> Result<usize, VerbsError> {
        let before = done.len();
        loop {
            let mut found = [Completion::default(); POLL_MAX];
            // SAFETY: the queue is there; there is room for as many as it is told.
            let count =
                unsafe { (self.library().poll)(self.queue.as_ptr(), found.as_mut_ptr(), POLL_MAX as u32) };
            let Ok(polled) = usize::try_from(count) else {
                return Err(VerbsError { call: "polling", errno: count.saturating_neg() });
            };
            for completion in found.iter().take(polled) {
                self.complete(completion, done)?;
            }
            if polled < POLL_MAX {
                return Ok(done.len() - before);
            }
        }
    }

    fn complete(&mut self, completion: &Completion, done: &mut Vec<Done>) -> Result<(), VerbsError> {
        if completion.id == CONTROL {
            // Of a bind or an invalidation that was given up.
            return Ok(());
        }
        let first = self.next - self.flight.len() as u64;
        let place = completion.id.checked_sub(first).filter(|place| *place < self.flight.len() as u64);
        let Some(place) = place else {
            return Err(VerbsError { call: "completing what was not posted", errno: libc::EPROTO });
        };
        let result = WorkError::of(completion.status);
        for transfer in self.flight.drain(..place as usize) {
            // Not signalled. A success vouches for those before it; an error does not, so these count as not done.
            done.push(transfer.end(result.map_err(|_| WorkError::Flushed)));
        }
        done.extend(self.flight.pop_front().map(|transfer| transfer.end(result)));
        Ok(())
    }

    /// Has the next completion wake its channel. What completed before that does not: poll once more, then wait.
    pub fn arm(&mut self) -> Result<(), VerbsError> {
        // SAFETY: the queue is there.
        check("arming", unsafe { (self.library().arm)(self.queue.as_ptr()) })
    }

    /// Moves the queue pair to the error state: everything in flight comes back, done or flushed.
    pub fn fail(&mut self) -> Result<(), VerbsError> {
        // SAFETY: the queue pair is there.
        check("moving a queue pair to the error state", unsafe { (self.library().fail)(self.raw.as_ptr()) })
    }

    /// Opens `window` to `bytes` from `offset` on of its memory, for reading by the peer of this queue pair. Waits for the device.
    ///
    /// # Errors
    /// EINVAL: the window is bound, the range is not inside its memory, or it is of another domain. EBUSY: transfers are in
    /// flight. EIO: the device refuses.
    pub fn bind(&mut self, window: &mut Window, offset: u64, bytes: u64) -> Result<Remote, VerbsError> {
        const CALL: &str = "binding a memory window";
        let range = window.range(offset, bytes).filter(|_| bytes > 0).ok_or(invalid(CALL))?;
        if window.is_bound() || !Arc::ptr_eq(window.domain(), &self.domain) {
            return Err(invalid(CALL));
        }
        self.idle(CALL)?;
        let bind = Bind {
            id: CONTROL,
            window: window.raw(),
            memory: window.memory(),
            address: range.place().0,
            bytes,
            access: access::REMOTE_READ,
        };
        let mut rkey = 0;
        // SAFETY: queue pair, window and its memory are there, and borrowed until the request has ended or was given up with the
        // queue pair; the structure and the place for the result live through the call.
        check(CALL, unsafe { (self.library().bind_window)(self.raw.as_ptr(), &bind, &mut rkey) })?;
        window.bound = Some(rkey);
        self.control(CALL)?;
        Ok(range.under(rkey))
    }

    /// Makes the key of `window` void: a peer that goes on reading gets [`WorkError::RemoteAccess`]. Waits for the device.
    ///
    /// # Errors
    /// EINVAL: it is not bound. Else as [`QueuePair::bind`]; then drop the window, which makes the key void as well.
    pub fn invalidate(&mut self, window: &mut Window) -> Result<(), VerbsError> {
        const CALL: &str = "invalidating a memory window";
        self.idle(CALL)?;
        let rkey = window.bound.take().ok_or(invalid(CALL))?;
        // SAFETY: the queue pair is there; the request names no memory.
        check(CALL, unsafe { (self.library().invalidate)(self.raw.as_ptr(), CONTROL, rkey) })?;
        self.control(CALL)
    }

    fn idle(&self, call: &'static str) -> Result<(), VerbsError> {
        if self.flight.is_empty() { Ok(()) } else { Err(VerbsError { call, errno: libc::EBUSY }) }
    }

    /// Waits for the completion of the one request in flight.
    fn control(&mut self, call: &'static str) -> Result<(), VerbsError> {
        let deadline = Instant::now() + CONTROL_MAX;
        loop {
            self.arm()?;
            let mut found = Completion::default();
            // SAFETY: the queue is there; there is room for one.
            let count = unsafe { (self.library().poll)(self.queue.as_ptr(), &mut found, 1) };
            match (count, WorkError::of(found.status)) {
                (1, Ok(())) => return Ok(()),
                (1, Err(_)) => return Err(VerbsError { call, errno: libc::EIO }),
                (0, _) => {}
                (other, _) => return Err(VerbsError { call, errno: other.saturating_neg() }),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.fail()?;
                return Err(VerbsError { call, errno: libc::ETIMEDOUT });
            }
            self.channel.wait(left)?;
        }
    }

    /// Polls a queue pair in the error state until nothing is in flight. `false`: the device keeps something.
    fn drain(&mut self) -> bool {
        let deadline = Instant::now() + DRAIN_MAX;
        let mut done = Vec::new();
        while !self.flight.is_empty() {
            done.clear();
            if self.arm().is_err() || self.poll(&mut done).is_err() {
                return false;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if self.flight.is_empty() {
                break;
            }
            if left.is_zero() || self.channel.wait(left).is_err() {
                return false;
            }
        }
        true
    }

    fn library(&self) -> &Library {
        self.domain.context().library()
    }
}

impl Drop for QueuePair {
    /// Invariant 2: memory is freed only when the device has given it back.
    fn drop(&mut self) {
        let kept = !self.flight.is_empty() && (self.fail().is_err() || !self.drain());
        if kept {
            self.library().count_leak(self.flight.iter().map(Transfer::bytes).sum());
            std::mem::forget(std::mem::take(&mut self.flight));
            // With them all that a device which is still at work uses.
            std::mem::forget((Arc::clone(&self.domain), Arc::clone(&self.channel)));
            return;
        }
        // SAFETY: made by `new`; nothing is in flight, so nothing is freed under the device.
        let _ = unsafe { (self.library().destroy_pair)(self.raw.as_ptr()) };
        // SAFETY: made by `new`; the queue pair, its only user, is gone, or libibverbs refuses.
        let _ = unsafe { (self.library().destroy_queue)(self.queue.as_ptr()) };
    }
}
