use super::*;
use proptest::prelude::*;

/// A GGUF file in the making.
#[derive(Clone)]
struct Writer {
    version: u32,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    alignment: usize,
    data_bytes: usize,
}

impl Writer {
    fn new() -> Writer {
        Writer { version: 3, keys: vec![], tensors: vec![], alignment: 32, data_bytes: 0 }
    }

    fn key(mut self, key: &str, kind: u32, value: &[u8]) -> Writer {
        self.keys.push([&string(key), &kind.to_le_bytes()[..], value].concat());
        self
    }

    fn array(self, key: &str, kind: u32, elements: u64, values: &[u8]) -> Writer {
        self.key(key, kinds::ARRAY, &[&kind.to_le_bytes()[..], &elements.to_le_bytes(), values].concat())
    }

    /// `dims` as the file has them: fastest first.
    fn tensor(mut self, name: &str, dims: &[u64], number: u32, offset: u64) -> Writer {
        let rank = (dims.len() as u32).to_le_bytes();
        let dims: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        let parts = [&string(name), &rank[..], &dims, &number.to_le_bytes(), &offset.to_le_bytes()];
        self.tensors.push(parts.concat());
        self
    }

    fn data(self, data_bytes: usize) -> Writer {
        Writer { data_bytes, ..self }
    }

    fn header(&self) -> Vec<u8> {
        let counts = [self.tensors.len() as u64, self.keys.len() as u64].map(u64::to_le_bytes).concat();
        let keys = self.keys.concat();
        [b"GGUF", &self.version.to_le_bytes()[..], &counts, &keys, &self.tensors.concat()].concat()
    }

    fn file(&self) -> Vec<u8> {
        let mut file = self.header();
        file.resize(file.len().next_multiple_of(self.alignment) + self.data_bytes, 0);
        file
    }

    fn read(&self) -> Result<Header, Error> {
        let file = self.file();
        parse(&file, file.len() as u64, 100)
    }

    fn code(&self) -> Code {
        crate::Error::from(self.read().unwrap_err()).code
    }
}

fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    [&(text.as_ref().len() as u64).to_le_bytes()[..], text.as_ref()].concat()
}

const F32: u32 = 0;
const Q4_0: u32 = 2;
const Q4_K: u32 = 12;

fn model() -> Writer {
    let words = [string("a"), string("\u{ff}"), string(b"\xff")].concat();
    Writer::new()
        .key("general.architecture", kinds::STRING, &string("llama"))
        .key("llama.block_count", kinds::U32, &2u32.to_le_bytes())
        .key("llama.rope.freq_base", kinds::F32, &10000f32.to_le_bytes())
        .key("some.flag", kinds::BOOL, &[1])
        .array("tokenizer.ggml.tokens", kinds::STRING, 3, &words)
        .array("tokenizer.ggml.scores", kinds::F32, 2, &[0; 8])
        .array(
            "nested",
            kinds::ARRAY,
            1,
            &[&kinds::BOOL.to_le_bytes()[..], &2u64.to_le_bytes(), &[0, 1]].concat(),
        )
        .tensor("token_embd.weight", &[256, 3], Q4_K, 0)
        .tensor("norm", &[5], F32, 448)
        .data(448 + 20)
}

#[test]
fn reads_tensors_and_metadata() {
    let header = model().read().unwrap();
    let data_start = model().header().len().next_multiple_of(32) as u64;
    let [weight, norm] = &header.tensors[..] else { panic!("{header:?}") };
    assert_eq!(
        (weight.name.as_str(), weight.dtype, &weight.shape[..]),
        ("token_embd.weight", Dtype::Q4_K, &[3, 256][..])
    );
    assert_eq!((weight.offset, weight.nbytes), (data_start, 3 * 144));
    assert_eq!((norm.dtype, norm.offset, norm.nbytes), (Dtype::F32, data_start + 448, 20));
    let metadata: Vec<(&str, &str)> =
        header.metadata.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect();
    let expected = [
        ("general.architecture", "llama"),
        ("llama.block_count", "2"),
        ("llama.rope.freq_base", "10000"),
        ("some.flag", "true"),
    ];
    assert_eq!(metadata, expected);
    assert_eq!(Writer { version: 2, ..model() }.read().unwrap(), header);
    assert_eq!(Writer::new().read().unwrap(), Header::default());
}

