//! Which way bytes really take from a drive to the memory of a GPU, and how fast: measured by a helper process.
//!
//! cuFile says that a read has ended, not how; opening it was seen to spin for ever. So a helper is started on a file that
//! is about to be read often, with a deadline: it reads the same bytes by the shard thread and slots that loads use, and
//! by cuFile, looks at cuFile's counters, and writes what it finds to stdout. What it has found when it is ended counts.

mod measure;

use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

pub use measure::measure;

/// The subcommand that the helper is started with.
pub const SUBCOMMAND: &str = "probe-direct";

/// Files that are shorter say little about a drive.
pub const FILE_BYTES_MIN: u64 = 16 << 20;

/// How long a helper that was killed has to be gone. One that hangs in a driver may never be.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest that a helper may write.
const REPORT_BYTES_MAX: usize = 64 << 10;

/// How bytes get from the drive to the GPU where cuFile reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The drive writes to the GPU, by the kernel module nvidia-fs.
    NvidiaFs,
    /// The drive writes to the GPU, by the kernel's own PCI P2PDMA.
    P2pdma,
    /// By way of host memory.
    Compat,
}

impl Mode {
    /// `nvidia_fs`, `p2pdma` or `compat`.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::NvidiaFs => "nvidia_fs",
            Mode::P2pdma => "p2pdma",
            Mode::Compat => "compat",
        }
    }

    /// Whether the drive writes to the GPU by itself.
    pub fn is_direct(self) -> bool {
        self != Mode::Compat
    }
}

/// What the helper is asked to do; travels in its arguments.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct Settings {
    /// UUID of the GPU
    #[arg(long)]
    pub device: String,
    /// Read with preadv2 instead of io_uring
    #[arg(long)]
    pub preadv2: bool,
    /// Bytes of a slot
    #[arg(long)]
    pub block_bytes: u64,
    /// Reads in flight
    #[arg(long)]
    pub depth: u32,
    /// Slots
    #[arg(long)]
    pub slots: u32,
}

impl Settings {
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            SUBCOMMAND.to_owned(),
            format!("--device={}", self.device),
            format!("--block-bytes={}", self.block_bytes),
            format!("--depth={}", self.depth),
            format!("--slots={}", self.slots),
        ];
        arguments.extend(self.preadv2.then(|| "--preadv2".to_owned()));
        arguments
    }
}

/// What was found; each rate was measured on the same bytes of the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of libcufile.
    pub library: Option<String>,
    /// How cuFile's bytes came.
    pub mode: Option<Mode>,
    /// By cuFile, bytes per second.
    pub direct_bytes_per_second: Option<f64>,
    /// By way of slots, bytes per second.
    pub staged_bytes_per_second: Option<f64>,
    /// What is not known, and why.
    pub reason: Option<String>,
}

/// Starts a helper on `file`, which was opened past the page cache, and waits for its report.
///
/// Blocks until `timeout` and a little more, at most.
pub fn ask(settings: &Settings, file: BorrowedFd<'_>, timeout: Duration) -> Report {
    let found = start(settings, file).and_then(|mut child| {
        let ended = wait(&mut child, timeout);
        let mut report = last_report(&mut child)?;
        match ended? {
            true => {}
            false => {
                let doing = report.reason.take().unwrap_or_else(|| "it did not end".to_owned());
                report.reason = Some(format!("{doing}; the helper was ended after {timeout:?}"));
            }
        }
        Ok(report)
    });
    found.unwrap_or_else(|error| Report {
        reason: Some(format!("the helper that measures cannot be run: {error}")),
        ..Report::default()
    })
}

fn start(settings: &Settings, file: BorrowedFd<'_>) -> io::Result<Child> {
    // The binary that runs, even if another one is installed in its place by now.
    let mut command = Command::new("/proc/self/exe");
    command.args(settings.arguments());
    command.stdin(Stdio::from(file.try_clone_to_owned()?)).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn()
}

/// Whether the helper ends by itself; if not, it is killed.
fn wait(child: &mut Child, timeout: Duration) -> io::Result<bool> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let ends_within = |time: Duration| -> io::Result<bool> {
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let time = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], Some(&time)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    };
    if ends_within(timeout)? {
        child.wait()?;
        return Ok(true);
    }
    child.kill()?;
    if ends_within(KILL_TIMEOUT)? {
        child.wait()?;
    }
    Ok(false)
}

/// The last line that the helper has written, without waiting for more.
fn last_report(child: &mut Child) -> io::Result<Report> {
    let mut stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    rustix::io::ioctl_fionbio(&stdout, true)?;
    let mut text = vec![0; REPORT_BYTES_MAX];
    let mut length = 0;
    while length < text.len() {
        match stdout.read(&mut text[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    let lines = String::from_utf8_lossy(&text[..length]);
    let mut reports = lines.lines().rev().filter_map(|line| serde_json::from_str(line).ok());
    reports.next().ok_or_else(|| io::Error::other("it said nothing"))
}
