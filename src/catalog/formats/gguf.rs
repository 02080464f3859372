//! Headers of GGUF files, version 2 and 3, little endian. Pure: the first bytes of the file and its length in,
//! tensors out.
//!
//! As strict as the format's specification: keys and names once, types that are known, rows of whole blocks, data on
//! the file's alignment, within the file, and apart. What lies between and behind the tensors is not looked at:
//! writers pad there.

use std::collections::{BTreeMap, HashSet};

use super::super::{Dtype, Tensor, elements};
use super::Header;
use crate::error::Code;
use crate::json::shown;

/// Key-value pairs of a header; stock models have some dozens.
const KEYS_MAX: u64 = 65_536;
/// Length of a key, bytes (the specification's limit).
const KEY_BYTES_MAX: u64 = 65_535;
/// Length of a string value, bytes; the longest in stock models are chat templates.
const STRING_BYTES_MAX: u64 = 16 << 20;
/// Elements of an array; the longest in stock models are vocabularies.
const ARRAY_ELEMENTS_MAX: u64 = 16 << 20;
/// Arrays within arrays.
const ARRAY_DEPTH_MAX: u32 = 4;
/// Length of a tensor's name, bytes. The specification says 64; some writers go beyond.
const NAME_BYTES_MAX: u64 = 512;
/// Dimensions of a tensor (`GGML_MAX_DIMS`).
const RANK_MAX: u32 = 4;
/// Alignment of the data if the header does not say.
const ALIGNMENT_DEFAULT: u64 = 32;
/// Largest alignment that is believed.
const ALIGNMENT_MAX: u64 = 1 << 20;
/// Least bytes that a tensor takes in the table: length of its name, rank, type, offset.
const ENTRY_BYTES_MIN: u64 = 8 + 4 + 4 + 8;

/// What is wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what each is")]
pub enum Error {
    #[error("the file does not start with 'GGUF'")]
    BadMagic,
    #[error("version {version} of GGUF is not supported (only 2 and 3, little endian)")]
    UnsupportedVersion { version: u32 },
    /// Also what the reader of a prefix answers if it is too short.
    #[error("the file ends within its header")]
    Truncated,
    #[error("the header has more than {bytes_max} bytes, the limit")]
    HeaderTooLarge { bytes_max: u64 },
    #[error("the header has {keys} keys, more than the limit of {KEYS_MAX}")]
    TooManyKeys { keys: u64 },
    #[error("the header has {tensors} tensors, more than the limit of {tensors_max}")]
    TooManyTensors { tensors: u64, tensors_max: u64 },
    #[error("a string of the header has {bytes} bytes, more than the limit of {bytes_max}")]
    StringTooLong { bytes: u64, bytes_max: u64 },
    #[error("an array of the header has {elements} elements, more than the limit of {ARRAY_ELEMENTS_MAX}")]
    ArrayTooLong { elements: u64 },
    #[error("a string of the header is not UTF-8")]
    BadString,
    #[error("the key '{}' is empty or contains a zero byte", shown(key))]
    BadKey { key: String },
    #[error("the key '{}' is there twice", shown(key))]
    DuplicateKey { key: String },
    #[error("the value of '{}' {why}", shown(key))]
    BadValue { key: String, why: &'static str },
    #[error("general.alignment is not a power of two of at most {ALIGNMENT_MAX}")]
    BadAlignment,
    #[error("the tensor name '{}' is empty, there twice, or contains a zero byte", shown(name))]
    BadName { name: String },
    #[error("the shape of '{}' {why}", shown(name))]
    BadShape { name: String, why: &'static str },
    #[error("the type of '{}' is unknown: {number}", shown(name))]
    UnknownType { name: String, number: u32 },
    #[error("the data of '{}' does not start on a multiple of {alignment}", shown(name))]
    Misaligned { name: String, alignment: u64 },
    #[error("the data of '{}' goes past the end of the file", shown(name))]
    OutsideFile { name: String },
    #[error("the data of '{}' and '{}' overlap", shown(name), shown(other))]
    Overlap { name: String, other: String },
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::BadMagic => Code::CatalogGgufBadMagic,
            Error::UnsupportedVersion { .. } => Code::CatalogGgufUnsupportedVersion,
            Error::Truncated => Code::CatalogGgufTruncated,
            Error::HeaderTooLarge { .. } => Code::CatalogGgufHeaderTooLarge,
            Error::TooManyKeys { .. } => Code::CatalogGgufTooManyKeys,
            Error::TooManyTensors { .. } => Code::CatalogTooManyTensors,
            Error::StringTooLong { .. } => Code::CatalogGgufStringTooLong,
            Error::ArrayTooLong { .. } => Code::CatalogGgufArrayTooLong,
            Error::BadString => Code::CatalogGgufBadString,
            Error::BadKey { .. } => Code::CatalogGgufBadKey,
            Error::DuplicateKey { .. } => Code::CatalogGgufDuplicateKey,
            Error::BadValue { .. } => Code::CatalogGgufBadValue,
            Error::BadAlignment => Code::CatalogGgufBadAlignment,
            Error::BadName { .. } => Code::CatalogGgufBadName,
            Error::BadShape { .. } => Code::CatalogGgufBadShape,
            Error::UnknownType { .. } => Code::CatalogGgufUnknownType,
            Error::Misaligned { .. } => Code::CatalogGgufMisaligned,
            Error::OutsideFile { .. } => Code::CatalogGgufOutsideFile,
            Error::Overlap { .. } => Code::CatalogGgufOverlap,
        };
        crate::Error::new(code, error.to_string())
    }
}

