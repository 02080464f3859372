//! Where the simulated libcuda and libcufile are. Included by tests of other packages too.

#![allow(clippy::unwrap_used, reason = "a test without the library has failed")]

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// A directory for `LD_LIBRARY_PATH`, beside what cargo has built, in which the simulated libcuda goes by its real names, and
/// so does the simulated libcufile if it was built.
pub(crate) fn directory() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.ancestors().find(|above| above.join("libcuda_sim.so").is_file());
    let built = built
        .unwrap_or_else(|| panic!("no libcuda_sim.so above {}: cargo build -p cuda-sim", test.display()));
    let directory = built.join("cuda-sim");
    std::fs::create_dir_all(&directory).unwrap();
    let cufile = [("libcufile.so.0", "libcufile_sim.so")];
    let cufile = cufile.into_iter().filter(|(_, library)| built.join(library).is_file());
    let cuda = [("libcuda.so.1", "libcuda_sim.so"), ("libcuda.so", "libcuda_sim.so")];
    for (name, library) in cuda.into_iter().chain(cufile) {
        match symlink(format!("../{library}"), directory.join(name)) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => panic!("{name}: {error}"),
            _ => {}
        }
    }
    directory
}
