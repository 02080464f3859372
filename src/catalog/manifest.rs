//! The manifest: file names, sizes, chunk checksums and tensors of an artifact, and the digest taken over it.
//!
//! It is written as JSON in exactly one way: equal artifacts have equal bytes and so equal digests, and a reader
//! refuses any other spelling. It is data only, and what is read is checked as strictly as the files' own headers.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Description, Dtype, FileEntry, Format, Tensor, elements};
use crate::config::Limits;
use crate::error::Code;

pub use crate::checksum::CHUNK_BYTES;
/// Version of the manifest that is written and read.
pub const VERSION: u32 = 1;
/// Length of a manifest, bytes: room for a million tensors, or for 10 TB.
pub const BYTES_MAX: u64 = 256 << 20;
/// Digits of one checksum: 64 bits in hexadecimal.
const CHECKSUM_DIGITS: usize = 16;

/// Why something is no manifest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too long.
    #[error("the manifest has {bytes} bytes, more than the limit of {BYTES_MAX}")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// Not the JSON of a manifest.
    #[error("it is not a manifest: {0}")]
    NotManifest(#[from] serde_json::Error),
    /// The same content, written otherwise.
    #[error("the manifest is not written in the one way")]
    NotCanonical,
    /// Another version.
    #[error("version {0} of the manifest is not supported (only {VERSION})")]
    Version(u32),
    /// Something in it contradicts the rest.
    #[error("the manifest contradicts itself: {0}")]
    Inconsistent(&'static str),
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        crate::Error::new(Code::CatalogManifestInvalid, error.to_string())
    }
}

/// What an artifact consists of, with the checksum of every chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    description: Description,
    chunks: Vec<Vec<u64>>,
    digest: String,
}

impl Manifest {
    /// The manifest of the artifact that `description` describes; `chunks` has, for each file, the CRC-64/NVME of
    /// each chunk of [`CHUNK_BYTES`] in order.
    ///
    /// # Errors
    /// [`Error::Inconsistent`] if the number of chunks does not fit the files.
    pub fn new(description: Description, chunks: Vec<Vec<u64>>) -> Result<Manifest, Error> {
        check(&description, &chunks)?;
        let mut manifest = Manifest { description, chunks, digest: String::new() };
        manifest.digest = digest_of(&manifest.to_bytes()?);
        Ok(manifest)
    }

    /// Reads what [`Manifest::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error`] if it is anything else.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Manifest, Error> {
        if bytes.len() as u64 > BYTES_MAX {
            return Err(Error::TooLarge { bytes: bytes.len() });
        }
        let wire: Wire = serde_json::from_slice(bytes)?;
        if wire.version != VERSION {
            return Err(Error::Version(wire.version));
        }
        if wire.files.len() > limits.files_max as usize || wire.tensors.len() as u64 > limits.tensors_max {
            return Err(Error::Inconsistent("it has more files or tensors than the limits allow"));
        }
        let (description, chunks) = wire.read()?;
        check(&description, &chunks)?;
        let manifest = Manifest { description, chunks, digest: digest_of(bytes) };
        if manifest.to_bytes()? != bytes {
            return Err(Error::NotCanonical);
        }
        Ok(manifest)
    }

    /// The one way to write it.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let bytes = serde_json::to_vec(&Wire::of(&self.description, &self.chunks))?;
        if bytes.len() as u64 > BYTES_MAX {
            return Err(Error::TooLarge { bytes: bytes.len() });
        }
        Ok(bytes)
    }

    /// `sha256:` and 64 hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Format, files, tensors and metadata.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// For each file, the checksum of each chunk.
    pub fn chunks(&self) -> &[Vec<u64>] {
        &self.chunks
    }
}

/// `sha256:` and the hash of `bytes`.
fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// What a manifest's digest starts with in its written form.
const DIGEST_PREFIX: &str = "sha256:";

