//! The socket API: wire format, methods, server.
pub mod methods;
