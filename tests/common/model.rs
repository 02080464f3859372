//! Models with known bytes: every 4 KiB of every tensor differ from all others, and follow from a seed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

const PAGE: usize = 4096;

/// A tensor and what its bytes follow from.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<u64>,
    pub bytes: usize,
}

impl Tensor {
    pub fn new(name: impl Into<String>, dtype: &'static str, shape: &[u64]) -> Tensor {
        let element = match dtype {
            "U8" | "I8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => 1,
            "BF16" | "F16" | "I16" => 2,
            "F32" | "I32" => 4,
            "F64" | "I64" => 8,
            other => panic!("no size for {other}"),
        };
        let bytes = usize::try_from(shape.iter().product::<u64>()).unwrap() * element;
        Tensor { name: name.into(), dtype, shape: shape.to_vec(), bytes }
    }

    /// What the tensor holds in the model of this seed.
    pub fn contents(&self, seed: u64) -> Vec<u8> {
        let own = self.name.bytes().fold(seed, |state, byte| mix(state ^ u64::from(byte)));
        let noise: Vec<u8> = (0..PAGE as u64 / 8).flat_map(|word| mix(own ^ word).to_le_bytes()).collect();
        let mut bytes: Vec<u8> = noise.iter().copied().cycle().take(self.bytes).collect();
        for (page, chunk) in bytes.chunks_mut(PAGE).enumerate() {
            let stamp = mix(own ^ !(page as u64)).to_le_bytes();
            let length = chunk.len().min(stamp.len());
            chunk[..length].copy_from_slice(&stamp[..length]);
        }
        bytes
    }
}

