//! What the simulated cuFile does beyond what the conformance suite asks of any: the ways that a node is able to, silent
//! fallbacks, faults.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]
#![allow(clippy::print_stdout, reason = "a test that cannot be done here says so")]

#[path = "../../conformance/src/check.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the conformance suite")]
mod check;
#[path = "../../conformance/src/cufile.rs"]
#[allow(dead_code, reason = "shared with the conformance suite")]
mod cufile;
#[path = "../src/abi.rs"]
#[allow(dead_code, reason = "shared with the library")]
mod cufile_abi;
#[path = "../../conformance/src/driver.rs"]
#[allow(dead_code, reason = "shared with the conformance suite")]
mod driver;
#[path = "../../tests/common/library.rs"]
mod library;
#[path = "../../tests/common/process.rs"]
#[allow(dead_code, unused_imports, unused_macros, reason = "shared with the tests of the driver")]
mod process;

use std::fs::File;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use check::{Gpu, pattern};
use cufile::{Answer, CuFile, Failure};
use cufile_abi::{
    BATCH_MODE, Basic, BatchEntry, BatchEvent, Code, Descriptor, Detailed, PerGpu, Properties, READ,
    Statistics, Status, batch_status, boolean,
};
use driver::READ_WRITE;
use process::{Machine, alone};
use rustix::fs::{OFlags, fstatfs};

const ONE: &str = r#"[{"memory_bytes": 67108864, "attributes": {"110": 1}}]"#;
const PAGE: u64 = 4096;
/// More than goes through at a time, and not a whole number of pages.
const FILE_BYTES: u64 = (5 << 20) + 1234;
const DEVICE_BYTES: u64 = 8 << 20;
/// Compatibility mode counts each MiB of a read.
const PIECES: u64 = 8;

fn node(mode: &str) -> Machine {
    Machine::new(ONE).with("CUFILE_SIM_MODE", mode)
}

#[track_caller]
fn fails<T: std::fmt::Debug>(answer: Answer<T>, code: Code) {
    match answer {
        Err(Failure::Code { code: found, .. }) => assert_eq!(found, code),
        other => panic!("{other:?}, and not {code:?}"),
    }
}

/// A file with a pattern, past the page cache.
fn file_in(folder: &Path, flags: OFlags) -> (tempfile::TempPath, File) {
    let path = tempfile::NamedTempFile::new_in(folder).unwrap().into_temp_path();
    std::fs::write(&path, pattern(1, FILE_BYTES)).unwrap();
    let file = File::options().read(true).write(true).custom_flags(flags.bits() as i32).open(&path).unwrap();
    (path, file)
}

/// One on the drive that the build is on. None: it is of a file system that cuFile does not do directly, and the test
/// cannot be done here.
fn file_on_drive(flags: OFlags) -> Option<(tempfile::TempPath, File)> {
    let (path, file) = file_in(Path::new(env!("CARGO_TARGET_TMPDIR")), flags);
    let magic = fstatfs(&file).unwrap().f_type as u64;
    if [0xef53, 0x5846_5342].contains(&magic) {
        return Some((path, file));
    }
    println!("skipped: {} is neither on ext4 nor on XFS", path.display());
    None
}

/// The library with an open driver, and device memory.
struct Open {
    cufile: CuFile,
    memory: u64,
    _gpu: Gpu,
}

impl Open {
    fn with(booleans: &[(usize, bool)]) -> Open {
        let gpu = Gpu::open().unwrap();
        let cufile = CuFile::load().unwrap();
        for (which, value) in booleans {
            cufile.set_boolean(*which, *value).unwrap();
        }
        cufile.driver_open().unwrap();
        cufile.set_level(3).unwrap();
        cufile.statistics_start().unwrap();
        let memory = driver::allocate(DEVICE_BYTES).unwrap();
        cufile.buffer_register(memory, DEVICE_BYTES).unwrap();
        Open { cufile, memory, _gpu: gpu }
    }

    fn gpu(&self) -> PerGpu {
        self.cufile.statistics().unwrap()[0]
    }

