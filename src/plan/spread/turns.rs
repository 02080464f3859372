//! The arithmetic of turns on a hypercube.
//!
//! A cube of `dims` dimensions has `2^dims` vertices; the source is at vertex 0. In turn `t` every vertex exchanges with
//! its neighbour across dimension `t mod dims`: the source sends chunk `t`, every other the newest chunk that it
//! has. After the last chunk the source goes on sending that one. So in each turn every vertex receives one chunk and
//! sends one, and which one follows from its number alone:
//!
//! - chunk `c` leaves the source in turn `c`, across dimension `c mod dims`, and doubles its holders in each turn;
//! - a vertex with bit `c mod dims` has it when the dimension of its last other bit, counted on from there, has had its
//!   turn; one without that bit a whole round of dimensions later.

/// A cube and what it spreads. `dims` is at least 1, `chunks` too.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turns {
    pub(super) dims: u32,
    pub(super) chunks: u32,
}

impl Turns {
    /// The turn in which `vertex` receives `chunk`. For vertex 0: the one in which somebody who shares it with the source
    /// does.
    pub(super) fn arrival(self, vertex: u32, chunk: u32) -> u32 {
        let from = self.rotated(vertex, chunk);
        // The last chunk goes on leaving the source, so every vertex has it by its last bit.
        let last = chunk + 1 == self.chunks;
        if vertex == 0 || (from & 1 == 0 && !last) { chunk + self.dims } else { chunk + from.ilog2() }
    }

    /// The chunk that `vertex` receives in `turn`, if any.
    pub(super) fn incoming(self, vertex: u32, turn: u32) -> Option<u32> {
        let chunk = if vertex >> (turn % self.dims) & 1 == 1 {
            // The next turn whose dimension is a bit of this vertex ends the round that this chunk is in.
            let next = turn + 1 + self.rotated(vertex, turn + 1).trailing_zeros();
            next.checked_sub(self.dims)?
        } else {
            turn.checked_sub(self.dims)?
        };
        let last = self.chunks - 1;
        if chunk < last {
            return Some(chunk);
        }
        (self.arrival(vertex, last) == turn).then_some(last)
    }

    /// The neighbour of `vertex` in `turn`.
    pub(super) fn neighbour(self, vertex: u32, turn: u32) -> u32 {
        vertex ^ 1 << (turn % self.dims)
    }

    /// Turns after which nobody receives anything any more by the schedule.
    pub(super) fn count(self) -> u32 {
        // What two nodes at one vertex owe each other takes a few more turns than the cube.
        self.chunks + 3 * self.dims + 3
    }

    /// The bits of `vertex`, beginning with that of the dimension of `turn`.
    fn rotated(self, vertex: u32, turn: u32) -> u32 {
        let by = turn % self.dims;
        (vertex >> by | vertex << (self.dims - by)) & ((1 << self.dims) - 1)
    }
}