/// The digest of a manifest: its SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Reads `sha256:` and 64 hexadecimal digits in lower case, the form in which manifests have it.
    pub fn parse(text: &str) -> Option<Digest> {
        let digits = text.strip_prefix(DIGEST_PREFIX)?.as_bytes();
        let mut digest = [0; 32];
        if digits.len() != 2 * digest.len() {
            return None;
        }
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = value(pair[0])? << 4 | value(pair[1])?;
        }
        Some(Digest(digest))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(DIGEST_PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// In hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check(description: &Description, chunks: &[Vec<u64>]) -> Result<(), Error> {
    let Description { files, tensors, .. } = description;
    if files.is_empty() || files.len() != chunks.len() {
        return Err(Error::Inconsistent("it has no files, or not the checksums of each"));
    }
    let mut names = HashSet::new();
    for (file, chunks) in files.iter().zip(chunks) {
        if chunks.len() as u64 != file.bytes.div_ceil(CHUNK_BYTES) {
            return Err(Error::Inconsistent("a file has not one checksum for each chunk"));
        }
        if file.name.is_empty() || !names.insert(&file.name) {
            return Err(Error::Inconsistent("a file has no name, or that of another"));
        }
    }
    let mut names = HashSet::new();
    let (mut start_before, mut end_before) = ((0, 0), (0, 0));
    for tensor in tensors {
        let file = files
            .get(tensor.file as usize)
            .ok_or(Error::Inconsistent("a tensor is in a file that is not"))?;
        let needs = elements(&tensor.shape).and_then(|elements| tensor.dtype.bytes_of(elements));
        if needs != Some(tensor.nbytes) {
            return Err(Error::Inconsistent("a tensor's size is not that of its type and shape"));
        }
        let end = tensor.offset.checked_add(tensor.nbytes).filter(|end| *end <= file.bytes);
        let end = end.ok_or(Error::Inconsistent("a tensor goes past the end of its file"))?;
        let start = (tensor.file, tensor.offset);
        // A tensor of no bytes overlaps with nothing, wherever it is.
        if start < start_before || (tensor.nbytes > 0 && start < end_before) {
            return Err(Error::Inconsistent("the tensors overlap, or are not in the order of the files"));
        }
        start_before = start;
        if tensor.nbytes > 0 {
            end_before = (tensor.file, end);
        }
        if !names.insert(&tensor.name) {
            return Err(Error::Inconsistent("two tensors have one name"));
        }
    }
    Ok(())
}

/// The manifest as it is written; the order of the fields is part of the format.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    version: u32,
    format: Format,
    files: Vec<WireFile>,
    tensors: Vec<WireTensor>,
    metadata: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireFile {
    name: String,
    bytes: u64,
    /// The checksums, 16 digits each, one behind the other.
    chunks: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireTensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    file: u32,
    offset: u64,
    nbytes: u64,
}

impl Wire {
    fn of(description: &Description, chunks: &[Vec<u64>]) -> Wire {
        let file = |(file, chunks): (&FileEntry, &Vec<u64>)| WireFile {
            name: file.name.clone(),
            bytes: file.bytes,
            chunks: chunks.iter().map(|checksum| format!("{checksum:016x}")).collect(),
        };
        let tensor = |tensor: &Tensor| WireTensor {
            name: tensor.name.clone(),
            dtype: tensor.dtype.as_str().to_owned(),
            shape: tensor.shape.clone(),
            file: tensor.file,
            offset: tensor.offset,
            nbytes: tensor.nbytes,
        };
        Wire {
            version: VERSION,
            format: description.format,
            files: description.files.iter().zip(chunks).map(file).collect(),
            tensors: description.tensors.iter().map(tensor).collect(),
            metadata: description.metadata.clone(),
        }
    }

    fn read(self) -> Result<(Description, Vec<Vec<u64>>), Error> {
        let mut chunks = Vec::with_capacity(self.files.len());
        let mut files = Vec::with_capacity(self.files.len());
        for file in self.files {
            chunks.push(checksums(&file.chunks)?);
            files.push(FileEntry { name: file.name, bytes: file.bytes });
        }
        let tensor = |wire: WireTensor| {
            let WireTensor { name, dtype, shape, file, offset, nbytes } = wire;
            let dtype = Dtype::parse(&dtype).ok_or(Error::Inconsistent("a tensor has an unknown type"))?;
            Ok(Tensor { name, dtype, element_align: dtype.align(), shape, file, offset, nbytes })
        };
        let tensors = self.tensors.into_iter().map(tensor).collect::<Result<_, Error>>()?;
        Ok((Description { format: self.format, files, tensors, metadata: self.metadata }, chunks))
    }
}

