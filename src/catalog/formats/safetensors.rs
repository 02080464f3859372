//! Headers of safetensors files. Pure: bytes of the header and length of the file in, tensors out.
//!
//! Stricter than the stock reader: duplicate keys, leading white space, unknown fields, misaligned data and zero
//! bytes in strings are refused too. What stock writers produce is accepted: they sort tensors by alignment, so
//! that each starts on a multiple of its element size, counted from the start of the data.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::super::{Dtype, Tensor, elements};
use super::Header;
use crate::error::Code;
use crate::json::{Pairs, shown};

/// Bytes of the number in front of the header that says how long it is.
pub const LENGTH_BYTES: usize = 8;
/// Dimensions of a tensor; NumPy and PyTorch have 64 at most.
const RANK_MAX: usize = 64;
/// Bytes of a shape, or of a pair of offsets, as it is written: 64 numbers of 20 digits, and space.
const NUMBERS_BYTES_MAX: usize = 4096;
/// Entries of `__metadata__`.
const METADATA_MAX: usize = 65_536;
const METADATA: &str = "__metadata__";

/// What is wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what each is")]
pub enum Error {
    #[error("the file has {bytes} bytes, too few for the length of a header")]
    HeaderTooShort { bytes: u64 },
    #[error("the header has {bytes} bytes, more than the limit of {bytes_max}")]
    HeaderTooLarge { bytes: u64, bytes_max: u64 },
    #[error(
        "the header has {bytes} bytes, more than are left in the file: it is truncated, or not safetensors"
    )]
    HeaderOutsideFile { bytes: u64 },
    #[error("the header is not UTF-8")]
    NotUtf8,
    #[error("the header starts with white space")]
    LeadingSpace,
    #[error("the header is not JSON: {why}")]
    NotJson { why: String },
    #[error("the header is not a JSON object")]
    NotObject,
    #[error("the key '{}' is there twice", shown(key))]
    DuplicateKey { key: String },
    #[error("the header has more than {tensors_max} tensors, the limit")]
    TooManyTensors { tensors_max: u64 },
    #[error("__metadata__ is not an object of at most {METADATA_MAX} strings without zero bytes")]
    BadMetadata,
    #[error("the name '{}' contains a zero byte", shown(name))]
    BadName { name: String },
    #[error("the entry of '{}' is not an object", shown(name))]
    BadEntry { name: String },
    #[error("the entry of '{}' has the unknown field '{}'", shown(name), shown(field))]
    UnknownField { name: String, field: String },
    #[error("the entry of '{}' lacks the field '{field}'", shown(name))]
    MissingField { name: String, field: &'static str },
    #[error("the type of '{}' is unknown: {}", shown(name), shown(dtype))]
    UnknownDtype { name: String, dtype: String },
    #[error("the shape of '{}' is not a list of at most {RANK_MAX} sizes", shown(name))]
    BadShape { name: String },
    #[error("the shape of '{}' has more bytes than can be counted", shown(name))]
    ShapeOverflow { name: String },
    #[error("the elements of '{}' do not end at a whole byte", shown(name))]
    PartialByte { name: String },
    #[error("data_offsets of '{}' is not a pair of numbers", shown(name))]
    BadOffsets { name: String },
    #[error("data_offsets of '{}' end before they start", shown(name))]
    OffsetsReversed { name: String },
    #[error("the data of '{}' goes past the end of the file", shown(name))]
    OffsetsOutsideFile { name: String },
    #[error("the data of '{}' overlaps with that of another tensor", shown(name))]
    Overlap { name: String },
    #[error("there are bytes before the data of '{}' that belong to no tensor", shown(name))]
    Hole { name: String },
    #[error("'{}' has {is} bytes, but its type and shape need {needs}", shown(name))]
    SizeMismatch { name: String, is: u64, needs: u64 },
    #[error("the data of '{}' does not start on a multiple of its element size", shown(name))]
    Misaligned { name: String },
    #[error("{bytes} bytes after the last tensor belong to no tensor")]
    TrailingBytes { bytes: u64 },
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Error::HeaderTooShort { .. } => Code::CatalogSafetensorsHeaderTooShort,
            Error::HeaderTooLarge { .. } => Code::CatalogSafetensorsHeaderTooLarge,
            Error::HeaderOutsideFile { .. } => Code::CatalogSafetensorsHeaderOutsideFile,
            Error::NotUtf8 => Code::CatalogSafetensorsNotUtf8,
            Error::LeadingSpace => Code::CatalogSafetensorsLeadingSpace,
            Error::NotJson { .. } => Code::CatalogSafetensorsNotJson,
            Error::NotObject => Code::CatalogSafetensorsNotObject,
            Error::DuplicateKey { .. } => Code::CatalogSafetensorsDuplicateKey,
            Error::TooManyTensors { .. } => Code::CatalogTooManyTensors,
            Error::BadMetadata => Code::CatalogSafetensorsBadMetadata,
            Error::BadName { .. } => Code::CatalogSafetensorsBadName,
            Error::BadEntry { .. } => Code::CatalogSafetensorsBadEntry,
            Error::UnknownField { .. } => Code::CatalogSafetensorsUnknownField,
            Error::MissingField { .. } => Code::CatalogSafetensorsMissingField,
            Error::UnknownDtype { .. } => Code::CatalogSafetensorsUnknownDtype,
            Error::BadShape { .. } => Code::CatalogSafetensorsBadShape,
            Error::ShapeOverflow { .. } => Code::CatalogSafetensorsShapeOverflow,
            Error::PartialByte { .. } => Code::CatalogSafetensorsPartialByte,
            Error::BadOffsets { .. } => Code::CatalogSafetensorsBadOffsets,
            Error::OffsetsReversed { .. } => Code::CatalogSafetensorsOffsetsReversed,
            Error::OffsetsOutsideFile { .. } => Code::CatalogSafetensorsOffsetsOutsideFile,
            Error::Overlap { .. } => Code::CatalogSafetensorsOverlap,
            Error::Hole { .. } => Code::CatalogSafetensorsHole,
            Error::SizeMismatch { .. } => Code::CatalogSafetensorsSizeMismatch,
            Error::Misaligned { .. } => Code::CatalogSafetensorsMisaligned,
            Error::TrailingBytes { .. } => Code::CatalogSafetensorsTrailingBytes,
        }
    }
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        crate::Error::new(error.code(), error.to_string())
    }
}

