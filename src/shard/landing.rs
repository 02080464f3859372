//! Where reads land that could land in place: in place, or in a slot and be copied. Measured, not assumed.
//!
//! A drive that writes to memory by itself fills a region at no cost, and reads should land in place. Where a hypervisor
//! copies instead, writing to gigabytes of cold memory holds it up; then it is faster to let it write to few, hot slots
//! and to stream the bytes to their place while the next reads are under way (docs/decisions/0006-landing.md).
//! So a shard thread tries both on what it has to read anyway, and keeps the faster for a while.

use std::time::{Duration, Instant};

/// Bytes of one trial. The first half of each is not timed: reads of the trial before are still under way.
const TRIAL_BYTES: u64 = 32 << 20;
/// Trials of each way before one is chosen; they alternate, so that a disturbance does not hit one alone.
const TRIALS: usize = 2;
/// Bytes read the chosen way before both are tried again.
const KEEP_BYTES: u64 = 16 << 30;
/// Landing in slots costs a copy, so it has to be faster by this much.
const ADVANTAGE: f64 = 1.05;

/// How a read that could land in place lands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Landing {
    /// In its place in the region.
    InPlace,
    /// In a slot, to be copied.
    Slot,
}

/// Chooses, by trials.
#[derive(Debug)]
pub(super) struct Choice {
    current: Landing,
    /// Bytes read in the current trial, or since the choice.
    bytes: u64,
    /// When the timed half of the current trial began.
    timed: Option<Instant>,
    /// Trials done: even ones in place, odd ones by slots.
    trial: usize,
    took: [Duration; 2],
}

impl Choice {
    pub(super) fn new() -> Choice {
        Choice { current: Landing::InPlace, bytes: 0, timed: None, trial: 0, took: [Duration::ZERO; 2] }
    }

    /// How the next read should land.
    pub(super) fn current(&self) -> Landing {
        self.current
    }

    /// The drive stood idle: a trial that was going on says nothing.
    pub(super) fn idle(&mut self) {
        if self.trial < 2 * TRIALS {
            self.bytes = 0;
            self.timed = None;
        }
    }

    /// Bytes have arrived from the drive at `now`, landed either way.
    pub(super) fn arrived(&mut self, bytes: u64, now: Instant) {
        self.bytes += bytes;
        if self.trial >= 2 * TRIALS {
            if self.bytes >= KEEP_BYTES {
                *self = Choice::new();
            }
            return;
        }
        match self.timed {
            None if self.bytes >= TRIAL_BYTES / 2 => self.timed = Some(now),
            Some(began) if self.bytes >= TRIAL_BYTES => {
                self.took[self.trial % 2] += now.duration_since(began);
                self.trial += 1;
                self.bytes = 0;
                self.timed = None;
                self.current = if self.trial.is_multiple_of(2) { Landing::InPlace } else { Landing::Slot };
                if self.trial == 2 * TRIALS {
                    let [in_place, slot] = self.took;
                    let faster = in_place.as_secs_f64() > slot.as_secs_f64() * ADVANTAGE;
                    self.current = if faster { Landing::Slot } else { Landing::InPlace };
                    tracing::debug!(?in_place, ?slot, chosen = ?self.current, "landing chosen");
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the trials with a drive that takes this many microseconds a MiB for each way.
    fn chosen(in_place: u64, slot: u64) -> Landing {
        let mut choice = Choice::new();
        let mut now = Instant::now();
        for _ in 0..1024 {
            let micros = if choice.current() == Landing::InPlace { in_place } else { slot };
            now += Duration::from_micros(micros);
            choice.arrived(1 << 20, now);
        }
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
    fn both_are_tried_again_after_a_while() {
        let mut choice = Choice::new();
        let mut now = Instant::now();
        let mut tried = [0u64; 2];
        for _ in 0..(KEEP_BYTES + (1 << 30)) >> 20 {
            tried[usize::from(choice.current() == Landing::Slot)] += 1;
            now += Duration::from_micros(if choice.current() == Landing::InPlace { 300 } else { 900 });
            choice.arrived(1 << 20, now);
        }
        assert!(tried[1] >= (2 * 2 * TRIAL_BYTES) >> 20, "{tried:?}");
    }
}
