//! Where bytes come from. Today: files of this node.

pub mod file;