/// Length of the header, which follows the length itself; `start` is the first eight bytes of the file, or
/// all that there are.
///
/// # Errors
/// If the header does not lie in the file of `file_bytes`, or is longer than `header_bytes_max`.
pub fn header_bytes(start: &[u8], file_bytes: u64, header_bytes_max: u64) -> Result<usize, Error> {
    let length = start.first_chunk::<LENGTH_BYTES>().ok_or(Error::HeaderTooShort { bytes: file_bytes })?;
    let bytes = u64::from_le_bytes(*length);
    if bytes > header_bytes_max {
        return Err(Error::HeaderTooLarge { bytes, bytes_max: header_bytes_max });
    }
    let room =
        file_bytes.checked_sub(LENGTH_BYTES as u64).ok_or(Error::HeaderTooShort { bytes: file_bytes })?;
    usize::try_from(bytes).ok().filter(|_| bytes <= room).ok_or(Error::HeaderOutsideFile { bytes })
}

/// The tensors of a file of `file_bytes` whose whole header, without the length in front, is `header`.
/// Sorted by offset.
///
/// # Errors
/// [`Error`], see there: what is accepted covers the data of the file without holes or overlaps.
pub fn parse(header: &[u8], file_bytes: u64, tensors_max: u64) -> Result<Header, Error> {
    let header_bytes = header.len() as u64;
    let data_start = header_bytes.saturating_add(LENGTH_BYTES as u64);
    let data_bytes =
        file_bytes.checked_sub(data_start).ok_or(Error::HeaderOutsideFile { bytes: header_bytes })?;

    let text = std::str::from_utf8(header).map_err(|_| Error::NotUtf8)?;
    if text.starts_with([' ', '\t', '\r', '\n']) {
        return Err(Error::LeadingSpace);
    }
    if !text.starts_with('{') {
        let other = serde_json::from_str::<serde::de::IgnoredAny>(text);
        return Err(
            other.map_or_else(|error| Error::NotJson { why: error.to_string() }, |_| Error::NotObject)
        );
    }
    // One more than there may be tensors, for the metadata.
    let pairs_max = usize::try_from(tensors_max).unwrap_or(usize::MAX).saturating_add(1);
    let pairs = Pairs::<&RawValue>::parse(text, pairs_max)
        .map_err(|error| Error::NotJson { why: error.to_string() })?;
    if let Some(key) = pairs.duplicate() {
        return Err(Error::DuplicateKey { key: key.to_owned() });
    }

    let mut metadata = BTreeMap::new();
    let mut entries = Vec::with_capacity(pairs.list.len());
    for (name, value) in pairs.list {
        if name == METADATA {
            metadata = parse_metadata(value)?;
        } else {
            entries.push(Entry::parse(name, value)?);
        }
    }
    if pairs.more || entries.len() as u64 > tensors_max {
        return Err(Error::TooManyTensors { tensors_max });
    }
    entries.sort_by_key(|entry| (entry.start, entry.end));
    let tensors = place(entries, data_start, data_bytes)?;
    Ok(Header { tensors, metadata })
}

