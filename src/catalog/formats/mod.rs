//! The formats of files: which one a file has, and how its header is read.

pub mod gguf;
pub mod safetensors;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Tensor;
use crate::config::Limits;
use crate::error::Result;
use crate::json::shown;
use crate::source::file::OpenFile;

/// Bytes of a GGUF file that are read first; headers without a vocabulary fit.
const GGUF_FIRST_BYTES: u64 = 1 << 20;

/// Format of a file, by its extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `.safetensors`
    Safetensors,
    /// `.gguf`
    Gguf,
    /// Anything else: bytes without tensors.
    Plain,
}

impl Format {
    /// The format of a file of this name.
    pub fn of_name(name: &str) -> Format {
        match name.rsplit_once('.') {
            Some((_, "safetensors")) => Format::Safetensors,
            Some((_, "gguf")) => Format::Gguf,
            _ => Format::Plain,
        }
    }

    /// The name in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Format::Safetensors => "safetensors",
            Format::Gguf => "gguf",
            Format::Plain => "plain",
        }
    }
}

/// What one file's header says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// Its tensors, by offset; `file` is 0.
    pub tensors: Vec<Tensor>,
    /// Its free-form strings.
    pub metadata: BTreeMap<String, String>,
}

/// Reads the header of `file`, which may have at most `tensors_max` tensors.
pub(super) fn read(file: &OpenFile, tensors_max: u64, limits: &Limits) -> Result<(Format, Header)> {
    let format = Format::of_name(&file.name);
    let header = match format {
        Format::Safetensors => read_safetensors(file, tensors_max, limits.header_bytes_max)?,
        Format::Gguf => read_gguf(file, tensors_max, limits.header_bytes_max)?,
        Format::Plain => Header::default(),
    };
    Ok((format, header))
}

fn read_safetensors(file: &OpenFile, tensors_max: u64, header_bytes_max: u64) -> Result<Header> {
    let in_file = |error: safetensors::Error| at(file, error.into());
    let bytes = file.stamp.bytes;
    let mut length = [0; safetensors::LENGTH_BYTES];
    let known = length.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
    file.read_exact_at(&mut length[..known], 0)?;
    let header_bytes =
        safetensors::header_bytes(&length[..known], bytes, header_bytes_max).map_err(in_file)?;
    let mut header = vec![0; header_bytes];
    file.read_exact_at(&mut header, length.len() as u64)?;
    safetensors::parse(&header, bytes, tensors_max).map_err(in_file)
}

/// A GGUF header does not say how long it is: reads twice as much until it is all there.
fn read_gguf(file: &OpenFile, tensors_max: u64, header_bytes_max: u64) -> Result<Header> {
    let bytes = file.stamp.bytes;
    let most = bytes.min(header_bytes_max);
    let mut length = GGUF_FIRST_BYTES.min(most);
    loop {
        let mut prefix = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut prefix, 0)?;
        match gguf::parse(&prefix, bytes, tensors_max) {
            Err(gguf::Error::Truncated) if length < most => length = length.saturating_mul(2).min(most),
            Err(gguf::Error::Truncated) if length < bytes => {
                return Err(at(file, gguf::Error::HeaderTooLarge { bytes_max: header_bytes_max }.into()));
            }
            result => return result.map_err(|error| at(file, error.into())),
        }
    }
}

/// The error with the file's name in front.
fn at(file: &OpenFile, mut error: crate::Error) -> crate::Error {
    error.message = format!("'{}': {}", shown(&file.name), error.message);
    error
}

/// The first place where two tensors share bytes: the names of the two. Sorts the tensors by offset.
fn overlap(tensors: &mut [Tensor]) -> Option<(String, String)> {
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.nbytes));
    let mut filled = tensors.iter().filter(|tensor| tensor.nbytes > 0);
    let mut before = filled.next()?;
    for tensor in filled {
        if tensor.offset - before.offset < before.nbytes {
            return Some((before.name.clone(), tensor.name.clone()));
        }
        before = tensor;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_decides() {
        assert_eq!(Format::of_name("a.b.safetensors"), Format::Safetensors);
        assert_eq!(Format::of_name("a.gguf"), Format::Gguf);
        for name in ["safetensors", "a.safetensors.index.json", "a.SAFETENSORS", "a.bin", ""] {
            assert_eq!(Format::of_name(name), Format::Plain, "{name}");
        }
    }
}
