//! Where a peer listens, as text that was checked: it is advertised by one daemon and connected to by another.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Error;

/// Length of a DNS name with all its labels.
const NAME_BYTES_MAX: usize = 253;
/// Length of one label of a DNS name.
const LABEL_BYTES_MAX: usize = 63;

/// `host:port`: a DNS name, an IPv4 address, or an IPv6 address in brackets, and a port other than 0.
///
/// It names one host that can be connected to: not all of this machine's addresses (`0.0.0.0`, `[::]`), no group of hosts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(String);

impl Address {
    /// Checks `text`.
    ///
    /// # Errors
    /// [`Error::BadAddress`].
    pub fn parse(text: &str) -> Result<Address, Error> {
        let checked = text.rsplit_once(':').filter(|(host, port)| host_is_one(host) && port_is_one(port));
        match checked {
            Some(_) => Ok(Address(text.to_owned())),
            None => Err(Error::BadAddress(crate::json::shown(text))),
        }
    }

    /// The text, which is what to connect to.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn port_is_one(port: &str) -> bool {
    // The number's own parser takes a sign and leading zeros: one port would have several spellings.
    port.parse::<u16>().is_ok_and(|number| number != 0 && number.to_string() == port)
}

fn host_is_one(host: &str) -> bool {
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return inner.parse::<Ipv6Addr>().is_ok_and(|address| one_host(IpAddr::V6(address)));
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return one_host(IpAddr::V4(address));
    }
    let label = |label: &str| {
        (1..=LABEL_BYTES_MAX).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A name that ends in a number is a misspelt IPv4 address, which resolvers read in ways of their own.
    let number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    host.len() <= NAME_BYTES_MAX && host.split('.').all(label) && !host.rsplit('.').next().is_some_and(number)
}

fn one_host(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    !address.is_unspecified() && !address.is_multicast() && !broadcast
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_and_one_port() {
        for text in ["10.0.0.1:1", "node-a.cluster.local:7443", "localhost:65535", "[2001:db8::1]:80", "a1:9"]
        {
            assert_eq!(Address::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let long = format!("{}:1", "a.".repeat(127) + "a");
        for text in [
            "",
            ":",
            "host",
            "host:",
            ":80",
            "host:0",
            "host:65536",
            "host:+80",
            "host:080",
            "host:80 ",
            " host:80",
            "0.0.0.0:80",
            "[::]:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "[ff02::1]:80",
            "1.2.3:80",
            "1.2.3.4.5:80",
            "0x7f000001:80:80",
            "::1:80",
            "[::1:80",
            "[fe80::1%eth0]:80",
            "user@host:80",
            "http://host:80",
            "ho/st:80",
            "-a:80",
            "a-:80",
            "a..b:80",
            ".a:80",
            "a.:80",
            "h\u{f6}st:80",
            "host\0:80",
            long.as_str(),
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
