//! The harness of the integration tests: the real binary over its socket, on files of a real file system.
//!
//! Nothing here sleeps: a wait is a look at the daemon, paced by `poll(2)` on the daemon's own end.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part of the harness")]

pub mod daemon;
pub mod model;
pub mod tenant;
pub mod wire;

use std::path::Path;

/// A directory on the file system that holds the build: a drive, where `/tmp` may be memory.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Whether the tests run as root; those that need it say that they did nothing.
pub fn root_or_skip() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// Writes a file out and drops it from the page cache, so that the next read comes from the drive.
pub fn evict_from_page_cache(path: &Path) {
    let file = std::fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}