fn parse_metadata(value: &RawValue) -> Result<BTreeMap<String, String>, Error> {
    let pairs = Pairs::<String>::parse(value.get(), METADATA_MAX).map_err(|_| Error::BadMetadata)?;
    if let Some(key) = pairs.duplicate() {
        return Err(Error::DuplicateKey { key: key.to_owned() });
    }
    let zero = |(key, text): &(String, String)| key.contains('\0') || text.contains('\0');
    if pairs.more || pairs.list.iter().any(zero) {
        return Err(Error::BadMetadata);
    }
    Ok(pairs.list.into_iter().collect())
}

/// One tensor as the header writes it; offsets count from the start of the data.
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    start: u64,
    end: u64,
}

impl Entry {
    fn parse(name: String, value: &RawValue) -> Result<Entry, Error> {
        /// One more than there are, so that an object with too many is seen to have a wrong one.
        const FIELDS_MAX: usize = 4;
        if name.contains('\0') {
            return Err(Error::BadName { name });
        }
        let Ok(fields) = Pairs::<&RawValue>::parse(value.get(), FIELDS_MAX) else {
            return Err(Error::BadEntry { name });
        };
        if let Some(key) = fields.duplicate() {
            return Err(Error::DuplicateKey { key: format!("{name}.{key}") });
        }
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        for (field, value) in &fields.list {
            match field.as_str() {
                "dtype" => dtype = Some(value.get()),
                "shape" => shape = Some(value.get()),
                "data_offsets" => offsets = Some(value.get()),
                _ => return Err(Error::UnknownField { name, field: field.clone() }),
            }
        }
        let (dtype, shape, offsets) = match (dtype, shape, offsets) {
            (Some(dtype), Some(shape), Some(offsets)) => (dtype, shape, offsets),
            (None, _, _) => return Err(Error::MissingField { name, field: "dtype" }),
            (_, None, _) => return Err(Error::MissingField { name, field: "shape" }),
            (_, _, None) => return Err(Error::MissingField { name, field: "data_offsets" }),
        };
        let dtype = match serde_json::from_str::<String>(dtype)
            .ok()
            .and_then(|text| Dtype::from_safetensors(&text))
        {
            Some(dtype) => dtype,
            None => return Err(Error::UnknownDtype { name, dtype: dtype.to_owned() }),
        };
        let Some(shape) = numbers(shape).filter(|shape| shape.len() <= RANK_MAX) else {
            return Err(Error::BadShape { name });
        };
        match numbers(offsets).as_deref() {
            Some(&[start, end]) => Ok(Entry { name, dtype, shape, start, end }),
            _ => Err(Error::BadOffsets { name }),
        }
    }

    /// Bytes that type and shape need.
    fn needs(&self) -> Result<u64, Error> {
        let overflow = || Error::ShapeOverflow { name: self.name.clone() };
        let elements = elements(&self.shape).ok_or_else(overflow)?;
        if !elements.is_multiple_of(self.dtype.block_elements()) {
            return Err(Error::PartialByte { name: self.name.clone() });
        }
        self.dtype.bytes_of(elements).ok_or_else(overflow)
    }
}

/// A list of whole numbers, if it is one and not too long to be looked at.
fn numbers(text: &str) -> Option<Vec<u64>> {
    if text.len() > NUMBERS_BYTES_MAX { None } else { serde_json::from_str(text).ok() }
}

/// Checks that the sorted `entries` cover the data exactly.
fn place(entries: Vec<Entry>, data_start: u64, data_bytes: u64) -> Result<Vec<Tensor>, Error> {
    let mut tensors = Vec::with_capacity(entries.len());
    let mut covered = 0;
    for entry in entries {
        let needs = entry.needs()?;
        let Entry { name, dtype, shape, start, end } = entry;
        let Some(nbytes) = end.checked_sub(start) else { return Err(Error::OffsetsReversed { name }) };
        if end > data_bytes {
            return Err(Error::OffsetsOutsideFile { name });
        }
        if start < covered {
            return Err(Error::Overlap { name });
        }
        if start > covered {
            return Err(Error::Hole { name });
        }
        if nbytes != needs {
            return Err(Error::SizeMismatch { name, is: nbytes, needs });
        }
        if !start.is_multiple_of(dtype.align()) {
            return Err(Error::Misaligned { name });
        }
        covered = end;
        // In the file, for `start` is at most `data_bytes`.
        let offset = data_start + start;
        tensors.push(Tensor { name, dtype, element_align: dtype.align(), shape, file: 0, offset, nbytes });
    }
    if covered < data_bytes {
        return Err(Error::TrailingBytes { bytes: data_bytes - covered });
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