    /// Reads the whole file by one call, and compares what is on the device then.
    fn read(&self, handle: usize, at: u64) {
        let expected = &pattern(1, FILE_BYTES)[at as usize..];
        assert_eq!(self.cufile.read(handle, self.memory, DEVICE_BYTES, at as i64, 0), Ok(FILE_BYTES - at));
        assert!(driver::read(self.memory, FILE_BYTES - at).unwrap() == expected, "from {at} on");
    }
}

/// Reads by nvidia-fs, by P2PDMA, through the host; all of these that were of no whole pages.
fn ways(gpu: &PerGpu) -> [u64; 4] {
    [gpu.nvfs_reads, gpu.p2p_reads, gpu.posix_reads, gpu.unaligned_reads]
}

/// Sizes and places as a C compiler has them for NVIDIA's header of version 1.20.
#[test]
fn structures_lie_as_in_the_c_api() {
    assert_eq!(size_of::<Status>(), 8);
    assert_eq!((size_of::<Descriptor>(), offset_of!(Descriptor, operations)), (24, 16));
    assert_eq!((size_of::<Properties>(), offset_of!(Properties, feature_flags)), (56, 32));
    assert_eq!((size_of::<BatchEntry>(), offset_of!(BatchEntry, handle)), (64, 40));
    assert_eq!((size_of::<BatchEvent>(), offset_of!(BatchEvent, result)), (24, 16));
    assert_eq!((size_of::<Basic>(), size_of::<Detailed>()), (624, 1136));
    assert_eq!((size_of::<PerGpu>(), size_of::<Statistics>()), (248, 5112));
    let basic = [
        offset_of!(Basic, read_bytes),
        offset_of!(Basic, read_latency_sum_us),
        offset_of!(Basic, batch_submits),
        offset_of!(Basic, batch_queues),
        offset_of!(Basic, batch_read_bytes),
        offset_of!(Basic, vector_reads),
    ];
    assert_eq!(basic, [96, 160, 176, 256, 416, 512]);
    let gpu =
        [offset_of!(PerGpu, posix_reads), offset_of!(PerGpu, write_bytes), offset_of!(PerGpu, registers)];
    assert_eq!(gpu, [72, 120, 208]);
    assert_eq!((offset_of!(Statistics, gpu_count), offset_of!(Statistics, gpus)), (1136, 1144));
}

#[test]
fn it_says_that_it_is_simulated() {
    alone(
        || node("nvfs"),
        || {
            let open = Open::with(&[]);
            assert!(open.cufile.is_simulated());
            assert_eq!(open.cufile.version(), Ok(1200));
            let properties = open.cufile.properties().unwrap();
            assert_eq!(
                (properties.nvfs_major, properties.status_flags, properties.batch_max),
                (2, 1 << 4, 128)
            );
        },
    );
}

#[test]
fn nvidia_fs_is_direct_where_pages_are_whole_and_bounces_where_not() {
    alone(
        || node("nvfs"),
        || {
            let Some((_path, file)) = file_on_drive(OFlags::DIRECT) else { return };
            let open = Open::with(&[]);
            let handle = open.cufile.handle_register(file.as_fd()).unwrap();
            open.read(handle, 0);
            assert_eq!(ways(&open.gpu()), [1, 0, 0, 0]);
            open.read(handle, 1);
            assert_eq!(ways(&open.gpu()), [2, 0, 0, 1]);
            let gpu = open.gpu();
            assert_eq!((gpu.reads, gpu.read_bytes, gpu.reads_failed), (2, 2 * DEVICE_BYTES, 0));
            assert_eq!((gpu.registers_ok, gpu.registered_bytes), (1, DEVICE_BYTES));
            assert_eq!(gpu.uuid.map(|byte| byte as i8), driver::device_uuid(0).unwrap());
        },
    );
}

