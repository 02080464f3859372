use super::*;
use ::safetensors::tensor::{Dtype as StockDtype, TensorView, serialize};
use proptest::prelude::*;

/// A file whose header is `json`, with `data_bytes` of data.
fn file(json: &str, data_bytes: usize) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; data_bytes]].concat()
}

/// Reads a whole file the way `catalog::describe` does.
fn read(file: &[u8]) -> Result<Header, Error> {
    let start = &file[..file.len().min(LENGTH_BYTES)];
    let header = header_bytes(start, file.len() as u64, 100_000_000)?;
    parse(&file[LENGTH_BYTES..LENGTH_BYTES + header], file.len() as u64, 1000)
}

fn code(file: &[u8]) -> Code {
    crate::Error::from(read(file).unwrap_err()).code
}

const TEST: &[u8] =
    b"<\x00\x00\x00\x00\x00\x00\x00{\"test\":{\"dtype\":\"I32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}\
    \x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";

/// The malformed files of the tests of the safetensors project itself, by the name of the test.
#[test]
fn every_malformed_case_of_the_stock_tests_is_refused() {
    use Code::*;
    let zeros = |count| vec![0; count];
    let attack: Vec<String> = (0..10)
        .map(|n| format!(r#""weight_{n}":{{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#))
        .collect();
    let attack = file(&format!("{{{}}}", attack.join(",")), 16);
    let misaligned = r#"{"u8":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"f32":{"dtype":"F32","shape":[4],"data_offsets":[3,19]}}"#;
    let cases: &[(&str, Vec<u8>, Code)] = &[
        // safetensors/src/tensor.rs
        ("test_json_attack", attack, CatalogSafetensorsOverlap),
        (
            "test_metadata_incomplete_buffer, too long",
            [TEST, b"extra_bogus_data_for_polyglot_file"].concat(),
            CatalogSafetensorsTrailingBytes,
        ),
        (
            "test_metadata_incomplete_buffer, too short",
            TEST[..TEST.len() - 2].to_vec(),
            CatalogSafetensorsOffsetsOutsideFile,
        ),
        (
            "test_header_too_large",
            [b"<\x00\x00\x00\x00\xff\xff\xff", &TEST[8..]].concat(),
            CatalogSafetensorsHeaderTooLarge,
        ),
        ("test_header_too_small", vec![], CatalogSafetensorsHeaderTooShort),
        ("test_invalid_header_length", TEST[..8].to_vec(), CatalogSafetensorsHeaderOutsideFile),
        (
            "test_invalid_header_non_utf8",
            b"\x01\x00\x00\x00\x00\x00\x00\x00\xff".to_vec(),
            CatalogSafetensorsNotUtf8,
        ),
        ("test_invalid_header_not_json", file("{", 0), CatalogSafetensorsNotJson),
        (
            "test_whitespace_leading_padded_header (accepted there)",
            file("\t\n{}\r ", 0),
            CatalogSafetensorsLeadingSpace,
        ),
        (
            "test_invalid_info",
            file(r#"{"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0, 4]}}"#, 4),
            CatalogSafetensorsSizeMismatch,
        ),
        (
            "test_invalid_info, as it is there: without data",
            file(r#"{"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0, 4]}}"#, 0),
            CatalogSafetensorsOffsetsOutsideFile,
        ),
        (
            "test_validation_overflow, of the shape",
            file(r#"{"test":{"dtype":"I32","shape":[2,18446744073709551614],"data_offsets":[0,16]}}"#, 16),
            CatalogSafetensorsShapeOverflow,
        ),
        (
            "test_validation_overflow, of the bytes",
            file(r#"{"test":{"dtype":"I32","shape":[2,9223372036854775807],"data_offsets":[0,16]}}"#, 16),
            CatalogSafetensorsShapeOverflow,
        ),
        (
            "test_serialization_fp4_misaligned",
            file(r#"{"attn.0":{"dtype":"F4","shape":[1,3],"data_offsets":[0,2]}}"#, 2),
            CatalogSafetensorsPartialByte,
        ),
        (
            "test_serialization_fp4_invalid",
            file(r#"{"attn.0":{"dtype":"F4","shape":[1,2],"data_offsets":[0,4]}}"#, 4),
            CatalogSafetensorsSizeMismatch,
        ),
        // bindings/python/tests
        ("test_get_correctly_dropped: a text file", b"something".to_vec(), CatalogSafetensorsHeaderTooLarge),
        (
            "test_exception: unknown dtype",
            file(r#"{"test":{"dtype":"nonsense","shape":[1],"data_offsets":[0,4]}}"#, 4),
            CatalogSafetensorsUnknownDtype,
        ),
        ("test_truncated_header_is_rejected", TEST[..8 + 30].to_vec(), CatalogSafetensorsHeaderOutsideFile),
        (
            "test_data_offset_overflow_is_rejected",
            file(r#"{"liar":{"dtype":"F32","shape":[1024,1024],"data_offsets":[0,4194304]}}"#, 1),
            CatalogSafetensorsOffsetsOutsideFile,
        ),
        (
            "test_truncated_data_raises",
            file(r#"{"t":{"dtype":"F32","shape":[1024],"data_offsets":[0,4096]}}"#, 100),
            CatalogSafetensorsOffsetsOutsideFile,
        ),
        ("test_misaligned_offsets (accepted there)", file(misaligned, 19), CatalogSafetensorsMisaligned),
        (
            "test_load_rejects_null_byte_in_tensor_name",
            file(r#"{"weights\u0000hidden":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4),
            CatalogSafetensorsBadName,
        ),
        (
            "test_load_rejects_null_byte_in_metadata_key",
            file(r#"{"__metadata__":{"frame\u0000work":"pt"}}"#, 0),
            CatalogSafetensorsBadMetadata,
        ),
        (
            "test_load_rejects_null_byte_in_metadata_value",
            file(r#"{"__metadata__":{"framework":"pt\u0000injected"}}"#, 0),
            CatalogSafetensorsBadMetadata,
        ),
        ("a file of zeros", zeros(64), CatalogSafetensorsNotJson),
    ];
    for (test, bytes, expected) in cases {
        assert_eq!(code(bytes), *expected, "{test}");
    }
}

/// `{"a": {…}}` with these three fields.
fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}"#)
}

#[test]
fn each_fault_has_its_code() {
    use Code::*;
    let a = r#""a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
    let two = |offsets: &str| format!(r#"{{{a},"b":{{"dtype":"U8","shape":[4],"data_offsets":{offsets}}}}}"#);
    let long = format!("[{}1]", "1,".repeat(64));
    let spaced = format!("[4{}]", " ".repeat(5000));
    let cases: &[(String, Code)] = &[
        ("{} {}".into(), CatalogSafetensorsNotJson),
        ("{}\0".into(), CatalogSafetensorsNotJson),
        ("nope".into(), CatalogSafetensorsNotJson),
        ("{\"a\":1}{".into(), CatalogSafetensorsNotJson),
        ("[]".into(), CatalogSafetensorsNotObject),
        ("\"{}\"".into(), CatalogSafetensorsNotObject),
        (" {}".into(), CatalogSafetensorsLeadingSpace),
        (format!("{{{a},{a}}}"), CatalogSafetensorsDuplicateKey),
        (format!("{{{a},{}}}", a.replacen('a', "\\u0061", 1)), CatalogSafetensorsDuplicateKey),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), CatalogSafetensorsDuplicateKey),
        (r#"{"__metadata__":{"x":"1","x":"1"}}"#.into(), CatalogSafetensorsDuplicateKey),
        (entry("\"U8\",\"dtype\":\"U8\"", "[4]", "[0,4]"), CatalogSafetensorsDuplicateKey),
        (entry("\"U8\"", "[4],\"shape\":[4]", "[0,4]"), CatalogSafetensorsDuplicateKey),
        (entry("\"U8\"", "[4]", "[0,4],\"data_offsets\":[0,4]"), CatalogSafetensorsDuplicateKey),
        (r#"{"__metadata__":[]}"#.into(), CatalogSafetensorsBadMetadata),
        (r#"{"__metadata__":null}"#.into(), CatalogSafetensorsBadMetadata),
        (r#"{"__metadata__":{"x":1}}"#.into(), CatalogSafetensorsBadMetadata),
        (r#"{"__metadata__":{"x":{"y":"z"}}}"#.into(), CatalogSafetensorsBadMetadata),
        (r#"{"a":1}"#.into(), CatalogSafetensorsBadEntry),
        (r#"{"a":[]}"#.into(), CatalogSafetensorsBadEntry),
        (r#"{"a":null}"#.into(), CatalogSafetensorsBadEntry),
        (entry("\"U8\",\"strides\":[1]", "[4]", "[0,4]"), CatalogSafetensorsUnknownField),
        (entry("\"U8\"", "[4]", "[0,4],\"x\":1,\"y\":2"), CatalogSafetensorsUnknownField),
        (r#"{"a":{}}"#.into(), CatalogSafetensorsMissingField),
        (r#"{"a":{"dtype":"U8","shape":[4]}}"#.into(), CatalogSafetensorsMissingField),
        (r#"{"a":{"dtype":"U8","data_offsets":[0,4]}}"#.into(), CatalogSafetensorsMissingField),
        (r#"{"a":{"shape":[4],"data_offsets":[0,4]}}"#.into(), CatalogSafetensorsMissingField),
        (entry("\"u8\"", "[4]", "[0,4]"), CatalogSafetensorsUnknownDtype),
        (entry("\"Q4_K\"", "[256]", "[0,144]"), CatalogSafetensorsUnknownDtype),
        (entry("8", "[4]", "[0,4]"), CatalogSafetensorsUnknownDtype),
        (entry("\"U8\"", "4", "[0,4]"), CatalogSafetensorsBadShape),
        (entry("\"U8\"", "[-4]", "[0,4]"), CatalogSafetensorsBadShape),
        (entry("\"U8\"", "[4.0]", "[0,4]"), CatalogSafetensorsBadShape),
        (entry("\"U8\"", "[18446744073709551616]", "[0,4]"), CatalogSafetensorsBadShape),
        (entry("\"U8\"", &long, "[0,4]"), CatalogSafetensorsBadShape),
        (entry("\"U8\"", &spaced, "[0,4]"), CatalogSafetensorsBadShape),
        (entry("\"U8\"", "[0,18446744073709551615,2]", "[0,0]"), CatalogSafetensorsShapeOverflow),
        (entry("\"U8\"", "[18446744073709551615,2,0]", "[0,0]"), CatalogSafetensorsShapeOverflow),
        (entry("\"F64\"", "[2305843009213693952]", "[0,0]"), CatalogSafetensorsShapeOverflow),
        (entry("\"F4\"", "[1]", "[0,1]"), CatalogSafetensorsPartialByte),
        (entry("\"F6_E2M3\"", "[2]", "[0,2]"), CatalogSafetensorsPartialByte),
        (entry("\"U8\"", "[4]", "[0]"), CatalogSafetensorsBadOffsets),
        (entry("\"U8\"", "[4]", "[0,4,8]"), CatalogSafetensorsBadOffsets),
        (entry("\"U8\"", "[4]", "[-4,0]"), CatalogSafetensorsBadOffsets),
        (entry("\"U8\"", "[4]", "{}"), CatalogSafetensorsBadOffsets),
        (entry("\"U8\"", "[4]", "[4,0]"), CatalogSafetensorsOffsetsReversed),
        (entry("\"U8\"", "[4]", "[0,9]"), CatalogSafetensorsOffsetsOutsideFile),
        (entry("\"U8\"", "[4]", "[0,18446744073709551615]"), CatalogSafetensorsOffsetsOutsideFile),
        (
            entry("\"U8\"", "[4]", "[18446744073709551611,18446744073709551615]"),
            CatalogSafetensorsOffsetsOutsideFile,
        ),
        (two("[3,7]"), CatalogSafetensorsOverlap),
        (two("[0,4]"), CatalogSafetensorsOverlap),
        (entry("\"U8\"", "[4]", "[4,8]"), CatalogSafetensorsHole),
        (two("[4,7]"), CatalogSafetensorsSizeMismatch),
        ("{}".into(), CatalogSafetensorsTrailingBytes),
        (entry("\"U8\"", "[4]", "[0,4]"), CatalogSafetensorsTrailingBytes),
    ];
    for (json, expected) in cases {
        assert_eq!(code(&file(json, 8)), *expected, "{json}");
    }
    assert_eq!(read(&file(&two("[4,8]"), 8)).unwrap().tensors.len(), 2);
    let header = two("[4,8]");
    let few = parse(header.as_bytes(), header.len() as u64 + 16, 1).unwrap_err();
    assert_eq!(crate::Error::from(few).code, CatalogTooManyTensors);
}

#[test]
fn the_length_must_fit() {
    for (start, file_bytes, limit, expected) in [
        (&[1, 0, 0, 0, 0, 0, 0][..], 7, 100, Err(Code::CatalogSafetensorsHeaderTooShort)),
        (&100u64.to_le_bytes(), 108, 100, Ok(100)),
        (&100u64.to_le_bytes(), 107, 100, Err(Code::CatalogSafetensorsHeaderOutsideFile)),
        (&101u64.to_le_bytes(), 1000, 100, Err(Code::CatalogSafetensorsHeaderTooLarge)),
        (&u64::MAX.to_le_bytes(), u64::MAX, u64::MAX, Err(Code::CatalogSafetensorsHeaderOutsideFile)),
    ] {
        let result = header_bytes(start, file_bytes, limit).map_err(|error| crate::Error::from(error).code);
        assert_eq!(result, expected, "{start:?} {file_bytes}");
    }
}

#[test]
fn well_formed_cases_of_the_stock_tests_are_read() {
    let header = read(TEST).unwrap();
    let tensor = &header.tensors[0];
    assert_eq!((tensor.name.as_str(), tensor.dtype, &tensor.shape[..]), ("test", Dtype::I32, &[2, 2][..]));
    assert_eq!((tensor.offset, tensor.nbytes, tensor.element_align), (68, 16, 4));
    // test_whitespace_padded_header
    assert_eq!(read(&file("{}\r \t\n", 0)).unwrap(), Header::default());
    // test_empty_shapes_allowed
    assert_eq!(read(&file(&entry("\"I32\"", "[]", "[0,4]"), 4)).unwrap().tensors[0].nbytes, 4);
    // test_zero_sized_tensor
    assert_eq!(read(&file(&entry("\"I32\"", "[2,0]", "[0, 0]"), 0)).unwrap().tensors[0].nbytes, 0);
    // test_deserialization_metadata
    let header = read(&file(r#"{"__metadata__":{"framework":"pt"}}"#, 0)).unwrap();
    assert_eq!(header.metadata["framework"], "pt");
    // Padding to a page, and a header whose length is no multiple of eight.
    assert!(read(&file(&format!("{{}}{}", " ".repeat(4086)), 0)).is_ok());
}

fn stock_dtypes() -> impl Strategy<Value = StockDtype> {
    use StockDtype::*;
    proptest::sample::select(vec![
        BOOL,
        F4,
        F6_E2M3,
        F6_E3M2,
        U8,
        I8,
        F8_E5M2,
        F8_E4M3,
        F8_E8M0,
        F8_E4M3FNUZ,
        F8_E5M2FNUZ,
        I16,
        U16,
        F16,
        BF16,
        I32,
        U32,
        F32,
        C64,
        F64,
        I64,
        U64,
    ])
}

proptest! {
    #[test]
    fn what_the_stock_writer_writes_is_read(
        tensors in proptest::collection::btree_map(
            "[^\u{0}]{0,6}",
            (stock_dtypes(), proptest::collection::vec(0usize..4, 0..4)),
            0..8,
        ),
        // Not empty: with that, and without tensors, the stock writer writes what it cannot read itself.
        metadata in proptest::option::of(proptest::collection::hash_map("[^\u{0}]{0,4}", "[^\u{0}]{0,4}", 1..3)),
    ) {
        let data = vec![7; 4096];
        let views: Vec<(String, TensorView<'_>)> = tensors
            .iter()
            .map(|(name, (dtype, shape))| {
                // Whole bytes for every type.
                let shape: Vec<usize> = shape.iter().copied().chain([4]).collect();
                let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                (name.clone(), TensorView::new(*dtype, shape, &data[..bytes]).unwrap())
            })
            .collect();
        let expected: BTreeMap<_, _> = views
            .iter()
            .map(|(name, view)| (name.clone(), (view.dtype().to_string(), view.shape().to_vec(), view.data().len())))
            .collect();
        let bytes = serialize(views, metadata.clone()).unwrap();
        let header = read(&bytes).unwrap();
        let got: BTreeMap<_, _> = header
            .tensors
            .iter()
            .map(|tensor| {
                let shape = tensor.shape.iter().map(|size| *size as usize).collect();
                (tensor.name.clone(), (tensor.dtype.as_str().to_owned(), shape, tensor.nbytes as usize))
            })
            .collect();
        prop_assert_eq!(got, expected);
        prop_assert_eq!(header.metadata, metadata.unwrap_or_default().into_iter().collect());
    }

    /// What is accepted here, the stock reader accepts, with the same places.
    #[test]
    fn nothing_is_accepted_that_the_stock_reader_refuses(
        json in r#"\{("a":\{"dtype":"(U8|F16|F4)","shape":\[[0-4](,[0-4])?\],"data_offsets":\[0,[0-8]\]\})?\}"#,
        data_bytes in 0usize..9,
    ) {
        let bytes = file(&json, data_bytes);
        if let Ok(header) = read(&bytes) {
            let stock = ::safetensors::SafeTensors::deserialize(&bytes);
            prop_assert!(stock.is_ok(), "{json}");
            let stock = stock.unwrap();
            for tensor in &header.tensors {
                let view = stock.tensor(&tensor.name).unwrap();
                let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
                prop_assert_eq!((start as u64, view.data().len() as u64), (tensor.offset, tensor.nbytes));
            }
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = parse(&bytes, bytes.len() as u64 + 8, 10);
    }
}
