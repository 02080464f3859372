use super::*;
use crate::source::file::from_fds;
use std::fs;
use std::sync::Arc;

fn limits() -> Limits {
    crate::config::Config::default().limits
}

/// Opens files of these names and contents.
fn open(files: &[(&str, Vec<u8>)]) -> Vec<OpenFile> {
    let dir = tempfile::tempdir().unwrap();
    let write = |(name, content): &(&str, Vec<u8>)| {
        fs::write(dir.path().join(name), content).unwrap();
        fs::File::open(dir.path().join(name)).unwrap().into()
    };
    let names: Vec<String> = files.iter().map(|(name, _)| (*name).to_owned()).collect();
    from_fds(files.iter().map(write).collect(), &names, &limits()).unwrap()
}

/// A safetensors file with one byte tensor of each name.
fn safetensors(tensors: &[&str]) -> Vec<u8> {
    let data = [1];
    let view = |name: &&str| {
        (
            name.to_string(),
            safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![1], &data).unwrap(),
        )
    };
    let metadata = Some([("first".to_owned(), tensors[0].to_owned())].into());
    safetensors::serialize(tensors.iter().map(view), metadata).unwrap()
}

/// A GGUF file with the key `key` of so many bytes, and one tensor `g` of four bytes.
fn gguf(key_bytes: usize) -> Vec<u8> {
    let mut file =
        [b"GGUF\x03\0\0\0", &1u64.to_le_bytes()[..], &1u64.to_le_bytes(), &3u64.to_le_bytes(), b"key"]
            .concat();
    file.extend(
        [&8u32.to_le_bytes()[..], &(key_bytes as u64).to_le_bytes(), &vec![b'x'; key_bytes]].concat(),
    );
    file.extend([&1u64.to_le_bytes()[..], b"g", &1u32.to_le_bytes(), &1u64.to_le_bytes(), &[0; 12]].concat());
    file.resize(file.len().next_multiple_of(32) + 4, 0);
    file
}

fn code(files: &[OpenFile]) -> Code {
    describe(files, &limits()).unwrap_err().code
}

#[test]
fn tensors_of_all_files_are_listed() {
    let files = open(&[
        ("a.txt", b"hello".to_vec()),
        ("b.safetensors", safetensors(&["x", "y"])),
        ("c.safetensors", safetensors(&["z"])),
        ("d.gguf", gguf(3)),
    ]);
    let description = describe(&files, &limits()).unwrap();
    assert_eq!(description.format, Format::Safetensors);
    let list: Vec<(&str, u32)> =
        description.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.file)).collect();
    assert_eq!(list, [("x", 1), ("y", 1), ("z", 2), ("g", 3)]);
    assert_eq!(description.files[0], FileEntry { name: "a.txt".to_owned(), bytes: 5 });
    assert_eq!(description.metadata["first"], "x", "the first file counts");
    assert_eq!(description.metadata["key"], "xxx");
    for (tensor, expected) in description.tensors.iter().zip([1, 1, 1, 0]) {
        let mut byte = [9];
        files[tensor.file as usize].read_exact_at(&mut byte, tensor.offset).unwrap();
        assert_eq!(byte[0], expected, "{}", tensor.name);
    }
    let chunks =
        description.files.iter().map(|file| vec![0; file.bytes.div_ceil(1 << 20) as usize]).collect();
    assert!(manifest::Manifest::new(description, chunks).is_ok());
    assert_eq!(describe(&files[..1], &limits()).unwrap().format, Format::Plain);
}

#[test]
fn errors_name_the_file() {
    let files = open(&[("a.safetensors", safetensors(&["x"])), ("b.safetensors", b"short".to_vec())]);
    let error = describe(&files, &limits()).unwrap_err();
    assert_eq!(error.code, Code::CatalogSafetensorsHeaderTooShort);
    assert!(error.message.starts_with("'b.safetensors': "), "{error}");
    assert_eq!(code(&open(&[("b.gguf", b"short".to_vec())])), Code::CatalogGgufBadMagic);
    assert_eq!(code(&open(&[("b.gguf", vec![])])), Code::CatalogGgufTruncated);
}

