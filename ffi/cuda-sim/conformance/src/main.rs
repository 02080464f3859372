//! Checks what Lodestream relies on in a CUDA driver and in cuFile, alike for real ones and the simulated ones: whichever
//! `libcuda.so.1` and `libcufile.so.0` the loader finds. Only what CUDA and cuFile document is asserted, or what nothing could
//! be built on if it were otherwise. Without a cuFile its checks are skipped.
//!
//! Each check is a process of its own, so that one which ends a context, or dies, harms no other.

mod check;
#[allow(dead_code, reason = "shared with the tests of the simulated cuFile")]
mod cufile;
#[allow(dead_code, reason = "shared with the simulated cuFile")]
#[path = "../../cufile/src/abi.rs"]
mod cufile_abi;
mod devices;
mod driver;
mod mapping;
mod peer;
mod sharing;
mod storage;
mod work;

use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use check::Checked;
use cufile::CuFile;

const USAGE: &str = "usage: cuda-conformance [--json] [--ptx FILE] [--check NAME | --list]

Checks the CUDA driver that the loader finds. Exit status: 0 all checks passed, 1 some failed, 2 usage, 3 no driver.
  --json      one JSON object instead of a line for each check
  --ptx FILE  the checksum kernel of Lodestream, to be checked as well
  --check     only this one, in this process
  --list      the names of the checks";

/// A check that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(120);
/// Likewise, of cuFile: a real one has been seen to hang.
const CUFILE_DEADLINE: Duration = Duration::from_secs(20);
/// Exit statuses.
const FAILED: u8 = 1;
const MISUSED: u8 = 2;
const NO_DRIVER: u8 = 3;
/// Of a single check: it could not be done.
const SKIPPED: u8 = 4;

macro_rules! checks {
    ($($module:ident: $($name:ident)*;)*) => {
        /// Every check that needs nothing but the driver.
        const CHECKS: &[(&str, fn() -> Checked)] = &[$($((stringify!($name), $module::$name)),*),*];
    };
}

checks! {
    devices: calls_before_init_are_refused version_is_new_enough devices_are_described
        memory_can_be_shared_by_descriptor errors_have_names contexts_are_current_on_their_thread
        streams_need_a_context;
    mapping: granularity_is_a_power_of_two sizes_are_whole_units memory_on_no_device_is_refused
        more_than_there_is_is_out_of_memory free_memory_is_counted bytes_come_back allocations_lie_side_by_side
        addresses_are_aligned_as_asked a_reservation_is_freed_whole_and_empty nothing_is_mapped_twice
        what_is_not_reserved_is_not_mapped a_mapping_is_taken_out_whole mappings_outlive_their_handle
        a_handle_is_had_from_an_address access_is_told addresses_are_used_again plain_allocations_work
        pointers_are_told_apart;
    work: work_of_a_stream_is_in_order streams_wait_for_events events_tell_what_was_reached events_tell_times
        a_stream_that_is_destroyed_ends_its_work the_null_stream_waits_for_blocking_streams  fills_fill_what_they_are_told host_memory_is_registered_once
        copies_from_registered_memory_arrive copies_from_other_memory_are_staged rows_are_gathered
        entries_are_found_in_modules;
    sharing: what_is_imported_is_the_same_memory processes_share_memory mapped_memory_outlives_its_exporter
        a_descriptor_outlives_its_exporter memory_of_the_dead_comes_back private_memory_is_not_exported
        strange_descriptors_are_refused who_may_read_may_not_write who_may_read_may_not_copy_to_it
        what_is_not_mapped_is_not_accessible what_was_unmapped_is_not_accessible access_must_be_given;
}

macro_rules! cufile_checks {
    ($($name:ident)*) => {
        /// Every check that needs a cuFile as well.
        const CUFILE_CHECKS: &[(&str, fn(&CuFile) -> Checked)] = &[$((stringify!($name), storage::$name)),*];
    };
}

cufile_checks! {
    cufile_tells_its_version cufile_parameters_are_set_before_opening cufile_tells_what_it_is_able_to
    cufile_registers_files_once cufile_registers_buffers_once cufile_reads_what_a_file_holds
    cufile_reads_nothing_beyond_a_buffer cufile_writes_what_a_device_holds cufile_counts_the_way_of_each_read
    cufile_batches_tell_of_each_entry cufile_batches_are_cancelled
    cufile_without_compatibility_goes_direct_or_not_at_all cufile_statistics_need_an_open_driver
}

/// The check of the kernel, whose PTX is handed in.
const KERNEL: &str = "checksums_agree";

#[derive(Default)]
struct Options {
    json: bool,
    list: bool,
    ptx: Option<String>,
    check: Option<String>,
    export: Option<u64>,
}

fn options() -> Option<Options> {
    let mut options = Options::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => options.json = true,
            "--list" => options.list = true,
            "--ptx" => options.ptx = Some(arguments.next()?),
            "--check" => options.check = Some(arguments.next()?),
            "--export" => options.export = Some(arguments.next()?.parse().ok()?),
            _ => return None,
        }
    }
    Some(options)
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(io::stderr(), "cuda-conformance: {error}");
            ExitCode::from(FAILED)
        }
    }
}

