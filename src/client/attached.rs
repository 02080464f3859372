//! An attached artifact: its regions mapped, its tensors and files as slices of them.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ClientError;
use crate::api::methods::{AttachReply, FileView, RegionView, TensorView};
use crate::sys::map::ReadMap;

/// The only tier that this client maps.
const HOST: &str = "host";

/// A resident artifact, readable in place. Independent of the connection that it came by.
#[derive(Debug)]
pub struct Attached {
    reply: AttachReply,
    regions: Vec<Arc<ReadMap>>,
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
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TensorRef<'a> {
    /// Name.
    pub name: &'a str,
    /// safetensors' name of the type, or GGUF's.
    pub dtype: &'a str,
    /// Shape, slowest dimension first; of the slice, if it is one.
    pub shape: &'a [u64],
    /// Its bytes, row-major.
    pub bytes: &'a [u8],
}

impl Attached {
    pub(super) fn map(
        mut reply: AttachReply,
        fds: Vec<OwnedFd>,
        begin: Instant,
    ) -> Result<Attached, ClientError> {
        let answered = Instant::now();
        let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
        let regions = reply
            .regions
            .iter()
            .map(|region| Ok(Arc::new(map_region(region, &mut fds)?)))
            .collect::<Result<Vec<_>, ClientError>>()?;
        if fds.iter().any(Option::is_some) {
            return Err(ClientError::Map("there are descriptors that no region names".to_owned()));
        }
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

    /// The mapped regions. A clone of one keeps it mapped when the rest is dropped.
    pub fn regions(&self) -> &[Arc<ReadMap>] {
        &self.regions
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.reply.tensors.get(*self.index.get(name)?).map(|view| self.view(view))
    }

    /// All tensors, in the daemon's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorRef<'_>> {
        self.reply.tensors.iter().map(|view| self.view(view))
    }

    /// The bytes of the file with this name, if it is resident whole.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        let view = self.reply.files.iter().find(|file| file.name == name)?;
        Some(self.bytes(view.region, view.offset, view.nbytes))
    }

    fn view<'a>(&'a self, view: &'a TensorView) -> TensorRef<'a> {
        let bytes = self.bytes(view.region, view.offset, view.nbytes);
        TensorRef { name: &view.name, dtype: &view.dtype, shape: &view.shape, bytes }
    }

    /// `check_range` was here before: neither the index nor the conversions can fail.
    fn bytes(&self, region: u32, offset: u64, nbytes: u64) -> &[u8] {
        &self.regions[region as usize].as_slice()[offset as usize..(offset + nbytes) as usize]
    }
}

fn map_region(region: &RegionView, fds: &mut [Option<OwnedFd>]) -> Result<ReadMap, ClientError> {
    if region.device != HOST {
        return Err(ClientError::Map(format!("a region lies on {}; this client maps {HOST}", region.device)));
    }
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
        return Err(ClientError::Map(format!(
            "a region of {} bytes has parts of {total} bytes",
            region.bytes
        )));
    }
    ReadMap::from_parts(parts).map_err(|error| ClientError::Map(error.to_string()))
}

fn check_range(
    regions: &[Arc<ReadMap>],
    name: &str,
    region: u32,
    offset: u64,
    nbytes: u64,
) -> Result<(), ClientError> {
    let length = regions.get(region as usize).map(|region| region.as_slice().len() as u64);
    match (length, offset.checked_add(nbytes)) {
        (Some(length), Some(end)) if end <= length => Ok(()),
        _ => Err(ClientError::Map(format!("{name:?} does not lie in its region"))),
    }
}
