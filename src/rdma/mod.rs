//! Moving bytes by RDMA: rails, each a few queue pairs between two nodes by one NIC.
//!
//! Not for: who connects to whom, and the session in which endpoints and keys travel (`peer`); raw verbs (`sys::verbs`).

mod rail;

pub use rail::{Counters, Fault, Fetch, PAIRS_MAX, Published, Rail, Settings, Source, State};
