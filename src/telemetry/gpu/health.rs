//! The health gate: from what is observed of a GPU to what has to be done about what is resident on it.
//!
//! Pure: no I/O and no clock. One [`Health`] for each GPU is told everything that is observed of it and says when there
//! is a new [`Verdict`].

/// XIDs that a program causes by what it does on the GPU. Its own context ends; the GPU and everyone else go on.
pub const APPLICATION_XIDS: [u64; 6] = [13, 31, 43, 45, 68, 109];
/// Uncorrectable memory errors that the GPU kept to the programs whose memory it was: 94 says so, 48 is the error
/// itself on GPUs that know no 94. What is resident may be wrong from now on.
const CONTAINED_XIDS: [u64; 2] = [48, 94];
/// 79: the GPU has fallen off the bus. 95: a memory error that was not contained. Both end only with a reset.
const LOST_XIDS: [u64; 2] = [79, 95];

/// Something that was observed of one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observation {
    /// The driver reported this XID.
    Xid(u64),
    /// The GPU answered. With it, if it counts them, the uncorrectable memory errors since the driver was loaded.
    Answered {
        /// The counter, not the difference.
        ecc_uncorrected: Option<u64>,
    },
    /// NVML or CUDA says that the GPU is gone: fallen off the bus, or in need of a reset.
    Lost,
}

/// What is to be done about a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Nothing: it is in order, or in order again.
    Healthy,
    /// Its memory had an error that stayed contained: resident copies must be dropped, and may be loaded again.
    Contained,
    /// It is gone until the daemon starts anew: no new loads, what was resident is forgotten.
    Lost,
}

impl Verdict {
    /// Every verdict.
    pub const ALL: [Verdict; 3] = [Verdict::Healthy, Verdict::Contained, Verdict::Lost];

    /// `healthy`, `contained` or `lost`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Verdict::Healthy => "healthy",
            Verdict::Contained => "contained",
            Verdict::Lost => "lost",
        }
    }
}

/// The state of one GPU.
#[derive(Debug, Clone, Copy)]
pub struct Health {
    verdict: Verdict,
    /// The counter at the last answer. The first one says what was before, which concerns nobody here.
    ecc_uncorrected: Option<u64>,
    /// Contained errors that XIDs have told of since that answer: the counter will show them once more.
    told: u64,
}

impl Default for Health {
    fn default() -> Self {
        Health { verdict: Verdict::Healthy, ecc_uncorrected: None, told: 0 }
    }
}

impl Health {
    /// The last verdict.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes in an observation. Says so if something is to be done: each contained error anew, a loss once, and once
    /// that the GPU is in order again after a contained error.
    pub fn observe(&mut self, observation: Observation) -> Option<Verdict> {
        if self.verdict == Verdict::Lost {
            return None;
        }
        let verdict = match observation {
            Observation::Lost => Verdict::Lost,
            Observation::Xid(xid) if LOST_XIDS.contains(&xid) => Verdict::Lost,
            Observation::Xid(xid) if CONTAINED_XIDS.contains(&xid) => {
                self.told = self.told.saturating_add(1);
                Verdict::Contained
            }
            // Those of programs, and those that say something else: counted by the caller.
            Observation::Xid(_) => return None,
            Observation::Answered { ecc_uncorrected } => {
                if self.new_errors(ecc_uncorrected) {
                    Verdict::Contained
                } else {
                    Verdict::Healthy
                }
            }
        };
        let news = verdict != self.verdict || verdict == Verdict::Contained;
        self.verdict = verdict;
        news.then_some(verdict)
    }

    /// Whether the counter shows more errors than XIDs have told of.
    fn new_errors(&mut self, counter: Option<u64>) -> bool {
        let Some(counter) = counter else { return false };
        let told = std::mem::take(&mut self.told);
        let before = self.ecc_uncorrected.replace(counter);
        // A counter that has become smaller begins anew: the driver was loaded again.
        before.and_then(|before| counter.checked_sub(before)).is_some_and(|more| more > told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Observation::{Lost as Gone, Xid};
    use Verdict::{Contained, Healthy, Lost};

    fn ecc(counter: u64) -> Observation {
        Observation::Answered { ecc_uncorrected: Some(counter) }
    }
    const NO_ECC: Observation = Observation::Answered { ecc_uncorrected: None };

    #[test]
    fn from_observations_to_verdicts() {
        type Case<'a> = (&'a str, &'a [(Observation, Option<Verdict>)]);
        let table: &[Case<'_>] = &[
            ("in order", &[(ecc(0), None), (ecc(0), None), (NO_ECC, None)]),
            ("old errors are nobody's", &[(ecc(7), None), (ecc(7), None)]),
            (
                "an error",
                &[(ecc(7), None), (ecc(8), Some(Contained)), (ecc(8), Some(Healthy)), (ecc(8), None)],
            ),
            ("two errors", &[(ecc(0), None), (ecc(1), Some(Contained)), (ecc(2), Some(Contained))]),
            ("the counter begins anew", &[(ecc(7), None), (ecc(0), None), (ecc(1), Some(Contained))]),
            ("94", &[(ecc(0), None), (Xid(94), Some(Contained)), (ecc(1), Some(Healthy)), (ecc(1), None)]),
            ("94 twice", &[(Xid(94), Some(Contained)), (Xid(94), Some(Contained)), (NO_ECC, Some(Healthy))]),
            (
                "94 hides no other error",
                &[(ecc(0), None), (Xid(94), Some(Contained)), (ecc(2), Some(Contained))],
            ),
            ("48", &[(Xid(48), Some(Contained))]),
            ("79", &[(Xid(79), Some(Lost)), (ecc(0), None), (Xid(94), None), (Gone, None)]),
            ("95", &[(Xid(95), Some(Lost))]),
            ("gone", &[(ecc(0), None), (Gone, Some(Lost)), (Gone, None)]),
            ("gone after an error", &[(Xid(94), Some(Contained)), (Gone, Some(Lost)), (NO_ECC, None)]),
            ("others", &[(Xid(63), None), (Xid(119), None), (Xid(0), None), (Xid(u64::MAX), None)]),
        ];
        for (name, steps) in table {
            let mut health = Health::default();
            for (number, (observation, verdict)) in steps.iter().enumerate() {
                assert_eq!(health.observe(*observation), *verdict, "{name}, step {number}: {observation:?}");
            }
        }
    }

    #[test]
    fn what_programs_do_condemns_no_gpu() {
        let mut health = Health::default();
        for xid in APPLICATION_XIDS {
            assert_eq!(health.observe(Xid(xid)), None, "{xid}");
        }
        assert_eq!(health.verdict(), Healthy);
    }
}
