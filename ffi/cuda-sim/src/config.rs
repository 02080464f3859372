//! What the simulated machine is made of: read from the environment once, before the first call is answered.

use std::path::PathBuf;

pub(crate) use cuda_sim_devices::{Device as Spec, GRANULARITY_BYTES as GRANULARITY};

use crate::fault::Plan;

/// Everything that the environment says.
#[derive(Debug)]
pub(crate) struct Config {
    /// Shared by all processes of one simulated machine.
    pub(crate) directory: PathBuf,
    /// Those that this process sees, in its order.
    pub(crate) devices: Vec<Spec>,
    pub(crate) faults: Plan,
    /// A file that gets a line for each call.
    pub(crate) trace: Option<PathBuf>,
}

fn variable(name: &str) -> Option<String> {
    #[allow(
        clippy::disallowed_methods,
        reason = "a driver is configured by its environment: it has no other door"
    )]
    std::env::var(name).ok()
}

impl Config {
    /// Reads the environment. An error says what is wrong with it.
    pub(crate) fn read() -> Result<Config, String> {
        let all = cuda_sim_devices::load()?;
        Ok(Config {
            directory: cuda_sim_devices::directory(),
            devices: match variable("CUDA_VISIBLE_DEVICES") {
                Some(list) => visible(&all, &list),
                None => all,
            },
            faults: Plan::parse(&variable("CUDA_SIM_FAULT").unwrap_or_default())?,
            trace: variable("CUDA_SIM_TRACE").map(PathBuf::from),
        })
    }
}

/// `CUDA_VISIBLE_DEVICES`: indices and UUIDs, or beginnings of UUIDs; what is not a device ends the list, as it does for a
/// real driver.
fn visible(all: &[Spec], list: &str) -> Vec<Spec> {
    list.split(',')
        .map(str::trim)
        .map_while(|entry| match entry.parse::<usize>() {
            Ok(index) => all.get(index),
            Err(_) if entry.starts_with("GPU-") || entry.starts_with("MIG-") => all.iter().find(|device| {
                device
                    .uuid_text()
                    .starts_with(&entry.to_ascii_lowercase().replace("gpu-", "GPU-").replace("mig-", "MIG-"))
            }),
            Err(_) => None,
        })
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_devices_are_named_by_index_or_uuid_until_one_is_not_there() {
        let list = r#"[{"memory_bytes": 2097152}, {"memory_bytes": 2097152, "mig": true}]"#;
        let all = cuda_sim_devices::parse(list).unwrap();
        let indices = |list| visible(&all, list).iter().map(|device| device.index).collect::<Vec<_>>();
        assert_eq!(indices("1,0"), [1, 0]);
        assert_eq!(indices("MIG-51D0C0DA-0000-4000-8000-000000000001,0"), [1, 0]);
        assert_eq!(indices("0,7,1"), [0]);
        assert_eq!(indices(""), [] as [u32; 0]);
    }
}
