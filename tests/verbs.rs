//! liblodestream_verbs.so as it is built: found, loaded, and what is said where it or libibverbs is not there.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lodestream::sys::verbs::{Absent, Library};

/// Built as a dependency of the tests, beside them.
fn built() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("liblodestream_verbs.so")
}

#[test]
fn the_library_is_found_beside_the_program_and_lists_devices() {
    let library = Library::open(None).unwrap();
    match library.devices() {
        // Without the kernel's part there are none.
        Ok(_) => {}
        Err(error) => assert!(error.is_unsupported(), "{error}"),
    }
    assert_eq!(library.leaked_bytes(), 0);
}

/// The daemon must start on a node without libibverbs.
#[test]
fn the_daemon_does_not_need_libibverbs() {
    let needs = |path: &Path| {
        let output = Command::new("ldd").arg(path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().contains("libibverbs")
    };
    assert!(needs(&built()), "the library does");
    assert!(!needs(Path::new(env!("CARGO_BIN_EXE_lodestream"))));
}

#[test]
fn a_node_without_libibverbs_is_told_so() {
    let (name, other) = (b"libibverbs.so.1\0", b"libibverbs.so.0\0");
    let mut bytes = fs::read(built()).unwrap();
    let places: Vec<usize> =
        (0..bytes.len() - name.len()).filter(|at| bytes[*at..].starts_with(name)).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at..at + name.len()].copy_from_slice(other);
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("liblodestream_verbs.so");
    fs::write(&path, bytes).unwrap();
    let error = Library::open(Some(&path)).unwrap_err();
    assert!(
        matches!(&error, Absent::Unloadable { reason, .. } if reason.contains("libibverbs.so.0")),
        "{error}"
    );
}

#[test]
fn a_library_of_another_version_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (source, path) = (directory.path().join("other.c"), directory.path().join("other.so"));
    fs::write(&source, "const void *lodestream_verbs_table(unsigned version) { (void)version; return 0; }\n")
        .unwrap();
    let status = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&path, &source]).status().unwrap();
    assert!(status.success());
    assert_eq!(Library::open(Some(&path)).unwrap_err(), Absent::Version(path));
}
