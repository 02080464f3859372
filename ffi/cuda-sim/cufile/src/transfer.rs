//! One read or write: what of it is asked for, which way it goes, and what is counted.

use std::os::fd::AsFd;
use std::time::Instant;

use rustix::io::{Errno, pread, pwrite};

use crate::abi::Code;
use crate::cuda::Current;
use crate::device::{self, WINDOW_BYTES, Window, lock};
use crate::failure::Answer;
use crate::fault::{self, Effect};
use crate::session::{File, PAGE, Session};
use crate::statistics::{Direction, Transferred, Way};

/// What a caller asks for, as it says it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) direction: Direction,
    pub(crate) handle: usize,
    pub(crate) base: u64,
    pub(crate) bytes: usize,
    pub(crate) file_offset: i64,
    pub(crate) base_offset: i64,
}

/// The same, checked.
struct Checked {
    device: usize,
    /// On the device.
    address: u64,
    bytes: u64,
    file_offset: u64,
}

impl Checked {
    /// Whether it is not one of whole pages, in the file and on the device.
    fn is_unaligned(&self) -> bool {
        [self.address, self.bytes, self.file_offset].iter().any(|place| !place.is_multiple_of(PAGE))
    }
}

/// Does it; the bytes that were moved, which are fewer at the end of the file.
pub(crate) fn run(session: &Session, wanted: Wanted) -> Answer<u64> {
    let begin = Instant::now();
    let fault = session.config.faults.called(match wanted.direction {
        Direction::Read => fault::READ,
        Direction::Write => fault::WRITE,
    });
    let file = session.file(wanted.handle)?;
    let mut checked = check(session, &wanted)?;
    let is_unaligned = checked.is_unaligned();
    // What is not whole pages is not written past the page cache.
    let way = match wanted.direction {
        _ if fault == Some(Effect::Compat) => Way::Posix,
        Direction::Write if is_unaligned => Way::Posix,
        _ => file.way,
    };
    let moved = match fault {
        Some(Effect::Code(code)) => Err(code.into()),
        Some(Effect::Errno(errno)) => Err(errno.into()),
        Some(Effect::Short | Effect::Hang) => {
            checked.bytes = checked.bytes / 2 / PAGE * PAGE;
            transfer(session, &file, way, wanted.direction, &checked)
        }
        None | Some(Effect::Compat) => transfer(session, &file, way, wanted.direction, &checked),
    };
    lock(&session.counters).transfer(&Transferred {
        direction: wanted.direction,
        way,
        is_unaligned,
        device: checked.device,
        bytes: moved.ok(),
        time: begin.elapsed(),
    });
    moved
}

fn check(session: &Session, wanted: &Wanted) -> Answer<Checked> {
    let invalid = |_| Code::INVALID_VALUE;
    let bytes = isize::try_from(wanted.bytes).map_err(invalid)? as u64;
    let file_offset = u64::try_from(wanted.file_offset).map_err(invalid)?;
    let base_offset = u64::try_from(wanted.base_offset).map_err(invalid)?;
    let address = wanted.base.checked_add(base_offset).filter(|_| wanted.base != 0);
    let address = address.ok_or(Code::INVALID_VALUE)?;
    file_offset.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok()).ok_or(Code::INVALID_VALUE)?;
    if let Some(buffer) = session.buffer(wanted.base) {
        let end = base_offset.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
        if end > buffer.bytes {
            return Err(Code::INVALID_MAPPING_RANGE.into());
        }
    }
    let device = session.device_of(address, bytes)?;
    Ok(Checked { device, address, bytes, file_offset })
}

fn transfer(
    session: &Session,
    file: &File,
    way: Way,
    direction: Direction,
    checked: &Checked,
) -> Answer<u64> {
    let device = &session.devices[checked.device];
    let current = Current::on(checked.device as i32)?;
    let mut window = if way == Way::Posix { Window::on_host()? } else { device.take()? };
    let rate = session.config.bytes_per_second.filter(|_| way != Way::Posix);
    let moved = match direction {
        Direction::Read => read(file, &mut window, &current, checked, rate),
        Direction::Write => write(file, &mut window, &current, checked, rate),
    };
    if way != Way::Posix {
        device.keep(window);
    }
    moved
}

/// Does a system call again while signals interrupt it.
fn again<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Reads whole pages around what is asked for, and delivers that.
fn read(
    file: &File,
    window: &mut Window,
    current: &Current,
    checked: &Checked,
    rate: Option<u64>,
) -> Answer<u64> {
    let end = checked.file_offset + checked.bytes;
    let mut at = checked.file_offset;
    while at < end {
        let start = at / PAGE * PAGE;
        let room = (end - start).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX).min(WINDOW_BYTES as u64);
        let bytes = &mut window.bytes()[..room as usize];
        let found = again(|| pread(&file.fd, &mut *bytes, start))? as u64;
        let before = at - start;
        let useful = found.saturating_sub(before).min(end - at);
        if useful == 0 {
            break;
        }
        device::pace(rate, useful as usize);
        let target = checked.address + (at - checked.file_offset);
        window.deliver(current, before as usize, target, useful as usize)?;
        at += useful;
    }
    Ok(at - checked.file_offset)
}

fn write(
    file: &File,
    window: &mut Window,
    current: &Current,
    checked: &Checked,
    rate: Option<u64>,
) -> Answer<u64> {
    let buffered = if file.is_direct_io && checked.is_unaligned() { Some(file.buffered()?) } else { None };
    let fd = buffered.as_ref().map_or(file.fd.as_fd(), |fd| fd.as_fd());
    let mut done = 0;
    while done < checked.bytes {
        let room = (checked.bytes - done).min(WINDOW_BYTES as u64) as usize;
        window.collect(current, checked.address + done, room)?;
        device::pace(rate, room);
        let bytes = &window.bytes()[..room];
        let written = again(|| pwrite(fd, bytes, checked.file_offset + done))?;
        if written == 0 {
            break;
        }
        done += written as u64;
    }
    Ok(done)
}