#[test]
fn long_gguf_headers_are_read_up_to_the_limit() {
    let files = open(&[("a.gguf", gguf(3 << 20))]);
    assert_eq!(describe(&files, &limits()).unwrap().tensors.len(), 1);
    let limited = Limits { header_bytes_max: 2 << 20, ..limits() };
    assert_eq!(describe(&files, &limited).unwrap_err().code, Code::CatalogGgufHeaderTooLarge);
    let cut = gguf(3 << 20)[..2 << 20].to_vec();
    assert_eq!(code(&open(&[("a.gguf", cut)])), Code::CatalogGgufTruncated);
}

#[test]
fn limits_hold_over_all_files() {
    let files = open(&[("a.safetensors", safetensors(&["x", "y"])), ("b.safetensors", safetensors(&["z"]))]);
    assert!(describe(&files, &Limits { tensors_max: 3, ..limits() }).is_ok());
    for tensors_max in 0..3 {
        let error = describe(&files, &Limits { tensors_max, ..limits() }).unwrap_err();
        assert_eq!(error.code, Code::CatalogTooManyTensors, "{tensors_max}");
    }
    let error = describe(&files, &Limits { header_bytes_max: 10, ..limits() }).unwrap_err();
    assert_eq!(error.code, Code::CatalogSafetensorsHeaderTooLarge);
}

#[test]
fn a_tensor_is_in_one_file_only() {
    let files = open(&[("a.safetensors", safetensors(&["x"])), ("b.safetensors", safetensors(&["y", "x"]))]);
    assert_eq!(code(&files), Code::CatalogDuplicateTensor);
}

#[test]
fn the_index_must_be_right() {
    let mut files =
        open(&[("a.safetensors", safetensors(&["x", "y"])), ("b.safetensors", safetensors(&["z"]))]);
    let mut index = |a: &[&str], b: &[&str]| {
        for (file, names) in files.iter_mut().zip([a, b]) {
            file.indexed = Some(Arc::from(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()));
        }
        describe(&files, &limits()).map_err(|error| error.code).map(|description| description.tensors.len())
    };
    assert_eq!(index(&["x", "y"], &["z"]), Ok(3));
    assert_eq!(index(&["x"], &["z"]), Ok(3), "what the index leaves out is there all the same");
    assert_eq!(index(&["x"], &["z", "y"]), Err(Code::CatalogIndexTensorElsewhere));
    assert_eq!(index(&["x"], &["w"]), Err(Code::CatalogIndexTensorMissing));
}

#[test]
fn a_file_that_became_shorter_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    fs::write(&path, safetensors(&["x"])).unwrap();
    let names = ["a.safetensors".to_owned()];
    let files = from_fds(vec![fs::File::open(&path).unwrap().into()], &names, &limits()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(20).unwrap();
    assert_eq!(code(&files), Code::SourceFileShortRead);
}

/// The seeds of the fuzz targets: written by the stock libraries of the formats, and by this one.
#[test]
fn stock_files_are_read() {
    let seed =
        |name: &str| fs::read(format!("{}/tests/fuzz/seeds/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let tensors = |extension: &str, name: &str| -> Vec<(String, &str, Vec<u64>, u64)> {
        let files = open(&[(&format!("a.{extension}"), seed(name))]);
        let list = describe(&files, &limits()).unwrap().tensors.into_iter();
        list.map(|tensor| (tensor.name, tensor.dtype.as_str(), tensor.shape, tensor.nbytes)).collect()
    };
    let expected = [
        ("token_embd.weight".to_owned(), "F32", vec![3, 32], 384),
        ("blk.0.attn_q.weight".to_owned(), "Q8_0", vec![2, 64], 136),
        ("norm".to_owned(), "F16", vec![5], 10),
    ];
    assert_eq!(tensors("gguf", "gguf/model"), expected);
    assert_eq!(tensors("gguf", "gguf/aligned").len(), 2);
    assert_eq!(tensors("safetensors", "safetensors/numpy").len(), 5);
    assert_eq!(tensors("safetensors", "safetensors/subbyte").len(), 4);
    assert_eq!(tensors("safetensors", "safetensors/empty").len(), 0);
    let index = |name| crate::source::file::index::parse(&seed(name), 10).unwrap().len();
    assert_eq!((index("index/stock"), index("index/small")), (2, 1));
    assert!(manifest::Manifest::parse(&seed("manifest/two_files"), &limits()).is_ok());
}
