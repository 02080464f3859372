//! What is attached: where tensors lie, and the memory that they lie in, each kept for as long as something uses it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use lodestream::api::methods::{AttachReply, RegionView};
use lodestream::client::{self, Region as ClientRegion, Timings};
use lodestream::sys::cuda::{self, Found};
use lodestream::sys::map::ReadMap;
use lodestream::{Code, Error};
use pyo3::exceptions::{PyAttributeError, PyIndexError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCapsule, PyDict, PyTuple};

use crate::dlpack;
use crate::error::{Failure, error};
use crate::lease::Lease;
use crate::node::{Shared, lock};
use crate::source::Named;

/// The client's object. Memory on GPUs is taken apart with it, and its addresses end.
pub(crate) struct Held {
    attached: Mutex<Option<client::Attached>>,
    process: u32,
}

impl Drop for Held {
    fn drop(&mut self) {
        let attached = lock(&self.attached).take();
        if self.process != std::process::id() {
            // A driver cannot be called in a forked child. Mappings of the host tier go with the process.
            std::mem::forget(attached);
        }
    }
}

#[derive(Clone)]
enum Place {
    Host(Arc<ReadMap>),
    Gpu { held: Arc<Held>, region: usize, address: u64, bytes: u64, ordinal: i32 },
}

/// The memory of a region. The mapping and the lease last as long as this.
#[derive(Clone)]
pub(crate) struct Memory {
    place: Place,
    /// Kept, and given back with the last clone.
    _lease: Arc<Lease>,
}

impl Memory {
    /// Where a range begins; `None` if it is not in the region. On a GPU an address of the device.
    pub(crate) fn address(&self, offset: u64, nbytes: u64) -> Option<usize> {
        let (start, bytes) = match &self.place {
            Place::Host(map) => (map.as_slice().as_ptr().addr(), map.as_slice().len() as u64),
            Place::Gpu { address, bytes, .. } => (usize::try_from(*address).ok()?, *bytes),
        };
        offset.checked_add(nbytes).filter(|end| *end <= bytes)?;
        start.checked_add(usize::try_from(offset).ok()?)
    }

    /// The GPU's number in this process; `None` on the host tier.
    pub(crate) fn ordinal(&self) -> Option<i32> {
        match &self.place {
            Place::Host(_) => None,
            Place::Gpu { ordinal, .. } => Some(*ordinal),
        }
    }

    /// Copies a range out.
    fn read(&self, offset: u64, target: &mut [u8]) -> Result<(), Error> {
        let outside = || Error::new(Code::ClientMap, "the range does not lie in its region");
        match &self.place {
            Place::Host(map) => {
                let start = usize::try_from(offset).map_err(|_| outside())?;
                let end = start.checked_add(target.len()).ok_or_else(outside)?;
                target.copy_from_slice(map.as_slice().get(start..end).ok_or_else(outside)?);
                Ok(())
            }
            Place::Gpu { held, region, .. } => {
                let attached = lock(&held.attached);
                let regions = attached.as_ref().map(client::Attached::regions).unwrap_or_default();
                match regions.get(*region) {
                    Some(ClientRegion::Gpu(imported)) => {
                        let read = imported.read(offset, target);
                        read.map_err(|error| client::ClientError::Device(error).into())
                    }
                    _ => Err(outside()),
                }
            }
        }
    }
}

/// One region of what is attached.
#[pyclass(frozen, module = "lodestream._native")]
pub(crate) struct Region {
    memory: Memory,
    bytes: u64,
    /// `host`, or `gpu:` and a UUID.
    #[pyo3(get)]
    device: String,
    /// Whether it is the memory of a simulated GPU, which no framework knows.
    #[pyo3(get)]
    simulated: bool,
}

#[pymethods]
impl Region {
    /// Length, bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.bytes
    }

    /// The region's bytes for numpy: read-only. Only on the host tier.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (Place::Host(_), Some(address)) = (&self.memory.place, self.memory.address(0, self.bytes)) else {
            return Err(PyAttributeError::new_err("the region is not in this process"));
        };
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", (self.bytes,))?;
        interface.set_item("typestr", "|u1")?;
        interface.set_item("data", (address, true))?;
        Ok(interface)
    }

    /// Bytes of the region as a DLPack capsule of type uint8, without a copy.
    fn dlpack<'py>(&self, py: Python<'py>, offset: u64, nbytes: u64) -> PyResult<Bound<'py, PyCapsule>> {
        dlpack::capsule(py, self.memory.clone(), offset, nbytes)?
            .ok_or_else(|| PyIndexError::new_err("the range does not lie in the region"))
    }

    /// A copy of bytes of the region, also from a GPU.
    fn read<'py>(&self, py: Python<'py>, offset: u64, nbytes: u64) -> Result<Bound<'py, PyBytes>, Failure> {
        if self.memory.address(offset, nbytes).is_none() {
            return Err(error(Code::ClientMap, "the range does not lie in the region"));
        }
        let length = usize::try_from(nbytes).map_err(|_| error(Code::ClientMap, "the range is too long"))?;
        Ok(PyBytes::new_with(py, length, |target| {
            py.detach(|| self.memory.read(offset, target)).map_err(|error| Failure::from(error).into())
        })?)
    }
}

/// A region of what is attached, before it is looked at.
struct Part {
    place: Place,
    bytes: u64,
    device: String,
    simulated: bool,
}

