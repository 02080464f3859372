//! The checksum of a chunk: CRC-64/NVME over each 1 MiB of a file (docs/decisions/0002-checksums.md).

/// Bytes of one chunk of a file; the last one of a file may be shorter.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// The checksum of one chunk.
pub fn chunk(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_crc64_nvme() {
        // The check value of the NVM Express specification.
        assert_eq!(super::chunk(b"123456789"), 0xae8b_1486_0a79_9888);
    }
}
