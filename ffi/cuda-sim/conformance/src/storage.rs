//! Checks of cuFile: what Lodestream relies on, whichever way bytes go.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::OFlags;

use crate::check::{Checked, Gpu, Wrong, ensure, pattern, same};
use crate::cufile::{Answer, CuFile, Failure};
use crate::cufile_abi::{BATCH_MODE, BatchEntry, Code, PerGpu, READ, batch_status, boolean, size};
use crate::driver;

impl From<Failure> for Wrong {
    fn from(failure: Failure) -> Wrong {
        Wrong(failure.to_string())
    }
}

/// Bytes of the file that is read: whole pages, and some.
const FILE_BYTES: u64 = (1 << 20) + 777;
/// Bytes of device memory.
const DEVICE_BYTES: u64 = 2 << 20;
const PAGE: u64 = 4096;
/// An entry of a batch that takes longer does not end.
const BATCH_PATIENCE: Duration = Duration::from_secs(10);

/// The call must fail with one of these codes.
fn fails<T>(what: &str, answer: Answer<T>, codes: &[Code]) -> Checked {
    match answer {
        Err(Failure::Code { code, .. }) if codes.contains(&code) => Ok(()),
        Err(failure) => Err(Wrong(format!("{what}: {failure}, not one of {codes:?}"))),
        Ok(_) => Err(Wrong(format!("{what}: succeeded, and should have failed with one of {codes:?}"))),
    }
}

/// The call must fail; with what is not documented.
fn fails_somehow<T>(what: &str, answer: Answer<T>) -> Checked {
    match answer {
        Err(Failure::Missing { call }) => Err(Wrong(format!("{what}: there is no {call}"))),
        Err(_) => Ok(()),
        Ok(_) => Err(Wrong(format!("{what}: succeeded, and should have failed"))),
    }
}

/// A file in the folder for temporary ones, which goes with this.
struct Scratch {
    path: PathBuf,
    file: File,
}

impl Scratch {
    fn new(bytes: &[u8]) -> Checked<Scratch> {
        let path = std::env::temp_dir().join(format!("cuda-conformance-{}", std::process::id()));
        std::fs::write(&path, bytes)?;
        let flags = OFlags::DIRECT.bits() as i32;
        let file = File::options().read(true).write(true).custom_flags(flags).open(&path);
        match file {
            Ok(file) => Ok(Scratch { path, file }),
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                Err(error.into())
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An open driver with a registered file, and device memory full of zeros.
struct Bench<'a> {
    cufile: &'a CuFile,
    scratch: Scratch,
    handle: usize,
    memory: u64,
    _gpu: Gpu,
}

impl Bench<'_> {
    fn new(cufile: &CuFile) -> Checked<Bench<'_>> {
        let gpu = Gpu::open()?;
        cufile.driver_open()?;
        let scratch = Scratch::new(&pattern(1, FILE_BYTES))?;
        let handle = cufile.handle_register(scratch.file.as_fd())?;
        let memory = driver::allocate(DEVICE_BYTES)?;
        driver::fill(memory, 0, DEVICE_BYTES, driver::NULL)?;
        driver::synchronize()?;
        Ok(Bench { cufile, scratch, handle, memory, _gpu: gpu })
    }

    /// Reads, and compares everything that is on the device then.
    fn read(&self, bytes: u64, at: u64, offset: u64) -> Checked {
        let what = format!("{bytes} bytes from {at} on, to {offset}");
        let found = self.cufile.read(self.handle, self.memory, bytes, at as i64, offset as i64)?;
        let expected = FILE_BYTES.saturating_sub(at).min(bytes);
        ensure!(found == expected, "{what}: {found} bytes");
        if expected == 0 {
            return Ok(());
        }
        let file = pattern(1, FILE_BYTES);
        let device = driver::read(self.memory + offset, expected)?;
        same(&what, &device, &file[at as usize..(at + expected) as usize])
    }

    fn close(self) -> Checked {
        self.cufile.handle_deregister(self.handle)?;
        driver::free(self.memory)?;
        self.cufile.driver_close()?;
        Ok(())
    }
}

