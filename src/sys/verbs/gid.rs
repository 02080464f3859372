//! Which GID a queue pair goes by. A wrong one is the commonest reason that RDMA does not work, so the choice says its reason.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::device::LinkLayer;

/// The address of a port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The IP address that it is made of, on Ethernet. `None`: the entry of the table is empty.
    pub fn ip(&self) -> Option<IpAddr> {
        let address = Ipv6Addr::from(self.0);
        match address.to_ipv4_mapped() {
            _ if address.is_unspecified() => None,
            Some(address) => Some(IpAddr::V4(address)),
            None => Some(IpAddr::V6(address)),
        }
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ipv6Addr::from(self.0).fmt(f)
    }
}

/// What kind of packets a GID stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand, or RoCE v1, whose packets no router passes on: the kernel has one word for both.
    IbOrRoceV1,
    /// RoCE v2: in UDP.
    RoceV2,
}

/// One entry of a port's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GidEntry {
    /// Place in the table.
    pub index: u8,
    /// The GID.
    pub gid: Gid,
    /// Its kind.
    pub kind: GidKind,
    /// Name of the network device that it belongs to.
    pub netdev: Option<String>,
}

/// Why an entry was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The port is of InfiniBand: its first entry.
    InfiniBand,
    /// RoCE v2, of the address that was asked for.
    Address(IpAddr),
    /// The first of RoCE v2 over IPv4; no address was asked for.
    FirstIpv4,
    /// There is no IPv4: the first of RoCE v2 over IPv6 that is not local to its link.
    FirstIpv6,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::InfiniBand => f.write_str("InfiniBand"),
            Reason::Address(address) => write!(f, "RoCE v2, has the address {address}"),
            Reason::FirstIpv4 => f.write_str("RoCE v2, the first over IPv4"),
            Reason::FirstIpv6 => f.write_str("RoCE v2, the first over IPv6, as there is none over IPv4"),
        }
    }
}

/// An entry, and why it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The entry.
    pub entry: GidEntry,
    /// Why.
    pub reason: Reason,
}

/// No entry will do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoGid {
    /// The table has nothing but what is local to one link.
    #[error("the port has no GID of RoCE v2 with an address that can be reached (it has {0:?})")]
    NoRoceV2(Vec<Gid>),
    /// None is of the address that was asked for.
    #[error("no GID of RoCE v2 has the address {address} (there are {found:?})")]
    NotThisAddress {
        /// The address.
        address: IpAddr,
        /// The addresses that there are.
        found: Vec<IpAddr>,
    },
}

/// Chooses the entry for connections from the local address `local`, or from any.
pub fn choose(entries: &[GidEntry], link_layer: LinkLayer, local: Option<IpAddr>) -> Result<Choice, NoGid> {
    let all = || entries.iter().map(|entry| entry.gid).collect();
    if link_layer == LinkLayer::InfiniBand {
        let entry = entries.first().cloned().ok_or_else(|| NoGid::NoRoceV2(all()))?;
        return Ok(Choice { entry, reason: Reason::InfiniBand });
    }
    let routable = || {
        let of_kind = entries.iter().filter(|entry| entry.kind == GidKind::RoceV2);
        of_kind.filter_map(|entry| Some((entry, entry.gid.ip()?)))
    };
    let found = match local {
        Some(address) => {
            let entry = routable().find(|(_, ip)| *ip == address).ok_or_else(|| NoGid::NotThisAddress {
                address,
                found: routable().map(|(_, ip)| ip).collect(),
            })?;
            Some((entry.0, Reason::Address(address)))
        }
        None => {
            let ipv4 = routable().find(|(_, ip)| matches!(ip, IpAddr::V4(ip) if *ip != Ipv4Addr::LOCALHOST));
            let ipv6 =
                || routable().find(|(_, ip)| matches!(ip, IpAddr::V6(ip) if !ip.is_unicast_link_local()));
            let ipv4 = ipv4.map(|(entry, _)| (entry, Reason::FirstIpv4));
            ipv4.or_else(|| ipv6().map(|(entry, _)| (entry, Reason::FirstIpv6)))
        }
    };
    let (entry, reason) = found.ok_or_else(|| NoGid::NoRoceV2(all()))?;
    Ok(Choice { entry: entry.clone(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u8, kind: GidKind, address: &str) -> GidEntry {
        let gid = match address.parse().unwrap() {
            IpAddr::V4(ip) => Gid(ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => Gid(ip.octets()),
        };
        GidEntry { index, gid, kind, netdev: None }
    }

    /// As a RoCE NIC with two addresses has it.
    fn table() -> Vec<GidEntry> {
        vec![
            entry(0, GidKind::IbOrRoceV1, "fe80::1"),
            entry(1, GidKind::RoceV2, "fe80::1"),
            entry(2, GidKind::RoceV2, "2001:db8::1"),
            entry(3, GidKind::IbOrRoceV1, "10.0.0.1"),
            entry(4, GidKind::RoceV2, "10.0.0.1"),
            entry(5, GidKind::RoceV2, "10.0.1.1"),
        ]
    }

    fn chosen(entries: &[GidEntry], local: Option<&str>) -> Result<(u8, Reason), NoGid> {
        let local = local.map(|address| address.parse().unwrap());
        choose(entries, LinkLayer::Ethernet, local).map(|choice| (choice.entry.index, choice.reason))
    }

    #[test]
    fn roce_v2_over_ipv4_is_taken_and_never_v1() {
        assert_eq!(chosen(&table(), None), Ok((4, Reason::FirstIpv4)));
        let address = "10.0.1.1".parse().unwrap();
        assert_eq!(chosen(&table(), Some("10.0.1.1")), Ok((5, Reason::Address(address))));
    }

    #[test]
    fn ipv6_serves_where_there_is_nothing_else_and_link_local_never() {
        assert_eq!(chosen(&table()[..4], None), Ok((2, Reason::FirstIpv6)));
        assert!(matches!(chosen(&table()[..2], None), Err(NoGid::NoRoceV2(all)) if all.len() == 2));
    }

    #[test]
    fn an_address_that_no_gid_has_is_refused_with_those_there_are() {
        let error = chosen(&table(), Some("192.0.2.1")).unwrap_err();
        assert!(matches!(&error, NoGid::NotThisAddress { found, .. } if found.len() == 4), "{error}");
        assert!(error.to_string().contains("10.0.1.1"), "{error}");
    }

    #[test]
    fn infiniband_goes_by_its_first_entry() {
        let choice = choose(&table(), LinkLayer::InfiniBand, None).unwrap();
        assert_eq!((choice.entry.index, choice.reason), (0, Reason::InfiniBand));
        assert!(choose(&[], LinkLayer::InfiniBand, None).is_err());
    }
}