/// What an attach gave: where tensors and files lie, its regions, and its lease.
#[pyclass(frozen, module = "lodestream._native")]
pub(crate) struct Attached {
    shared: Arc<Shared>,
    named: Named,
    held: Arc<Held>,
    /// What the client's object said at first. Except for the lease, it does not change: locks are not waited for with
    /// the interpreter's lock.
    reply: AttachReply,
    timings: Timings,
    parts: Vec<Part>,
    lease: Mutex<Arc<Lease>>,
}

impl Attached {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        named: Named,
        attached: client::Attached,
        lease: Lease,
    ) -> Result<Attached, Failure> {
        let (reply, timings) = (attached.reply().clone(), attached.timings());
        let held = Arc::new(Held { attached: Mutex::default(), process: std::process::id() });
        let parts = attached.regions().iter().enumerate().zip(&reply.regions);
        let parts = parts.map(|((number, region), view)| part(&held, number, region, view));
        let parts = parts.collect::<Result<Vec<_>, Failure>>()?;
        *lock(&held.attached) = Some(attached);
        let lease = Mutex::new(Arc::new(lease));
        Ok(Attached { shared: Arc::clone(shared), named, held, reply, timings, parts, lease })
    }
}

/// What a region is made of.
fn part(held: &Arc<Held>, number: usize, region: &ClientRegion, view: &RegionView) -> Result<Part, Failure> {
    let (place, simulated) = match region {
        ClientRegion::Host(map) => (Place::Host(Arc::clone(map)), false),
        ClientRegion::Gpu(imported) => {
            let device = imported.context().device();
            let place = Place::Gpu {
                held: Arc::clone(held),
                region: number,
                address: imported.device_address(),
                bytes: imported.bytes(),
                ordinal: ordinal(&device.uuid)?,
            };
            (place, device.simulated())
        }
    };
    Ok(Part { place, bytes: view.bytes, device: view.device.clone(), simulated })
}

#[pymethods]
impl Attached {
    #[getter]
    fn lease(&self) -> u64 {
        lock(&self.lease).number
    }

    #[getter]
    fn digest(&self) -> Option<&str> {
        self.reply.digest.as_deref()
    }

    #[getter]
    fn format(&self) -> &str {
        &self.reply.format
    }

    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.reply.metadata.clone()
    }

    /// Milliseconds by phase: the daemon's, and `request` and `map` as seen here.
    #[getter]
    fn timings_ms(&self) -> BTreeMap<String, f64> {
        let mut timings = self.reply.timings_ms.clone();
        timings.insert("request".to_owned(), self.timings.request.as_secs_f64() * 1e3);
        timings.insert("map".to_owned(), self.timings.map.as_secs_f64() * 1e3);
        timings
    }

    /// (name, dtype, shape, region, offset, nbytes) of each tensor, in the daemon's order.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let views = self.reply.tensors.iter().map(|view| {
            let shape = PyTuple::new(py, &view.shape)?;
            (&view.name, &view.dtype, shape, view.region, view.offset, view.nbytes).into_pyobject(py)
        });
        views.collect()
    }

    /// (name, region, offset, nbytes) of each file that is resident whole.
    fn files(&self) -> Vec<(String, u32, u64, u64)> {
        let files = self.reply.files.iter();
        files.map(|file| (file.name.clone(), file.region, file.offset, file.nbytes)).collect()
    }

    /// The regions.
    fn regions(&self) -> Vec<Region> {
        let lease = Arc::clone(&lock(&self.lease));
        let regions = self.parts.iter().map(|part| Region {
            memory: Memory { place: part.place.clone(), _lease: Arc::clone(&lease) },
            bytes: part.bytes,
            device: part.device.clone(),
            simulated: part.simulated,
        });
        regions.collect()
    }

    /// Gives the lease back. What is attached stays readable.
    fn release(&self, py: Python<'_>) -> Result<(), Failure> {
        let lease = Arc::clone(&lock(&self.lease));
        py.detach(|| lease.release())
    }

    /// Gives the memory on GPUs up, and the lease. The addresses stay.
    fn sleep(&self, py: Python<'_>) -> Result<(), Failure> {
        py.detach(|| {
            if let Some(attached) = lock(&self.held.attached).as_mut() {
                attached.sleep();
            }
            let lease = Arc::clone(&lock(&self.lease));
            lease.release()
        })
    }

    /// Takes the memory in again at the same addresses, with a new lease.
    #[pyo3(signature = (progress))]
    fn wake(&self, py: Python<'_>, progress: Option<Py<PyAny>>) -> Result<(), Failure> {
        py.detach(|| {
            let _loaded = self.shared.make_resident(&self.named, progress.as_ref())?;
            let mut attached = lock(&self.held.attached);
            let Some(attached) = attached.as_mut() else {
                return Err(error(Code::Internal, "it is not attached"));
            };
            let lease = self.shared.wake(attached, &self.named)?;
            *lock(&self.lease) = Arc::new(lease);
            Ok(())
        })
    }
}

/// The number of a GPU in this process: its place among those that the driver shows.
fn ordinal(uuid: &str) -> Result<i32, Failure> {
    let place = match cuda::find() {
        Found::Devices(devices) => devices.iter().position(|device| device.uuid == uuid),
        Found::NoLibrary | Found::Unusable(_) => None,
    };
    let place = place.and_then(|place| i32::try_from(place).ok());
    place.ok_or_else(|| error(Code::ClientMap, format!("{uuid} is not among this process's GPUs")))
}
