//! The events of one run.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use serde::Serialize;

use super::Scenario;
use super::links::Links;
use crate::plan::spread::puller::mix;
use crate::plan::spread::{Ask, Chunks, Limits, Member, Order, Puller, Refusal, Request, Uploads};

/// Times of one chunk without an arrival until a node takes all that it has asked for elsewhere.
const PATIENCE_CHUNKS: u64 = 16;
/// Such times without an arrival anywhere until a run ends in which somebody has not everything.
const STALLS_MAX: u64 = 64;
/// When nodes die, in parts of the time that one node takes.
const DEATHS: (f64, f64) = (0.1, 0.9);

/// What came of it. Times are from the first ask on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// One node that asks one source, nanoseconds.
    pub one_ns: u64,
    /// Until half of the nodes had everything, nanoseconds.
    pub p50_ns: u64,
    /// Until 99 % had.
    pub p99_ns: u64,
    /// Until the last had.
    pub last_ns: u64,
    /// Until the last had of those whose links are not slow and that were there from the beginning.
    pub last_ordinary_ns: u64,
    /// `last_ns` by `one_ns`.
    pub ratio: f64,
    /// `last_ordinary_ns` by `one_ns`.
    pub ratio_ordinary: f64,
    /// Nodes that have everything.
    pub complete: u32,
    /// Nodes that live and have not.
    pub incomplete: u32,
    /// Nodes that died.
    pub died: u32,
    /// Bytes that sources read from storage, in artifacts: each reads a chunk when it first sends it.
    pub storage_reads: f64,
    /// Chunks that left a source, in artifacts.
    pub source_sent: f64,
    /// Chunks that were sent.
    pub sent: u64,
    /// Chunks that arrived at a node that had them, and chunks whose bytes were wrong.
    pub wasted: u64,
    /// Asks.
    pub asks: u64,
    /// Of these, asks for a chunk that the same node had asked for before.
    pub asked_again: u64,
    /// Of each rack what its uplink carried; empty with one rack.
    pub racks: Vec<Rack>,
}

/// What the uplink of a rack carried.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rack {
    /// Artifacts that left it.
    pub sent: f64,
    /// Artifacts that came in.
    pub received: f64,
    /// Part of what it could have carried until the last node had everything, in the busier direction.
    pub used: f64,
}

/// In the order in which those of one moment are handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Died { node: u32 },
    Noticed { node: u32 },
    Joined { node: u32 },
    Arrived { server: u32, asker: u32, chunk: u32, wrong: bool, had: u32, serving: u32 },
    Withdrawn { server: u32, asker: u32, chunk: u32 },
    Asked { server: u32, asker: u32, chunk: u32, turn: u32, waits: bool },
    Refused { server: u32, asker: u32, chunk: u32, had: u32, serving: u32 },
    Ended { server: u32, request: Request },
    Free { server: u32 },
    Patience { node: u32 },
}

#[derive(Debug)]
struct Node {
    puller: Puller,
    uploads: Uploads,
    /// When it dies.
    dies_ns: u64,
    joins_ns: u64,
    is_slow: bool,
    heard_ns: u64,
    complete_ns: Option<u64>,
    /// Of a source: what it has read from storage.
    read: Chunks,
    /// What it has asked for.
    asked: Chunks,
    sent: u64,
}

/// A run: the nodes (sources, those who are there, those who join), and what is going to happen.
#[derive(Debug)]
pub(super) struct Run {
    scenario: Scenario,
    now_ns: u64,
    queue: BinaryHeap<Reverse<(u64, Event)>>,
    nodes: Vec<Node>,
    links: Links,
    /// Nodes that may have something to send.
    busy: Vec<u32>,
    patience_ns: u64,
    progress_ns: u64,
    missing: u32,
    lots: u64,
    wasted: u64,
    asks: u64,
    asked_again: u64,
}

