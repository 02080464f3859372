//! The schedule turn by turn, and the side that asks against a network that does whatever it likes.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::way::Way;
use super::*;

/// What a member asks for by the schedule, turn by turn.
fn schedule(order: &Order, member: Member) -> Vec<Ask> {
    let mut way = Way::new(order, member);
    std::iter::from_fn(|| way.next(order)).collect()
}

/// Carries the schedules of all out in lockstep, and gives the turns that it took.
fn in_lockstep(order: &Order) -> u32 {
    let members = order.members() as usize;
    let chunks = order.chunks();
    let mut have: Vec<Chunks> = (0..members)
        .map(
            |member| {
                if (member as u32) < order.sources() { Chunks::all(chunks) } else { Chunks::none(chunks) }
            },
        )
        .collect();
    let mut turns: Vec<Vec<(usize, Ask)>> = Vec::new();
    for member in 0..members {
        for ask in schedule(order, Member(member as u32)) {
            let turn = ask.turn as usize;
            if turns.len() <= turn {
                turns.resize(turn + 1, Vec::new());
            }
            turns[turn].push((member, ask));
        }
    }
    for (turn, asks) in turns.iter().enumerate() {
        let receive: BTreeSet<usize> = asks.iter().map(|(member, _)| *member).collect();
        assert_eq!(receive.len(), asks.len(), "somebody receives twice in turn {turn}");
        let send: BTreeSet<Member> = asks.iter().map(|(_, ask)| ask.member).collect();
        assert_eq!(send.len(), asks.len(), "somebody sends twice in turn {turn}");
        for (member, ask) in asks {
            let sender = &have[ask.member.0 as usize];
            assert!(sender.has(ask.chunk), "{ask:?} of {member}: not there yet");
        }
        for (member, ask) in asks {
            assert!(have[*member].insert(ask.chunk), "{ask:?} of {member}: twice");
        }
    }
    assert!(have.iter().all(Chunks::is_complete));
    turns.len() as u32
}

fn shortest(members: u32, chunks: u32) -> u32 {
    chunks + members.next_power_of_two().ilog2() - 1
}

#[test]
fn the_schedule_is_the_shortest_there_is() {
    for members in (2..=70).chain([100, 127, 128, 129, 255, 257, 500, 1001]) {
        for chunks in [1, 2, 3, 5, 17, 64] {
            let order = Order::new(members, 1, chunks, &[]).unwrap();
            assert_eq!(in_lockstep(&order), shortest(members, chunks), "{members} members, {chunks} chunks");
        }
    }
}

#[test]
fn numbers_that_make_no_order_are_refused() {
    let too_many = MEMBERS_MAX + 1;
    for (members, sources, chunks) in
        [(0, 0, 1), (3, 0, 1), (3, 4, 1), (3, 1, 0), (3, 1, CHUNKS_MAX + 1), (too_many, 1, 1)]
    {
        assert!(Order::new(members, sources, chunks, &[]).is_none(), "{members} {sources} {chunks}");
    }
    assert!(Order::new(3, 1, 1, &[0, 1]).is_none(), "a rack for each or none");
    let order = Arc::new(Order::new(3, 1, 4, &[]).unwrap());
    assert!(Puller::new(Arc::clone(&order), Member(3), Chunks::none(4), Limits::default()).is_none());
    assert!(Puller::new(order, Member(2), Chunks::none(5), Limits::default()).is_none());
}

#[test]
fn a_member_that_is_appended_changes_little_for_the_others() {
    let (before, after) = (Order::new(40, 1, 64, &[]).unwrap(), Order::new(41, 1, 64, &[]).unwrap());
    let partners = |order: &Order, member: u32| -> BTreeSet<Member> {
        schedule(order, Member(member)).iter().map(|ask| ask.member).collect()
    };
    let others = |member: &u32| partners(&before, *member).is_subset(&partners(&after, *member));
    assert!((1..40).all(|member| others(&member)));
}

