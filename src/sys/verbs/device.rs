//! Devices and ports: what they are, which route they offer, and what happens to them.

use std::fs;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;

use lodestream_verbs_abi::{
    AsyncEvent, Context as RawContext, DeviceAttributes, DeviceName, NAME_BYTES, PortAttributes, transport,
};

use super::gid::{Choice, Gid, GidEntry, GidKind, NoGid, choose};
use super::library::Library;
use super::{VerbsError, check, invalid};

/// Where the kernel tells what libibverbs does not.
const SYSFS: &str = "/sys/class/infiniband";
/// Entries of a table of GIDs that are looked at: their places are bytes in a queue pair's attributes.
const GIDS_MAX: u32 = 256;

/// How a device speaks to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// InfiniBand or RoCE.
    Ib,
    /// iWARP, whose queue pairs are connected by a TCP connection that the device takes over: not served here.
    Iwarp,
    /// Another that is not served here.
    Other,
}

/// What a port is wired to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkLayer {
    /// Ethernet.
    Ethernet,
    /// InfiniBand.
    InfiniBand,
}

/// State of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// No link.
    Down,
    /// A link, and no address yet (InfiniBand).
    Initialising,
    /// Ready to become active (InfiniBand).
    Armed,
    /// In use.
    Active,
    /// A number that is not known here.
    Other(u32),
}

/// A port, as it is now.
#[derive(Debug, Clone)]
pub struct Port {
    /// Its number, from 1 on.
    pub number: u8,
    /// State.
    pub state: PortState,
    /// What it is wired to.
    pub link_layer: LinkLayer,
    /// Bytes of payload in one packet at most.
    pub mtu_bytes: u32,
    /// InfiniBand's local identifier; 0 on Ethernet.
    pub lid: u16,
    /// Table of GIDs, without the empty entries.
    pub gids: Vec<GidEntry>,
    /// Rate in Mbit/s, if the kernel tells.
    pub speed_mbps: Option<u64>,
}

/// What happened to a device or a port, asynchronously.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The port has become active.
    PortActive(u8),
    /// The port has lost its link.
    PortDown(u8),
    /// The table of GIDs of the port has changed.
    GidsChanged(u8),
    /// The device is dead.
    DeviceFatal,
    /// Another `ibv_event_type`.
    Other(u32),
}

/// What a queue pair goes by: a port and one of its GIDs.
#[derive(Debug, Clone)]
pub struct Route {
    /// Number of the port.
    pub port: u8,
    /// Bytes of payload in one packet.
    pub mtu_bytes: u32,
    /// InfiniBand's local identifier of the port.
    pub lid: u16,
    /// The GID, and why it.
    pub choice: Choice,
    /// Packets carry GIDs: always on Ethernet.
    pub global: bool,
}

/// A device offers no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    /// It could not be asked.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
    /// It is neither of InfiniBand nor of RoCE.
    #[error("{device} is not of InfiniBand or RoCE: {transport:?}")]
    Transport {
        /// Name of the device.
        device: String,
        /// What it is of.
        transport: Transport,
    },
    /// No port is active.
    #[error("{device} has no active port: {states:?}")]
    Down {
        /// Name of the device.
        device: String,
        /// State of each port.
        states: Vec<PortState>,
    },
    /// The active port has no address that will do.
    #[error("{device}, port {port}: {reason}")]
    Gid {
        /// Name of the device.
        device: String,
        /// Number of the port.
        port: u8,
        /// Why.
        reason: NoGid,
    },
}

/// An open device.
#[derive(Debug)]
pub struct Context {
    library: Arc<Library>,
    raw: NonNull<RawContext>,
    name: String,
    attributes: DeviceAttributes,
}

