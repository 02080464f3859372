//! The socket API: wire format, methods, server.
pub mod call;
pub mod methods;
pub mod schema;
pub mod scm;
pub mod server;
pub mod wire;
