//! Where bytes come from: files of this node, or peers.

pub mod file;

use file::OpenFile;

/// A source that a tenant may load from, as checked.
#[derive(Debug, Clone)]
pub enum Opened {
    /// Files of this node, opened with the tenant's rights.
    Files(Vec<OpenFile>),
    /// Whatever has this digest, on other nodes.
    Digest(String),
}
