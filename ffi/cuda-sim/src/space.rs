//! The addresses of the devices in this process: what is reserved, what is mapped there, and who may do what with it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::abi::{Answer, Code, Host};
use crate::memory::Area;
use crate::store::Allocation;

/// What a device may do with a mapping. Ordered: who may write may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    None,
    Read,
    ReadWrite,
}

impl Access {
    /// From `CUmemAccess_flags`.
    pub(crate) fn from_flags(flags: u32) -> Answer<Access> {
        match flags {
            0 => Ok(Access::None),
            1 => Ok(Access::Read),
            3 => Ok(Access::ReadWrite),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    pub(crate) fn flags(self) -> u64 {
        match self {
            Access::None => 0,
            Access::Read => 1,
            Access::ReadWrite => 3,
        }
    }
}

#[derive(Debug)]
struct Mapping {
    bytes: u64,
    allocation: Arc<Allocation>,
    access: Access,
}

/// One address space for all devices, as under unified addressing.
#[derive(Debug, Default)]
pub(crate) struct Space {
    areas: BTreeMap<u64, Area>,
    mappings: BTreeMap<u64, Mapping>,
    /// Start → device whose context owns it, for what `cuMemAlloc` made.
    plain: BTreeMap<u64, usize>,
}

/// A mapped range.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    pub(crate) allocation: Arc<Allocation>,
    pub(crate) access: Access,
}

impl Space {
    pub(crate) fn reserve(&mut self, bytes: u64, alignment: u64, hint: u64) -> Answer<u64> {
        let area = Area::reserve(bytes, alignment, hint)?;
        let start = area.start();
        self.areas.insert(start, area);
        Ok(start)
    }

    /// Gives up a whole reservation with nothing mapped in it.
    pub(crate) fn free(&mut self, start: u64, bytes: u64) -> Answer {
        let whole = self.areas.get(&start).is_some_and(|area| area.bytes() == bytes);
        if !whole || self.mappings.range(start..start + bytes).next().is_some() {
            return Err(Code::INVALID_VALUE);
        }
        self.areas.remove(&start);
        Ok(())
    }

    /// Whether an address is one of a device's, mapped or not.
    pub(crate) fn is_reserved(&self, address: u64) -> bool {
        self.areas.range(..=address).next_back().is_some_and(|(start, area)| address - start < area.bytes())
    }

    /// Maps the first `bytes` of an allocation; nobody may access them yet.
    pub(crate) fn map(&mut self, start: u64, bytes: u64, allocation: Arc<Allocation>) -> Answer {
        let end = start.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
        let inside =
            self.areas.range(..=start).next_back().is_some_and(|(area, found)| end <= area + found.bytes());
        if !inside || bytes == 0 || bytes > allocation.bytes || self.overlaps(start, end) {
            return Err(Code::INVALID_VALUE);
        }
        self.mappings.insert(start, Mapping { bytes, allocation, access: Access::None });
        Ok(())
    }

    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.mappings.range(..end).next_back().is_some_and(|(at, mapping)| at + mapping.bytes > start)
    }

    /// Starts of the mappings that make up a range; an error if they do not fill it, or reach out of it.
    fn whole(&self, start: u64, bytes: u64) -> Answer<Vec<u64>> {
        let end = start.checked_add(bytes).filter(|end| *end > start).ok_or(Code::INVALID_VALUE)?;
        let mut at = start;
        let mut starts = Vec::new();
        while at < end {
            let mapping = self.mappings.get(&at).ok_or(Code::INVALID_VALUE)?;
            starts.push(at);
            at += mapping.bytes;
        }
        if at == end { Ok(starts) } else { Err(Code::INVALID_VALUE) }
    }

    /// Takes out the mappings that make up a range. What they held is given back, to be dropped outside of any lock.
    pub(crate) fn unmap(&mut self, start: u64, bytes: u64) -> Answer<Vec<Arc<Allocation>>> {
        let starts = self.whole(start, bytes)?;
        Ok(starts
            .iter()
            .filter_map(|at| self.mappings.remove(at))
            .map(|mapping| mapping.allocation)
            .collect())
    }

