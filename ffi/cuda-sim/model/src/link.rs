//! Links with a modelled bandwidth.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The end of a modelled transfer is waited for by sleeping up to this long before it, and by spinning from there.
const SPIN: Duration = Duration::from_micros(60);

/// A link that carries one transfer at a time, in one direction.
#[derive(Debug, Default)]
pub struct Link {
    /// None: as fast as the machine copies.
    bytes_per_second: Option<u64>,
    /// When it has carried all that it was given.
    busy_until: Mutex<Option<Instant>>,
}

impl Link {
    /// None: as fast as the machine copies.
    pub fn new(bytes_per_second: Option<u64>) -> Link {
        Link { bytes_per_second, busy_until: Mutex::new(None) }
    }

    /// Takes the link's next free time for so many bytes; the end of it.
    pub fn take(&self, bytes: u64) -> Option<Instant> {
        let seconds = bytes as f64 / self.bytes_per_second? as f64;
        let now = Instant::now();
        // A panic while it was locked cannot have left it half-made.
        let mut busy_until = self.busy_until.lock().unwrap_or_else(PoisonError::into_inner);
        let end = busy_until.map_or(now, |until| until.max(now)) + Duration::from_secs_f64(seconds);
        *busy_until = Some(end);
        Some(end)
    }
}

/// Waits for the end of a transfer.
pub fn wait_until(end: Instant) {
    let left = end.saturating_duration_since(Instant::now());
    if left > SPIN {
        #[allow(
            clippy::disallowed_methods,
            reason = "the time that a modelled transfer takes is the behaviour"
        )]
        std::thread::sleep(left - SPIN);
    }
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}