#[test]
fn p2pdma_is_used_when_it_is_asked_for() {
    for (asked, expected) in [(true, [0, 1, 0, 0]), (false, [0, 0, PIECES, 0])] {
        if process::part().is_none_or(|part| part == asked.to_string()) {
            let body = || {
                let Some((_path, file)) = file_on_drive(OFlags::DIRECT) else { return };
                let open = Open::with(&[(boolean::USE_PCIP2PDMA, asked)]);
                let handle = open.cufile.handle_register(file.as_fd()).unwrap();
                open.read(handle, 0);
                assert_eq!(ways(&open.gpu()), expected);
            };
            match process::part() {
                Some(_) => body(),
                None => node("p2pdma").run("p2pdma_is_used_when_it_is_asked_for", &asked.to_string()),
            }
        }
    }
}

/// Reads a file on a node that could do it directly: all of it comes by way of host memory.
fn falls_back(file: &File) {
    let open = Open::with(&[]);
    let handle = open.cufile.handle_register(file.as_fd()).unwrap();
    open.read(handle, 0);
    assert_eq!(ways(&open.gpu()), [0, 0, PIECES, 0]);
}

#[test]
fn a_file_system_that_cannot_do_it_falls_back_without_a_word() {
    alone(|| node("nvfs"), || falls_back(&file_in(Path::new("/dev/shm"), OFlags::DIRECT).1));
}

#[test]
fn a_file_that_is_not_opened_for_it_falls_back_without_a_word() {
    alone(
        || node("nvfs"),
        || {
            let Some((_path, file)) = file_on_drive(OFlags::empty()) else { return };
            falls_back(&file);
        },
    );
}

#[test]
fn without_compatibility_what_cannot_be_direct_is_refused() {
    alone(
        || node("nvfs"),
        || {
            let (_path, in_memory) = file_in(Path::new("/dev/shm"), OFlags::DIRECT);
            let open = Open::with(&[(boolean::ALLOW_COMPAT_MODE, false)]);
            fails(open.cufile.handle_register(in_memory.as_fd()), Code::IO_NOT_SUPPORTED);
            let Some((_path, cached)) = file_on_drive(OFlags::empty()) else { return };
            fails(open.cufile.handle_register(cached.as_fd()), Code::INVALID_FILE_OPEN_FLAG);
            let Some((_path, direct)) = file_on_drive(OFlags::DIRECT) else { return };
            let handle = open.cufile.handle_register(direct.as_fd()).unwrap();
            open.read(handle, 0);
            assert_eq!(ways(&open.gpu()), [1, 0, 0, 0]);
        },
    );
}

#[test]
fn compatibility_can_be_forced() {
    alone(
        || node("nvfs"),
        || {
            let Some((_path, file)) = file_on_drive(OFlags::DIRECT) else { return };
            let open = Open::with(&[(boolean::FORCE_COMPAT_MODE, true)]);
            let handle = open.cufile.handle_register(file.as_fd()).unwrap();
            open.read(handle, 7);
            assert_eq!(ways(&open.gpu())[..3], [0, 0, PIECES]);
            assert_eq!(open.cufile.properties().unwrap().nvfs_major, 0);
        },
    );
}

#[test]
fn a_node_that_is_able_to_nothing_opens_for_compatibility_only() {
    alone(
        || Machine::new(ONE),
        || {
            let cufile = CuFile::load().unwrap();
            cufile.set_boolean(boolean::ALLOW_COMPAT_MODE, false).unwrap();
            fails(cufile.driver_open(), Code::DRIVER_NOT_INITIALIZED);
            assert_eq!(cufile.use_count(), Ok(0));
            cufile.set_boolean(boolean::ALLOW_COMPAT_MODE, true).unwrap();
            cufile.driver_open().unwrap();
            assert_eq!(cufile.use_count(), Ok(1));
        },
    );
}

#[test]
fn memory_that_drives_cannot_reach_is_not_pinned_for_them() {
    let body = |direct: bool| {
        let open = Open::with(&[]);
        // Made without `gpuDirectRDMACapable`.
        let mapped = open._gpu.memory(2, READ_WRITE).unwrap();
        let registered = open.cufile.buffer_register(mapped.address, mapped.bytes);
        if direct {
            fails(registered, Code::GPU_MEMORY_PINNING_FAILED);
        } else {
            registered.unwrap();
        }
        // Host memory, and what is behind the end of device memory.
        fails(open.cufile.buffer_register(0x1000, PAGE), Code::CUDA_MEMORY_TYPE_INVALID);
        let beyond = driver::allocate(2 << 20).unwrap();
        fails(open.cufile.buffer_register(beyond, 64 << 20), Code::CUDA_POINTER_RANGE_ERROR);
    };
    match process::part().as_deref() {
        Some(mode) => body(mode == "nvfs"),
        None => {
            for mode in ["nvfs", "compat"] {
                node(mode).run("memory_that_drives_cannot_reach_is_not_pinned_for_them", mode);
            }
        }
    }
}

