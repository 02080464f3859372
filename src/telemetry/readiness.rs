//! What `/ready` answers.

use std::fmt;

use tokio::sync::watch;

/// How far the daemon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Not all parts have started.
    Starting,
    /// The preload list is being made resident, and readiness waits for it.
    Preloading {
        /// Entries that are resident.
        done: u32,
        /// Entries of the list.
        total: u32,
    },
    /// Requests are served.
    Ready,
    /// On the way out. Nothing follows.
    Draining,
}

impl State {
    /// `starting`, `ready` or `draining`, as `node.status` says it.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Starting | State::Preloading { .. } => "starting",
            State::Ready => "ready",
            State::Draining => "draining",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Starting => f.write_str("starting"),
            State::Preloading { done, total } => write!(f, "preloading {done} of {total}"),
            State::Ready => f.write_str("ready"),
            State::Draining => f.write_str("draining"),
        }
    }
}

/// The state of the daemon, shared between who changes it and who reports it.
#[derive(Debug)]
pub struct Readiness {
    state: watch::Sender<State>,
}

impl Readiness {
    /// Starting.
    pub fn new() -> Readiness {
        Readiness { state: watch::Sender::new(State::Starting) }
    }

    /// The state now.
    pub fn get(&self) -> State {
        *self.state.borrow()
    }

    /// Waits until requests are served.
    pub async fn reached(&self) {
        // The sender is in `self`, so it cannot be gone.
        let _ = self.state.subscribe().wait_for(|state| *state == State::Ready).await;
    }

    /// Changes the state. A daemon that drains stays so: a preload that ends late does not make it ready.
    pub fn set(&self, state: State) {
        self.state.send_if_modified(|current| {
            let changes = *current != State::Draining && *current != state;
            if changes {
                *current = state;
            }
            changes
        });
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Readiness::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_is_final() {
        let readiness = Readiness::new();
        assert_eq!(readiness.get(), State::Starting);
        readiness.set(State::Preloading { done: 1, total: 3 });
        assert_eq!(readiness.get().to_string(), "preloading 1 of 3");
        assert_eq!(readiness.get().as_str(), "starting");
        readiness.set(State::Ready);
        readiness.set(State::Draining);
        readiness.set(State::Ready);
        assert_eq!(readiness.get(), State::Draining);
    }
}
