//! Files as a source: an artifact's files opened once, below a configured root, with the tenant's own rights,
//! or taken from descriptors that a client opened itself.
//!
//! Upholds invariant 7. After opening, only descriptors are used; nothing here maps a file.

pub mod index;
mod open;
mod roots;
mod uri;

pub use open::{Error, OpenFile, Stamp, from_fds};
pub use roots::Roots;
