//! Faults on demand: which call fails, with which code; and which device is lost, after how many operations.

use std::collections::BTreeMap;

use cuda_sim_model::{Faults, entries};

use crate::abi::Code;

/// What a copy is called for a fault, when it runs and not when it is submitted.
pub(crate) const COPY: &str = "copy";

/// `CUDA_SIM_FAULT`.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    calls: Faults<Code>,
    /// Device index → operations after which it is lost.
    lost: BTreeMap<usize, u64>,
}

impl Plan {
    /// Reads `function:n=CODE`, `function:n+=CODE` and `device:index:n=LOST`, separated by semicolons.
    pub(crate) fn parse(text: &str) -> Result<Plan, String> {
        let mut plan = Plan::default();
        for entry in entries(text) {
            plan.add(entry).ok_or_else(|| format!("CUDA_SIM_FAULT: {entry:?} is not understood"))?;
        }
        Ok(plan)
    }

    fn add(&mut self, entry: &str) -> Option<()> {
        let Some(device) = entry.strip_prefix("device:") else {
            let code = |name: &str| Code::named(name).filter(|code| *code != Code::SUCCESS);
            return self.calls.add(entry, |_, name| code(name));
        };
        let (index, operations) = device.strip_suffix("=LOST")?.split_once(':')?;
        self.lost.insert(index.parse().ok()?, operations.parse().ok()?);
        Some(())
    }

    /// Counts a call; the code that it is to fail with, if it is.
    pub(crate) fn called(&self, function: &'static str) -> Option<Code> {
        self.calls.called(function)
    }

    /// Operations after which the device is lost, if it is to be.
    pub(crate) fn lost_after(&self, device: usize) -> Option<u64> {
        self.lost.get(&device).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_call_that_is_named_fails_and_no_other() {
        let plan = Plan::parse("cuMemCreate:2=OUT_OF_MEMORY; cuMemMap:2+=UNKNOWN").unwrap();
        let codes: Vec<_> = (0..4).map(|_| plan.called("cuMemCreate")).collect();
        assert_eq!(codes, [None, Some(Code::OUT_OF_MEMORY), None, None]);
        let codes: Vec<_> = (0..3).map(|_| plan.called("cuMemMap")).collect();
        assert_eq!(codes, [None, Some(Code::UNKNOWN), Some(Code::UNKNOWN)]);
        assert_eq!(Plan::parse("device:1:20=LOST").unwrap().lost_after(1), Some(20));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in
            ["cuInit", "cuInit:0=UNKNOWN", "cuInit:1=NO_SUCH", "cuInit:1=SUCCESS", "device:0:1=UNKNOWN"]
        {
            assert!(Plan::parse(text).is_err(), "{text}");
        }
    }
}
