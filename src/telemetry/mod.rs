//! What the daemon tells an operator: metrics, logs, and the page that serves the metrics.
//!
//! Nothing here decides anything; every other module may call it and it calls none of them back.

pub mod gpu;
pub mod http;
pub mod labels;
pub mod logging;
pub mod metrics;
pub mod readiness;
