//! The members of a spread and where each stands on the cube.

use super::turns::Turns;
use super::{CHUNKS_MAX, Member};

/// Members of one spread, at most.
pub const MEMBERS_MAX: u32 = 1 << 20;

/// The members of a spread, the same for everyone who takes part.
///
/// Each source has a cube of its own with a share of the other members. A member shares its vertex with at most one
/// other. While racks are not known, a member that is appended moves nobody, except that at each doubling those who shared a
/// vertex part. With racks known, neighbours on the low dimensions and at one vertex are of one rack where that can
/// be.
#[derive(Debug)]
pub struct Order {
    sources: u32,
    chunks: u32,
    cubes: Vec<Cube>,
    places: Vec<Place>,
    racks: Vec<u32>,
}

#[derive(Debug)]
struct Cube {
    dims: u32,
    vertices: Vec<Vertex>,
}

/// Who is at a vertex.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vertex {
    pub(super) first: Member,
    pub(super) second: Option<Member>,
}

impl Vertex {
    pub(super) fn members(self) -> impl Iterator<Item = Member> {
        std::iter::once(self.first).chain(self.second)
    }

    /// The member that stands there as `which`, 0 or 1.
    pub(super) fn get(self, which: usize) -> Member {
        if which == 0 { self.first } else { self.second.unwrap_or(self.first) }
    }
}

/// Where a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) cube: u32,
    pub(super) vertex: u32,
    /// 0 or 1.
    pub(super) which: usize,
}

impl Order {
    /// The order of `members` members, of which the first `sources` have all `chunks` chunks. `racks` has the rack of each
    /// member, or nothing if they are not known.
    ///
    /// `None` if there is no source, no chunk, a count above [`MEMBERS_MAX`] or [`CHUNKS_MAX`], or not one rack for
    /// each.
    pub fn new(members: u32, sources: u32, chunks: u32, racks: &[u32]) -> Option<Order> {
        let sizes_fit = (1..=members).contains(&sources) && members <= MEMBERS_MAX;
        let racks_fit = racks.is_empty() || racks.len() == members as usize;
        if !sizes_fit || !racks_fit || !(1..=CHUNKS_MAX).contains(&chunks) {
            return None;
        }
        let racks_matter = racks.iter().any(|rack| *rack != racks[0]);
        let mut shares: Vec<Vec<Member>> = (0..sources).map(|source| vec![Member(source)]).collect();
        let mut others: Vec<Member> = (sources..members).map(Member).collect();
        if racks_matter {
            // The source's own rack is at the low vertices, where it is.
            others.sort_by_key(|member| (racks[member.0 as usize] != racks[0], racks[member.0 as usize]));
        }
        let share_len = others.len().div_ceil(shares.len()).max(1);
        for (at, member) in others.into_iter().enumerate() {
            let share = if racks_matter { at / share_len } else { at % shares.len() };
            shares[share].push(member);
        }
        let mut places = vec![Place { cube: 0, vertex: 0, which: 0 }; members as usize];
        let cubes =
            (0u32..).zip(&shares).map(|(cube, share)| Cube::new(cube, share, racks_matter, &mut places));
        let cubes = cubes.collect();
        Some(Order { sources, chunks, cubes, places, racks: racks.to_vec() })
    }

    /// How many members there are.
    pub fn members(&self) -> u32 {
        self.places.len() as u32
    }

    /// How many of them are sources: the first.
    pub fn sources(&self) -> u32 {
        self.sources
    }

    /// How many chunks are spread.
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    pub(super) fn is_source(&self, member: Member) -> bool {
        member.0 < self.sources
    }

    /// Whether both are known to be in the same rack.
    pub(super) fn same_rack(&self, one: Member, other: Member) -> bool {
        let rack = |member: Member| self.racks.get(member.0 as usize);
        rack(one).is_some() && rack(one) == rack(other)
    }

    pub(super) fn place(&self, member: Member) -> Place {
        self.places[member.0 as usize]
    }

    pub(super) fn vertex(&self, cube: u32, vertex: u32) -> Vertex {
        self.cubes[cube as usize].vertices[vertex as usize]
    }

    pub(super) fn turns(&self, cube: u32) -> Turns {
        Turns { dims: self.cubes[cube as usize].dims, chunks: self.chunks }
    }

    /// The turn in which `chunk` arrives at a place if all is as it should be, and the neighbour that it comes from.
    pub(super) fn due(&self, place: Place, chunk: u32) -> (u32, u32) {
        let turns = self.turns(place.cube);
        let turn = turns.arrival(place.vertex, chunk);
        (turn, turns.neighbour(place.vertex, turn))
    }

    /// The vertex and its neighbours.
    pub(super) fn around(&self, cube: u32, vertex: u32) -> impl Iterator<Item = u32> {
        (0..self.cubes[cube as usize].dims).map(move |dim| vertex ^ 1 << dim).chain([vertex])
    }

    /// Whether `one` is due to have `chunk` before `other`, who may therefore wait for it there.
    ///
    /// It is a strict order for each chunk. Of two at one vertex neither comes before the other here: only the schedule
    /// lets one of them wait on the other.
    pub(super) fn before(&self, one: Member, other: Member, chunk: u32) -> bool {
        if self.is_source(one) || self.is_source(other) {
            return !self.is_source(other);
        }
        let (one, other) = (self.place(one), self.place(other));
        one.cube == other.cube && self.due(one, chunk).0 < self.due(other, chunk).0
    }
}

impl Cube {
    /// `share` begins with the source.
    fn new(cube: u32, share: &[Member], by_rack: bool, places: &mut [Place]) -> Cube {
        let count = share.len() as u64;
        // None for a source alone: nobody there asks for anything.
        let dims = share.len().ilog2();
        let size = 1u64 << dims;
        let mut vertices: Vec<Vertex> = Vec::with_capacity(size as usize);
        let mut put = |member: Member, vertex: u64| {
            let which = match vertices.get_mut(vertex as usize) {
                Some(vertex) => {
                    vertex.second = Some(member);
                    1
                }
                None => {
                    vertices.push(Vertex { first: member, second: None });
                    0
                }
            };
            places[member.0 as usize] = Place { cube, vertex: vertex as u32, which };
        };
        for (at, member) in (0u64..).zip(share.iter().copied()) {
            // One after the other, or, for racks, so that those next to each other in the order share a vertex.
            put(member, if by_rack { at * size / count } else { at % size });
        }
        Cube { dims, vertices }
    }
}
