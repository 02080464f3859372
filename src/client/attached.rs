//! An attached artifact: its regions mapped, its tensors and files as slices of them.
//!
//! Regions of the host tier are mapped read-only into this process. Regions on GPUs are imported read-only into the
//! address space that this process has on the same GPU; the CPU cannot read them, and copies them out where asked.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ClientError;
use crate::api::methods::{AttachReply, FileView, RegionView, TensorView};
use crate::sys::cuda::{self, Context, Found, Imported};
use crate::sys::map::ReadMap;

/// How the host tier is called; devices are `gpu:` and a UUID.
const HOST: &str = "host";

/// A region of an attached artifact.
#[derive(Debug)]
pub enum Region {
    /// Mapped into this process. A clone of it keeps it mapped when the rest is dropped.
    Host(Arc<ReadMap>),
    /// Imported on a GPU.
    Gpu(Imported),
}

impl Region {
    fn bytes(&self) -> u64 {
        match self {
            Region::Host(map) => map.as_slice().len() as u64,
            Region::Gpu(imported) => imported.bytes(),
        }
    }
}

/// Where the bytes of a tensor are.
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// In this process, row-major.
    Host(&'a [u8]),
    /// On a GPU: its region, and the offset in it.
    Gpu(&'a Imported, u64),
}

/// A resident artifact, readable in place. Independent of the connection that it came by.
#[derive(Debug)]
pub struct Attached {
    reply: AttachReply,
    regions: Vec<Region>,
    index: HashMap<String, usize>,
    timings: Timings,
}

/// How long the attach took on the client's side.
#[derive(Debug, Clone, Copy)]
pub struct Timings {
    /// From the request to its reply.
    pub request: Duration,
    /// From the reply to the last view.
    pub map: Duration,
}

/// One tensor, in place.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    /// Name.
    pub name: &'a str,
    /// safetensors' name of the type, or GGUF's.
    pub dtype: &'a str,
    /// Shape, slowest dimension first; of the slice, if it is one.
    pub shape: &'a [u64],
    /// Its length, bytes.
    pub nbytes: u64,
    /// Where they are.
    pub data: Data<'a>,
}

impl<'a> TensorRef<'a> {
    /// Its bytes, row-major, if they are in this process.
    pub fn bytes(&self) -> Option<&'a [u8]> {
        match self.data {
            Data::Host(bytes) => Some(bytes),
            Data::Gpu(..) => None,
        }
    }

    /// Where a kernel on the GPU finds it; `None` if it is in this process.
    pub fn device_address(&self) -> Option<u64> {
        match self.data {
            Data::Host(_) => None,
            Data::Gpu(region, offset) => Some(region.device_address() + offset),
        }
    }

    /// A copy of its bytes, from wherever they are.
    ///
    /// # Errors
    /// `client.device`, if a GPU does not give them.
    pub fn to_vec(&self) -> Result<Vec<u8>, ClientError> {
        match self.data {
            Data::Host(bytes) => Ok(bytes.to_vec()),
            Data::Gpu(region, offset) => {
                let length = usize::try_from(self.nbytes).map_err(|_| {
                    ClientError::Map("a tensor is larger than this process can be".to_owned())
                })?;
                let mut bytes = vec![0; length];
                region.read(offset, &mut bytes).map_err(ClientError::Device)?;
                Ok(bytes)
            }
        }
    }
}

/// The contexts of the GPUs that a client has imported from, by UUID: made once, kept as long as the client.
pub(super) type Contexts = HashMap<String, Arc<Context>>;

impl Attached {
    pub(super) fn map(
        mut reply: AttachReply,
        fds: Vec<OwnedFd>,
        begin: Instant,
        contexts: &mut Contexts,
    ) -> Result<Attached, ClientError> {
        let answered = Instant::now();
        let parts = parts_of(&reply, fds)?;
        let regions = reply
            .regions
            .iter()
            .zip(parts)
            .map(|(region, parts)| map_region(region, parts, contexts))
            .collect::<Result<Vec<_>, ClientError>>()?;
        for TensorView { name, region, offset, nbytes, .. } in &reply.tensors {
            check_range(&regions, name, *region, *offset, *nbytes)?;
        }
        for FileView { name, region, offset, nbytes } in &reply.files {
            check_range(&regions, name, *region, *offset, *nbytes)?;
        }
        let index: HashMap<String, usize> =
            reply.tensors.iter().enumerate().map(|(place, tensor)| (tensor.name.clone(), place)).collect();
        if index.len() != reply.tensors.len() {
            return Err(ClientError::Protocol("two tensors have the same name".to_owned()));
        }
        // The descriptors are closed: their indices mean nothing any more.
        for region in &mut reply.regions {
            region.parts.clear();
        }
        let timings = Timings { request: answered - begin, map: answered.elapsed() };
        Ok(Attached { reply, regions, index, timings })
    }

    /// The lease, for [`super::Client::release`].
    pub fn lease(&self) -> u64 {
        self.reply.lease
    }

    /// What the daemon answered, without the parts of its regions: their descriptors are closed.
    pub fn reply(&self) -> &AttachReply {
        &self.reply
    }

