//! The harness of the integration tests: the real binary over its socket, on files of a real file system.
//!
//! Nothing here sleeps: a wait is a look at the daemon, paced by `poll(2)` on the daemon's own end.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part of the harness")]
#![allow(clippy::print_stderr, reason = "what a failed or skipped test has to say")]

pub mod daemon;
pub mod gate;
pub mod gpu;
pub mod model;
pub mod nvml;
pub mod peers;
pub mod tenant;
pub mod wire;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A directory on the file system that holds the build: a drive, where `/tmp` may be memory.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A directory that other users can enter: the build's own may lie where only its owner can go.
pub fn directory_for_everyone() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    set_mode(directory.path(), 0o777);
    directory
}

pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
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
    let file = fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}