fn checksums(text: &str) -> Result<Vec<u64>, Error> {
    const BAD: Error = Error::Inconsistent("the checksums of a file are not of 16 digits each");
    text.as_bytes()
        .chunks(CHECKSUM_DIGITS)
        .map(|digits| {
            let digits = std::str::from_utf8(digits).ok().filter(|digits| digits.len() == CHECKSUM_DIGITS);
            digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or(BAD)
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits() -> Limits {
        crate::config::Config::default().limits
    }

    /// Any description that headers could give, with checksums.
    fn manifests() -> impl Strategy<Value = Manifest> {
        let tensor =
            (proptest::sample::select(Dtype::ALL), proptest::collection::vec(0u64..5, 0..3), 0u64..40);
        let file = (".{1,6}", proptest::collection::vec(tensor, 0..4), 0u64..3 << 20);
        let metadata = proptest::collection::btree_map(".{0,4}", ".{0,8}", 0..3);
        (proptest::collection::vec(file, 1..4), metadata, any::<u64>()).prop_map(|(files, metadata, seed)| {
            let mut description =
                Description { format: Format::Gguf, files: vec![], tensors: vec![], metadata };
            for (number, (name, tensors, rest)) in (0u32..).zip(files) {
                let mut end = 0;
                for (dtype, mut shape, hole) in tensors {
                    shape.push(dtype.block_elements());
                    let nbytes = dtype.bytes_of(shape.iter().product()).unwrap();
                    let name = format!("{name}.{number}.{}", description.tensors.len());
                    let (offset, element_align) = (end + hole, dtype.align());
                    description.tensors.push(Tensor {
                        name,
                        dtype,
                        element_align,
                        shape,
                        file: number,
                        offset,
                        nbytes,
                    });
                    end = offset + nbytes;
                }
                description.files.push(FileEntry { name: format!("{number}{name}"), bytes: end + rest });
            }
            let sums =
                |file: &FileEntry| (0..file.bytes.div_ceil(CHUNK_BYTES)).map(|n| seed.rotate_left(n as u32));
            let chunks = description.files.iter().map(|file| sums(file).collect()).collect();
            Manifest::new(description, chunks).unwrap()
        })
    }

    /// A small manifest.
    pub(in crate::catalog) fn sample() -> Manifest {
        let tensor = |name: &str, offset| Tensor {
            name: name.to_owned(),
            dtype: Dtype::F32,
            element_align: 4,
            shape: vec![2, 2],
            file: 0,
            offset,
            nbytes: 16,
        };
        let description = Description {
            format: Format::Safetensors,
            files: vec![FileEntry { name: "a.safetensors".to_owned(), bytes: CHUNK_BYTES + 1 }],
            tensors: vec![tensor("x", 96), tensor("y", 112)],
            metadata: BTreeMap::from([("format".to_owned(), "pt".to_owned())]),
        };
        Manifest::new(description, vec![vec![1, 0xfedc_ba98_7654_3210]]).unwrap()
    }

    /// The digest is a promise to other nodes and to stored state: a change of it needs a new version.
    #[test]
    fn the_form_and_the_digest_are_fixed() {
        let text = r#"{"version":1,"format":"safetensors","files":[{"name":"a.safetensors","bytes":1048577,"chunks":"0000000000000001fedcba9876543210"}],"tensors":[{"name":"x","dtype":"F32","shape":[2,2],"file":0,"offset":96,"nbytes":16},{"name":"y","dtype":"F32","shape":[2,2],"file":0,"offset":112,"nbytes":16}],"metadata":{"format":"pt"}}"#;
        assert_eq!(String::from_utf8(sample().to_bytes().unwrap()).unwrap(), text);
        assert_eq!(sample().digest(), DIGEST);
        assert_eq!(Manifest::parse(text.as_bytes(), &limits()).unwrap(), sample());
    }

    const DIGEST: &str = "sha256:406c9248b28feb043e613ce05a70387393be10a3db3be13ea3be9fdb0ce48c45";

    #[test]
    fn everything_counts_in_the_digest() {
        let change = |change: fn(&mut Description, &mut Vec<Vec<u64>>)| {
            let (mut description, mut chunks) = (sample().description, sample().chunks);
            change(&mut description, &mut chunks);
            Manifest::new(description, chunks).unwrap().digest
        };
        let digests = [
            sample().digest,
            change(|d, _| d.files[0].name.push('x')),
            change(|d, _| d.files[0].bytes += 1),
            change(|d, _| d.tensors[1].name.push('x')),
            change(|d, _| d.tensors[1].dtype = Dtype::I32),
            change(|d, _| d.tensors[1].shape = vec![4]),
            change(|d, _| d.tensors[1].offset += 4),
            change(|_, c| c[0][1] ^= 1),
        ];
        assert_eq!(digests.iter().collect::<HashSet<_>>().len(), digests.len());
    }

    #[test]
    fn other_spellings_and_contradictions_are_refused() {
        let text = String::from_utf8(sample().to_bytes().unwrap()).unwrap();
        let cases = [
            ("{\"version\":1", "{ \"version\":1", "not written in the one way"),
            (
                "\"version\":1,\"format\":\"safetensors\"",
                "\"format\":\"safetensors\",\"version\":1",
                "the one way",
            ),
            ("fedcba", "FEDCBA", "not written in the one way"),
            ("\"format\":\"pt\"", "\"a\":\"b\",\"a\":\"c\"", "not written in the one way"),
            ("fedcba", "+edcba", "not written in the one way"),
            ("3210\"", "321\"", "16 digits"),
            ("3210\"", "321ä\"", "16 digits"),
            ("0000000000000001", "", "one checksum for each chunk"),
            ("\"version\":1", "\"version\":2", "version 2"),
            ("\"version\":1", "\"version\":1,\"more\":1", "unknown field"),
            ("\"version\":1", "\"version\":1,\"version\":1", "duplicate field"),
            ("\"F32\"", "\"F31\"", "unknown type"),
            ("[2,2]", "[2,3]", "type and shape"),
            ("[2,2]", "[18446744073709551615,2]", "type and shape"),
            ("\"offset\":96", "\"offset\":97", "overlap"),
            ("\"offset\":112", "\"offset\":18446744073709551615", "past the end"),
            ("\"offset\":112", "\"offset\":1048562", "past the end"),
            ("\"file\":0", "\"file\":1", "in a file that is not"),
            ("\"name\":\"y\"", "\"name\":\"x\"", "one name"),
            ("a.safetensors", "", "no name"),
            ("}}", "}}x", "not a manifest"),
        ];
        for (from, to, why) in cases {
            let bad = text.replacen(from, to, 1);
            assert_ne!(bad, text);
            let error = Manifest::parse(bad.as_bytes(), &limits()).unwrap_err();
            assert!(error.to_string().contains(why), "{to}: {error}");
        }
        let few = Limits { tensors_max: 1, ..limits() };
        assert!(Manifest::parse(text.as_bytes(), &few).is_err());
        assert!(Manifest::new(sample().description, vec![]).is_err());
        assert!(Manifest::new(sample().description, vec![vec![1]]).is_err());
    }

    proptest! {
        #[test]
        fn round_trip(manifest in manifests()) {
            let bytes = manifest.to_bytes().unwrap();
            prop_assert_eq!(Manifest::parse(&bytes, &limits()).unwrap(), manifest);
        }

        #[test]
        fn a_changed_byte_is_another_artifact_or_an_error(manifest in manifests(), place: prop::sample::Index, to: u8) {
            let mut bytes = manifest.to_bytes().unwrap();
            let place = place.index(bytes.len());
            prop_assume!(bytes[place] != to);
            bytes[place] = to;
            if let Ok(other) = Manifest::parse(&bytes, &limits()) {
                prop_assert_ne!(other.digest(), manifest.digest());
                prop_assert_eq!(other.to_bytes().unwrap(), bytes);
            }
        }
    }
}