    /// Free-form strings of the files' own headers.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.reply.metadata
    }

    /// How long it took.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// The mapped regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Gives up the memory on GPUs, and keeps its addresses there for [`super::Client::wake`]. The caller releases the lease
    /// next, so that the daemon knows. Until then, tensors on GPUs cannot be read.
    pub fn sleep(&mut self) {
        for region in &mut self.regions {
            if let Region::Gpu(imported) = region {
                imported.sleep();
            }
        }
    }

    /// Takes the memory of another attach of the same artifact in, at the addresses of before.
    ///
    /// # Errors
    /// `client.map` if it is laid out otherwise; then nothing was changed.
    pub(super) fn take_in(&mut self, mut reply: AttachReply, fds: Vec<OwnedFd>) -> Result<(), ClientError> {
        let place = |tensor: &TensorView| (tensor.name.clone(), tensor.region, tensor.offset, tensor.nbytes);
        let same = reply.tensors.len() == self.reply.tensors.len()
            && reply.tensors.iter().zip(&self.reply.tensors).all(|(new, old)| place(new) == place(old));
        let sizes = |reply: &AttachReply| reply.regions.iter().map(|region| region.bytes).collect::<Vec<_>>();
        if !same || sizes(&reply) != sizes(&self.reply) {
            return Err(ClientError::Map("the artifact is another now: attach it anew".to_owned()));
        }
        for (region, parts) in self.regions.iter_mut().zip(parts_of(&reply, fds)?) {
            if let Region::Gpu(imported) = region {
                imported.wake(parts).map_err(ClientError::Device)?;
            }
        }
        for region in &mut reply.regions {
            region.parts.clear();
        }
        self.reply = reply;
        Ok(())
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.tensor_at(self.index_of(name)?)
    }

    /// The place of the tensor with this name among [`Attached::tensors`].
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// The tensor at this place among [`Attached::tensors`].
    pub fn tensor_at(&self, place: usize) -> Option<TensorRef<'_>> {
        self.reply.tensors.get(place).map(|view| self.view(view))
    }

    /// All tensors, in the daemon's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorRef<'_>> {
        self.reply.tensors.iter().map(|view| self.view(view))
    }

    /// The bytes of the file with this name, if it is resident whole, and in this process.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        let view = self.reply.files.iter().find(|file| file.name == name)?;
        match self.data(view.region, view.offset, view.nbytes) {
            Data::Host(bytes) => Some(bytes),
            Data::Gpu(..) => None,
        }
    }

    fn view<'a>(&'a self, view: &'a TensorView) -> TensorRef<'a> {
        let data = self.data(view.region, view.offset, view.nbytes);
        TensorRef { name: &view.name, dtype: &view.dtype, shape: &view.shape, nbytes: view.nbytes, data }
    }

    /// `check_range` was here before: neither the index nor the conversions can fail.
    fn data(&self, region: u32, offset: u64, nbytes: u64) -> Data<'_> {
        match &self.regions[region as usize] {
            Region::Host(map) => Data::Host(&map.as_slice()[offset as usize..(offset + nbytes) as usize]),
            Region::Gpu(imported) => Data::Gpu(imported, offset),
        }
    }
}

/// The descriptors of each region with their sizes, checked against what the reply says of them.
fn parts_of(reply: &AttachReply, fds: Vec<OwnedFd>) -> Result<Vec<Vec<(OwnedFd, u64)>>, ClientError> {
    let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
    let mut regions = Vec::with_capacity(reply.regions.len());
    for region in &reply.regions {
        let mut parts = Vec::with_capacity(region.parts.len());
        let mut total = 0u64;
        for part in &region.parts {
            let fd = usize::try_from(part.fd).ok().and_then(|index| fds.get_mut(index)?.take());
            let fd = fd.ok_or_else(|| {
                ClientError::Map(format!("descriptor {} did not come, or is named twice", part.fd))
            })?;
            total = total.saturating_add(part.bytes);
            parts.push((fd, part.bytes));
        }
        if total != region.bytes {
            let message = format!("a region of {} bytes has parts of {total} bytes", region.bytes);
            return Err(ClientError::Map(message));
        }
        regions.push(parts);
    }
    if fds.iter().any(Option::is_some) {
        return Err(ClientError::Map("there are descriptors that no region names".to_owned()));
    }
    Ok(regions)
}

fn map_region(
    region: &RegionView,
    parts: Vec<(OwnedFd, u64)>,
    contexts: &mut Contexts,
) -> Result<Region, ClientError> {
    if region.device == HOST {
        let map = ReadMap::from_parts(parts).map_err(|error| ClientError::Map(error.to_string()))?;
        return Ok(Region::Host(Arc::new(map)));
    }
    let Some(uuid) = region.device.strip_prefix("gpu:") else {
        let message = format!("a region lies on {}, which this client does not know", region.device);
        return Err(ClientError::Map(message));
    };
    let context = context(uuid, contexts)?;
    Imported::new(&context, parts).map(Region::Gpu).map_err(ClientError::Device)
}

/// The context of a GPU: of no other is one made.
fn context(uuid: &str, contexts: &mut Contexts) -> Result<Arc<Context>, ClientError> {
    if let Some(context) = contexts.get(uuid) {
        return Ok(Arc::clone(context));
    }
    let none = |why: &str| ClientError::Map(format!("the artifact lies on the GPU {uuid}, and {why}"));
    let devices = match cuda::find() {
        Found::NoLibrary => return Err(none("this process finds no libcuda.so.1")),
        Found::Unusable(error) => return Err(ClientError::Device(error)),
        Found::Devices(devices) => devices,
    };
    let device = devices.into_iter().find(|device| device.uuid == uuid);
    let device = device.ok_or_else(|| none("that is not among the devices that this process is shown"))?;
    let context = Context::new(device).map_err(ClientError::Device)?;
    contexts.insert(uuid.to_owned(), Arc::clone(&context));
    Ok(context)
}

fn check_range(
    regions: &[Region],
    name: &str,
    region: u32,
    offset: u64,
    nbytes: u64,
) -> Result<(), ClientError> {
    let length = regions.get(region as usize).map(Region::bytes);
    match (length, offset.checked_add(nbytes)) {
        (Some(length), Some(end)) if end <= length => Ok(()),
        _ => Err(ClientError::Map(format!("{name:?} does not lie in its region"))),
    }
}
