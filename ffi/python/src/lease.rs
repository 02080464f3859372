//! A lease, given back when the last thing that needs it is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Failure;
use crate::node::Shared;

/// A lease of a connection.
pub(crate) struct Lease {
    shared: Arc<Shared>,
    /// Which of the connections that `shared` has had so far: a lease ends with its connection.
    connection: u64,
    pub(crate) number: u64,
    ended: AtomicBool,
}

impl Lease {
    pub(crate) fn new(shared: &Arc<Shared>, connection: u64, number: u64) -> Lease {
        Lease { shared: Arc::clone(shared), connection, number, ended: AtomicBool::new(false) }
    }

    /// One that has ended.
    pub(crate) fn ended(shared: &Arc<Shared>, number: u64) -> Lease {
        Lease { shared: Arc::clone(shared), connection: 0, number, ended: AtomicBool::new(true) }
    }

    /// Gives it back, and waits until the daemon knows. Nothing happens the second time.
    pub(crate) fn release(&self) -> Result<(), Failure> {
        if self.ended.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.shared.release(self.connection, self.number)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Not waited for: the garbage collector may run anywhere.
        if !*self.ended.get_mut() {
            self.shared.let_go(self.connection, self.number);
        }
    }
}