#[test]
fn the_alignment_is_that_of_the_file() {
    let aligned = |value: u32, alignment| {
        let writer = Writer { alignment, ..Writer::new() };
        writer.key("general.alignment", kinds::U32, &value.to_le_bytes()).tensor("a", &[1], F32, 64).data(68)
    };
    let header = aligned(64, 64).read().unwrap();
    assert_eq!((header.tensors[0].offset % 64, header.metadata["general.alignment"].as_str()), (0, "64"));
    assert!(aligned(8, 8).read().is_ok());
    assert_eq!(aligned(128, 128).code(), Code::CatalogGgufMisaligned);
    for bad in [0, 24, 1 << 21, u32::MAX] {
        assert_eq!(aligned(bad, 32).code(), Code::CatalogGgufBadAlignment, "{bad}");
    }
    let wide = Writer::new().key("general.alignment", kinds::U64, &64u64.to_le_bytes());
    assert_eq!(wide.code(), Code::CatalogGgufBadAlignment);
    // An alignment of 1 would put a float anywhere.
    let one = Writer { alignment: 1, ..Writer::new() };
    let one = one.key("general.alignment", kinds::U32, &1u32.to_le_bytes());
    let odd = (0..4).filter(|offset| one.clone().tensor("a", &[1], F32, *offset).data(8).read().is_err());
    assert_eq!(odd.count(), 3);
}

