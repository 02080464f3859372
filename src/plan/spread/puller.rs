//! The side that asks: which chunk to ask of whom next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::way::Way;
use super::{Ask, Chunks, Member, Order};

/// Asks that were late at one member, without a chunk from it since, until it is left for others.
const LATE_MAX: u32 = 2;
/// Asks that are looked at again in one call, of those that nobody could be found for.
const AGAIN_MAX: usize = 8;

/// Members that are asked for one chunk in vain until it is left alone for a while.
const TRIED_MAX: usize = 32;
/// Members that one chunk is asked of, one after the other, because each was late.
const LATE_TRIED_MAX: usize = 3;
/// Members that are looked at of all, when nobody near can be asked.
const WALK_MAX: u64 = 64;

/// How much is asked for at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Asks that have not been answered, of all members together: the credits of this node, and its downloads at a time.
    pub asks_max: usize,
    /// Of these, of one member.
    pub asks_per_member_max: usize,
    /// How many chunks may arrive after an ask before it is late.
    pub late_chunks: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { asks_max: 16, asks_per_member_max: 16, late_chunks: 32 }
    }
}

/// Why an ask was in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Who was asked does not have the chunk, or answers too many others.
    NotNow,
    /// Its bytes were not those of the manifest: it is not asked for anything any more.
    Wrong,
}

/// What is known of a member beyond its place in the order.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    gone: bool,
    wrong: bool,
    complete: bool,
    /// Asks of others that wait there.
    serving: u32,
    /// Asks in sequence that were late.
    late: u32,
    /// Asks of this node that are in flight there.
    asked: usize,
}

/// Decides of whom one member asks which chunk. It has no clock: its caller says what happened.
///
/// The caller sends what [`Puller::next_ask`] gives until it gives nothing, and does so again after each event. A chunk is in
/// flight at one member at a time.
#[derive(Debug)]
pub struct Puller {
    order: Arc<Order>,
    me: Member,
    limits: Limits,
    way: Way,
    have: Chunks,
    /// What is in flight, and how many chunks had arrived when it was asked for.
    asked: Vec<(Ask, u32)>,
    /// Turn and chunk of what has to be asked for again.
    again: BTreeSet<(u32, u32)>,
    /// Of whom a chunk was asked in vain.
    tried: BTreeMap<u32, Vec<Member>>,
    known: BTreeMap<Member, Known>,
    /// Chunks that have arrived.
    arrivals: u32,
}

impl Puller {
    /// For member `me`, which has the chunks `have` of the artifact.
    ///
    /// `None` if `order` has no such member or another number of chunks.
    pub fn new(order: Arc<Order>, me: Member, have: Chunks, limits: Limits) -> Option<Puller> {
        if me.0 >= order.members() || have.total() != order.chunks() {
            return None;
        }
        let way = Way::new(&order, me);
        Some(Puller {
            order,
            me,
            limits,
            way,
            have,
            asked: Vec::new(),
            again: BTreeSet::new(),
            tried: BTreeMap::new(),
            known: BTreeMap::new(),
            arrivals: 0,
        })
    }

    /// The chunks that this node has.
    pub fn have(&self) -> &Chunks {
        &self.have
    }

    /// What is in flight.
    pub fn asked(&self) -> impl Iterator<Item = Ask> {
        self.asked.iter().map(|(ask, _)| *ask)
    }

    /// What to ask for next; nothing while as much is in flight as may be, or nobody can be asked.
    pub fn next_ask(&mut self) -> Option<Ask> {
        if self.asked.len() >= self.limits.asks_max {
            return None;
        }
        // What was asked for in vain is the furthest behind.
        let found = self
            .again
            .iter()
            .take(AGAIN_MAX)
            .find_map(|&(turn, chunk)| Some(self.ask(self.other(chunk)?, chunk, turn)));
        if let Some(ask) = found {
            self.again.remove(&(ask.turn, ask.chunk));
            return Some(self.sent(ask));
        }
        while let Some(ask) = self.way.next(&self.order) {
            if self.have.has(ask.chunk) {
                continue;
            }
            if self.may_ask(ask.member, ask.chunk) {
                return Some(self.sent(ask));
            }
            match self.other(ask.chunk) {
                Some(member) => return Some(self.sent(self.ask(member, ask.chunk, ask.turn))),
                None => self.again.insert((ask.turn, ask.chunk)),
            };
        }
        None
    }

