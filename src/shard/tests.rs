//! The shard loop over a simulated reader that misbehaves by seed, and over the real ones.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use tokio::sync::mpsc;

use super::reader::Reader;
use super::*;
use crate::catalog::select::{Pick, Runs};
use crate::catalog::{Dtype, Tensor};
use crate::checksum::{self, CHUNK_BYTES};
use crate::plan;
use crate::sys::mem::Memory;
use crate::sys::pages::PageKind;
use crate::sys::uring::{Done, Read};

const PART: u64 = 2 << 20;

/// Small, fast, seeded (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// What the simulated drive does wrong. Rates are per 1000 reads.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    short: u64,
    again: u64,
    error: u64,
    invalid: u64,
}

/// Files in memory behind a [`Reader`] that answers late, in any order, short and with errors.
struct Simulated {
    content: Arc<Vec<u8>>,
    random: Random,
    faults: Faults,
    queue: Vec<Read>,
    depth: usize,
}

impl Simulated {
    fn attempt(&mut self, read: &mut Read) -> io::Result<u32> {
        let dice = self.random.below(1000);
        let Faults { short, again, error, invalid } = self.faults;
        if dice < again || read.cached_only && dice < 500 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if dice < again + error {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if dice < again + error + invalid {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let offset = (read.offset + u64::from(read.arrived)) as usize;
        let offset = offset.min(self.content.len());
        let there = self.content.len() - offset;
        let mut bytes = there.min((read.bytes - read.arrived) as usize);
        if dice >= 1000 - short && bytes > 4096 {
            bytes = 4096 * (1 + self.random.below(bytes as u64 / 4096) as usize);
            bytes = bytes.min(there);
        }
        let start = read.arrived as usize;
        read.span.as_mut_slice()[start..start + bytes].copy_from_slice(&self.content[offset..offset + bytes]);
        Ok(bytes as u32)
    }
}

impl Reader for Simulated {
    fn room(&self) -> usize {
        self.depth - self.queue.len()
    }
    fn in_flight(&self) -> usize {
        self.queue.len()
    }
    fn start(&mut self, read: Read) -> Result<(), Read> {
        if self.room() == 0 {
            return Err(read);
        }
        self.queue.push(read);
        Ok(())
    }
    fn submit(&mut self) -> io::Result<bool> {
        Ok(false)
    }
    fn wait(&mut self, _timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<()> {
        if !self.queue.is_empty() {
            let chosen = self.random.below(self.queue.len() as u64) as usize;
            let mut read = self.queue.swap_remove(chosen);
            let result = self.attempt(&mut read);
            done.push(Done { read, result });
        }
        Ok(())
    }
    fn drain(&mut self, _timeout: Duration) -> u64 {
        self.queue.clear();
        0
    }
}

fn content(bytes: usize, seed: u64) -> Arc<Vec<u8>> {
    let mut random = Random(seed);
    Arc::new((0..bytes).map(|_| random.next() as u8).collect())
}

fn any_file() -> Arc<OwnedFd> {
    Arc::new(std::fs::File::open("/proc/self/exe").unwrap().into())
}

/// A file of which the simulated drive knows the bytes.
fn file_of(bytes: u64, landing: Landing) -> (BatchFile, Handles) {
    let file = BatchFile { name: "model".into(), bytes, expected: None };
    (file, Handles { file: any_file(), direct: Some(any_file()), landing })
}

fn batch_of(
    bytes: u64,
    picks: Option<(&[Tensor], &[Pick])>,
    (file, handles): (BatchFile, Handles),
) -> (Arc<Batch>, plan::Layout) {
    let (tensors, picks) = picks.map_or((&[][..], None), |(tensors, picks)| (tensors, Some(picks)));
    let layout = plan::layout(&[bytes], tensors, picks).unwrap();
    let count = layout.bytes.div_ceil(PART).max(1) as usize;
    let plan = plan::moves(&layout, &[bytes], &vec![PART; count], 1 << 20).unwrap();
    let parts = (0..count)
        .map(|_| Part { memory: Arc::new(Memory::new(PART, PageKind::Small).unwrap()), populated: false })
        .collect();
    (Arc::new(Batch::new(plan, (vec![file], vec![handles]), Regions::Host(parts), Arc::default())), layout)
}

fn options(reader: ReaderKind) -> Options {
    Options {
        index: 0,
        reader,
        block_bytes: 1 << 20,
        depth: 4,
        slots: 2,
        cpus: Vec::new(),
        numa_node: None,
        page_cache: true,
        devices: Vec::new(),
    }
}

/// Runs a batch to its end on a shard loop over `reader`.
fn run_on(reader: impl Reader, batch: Arc<Batch>) -> Arc<Batch> {
    let options = options(ReaderKind::IoUring);
    let (letters, mailbox) = crossbeam_channel::bounded(4);
    let (home, mut back) = mpsc::channel(1);
    let moves = std::iter::once(0..batch.plan.moves.len() as u32).collect();
    letters.send(Assignment { batch, moves, priority: 0, home }).unwrap();
    drop(letters);
    let slots = staging::Pool::new(options.slots, options.block_bytes, options.numa_node).unwrap();
    run::Runner::new(reader, slots, None, &options, Arc::default()).run(&mailbox);
    back.try_recv().unwrap()
}

/// Gives the region back as bytes. No span may be left, whatever happened before (invariant 2).
fn region(batch: Arc<Batch>) -> Vec<u8> {
    let batch = Arc::into_inner(batch).expect("the shard has let go of the batch");
    let mut bytes = Vec::new();
    let Regions::Host(parts) = batch.regions else { panic!("a batch for the host tier") };
    for part in parts {
        let memory = Arc::new(Arc::into_inner(part.memory).expect("no read owns the memory any more"));
        bytes.extend_from_slice(memory.claim(0, PART).unwrap().as_slice());
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_the_drive_does_no_wrong_byte_is_called_right_invariants_2_5_6(
        seed in any::<u64>(), bytes in 1usize..5_000_000,
        short in 0u64..400, again in 0u64..200, error in 0u64..6, invalid in 0u64..50, truncated in 0u64..4
    ) {
        let full = content(bytes, seed);
        let on_drive = match truncated {
            0 => Arc::new(full[..bytes / 2].to_vec()),
            _ => Arc::clone(&full),
        };
        let faults = Faults { short, again, error, invalid };
        let reader =
            Simulated { content: on_drive, random: Random(seed), faults, queue: Vec::new(), depth: 4 };
        let file = file_of(bytes as u64, if seed % 2 == 0 { Landing::InPlace } else { Landing::Slot });
        let (batch, layout) = batch_of(bytes as u64, None, file);
        let batch = run_on(reader, batch);
        let failure = batch.progress.failure().map(|error| error.code);
        if truncated == 0 {
            prop_assert!(matches!(failure, Some(Code::SourceFileShortRead | Code::SourceFileIo)));
        } else if error == 0 && again < 100 {
            prop_assert_eq!(failure, None);
        }
        let sums: Vec<u64> = batch.checks.iter().map(|sum| sum.load(Ordering::Acquire)).collect();
        let progress = Arc::clone(&batch.progress);
        let region = region(batch);
        if failure.is_none() {
            let place = layout.files[0].unwrap() as usize;
            prop_assert!(region[place..place + bytes] == full[..]);
            let expected: Vec<u64> = full.chunks(CHUNK_BYTES as usize).map(checksum::chunk).collect();
            prop_assert_eq!(sums, expected);
            prop_assert_eq!(progress.bytes_total(), bytes as u64);
        }
    }

    #[test]
    fn rows_of_a_slice_arrive_by_way_of_slots_invariant_5(
        seed in any::<u64>(), row in 1u64..9000, gap in 0u64..30_000, count in 2u64..200, head in 0u64..5000, short in 0u64..400
    ) {
        let stride = row + gap;
        let bytes = head + stride * count;
        let full = content(bytes as usize, seed);
        let faults = Faults { short, again: 50, ..Faults::default() };
        let reader =
            Simulated { content: Arc::clone(&full), random: Random(seed), faults, queue: Vec::new(), depth: 4 };
        let tensor = Tensor {
            name: "t".into(), dtype: Dtype::parse("U8").unwrap(), element_align: 1, shape: vec![count, stride], file: 0, offset: head, nbytes: stride * count,
        };
        let pick = Pick {
            tensor: 0, shape: vec![count, row], runs: Runs { offset: head, bytes: row, stride, count },
        };
        let file = file_of(bytes, Landing::InPlace);
        let (batch, layout) = batch_of(bytes, Some((&[tensor], &[pick])), file);
        let batch = run_on(reader, batch);
        prop_assert!(batch.progress.failure().is_none());
        let region = region(batch);
        for number in 0..count {
            let here = (layout.tensors[0].offset + number * row) as usize;
            let there = (head + number * stride) as usize;
            prop_assert!(region[here..here + row as usize] == full[there..there + row as usize]);
        }
    }
}

/// Both real readers give the same bytes as `std::fs::read`, and say by which path they came (invariant 10).
#[test]
fn real_readers_read_real_files() {
    use std::os::unix::fs::OpenOptionsExt;
    // A file system of a drive: the one for temporary files may have no O_DIRECT.
    let base = env!("CARGO_MANIFEST_DIR").to_owned() + "/target";
    std::fs::create_dir_all(&base).unwrap();
    let folder = tempfile::tempdir_in(base).unwrap();
    let path = folder.path().join("model");
    let full = content(3_333_333, 7);
    std::fs::write(&path, full.as_slice()).unwrap();
    let in_place =
        [ReaderKind::IoUring, ReaderKind::Preadv2].map(|reader| (reader, Landing::InPlace, Path::Direct));
    let in_slots = (ReaderKind::IoUring, Landing::Slot, Path::Staged);
    for (reader, landing, path_expected) in in_place.into_iter().chain([in_slots]) {
        let direct = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
        let handles = Handles {
            file: Arc::new(std::fs::File::open(&path).unwrap().into()),
            direct: Some(Arc::new(direct.into())),
            landing,
        };
        let file = BatchFile { name: "model".into(), bytes: full.len() as u64, expected: None };
        let mut options = options(reader);
        options.page_cache = false;
        let shard = Shard::start(options).unwrap();
        let (batch, _) = batch_of(full.len() as u64, None, (file, handles));
        let (home, mut back) = mpsc::channel(1);
        let moves = std::iter::once(0..batch.plan.moves.len() as u32).collect();
        assert!(shard.send(Assignment { batch, moves, priority: 0, home }).is_ok());
        let batch = back.blocking_recv().unwrap();
        assert_eq!(batch.progress.failure().map(|error| error.message.clone()), None);
        assert_eq!(batch.progress.bytes(path_expected), full.len() as u64, "{reader:?} {landing:?}");
        assert!(region(batch)[..full.len()] == full[..]);
    }
}

#[test]
fn a_changed_chunk_of_an_unchanged_file_is_refused_invariant_6() {
    let full = content(3 << 20, 3);
    let mut sums: Vec<u64> = full.chunks(CHUNK_BYTES as usize).map(checksum::chunk).collect();
    sums[1] ^= 1;
    let (file, handles) = file_of(full.len() as u64, Landing::Slot);
    let file = BatchFile { expected: Some(sums.into()), ..file };
    let reader = Simulated {
        content: full,
        random: Random(1),
        faults: Faults::default(),
        queue: Vec::new(),
        depth: 4,
    };
    let (batch, _) = batch_of(3 << 20, None, (file, handles));
    let batch = run_on(reader, batch);
    assert_eq!(batch.progress.failure().map(|error| error.code), Some(Code::CatalogChecksumMismatch));
}

/// A reader whose ring is broken.
struct Broken;

impl Reader for Broken {
    fn room(&self) -> usize {
        4
    }
    fn in_flight(&self) -> usize {
        0
    }
    fn start(&mut self, _read: Read) -> Result<(), Read> {
        Ok(())
    }
    fn submit(&mut self) -> io::Result<bool> {
        Err(io::Error::from_raw_os_error(libc::ENXIO))
    }
    fn wait(&mut self, _timeout: Option<Duration>, _done: &mut Vec<Done>) -> io::Result<()> {
        Ok(())
    }
    fn drain(&mut self, _timeout: Duration) -> u64 {
        0
    }
}

#[test]
fn a_broken_shard_fails_what_it_works_on_and_what_waits_invariant_6() {
    let options = options(ReaderKind::IoUring);
    let (letters, mailbox) = crossbeam_channel::bounded(200);
    let (home, mut back) = mpsc::channel(100);
    // More than a shard thread works on at a time: the rest waits in its mailbox.
    for _ in 0..100 {
        let (batch, _) = batch_of(1 << 20, None, file_of(1 << 20, Landing::InPlace));
        let moves = std::iter::once(0..batch.plan.moves.len() as u32).collect();
        letters.send(Assignment { batch, moves, priority: 0, home: home.clone() }).unwrap();
    }
    let slots = staging::Pool::new(options.slots, options.block_bytes, options.numa_node).unwrap();
    run::Runner::new(Broken, slots, None, &options, Arc::default()).run(&mailbox);
    for _ in 0..100 {
        let batch = back.try_recv().expect("every batch comes home");
        assert_eq!(batch.progress.failure().map(|error| error.code), Some(Code::SourceFileIo));
    }
}

#[test]
fn slots_lie_on_the_node_that_is_asked_for() {
    let shard = Shard::start(Options { numa_node: Some(0), ..options(ReaderKind::Preadv2) }).unwrap();
    if shard.slot_nodes().is_empty() {
        eprintln!("skipped: the kernel does not say where memory is");
        return;
    }
    let Options { slots, block_bytes, .. } = shard.options();
    assert_eq!(shard.slot_nodes(), &BTreeMap::from([(0, u64::from(*slots) * block_bytes)]));
}