// SAFETY: libibverbs lets any thread use a context.
unsafe impl Send for Context {}
// SAFETY: as above, several at a time.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the device of this name.
    ///
    /// # Errors
    /// ENODEV: there is none. EACCES and the like: this process may not open `/dev/infiniband/uverbs*`.
    pub fn open(library: &Arc<Library>, name: &str) -> Result<Arc<Context>, VerbsError> {
        const CALL: &str = "opening a device";
        let mut bytes = [0; NAME_BYTES];
        let place = bytes[..NAME_BYTES - 1].get_mut(..name.len()).ok_or(invalid(CALL))?;
        place.copy_from_slice(name.as_bytes());
        let mut raw = std::ptr::null_mut();
        // SAFETY: the name ends with NUL; both live through the call.
        check(CALL, unsafe { (library.open)(&DeviceName { bytes }, &mut raw) })?;
        let raw = NonNull::new(raw).ok_or(invalid(CALL))?;
        let attributes = DeviceAttributes::default();
        let mut context = Context { library: Arc::clone(library), raw, name: name.to_owned(), attributes };
        // SAFETY: the context was just opened; the place for the result lives through the call.
        let answer = unsafe { (library.query_device)(raw.as_ptr(), &mut context.attributes) };
        check("asking a device", answer)?;
        rustix::io::ioctl_fionbio(context.events(), true)
            .map_err(|error| VerbsError { call: CALL, errno: error.raw_os_error() })?;
        Ok(Arc::new(context))
    }

    /// Its name, such as `mlx5_0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it speaks to others.
    pub fn transport(&self) -> Transport {
        match self.attributes.transport {
            transport::IB => Transport::Ib,
            transport::IWARP => Transport::Iwarp,
            _ => Transport::Other,
        }
    }

    /// Whether it has memory windows of type 2.
    pub fn has_windows(&self) -> bool {
        self.attributes.windows != 0
    }

    /// Work requests that a queue pair can have posted at most.
    pub fn depth_max(&self) -> u32 {
        self.attributes.depth_max
    }

    /// READs that a queue pair can have under way, as the one that asks.
    pub fn initiator_depth(&self) -> u8 {
        u8::try_from(self.attributes.initiator_depth).unwrap_or(u8::MAX)
    }

    /// READs that a queue pair answers at a time.
    pub fn responder_resources(&self) -> u8 {
        u8::try_from(self.attributes.responder_resources).unwrap_or(u8::MAX)
    }

    /// The NUMA node that it is at, if the kernel tells.
    pub fn numa_node(&self) -> Option<u32> {
        self.sysfs("device/numa_node")?.parse().ok()
    }

    /// All ports, as they are now.
    pub fn ports(&self) -> Result<Vec<Port>, VerbsError> {
        (1..=u8::try_from(self.attributes.ports).unwrap_or(u8::MAX)).map(|number| self.port(number)).collect()
    }

    /// One port, as it is now. Numbers begin with 1.
    pub fn port(&self, number: u8) -> Result<Port, VerbsError> {
        let mut found = PortAttributes::default();
        // SAFETY: the context is open as long as `self`; the place for the result lives through the call.
        let answer = unsafe { (self.library.query_port)(self.raw(), number, &mut found) };
        check("asking a port", answer)?;
        let gids = (0..found.gids.min(GIDS_MAX)).filter_map(|index| self.gid(number, index)).collect();
        Ok(Port {
            number,
            state: match found.state {
                1 => PortState::Down,
                2 => PortState::Initialising,
                3 => PortState::Armed,
                4 => PortState::Active,
                other => PortState::Other(other),
            },
            link_layer: if found.link_layer == 2 { LinkLayer::Ethernet } else { LinkLayer::InfiniBand },
            mtu_bytes: found.mtu,
            lid: u16::try_from(found.lid).unwrap_or(0),
            gids,
            speed_mbps: self.sysfs(&format!("ports/{number}/rate")).and_then(|rate| mbps(&rate)),
        })
    }

    /// An entry of a port's table; `None` if it is empty.
    fn gid(&self, port: u8, index: u32) -> Option<GidEntry> {
        let mut gid = [0; 16];
        // SAFETY: the context is open as long as `self`; the place for the result lives through the call.
        let answer = unsafe { (self.library.query_gid)(self.raw(), port, index, &mut gid) };
        if answer != 0 || gid == [0; 16] {
            return None;
        }
        // The kernel has no file to read for an entry that is empty.
        let kind = match self.sysfs(&format!("ports/{port}/gid_attrs/types/{index}"))?.as_str() {
            "RoCE v2" => GidKind::RoceV2,
            _ => GidKind::IbOrRoceV1,
        };
        let netdev = self.sysfs(&format!("ports/{port}/gid_attrs/ndevs/{index}"));
        Some(GidEntry { index: u8::try_from(index).ok()?, gid: Gid(gid), kind, netdev })
    }

    /// The way of connections from the local address `local`, or from any: the first active port, and its GID.
    pub fn route(&self, local: Option<IpAddr>) -> Result<Route, NoRoute> {
        let device = self.name.clone();
        if self.transport() != Transport::Ib {
            return Err(NoRoute::Transport { device, transport: self.transport() });
        }
        let ports = self.ports()?;
        let mut refused = None;
        for port in ports.iter().filter(|port| port.state == PortState::Active) {
            match choose(&port.gids, port.link_layer, local) {
                Ok(choice) => {
                    return Ok(Route {
                        port: port.number,
                        mtu_bytes: port.mtu_bytes,
                        lid: port.lid,
                        choice,
                        global: port.link_layer == LinkLayer::Ethernet,
                    });
                }
                Err(reason) => refused = refused.or(Some((port.number, reason))),
            }
        }
        Err(match refused {
            Some((port, reason)) => NoRoute::Gid { device, port, reason },
            None => NoRoute::Down { device, states: ports.iter().map(|port| port.state).collect() },
        })
    }

    /// Readable when [`Context::next_event`] has something.
    pub fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open as long as `self`.
        let descriptor = unsafe { (self.library.async_descriptor)(self.raw()) };
        // SAFETY: the descriptor is open as long as the context, which `self` is lent for.
        unsafe { BorrowedFd::borrow_raw(descriptor) }
    }

    /// What happened since it was asked last. `None`: nothing.
    pub fn next_event(&self) -> Result<Option<Event>, VerbsError> {
        let mut event = AsyncEvent::default();
        // SAFETY: the context is open as long as `self`; the place for the result lives through the call.
        let answer = unsafe { (self.library.take_async_event)(self.raw(), &mut event) };
        if answer == libc::EAGAIN {
            return Ok(None);
        }
        check("taking an event", answer)?;
        let port = u8::try_from(event.port).unwrap_or(0);
        // Numbers of `ibv_event_type`.
        Ok(Some(match event.kind {
            8 => Event::DeviceFatal,
            9 => Event::PortActive(port),
            10 => Event::PortDown(port),
            18 => Event::GidsChanged(port),
            other => Event::Other(other),
        }))
    }

    pub(super) fn library(&self) -> &Arc<Library> {
        &self.library
    }

    pub(super) fn raw(&self) -> *mut RawContext {
        self.raw.as_ptr()
    }

    fn sysfs(&self, file: &str) -> Option<String> {
        let path = PathBuf::from(SYSFS).join(&self.name).join(file);
        Some(fs::read_to_string(path).ok()?.trim().to_owned())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened by `open`; all that was made of it holds an `Arc` of this and is gone.
        let _ = unsafe { (self.library.close)(self.raw()) };
    }
}

/// Mbit/s of a rate as the kernel writes it: `100 Gb/sec (4X EDR)`.
fn mbps(rate: &str) -> Option<u64> {
    let gigabits: f64 = rate.split_once(" Gb/sec")?.0.parse().ok()?;
    (gigabits >= 0.0).then_some((gigabits * 1000.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_the_kernel_writes_them() {
        assert_eq!(mbps("100 Gb/sec (4X EDR)"), Some(100_000));
        assert_eq!(mbps("2.5 Gb/sec (1X SDR)"), Some(2_500));
        assert_eq!(mbps("fast"), None);
    }
}