/// The tensors of a file of `file_bytes` that starts with `prefix`, by offset. Of the metadata, strings and single
/// numbers are kept, written as text.
///
/// # Errors
/// [`Error::Truncated`] if the header goes past the end of `prefix`; the rest of [`Error`] if it is malformed.
pub fn parse(prefix: &[u8], file_bytes: u64, tensors_max: u64) -> Result<Header, Error> {
    let mut reader = Reader { rest: prefix };
    if reader.take(4)? != b"GGUF" {
        return Err(Error::BadMagic);
    }
    let version = reader.u32()?;
    if !matches!(version, 2 | 3) {
        return Err(Error::UnsupportedVersion { version });
    }
    let tensors = reader.u64()?;
    let keys = reader.u64()?;
    if tensors > tensors_max {
        return Err(Error::TooManyTensors { tensors, tensors_max });
    }
    if keys > KEYS_MAX {
        return Err(Error::TooManyKeys { keys });
    }

    let (metadata, alignment) = read_keys(&mut reader, keys)?;
    let mut table = read_table(&mut reader, tensors)?;
    let header_bytes = (prefix.len() - reader.rest.len()) as u64;
    let data_start = header_bytes.checked_next_multiple_of(alignment).ok_or(Error::Truncated)?;
    for tensor in &mut table {
        place(tensor, data_start, file_bytes, alignment)?;
    }
    match super::overlap(&mut table) {
        Some((name, other)) => Err(Error::Overlap { name, other }),
        None => Ok(Header { tensors: table, metadata }),
    }
}

/// The key-value pairs that can be written as text, and the alignment of the data.
fn read_keys(reader: &mut Reader<'_>, keys: u64) -> Result<(BTreeMap<String, String>, u64), Error> {
    let mut seen = HashSet::new();
    let mut metadata = BTreeMap::new();
    let mut alignment = ALIGNMENT_DEFAULT;
    for _ in 0..keys {
        let key = reader.string(KEY_BYTES_MAX)?;
        if key.is_empty() || key.contains('\0') {
            return Err(Error::BadKey { key: key.to_owned() });
        }
        if !seen.insert(key) {
            return Err(Error::DuplicateKey { key: key.to_owned() });
        }
        let kind = reader.u32()?;
        if key == "general.alignment" {
            if kind != kinds::U32 {
                return Err(Error::BadAlignment);
            }
            alignment = u64::from(reader.u32()?);
            if !alignment.is_power_of_two() || alignment > ALIGNMENT_MAX {
                return Err(Error::BadAlignment);
            }
            metadata.insert(key.to_owned(), alignment.to_string());
        } else if let Some(text) = reader.value(key, kind, 0)? {
            metadata.insert(key.to_owned(), text);
        }
    }
    Ok((metadata, alignment))
}

/// The table of tensors; their offsets still count from the start of the data.
fn read_table(reader: &mut Reader<'_>, tensors: u64) -> Result<Vec<Tensor>, Error> {
    // The number is not believed before there are bytes for so many.
    if tensors > reader.rest.len() as u64 / ENTRY_BYTES_MIN {
        return Err(Error::Truncated);
    }
    let mut seen = HashSet::new();
    let mut table = Vec::new();
    for _ in 0..tensors {
        let name = reader.string(NAME_BYTES_MAX)?;
        if name.is_empty() || name.contains('\0') || !seen.insert(name) {
            return Err(Error::BadName { name: name.to_owned() });
        }
        let bad_shape = |why| Error::BadShape { name: name.to_owned(), why };
        let rank = reader.u32()?;
        if rank > RANK_MAX {
            return Err(bad_shape("has too many dimensions"));
        }
        let mut shape = (0..rank).map(|_| reader.u64()).collect::<Result<Vec<u64>, Error>>()?;
        let number = reader.u32()?;
        let dtype =
            Dtype::from_ggml(number).ok_or_else(|| Error::UnknownType { name: name.to_owned(), number })?;
        let offset = reader.u64()?;
        // In the file, the fastest dimension comes first: the one in which elements form blocks.
        if !shape.first().unwrap_or(&1).is_multiple_of(dtype.block_elements()) {
            return Err(bad_shape("has rows that are no whole number of blocks"));
        }
        let nbytes = elements(&shape).and_then(|elements| dtype.bytes_of(elements));
        let nbytes = nbytes.ok_or_else(|| bad_shape("has more bytes than can be counted"))?;
        shape.reverse();
        let name = name.to_owned();
        table.push(Tensor { name, dtype, element_align: dtype.align(), shape, file: 0, offset, nbytes });
    }
    Ok(table)
}