pub(crate) fn cufile_tells_its_version(cufile: &CuFile) -> Checked {
    let version = cufile.version()?;
    ensure!(version >= 1000, "the version is {version}");
    Ok(())
}

pub(crate) fn cufile_parameters_are_set_before_opening(cufile: &CuFile) -> Checked {
    let _gpu = Gpu::open()?;
    for value in [false, true] {
        cufile.set_boolean(boolean::ALLOW_COMPAT_MODE, value)?;
        ensure!(cufile.boolean(boolean::ALLOW_COMPAT_MODE)? == value, "what was set is not told");
    }
    cufile.set_size(size::DIRECT_IO_MAX_KIB, 1024)?;
    ensure!(cufile.size(size::DIRECT_IO_MAX_KIB)? == 1024, "the size that was set is not told");
    fails("a parameter that is none", cufile.set_boolean(9999, true), &[Code::INVALID_VALUE])?;
    cufile.driver_open()?;
    ensure!(
        cufile.boolean(boolean::ALLOW_COMPAT_MODE)?,
        "what was set does not hold when the driver is open"
    );
    let properties = cufile.properties()?;
    ensure!(properties.direct_io_max_kib == 1024, "direct transfers of {} KiB", properties.direct_io_max_kib);
    let late = cufile.set_boolean(boolean::ALLOW_COMPAT_MODE, false);
    fails("a parameter of an open driver", late, &[Code::DRIVER_ALREADY_OPEN])?;
    cufile.driver_close()?;
    Ok(())
}

pub(crate) fn cufile_tells_what_it_is_able_to(cufile: &CuFile) -> Checked {
    let _gpu = Gpu::open()?;
    cufile.driver_open()?;
    let properties = cufile.properties()?;
    ensure!(properties.direct_io_max_kib > 0, "no size of direct transfers");
    ensure!((1..=128).contains(&properties.batch_max), "{} entries in a batch", properties.batch_max);
    ensure!(cufile.use_count()? >= 1, "an open driver that nobody uses");
    cufile.driver_close()?;
    fails("closed twice", cufile.driver_close(), &[Code::DRIVER_NOT_INITIALIZED])
}

pub(crate) fn cufile_registers_files_once(cufile: &CuFile) -> Checked {
    let bench = Bench::new(cufile)?;
    let again = cufile.handle_register(bench.scratch.file.as_fd());
    fails("a file that is registered", again, &[Code::HANDLE_ALREADY_REGISTERED])?;
    let folder = File::open(std::env::temp_dir())?;
    fails_somehow("a folder", cufile.handle_register(folder.as_fd()))?;
    bench.close()
}

pub(crate) fn cufile_registers_buffers_once(cufile: &CuFile) -> Checked {
    let bench = Bench::new(cufile)?;
    cufile.buffer_register(bench.memory, DEVICE_BYTES)?;
    let again = cufile.buffer_register(bench.memory, DEVICE_BYTES);
    fails("a buffer that is registered", again, &[Code::MEMORY_ALREADY_REGISTERED])?;
    fails_somehow("no bytes", cufile.buffer_register(bench.memory, 0))?;
    cufile.buffer_deregister(bench.memory)?;
    fails_somehow("a buffer that is not registered", cufile.buffer_deregister(bench.memory))?;
    cufile.buffer_register(bench.memory, DEVICE_BYTES)?;
    cufile.buffer_deregister(bench.memory)?;
    bench.close()
}

pub(crate) fn cufile_reads_what_a_file_holds(cufile: &CuFile) -> Checked {
    let bench = Bench::new(cufile)?;
    for is_registered in [false, true] {
        if is_registered {
            cufile.buffer_register(bench.memory, DEVICE_BYTES)?;
        }
        bench.read(FILE_BYTES / PAGE * PAGE, 0, 0)?;
        bench.read(16 * PAGE, 3 * PAGE, 7 * PAGE)?;
        // Not whole pages: in the file, in length, on the device.
        bench.read(PAGE, 1, 0)?;
        bench.read(10_001, PAGE, 0)?;
        bench.read(PAGE, 0, 513)?;
        bench.read(5555, 12_345, 77)?;
        // To the end, beyond it, and from there on.
        bench.read(PAGE, FILE_BYTES - 100, 0)?;
        bench.read(16 * PAGE, FILE_BYTES / PAGE * PAGE - PAGE, 0)?;
        bench.read(PAGE, FILE_BYTES.next_multiple_of(PAGE), 0)?;
    }
    cufile.buffer_deregister(bench.memory)?;
    bench.close()
}

