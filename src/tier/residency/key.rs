//! What makes two requests mean the same resident bytes.

use crate::api::methods::Selector;
use crate::source::file::Stamp;
use crate::tier::DeviceId;

/// How the bytes of an artifact lie in a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// As in its files, headers too: what clients map from the host tier.
    Files,
    /// Tensors on multiples of 512 bytes, without headers: in the memory of a GPU, and on the host tier what has left one.
    Packed,
}

impl Form {
    /// What clients attach on a device.
    pub fn of(device: DeviceId) -> Form {
        match device {
            DeviceId::Host => Form::Files,
            DeviceId::Gpu(_) => Form::Packed,
        }
    }
}

/// What an artifact is, before its bytes are known.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Identity {
    /// Name and identity of each file.
    Files(Vec<(String, Stamp)>),
    /// The digest of its manifest.
    Digest(String),
}

/// What makes two requests mean the same resident bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// Where.
    pub device: DeviceId,
    /// What.
    pub identity: Identity,
    /// The selection.
    pub select: Option<Vec<Selector>>,
    /// How its bytes lie.
    pub form: Form,
}