/// Makes the tensor's offset one in the file.
fn place(tensor: &mut Tensor, data_start: u64, file_bytes: u64, alignment: u64) -> Result<(), Error> {
    if !tensor.offset.is_multiple_of(alignment) {
        return Err(Error::Misaligned { name: tensor.name.clone(), alignment });
    }
    let offset = data_start.checked_add(tensor.offset);
    let end = offset.and_then(|offset| offset.checked_add(tensor.nbytes));
    match (offset, end) {
        (Some(offset), Some(end)) if end <= file_bytes => tensor.offset = offset,
        _ => return Err(Error::OutsideFile { name: tensor.name.clone() }),
    }
    // A small alignment is allowed to the file, but not for types that need a larger one.
    if !tensor.offset.is_multiple_of(tensor.element_align) {
        return Err(Error::Misaligned { name: tensor.name.clone(), alignment: tensor.element_align });
    }
    Ok(())
}

/// The numbers of the types of values.
mod kinds {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const STRING: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;

    /// Bytes of a single number; `None` for other types.
    pub(super) fn bytes(kind: u32) -> Option<u64> {
        match kind {
            U8 | I8 | BOOL => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            _ => None,
        }
    }
}

/// Takes bytes from the front; never past the end.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: u64) -> Result<&'a [u8], Error> {
        let bytes = usize::try_from(bytes).map_err(|_| Error::Truncated)?;
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(Error::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(Error::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self, bytes_max: u64) -> Result<&'a str, Error> {
        let bytes = self.u64()?;
        if bytes > bytes_max {
            return Err(Error::StringTooLong { bytes, bytes_max });
        }
        std::str::from_utf8(self.take(bytes)?).map_err(|_| Error::BadString)
    }

    /// The value as text; `None` for an array, which is only checked.
    fn value(&mut self, key: &str, kind: u32, depth: u32) -> Result<Option<String>, Error> {
        let bad = |why| Error::BadValue { key: key.to_owned(), why };
        let text = match kind {
            kinds::U8 => u8::from_le_bytes(self.array()?).to_string(),
            kinds::I8 => i8::from_le_bytes(self.array()?).to_string(),
            kinds::U16 => u16::from_le_bytes(self.array()?).to_string(),
            kinds::I16 => i16::from_le_bytes(self.array()?).to_string(),
            kinds::U32 => self.u32()?.to_string(),
            kinds::I32 => i32::from_le_bytes(self.array()?).to_string(),
            kinds::F32 => f32::from_le_bytes(self.array()?).to_string(),
            kinds::U64 => self.u64()?.to_string(),
            kinds::I64 => i64::from_le_bytes(self.array()?).to_string(),
            kinds::F64 => f64::from_le_bytes(self.array()?).to_string(),
            kinds::BOOL => match self.array()? {
                [0] => "false".to_owned(),
                [1] => "true".to_owned(),
                _ => return Err(bad("is neither true nor false")),
            },
            kinds::STRING => self.string(STRING_BYTES_MAX)?.to_owned(),
            kinds::ARRAY => {
                self.skip_array(key, depth)?;
                return Ok(None);
            }
            _ => return Err(bad("has an unknown type")),
        };
        Ok(Some(text))
    }

    fn skip_array(&mut self, key: &str, depth: u32) -> Result<(), Error> {
        let bad = |why| Error::BadValue { key: key.to_owned(), why };
        if depth >= ARRAY_DEPTH_MAX {
            return Err(bad("has arrays nested too deep"));
        }
        let kind = self.u32()?;
        let elements = self.u64()?;
        if elements > ARRAY_ELEMENTS_MAX {
            return Err(Error::ArrayTooLong { elements });
        }
        match (kind, kinds::bytes(kind)) {
            (_, Some(bytes)) => {
                let values = self.take(elements.saturating_mul(bytes))?;
                if kind == kinds::BOOL && values.iter().any(|value| *value > 1) {
                    return Err(bad("is neither true nor false"));
                }
            }
            (kinds::STRING, _) => {
                for _ in 0..elements {
                    // Vocabularies hold pieces of characters: these strings need not be UTF-8.
                    let bytes = self.u64()?;
                    if bytes > STRING_BYTES_MAX {
                        return Err(Error::StringTooLong { bytes, bytes_max: STRING_BYTES_MAX });
                    }
                    self.take(bytes)?;
                }
            }
            (kinds::ARRAY, _) => {
                for _ in 0..elements {
                    self.skip_array(key, depth + 1)?;
                }
            }
            _ => return Err(bad("has an unknown type")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
