//! Kernels that the simulated device knows, by name: what they compute, done by the CPU.
//!
//! The code that a program hands in is only looked at for the names of its entries.

use crate::abi::{Answer, Code};
use crate::space::{Access, Span};

/// Bytes of device memory that a kernel looks at a time.
const PIECE_BYTES: usize = 64 << 10;

/// A kernel and how it is called.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    /// Number of arguments, each of 64 bits.
    pub(crate) arguments: usize,
    /// Threads of a block that it is made for.
    pub(crate) threads_max: u32,
    pub(crate) run: fn(&Launch, &Memory<'_>) -> Answer,
}

/// How a kernel was launched.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) arguments: Vec<u64>,
}

/// Device memory as the kernel may access it: start, bytes, what for.
pub(crate) type Memory<'a> = dyn Fn(u64, u64, Access) -> Answer<Span> + 'a;

const KERNELS: &[Kernel] = &[Kernel {
    name: "lodestream_crc64_chunks",
    arguments: 4,
    threads_max: CHUNK_THREADS,
    run: crc64_chunks,
}];

pub(crate) fn find(name: &str) -> Option<&'static Kernel> {
    KERNELS.iter().find(|kernel| kernel.name == name)
}

/// Threads of a block of `lodestream_crc64_chunks`, exactly.
const CHUNK_THREADS: u32 = 128;

/// `lodestream_crc64_chunks(data, bytes, chunk_bytes, sums)`: the CRC-64/NVME of each chunk. A block takes the chunk of its
/// number: chunks past the grid are left alone.
fn crc64_chunks(launch: &Launch, memory: &Memory<'_>) -> Answer {
    let [data, bytes, chunk_bytes, sums] = launch.arguments[..] else { return Err(Code::LAUNCH_FAILED) };
    if launch.block != [CHUNK_THREADS, 1, 1] || launch.grid[1..] != [1, 1] || chunk_bytes == 0 {
        return Err(Code::LAUNCH_FAILED);
    }
    if !sums.is_multiple_of(8) {
        return Err(Code::MISALIGNED_ADDRESS);
    }
    let chunks = bytes.div_ceil(chunk_bytes).min(u64::from(launch.grid[0]));
    let mut piece = vec![0; PIECE_BYTES];
    for chunk in 0..chunks {
        let start = chunk * chunk_bytes;
        let length = chunk_bytes.min(bytes - start);
        let address = data.checked_add(start).ok_or(Code::ILLEGAL_ADDRESS)?;
        let source = memory(address, length, Access::Read)?;
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
        for offset in (0..length as usize).step_by(PIECE_BYTES) {
            let piece = &mut piece[..PIECE_BYTES.min(length as usize - offset)];
            source.read(offset, piece)?;
            digest.update(piece);
        }
        let place = sums.checked_add(chunk * 8).ok_or(Code::ILLEGAL_ADDRESS)?;
        memory(place, 8, Access::ReadWrite)?.write(0, &digest.finalize().to_le_bytes())?;
    }
    Ok(())
}
