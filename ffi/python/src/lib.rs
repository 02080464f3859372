//! The native part of the Python package `lodestream`: the Rust client with Python's objects around it.
//!
//! Arrays, types and frameworks are the package's; here are connections, jobs, mappings and what keeps them alive. The
//! interpreter's lock is released while the daemon is waited for.

mod attached;
mod convert;
mod dlpack;
mod error;
mod lease;
mod node;
mod source;

use lodestream::sys::cuda::{self, Found};
use pyo3::prelude::*;

/// The GPUs that this process is shown, in the driver's order: (UUID, name, whether it is simulated). Makes no context.
#[pyfunction]
fn gpus(py: Python<'_>) -> Vec<(String, String, bool)> {
    match py.detach(cuda::find) {
        Found::Devices(devices) => {
            let device = |device: cuda::Device| {
                let simulated = device.simulated();
                (device.uuid, device.name, simulated)
            };
            devices.into_iter().map(device).collect()
        }
        Found::NoLibrary | Found::Unusable(_) => Vec::new(),
    }
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(gpus, module)?)?;
    module.add_class::<node::Node>()?;
    module.add_class::<attached::Attached>()?;
    module.add_class::<attached::Region>()
}
