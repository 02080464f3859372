//! On which NUMA node memory is wanted, and on which it is.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::io;

use super::mem::{HUGE_PAGE_BYTES, Memory};

/// Words of a mask of nodes: for 1024, the most that kernels are built for.
const MASK_WORDS: usize = 1024 / c_ulong::BITS as usize;

/// Has pages of `memory` that have not been touched yet come from `node`, as long as that has any free.
///
/// # Errors
/// `InvalidInput` if there is no such node; what the kernel answers, which may forbid it (seccomp).
pub fn prefer(memory: &Memory, node: u32) -> io::Result<()> {
    let mut mask = [0 as c_ulong; MASK_WORDS];
    let word = mask.get_mut((node / c_ulong::BITS) as usize).ok_or(io::ErrorKind::InvalidInput)?;
    *word = 1 << (node % c_ulong::BITS);
    // The kernel takes one more than the bits that it looks at.
    let bits = (MASK_WORDS * c_ulong::BITS as usize + 1) as c_ulong;
    let (start, length) = (memory.address().as_ptr(), memory.bytes() as c_ulong);
    let flags: c_ulong = 0;
    // SAFETY: the policy of a range that `memory` has mapped; it moves and changes no page. `mask` lives through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start,
            length,
            libc::MPOL_PREFERRED as c_ulong,
            mask.as_ptr(),
            bits,
            flags,
        )
    };
    succeeded(result)
}

/// Bytes of `memory` on each node, as the kernel tells of the first page of each 2 MiB. Pages that were not touched are
/// nowhere.
pub fn nodes(memory: &Memory) -> io::Result<BTreeMap<u32, u64>> {
    let start = memory.address().as_ptr();
    let pages: Vec<*const c_void> = (0..memory.bytes())
        .step_by(HUGE_PAGE_BYTES as usize)
        .map(|offset| start.wrapping_add(offset as usize).cast_const().cast())
        .collect();
    let mut places = vec![-1 as c_int; pages.len()];
    let (own, none, flags): (c_int, *const c_int, c_int) = (0, std::ptr::null(), 0);
    // SAFETY: without nodes to move pages to, the kernel only tells where they are; both lists are as long as it is told and
    // live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            own,
            pages.len() as c_ulong,
            pages.as_ptr(),
            none,
            places.as_mut_ptr(),
            flags,
        )
    };
    succeeded(result)?;
    let mut bytes = BTreeMap::new();
    for node in places.into_iter().filter_map(|place| u32::try_from(place).ok()) {
        *bytes.entry(node).or_default() += HUGE_PAGE_BYTES;
    }
    Ok(bytes)
}

fn succeeded(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pages::PageKind;

    /// Mode and nodes of the policy at the beginning of `memory`.
    fn policy(memory: &Memory) -> (c_int, c_ulong) {
        let (mut mode, mut mask) = (-1 as c_int, [0 as c_ulong; MASK_WORDS]);
        let bits = (MASK_WORDS * c_ulong::BITS as usize + 1) as c_ulong;
        let by_address: c_ulong = 2;
        // SAFETY: both live through the call and are as long as it is told; the address is only looked up.
        let result = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &mut mode,
                mask.as_mut_ptr(),
                bits,
                memory.address().as_ptr(),
                by_address,
            )
        };
        succeeded(result).unwrap();
        (mode, mask[0])
    }

    #[test]
    fn the_kernel_knows_where_memory_is_wanted_and_where_it_is() {
        let memory = Memory::new(4 * HUGE_PAGE_BYTES, PageKind::Small).unwrap();
        match prefer(&memory, 0) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => {
                eprintln!("skipped: the kernel does not let memory be placed: {error}");
                return;
            }
            result => result.unwrap(),
        }
        assert_eq!(policy(&memory), (libc::MPOL_PREFERRED, 1));
        assert_eq!(nodes(&memory).unwrap(), BTreeMap::new(), "nothing was touched");
        memory.populate(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES).unwrap();
        assert_eq!(nodes(&memory).unwrap(), BTreeMap::from([(0, HUGE_PAGE_BYTES)]));
    }

    #[test]
    fn a_node_that_there_is_not_is_refused() {
        let memory = Memory::new(HUGE_PAGE_BYTES, PageKind::Small).unwrap();
        for node in [1023, 1024, u32::MAX] {
            assert!(prefer(&memory, node).is_err(), "{node}");
        }
    }
}
