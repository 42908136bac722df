//! Laws of what is evicted: the counts beside counts written down plainly, bounds, and hits beside an LRU.

use std::{collections::HashSet, sync::Arc};

use metrics::Gauge;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::{
    delta::{Delta, DeltaSpec, Task},
    registry::{
        budget::ResidentBudget,
        seat::{Hold, Idle, Seat},
    },
};

fn id(n: u32) -> DeltaId {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    DeltaId::from_bytes(bytes)
}

fn number(id: &DeltaId) -> u32 {
    let b = id.as_bytes();
    u32::from_be_bytes([b[0], b[1], b[2], b[3]])
}

/// The same counts as numbers that all fade at every request, and every choice by looking at all.
struct Plain {
    room: u64,
    counts: BTreeMap<u32, [f64; KINDS]>,
    resident: BTreeSet<u32>,
    shadows: [Vec<(u32, u64)>; KINDS],
    hits: [f64; KINDS],
    requests: f64,
    chosen: usize,
}

impl Plain {
    fn new(room: u64) -> Self {
        let (shadows, hits) = (Default::default(), [0.0; KINDS]);
        let (counts, resident) = (BTreeMap::new(), BTreeSet::new());
        Self { room, counts, resident, shadows, hits, requests: 0.0, chosen: LONGEST }
    }

    fn count(&self, n: u32, kind: usize) -> f64 {
        self.counts.get(&n).map_or(0.0, |counts| counts[kind])
    }

    fn least(&self, kind: usize, of: impl Iterator<Item = u32>) -> Option<u32> {
        of.min_by(|a, b| self.count(*a, kind).total_cmp(&self.count(*b, kind)))
    }

    fn asked(&mut self, n: u32, bytes: u64) {
        let resident = self.resident.len() as f64;
        let fades = (-1.0 / (LATELY * resident)).exp2();
        self.requests = self.requests * fades + 1.0;
        for kind in 0..KINDS {
            for counts in self.counts.values_mut() {
                counts[kind] *= (-1.0 / (HALF_LIVES[kind] * resident)).exp2();
            }
            let count = &mut self.counts.entry(n).or_default()[kind];
            *count = (*count + 1.0).min(8.0);
            self.hits[kind] *= fades;
            let before = self.shadows[kind].len();
            self.shadows[kind].retain(|(other, _)| *other != n);
            self.hits[kind] += (before - self.shadows[kind].len()) as f64;
            while self.shadows[kind].iter().map(|(_, bytes)| bytes).sum::<u64>() + bytes > self.room {
                let least = self.least(kind, self.shadows[kind].iter().map(|(n, _)| *n));
                self.shadows[kind].retain(|(other, _)| Some(*other) != least);
            }
            self.shadows[kind].push((n, bytes));
        }
        let best = (0..KINDS).max_by(|a, b| self.hits[*a].total_cmp(&self.hits[*b])).unwrap();
        if self.hits[best] - self.hits[self.chosen] > MARGIN * self.requests {
            self.chosen = best;
        }
    }

    fn left(&mut self, n: u32) {
        self.resident.remove(&n);
        loop {
            let remembered = self.counts.keys().copied().filter(|n| !self.resident.contains(n));
            if remembered.clone().count() <= FEWEST_REMEMBERED.max(REMEMBERED * self.resident.len()) {
                return;
            }
            let least = self.least(LONGEST, remembered).unwrap();
            self.forget(least);
        }
    }

    fn forget(&mut self, n: u32) {
        self.counts.remove(&n);
        self.shadows.iter_mut().for_each(|shadow| shadow.retain(|(other, _)| *other != n));
    }
}

/// Seats beside the plain counts.
struct World {
    idle: Arc<Idle>,
    budget: Arc<ResidentBudget>,
    plain: Plain,
    seats: BTreeMap<u32, (Arc<Seat>, Vec<Hold>)>,
    kept: HashSet<DeltaId>,
    victims: usize,
}

fn delta() -> Arc<Delta> {
    let spec = DeltaSpec {
        methods: vec![],
        task: Task::CausalLm,
        labels: vec![],
        num_virtual_tokens: 0,
        problem: Default::default(),
        parameters: 0,
        resident_bytes: 0,
    };
    Arc::new(Delta::new(spec, vec![], None))
}

impl World {
    fn new(room: u64) -> Self {
        let budget = ResidentBudget::new(room, Gauge::noop());
        let idle = Idle::new(Arc::clone(&budget), Gauge::noop());
        Self { idle, budget, plain: Plain::new(room), seats: BTreeMap::new(), kept: HashSet::new(), victims: 0 }
    }

    fn bytes(n: u32) -> u64 {
        1 + u64::from(n % 5)
    }