    /// `chunk` has arrived from `member`, was verified and counts. Gives the ask that this makes needless: it was asked
    /// of another when `member` was late.
    pub fn arrived(&mut self, member: Member, chunk: u32) -> Option<Ask> {
        self.known(member).late = 0;
        self.arrivals += u32::from(self.have.insert(chunk));
        self.tried.remove(&chunk);
        self.again.retain(|(_, other)| *other != chunk);
        let ask = self.take(|ask| ask.chunk == chunk)?;
        (ask.member != member).then_some(ask)
    }

    /// `member` has refused `chunk`, or sent wrong bytes for it.
    pub fn refused(&mut self, member: Member, chunk: u32, why: Refusal) {
        if why == Refusal::Wrong {
            self.known(member).wrong = true;
        }
        if let Some(ask) = self.take(|ask| ask.member == member && ask.chunk == chunk) {
            self.vain(ask);
        }
    }

    /// `member` cannot be reached, or does not have the artifact any more. What was asked of it is asked of others.
    pub fn gone(&mut self, member: Member) {
        self.known(member).gone = true;
        while let Some(ask) = self.take(|ask| ask.member == member) {
            self.vain(ask);
        }
    }

    /// `member` says how many chunks it has, and how many asks wait there.
    pub fn heard(&mut self, member: Member, chunks: u32, serving: u32) {
        let complete = chunks == self.have.total();
        let known = self.known(member);
        (known.gone, known.complete, known.serving) = (false, complete, serving);
    }

    /// An ask that is late, judged by what has arrived since, and that somebody else can be asked for instead: its caller
    /// withdraws it, and goes on until there is none.
    pub fn late(&mut self) -> Option<Ask> {
        let due = self.arrivals.checked_sub(self.limits.late_chunks)?;
        let late = |&(ask, since): &(Ask, u32)| {
            let tried = self.tried.get(&ask.chunk).map_or(0, Vec::len);
            (since <= due && tried < LATE_TRIED_MAX).then_some(ask)
        };
        let elsewhere = |ask: &Ask| {
            self.near(ask.chunk).any(|member| {
                member != ask.member && self.is_earlier(member, ask.chunk) && self.may_ask(member, ask.chunk)
            })
        };
        let ask = self.asked.iter().filter_map(late).find(elsewhere)?;
        self.take(|other| *other == ask);
        self.known(ask.member).late += 1;
        self.vain(ask);
        Some(ask)
    }

    /// Nothing has arrived for as long as its caller is patient. Gives what is to be withdrawn: everything in flight, which is
    /// asked of others then. What nobody was left for is asked of anyone again.
    pub fn stalled(&mut self) -> Vec<Ask> {
        let asked: Vec<Ask> = self.asked.drain(..).map(|(ask, _)| ask).collect();
        self.tried.retain(|chunk, _| asked.iter().any(|ask| ask.chunk == *chunk));
        for ask in &asked {
            let known = self.known(ask.member);
            known.asked -= 1;
            known.late += 1;
            self.vain(*ask);
        }
        asked
    }

    fn known(&mut self, member: Member) -> &mut Known {
        self.known.entry(member).or_default()
    }

    fn ask(&self, member: Member, chunk: u32, turn: u32) -> Ask {
        Ask { member, chunk, turn, waits: self.order.before(member, self.me, chunk) }
    }

    fn sent(&mut self, ask: Ask) -> Ask {
        self.known(ask.member).asked += 1;
        self.asked.push((ask, self.arrivals));
        ask
    }

    /// Takes out the first ask in flight for which `which` holds.
    fn take(&mut self, which: impl Fn(&Ask) -> bool) -> Option<Ask> {
        let at = self.asked.iter().position(|(ask, _)| which(ask))?;
        let (ask, _) = self.asked.remove(at);
        self.known(ask.member).asked -= 1;
        Some(ask)
    }