impl Run {
    /// `one_ns`: what one node takes. `None` if a number is out of bounds.
    pub(super) fn new(scenario: &Scenario, one_ns: u64) -> Option<Run> {
        if !scenario.is_sound() {
            return None;
        }
        let Scenario { sources, nodes, chunks, .. } = *scenario;
        let members = sources + nodes;
        let late = part(nodes, scenario.late).min(nodes - 1);
        let mut links = Links::new(scenario, members as usize);
        let racks: Vec<u32> = (0..members).map(|node| links.rack(node as usize)).collect();
        let order = |members: u32| {
            let racks = if scenario.racks > 1 { &racks[..members as usize] } else { &[] };
            Some(Arc::new(Order::new(members, sources, chunks, racks)?))
        };
        // Who is there from the beginning never learns of those who join.
        let (early, all) = (order(members - late)?, order(members)?);
        let asks_max = scenario.asks_max as usize;
        let limits = Limits { asks_max, asks_per_member_max: asks_max, late_chunks: 2 * scenario.asks_max };
        let mut lots = mix(scenario.seed);
        let mut draw = || {
            lots = lots.wrapping_add(1);
            mix(lots)
        };
        let mut made = Vec::with_capacity(members as usize);
        for node in 0..members {
            let joins_ns = if node >= members - late { one_ns / 2 } else { 0 };
            let order = if joins_ns > 0 { &all } else { &early };
            let have = if node < sources { Chunks::all(chunks) } else { Chunks::none(chunks) };
            made.push(Node {
                puller: Puller::new(Arc::clone(order), Member(node), have, limits)?,
                uploads: Uploads::new(scenario.uploads_max as usize),
                dies_ns: u64::MAX,
                joins_ns,
                is_slow: false,
                heard_ns: joins_ns,
                complete_ns: None,
                read: Chunks::none(if node < sources { chunks } else { 0 }),
                asked: Chunks::none(chunks),
                sent: 0,
            });
        }
        // Lots for all who want the artifact: the first so many of a shuffled row die, the next so many are slow.
        let mut row: Vec<u32> = (sources..members).collect();
        for at in (1..row.len()).rev() {
            row.swap(at, (draw() % (at as u64 + 1)) as usize);
        }
        let (fail, slow) = (part(nodes, scenario.fail), part(nodes, scenario.slow));
        for &node in row.iter().take(fail as usize) {
            let at = DEATHS.0 + (DEATHS.1 - DEATHS.0) * unit(draw());
            made[node as usize].dies_ns = (one_ns as f64 * at) as u64;
        }
        for &node in row.iter().skip(fail as usize).take(slow as usize) {
            made[node as usize].is_slow = true;
            links.slow_down(node as usize, scenario.slow_rate);
        }
        let patience_ns =
            PATIENCE_CHUNKS * (links.chunk_ns(0) + scenario.verify_ns) + 8 * scenario.latency_ns;
        Some(Run {
            scenario: scenario.clone(),
            now_ns: 0,
            queue: BinaryHeap::new(),
            nodes: made,
            links,
            busy: Vec::new(),
            patience_ns,
            progress_ns: 0,
            missing: nodes,
            lots,
            wasted: 0,
            asks: 0,
            asked_again: 0,
        })
    }