proptest! {
    #[test]
    fn any_order_has_a_schedule_for_everyone(
        (sources, nodes, racks) in (1u32..5, 1u32..200, 1u32..9),
        chunks in 1u32..40,
    ) {
        let members = sources + nodes;
        let racks: Vec<u32> = if racks == 1 { Vec::new() } else { (0..members).map(|at| at % racks).collect() };
        let order = Order::new(members, sources, chunks, &racks).unwrap();
        // Each source has its share of the others.
        prop_assert_eq!(in_lockstep(&order), shortest(nodes.div_ceil(sources) + 1, chunks));
    }

    /// Nobody who waits can be waiting, by way of others, for itself.
    #[test]
    fn before_is_a_strict_order(members in 3u32..200, sources in 1u32..3, chunks in 1u32..20, lots in any::<[u32; 4]>()) {
        let order = Order::new(members, sources, chunks, &[]).unwrap();
        let [one, two, three] = [lots[0], lots[1], lots[2]].map(|lot| Member(lot % members));
        let chunk = lots[3] % chunks;
        prop_assert!(!(order.before(one, two, chunk) && order.before(two, one, chunk)));
        let through = order.before(one, two, chunk) && order.before(two, three, chunk);
        prop_assert!(!through || order.before(one, three, chunk));
        for ask in schedule(&order, Member(lots[0] % members)) {
            prop_assert!(!order.before(Member(lots[0] % members), ask.member, ask.chunk));
        }
    }

    /// Whatever the others do: no ask of itself, of one that is gone or sent wrong bytes, of one that has just refused the
    /// chunk, beyond the credits, or for what is in flight or here. And everything comes as long as a source gives it.
    #[test]
    fn a_puller_asks_nothing_in_vain_and_ends(
        (members, sources) in (2u32..60).prop_flat_map(|members| (Just(members), 1..members.min(4))),
        chunks in 1u32..60,
        (asks_max, asks_per_member_max) in (1usize..12, 1usize..9),
        lots in prop::collection::vec((0u8..8, any::<u16>()), 0..400),
    ) {
        let order = Arc::new(Order::new(members, sources, chunks, &[]).unwrap());
        let me = Member(members - 1);
        let limits = Limits { asks_max, asks_per_member_max, late_chunks: 6 };
        let mut puller = Puller::new(order, me, Chunks::none(chunks), limits).unwrap();
        let mut model = Model::default();
        for (what, lot) in lots {
            model.ask(&mut puller, me, limits);
            let Some(ask) = model.pick(lot) else { continue };
            match what {
                0..=2 => model.arrives(&mut puller, ask.member, ask.chunk),
                // Late, from one that it was asked of before.
                3 => model.arrives(&mut puller, Member(u32::from(lot) % (members - 1)), ask.chunk),
                4 => model.refused(&mut puller, ask, Refusal::NotNow),
                // One source stays.
                5 if ask.member != Member(0) => model.refused(&mut puller, ask, Refusal::Wrong),
                6 if ask.member != Member(0) => {
                    puller.gone(ask.member);
                    model.never.insert(ask.member);
                    model.in_flight.retain(|other| other.member != ask.member);
                }
                _ => model.stalled(&mut puller),
            }
            while let Some(late) = puller.late() {
                prop_assert!(model.take(late));
                model.refusals.insert((late.member, late.chunk));
            }
        }
        // From here on the source answers, and nobody else.
        let mut stalls = 0;
        while !puller.have().is_complete() {
            model.ask(&mut puller, me, limits);
            match model.in_flight.iter().copied().find(|ask| ask.member == Member(0)) {
                Some(ask) => model.arrives(&mut puller, ask.member, ask.chunk),
                None => {
                    model.stalled(&mut puller);
                    stalls += 1;
                    prop_assert!(stalls < 1000 + 20 * chunks, "it does not end");
                }
            }
        }
    }

    /// What is due earliest goes first, to each asker one at a time, and nothing that is not here.
    #[test]
    fn uploads_go_in_turn(requests in prop::collection::vec((0u32..50, 0u32..6, 0u32..20), 1..60), here in 0u32..20) {
        let mut have = Chunks::none(20);
        let mut uploads = Uploads::new(2);
        have.insert(here);
        let requests: BTreeSet<_> = requests
            .into_iter()
            .map(|(turn, asker, chunk)| Request { turn, asker: Member(asker), chunk })
            .collect();
        for request in &requests {
            prop_assert!(uploads.request(*request, true, &have));
        }
        let mut sent = Vec::new();
        for chunk in 0..20 {
            have.insert(chunk);
            uploads.arrived(chunk);
            while let Some(first) = uploads.next_upload() {
                let second = uploads.next_upload();
                prop_assert!(second.is_none_or(|second| second.asker != first.asker));
                prop_assert!(uploads.next_upload().is_none(), "two at a time");
                for request in [Some(first), second].into_iter().flatten() {
                    prop_assert!(have.has(request.chunk));
                    uploads.ended(request);
                    sent.push(request);
                }
            }
        }
        prop_assert!(uploads.is_empty());
        prop_assert_eq!(sent.iter().copied().collect::<BTreeSet<_>>(), requests);
        prop_assert_eq!(sent.len(), sent.iter().collect::<BTreeSet<_>>().len());
    }
}

