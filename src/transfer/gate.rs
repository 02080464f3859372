//! How many headers are read at a time, over all connections and jobs.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Artifacts whose headers and manifests are read at a time. Each may take `limits.header_bytes_max` of memory and more.
const HEADERS_MAX: usize = 4;

/// Bounds the memory that headers take while they are read, whoever asks.
#[derive(Debug)]
pub struct HeaderGate(Arc<Semaphore>);

/// A place among those who read headers, given back when dropped. It goes where the work goes: into the closure that
/// reads, which runs to its end even if nobody waits for it any more.
#[derive(Debug)]
#[must_use]
pub struct Entered {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Default for HeaderGate {
    fn default() -> HeaderGate {
        HeaderGate(Arc::new(Semaphore::new(HEADERS_MAX)))
    }
}

impl HeaderGate {
    /// Waits for a place; first come, first served.
    pub async fn enter(&self) -> Entered {
        // The semaphore is never closed, so there is a permit.
        Entered { _permit: Arc::clone(&self.0).acquire_owned().await.ok() }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[test]
    fn no_more_than_the_limit_are_inside_at_a_time() {
        let gate = HeaderGate::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut inside: Vec<_> = (0..HEADERS_MAX).map(|_| pin!(gate.enter()).poll(&mut context)).collect();
        assert!(inside.iter().all(|entered| entered.is_ready()));
        let mut late = pin!(gate.enter());
        assert!(late.as_mut().poll(&mut context).is_pending());
        inside.pop();
        assert!(late.as_mut().poll(&mut context).is_ready());
    }
}
