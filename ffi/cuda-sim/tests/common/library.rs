//! Where the simulated libcuda is. Included by tests of other packages too.

#![allow(clippy::unwrap_used, reason = "a test without the library has failed")]

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// A directory for `LD_LIBRARY_PATH`, beside what cargo has built, in which the simulated libcuda goes by its real names.
pub(crate) fn directory() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.ancestors().find(|above| above.join("libcuda_sim.so").is_file());
    let built = built
        .unwrap_or_else(|| panic!("no libcuda_sim.so above {}: cargo build -p cuda-sim", test.display()));
    let directory = built.join("cuda-sim");
    std::fs::create_dir_all(&directory).unwrap();
    for name in ["libcuda.so.1", "libcuda.so"] {
        match symlink("../libcuda_sim.so", directory.join(name)) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => panic!("{name}: {error}"),
            _ => {}
        }
    }
    directory
}
