//! Faults on demand: which call fails, with which code; and which device is lost, after how many operations.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::abi::Code;
use crate::sim::lock;

/// What a copy is called for a fault, when it runs and not when it is submitted.
pub(crate) const COPY: &str = "copy";

/// `CUDA_SIM_FAULT`, and how often each function was called.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    rules: Vec<Rule>,
    /// Device index → operations after which it is lost.
    lost: BTreeMap<usize, u64>,
    calls: Mutex<BTreeMap<&'static str, u64>>,
}

#[derive(Debug)]
struct Rule {
    function: String,
    /// From 1.
    call: u64,
    /// Every later call as well.
    later: bool,
    code: Code,
}

impl Plan {
    /// Reads `function:n=CODE`, `function:n+=CODE` and `device:index:n=LOST`, separated by semicolons.
    pub(crate) fn parse(text: &str) -> Result<Plan, String> {
        let mut plan = Plan::default();
        for entry in text.split(';').map(str::trim).filter(|entry| !entry.is_empty()) {
            let wrong = || format!("CUDA_SIM_FAULT: {entry:?} is not understood");
            let (what, code) = entry.split_once('=').ok_or_else(wrong)?;
            if let Some(device) = what.strip_prefix("device:") {
                let (index, operations) = device.split_once(':').ok_or_else(wrong)?;
                let index = index.parse().map_err(|_| wrong())?;
                let operations = operations.parse().map_err(|_| wrong())?;
                if code != "LOST" {
                    return Err(wrong());
                }
                plan.lost.insert(index, operations);
                continue;
            }
            let (function, call) = what.split_once(':').ok_or_else(wrong)?;
            let (call, later) = call.strip_suffix('+').map_or((call, false), |call| (call, true));
            plan.rules.push(Rule {
                function: function.to_owned(),
                call: call.parse().ok().filter(|call| *call > 0).ok_or_else(wrong)?,
                later,
                code: Code::named(code).filter(|code| *code != Code::SUCCESS).ok_or_else(wrong)?,
            });
        }
        Ok(plan)
    }

    /// Counts a call; the code that it is to fail with, if it is.
    pub(crate) fn called(&self, function: &'static str) -> Option<Code> {
        if self.rules.is_empty() {
            return None;
        }
        let mut calls = lock(&self.calls);
        let count = calls.entry(function).or_insert(0);
        *count += 1;
        self.rules
            .iter()
            .find(|rule| {
                rule.function == function && (rule.call == *count || (rule.later && rule.call < *count))
            })
            .map(|rule| rule.code)
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
