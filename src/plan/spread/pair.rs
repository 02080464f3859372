//! Two nodes at one vertex of the cube: together they do what one node would do there, and keep each other level.
//!
//! In each turn the vertex receives one chunk and sends one. If one of the two receives and the other sends, then the
//! one that receives has its uplink free and the one that sends its downlink: there a chunk goes that the sender lacks.

use std::collections::VecDeque;

/// What one of the two has and the other has not, oldest first.
#[derive(Debug, Clone, Default)]
pub(super) struct Pair {
    only: [VecDeque<u32>; 2],
}

/// What the two do in one turn. They are 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// Which of them sends to the neighbour.
    pub(super) sender: usize,
    /// Which of them receives from the neighbour.
    pub(super) receiver: usize,
    /// What each receives from the other.
    pub(super) inner: [Option<u32>; 2],
}

impl Pair {
    /// The next turn, in which `incoming` is received from the neighbour and `outgoing` sent to it.
    pub(super) fn step(&mut self, incoming: Option<u32>, outgoing: Option<u32>) -> Step {
        let holder = outgoing.and_then(|chunk| self.only.iter().position(|only| only.contains(&chunk)));
        // Who has more of its own gives inside and receives outside; who lacks more sends outside what both have.
        let richer = usize::from(self.only[1].len() > self.only[0].len());
        let sender = holder.unwrap_or(1 - richer);
        let receiver = 1 - sender;
        let mut inner = [None; 2];
        for to in [0, 1] {
            let from = 1 - to;
            let uplink_taken = outgoing.is_some() && sender == from;
            let downlink_taken = incoming.is_some() && receiver == to;
            if !uplink_taken && !downlink_taken {
                inner[to] = self.only[from].pop_front();
            }
        }
        if let Some(chunk) = incoming {
            self.only[receiver].push_back(chunk);
        }
        Step { sender, receiver, inner }
    }
}