    /// Holds one, if there is room: as `cache` does it.
    fn ask(&mut self, n: u32) {
        let mut loaded = None;
        if !self.seats.contains_key(&n) {
            let reservation = loop {
                if let Some(reservation) = self.budget.try_reserve(Self::bytes(n)) {
                    break reservation;
                }
                let free =
                    self.seats.iter().filter(|(n, (_, holds))| holds.is_empty() && !self.kept.contains(&id(**n)));
                let least = self.plain.least(self.plain.chosen, free.map(|(n, _)| *n));
                let victim = self.idle.evict_one(&self.kept).map(|seat| number(&seat.id));
                assert_eq!(victim, least, "of {:?}", self.seats.keys());
                let Some(victim) = victim else { return };
                self.victims += 1;
                self.seats.remove(&victim);
                self.plain.left(victim);
            };
            let hold = self.idle.seat(id(n), vec![], delta(), reservation);
            self.plain.resident.insert(n);
            self.seats.insert(n, (Arc::clone(hold.seat()), vec![]));
            loaded = Some(hold);
        }
        let (seat, holds) = self.seats.get_mut(&n).unwrap();
        let (_, hold) = self.idle.hold(seat).expect("what is in memory can be held");
        holds.push(hold);
        self.plain.asked(n, Self::bytes(n));
        drop(loaded);
    }

    fn check(&self) {
        let bytes: u64 = self.seats.keys().map(|n| Self::bytes(*n)).sum();
        assert!(bytes == self.budget.used() && bytes <= self.budget.limit());
        let held = self.seats.values().filter(|(_, holds)| !holds.is_empty());
        assert_eq!((self.idle.resident(), self.idle.leased()), (self.seats.len() as u64, held.count() as u64));
        for (seat, holds) in self.seats.values() {
            assert!(seat.usage().0 > 0 && seat.usage().1 == holds.len() as u64, "what is held is in memory");
        }
    }
}

#[test]
fn the_least_by_plain_counts_goes_and_never_what_is_held_or_kept() {
    let mut choices = BTreeSet::new();
    for seed in 0..12 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut w = World::new(40);
        for step in 0..1200 {
            // popular ones, which are others after a while, and ever new ones between
            let n = match rng.random_range(0..10) {
                0 => 1000 + step,
                1..4 => rng.random_range(0..200),
                _ => (rng.random_range(0..20) + step / 300 * 20) % 200,
            };
            w.ask(n);
            let held: Vec<u32> = w.seats.iter().filter(|(_, (_, holds))| !holds.is_empty()).map(|(n, _)| *n).collect();
            // up to five are held, some of them several times
            for n in held.iter().filter(|_| held.len() > 5 || rng.random_range(0..3) == 0) {
                w.seats.get_mut(n).unwrap().1.pop();
            }
            if rng.random_range(0..20) == 0 {
                w.kept = (0..2).map(|_| id(rng.random_range(0..200))).collect();
            }
            if rng.random_range(0..50) == 0 && w.seats.get(&n).is_some_and(|(_, holds)| holds.is_empty()) {
                let (seat, _) = w.seats.remove(&n).unwrap();
                w.idle.retire(&seat);
                w.plain.left(n);
                w.idle.forget(&id(n));
                w.plain.forget(n);
                assert!(w.idle.hold(&seat).is_none());
            }
            choices.insert(w.plain.chosen);
            w.check();
        }
        assert!(w.victims > 200, "{}", w.victims);
    }
    assert!(choices.len() > 1, "one half-life was gone by in all of it");
}

#[test]
fn a_million_ids_asked_for_once_take_bounded_memory() {
    let mut demand = Demand::new(8);
    for n in 0..1_000_000 {
        if n >= 8 {
            demand.left(id(n - 8));
        }
        demand.seated(id(n));
        demand.asked(id(n), 1);
        let shadowed = demand.shadows.iter().map(|shadow| shadow.order.len()).max();
        let bounds = (demand.resident, shadowed, demand.entries.len());
        assert!(bounds.0 <= 8 && bounds.1 <= Some(8) && bounds.2 <= 8 + FEWEST_REMEMBERED, "{bounds:?}");
    }
    assert_eq!(demand.entries.len(), 8 + FEWEST_REMEMBERED);
    assert_eq!(demand.remembered.len(), FEWEST_REMEMBERED);
    for n in 999_992..1_000_000 {
        demand.forget(&id(n));
        demand.left(id(n));
    }
    assert_eq!((demand.resident, demand.entries.len()), (0, FEWEST_REMEMBERED));
    demand.remembered.clone().iter().for_each(|(_, id)| demand.forget(id));
    let empty = demand.shadows.iter().all(|shadow| shadow.order.is_empty() && shadow.bytes == 0);
    assert!(empty && demand.entries.is_empty() && demand.remembered.is_empty());
}

