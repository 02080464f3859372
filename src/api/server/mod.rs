//! The server side of the socket API: accepts connections, within limits, and says who they are.

mod artifact;
mod calls;
mod clients;
mod connection;
mod writer;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use clients::Clients;

use crate::api::{scm, wire};
use crate::error::{Code, Error, Result};
use crate::node::Node;
use crate::sys::identity::Tenant;
use crate::sys::peer;
use crate::telemetry::labels::Refusal;

/// How long a refused client has to take the line that says why.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(200);
/// How long to wait after an accept that failed, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The open connections. Belongs to the control thread.
pub struct Server {
    node: Rc<Node>,
    open: Cell<u32>,
    by_tenant: RefCell<HashMap<u32, u32>>,
    next: Cell<u64>,
    closing: watch::Sender<bool>,
    clients: Rc<Clients>,
}

impl Server {
    /// A server for `node`; accepts nothing yet.
    pub fn new(node: Rc<Node>) -> Rc<Server> {
        Rc::new(Server {
            node,
            open: Cell::new(0),
            by_tenant: RefCell::default(),
            next: Cell::new(1),
            closing: watch::Sender::new(false),
            clients: Rc::default(),
        })
    }

    /// Accepts connections until the future is dropped.
    pub async fn accept(self: Rc<Self>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((socket, _)) => Rc::clone(&self).admit(socket),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    let pause = tokio::time::timeout(ACCEPT_PAUSE, std::future::pending::<()>());
                    let _ = pause.await;
                }
            }
        }
    }

    /// Closes all connections and waits until the last one has let go of everything.
    pub async fn close(&self) {
        let mut closing = self.closing.subscribe();
        self.closing.send_replace(true);
        while self.open.get() > 0 {
            // Each connection that ends touches the channel.
            let _ = closing.changed().await;
        }
    }

    /// Serves one connection, within limits. Returns at once.
    pub fn admit(self: Rc<Self>, socket: UnixStream) {
        let tenant = match peer::credentials(socket.as_fd()) {
            Ok((uid, gid, groups)) => Tenant { uid, gid, groups },
            Err(error) => {
                let message = format!("the kernel does not say who connects: {error}");
                return self.refuse(socket, Refusal::Identity, Error::new(Code::IdentityUnknown, message));
            }
        };
        let limits = self.node.config().limits.clone();
        let own = self.by_tenant.borrow().get(&tenant.uid).copied().unwrap_or(0);
        let over = if self.open.get() >= limits.connections_max {
            Some((Refusal::Connections, format!("limits.connections_max is {}", limits.connections_max)))
        } else if own >= limits.connections_per_tenant_max {
            let most = limits.connections_per_tenant_max;
            Some((Refusal::ConnectionsPerTenant, format!("limits.connections_per_tenant_max is {most}")))
        } else {
            None
        };
        if let Some((reason, why)) = over {
            let message = format!("too many connections are open: {why}; close one and try again");
            return self.refuse(socket, reason, Error::new(Code::ApiTooManyConnections, message));
        }
        self.opened(tenant.uid);
        let number = self.next.replace(self.next.get() + 1);
        tokio::task::spawn_local(async move {
            let uid = tenant.uid;
            let clients = Rc::clone(&self.clients);
            connection::serve(&self.node, socket, number, tenant, clients, self.closing.subscribe()).await;
            self.closed(uid);
        });
    }

    fn opened(&self, uid: u32) {
        self.open.set(self.open.get() + 1);
        *self.by_tenant.borrow_mut().entry(uid).or_default() += 1;
        self.node.connections.set(self.open.get());
        self.node.metrics.connections.inc();
    }

    fn closed(&self, uid: u32) {
        self.open.set(self.open.get() - 1);
        let mut by_tenant = self.by_tenant.borrow_mut();
        if let Some(count) = by_tenant.get_mut(&uid) {
            *count -= 1;
            if *count == 0 {
                by_tenant.remove(&uid);
            }
        }
        self.node.connections.set(self.open.get());
        self.node.metrics.connections.dec();
        self.closing.send_modify(|_| {});
    }

    /// Says why in one line, if the client takes it at once, and closes.
    fn refuse(&self, socket: UnixStream, reason: Refusal, error: Error) {
        self.node.metrics.connection_refused(reason);
        self.node.metrics.error(error.code);
        let line = wire::error_reply(&wire::Id::Null, &error, "");
        tokio::task::spawn_local(async move {
            let said = socket.async_io(Interest::WRITABLE, || scm::send(&socket, &line, &[]));
            let _ = tokio::time::timeout(REFUSAL_TIMEOUT, said).await;
        });
    }
}

/// Binds the socket: refuses a directory that it cannot use and a socket that somebody serves, replaces a stale one.
pub fn bind(path: &std::path::Path, mode: u32) -> Result<UnixListener> {
    use std::io::ErrorKind;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let shown = path.display();
    let directory = |error: std::io::Error| {
        let message = format!(
            "the socket {shown} cannot be made: {error}; create its directory and let the daemon's user write to it"
        );
        Error::new(Code::DaemonSocketDirectory, message)
    };
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            let message = format!("{shown} exists and is no socket: move it away, or choose another path");
            return Err(Error::new(Code::DaemonSocketInUse, message));
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                tracing::info!(socket = %shown, "removing the stale socket of a daemon that is gone");
                std::fs::remove_file(path).map_err(directory)?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            _ => {
                let message = format!("another process serves {shown}: stop it, or choose another path");
                return Err(Error::new(Code::DaemonSocketInUse, message));
            }
        }
    }
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(directory)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(directory)?;
    listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener)).map_err(|error| {
        Error::new(Code::DaemonListen, format!("the socket {shown} cannot be listened on: {error}"))
    })
}
