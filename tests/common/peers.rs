//! Daemons that are peers of each other, on addresses of their own, with certificates of one authority.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::daemon::{Options, own_address};

/// Certificates, made by the script that users have for trying things out.
pub struct Authority {
    directory: tempfile::TempDir,
    nodes: Vec<String>,
}

impl Authority {
    pub fn of(nodes: &[&str]) -> Authority {
        let directory = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/make-certificates");
        let made = Command::new(script).arg(directory.path()).args(nodes).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Authority { directory, nodes: nodes.iter().map(|node| (*node).to_owned()).collect() }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    /// The lines of a configuration by which `node` trusts all nodes of this authority.
    pub fn config(&self, node: &str, listen: Option<SocketAddr>, peers: &[SocketAddr]) -> String {
        let identities: Vec<_> =
            self.nodes.iter().map(|node| format!("spiffe://lodestream.test/{node}")).collect();
        let peers: Vec<_> = peers.iter().map(SocketAddr::to_string).collect();
        let listen = listen.map(|address| format!("listen = \"{address}\"\n")).unwrap_or_default();
        format!(
            "node = \"{node}\"\n[peer]\n{listen}certificate = {:?}\nkey = {:?}\nca = {:?}\nidentities = {identities:?}\n\
             peers = {peers:?}\n",
            self.path(&format!("{node}.pem")),
            self.path(&format!("{node}.key")),
            self.path("ca.pem"),
        )
    }
}

/// An address for a peer to listen on.
pub fn address() -> SocketAddr {
    own_address()
}

/// A daemon for models below `root` with this configuration.
pub fn options(root: &Path, config: &str) -> Options {
    Options::new(root).budget("512MiB").config(config)
}
