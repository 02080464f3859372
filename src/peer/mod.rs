//! Other nodes: who has which artifact.

pub mod directory;
