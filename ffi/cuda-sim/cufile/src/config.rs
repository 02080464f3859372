//! What this simulated node is able to: read from the environment once, at the first call.

use std::io::{self, Write};
use std::sync::OnceLock;

use cuda_sim_model::Link;

use crate::fault::Plan;

/// By which way the node can move bytes between drives and GPUs without the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Ability {
    /// nvidia-fs is loaded.
    Nvfs,
    /// Kernel, driver and GPU can do PCI P2PDMA.
    P2pdma,
    /// None: as most machines are.
    #[default]
    Compat,
}

/// Everything that the environment says.
#[derive(Debug, Default)]
pub(crate) struct Config {
    pub(crate) ability: Ability,
    /// What direct transfers of this process share.
    pub(crate) direct: Link,
    pub(crate) faults: Plan,
}

fn variable(name: &str) -> Option<String> {
    #[allow(
        clippy::disallowed_methods,
        reason = "a simulated library has no other door than its environment"
    )]
    std::env::var(name).ok()
}

impl Config {
    fn read() -> Result<Config, String> {
        let ability = match variable("CUFILE_SIM_MODE").as_deref() {
            None => Ability::default(),
            Some("nvfs") => Ability::Nvfs,
            Some("p2pdma") => Ability::P2pdma,
            Some("compat") => Ability::Compat,
            Some(other) => return Err(format!("CUFILE_SIM_MODE: {other:?} is none of nvfs, p2pdma, compat")),
        };
        let bytes_per_second = match variable("CUFILE_SIM_RATE") {
            None => None,
            Some(text) => match text.parse() {
                Ok(rate) if rate > 0 => Some(rate),
                _ => return Err(format!("CUFILE_SIM_RATE: {text:?} is no number of bytes per second")),
            },
        };
        let faults = Plan::parse(&variable("CUFILE_SIM_FAULT").unwrap_or_default())?;
        Ok(Config { ability, direct: Link::new(bytes_per_second), faults })
    }

    /// The configuration; none if it is not understood, which has been said on standard error.
    pub(crate) fn get() -> Option<&'static Config> {
        static CONFIG: OnceLock<Option<Config>> = OnceLock::new();
        let read =
            || Config::read().map_err(|wrong| writeln!(io::stderr(), "simulated cuFile: {wrong}")).ok();
        CONFIG.get_or_init(read).as_ref()
    }
}
