//! What stands in for known kernels: the same results, computed by the CPU.

use crate::code::{self, Outcome};
use crate::space::{self, Access};

/// Arguments of a launch, as 64-bit words.
pub(crate) type Arguments = [u64; 4];

/// A kernel: what it does with its arguments.
pub(crate) type Kernel = fn(Arguments) -> Outcome;

/// The kernel with this name.
pub(crate) fn find(name: &str) -> Option<Kernel> {
    match name {
        "lodestream_crc64_chunks" => Some(crc64_chunks),
        _ => None,
    }
}

/// `(data, bytes, chunk_bytes, sums)`: the CRC-64/NVME of each chunk.
fn crc64_chunks([data, bytes, chunk_bytes, sums]: Arguments) -> Outcome {
    if chunk_bytes == 0 {
        return Err(code::LAUNCH_FAILED);
    }
    for (number, start) in (0..bytes).step_by(usize::try_from(chunk_bytes).unwrap_or(usize::MAX)).enumerate()
    {
        let length = chunk_bytes.min(bytes - start);
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
        for piece in space::pieces(data + start, length, Access::Read)? {
            // SAFETY: the piece is mapped as long as it lives; that nobody writes meanwhile is the launcher's business,
            // as on a device.
            digest.update(unsafe { std::slice::from_raw_parts(piece.start(), piece.bytes) });
        }
        let sum = digest.finalize().to_le_bytes();
        let mut at = 0;
        for piece in space::pieces(sums + number as u64 * 8, 8, Access::ReadWrite)? {
            // SAFETY: the piece is mapped, and as long as that.
            unsafe { std::ptr::copy_nonoverlapping(sum[at..].as_ptr(), piece.start(), piece.bytes) };
            at += piece.bytes;
        }
    }
    Ok(())
}