fn run() -> io::Result<u8> {
    let Some(options) = options() else {
        writeln!(io::stderr(), "{USAGE}")?;
        return Ok(MISUSED);
    };
    if options.list {
        let names = CHECKS.iter().map(|check| check.0).chain([KERNEL]);
        let names = names.chain(CUFILE_CHECKS.iter().map(|check| check.0));
        names.into_iter().try_for_each(|name| writeln!(io::stdout(), "{name}"))?;
        return Ok(0);
    }
    if !driver::is_present() {
        writeln!(io::stderr(), "no libcuda.so.1 can be loaded")?;
        return Ok(NO_DRIVER);
    }
    if let Some(units) = options.export {
        return tell(peer::export(units));
    }
    if let Some(name) = &options.check {
        if let Some(check) = CUFILE_CHECKS.iter().find(|check| check.0 == name) {
            return of_cufile(check.1);
        }
        return match (CHECKS.iter().find(|check| check.0 == name), &options.ptx) {
            (Some(check), _) => tell(check.1()),
            (None, Some(path)) if name == KERNEL => {
                tell(work::checksums_agree(&std::fs::read_to_string(path)?))
            }
            _ => {
                writeln!(io::stderr(), "there is no check {name} (checksums_agree needs --ptx)")?;
                Ok(MISUSED)
            }
        };
    }
    all(&options)
}

/// A check of cuFile in its own process, which no other loads the library into.
fn of_cufile(check: fn(&CuFile) -> Checked) -> io::Result<u8> {
    let cufile = match CuFile::load() {
        Ok(cufile) => cufile,
        Err(reason) => {
            writeln!(io::stderr(), "{reason}")?;
            return Ok(SKIPPED);
        }
    };
    let checked = check(&cufile);
    match cufile.missing() {
        Some(call) => {
            writeln!(io::stderr(), "this libcufile has no {call}")?;
            Ok(SKIPPED)
        }
        None => tell(checked),
    }
}

/// The end of a check in its own process.
fn tell(checked: Checked) -> io::Result<u8> {
    match checked {
        Ok(()) => Ok(0),
        Err(wrong) => {
            writeln!(io::stderr(), "{}", wrong.0)?;
            Ok(FAILED)
        }
    }
}

/// Runs every check.
fn all(options: &Options) -> io::Result<u8> {
    let device = driver::init().and_then(|()| driver::device(0)).and_then(driver::device_name);
    let device = device.unwrap_or_else(|failure| format!("none: {failure}"));
    let version = driver::version().unwrap_or(0);
    if !options.json {
        writeln!(io::stdout(), "CUDA {version}, {device}")?;
    }
    let mut results = Vec::new();
    let kernel = options.ptx.iter().map(|_| KERNEL);
    let names = CHECKS.iter().map(|check| check.0).chain(kernel).map(|name| (name, DEADLINE));
    let cufile_names = CUFILE_CHECKS.iter().map(|check| (check.0, CUFILE_DEADLINE));
    for (name, deadline) in names.chain(cufile_names) {
        let start = Instant::now();
        let end = in_a_process(name, options.ptx.as_deref(), deadline)?;
        let milliseconds = start.elapsed().as_millis() as u64;
        if !options.json {
            let verdict = match &end {
                End::Passed => "ok".to_owned(),
                End::Skipped(reason) => format!("skipped: {reason}"),
                End::Failed(wrong) => format!("FAIL: {wrong}"),
            };
            writeln!(io::stdout(), "{name:60} {milliseconds:6} ms  {verdict}")?;
        }
        results.push((name, milliseconds, end));
    }
    let failed = results.iter().filter(|result| matches!(result.2, End::Failed(_))).count();
    let skipped = results.iter().filter(|result| matches!(result.2, End::Skipped(_))).count();
    if options.json {
        let checks: Vec<_> = results
            .iter()
            .map(|(name, milliseconds, end)| {
                let (ok, skipped, message) = match end {
                    End::Passed => (true, false, None),
                    End::Skipped(reason) => (true, true, Some(reason)),
                    End::Failed(wrong) => (false, false, Some(wrong)),
                };
                serde_json::json!({
                    "name": name, "ok": ok, "skipped": skipped, "milliseconds": milliseconds, "message": message
                })
            })
            .collect();
        let report = serde_json::json!({
            "cuda_version": version,
            "device": device,
            "simulated": device.contains("Simulated"),
            "failed": failed,
            "skipped": skipped,
            "checks": checks,
        });
        writeln!(io::stdout(), "{report:#}")?;
    } else {
        writeln!(io::stdout(), "{} checks, {failed} failed, {skipped} skipped", results.len())?;
    }
    Ok(if failed == 0 { 0 } else { FAILED })
}

/// How a check has ended.
enum End {
    Passed,
    Skipped(String),
    Failed(String),
}

/// Runs one check.
fn in_a_process(name: &str, ptx: Option<&str>, deadline: Duration) -> io::Result<End> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--check", name]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.args(ptx.iter().flat_map(|path| ["--ptx", path]));
    let mut child = command.spawn()?;
    // Polled, so that a check that hangs is ended.
    let pid = Pid::from_child(&child);
    let handle = pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec { tv_sec: deadline.as_secs() as i64, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&timeout))? > 0;
    if !ended {
        pidfd_send_signal(&handle, Signal::KILL)?;
    }
    let status = child.wait()?;
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said)?;
    }
    let said = said.trim();
    Ok(match (ended, status.signal()) {
        (false, _) => End::Failed(format!("hung for {} s. {said}", deadline.as_secs())),
        (true, Some(signal)) => End::Failed(format!("was ended by signal {signal}. {said}")),
        (true, None) if status.success() => End::Passed,
        (true, None) if status.code() == Some(SKIPPED.into()) => End::Skipped(said.to_owned()),
        (true, None) => End::Failed(said.to_owned()),
    })
}
