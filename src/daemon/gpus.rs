//! Which GPUs are used, and why none is.

use std::rc::Rc;

use crate::config;
use crate::error::Result;
use crate::node::Node;
use crate::sys::cuda::{self, Context, Device, Found};
use crate::telemetry::gpu::{Observation, Verdict, Verdicts};
use crate::tier::gpu::Gpu;

use super::start_failed;

/// The GPUs that the configuration asks for; without any, why.
pub(super) fn open(config: &config::Gpu) -> Result<(Vec<Rc<Gpu>>, Option<String>)> {
    if config.budget_bytes == 0 {
        return Ok((Vec::new(), Some("gpu.budget_bytes is 0".to_owned())));
    }
    let found = match cuda::find() {
        Found::NoLibrary => {
            Err("there is no libcuda.so.1: no NVIDIA driver is installed, or it is not shown to \
            this container"
                .to_owned())
        }
        Found::Unusable(error) => Err(format!("the NVIDIA driver cannot be used: {error}")),
        Found::Devices(devices) => Ok(devices),
    };
    let devices = match found {
        Ok(devices) => devices,
        // Devices that are named must be there; a budget alone may be one configuration for all nodes.
        Err(why) if config.devices.is_empty() => {
            tracing::warn!(why, "no GPU is used");
            return Ok((Vec::new(), Some(why)));
        }
        Err(why) => return Err(start_failed(format!("gpu.devices names devices, but {why}"))),
    };
    let wanted = wanted(devices, &config.devices)?;
    let mut gpus = Vec::with_capacity(wanted.len());
    for device in wanted {
        let uuid = device.uuid.clone();
        if !device.shareable {
            return Err(start_failed(format!(
                "{uuid} ({}) cannot share memory by descriptor: leave it out of gpu.devices",
                device.name
            )));
        }
        tracing::info!(
            device = uuid,
            name = device.name,
            simulated = device.simulated(),
            memory_bytes = device.memory_bytes,
            budget_bytes = config.budget_bytes,
            "GPU is used"
        );
        let context =
            Context::new(device).map_err(|error| start_failed(format!("{uuid} cannot be used: {error}")))?;
        gpus.push(Gpu::new(context, config.budget_bytes));
    }
    let none = gpus.is_empty().then(|| "the NVIDIA driver shows no device".to_owned());
    Ok((gpus, none))
}

fn wanted(devices: Vec<Device>, uuids: &[String]) -> Result<Vec<Device>> {
    if uuids.is_empty() {
        return Ok(devices);
    }
    let find = |uuid: &String| {
        devices.iter().find(|device| device.uuid == *uuid).cloned().ok_or_else(|| {
            let known: Vec<_> = devices.iter().map(|device| device.uuid.as_str()).collect();
            start_failed(format!("gpu.devices names {uuid}, and the driver shows {}", known.join(", ")))
        })
    };
    uuids.iter().map(find).collect()
}

/// Does what follows from the health of GPUs, as long as the daemon runs: after a contained memory error what was
/// resident is not handed out any more, and is loaded anew when it is asked for; a device that is lost is not used.
pub(super) async fn act_on(mut verdicts: Verdicts, node: Rc<Node>) {
    while let Some((uuid, verdict)) = verdicts.recv().await {
        let gpus = node.residency.gpus().iter();
        let Some(index) = gpus.into_iter().position(|gpu| gpu.context().device().uuid == uuid) else {
            continue;
        };
        match verdict {
            Verdict::Healthy => {}
            Verdict::Contained => node.residency.doubt(index),
            Verdict::Lost => node.residency.lose(index),
        }
    }
}

/// Tells the monitor of devices that CUDA has found lost, so that the metrics say so too; as long as the daemon runs.
pub(super) async fn report_losses(node: Rc<Node>) {
    loop {
        node.residency.lost_one().await;
        for gpu in node.residency.gpus().iter().filter(|gpu| gpu.lost()) {
            // It knows what it was told before.
            node.monitor.observe(&gpu.context().device().uuid, Observation::Lost).await;
        }
    }
}