    fn vain(&mut self, ask: Ask) {
        self.tried.entry(ask.chunk).or_default().push(ask.member);
        self.again.insert((ask.turn, ask.chunk));
    }

    fn may_ask(&self, member: Member, chunk: u32) -> bool {
        self.could_ask(member, chunk) && self.known.get(&member).is_none_or(|known| known.late < LATE_MAX)
    }

    /// Whether it is neither this node, nor gone, nor known to send wrong bytes, nor has been tried, nor has enough to do.
    fn could_ask(&self, member: Member, chunk: u32) -> bool {
        let known = self.known.get(&member).copied().unwrap_or_default();
        let tried = self.tried.get(&chunk).is_some_and(|tried| tried.contains(&member));
        let full = known.asked >= self.limits.asks_per_member_max;
        member != self.me && !known.gone && !known.wrong && !tried && !full
    }

    /// Whom to ask for `chunk` if not who would be by the schedule: one who is due to have it earlier, of those near the
    /// one who fails to send it, whose neighbours have an uplink free in its place; one who is known to have
    /// everything; one of the former that has been late; a source; and if all of these have been tried, anyone.
    fn other(&self, chunk: u32) -> Option<Member> {
        let tried = self.tried.get(&chunk).map_or(0, Vec::len);
        if tried >= TRIED_MAX {
            return None;
        }
        let earlier = || self.near(chunk).filter(|member| self.is_earlier(*member, chunk));
        let complete = || self.known.iter().filter(|(_, known)| known.complete).map(|(member, _)| *member);
        let sources = || (0..self.order.sources()).map(Member);
        let members = u64::from(self.order.members());
        // Begins elsewhere after each one that was tried.
        let from = mix(u64::from(self.me.0) << 32 ^ u64::from(chunk) << 8 ^ tried as u64);
        let anyone =
            || (0..WALK_MAX.min(members)).map(|step| Member((from.wrapping_add(step) % members) as u32));
        self.best(chunk, earlier())
            .or_else(|| self.best(chunk, complete()))
            .or_else(|| self.cheapest(chunk, earlier()))
            .or_else(|| self.cheapest(chunk, sources()))
            .or_else(|| self.best(chunk, self.near(chunk)))
            .or_else(|| self.best(chunk, anyone()))
    }

    /// Those around the one that `chunk` is to come from by the schedule, and around this node.
    fn near(&self, chunk: u32) -> impl Iterator<Item = Member> {
        let place = self.order.place(self.me);
        let (_, parent) = self.order.due(place, chunk);
        let vertices =
            [parent, place.vertex].into_iter().flat_map(move |vertex| self.order.around(place.cube, vertex));
        vertices.flat_map(move |vertex| self.order.vertex(place.cube, vertex).members())
    }

    /// Whether `member` is no source and due to have `chunk` before this node.
    fn is_earlier(&self, member: Member, chunk: u32) -> bool {
        !self.order.is_source(member) && self.order.before(member, self.me, chunk)
    }

    /// The best to ask of those that have not been late too often.
    fn best(&self, chunk: u32, members: impl Iterator<Item = Member>) -> Option<Member> {
        self.cheapest(chunk, members.filter(|member| self.may_ask(*member, chunk)))
    }

    fn cheapest(&self, chunk: u32, members: impl Iterator<Item = Member>) -> Option<Member> {
        let members = members.filter(|member| self.could_ask(*member, chunk));
        members.min_by_key(|member| self.cost(*member, chunk))
    }

    /// Less is better: who has been asked for less, is in the same rack, has less to do; and a mixture, so that not
    /// everyone turns to the same.
    fn cost(&self, member: Member, chunk: u32) -> (usize, bool, u32, u64) {
        let known = self.known.get(&member).copied().unwrap_or_default();
        let mixed = mix(u64::from(self.me.0) << 32 ^ u64::from(chunk) << 40 ^ u64::from(member.0));
        (known.asked, !self.order.same_rack(self.me, member), known.serving, mixed)
    }
}

/// The finalizer of splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators").
pub(super) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