    /// Says what `device` may do with the mappings that make up a range. Memory is not accessible to other devices than
    /// its own: peer access is not simulated.
    pub(crate) fn set_access(&mut self, start: u64, bytes: u64, device: usize, access: Access) -> Answer {
        let starts = self.whole(start, bytes)?;
        if starts.iter().any(|at| self.mappings[at].allocation.device != device) {
            return Err(Code::INVALID_DEVICE);
        }
        for at in starts {
            if let Some(mapping) = self.mappings.get_mut(&at) {
                mapping.access = access;
            }
        }
        Ok(())
    }

    /// The mapping that holds an address.
    pub(crate) fn find(&self, address: u64) -> Option<Found> {
        let (start, mapping) = self.mappings.range(..=address).next_back()?;
        (address - start < mapping.bytes).then(|| Found {
            start: *start,
            bytes: mapping.bytes,
            allocation: Arc::clone(&mapping.allocation),
            access: mapping.access,
        })
    }

    /// The memory behind a range, if `device` may access it that way.
    pub(crate) fn span(&self, device: usize, start: u64, bytes: u64, need: Access) -> Answer<Span> {
        let end = start.checked_add(bytes).ok_or(Code::ILLEGAL_ADDRESS)?;
        let mut at = start;
        let mut parts = Vec::new();
        while at < end {
            let found = self.find(at).ok_or(Code::ILLEGAL_ADDRESS)?;
            if found.allocation.device != device || found.access < need {
                return Err(Code::ILLEGAL_ADDRESS);
            }
            let offset = at - found.start;
            let length = (found.bytes - offset).min(end - at);
            parts.push(Part {
                start: (at - start) as usize,
                offset: offset as usize,
                bytes: length as usize,
                allocation: found.allocation,
            });
            at += length;
        }
        Ok(Span { parts })
    }

    /// Notes that a mapping was made by `cuMemAlloc` in the context of `device`.
    pub(crate) fn note_plain(&mut self, start: u64, device: usize) {
        self.plain.insert(start, device);
    }

    pub(crate) fn is_plain(&self, start: u64) -> bool {
        self.plain.contains_key(&start)
    }

    /// What `cuMemAlloc` made in the context of `device` and nobody has freed.
    pub(crate) fn plain_of(&self, device: usize) -> Vec<u64> {
        self.plain.iter().filter(|(_, owner)| **owner == device).map(|(start, _)| *start).collect()
    }

    /// Takes out what `cuMemAlloc` made, addresses and all.
    pub(crate) fn free_plain(&mut self, start: u64) -> Answer<Option<Arc<Allocation>>> {
        self.plain.remove(&start).ok_or(Code::INVALID_VALUE)?;
        self.areas.remove(&start);
        Ok(self.mappings.remove(&start).map(|mapping| mapping.allocation))
    }
}

/// Memory of a device, kept alive while work uses it.
#[derive(Debug)]
pub(crate) struct Span {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    /// Offset in the span.
    start: usize,
    /// Offset in the allocation.
    offset: usize,
    bytes: usize,
    allocation: Arc<Allocation>,
}

impl Span {
    /// Calls `with` for each piece of a range that lies in one allocation: the part's allocation, the offset there, the
    /// offset in the range, and the length.
    fn pieces(
        &self,
        offset: usize,
        bytes: usize,
        mut with: impl FnMut(&Allocation, usize, usize, usize) -> Answer,
    ) -> Answer {
        for part in &self.parts {
            let start = offset.max(part.start);
            let end = (offset + bytes).min(part.start + part.bytes);
            if start < end {
                with(&part.allocation, part.offset + start - part.start, start - offset, end - start)?;
            }
        }
        Ok(())
    }

    pub(crate) fn write(&self, offset: usize, source: &[u8]) -> Answer {
        self.pieces(offset, source.len(), |allocation, at, from, length| {
            allocation.shadow()?.write(at, &source[from..from + length])
        })
    }

    pub(crate) fn read(&self, offset: usize, target: &mut [u8]) -> Answer {
        self.pieces(offset, target.len(), |allocation, at, from, length| {
            allocation.shadow()?.read(at, &mut target[from..from + length])
        })
    }

    pub(crate) fn write_from(&self, offset: usize, source: Host, bytes: usize) -> Answer {
        self.pieces(offset, bytes, |allocation, at, from, length| {
            allocation.shadow()?.write_from(at, source.offset(from), length)
        })
    }

    pub(crate) fn read_into(&self, offset: usize, target: Host, bytes: usize) -> Answer {
        self.pieces(offset, bytes, |allocation, at, from, length| {
            allocation.shadow()?.read_into(at, target.offset(from), length)
        })
    }
}
