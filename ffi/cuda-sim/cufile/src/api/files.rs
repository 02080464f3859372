//! Files and buffers, and transfers between them.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::{call, counted, exported, guarded, session, session_or_open};
use crate::abi::{Code, Descriptor, OPAQUE_FD, Status};
use crate::pointers::{In, Out};
use crate::statistics::{Call, Direction};
use crate::transfer::{self, Wanted};

exported! {
    fn cuFileHandleRegister(handle: Out<usize>, descriptor: In<Descriptor>) -> Status {
        call("cuFileHandleRegister", |config| {
            let descriptor = descriptor.get()?;
            let number = descriptor.handle.fd;
            if handle.is_null() {
                return Err(Code::INVALID_VALUE.into());
            }
            if descriptor.kind != OPAQUE_FD {
                return Err(Code::IO_NOT_SUPPORTED.into());
            }
            if number < 0 {
                return Err(Code::INVALID_VALUE.into());
            }
            // SAFETY: not -1 (checked above); the caller keeps it open during the call, and if it does not, what is done
            // with it is to ask the kernel, which says that it is not open.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            let session = session_or_open(config)?;
            handle.put(counted(Call::HandleRegister, &session, |session| session.register_file(fd, number))?)
        })
    }

    fn cuFileHandleDeregister(handle: usize) -> () {
        // The C function returns nothing.
        let _ = guarded("cuFileHandleDeregister", |_| {
            counted(Call::HandleDeregister, &*session()?, |session| session.deregister_file(handle))
        });
    }

    fn cuFileBufRegister(base: u64, bytes: usize, _flags: i32) -> Status {
        // The flags are about RDMA.
        call("cuFileBufRegister", |config| {
            let session = session_or_open(config)?;
            counted(Call::BufferRegister, &session, |session| session.register_buffer(base, bytes as u64))
        })
    }

    fn cuFileBufDeregister(base: u64) -> Status {
        call("cuFileBufDeregister", |_| {
            if base == 0 {
                return Err(Code::INVALID_VALUE.into());
            }
            // What a real library says when it is not open.
            let session = session().map_err(|_| Code::DRIVER_CLOSING)?;
            counted(Call::BufferDeregister, &session, |session| session.deregister_buffer(base))
        })
    }

    fn cuFileRead(handle: usize, base: u64, bytes: usize, file_offset: i64, base_offset: i64) -> isize {
        let wanted = Wanted { direction: Direction::Read, handle, base, bytes, file_offset, base_offset };
        run("cuFileRead", wanted)
    }

    fn cuFileWrite(handle: usize, base: u64, bytes: usize, file_offset: i64, base_offset: i64) -> isize {
        let wanted = Wanted { direction: Direction::Write, handle, base, bytes, file_offset, base_offset };
        run("cuFileWrite", wanted)
    }
}

/// Bytes, or -1: `errno` says why.
fn run(name: &'static str, wanted: Wanted) -> isize {
    let moved = guarded(name, |_| {
        if wanted.handle == 0 || wanted.base == 0 {
            return Err(Errno::INVAL.into());
        }
        // Handles are of an open driver.
        let session = session().map_err(|_| Code::HANDLE_NOT_REGISTERED)?;
        transfer::run(&session, wanted)
    });
    moved.map_or_else(
        |failure| {
            set_errno(failure.errno());
            -1
        },
        |bytes| bytes as isize,
    )
}

fn set_errno(errno: i32) {
    // SAFETY: takes nothing, and gives the place of this thread's own.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above: an integer that lives as long as the thread, which is this one.
    unsafe { place.write(errno) };
}
