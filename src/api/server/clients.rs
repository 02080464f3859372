//! Who is connected, and what each connection holds.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use super::connection::Connection;
use crate::api::methods::ClientStatus;
use crate::tier::residency::{Hold, Viewer};

/// The open connections, by number. Belongs to the control thread.
#[derive(Default)]
pub(super) struct Clients(RefCell<BTreeMap<u64, Weak<Connection>>>);

impl Clients {
    pub(super) fn enter(&self, connection: &Rc<Connection>) {
        self.0.borrow_mut().insert(connection.number, Rc::downgrade(connection));
    }

    pub(super) fn leave(&self, number: u64) {
        self.0.borrow_mut().remove(&number);
    }

    /// Those that `viewer` may look at, oldest first.
    pub(super) fn list(&self, viewer: Viewer) -> Vec<ClientStatus> {
        let open = self.0.borrow();
        let seen = open.values().filter_map(Weak::upgrade);
        seen.filter(|one| viewer.is_none_or(|uid| one.tenant.uid == uid)).map(|one| one.status()).collect()
    }
}

impl Connection {
    fn status(&self) -> ClientStatus {
        let leases = self.leases.borrow();
        let size = |hold: &Hold| self.node.residency.with(hold.id(), |entry| entry.bytes).unwrap_or(0);
        ClientStatus {
            connection: self.number,
            tenant: self.tenant.to_string(),
            process: self.process,
            name: self.name.borrow().clone(),
            leases: leases.len() as u32,
            leased_bytes: leases.values().map(size).fold(0, u64::saturating_add),
            requests: self.in_flight.get(),
        }
    }
}
