//! Where reads land that could land in place: in place, or in a slot and be copied. Measured, not assumed.
//!
//! A drive that writes to memory by itself fills a region at no cost, and reads should land in place. Where a hypervisor
//! copies instead, writing to gigabytes of cold memory holds it up; then it is faster to let it write to few, hot slots
//! and to stream the bytes to their place while the next reads are under way (docs/decisions/0006-landing.md).
//! So a shard thread times both on what it has to read anyway, and goes on with the faster.

use std::time::Instant;

/// Bytes after a change of landing that are not timed: reads that landed the other way are still under way.
const SETTLE_BYTES: u64 = 16 << 20;
/// Bytes that are timed at a time.
const WINDOW_BYTES: u64 = 16 << 20;
/// Bytes read one way before the other is timed again.
const KEEP_BYTES: u64 = 16 << 30;
/// Landing in slots costs a copy, so it has to be faster by this much.
const ADVANTAGE: f64 = 1.05;
/// Weight of the newest window: old ones fade, and a disturbance does not decide alone.
const NEWEST: f64 = 0.25;

/// How a read that could land in place lands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Landing {
    /// In its place in the region.
    InPlace,
    /// In a slot, to be copied.
    Slot,
}

impl Landing {
    fn other(self) -> Landing {
        match self {
            Landing::InPlace => Landing::Slot,
            Landing::Slot => Landing::InPlace,
        }
    }
}

/// Chooses between the two.
#[derive(Debug)]
pub(super) struct Choice {
    current: Landing,
    /// Seconds for a window, either way.
    seconds: [Option<f64>; 2],
    /// Bytes in the current window, or before it while reads settle.
    bytes: u64,
    /// When the current window began.
    began: Option<Instant>,
    /// Bytes since the other way was timed.
    kept: u64,
}

impl Choice {
    pub(super) fn new() -> Choice {
        Choice { current: Landing::InPlace, seconds: [None; 2], bytes: 0, began: None, kept: 0 }
    }

    /// How the next read should land.
    pub(super) fn current(&self) -> Landing {
        self.current
    }

    /// The drive stood idle: the window that was open says nothing.
    pub(super) fn idle(&mut self) {
        self.bytes = 0;
        self.began = None;
    }

    /// Bytes have arrived from the drive at `now`, landed either way.
    pub(super) fn arrived(&mut self, bytes: u64, now: Instant) {
        self.bytes += bytes;
        self.kept += bytes;
        match self.began {
            None if self.bytes >= SETTLE_BYTES => {
                self.began = Some(now);
                self.bytes = 0;
            }
            Some(began) if self.bytes >= WINDOW_BYTES => {
                let seconds =
                    now.duration_since(began).as_secs_f64() * WINDOW_BYTES as f64 / self.bytes as f64;
                let own = &mut self.seconds[self.current as usize];
                *own = Some(own.map_or(seconds, |before| before + NEWEST * (seconds - before)));
                self.began = Some(now);
                self.bytes = 0;
                if self.kept >= KEEP_BYTES {
                    self.seconds[self.current.other() as usize] = None;
                }
                self.choose();
            }
            _ => {}
        }
    }

    fn choose(&mut self) {
        let chosen = match self.seconds {
            [Some(in_place), Some(slot)] if in_place > slot * ADVANTAGE => Landing::Slot,
            [Some(_), Some(_)] => Landing::InPlace,
            _ => self.current.other(),
        };
        if chosen != self.current {
            tracing::debug!(seconds = ?self.seconds, ?chosen, "landing");
            self.current = chosen;
            self.kept = 0;
            self.idle();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Reads so many MiB with a drive that takes as many microseconds for one as `micros` says; → MiB by landing.
    fn read(choice: &mut Choice, mib: u64, micros: impl Fn(Landing, u64) -> u64) -> [u64; 2] {
        let mut now = Instant::now();
        let mut landed = [0; 2];
        for number in 0..mib {
            landed[choice.current() as usize] += 1;
            now += Duration::from_micros(micros(choice.current(), number));
            choice.arrived(1 << 20, now);
        }
        landed
    }

    fn chosen(in_place: u64, slot: u64) -> Landing {
        let mut choice = Choice::new();
        read(&mut choice, 1024, |landing, _| if landing == Landing::InPlace { in_place } else { slot });
        choice.current()
    }

    #[test]
    fn the_faster_way_is_kept() {
        assert_eq!(chosen(300, 300), Landing::InPlace, "a tie costs no copy");
        assert_eq!(chosen(300, 290), Landing::InPlace);
        assert_eq!(chosen(450, 300), Landing::Slot);
        assert_eq!(chosen(300, 450), Landing::InPlace);
    }

    #[test]
    fn a_way_that_looked_good_only_at_first_is_left() {
        let mut choice = Choice::new();
        let landed = read(&mut choice, 1024, |landing, number| match landing {
            Landing::InPlace if number < 100 => 250,
            Landing::InPlace => 450,
            Landing::Slot => 300,
        });
        assert_eq!(choice.current(), Landing::Slot);
        assert!(landed[0] < 250, "{landed:?}");
    }

    #[test]
    fn both_are_timed_again_after_a_while_at_little_cost() {
        let mut choice = Choice::new();
        let mib = 3 * (KEEP_BYTES >> 20);
        let landed = read(&mut choice, mib, |landing, _| if landing == Landing::InPlace { 300 } else { 900 });
        assert!(landed[1] >= 2 * (WINDOW_BYTES >> 20) && landed[1] < mib / 100, "{landed:?}");
    }
}
