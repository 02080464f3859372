//! The schedule of one member: of whom it receives what in which turn.

use super::order::{Order, Place};
use super::pair::{Pair, Step};
use super::{Ask, Member};

/// The asks of one member in the order of their turns, made as they are needed.
#[derive(Debug)]
pub(super) struct Way {
    place: Place,
    turn: u32,
    end: u32,
    own: Pair,
    /// Who of the two at a neighbouring vertex sends is a matter of the turns before: so they are gone through, too.
    neighbours: Vec<Pair>,
    /// The turn that each neighbour is at.
    at: Vec<u32>,
}

impl Way {
    /// Of a source: nothing to be asked for.
    pub(super) fn new(order: &Order, me: Member) -> Way {
        let place = order.place(me);
        let turns = order.turns(place.cube);
        let end = if order.is_source(me) { 0 } else { turns.count() };
        let dims = turns.dims as usize;
        let neighbours = vec![Pair::default(); dims];
        Way { place, turn: 0, end, own: Pair::default(), neighbours, at: vec![0; dims] }
    }

    /// The next ask of the schedule; nothing when it has ended.
    pub(super) fn next(&mut self, order: &Order) -> Option<Ask> {
        while self.turn < self.end {
            let turn = self.turn;
            self.turn += 1;
            let place = self.place;
            let (chunk, vertex, which) = match received(order, place, &mut self.own, turn) {
                Received::Nothing => continue,
                Received::Inside(chunk) => (chunk, place.vertex, 1 - place.which),
                Received::Outside(chunk) => {
                    let vertex = order.turns(place.cube).neighbour(place.vertex, turn);
                    (chunk, vertex, self.sender(order, vertex, turn))
                }
            };
            let member = order.vertex(place.cube, vertex).get(which);
            return Some(Ask { member, chunk, turn, waits: true });
        }
        None
    }

    /// Who of those at the neighbouring `vertex` sends in `turn`.
    fn sender(&mut self, order: &Order, vertex: u32, turn: u32) -> usize {
        let dim = (turn % order.turns(self.place.cube).dims) as usize;
        let mut sender = 0;
        while self.at[dim] <= turn {
            sender = step(order, self.place.cube, vertex, &mut self.neighbours[dim], self.at[dim]).sender;
            self.at[dim] += 1;
        }
        sender
    }
}

enum Received {
    Nothing,
    Inside(u32),
    Outside(u32),
}

fn received(order: &Order, place: Place, pair: &mut Pair, turn: u32) -> Received {
    let step = step(order, place.cube, place.vertex, pair, turn);
    if let Some(chunk) = step.inner[place.which] {
        return Received::Inside(chunk);
    }
    match order.turns(place.cube).incoming(place.vertex, turn) {
        Some(chunk) if step.receiver == place.which => Received::Outside(chunk),
        _ => Received::Nothing,
    }
}

/// What those at `vertex` do in `turn`.
fn step(order: &Order, cube: u32, vertex: u32, pair: &mut Pair, turn: u32) -> Step {
    let turns = order.turns(cube);
    // A source has everything: it sends, and who shares its vertex receives. When the source has sent the last chunk
    // across every dimension, it sends it there.
    if vertex == 0 {
        let last = turns.chunks - 1;
        let inner = (turn == turns.arrival(0, last)).then_some(last);
        return Step { sender: 0, receiver: 1, inner: [None, inner] };
    }
    if order.vertex(cube, vertex).second.is_none() {
        return Step { sender: 0, receiver: 0, inner: [None; 2] };
    }
    let neighbour = turns.neighbour(vertex, turn);
    let outgoing = turns.incoming(neighbour, turn).filter(|chunk| {
        neighbour != 0 || (chunk + 1 < turns.chunks && order.vertex(cube, 0).second.is_some())
    });
    pair.step(turns.incoming(vertex, turn), outgoing)
}