#[test]
fn each_fault_has_its_code() {
    use Code::*;
    let new = Writer::new;
    let flag = |value: &[u8]| new().key("a", kinds::BOOL, value);
    let nested = (0..5).fold(vec![], |inner: Vec<u8>, _| {
        [&kinds::ARRAY.to_le_bytes()[..], &1u64.to_le_bytes(), &inner].concat()
    });
    let long = u64::MAX.to_le_bytes();
    let cases: Vec<(&str, Writer, Code)> = vec![
        ("version 1", Writer { version: 1, ..new() }, CatalogGgufUnsupportedVersion),
        ("big endian", Writer { version: 3 << 24, ..new() }, CatalogGgufUnsupportedVersion),
        ("key twice", new().key("a", kinds::U8, &[1]).key("a", kinds::U8, &[1]), CatalogGgufDuplicateKey),
        ("no key", new().key("", kinds::U8, &[1]), CatalogGgufBadKey),
        ("zero in key", new().key("a\0", kinds::U8, &[1]), CatalogGgufBadKey),
        ("long key", new().key(&"k".repeat(65_536), kinds::U8, &[1]), CatalogGgufStringTooLong),
        ("unknown kind", new().key("a", 13, &[1]), CatalogGgufBadValue),
        ("unknown kind in array", new().array("a", 13, 1, &[1]), CatalogGgufBadValue),
        ("half true", flag(&[2]), CatalogGgufBadValue),
        ("half true in array", new().array("a", kinds::BOOL, 2, &[1, 2]), CatalogGgufBadValue),
        ("nested deep", new().key("a", kinds::ARRAY, &nested), CatalogGgufBadValue),
        ("text", new().key("a", kinds::STRING, &string(b"\xff")), CatalogGgufBadString),
        ("long text", new().key("a", kinds::STRING, &long), CatalogGgufStringTooLong),
        ("long text in array", new().array("a", kinds::STRING, 1, &long), CatalogGgufStringTooLong),
        ("long array", new().array("a", kinds::U8, u64::MAX, &[]), CatalogGgufArrayTooLong),
        ("array past the end", new().array("a", kinds::U64, 16 << 20, &[]), CatalogGgufTruncated),
        ("name twice", new().tensor("a", &[0], F32, 0).tensor("a", &[0], F32, 0), CatalogGgufBadName),
        ("no name", new().tensor("", &[0], F32, 0), CatalogGgufBadName),
        ("zero in name", new().tensor("\0", &[0], F32, 0), CatalogGgufBadName),
        ("long name", new().tensor(&"n".repeat(513), &[0], F32, 0), CatalogGgufStringTooLong),
        ("rank", new().tensor("a", &[1; 5], F32, 0).data(4), CatalogGgufBadShape),
        ("overflow", new().tensor("a", &[1 << 32, 1 << 32], F32, 0), CatalogGgufBadShape),
        ("overflow beside 0", new().tensor("a", &[0, 1 << 32, 1 << 32], F32, 0), CatalogGgufBadShape),
        ("overflow of bytes", new().tensor("a", &[1 << 62], F32, 0), CatalogGgufBadShape),
        ("torn row", new().tensor("a", &[16, 2], Q4_0, 0).data(18), CatalogGgufBadShape),
        ("withdrawn type", new().tensor("a", &[32], 4, 0).data(32), CatalogGgufUnknownType),
        ("unknown type", new().tensor("a", &[32], u32::MAX, 0).data(32), CatalogGgufUnknownType),
        ("misaligned", new().tensor("a", &[1], F32, 16).data(64), CatalogGgufMisaligned),
        ("outside", new().tensor("a", &[1], F32, 32).data(35), CatalogGgufOutsideFile),
        ("far outside", new().tensor("a", &[1], F32, u64::MAX - 31).data(35), CatalogGgufOutsideFile),
        ("overlap", new().tensor("a", &[9], F32, 0).tensor("b", &[1], F32, 32).data(64), CatalogGgufOverlap),
        (
            "the same place",
            new().tensor("a", &[1], F32, 0).tensor("b", &[1], F32, 0).data(64),
            CatalogGgufOverlap,
        ),
    ];
    for (case, writer, expected) in cases {
        assert_eq!(writer.code(), expected, "{case}");
    }
    let refused = |bytes: &[u8]| crate::Error::from(parse(bytes, bytes.len() as u64, 100).unwrap_err()).code;
    assert_eq!(refused(b"GGML\x03\0\0\0"), CatalogGgufBadMagic);
    let counts = |tensors: u64, keys: u64| {
        [b"GGUF\x03\0\0\0", &tensors.to_le_bytes()[..], &keys.to_le_bytes()].concat()
    };
    assert_eq!(refused(&counts(101, 0)), CatalogTooManyTensors);
    assert_eq!(refused(&counts(100, 0)), CatalogGgufTruncated);
    assert_eq!(refused(&counts(0, u64::MAX)), CatalogGgufTooManyKeys);
    assert_eq!(refused(&counts(0, KEYS_MAX)), CatalogGgufTruncated);
}

#[test]
fn every_shorter_prefix_is_truncated_and_nothing_else() {
    let file = model().file();
    let header_bytes = model().header().len();
    for length in 0..header_bytes {
        assert_eq!(parse(&file[..length], file.len() as u64, 100), Err(Error::Truncated), "{length}");
    }
    assert_eq!(parse(&file[..header_bytes], file.len() as u64, 100), model().read());
}

#[test]
fn tensors_without_bytes_may_lie_anywhere() {
    let writer =
        Writer::new().tensor("a", &[16], F32, 0).tensor("b", &[0], F32, 32).tensor("c", &[], F32, 64);
    let header = writer.data(68).read().unwrap();
    assert_eq!(header.tensors.iter().map(|tensor| tensor.nbytes).collect::<Vec<_>>(), [64, 0, 4]);
}

proptest! {
    #[test]
    fn any_change_is_read_or_refused(place: prop::sample::Index, to: u8, cut: prop::sample::Index) {
        let mut file = model().file();
        let place = place.index(file.len());
        file[place] = to;
        let cut = cut.index(file.len() + 1);
        for bytes in [&file[..], &file[..cut]] {
            if let Ok(header) = parse(bytes, bytes.len() as u64, 100) {
                for tensor in &header.tensors {
                    prop_assert!(tensor.offset + tensor.nbytes <= bytes.len() as u64);
                    prop_assert_eq!(tensor.offset % tensor.element_align, 0);
                }
            }
        }
    }
}