#[test]
fn the_direct_way_does_not_use_the_link_from_the_host() {
    let body = |direct: bool| {
        let Some((_path, file)) = file_on_drive(OFlags::DIRECT) else { return };
        let open = Open::with(&[]);
        let handle = open.cufile.handle_register(file.as_fd()).unwrap();
        if direct {
            open.read(handle, 0);
            return;
        }
        let read = open.cufile.read(handle, open.memory, PAGE, 0, 0);
        fails(read, Code::CUDA_DRIVER_ERROR);
        assert_eq!(open.gpu().reads_failed, 1);
    };
    match process::part().as_deref() {
        Some(mode) => body(mode == "nvfs"),
        None => {
            for mode in ["nvfs", "compat"] {
                let node = node(mode).with("CUDA_SIM_FAULT", "cuMemcpyHtoDAsync_v2:1+=UNKNOWN");
                node.run("the_direct_way_does_not_use_the_link_from_the_host", mode);
            }
        }
    }
}

#[test]
fn the_direct_way_takes_the_time_that_its_bandwidth_says() {
    alone(
        || node("nvfs").with("CUFILE_SIM_RATE", "4194304"),
        || {
            let Some((_path, file)) = file_on_drive(OFlags::DIRECT) else { return };
            let open = Open::with(&[]);
            let handle = open.cufile.handle_register(file.as_fd()).unwrap();
            let begin = Instant::now();
            open.cufile.read(handle, open.memory, 4 << 20, 0, 0).unwrap();
            // 4 MiB at 4 MiB/s. There is no upper bound: the machine may be busy.
            assert!(begin.elapsed() >= Duration::from_secs(1), "{:?}", begin.elapsed());
        },
    );
}

#[test]
fn faults_hit_the_calls_that_are_named() {
    alone(
        || {
            let faults =
                "read:2=EIO;read:3=SHORT;read:4=NVFS_DRIVER_ERROR;cuFileBufDeregister:1=INTERNAL_ERROR";
            node("compat").with("CUFILE_SIM_FAULT", faults)
        },
        || {
            let (_path, file) = file_in(Path::new("/dev/shm"), OFlags::DIRECT);
            let open = Open::with(&[]);
            let handle = open.cufile.handle_register(file.as_fd()).unwrap();
            let read = || open.cufile.read(handle, open.memory, 4 * PAGE, 0, 0);
            assert_eq!(read(), Ok(4 * PAGE));
            assert_eq!(read(), Err(Failure::Errno { call: "read", errno: 5 }));
            assert_eq!(read(), Ok(2 * PAGE));
            fails(read(), Code::NVFS_DRIVER_ERROR);
            assert_eq!(read(), Ok(4 * PAGE));
            let gpu = open.gpu();
            assert_eq!((gpu.reads, gpu.reads_failed), (3, 2));
            fails(open.cufile.buffer_deregister(open.memory), Code::INTERNAL_ERROR);
            open.cufile.buffer_deregister(open.memory).unwrap();
        },
    );
}

/// Entry of a batch: a page from `index` on, to where `index` says.
fn page(open: &Open, handle: usize, index: u64) -> BatchEntry {
    BatchEntry {
        mode: BATCH_MODE,
        base: open.memory,
        file_offset: (index * PAGE) as i64,
        base_offset: (index * PAGE) as i64,
        bytes: PAGE as usize,
        handle,
        opcode: READ,
        cookie: index as usize,
    }
}

/// (cookie, status, result) of each, by cookie.
fn told(events: &[BatchEvent]) -> Vec<(usize, u32, isize)> {
    let mut told: Vec<_> = events.iter().map(|event| (event.cookie, event.status, event.result)).collect();
    told.sort_unstable();
    told
}

