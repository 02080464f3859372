//! Threads and children with fewer rights than the tests have.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;

use rustix::fs::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// `nobody`.
pub const NOBODY: u32 = 65534;

/// Runs `what` on a thread of its own that is `nobody` for the kernel: its connections carry that identity. Needs root.
pub fn as_nobody<T: Send>(what: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            what()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Starts a child to which io_uring is refused with EPERM, as the default seccomp profile of containerd 2 does.
///
/// A filter holds for the thread that applies it and for what it starts, so it is put on a thread that ends here.
pub fn spawn_without_io_uring(command: &mut Command) -> Child {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let calls = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
            let filter = SeccompFilter::new(
                calls.into_iter().map(|call| (call, Vec::new())).collect::<BTreeMap<_, _>>(),
                SeccompAction::Allow,
                SeccompAction::Errno(libc::EPERM as u32),
                std::env::consts::ARCH.try_into().unwrap(),
            );
            let program: BpfProgram = filter.unwrap().try_into().unwrap();
            seccompiler::apply_filter(&program).unwrap();
            command.spawn().unwrap()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A copy of the binary in `directory` that every user can run: the build may lie where only its owner can go.
pub fn binary_for_everyone(directory: &Path) -> PathBuf {
    let path = directory.join("lodestream");
    std::fs::copy(env!("CARGO_BIN_EXE_lodestream"), &path).unwrap();
    path
}
