//! Host memory that is registered: what asynchronous copies may use while the caller goes on.

use std::collections::BTreeMap;

use crate::abi::{Answer, Code, Host};
use crate::memory;

/// `CU_MEMHOSTREGISTER_PORTABLE | …_DEVICEMAP | …_IOMEMORY | …_READ_ONLY`.
const FLAGS_KNOWN: u32 = 1 | 2 | 4 | 8;
/// Registered for the contexts of all devices.
const PORTABLE: u32 = 1;

#[derive(Debug)]
struct Registered {
    bytes: u64,
    /// Whole pages.
    page_start: u64,
    page_end: u64,
    /// The device whose context it is registered for; none: all.
    device: Option<usize>,
}

/// The registrations of this process, by start address.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    all: BTreeMap<u64, Registered>,
}

impl Registrations {
    pub(crate) fn register(&mut self, start: Host, bytes: u64, flags: u32, device: usize) -> Answer {
        let page = rustix::param::page_size() as u64;
        let start = start.number();
        let end = start.checked_add(bytes).filter(|_| bytes > 0 && flags & !FLAGS_KNOWN == 0);
        let page_end = end.and_then(|end| end.checked_next_multiple_of(page)).ok_or(Code::INVALID_VALUE)?;
        let page_start = start / page * page;
        if self.all.values().any(|other| other.page_start < page_end && page_start < other.page_end) {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        if start == 0 || !memory::is_mapped(page_start, page_end - page_start) {
            return Err(Code::INVALID_VALUE);
        }
        let device = (flags & PORTABLE == 0).then_some(device);
        self.all.insert(start, Registered { bytes, page_start, page_end, device });
        Ok(())
    }

    pub(crate) fn contains(&self, start: Host) -> bool {
        self.all.contains_key(&start.number())
    }

    pub(crate) fn unregister(&mut self, start: Host) -> Answer {
        self.all.remove(&start.number()).map(|_| ()).ok_or(Code::HOST_MEMORY_NOT_REGISTERED)
    }

    /// Whether all of a range is registered for the device.
    pub(crate) fn covers(&self, start: Host, bytes: u64, device: usize) -> bool {
        let start = start.number();
        self.all.range(..=start).next_back().is_some_and(|(at, found)| {
            start.checked_add(bytes).is_some_and(|end| end <= at + found.bytes)
                && found.device.is_none_or(|owner| owner == device)
        })
    }

    /// A context has gone, and its registrations with it.
    pub(crate) fn forget(&mut self, device: usize) {
        self.all.retain(|_, found| found.device != Some(device));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_registered_once_and_only_where_memory_is() {
        let mut bytes = vec![0u8; 64 << 10];
        let (start, mut known) = (Host::of(&mut bytes), Registrations::default());
        known.register(start, 32 << 10, 0, 0).unwrap();
        let again = known.register(start.offset(4096), 4096, 0, 0);
        assert_eq!(again, Err(Code::HOST_MEMORY_ALREADY_REGISTERED));
        assert!(known.covers(start.offset(1), 100, 0));
        assert!(!known.covers(start.offset(1), 32 << 10, 0), "its end is not registered");
        assert!(!known.covers(start, 1, 1), "it is registered for another device");
        assert_eq!(known.unregister(start.offset(1)), Err(Code::HOST_MEMORY_NOT_REGISTERED));
        assert_eq!(known.unregister(start), Ok(()));
        assert_eq!(known.register(start, u64::MAX, 0, 0), Err(Code::INVALID_VALUE));
        assert_eq!(known.register(start, 1, 16, 0), Err(Code::INVALID_VALUE));
        let nowhere = start.offset(1 << 46);
        assert_eq!(known.register(nowhere, 4096, 0, 0), Err(Code::INVALID_VALUE));
    }
}