#[test]
fn uploads_are_bounded_and_can_be_withdrawn() {
    let have = Chunks::all(4);
    let none = Chunks::none(4);
    let mut uploads = Uploads::new(1);
    let request = |asker: u32, chunk| Request { turn: 7 - chunk, asker: Member(asker), chunk };
    assert!(!uploads.request(request(1, 4), true, &have), "no such chunk");
    assert!(!uploads.request(request(1, 0), false, &none), "not here, and it does not wait");
    assert!(uploads.request(request(1, 0), true, &none) && uploads.request(request(1, 1), true, &have));
    assert!(uploads.request(request(2, 2), true, &have) && uploads.request(request(2, 3), true, &have));
    uploads.withdrawn(Member(2), 3);
    assert_eq!(uploads.next_upload(), Some(request(2, 2)), "the earliest that is left");
    assert_eq!(uploads.next_upload(), None, "one at a time");
    uploads.gone(Member(1));
    uploads.ended(request(2, 2));
    assert!(uploads.next_upload().is_none() && uploads.is_empty());
    for asker in 0..REQUESTS_MAX as u32 {
        assert!(uploads.request(request(asker, 0), true, &none));
    }
    assert!(!uploads.request(request(9, 1), true, &none));
}

/// What a puller was told and has in flight.
#[derive(Default)]
struct Model {
    in_flight: Vec<Ask>,
    refusals: BTreeSet<(Member, u32)>,
    never: BTreeSet<Member>,
}

impl Model {
    fn ask(&mut self, puller: &mut Puller, me: Member, limits: Limits) {
        while let Some(ask) = puller.next_ask() {
            assert_ne!(ask.member, me);
            assert!(!self.never.contains(&ask.member), "{ask:?}: gone, or wrong");
            assert!(!self.refusals.contains(&(ask.member, ask.chunk)), "{ask:?}: refused");
            assert!(!puller.have().has(ask.chunk), "{ask:?}: here");
            assert!(self.in_flight.iter().all(|other| other.chunk != ask.chunk), "{ask:?}: in flight");
            self.in_flight.push(ask);
            assert!(self.in_flight.len() <= limits.asks_max);
            let of_one = self.in_flight.iter().filter(|other| other.member == ask.member).count();
            assert!(of_one <= limits.asks_per_member_max);
        }
        assert!(puller.asked().eq(self.in_flight.iter().copied()));
    }

    fn pick(&self, lot: u16) -> Option<Ask> {
        self.in_flight.get(usize::from(lot) % self.in_flight.len().max(1)).copied()
    }

    fn take(&mut self, ask: Ask) -> bool {
        let before = self.in_flight.len();
        self.in_flight.retain(|other| *other != ask);
        self.in_flight.len() + 1 == before
    }

    fn arrives(&mut self, puller: &mut Puller, member: Member, chunk: u32) {
        let elsewhere = puller.arrived(member, chunk);
        let flying = self.in_flight.iter().copied().find(|ask| ask.chunk == chunk);
        assert_eq!(elsewhere, flying.filter(|ask| ask.member != member));
        self.in_flight.retain(|ask| ask.chunk != chunk);
    }

    fn refused(&mut self, puller: &mut Puller, ask: Ask, why: Refusal) {
        puller.refused(ask.member, ask.chunk, why);
        if why == Refusal::Wrong {
            // What else is in flight there may still be good.
            self.never.insert(ask.member);
        }
        self.refusals.insert((ask.member, ask.chunk));
        assert!(self.take(ask));
    }

    fn stalled(&mut self, puller: &mut Puller) {
        assert_eq!(puller.stalled(), self.in_flight);
        // What nobody was left for may be tried again; what has just stalled, elsewhere first.
        self.refusals.retain(|(_, chunk)| self.in_flight.iter().any(|ask| ask.chunk == *chunk));
        self.refusals.extend(self.in_flight.drain(..).map(|ask| (ask.member, ask.chunk)));
    }
}
