//! Faults on demand: which call fails, and how.

use cuda_sim_model::{Faults, entries};
use rustix::io::Errno;

use crate::abi::Code;

/// What a read or a write is called for a fault, whichever call it is part of.
pub(crate) const READ: &str = "read";
pub(crate) const WRITE: &str = "write";

/// What happens instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Code(Code),
    /// Of a transfer: the file system fails.
    Errno(Errno),
    /// Of a transfer: half of it is done.
    Short,
    /// Of a transfer: it goes by way of host memory, and nobody says so.
    Compat,
    /// The call never returns.
    Hang,
}

/// `CUFILE_SIM_FAULT`.
#[derive(Debug, Default)]
pub(crate) struct Plan(Faults<Effect>);

/// The effect of its name. Only transfers can fail as the file system does.
fn effect(function: &str, name: &str) -> Option<Effect> {
    let of_transfer = match name {
        "HANG" => return Some(Effect::Hang),
        "SHORT" => Effect::Short,
        "COMPAT" => Effect::Compat,
        "EIO" => Effect::Errno(Errno::IO),
        "ENOSPC" => Effect::Errno(Errno::NOSPC),
        "EINVAL" => Effect::Errno(Errno::INVAL),
        "ENOMEM" => Effect::Errno(Errno::NOMEM),
        "ESTALE" => Effect::Errno(Errno::STALE),
        code => return Code::named(code).map(Effect::Code),
    };
    [READ, WRITE].contains(&function).then_some(of_transfer)
}

impl Plan {
    /// Reads `function:n=EFFECT` and `function:n+=EFFECT`, separated by semicolons.
    pub(crate) fn parse(text: &str) -> Result<Plan, String> {
        let mut faults = Faults::default();
        for entry in entries(text) {
            let wrong = || format!("CUFILE_SIM_FAULT: {entry:?} is not understood");
            faults.add(entry, effect).ok_or_else(wrong)?;
        }
        Ok(Plan(faults))
    }

    /// Counts a call; what is to happen instead of it, if something is. A call that is to hang does so here.
    pub(crate) fn called(&self, function: &'static str) -> Option<Effect> {
        let effect = self.0.called(function)?;
        if effect == Effect::Hang {
            // In a loop, as threads are sometimes woken for nothing.
            loop {
                std::thread::park();
            }
        }
        Some(effect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_call_that_is_named_fails_and_no_other() {
        let plan = Plan::parse("cuFileDriverOpen:2=NVFS_SETUP_ERROR; read:2+=EIO;write:1=SHORT").unwrap();
        let effects: Vec<_> = (0..3).map(|_| plan.called("cuFileDriverOpen")).collect();
        assert_eq!(effects, [None, Some(Effect::Code(Code::NVFS_SETUP_ERROR)), None]);
        let effects: Vec<_> = (0..3).map(|_| plan.called(READ)).collect();
        assert_eq!(effects, [None, Some(Effect::Errno(Errno::IO)), Some(Effect::Errno(Errno::IO))]);
        assert_eq!(plan.called(WRITE), Some(Effect::Short));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in
            ["read", "read:0=EIO", "read:1=ENOSUCH", "cuFileDriverOpen:1=EIO", "cuFileBufRegister:1=SHORT"]
        {
            assert!(Plan::parse(text).is_err(), "{text}");
        }
    }
}
