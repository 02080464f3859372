//! One read or write: what of it is asked for, which way it goes, and what is counted.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use cuda_sim_model::{Link, wait_until};
use rustix::io::{Errno, pread, pwrite};

use crate::abi::Code;
use crate::cuda::Current;
use crate::device::{WINDOW_BYTES, Window, lock};
use crate::failure::Answer;
use crate::fault::{self, Effect};
use crate::session::{File, PAGE, Session};
use crate::statistics::{Direction, Transferred, Way};

/// Compatibility mode does transfers in pieces of so many bytes.
const POSIX_PIECE_BYTES: u64 = 1 << 20;

/// Takes the time that so many bytes take on a link.
fn pace(link: Option<&Link>, bytes: u64) {
    link.and_then(|link| link.take(bytes)).into_iter().for_each(wait_until);
}

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
pub(crate) struct Planned {
    direction: Direction,
    file: Arc<File>,
    pub(crate) way: Way,
    device: usize,
    /// On the device.
    address: u64,
    bytes: u64,
    file_offset: u64,
}

/// Checks what is asked for.
pub(crate) fn plan(session: &Session, wanted: Wanted) -> Answer<Planned> {
    let invalid = |_| Code::INVALID_VALUE;
    let file = session.file(wanted.handle)?;
    let file_offset = u64::try_from(wanted.file_offset).map_err(invalid)?;
    let base_offset = u64::try_from(wanted.base_offset).map_err(|_| Code::INTERNAL_ERROR)?;
    let bytes = wanted.bytes as u64;
    if let Some(buffer) = session.buffer(wanted.base) {
        base_offset
            .checked_add(bytes)
            .filter(|end| *end <= buffer.bytes)
            .ok_or(Code::INVALID_MAPPING_RANGE)?;
    }
    let end = file_offset.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
    i64::try_from(end).map_err(invalid)?;
    if wanted.direction == Direction::Write && !file.is_writable {
        return Err(Code::INVALID_FILE_OPEN_FLAG.into());
    }
    let address = wanted.base.checked_add(base_offset).ok_or(Code::INVALID_VALUE)?;
    let device = session.device_of(address, bytes)?;
    let way = file.way;
    let mut planned = Planned { direction: wanted.direction, file, way, device, address, bytes, file_offset };
    // What is not whole pages is not written past the page cache.
    if wanted.direction == Direction::Write && planned.is_unaligned() {
        planned.way = Way::Posix;
    }
    Ok(planned)
}

impl Planned {
    /// Whether it is not one of whole pages, in the file and on the device.
    fn is_unaligned(&self) -> bool {
        [self.address, self.bytes, self.file_offset].iter().any(|place| !place.is_multiple_of(PAGE))
    }

    /// Does it; the bytes that were moved, which are fewer at the end of the file.
    pub(crate) fn run(&mut self, session: &Session) -> Answer<u64> {
        let fault = session.config.faults.called(match self.direction {
            Direction::Read => fault::READ,
            Direction::Write => fault::WRITE,
        });
        if fault == Some(Effect::Compat) {
            self.way = Way::Posix;
        }
        let bytes = match fault {
            Some(Effect::Code(code)) => return Err(code.into()),
            Some(Effect::Errno(errno)) => return Err(errno.into()),
            Some(Effect::Short | Effect::Hang) => self.bytes / 2 / PAGE * PAGE,
            None | Some(Effect::Compat) => self.bytes,
        };
        let device = &session.devices[self.device];
        let current = Current::on(self.device as i32)?;
        let is_direct = self.way != Way::Posix;
        let mut window = if is_direct { device.take()? } else { Window::on_host()? };
        let link = is_direct.then_some(&session.config.direct);
        let moved = match self.direction {
            Direction::Read => self.read(&mut window, &current, bytes, link),
            Direction::Write => self.write(&mut window, &current, bytes, link),
        };
        if is_direct {
            device.keep(window);
        }
        moved
    }

    /// Pieces that a real library would do it in.
    fn pieces(&self, session: &Session) -> u64 {
        let piece =
            if self.way == Way::Posix { POSIX_PIECE_BYTES } else { session.parameters.direct_max_bytes() };
        self.bytes.div_ceil(piece.max(1))
    }

    /// Reads whole pages around what is asked for, and delivers that.
    fn read(&self, window: &mut Window, current: &Current, bytes: u64, link: Option<&Link>) -> Answer<u64> {
        let end = self.file_offset + bytes;
        let mut at = self.file_offset;
        while at < end {
            let start = at / PAGE * PAGE;
            let room =
                (end - start).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX).min(WINDOW_BYTES as u64);
            let piece = &mut window.bytes()[..room as usize];
            let found = again(|| pread(&self.file.fd, &mut *piece, start))? as u64;
            let before = at - start;
            let useful = found.saturating_sub(before).min(end - at);
            if useful == 0 {
                break;
            }
            pace(link, useful);
            let target = self.address + (at - self.file_offset);
            window.deliver(current, before as usize, target, useful as usize)?;
            at += useful;
        }
        Ok(at - self.file_offset)
    }

    fn write(&self, window: &mut Window, current: &Current, bytes: u64, link: Option<&Link>) -> Answer<u64> {
        let through_cache = self.file.is_direct_io && self.is_unaligned();
        let buffered = if through_cache { Some(self.file.buffered()?) } else { None };
        let fd = buffered.as_ref().map_or(self.file.fd.as_fd(), |fd| fd.as_fd());
        let mut done = 0;
        while done < bytes {
            let room = (bytes - done).min(WINDOW_BYTES as u64) as usize;
            window.collect(current, self.address + done, room)?;
            pace(link, room as u64);
            let piece = &window.bytes()[..room];
            let written = again(|| pwrite(fd, piece, self.file_offset + done))?;
            if written == 0 {
                break;
            }
            done += written as u64;
        }
        Ok(done)
    }
}

/// Checks it, does it and counts it.
pub(crate) fn run(session: &Session, wanted: Wanted) -> Answer<u64> {
    let begin = Instant::now();
    let mut planned =
        plan(session, wanted).inspect_err(|_| lock(&session.counters).refused(wanted.direction))?;
    let moved = planned.run(session);
    lock(&session.counters).transfer(&Transferred {
        direction: planned.direction,
        way: planned.way,
        is_unaligned: planned.is_unaligned(),
        device: planned.device,
        bytes: planned.bytes,
        pieces: planned.pieces(session),
        succeeded: moved.is_ok(),
        time: begin.elapsed(),
    });
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
