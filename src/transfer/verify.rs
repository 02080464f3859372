//! Checks of what is resident, in place: the bytes in memory against the checksums of when they arrived.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::Jobs;
use super::load::blocking;
use crate::checksum::{self, CHUNK_BYTES};
use crate::error::{Code, Error, Result};
use crate::shard::copy_error;
use crate::sys::cuda::DeviceMemory;
use crate::sys::map::ReadMap;
use crate::tier::residency::{Content, Hold, Piece, Region};

impl Jobs {
    /// Compares what is resident with its checksums. What differs is not attached any more: it goes with its last lease.
    ///
    /// # Errors
    /// `catalog.checksum_mismatch`, or the device's.
    pub async fn verify(&self, hold: &Hold, content: &Arc<Content>) -> Result<()> {
        let result = match &content.region {
            Region::Host(_) => {
                let content = Arc::clone(content);
                blocking(move || verify_host(&content)).await
            }
            Region::Gpu(memory) => self.verify_gpu(content, memory).await,
        };
        if let Err(error) = &result
            && error.code == Code::CatalogChecksumMismatch
        {
            self.residency.condemn(hold.id());
        }
        result
    }

    async fn verify_gpu(&self, content: &Arc<Content>, memory: &Arc<DeviceMemory>) -> Result<()> {
        let gpus = self.residency.gpus();
        let index = gpus.iter().position(|gpu| Arc::ptr_eq(gpu.context(), memory.context()));
        let index =
            index.ok_or_else(|| Error::new(Code::Internal, "the memory of a GPU that is not in use"))?;
        let checksums = Arc::clone(gpus[index].checksums());
        let (content, memory) = (Arc::clone(content), Arc::clone(memory));
        let result = blocking(move || {
            let of = |offset, bytes| {
                let sums = checksums.chunks(&memory, offset, bytes, CHUNK_BYTES).map_err(copy_error)?;
                Ok::<_, Error>(put_together(&sums, bytes))
            };
            // All of the region at once, which keeps the device busy; piece by piece only to name what is wrong.
            if of(0, memory.bytes())? == content.packed_sum() {
                return Ok(());
            }
            for piece in content.packed() {
                let found = of(piece.offset, piece.bytes)?;
                if found != piece.sum {
                    return Err(mismatch(&content, piece, found));
                }
            }
            Err(Error::new(
                Code::CatalogChecksumMismatch,
                "bytes between the tensors of a region were changed",
            ))
        });
        let result = result.await;
        if let Err(error) = &result
            && error.code == Code::DeviceLost
        {
            self.residency.lose(index);
        }
        result
    }
}

/// The checksum of what the checksums of its chunks are known of.
fn put_together(chunks: &[u64], bytes: u64) -> u64 {
    let mut left = bytes;
    chunks.iter().fold(checksum::EMPTY, |sum, chunk| {
        let length = CHUNK_BYTES.min(left);
        left -= length;
        checksum::combine(sum, *chunk, length)
    })
}

/// On the host tier the CPU reads the region as a client does.
fn verify_host(content: &Content) -> Result<()> {
    let map = map(content)?;
    for ((offset, bytes), sum) in content.chunks.iter().copied().zip(content.checks.iter().copied()) {
        let piece = Piece { offset, bytes: bytes.into(), sum };
        let range = offset as usize..(offset + piece.bytes) as usize;
        let found = map.as_slice().get(range).map(checksum::chunk);
        if bytes > 0 && found != Some(sum) {
            return Err(mismatch(content, piece, found.unwrap_or_default()));
        }
    }
    Ok(())
}

fn map(content: &Content) -> Result<ReadMap> {
    let Region::Host(parts) = &content.region else {
        return Err(Error::new(Code::Internal, "a region that is not on the host tier"));
    };
    let parts = parts.iter().map(|part| Ok((part.as_fd().try_clone_to_owned()?, part.bytes())));
    let map = parts.collect::<std::io::Result<_>>().and_then(ReadMap::from_parts);
    map.map_err(|error| {
        Error::new(Code::TierHostOutOfMemory, format!("the region cannot be mapped to be checked: {error}"))
    })
}

fn mismatch(content: &Content, piece: Piece, found: u64) -> Error {
    let inside =
        |offset: u64, nbytes: u64| offset < piece.offset + piece.bytes && piece.offset < offset + nbytes;
    let tensor = content.tensors.iter().find(|tensor| inside(tensor.offset, tensor.nbytes));
    let name = tensor.map_or("no tensor", |tensor| content.description.tensors[tensor.tensor].name.as_str());
    let message = format!(
        "bytes {}..{} of the resident region ({name}) have checksum {found:016x}, and had {:016x} when they arrived: \
         memory is at fault; attach again, which loads them anew",
        piece.offset,
        piece.offset + piece.bytes,
        piece.sum
    );
    Error::new(Code::CatalogChecksumMismatch, message).kept("nothing: the artifact is not resident any more")
}
