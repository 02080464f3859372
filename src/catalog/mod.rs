//! What an artifact consists of: its files, the tensors in them, and the manifest that identifies it.
//!
//! The readers of headers are pure and strict: every number is checked before it is used, and what they accept
//! has each tensor within its file, aligned, and apart from the others. Nothing here reads the tensors' bytes.

pub mod dtype;
pub mod formats;
pub mod manifest;
pub mod select;
pub mod store;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::AsFd;

pub use dtype::Dtype;
pub use formats::Format;

use crate::config::Limits;
use crate::error::{Code, Result};
use crate::json::shown;
use crate::source::file::OpenFile;
use crate::sys::page_cache;

/// What the headers of an artifact's files say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Format of the first file that has tensors; plain if none has.
    pub format: Format,
    /// The files, in the order in which they were opened.
    pub files: Vec<FileEntry>,
    /// The tensors, by file and offset.
    pub tensors: Vec<Tensor>,
    /// Free-form strings of the files' headers; where two files disagree, the first counts.
    pub metadata: BTreeMap<String, String>,
}

/// One file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Name relative to the artifact, unique in it.
    pub name: String,
    /// Length, bytes.
    pub bytes: u64,
}

/// One tensor in its file. `offset + nbytes` does not go past the end of the file, and
/// `nbytes` is what `dtype` and `shape` need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Name, unique in the artifact.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// What the address of an element must be a multiple of; at least 1.
    pub element_align: u64,
    /// Shape, slowest dimension first (GGUF writes it the other way round).
    pub shape: Vec<u64>,
    /// Index into the files.
    pub file: u32,
    /// Where it starts, bytes from the start of the file.
    pub offset: u64,
    /// Its length, bytes.
    pub nbytes: u64,
}

/// Elements of a shape; `None` if they are too many to count. A dimension of 0 does not hide an overflow of the
/// others, so that the answer does not depend on the order of the dimensions.
fn elements(shape: &[u64]) -> Option<u64> {
    let product = shape.iter().try_fold(1u64, |product, size| product.checked_mul((*size).max(1)))?;
    Some(if shape.contains(&0) { 0 } else { product })
}

/// Reads the headers of `files` and checks them, also against an index if the files came by one.
///
/// Blocks; reads through the page cache.
///
/// # Errors
/// `catalog.*` if a header is malformed, a tensor is there twice, or the index is wrong; `source.file.*` if a file
/// cannot be read.
pub fn describe(files: &[OpenFile], limits: &Limits) -> Result<Description> {
    let mut description = Description {
        format: Format::Plain,
        files: Vec::with_capacity(files.len()),
        tensors: Vec::new(),
        metadata: BTreeMap::new(),
    };
    for (number, file) in (0u32..).zip(files) {
        let room = limits.tensors_max.saturating_sub(description.tensors.len() as u64);
        let before = page_cache::cached_pages(file.file.as_fd(), 0, file.stamp.bytes);
        let read = formats::read(file, room, limits);
        if before == 0 {
            // Headers are read through the page cache, which is left as it was.
            page_cache::drop_pages(file.file.as_fd(), 0, file.stamp.bytes);
        }
        let (format, header) = read?;
        if description.tensors.is_empty() && !header.tensors.is_empty() {
            description.format = format;
        }
        description
            .tensors
            .extend(header.tensors.into_iter().map(|tensor| Tensor { file: number, ..tensor }));
        for (key, value) in header.metadata {
            description.metadata.entry(key).or_insert(value);
        }
        description.files.push(FileEntry { name: file.name.clone(), bytes: file.stamp.bytes });
    }
    check_unique(&description.tensors)?;
    check_index(files, &description.tensors)?;
    Ok(description)
}

fn check_unique(tensors: &[Tensor]) -> Result<()> {
    let mut seen = HashSet::with_capacity(tensors.len());
    match tensors.iter().find(|tensor| !seen.insert(tensor.name.as_str())) {
        None => Ok(()),
        Some(twice) => {
            let message = format!("the tensor '{}' is in two files", shown(&twice.name));
            Err(crate::Error::new(Code::CatalogDuplicateTensor, message))
        }
    }
}

/// Checks that each tensor that an index names is in the file that it names. [`describe`] does so too; this is for
/// tensors that come from a remembered manifest.
///
/// # Errors
/// `catalog.index.tensor_missing`, `catalog.index.tensor_elsewhere`.
pub fn check_index(files: &[OpenFile], tensors: &[Tensor]) -> Result<()> {
    if files.iter().all(|file| file.indexed.is_none()) {
        return Ok(());
    }
    let places: HashMap<&str, u32> =
        tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.file)).collect();
    for (number, file) in (0u32..).zip(files) {
        for name in file.indexed.iter().flat_map(|names| names.iter()) {
            let (code, what) = match places.get(name.as_str()) {
                Some(place) if *place == number => continue,
                Some(_) => (Code::CatalogIndexTensorElsewhere, "it is in another file"),
                None => (Code::CatalogIndexTensorMissing, "no file has it"),
            };
            let message =
                format!("the index says that '{}' is in '{}': {what}", shown(name), shown(&file.name));
            return Err(crate::Error::new(code, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