const WHOLE: isize = PAGE as isize;
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_batch_tells_of_each_entry_what_became_of_it() {
    alone(
        || Machine::new(ONE).with("CUDA_SIM_FAULT", "cuMemcpyHtoDAsync_v2:2=UNKNOWN"),
        || {
            let (_path, file) = file_in(Path::new("/dev/shm"), OFlags::DIRECT);
            let open = Open::with(&[]);
            let handle = open.cufile.handle_register(file.as_fd()).unwrap();
            fails(open.cufile.batch_set_up(0), Code::INVALID_VALUE);
            fails(open.cufile.batch_set_up(129), Code::INVALID_VALUE);
            let batch = open.cufile.batch_set_up(3).unwrap();
            let entries = [0, 1, 2].map(|index| page(&open, handle, index));
            // One that is wrong is an error of them all.
            let unknown = BatchEntry { handle: 77, ..entries[1] };
            fails(open.cufile.batch_submit(batch, &[entries[0], unknown]), Code::HANDLE_NOT_REGISTERED);
            let beyond = BatchEntry { base_offset: DEVICE_BYTES as i64, ..entries[1] };
            fails(open.cufile.batch_submit(batch, &[entries[0], beyond]), Code::INVALID_MAPPING_RANGE);
            let strange = BatchEntry { mode: 9, ..entries[1] };
            fails(open.cufile.batch_submit(batch, &[entries[0], strange]), Code::INTERNAL_BATCH_SUBMIT_ERROR);
            fails(open.cufile.batch_submit(batch, &[entries[0]; 4]), Code::INTERNAL_BATCH_SUBMIT_ERROR);
            assert_eq!(open.cufile.batch_events(batch, 1, 3, PATIENCE), Ok(vec![]));
            open.cufile.batch_submit(batch, &entries).unwrap();
            // Until they are told of, there is room for no more.
            fails(open.cufile.batch_submit(batch, &entries[..1]), Code::BATCH_FULL);
            let (answer, events) = open.cufile.batch_end(batch, 3, 3, PATIENCE);
            fails(answer, Code::IO_ERROR);
            // Which one of them that is nobody knows: they are done at the same time.
            let ends = |wanted| events.iter().filter(|event| (event.status, event.result) == wanted).count();
            assert_eq!(ends((batch_status::COMPLETE, WHOLE)), 2, "{events:?}");
            assert_eq!(ends((batch_status::FAILED, -1)), 1, "{events:?}");
            // None is left, so that there is nothing to wait for.
            assert_eq!(open.cufile.batch_events(batch, 1, 3, PATIENCE), Ok(vec![]));
            open.cufile.batch_destroy(batch).unwrap();
            fails(open.cufile.batch_submit(batch, &entries), Code::INVALID_VALUE);
        },
    );
}

/// A real library hangs there without a word.
#[test]
fn a_batch_without_slabs_for_all_hangs_until_it_is_cancelled() {
    alone(
        || Machine::new(ONE),
        || {
            let (_path, file) = file_in(Path::new("/dev/shm"), OFlags::DIRECT);
            CuFile::load().unwrap().set_slabs(&[4, 1024], &[2, 1]).unwrap();
            let open = Open::with(&[]);
            let handle = open.cufile.handle_register(file.as_fd()).unwrap();
            let batch = open.cufile.batch_set_up(8).unwrap();
            let pages = [0, 1, 2].map(|index| page(&open, handle, index));
            let (sender, receiver) = mpsc::channel();
            std::thread::spawn(move || {
                sender.send(CuFile::load().unwrap().batch_submit(batch, &pages)).unwrap();
            });
            let submitted = receiver.recv_timeout(Duration::from_millis(300));
            assert_eq!(submitted, Err(mpsc::RecvTimeoutError::Timeout));
            open.cufile.batch_cancel(batch).unwrap();
            fails(receiver.recv().unwrap(), Code::BATCH_SUBMIT_FAILED);
            // Nobody is told of what was cancelled.
            assert_eq!(open.cufile.batch_events(batch, 1, 8, PATIENCE), Ok(vec![]));
            let large = BatchEntry { bytes: 1 << 20, ..page(&open, handle, 4) };
            // A slab is free again when its entry has been told of.
            for _ in 0..2 {
                open.cufile.batch_submit(batch, &[pages[0], pages[1], large]).unwrap();
                let events = open.cufile.batch_events(batch, 3, 8, PATIENCE).unwrap();
                let done = |cookie, bytes| (cookie, batch_status::COMPLETE, bytes);
                assert_eq!(told(&events), [done(0, WHOLE), done(1, WHOLE), done(4, 1 << 20)]);
            }
            // Real libraries count them among neither the reads nor those of a GPU.
            assert_eq!(open.gpu().reads, 0);
        },
    );
}

