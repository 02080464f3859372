//! Measuring of what a load is limited by: reads of a drive, memory. Used by `bench` and by `doctor`, and by nothing of the daemon.
//!
//! Rules of honest figures: contestants run in every round, in another order each time, and are compared within
//! their round only, because drives drift; what is reported is a median with its spread.

pub mod drive;
pub mod machine;
pub mod memory;
pub mod rounds;

use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};

/// What one timed run took.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Run {
    /// Bytes moved.
    pub bytes: u64,
    /// Wall time, seconds.
    pub seconds: f64,
    /// CPU time of this process, user and system, seconds.
    pub cpu_seconds: f64,
}

impl Run {
    /// Bytes per second.
    pub fn rate(self) -> f64 {
        self.bytes as f64 / self.seconds.max(1e-9)
    }

    /// CPU-seconds for each GiB moved.
    pub fn cpu_seconds_per_gib(self) -> f64 {
        self.cpu_seconds / (self.bytes.max(1) as f64 / (1u64 << 30) as f64)
    }
}

/// Wall time and CPU time of this process from its start on.
#[derive(Debug)]
struct Watch {
    begun: Instant,
    cpu: f64,
}

impl Watch {
    fn start() -> Watch {
        Watch { cpu: cpu_seconds(), begun: Instant::now() }
    }

    fn run(&self, bytes: u64) -> Run {
        Run { bytes, seconds: self.begun.elapsed().as_secs_f64(), cpu_seconds: cpu_seconds() - self.cpu }
    }
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