#[test]
fn counts_outlive_eviction_and_not_a_deletion() {
    let mut demand = Demand::new(4);
    let ask = |demand: &mut Demand, n: u32| {
        demand.seated(id(n));
        demand.asked(id(n), 1);
        demand.left(id(n));
    };
    (0..3).for_each(|_| ask(&mut demand, 1));
    ask(&mut demand, 2);
    assert!(demand.score(&id(1)) > demand.score(&id(2)), "three requests are more than one later");
    ask(&mut demand, 1);
    demand.forget(&id(1));
    assert_eq!(demand.score(&id(1)), Score::NEVER);
    ask(&mut demand, 1);
    ask(&mut demand, 2);
    assert!(demand.score(&id(1)) < demand.score(&id(2)), "it began anew");
    // two in memory: deleted while one is leased, published and loaded again
    demand.seated(id(3));
    demand.asked(id(3), 1);
    demand.forget(&id(3));
    demand.seated(id(3));
    demand.left(id(3));
    demand.left(id(3));
    assert!(demand.resident == 0 && !demand.entries.contains_key(&id(3)), "nobody asked for what is there now");
    demand.left(id(3));
    assert_eq!(demand.resident, 0, "what is not there does not leave");
}

/// No count is larger than eight, however many requests there are: it takes as long to be forgotten.
#[test]
fn a_flood_of_requests_counts_for_eight() {
    let (mut flood, mut eight) = (Score::NEVER, Score::NEVER);
    for i in 0..10_000 {
        flood = flood.and(f64::from(i) * 1e-6);
        eight = if i >= 9990 { eight.and(f64::from(i) * 1e-6) } else { eight };
    }
    assert!(flood.0 - eight.0 < 1e-4 && flood.0 <= 9999e-6 + LARGEST, "{flood:?} {eight:?}");
}

/// Hits of a cache with room for so many of one size.
fn hits(trace: &[u32], room: usize) -> f64 {
    let (mut demand, mut cached, mut hits) = (Demand::new(room as u64), Vec::new(), 0.0);
    for n in trace {
        if cached.contains(n) {
            hits += 1.0;
        } else {
            if cached.len() == room {
                let least = (0..room).min_by_key(|i| demand.score(&id(cached[*i]))).unwrap();
                demand.left(id(cached.swap_remove(least)));
            }
            demand.seated(id(*n));
            cached.push(*n);
        }
        demand.asked(id(*n), 1);
    }
    hits / trace.len() as f64
}

fn lru_hits(trace: &[u32], room: usize) -> f64 {
    let (mut cached, mut hits) = (Vec::new(), 0.0);
    for n in trace {
        match cached.iter().position(|other| other == n) {
            Some(i) => {
                hits += 1.0;
                cached.remove(i);
            }
            None if cached.len() == room => drop(cached.remove(0)),
            None => {}
        }
        cached.push(*n);
    }
    hits / trace.len() as f64
}

/// Draws ranks by Zipf's law with exponent 1.
fn ranks(deltas: usize) -> impl Fn(&mut StdRng) -> u32 {
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=deltas)
        .map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        })
        .collect();
    move |rng| sums.partition_point(|s| *s <= rng.random::<f64>() * sum).min(deltas - 1) as u32
}

#[test]
fn hits_are_more_than_an_lrus_where_popularity_stays_and_hardly_fewer_where_it_does_not() {
    const ROOM: usize = 64;
    const DELTAS: u32 = 2500;
    let draw = ranks(DELTAS as usize);
    for seed in 0..3 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut trace = |next: &mut dyn FnMut(usize, &mut StdRng) -> u32| -> Vec<u32> {
            (0..15_000).map(|i| next(i, &mut rng)).collect()
        };
        let mut talks: Vec<u32> = vec![0; 55];
        let traces = [
            ("popularity stays", 0.08, trace(&mut |_, rng| draw(rng))),
            // of each 1250 requests, 250 are for deltas that nobody asks for again
            ("scans", 0.06, trace(&mut |i, rng| if i % 1250 < 250 { DELTAS + i as u32 } else { draw(rng) })),
            // every 800 or 4000 requests, others are popular
            ("it changes", -0.01, trace(&mut |i, rng| (draw(rng) * 31 + (i / 800 * 797) as u32) % DELTAS)),
            ("it changes now and then", 0.02, trace(&mut |i, rng| (draw(rng) * 31 + (i / 4000 * 797) as u32) % DELTAS)),
            // 55 conversations at a time, of 12 requests on average
            (
                "conversations",
                -0.01,
                trace(&mut |_, rng| {
                    let talk = rng.random_range(0..talks.len());
                    if talks[talk] == 0 || rng.random_range(0..12) == 0 {
                        talks[talk] = 1 + draw(rng);
                    }
                    talks[talk]
                }),
            ),
        ];
        for (name, more, trace) in traces {
            let (ours, lru) = (hits(&trace, ROOM), lru_hits(&trace, ROOM));
            assert!(ours > lru + more, "{seed}, {name}: {ours} and {lru}");
        }
    }
}