pub(crate) fn cufile_reads_nothing_beyond_a_buffer(cufile: &CuFile) -> Checked {
    let bench = Bench::new(cufile)?;
    let half = DEVICE_BYTES / 2;
    cufile.buffer_register(bench.memory, half)?;
    let beyond = cufile.read(bench.handle, bench.memory, PAGE, 0, half as i64);
    fails("a read to behind what is registered", beyond, &[Code::INVALID_MAPPING_RANGE])?;
    fails_somehow("a negative offset in the file", cufile.read(bench.handle, bench.memory, PAGE, -4096, 0))?;
    same("behind the buffer", &driver::read(bench.memory + half, PAGE)?, &[0; PAGE as usize])?;
    cufile.buffer_deregister(bench.memory)?;
    bench.close()
}

pub(crate) fn cufile_writes_what_a_device_holds(cufile: &CuFile) -> Checked {
    let bench = Bench::new(cufile)?;
    let bytes = pattern(2, 8 * PAGE);
    driver::write(bench.memory, &bytes)?;
    let written = cufile.write(bench.handle, bench.memory, 8 * PAGE, 4 * PAGE as i64, 0)?;
    ensure!(written == 8 * PAGE, "{written} bytes were written");
    let mut expected = pattern(1, FILE_BYTES);
    expected[4 * PAGE as usize..12 * PAGE as usize].copy_from_slice(&bytes);
    same("the file", &std::fs::read(&bench.scratch.path)?, &expected)?;
    bench.close()
}

/// A page for each of so many entries, from every second page of the file.
fn entries(bench: &Bench<'_>, count: u32) -> Vec<BatchEntry> {
    let entry = |index: u64| BatchEntry {
        mode: BATCH_MODE,
        base: bench.memory,
        file_offset: (index * 2 * PAGE) as i64,
        base_offset: (index * PAGE) as i64,
        bytes: PAGE as usize,
        handle: bench.handle,
        opcode: READ,
        cookie: 1000 + index as usize,
    };
    (0..count.into()).map(entry).collect()
}

pub(crate) fn cufile_batches_are_cancelled(cufile: &CuFile) -> Checked {
    let bench = Bench::new(cufile)?;
    cufile.buffer_register(bench.memory, DEVICE_BYTES)?;
    let batch = cufile.batch_set_up(8)?;
    cufile.batch_submit(batch, &entries(&bench, 8))?;
    cufile.batch_cancel(batch)?;
    // What was under way has ended when the batch is destroyed: its memory can go.
    cufile.batch_destroy(batch)?;
    cufile.buffer_deregister(bench.memory)?;
    bench.close()
}

pub(crate) fn cufile_batches_tell_of_each_entry(cufile: &CuFile) -> Checked {
    const ENTRIES: u32 = 32;
    let bench = Bench::new(cufile)?;
    cufile.buffer_register(bench.memory, DEVICE_BYTES)?;
    let batch = cufile.batch_set_up(ENTRIES)?;
    let entries = entries(&bench, ENTRIES);
    // Twice: a batch is used again.
    for _ in 0..2 {
        cufile.batch_submit(batch, &entries)?;
        let mut events = Vec::new();
        while events.len() < entries.len() {
            let left = ENTRIES - events.len() as u32;
            let more = cufile.batch_events(batch, left, left, BATCH_PATIENCE)?;
            ensure!(!more.is_empty(), "{} of {ENTRIES} entries ended", events.len());
            events.extend(more);
        }
        for event in &events {
            ensure!(
                event.status == batch_status::COMPLETE,
                "entry {}: status {}",
                event.cookie,
                event.status
            );
            ensure!(event.result == PAGE as isize, "entry {}: {} bytes", event.cookie, event.result);
        }
        let mut cookies: Vec<_> = events.iter().map(|event| event.cookie).collect();
        cookies.sort_unstable();
        ensure!(cookies == (1000..1000 + ENTRIES as usize).collect::<Vec<_>>(), "cookies are {cookies:?}");
        let (file, device) = (pattern(1, FILE_BYTES), driver::read(bench.memory, u64::from(ENTRIES) * PAGE)?);
        for (index, page) in device.chunks_exact(PAGE as usize).enumerate() {
            let start = index * 2 * PAGE as usize;
            same("a page", page, &file[start..start + PAGE as usize])?;
        }
    }
    let strange = BatchEntry { handle: 0, ..entries[1] };
    let refused = cufile.batch_submit(batch, &[entries[0], strange]);
    fails("an entry without a file", refused, &[Code::HANDLE_NOT_REGISTERED])?;
    let events = cufile.batch_events(batch, 0, ENTRIES, BATCH_PATIENCE)?;
    ensure!(events.is_empty(), "a part of what was refused has been done: {events:?}");
    cufile.batch_destroy(batch)?;
    fails_somehow("a batch of more entries than there may be", cufile.batch_set_up(100_000))?;
    cufile.buffer_deregister(bench.memory)?;
    bench.close()
}

