//! The checked-in header is the one that the source gives.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

const HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include/lodestream.h");

#[test]
#[allow(clippy::disallowed_methods, reason = "a switch of this test, not of the library")]
fn the_checked_in_header_is_the_generated_one() {
    let here = env!("CARGO_MANIFEST_DIR");
    let config = cbindgen::Config::from_file(format!("{here}/cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_config(config).with_src(format!("{here}/src/lib.rs"));
    let mut generated = Vec::new();
    builder.generate().unwrap().write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();
    if std::env::var("LODESTREAM_BLESS").as_deref() == Ok("1") {
        std::fs::write(HEADER, &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(HEADER).unwrap_or_default();
    assert!(
        checked_in == generated,
        "ffi/c/include/lodestream.h is not what ffi/c/src gives; if the change is meant, run LODESTREAM_BLESS=1 cargo \
         nextest run -p lodestream-c, and see whether the ABI still holds (ffi/c/README.md)"
    );
}
