//! The GPU's checksum kernel (`src/sys/cuda/crc64.cu`), run on the CPU: its source is compiled as C++ against a simulated
//! GPU (`tests/kernel/emulate.cpp`) and compared with the checksum that the rest of Lodestream uses. No GPU takes part, so
//! nothing here says how fast it is, or that a driver takes the PTX.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot run has failed")]

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lodestream::checksum;
use proptest::prelude::{Strategy, prop};
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use sha2::{Digest, Sha256};

/// `ROWS * COLUMNS` words: what the kernel divides at a time.
const ROUND_BYTES: usize = 64 * 128 * 4;
/// The place that ends the data where a page begins that cannot be touched.
const PLACE_AT_END: u64 = 4096;
/// What emulate.cpp leaves where the kernel wrote nothing.
const FILLER: u64 = 0x5555_5555_5555_5555;
/// Random cases of one run of the test.
const CASES: u32 = 200;

/// One launch: the data, where it lies, and how it is cut.
#[derive(Clone, Debug)]
struct Case {
    place: u64,
    chunk_bytes: usize,
    blocks_too_many: usize,
    data: Vec<u8>,
}

impl Case {
    fn expected(&self) -> Vec<u64> {
        let mut sums: Vec<u64> = self.data.chunks(self.chunk_bytes).map(checksum::chunk).collect();
        sums.resize(sums.len() + self.blocks_too_many, FILLER);
        sums
    }

    fn write(&self, input: &mut Vec<u8>) {
        for number in
            [self.place, self.data.len() as u64, self.chunk_bytes as u64, self.expected().len() as u64]
        {
            input.extend(number.to_le_bytes());
        }
        input.extend(&self.data);
    }
}

/// Lengths around those where the kernel takes another way, and any others.
fn lengths() -> impl Strategy<Value = usize> {
    let near = |middle: usize| (middle.saturating_sub(9)..middle + 10).prop_map(|bytes| bytes.max(1));
    proptest::prop_oneof![
        1..40_usize,
        near(512),
        (1..5_usize).prop_flat_map(move |rounds| near(rounds * ROUND_BYTES)),
        1..6 * ROUND_BYTES,
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    let place = proptest::prop_oneof![0..20_u64, proptest::prelude::Just(PLACE_AT_END)];
    // A last chunk that is shorter, whole, or all there is; short chunks only in short data, for the sake of time.
    let cut = (lengths(), 0..5_usize, lengths())
        .prop_map(|(chunk, whole, last)| (chunk, whole * chunk + last % chunk.max(1)));
    (place, cut, 0..2_usize, prop::num::u64::ANY).prop_map(
        |(place, (chunk_bytes, bytes), blocks_too_many, seed)| Case {
            place,
            chunk_bytes,
            blocks_too_many,
            data: noise(seed, bytes.max(1)),
        },
    )
}

/// Bytes of no pattern (splitmix64).
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        data.extend((mixed ^ (mixed >> 31)).to_le_bytes());
    }
    data.truncate(bytes);
    data
}

/// The simulated GPU with the kernel in it; nothing where there is no C++ compiler.
fn emulator() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // One a process: two tests of this file may run at the same time.
    let binary =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernel-emulate-{}", std::process::id()));
    let compiled = Command::new("c++")
        .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-I"])
        .arg(root.join("src/sys/cuda"))
        .arg("-o")
        .arg(&binary)
        .arg(root.join("tests/kernel/emulate.cpp"))
        .status();
    match compiled {
        Ok(status) => {
            assert!(status.success(), "the kernel does not compile as C++");
            Some(binary)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => panic!("c++: {error}"),
    }
}

/// The checksums that the kernel writes for each case; `seed` gives the order in which its threads run.
fn launch(emulator: &Path, seed: u64, cases: &[Case]) -> Vec<Vec<u64>> {
    let mut input = Vec::new();
    cases.iter().for_each(|case| case.write(&mut input));
    let mut child = Command::new(emulator)
        .arg(seed.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut stdin = child.stdin.take().expect("is piped");
    let output = std::thread::scope(|scope| {
        // A child that died closes the pipe; its status says more.
        scope.spawn(move || stdin.write_all(&input).ok());
        child.wait_with_output().expect("ends")
    });
    assert!(
        output.status.success(),
        "the simulated GPU ended with {} (a signal: memory that is not the data's)",
        output.status
    );
    let mut sums = output.stdout.chunks_exact(8).map(|sum| u64::from_le_bytes(sum.try_into().unwrap()));
    let all = cases.iter().map(|case| sums.by_ref().take(case.expected().len()).collect()).collect();
    assert_eq!(sums.next(), None, "more sums than blocks");
    all
}

#[track_caller]
fn assert_right(case: &Case, sums: &[u64], seed: u64) {
    let (place, chunk, bytes) = (case.place, case.chunk_bytes, case.data.len());
    assert_eq!(sums, case.expected(), "seed {seed}: {bytes} bytes at place {place} in chunks of {chunk}");
}

#[test]
fn the_kernel_gives_the_checksum_of_every_chunk() {
    let Some(emulator) = emulator() else {
        eprintln!(
            "SKIPPED: no C++ compiler (c++): the checksum kernel was not compared with the CPU's checksum"
        );
        return;
    };
    // What a load does: whole chunks of CHUNK_BYTES and a shorter one. And the check value of the specification.
    let chunk_bytes = usize::try_from(checksum::CHUNK_BYTES).unwrap();
    let mut all = vec![
        Case { place: 0, chunk_bytes, blocks_too_many: 0, data: noise(1, 2 * chunk_bytes + 12_345) },
        Case { place: 0, chunk_bytes, blocks_too_many: 0, data: vec![0; chunk_bytes] },
        Case { place: 0, chunk_bytes: 9, blocks_too_many: 0, data: b"123456789".to_vec() },
    ];
    // Every length around whole rounds: a word or less in the first round is what is easily got wrong.
    for bytes in (1..3).flat_map(|rounds| (0..13).map(move |more| rounds * ROUND_BYTES + more)) {
        all.push(Case { place: 0, chunk_bytes, blocks_too_many: 0, data: noise(2, bytes) });
    }
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
    let mut runner =
        TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    all.extend((0..CASES).map(|_| cases().new_tree(&mut runner).unwrap().current()));

    let seed = u64::from(std::process::id());
    for (case, sums) in all.iter().zip(launch(&emulator, seed, &all)) {
        assert_right(case, &sums, seed);
    }
    std::fs::remove_file(emulator).unwrap();
}

#[test]
fn the_ptx_was_made_from_the_source_that_lies_beside_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sys/cuda");
    let source = std::fs::read(folder.join("crc64.cu")).unwrap();
    let ptx = std::fs::read_to_string(folder.join("crc64.ptx")).unwrap();
    let noted =
        ptx.lines().find_map(|line| line.strip_prefix("// source-sha256: ")).expect("crc64.ptx has no hash");
    let mut hash = String::new();
    Sha256::digest(source).iter().for_each(|byte| write!(hash, "{byte:02x}").unwrap());
    assert_eq!(noted, hash, "crc64.cu has changed: run scripts/kernels and commit crc64.ptx with it");
    assert!(
        ptx.contains(".visible .entry lodestream_crc64_chunks("),
        "crc64.ptx has no entry lodestream_crc64_chunks"
    );
}