fn sum(gpus: &[PerGpu], of: fn(&PerGpu) -> u64) -> u64 {
    gpus.iter().map(of).sum()
}

pub(crate) fn cufile_counts_the_way_of_each_read(cufile: &CuFile) -> Checked {
    let bench = Bench::new(cufile)?;
    cufile.buffer_register(bench.memory, DEVICE_BYTES)?;
    cufile.set_level(3)?;
    ensure!(cufile.level()? == 3, "the level that was set is not told");
    cufile.statistics_start()?;
    let before = cufile.statistics()?;
    for at in 0..8 {
        bench.read(16 * PAGE, at * 16 * PAGE, 0)?;
    }
    let after = cufile.statistics()?;
    let change = |of| sum(&after, of) - sum(&before, of);
    ensure!(change(|gpu| gpu.read_bytes) == 128 * PAGE, "{} bytes", change(|gpu| gpu.read_bytes));
    let (all, direct) = (change(|gpu| gpu.reads), change(|gpu| gpu.nvfs_reads + gpu.p2p_reads));
    let posix = change(|gpu| gpu.posix_reads);
    ensure!(all >= 8, "{all} reads");
    // What is neither posix nor direct could not be told apart.
    ensure!(all == direct + posix, "{all} reads, {direct} direct and {posix} posix");
    ensure!(direct == 0 || posix == 0, "one file went both ways: {direct} direct and {posix} posix");
    ensure!(after.iter().any(|gpu| gpu.uuid != [0; 16]), "no GPU has a UUID");
    cufile.statistics_stop()?;
    cufile.buffer_deregister(bench.memory)?;
    bench.close()
}

pub(crate) fn cufile_without_compatibility_goes_direct_or_not_at_all(cufile: &CuFile) -> Checked {
    let _gpu = Gpu::open()?;
    cufile.set_boolean(boolean::ALLOW_COMPAT_MODE, false)?;
    match cufile.driver_open() {
        Ok(()) => {}
        Err(_) => return Ok(()),
    }
    cufile.set_level(3)?;
    cufile.statistics_start()?;
    let scratch = Scratch::new(&pattern(1, FILE_BYTES))?;
    if let Ok(handle) = cufile.handle_register(scratch.file.as_fd()) {
        let memory = driver::allocate(DEVICE_BYTES)?;
        cufile.buffer_register(memory, DEVICE_BYTES)?;
        if cufile.read(handle, memory, 16 * PAGE, 0, 0).is_ok() {
            let posix = sum(&cufile.statistics()?, |gpu| gpu.posix_reads);
            ensure!(posix == 0, "{posix} reads by way of the host");
        }
        cufile.buffer_deregister(memory)?;
        cufile.handle_deregister(handle)?;
        driver::free(memory)?;
    }
    cufile.driver_close()?;
    Ok(())
}

pub(crate) fn cufile_statistics_need_an_open_driver(cufile: &CuFile) -> Checked {
    fails("statistics", cufile.statistics(), &[Code::DRIVER_NOT_INITIALIZED, Code::INVALID_VALUE])?;
    fails_somehow("a level that is none", cufile.set_level(4))
}