/// The finaliser of splitmix64.
fn mix(state: u64) -> u64 {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// The header of a safetensors file with its length field, padded to a multiple of 8.
pub fn header(tensors: &[Tensor], metadata: &Value) -> Vec<u8> {
    header_aligned(tensors, metadata, 8)
}

/// The same, padded so that the data begins on a multiple of `unit`.
pub fn header_aligned(tensors: &[Tensor], metadata: &Value, unit: usize) -> Vec<u8> {
    let mut table = serde_json::Map::new();
    if !metadata.is_null() {
        table.insert("__metadata__".to_owned(), metadata.clone());
    }
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes;
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        table.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(table).to_string().into_bytes();
    text.resize((text.len() + 8).next_multiple_of(unit) - 8, b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

/// Writes one safetensors file, whole before it has its name, dropped from the page cache.
pub fn write(path: &Path, tensors: &[Tensor], seed: u64) {
    write_aligned(path, tensors, seed, 8);
}

/// The same, with data that begins on a multiple of `unit`.
pub fn write_aligned(path: &Path, tensors: &[Tensor], seed: u64, unit: usize) {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary).unwrap();
    file.write_all(&header_aligned(tensors, &json!({"seed": seed.to_string()}), unit)).unwrap();
    for tensor in tensors {
        file.write_all(&tensor.contents(seed)).unwrap();
    }
    drop(file);
    super::evict_from_page_cache(&temporary);
    fs::rename(&temporary, path).unwrap();
}

/// A model of several shards with an index, as stock tools write it.
pub struct Model {
    pub path: PathBuf,
    pub seed: u64,
    pub tensors: Vec<Tensor>,
}

impl Model {
    /// Two shards, tensors of several types, sizes and alignments: about 12 MiB.
    pub fn mixed(path: &Path, seed: u64) -> Model {
        let shards = vec![
            vec![
                Tensor::new("embed.weight", "BF16", &[1000, 512]),
                // An odd number of bytes: all that follows is not aligned to anything.
                Tensor::new("odd.bias", "U8", &[4099]),
                Tensor::new("layers.0.attention.weight", "F8_E4M3", &[1024, 1025]),
                Tensor::new("layers.0.mask", "BOOL", &[77]),
            ],
            vec![
                Tensor::new("layers.1.attention.weight", "F32", &[1024, 1024]),
                Tensor::new("layers.1.scale", "F32", &[]),
                Tensor::new("layers.1.empty", "F32", &[0, 16]),
                Tensor::new("head.weight", "BF16", &[512, 5000]),
            ],
        ];
        Model::sharded(path, seed, &shards)
    }

    /// One file of `count` U8 tensors of `bytes` bytes each.
    pub fn uniform(path: &Path, seed: u64, count: usize, bytes: u64) -> Model {
        let tensors = (0..count).map(|index| Tensor::new(format!("t.{index:04}"), "U8", &[bytes])).collect();
        Model::sharded(path, seed, &[tensors])
    }

    /// One file of 21 MiB whose data begins on a multiple of 512 bytes that is none of 4096. Most of it agrees with a region of a
    /// GPU modulo 4 KiB; what follows the tensor of 77 bytes does not.
    pub fn aligned(path: &Path, seed: u64) -> Model {
        let tensors = vec![
            Tensor::new("embed.weight", "BF16", &[4096, 1024]),
            Tensor::new("small.bias", "U8", &[512]),
            Tensor::new("layers.0.weight", "U8", &[9 << 20]),
            Tensor::new("layers.0.mask", "BOOL", &[77]),
            Tensor::new("layers.1.weight", "U8", &[3 << 20]),
            Tensor::new("head.bias", "U8", &[1201]),
        ];
        fs::create_dir_all(path).unwrap();
        // A header that ends on a multiple of 4096 would hide that edges are read, too.
        let header = header_aligned(&tensors, &json!({"seed": seed.to_string()}), 512);
        let unit = if header.len().is_multiple_of(4096) { 1536 } else { 512 };
        write_aligned(&path.join("model.safetensors"), &tensors, seed, unit);
        Model { path: path.to_owned(), seed, tensors }
    }

    pub fn sharded(path: &Path, seed: u64, shards: &[Vec<Tensor>]) -> Model {
        fs::create_dir_all(path).unwrap();
        let mut weight_map = BTreeMap::new();
        for (index, tensors) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
            write(&path.join(&name), tensors, seed);
            weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        // Whole before it has its name, like the shards: who reads meanwhile finds the old index or the new one.
        let temporary = path.join("index.tmp");
        fs::write(&temporary, index.to_string()).unwrap();
        fs::rename(&temporary, path.join("model.safetensors.index.json")).unwrap();
        Model { path: path.to_owned(), seed, tensors: shards.concat() }
    }

    /// The files with tensors, in order.
    pub fn shards(&self) -> Vec<PathBuf> {
        let mut paths: Vec<_> = fs::read_dir(&self.path)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
            .collect();
        paths.sort();
        paths
    }

    /// Sum of the shards' sizes.
    pub fn bytes(&self) -> u64 {
        self.shards().iter().map(|path| path.metadata().unwrap().len()).sum()
    }

    /// The bytes of a tensor as the file has them.
    pub fn contents(&self, name: &str) -> Vec<u8> {
        self.tensors.iter().find(|tensor| tensor.name == name).unwrap().contents(self.seed)
    }

    /// Every tensor of the model is attached, described as written, and equal byte for byte.
    #[track_caller]
    pub fn assert_equal(&self, attached: &super::wire::Attached) {
        assert_eq!(attached.names().len(), self.tensors.len());
        for tensor in &self.tensors {
            let view = attached.view(&tensor.name);
            assert_eq!(view["dtype"], tensor.dtype);
            assert_eq!(view["shape"], json!(tensor.shape));
            assert!(attached.tensor(&tensor.name) == tensor.contents(self.seed), "{} differs", tensor.name);
        }
    }
}

/// A model of one U8 tensor of zeros that takes no room on the drive: large enough to be caught in mid-load.
pub fn sparse(path: &Path, bytes: u64) -> PathBuf {
    fs::create_dir_all(path).unwrap();
    let file = path.join("model.safetensors");
    let header = header(&[Tensor::new("zeros", "U8", &[bytes])], &Value::Null);
    fs::write(&file, &header).unwrap();
    File::options().write(true).open(&file).unwrap().set_len(header.len() as u64 + bytes).unwrap();
    file
}

/// A GGUF file, version 3, with tensors of F32 and Q8_0. → (name, type, shape slowest first, bytes) of each.
pub fn gguf(path: &Path) -> Vec<(String, &'static str, Vec<u64>, Vec<u8>)> {
    const ALIGNMENT: usize = 32;
    const Q8_0_BLOCK: (u64, usize) = (32, 34);
    let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let tensors =
        [("token_embd.weight", 0u32, "F32", [64u64, 100]), ("blk.0.attn_q.weight", 8, "Q8_0", [256, 96])];
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend(1u64.to_le_bytes());
    header.extend(string("general.architecture"));
    header.extend(8u32.to_le_bytes());
    header.extend(string("llama"));
    let (mut data, mut found) = (Vec::new(), Vec::new());
    for (name, kind, dtype, [fastest, slowest]) in tensors {
        let elements = fastest * slowest;
        let bytes = if kind == 0 {
            usize::try_from(elements).unwrap() * 4
        } else {
            usize::try_from(elements / Q8_0_BLOCK.0).unwrap() * Q8_0_BLOCK.1
        };
        let contents = Tensor { name: name.to_owned(), dtype: "U8", shape: Vec::new(), bytes }.contents(7);
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        header.extend(string(name));
        header.extend(2u32.to_le_bytes());
        header.extend([fastest, slowest].iter().flat_map(|dimension| dimension.to_le_bytes()));
        header.extend(kind.to_le_bytes());
        header.extend((data.len() as u64).to_le_bytes());
        data.extend_from_slice(&contents);
        found.push((name.to_owned(), dtype, vec![slowest, fastest], contents));
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
    fs::write(path, [header, data].concat()).unwrap();
    super::evict_from_page_cache(path);
    found
}
