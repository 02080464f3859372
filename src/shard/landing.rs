//! Where reads land that could land in place: in place, or in a slot and be copied. Measured, not assumed.
//!
//! A drive that writes to memory by itself fills a region at no cost, and reads should land in place. Where a hypervisor
//! copies instead, writing to gigabytes of cold memory holds it up; then it is faster to let it write to few, hot slots
//! and to stream the bytes to their place while the next reads are under way (docs/decisions/0006-landing.md).
//! So a shard thread times both on what it has to read anyway, and goes on with the faster.

use std::time::Instant;

/// Bytes after a change of landing that are not timed: reads that landed the other way are still under way.
const SETTLE_BYTES: u64 = 8 << 20;
/// Bytes that are timed at a time.
const WINDOW_BYTES: u64 = 32 << 20;
/// Windows of each way that are remembered; their median counts, so that one disturbance does not decide.
const WINDOWS: usize = 3;
/// Bytes read one way before the other is timed again.
const KEEP_BYTES: u64 = 4 << 30;
/// Landing in slots costs a copy, so it has to be faster by this much.
const ADVANTAGE: f64 = 1.05;
/// Slots are left only if landing in place is faster by this much: no going to and fro.
const LEAVE: f64 = 1.10;

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
    /// Seconds for the last windows, either way.
    seconds: [Windows; 2],
    /// Bytes in the current window, or before it while reads settle.
    bytes: u64,
    /// When the current window began.
    began: Option<Instant>,
    /// Bytes since the other way was timed.
    kept: u64,
}

/// Seconds of the last windows.
#[derive(Debug, Clone, Copy, Default)]
struct Windows {
    seconds: [f64; WINDOWS],
    count: usize,
}

impl Windows {
    fn push(&mut self, seconds: f64) {
        self.seconds[self.count % WINDOWS] = seconds;
        self.count += 1;
    }

    /// The median, once there are enough.
    fn median(&self) -> Option<f64> {
        let mut sorted = self.seconds;
        sorted.sort_by(f64::total_cmp);
        (self.count >= WINDOWS).then_some(sorted[WINDOWS / 2])
    }
}

impl Choice {
    pub(super) fn new() -> Choice {
        Choice { current: Landing::InPlace, seconds: [Windows::default(); 2], bytes: 0, began: None, kept: 0 }
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
                self.seconds[self.current as usize].push(seconds);
                self.began = Some(now);
                self.bytes = 0;
                self.choose();
            }
            _ => {}
        }
    }

    /// Until each way has been timed often enough they alternate; then the faster is kept, and the other is timed now
    /// and then.
    fn choose(&mut self) {
        let chosen = match (self.seconds.map(|windows| windows.median()), self.current) {
            ([Some(_), Some(_)], _) if self.kept >= KEEP_BYTES => self.current.other(),
            ([Some(in_place), Some(slot)], Landing::InPlace) if in_place > slot * ADVANTAGE => Landing::Slot,
            ([Some(in_place), Some(slot)], Landing::Slot) if slot > in_place * LEAVE => Landing::InPlace,
            ([Some(in_place), Some(slot)], Landing::Slot) if self.kept < 2 * WINDOW_BYTES => {
                // Timed again only: back, unless it is the faster now.
                if in_place > slot * ADVANTAGE { Landing::Slot } else { Landing::InPlace }
            }
            ([Some(_), Some(_)], current) => current,
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
        assert!(landed[0] < 400, "{landed:?}");
    }

    #[test]
    fn both_are_timed_again_after_a_while_at_little_cost() {
        let mut choice = Choice::new();
        let mib = 3 * (KEEP_BYTES >> 20);
        let landed = read(&mut choice, mib, |landing, _| if landing == Landing::InPlace { 300 } else { 900 });
        assert!(landed[1] >= 2 * (WINDOW_BYTES >> 20) && landed[1] < mib / 20, "{landed:?}");
    }
}
