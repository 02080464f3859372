//! The checksum of a chunk: CRC-64/NVME over each 1 MiB of a file (docs/decisions/0002-checksums.md).

use std::sync::LazyLock;

/// Bytes of one chunk of a file; the last one of a file may be shorter.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// The checksum of one chunk.
pub fn chunk(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// The checksum of no bytes.
pub const EMPTY: u64 = 0;

/// The generator, x^64 left out, lowest power in the highest bit.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// x^(8·2^k) modulo the generator, for each bit k of a number of bytes.
static SHIFTS: LazyLock<[u64; 64]> = LazyLock::new(|| {
    // x^8.
    let mut shift = 1 << (63 - 8);
    std::array::from_fn(|_| {
        let this = shift;
        shift = multiply(this, this);
        this
    })
});

/// The product of two polynomials modulo the generator.
fn multiply(mut a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    while a != 0 {
        product ^= if a >> 63 == 1 { b } else { 0 };
        a <<= 1;
        b = b >> 1 ^ if b & 1 == 1 { POLYNOMIAL } else { 0 };
    }
    product
}

/// The checksum of two pieces one behind the other, from that of each; the second is `bytes` long.
///
/// Not the library's: that takes 0.4 ms, and a model of 100 GB has a hundred thousand pieces.
pub fn combine(first: u64, second: u64, bytes: u64) -> u64 {
    let bits = (0..64).filter(|bit| bytes >> bit & 1 == 1);
    bits.fold(first, |sum, bit| multiply(SHIFTS[bit], sum)) ^ second
}

/// The checksum of a chunk that comes in pieces.
#[derive(Debug)]
pub struct Running(crc_fast::Digest);

impl Running {
    /// Of nothing yet.
    #[allow(clippy::new_without_default, reason = "an empty checksum is not a default of anything")]
    pub fn new() -> Running {
        Running(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme))
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all of them.
    pub fn finish(self) -> u64 {
        self.0.finalize()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn pieces_combine() {
        let (first, second) = (super::chunk(b"1234"), super::chunk(b"56789"));
        assert_eq!(super::combine(first, second, 5), super::chunk(b"123456789"));
        assert_eq!(super::combine(super::EMPTY, first, 4), first);
        assert_eq!(super::chunk(b""), super::EMPTY);
    }

    proptest::proptest! {
        #[test]
        fn pieces_combine_as_in_the_library(first: u64, second: u64, bytes in 0u64..1 << 40) {
            let expected =
                crc_fast::checksum_combine(crc_fast::CrcAlgorithm::Crc64Nvme, first, second, bytes);
            proptest::prop_assert_eq!(super::combine(first, second, bytes), expected);
        }
    }

    #[test]
    fn is_crc64_nvme() {
        // The check value of the NVM Express specification.
        assert_eq!(super::chunk(b"123456789"), 0xae8b_1486_0a79_9888);
    }
}