#[test]
fn closing_ends_batches_that_hang_on_nothing() {
    alone(
        || node("nvfs"),
        || {
            let Some((_path, file)) = file_on_drive(OFlags::DIRECT) else { return };
            let open = Open::with(&[]);
            let handle = open.cufile.handle_register(file.as_fd()).unwrap();
            let batch = open.cufile.batch_set_up(128).unwrap();
            let entries: Vec<_> = (0..128).map(|index| page(&open, handle, index)).collect();
            open.cufile.batch_submit(batch, &entries).unwrap();
            open.cufile.driver_close().unwrap();
            assert_eq!(open.cufile.use_count(), Ok(0));
            fails(open.cufile.batch_events(batch, 1, 128, PATIENCE), Code::INVALID_VALUE);
            fails(open.cufile.read(handle, open.memory, PAGE, 0, 0), Code::HANDLE_NOT_REGISTERED);
        },
    );
}

#[test]
fn an_opening_can_hang() {
    alone(
        || node("nvfs").with("CUFILE_SIM_FAULT", "cuFileDriverOpen:1=HANG"),
        || {
            let (sender, receiver) = mpsc::channel();
            std::thread::spawn(move || sender.send(CuFile::load().unwrap().driver_open()));
            let opened = receiver.recv_timeout(Duration::from_millis(300));
            assert_eq!(opened, Err(mpsc::RecvTimeoutError::Timeout));
            // Others go on.
            assert_eq!(CuFile::load().unwrap().use_count(), Ok(0));
        },
    );
}

#[test]
fn a_configuration_that_is_not_understood_opens_nothing() {
    alone(|| node("fast"), || fails(CuFile::load().unwrap().driver_open(), Code::INTERNAL_ERROR));
}

/// Calls of the driver that a direct read makes.
const DRIVER_CALLS: [&str; 9] = [
    "cuMemCreate:1",
    "cuMemAddressReserve:1",
    "cuMemMap:1",
    "cuMemSetAccess:1",
    "cuMemExportToShareableHandle:1",
    "cuStreamCreate:1",
    // The first two are the test's own.
    "cuDevicePrimaryCtxRetain:3",
    "cuMemcpyDtoDAsync_v2:1",
    "cuStreamSynchronize:1",
];

#[test]
fn a_driver_call_that_fails_is_an_error_and_no_leak() {
    if process::part().is_none() {
        for call in DRIVER_CALLS {
            let node = node("nvfs").with("CUDA_SIM_FAULT", &format!("{call}=OUT_OF_MEMORY"));
            node.run("a_driver_call_that_fails_is_an_error_and_no_leak", call);
        }
        return;
    }
    let Some((_path, file)) = file_on_drive(OFlags::DIRECT) else { return };
    let gpu = Gpu::open().unwrap();
    let (free, _) = driver::memory_info().unwrap();
    drop(gpu);
    let open = Open::with(&[]);
    let handle = open.cufile.handle_register(file.as_fd()).unwrap();
    let failed = open.cufile.read(handle, open.memory, PAGE, 0, 0);
    fails(failed, Code::CUDA_DRIVER_ERROR);
    open.read(handle, 0);
    open.cufile.driver_close().unwrap();
    driver::free(open.memory).unwrap();
    assert_eq!(driver::memory_info().unwrap().0, free, "device memory that the closed driver still has");
}
