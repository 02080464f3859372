//! Memory that the bytes of a transfer pass through, and the modelled bandwidth of the direct way.
//!
//! A direct transfer of a real node goes from the drive to the memory of the GPU, over neither the host's memory nor the link
//! that copies from the host use. Here the drive writes into a window: a piece of device memory of this library's own whose
//! descriptor, as the simulated driver's are, is a file that can be mapped. From there the driver copies to where the
//! bytes belong, inside the device, so that it sees to who may write where, and the link's modelled bandwidth is not used.
//! In compatibility mode bytes pass through host memory, and use the link.

use std::os::fd::AsFd;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::cuda::{Current, Memory};
use crate::failure::Answer;

/// Bytes that go through at a time: the unit of device memory.
pub(crate) const WINDOW_BYTES: usize = 2 << 20;

/// A lock that nothing panics under; if something did, what it guards is still whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One device that this process sees.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) uuid: [u8; 16],
    ordinal: i32,
    /// Windows that no transfer uses now: made when needed, kept until the driver is closed.
    windows: Mutex<Vec<Window>>,
}

impl Device {
    pub(crate) fn new(ordinal: i32, uuid: [u8; 16]) -> Device {
        Device { uuid, ordinal, windows: Mutex::new(Vec::new()) }
    }

    /// A window for one transfer.
    pub(crate) fn take(&self) -> Answer<Window> {
        let kept = lock(&self.windows).pop();
        kept.map_or_else(|| Window::on_device(self.ordinal), Ok)
    }

    /// Gives it back.
    pub(crate) fn keep(&self, window: Window) {
        lock(&self.windows).push(window);
    }
}

/// [`WINDOW_BYTES`] that files are read into and written from.
#[derive(Debug)]
pub(crate) struct Window {
    start: *mut u8,
    /// Where it is on the device; none: it is host memory.
    memory: Option<Memory>,
}

// SAFETY: a `Window` alone owns its mapping, which any thread may use.
unsafe impl Send for Window {}

impl Window {
    fn on_device(device: i32) -> Answer<Window> {
        let memory = Memory::new(device, WINDOW_BYTES)?;
        let file = memory.export()?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel chooses; the file is as long, and stays so.
        let start =
            unsafe { mmap(ptr::null_mut(), WINDOW_BYTES, access, MapFlags::SHARED, file.as_fd(), 0) }?;
        Ok(Window { start: start.cast(), memory: Some(memory) })
    }

    pub(crate) fn on_host() -> Answer<Window> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel chooses.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), WINDOW_BYTES, access, MapFlags::PRIVATE) }?;
        Ok(Window { start: start.cast(), memory: None })
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped with this size as long as `self` lives, and borrowed like it. The driver accesses it only in copies
        // that `deliver` and `collect` wait for.
        unsafe { std::slice::from_raw_parts_mut(self.start, WINDOW_BYTES) }
    }

    /// Copies `count` bytes from `from` on to the device's memory.
    pub(crate) fn deliver(&mut self, current: &Current, from: usize, target: u64, count: usize) -> Answer {
        match &self.memory {
            Some(memory) => current.copy(target, memory.address() + from as u64, count),
            None => current.upload(target, &self.bytes()[from..from + count]),
        }
    }

    /// Copies `count` bytes of the device's memory to the beginning.
    pub(crate) fn collect(&mut self, current: &Current, source: u64, count: usize) -> Answer {
        match &self.memory {
            Some(memory) => current.copy(memory.address(), source, count),
            None => current.download(&mut self.bytes()[..count], source),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: mapped with this size by `on_device` or `on_host`, once; nobody has a reference into it any more. If it
        // fails the mapping stays, which harms nobody.
        let _ = unsafe { munmap(self.start.cast(), WINDOW_BYTES) };
    }
}
