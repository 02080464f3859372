//! cuFile's counters of one GPU, out of a structure that has grown from version to version.
//!
//! What comes before the GPUs in `CUfileStatsLevel3` is longer in newer libraries, and nothing in it says how long. So a GPU
//! is found by its UUID, with which its part begins.

/// Length of what is handed to the library, in words: about ten times what it writes today.
const BUFFER_WORDS: usize = 8192;
/// Words of a UUID.
const UUID_WORDS: usize = 2;

/// Places of `CUfilePerGpuStats`, in words behind the UUID.
const READ_BYTES: usize = 0;
const TOTAL_READS: usize = 4;
const P2P_READS: usize = 5;
const NVFS_READS: usize = 6;
const POSIX_READS: usize = 7;
/// Words of it that are looked at.
const WORDS: usize = 8;

/// How bytes came into the memory of one GPU. All but `bytes` are numbers of reads, as the library divides them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes read.
    pub bytes: u64,
    /// All reads.
    pub reads: u64,
    /// From the drive to the GPU by PCI P2PDMA.
    pub p2p: u64,
    /// From the drive to the GPU by nvidia-fs.
    pub nvfs: u64,
    /// By way of host memory.
    pub posix: u64,
}

impl Counters {
    /// What was added since `before`.
    pub fn since(self, before: Counters) -> Counters {
        Counters {
            bytes: self.bytes.wrapping_sub(before.bytes),
            reads: self.reads.wrapping_sub(before.reads),
            p2p: self.p2p.wrapping_sub(before.p2p),
            nvfs: self.nvfs.wrapping_sub(before.nvfs),
            posix: self.posix.wrapping_sub(before.posix),
        }
    }

    /// Whether they prove that at least `bytes` came, and all from the drive to the GPU.
    pub fn prove(self, bytes: u64) -> bool {
        self.posix == 0
            && self.reads > 0
            && self.p2p.checked_add(self.nvfs) == Some(self.reads)
            && self.bytes >= bytes
    }
}

/// What the library writes into.
pub(super) fn buffer() -> Vec<u64> {
    vec![0; BUFFER_WORDS]
}

/// The counters of the GPU with this UUID.
pub(super) fn of(buffer: &[u64], uuid: [u8; 16]) -> Option<Counters> {
    let (halves, _) = uuid.as_chunks::<8>();
    let name: Vec<u64> = halves.iter().map(|half| u64::from_ne_bytes(*half)).collect();
    let at = buffer.windows(UUID_WORDS).position(|words| words == name)? + UUID_WORDS;
    let words = buffer.get(at..at + WORDS)?;
    Some(Counters {
        bytes: words[READ_BYTES],
        reads: words[TOTAL_READS],
        p2p: words[P2P_READS],
        nvfs: words[NVFS_READS],
        posix: words[POSIX_READS],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_found_wherever_the_library_puts_it() {
        let uuid: [u8; 16] = std::array::from_fn(|byte| byte as u8 + 1);
        for at in [150, 177] {
            let mut buffer = buffer();
            buffer[at] = u64::from_ne_bytes(uuid[..8].try_into().unwrap());
            buffer[at + 1] = u64::from_ne_bytes(uuid[8..].try_into().unwrap());
            buffer[at + 2..at + 10].copy_from_slice(&[4096, 0, 0, 0, 3, 1, 2, 0]);
            let found = of(&buffer, uuid).unwrap();
            assert_eq!(found, Counters { bytes: 4096, reads: 3, p2p: 1, nvfs: 2, posix: 0 });
        }
        assert_eq!(of(&buffer(), uuid), None);
    }

    /// Invariant 10: a path is proven by its counters or not at all.
    #[test]
    fn only_reads_that_all_went_to_the_gpu_are_a_proof() {
        let good = Counters { bytes: 8192, reads: 2, p2p: 1, nvfs: 1, posix: 0 };
        assert!(good.prove(8192));
        assert!(!good.prove(8193));
        assert!(!Counters { posix: 1, ..good }.prove(8192));
        assert!(!Counters { reads: 3, ..good }.prove(8192));
        assert!(!Counters::default().prove(0));
    }
}