    /// Runs to its end.
    pub(super) fn outcome(mut self, one_ns: u64) -> Outcome {
        for node in self.scenario.sources..self.nodes.len() as u32 {
            let (joins_ns, dies_ns) = (self.nodes[node as usize].joins_ns, self.nodes[node as usize].dies_ns);
            self.queue.push(Reverse((joins_ns, Event::Joined { node })));
            if dies_ns != u64::MAX {
                self.queue.push(Reverse((dies_ns, Event::Died { node })));
            }
        }
        while let Some(Reverse((at_ns, event))) = self.queue.pop() {
            if self.missing == 0 || at_ns > self.progress_ns + STALLS_MAX * self.patience_ns {
                break;
            }
            self.now_ns = at_ns;
            self.handle(event);
            // Only when all of this moment is known, free links choose what they send.
            if self.queue.peek().is_none_or(|Reverse((next_ns, _))| *next_ns > at_ns) {
                for server in std::mem::take(&mut self.busy) {
                    self.send(server);
                }
            }
        }
        self.summary(one_ns)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Died { node } => self.died(node),
            Event::Noticed { node } => self.noticed(node),
            Event::Joined { node } => {
                if self.lives(node) {
                    self.after(self.patience_ns, Event::Patience { node });
                    self.ask(node);
                }
            }
            Event::Arrived { server, asker, chunk, wrong, had, serving } => {
                if self.lives(asker) {
                    self.nodes[asker as usize].puller.heard(Member(server), had, serving);
                    self.arrived(server, asker, chunk, wrong);
                }
            }
            Event::Withdrawn { server, asker, chunk } => {
                self.nodes[server as usize].uploads.withdrawn(Member(asker), chunk);
            }
            Event::Asked { server, asker, chunk, turn, waits } => {
                if !self.lives(server) {
                    return;
                }
                let Node { puller, uploads, .. } = &mut self.nodes[server as usize];
                let request = Request { turn, asker: Member(asker), chunk };
                if uploads.request(request, waits, puller.have()) {
                    self.busy.push(server);
                } else {
                    let (had, serving) = (puller.have().count(), uploads.len() as u32);
                    let event = Event::Refused { server, asker, chunk, had, serving };
                    self.after(self.scenario.latency_ns, event);
                }
            }
            Event::Refused { server, asker, chunk, had, serving } => {
                if self.lives(asker) {
                    self.nodes[asker as usize].puller.heard(Member(server), had, serving);
                    self.nodes[asker as usize].puller.refused(Member(server), chunk, Refusal::NotNow);
                    self.ask(asker);
                }
            }
            Event::Ended { server, request } => {
                self.nodes[server as usize].uploads.ended(request);
                self.busy.push(server);
            }
            Event::Free { server } => self.busy.push(server),
            Event::Patience { node } => self.patience(node),
        }
    }

    fn lives(&self, node: u32) -> bool {
        let Node { joins_ns, dies_ns, .. } = self.nodes[node as usize];
        (joins_ns..dies_ns).contains(&self.now_ns)
    }

    fn after(&mut self, ns: u64, event: Event) {
        self.queue.push(Reverse((self.now_ns + ns, event)));
    }

    fn died(&mut self, node: u32) {
        if self.nodes[node as usize].complete_ns.is_none() {
            self.missing -= 1;
        }
        self.after(self.scenario.notice_ns, Event::Noticed { node });
    }

    fn noticed(&mut self, dead: u32) {
        for node in 0..self.nodes.len() as u32 {
            if self.nodes[node as usize].dies_ns > self.now_ns {
                self.nodes[node as usize].puller.gone(Member(dead));
                self.nodes[node as usize].uploads.gone(Member(dead));
                if self.lives(node) {
                    self.ask(node);
                }
            }
        }
    }

    fn arrived(&mut self, server: u32, asker: u32, chunk: u32, wrong: bool) {
        let node = &mut self.nodes[asker as usize];
        if wrong {
            self.wasted += 1;
            node.puller.refused(Member(server), chunk, Refusal::Wrong);
            return self.ask(asker);
        }
        (node.heard_ns, self.progress_ns) = (self.now_ns, self.now_ns);
        if node.puller.have().has(chunk) {
            self.wasted += 1;
        }
        let mut withdrawn: Vec<Ask> = node.puller.arrived(Member(server), chunk).into_iter().collect();
        withdrawn.extend(std::iter::from_fn(|| node.puller.late()));
        node.uploads.arrived(chunk);
        if node.complete_ns.is_none() && node.puller.have().is_complete() {
            node.complete_ns = Some(self.now_ns);
            self.missing -= 1;
        }
        self.busy.push(asker);
        self.withdraw(asker, &withdrawn);
        self.ask(asker);
    }

    fn withdraw(&mut self, asker: u32, asks: &[Ask]) {
        for ask in asks {
            let event = Event::Withdrawn { server: ask.member.0, asker, chunk: ask.chunk };
            self.after(self.scenario.latency_ns, event);
        }
    }

    fn ask(&mut self, asker: u32) {
        while let Some(Ask { member, chunk, turn, waits }) = self.nodes[asker as usize].puller.next_ask() {
            self.asks += 1;
            self.asked_again += u64::from(!self.nodes[asker as usize].asked.insert(chunk));
            let event = Event::Asked { server: member.0, asker, chunk, turn, waits };
            self.after(self.scenario.latency_ns, event);
        }
    }

    fn patience(&mut self, node: u32) {
        let Node { complete_ns, heard_ns, .. } = self.nodes[node as usize];
        if !self.lives(node) || complete_ns.is_some() {
            return;
        }
        let mut from_ns = heard_ns;
        if self.now_ns - heard_ns >= self.patience_ns {
            let withdrawn = self.nodes[node as usize].puller.stalled();
            self.withdraw(node, &withdrawn);
            self.ask(node);
            from_ns = self.now_ns;
        }
        self.queue.push(Reverse((from_ns + self.patience_ns, Event::Patience { node })));
    }

    fn send(&mut self, server: u32) {
        let at = server as usize;
        if !self.lives(server) || !self.links.is_free(at, self.now_ns) {
            return;
        }
        let node = &mut self.nodes[at];
        let Some(request) = node.uploads.next_upload() else { return };
        node.sent += 1;
        node.read.insert(request.chunk);
        let (had, serving) = (node.puller.have().count(), node.uploads.len() as u32);
        let dies_ns = node.dies_ns;
        let asker = request.asker.0;
        let passage = self.links.send(at, asker as usize, self.now_ns);
        self.queue.push(Reverse((passage.received_ns, Event::Ended { server, request })));
        self.queue.push(Reverse((passage.left_ns, Event::Free { server })));
        if dies_ns >= passage.left_ns {
            self.lots = self.lots.wrapping_add(1);
            let wrong = unit(mix(self.lots)) < self.scenario.corrupt;
            let at_ns = passage.received_ns + self.scenario.latency_ns + self.scenario.verify_ns;
            let event = Event::Arrived { server, asker, chunk: request.chunk, wrong, had, serving };
            self.queue.push(Reverse((at_ns, event)));
        }
    }

    fn summary(&self, one_ns: u64) -> Outcome {
        let sources = self.scenario.sources as usize;
        let artifact = f64::from(self.scenario.chunks);
        let members = self.nodes.iter().skip(sources);
        let mut times: Vec<u64> = members.clone().filter_map(|node| node.complete_ns).collect();
        times.sort_unstable();
        let at = |part: f64| {
            let rank = (times.len() as f64 * part).ceil() as usize;
            times.get(rank.saturating_sub(1)).copied().unwrap_or(0)
        };
        let ordinary = members.clone().filter(|node| !node.is_slow && node.joins_ns == 0);
        let last_ordinary_ns = ordinary.filter_map(|node| node.complete_ns).max().unwrap_or(0);
        let died = members.clone().filter(|node| node.dies_ns <= self.now_ns).count() as u32;
        let unhelped = |node: &&Node| node.complete_ns.is_none() && node.dies_ns > self.now_ns;
        let incomplete = members.filter(unhelped).count() as u32;
        // Of one node itself there is nothing to compare with.
        let one_ns = if one_ns == 0 { at(1.0) } else { one_ns };
        let ratio = |ns: u64| ns as f64 / one_ns.max(1) as f64;
        let sum = |of: fn(&Node) -> u64| self.nodes.iter().take(sources).map(of).sum::<u64>() as f64;
        let rack = |rack: &super::links::Uplink| Rack {
            sent: rack.out_chunks as f64 / artifact,
            received: rack.in_chunks as f64 / artifact,
            used: (rack.out_chunks.max(rack.in_chunks) * rack.chunk_ns) as f64 / at(1.0).max(1) as f64,
        };
        Outcome {
            one_ns,
            p50_ns: at(0.5),
            p99_ns: at(0.99),
            last_ns: at(1.0),
            last_ordinary_ns,
            ratio: ratio(at(1.0)),
            ratio_ordinary: ratio(last_ordinary_ns),
            complete: times.len() as u32,
            incomplete,
            died,
            storage_reads: sum(|node| u64::from(node.read.count())) / artifact,
            source_sent: sum(|node| node.sent) / artifact,
            sent: self.nodes.iter().map(|node| node.sent).sum(),
            wasted: self.wasted,
            asks: self.asks,
            asked_again: self.asked_again,
            racks: if self.links.racks.len() > 1 {
                self.links.racks.iter().map(rack).collect()
            } else {
                Vec::new()
            },
        }
    }
}

/// A part of so many nodes, at least one if it is not none.
fn part(nodes: u32, part: f64) -> u32 {
    (f64::from(nodes) * part).ceil() as u32
}

/// From 0 up to 1.
fn unit(lot: u64) -> f64 {
    (lot >> 11) as f64 / (1u64 << 53) as f64
}
