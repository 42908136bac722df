//! How much each delta is asked for, which decides what is evicted: counts of requests that fade, at a rate that is itself chosen by
//! what it would have kept.
//!
//! A request counts for one, and for half of that a half-life later (LRFU, Lee et al. 2001). No half-life suits all traffic. A long
//! one knows best which deltas are popular for as long as they stay so, and a scan of others does not displace them; a short one
//! follows popularity that moves and conversations that come back. So each count is kept with several ([`HALF_LIVES`]), and for each
//! of them a *shadow* says, in ids alone, what a cache of the same bytes that evicts by it would hold now. Victims are chosen by the
//! half-life whose shadow has had the most hits lately.
//!
//! Counts outlive eviction: otherwise what does not fit could never prove popular. Those of a bounded number of evicted ids are
//! kept, and the least of them are dropped first. An id is a digest of a version's bytes, so a replaced version starts with no count.
//! Knows ids and bytes only; whose they are is the catalog's matter, and who holds them the seat's.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use crate::ids::DeltaId;

/// In requests per resident delta. The first is nearly least recently used first.
const HALF_LIVES: [f64; KINDS] = [1.0, 8.0, 32.0];
const KINDS: usize = 3;
/// The longest half-life: by it, it is decided what is remembered.
const LONGEST: usize = KINDS - 1;
/// The binary logarithm of the largest count. A larger one would say no more about what to evict, and keep what was popular for longer
/// after it is no more.
const LARGEST: f64 = 3.0;
/// A shadow's hit counts for half after so many requests per resident delta.
const LATELY: f64 = 4.0;
/// By which share of the requests a shadow has to have more hits than the one gone by, to be gone by from then on.
const MARGIN: f64 = 0.01;
/// Evicted ids that are remembered, per resident delta, and their least and largest number.
const REMEMBERED: usize = 4;
const FEWEST_REMEMBERED: usize = 64;
const MOST_REMEMBERED: usize = 1 << 16;

/// The binary logarithm of a count as it would be at the beginning of all time: log2 of the sum of 2^(time / half-life) over its
/// requests. All counts fade alike, so that their order only changes where one is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Score(f64);

impl Score {
    const NEVER: Self = Self(f64::NEG_INFINITY);

    /// With another request at `now`, in half-lives.
    fn and(self, now: f64) -> Self {
        let (high, low) = (self.0.max(now), self.0.min(now));
        let both = high + (low - high).exp2().ln_1p() / std::f64::consts::LN_2;
        Self(both.min(now + LARGEST))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Score {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Score {}

#[derive(Debug)]
struct Entry {
    scores: [Score; KINDS],
    /// Its deltas in memory: two where one was evicted while it is leased, and loaded again.
    seats: usize,
}

/// What a cache that evicts by one of the half-lives would hold.
#[derive(Debug, Default)]
struct Shadow {
    /// With the bytes of each.
    order: BTreeMap<(Score, DeltaId), u64>,
    bytes: u64,
    /// Fading.
    hits: f64,
}

impl Shadow {
    fn ask(&mut self, id: DeltaId, (before, after): (Score, Score), bytes: u64, room: u64) {
        if self.remove(before, id) {
            self.hits += 1.0;
        }
        while self.bytes.saturating_add(bytes) > room
            && let Some((_, freed)) = self.order.pop_first()
        {
            self.bytes -= freed;
        }
        self.order.insert((after, id), bytes);
        self.bytes += bytes;
    }

    fn remove(&mut self, score: Score, id: DeltaId) -> bool {
        let bytes = self.order.remove(&(score, id));
        self.bytes -= bytes.unwrap_or(0);
        bytes.is_some()
    }
}

/// Counts of requests, by id.
#[derive(Debug)]
pub(super) struct Demand {
    /// Bytes of the cache.
    room: u64,
    /// The clock: each request advances it by one over the number of resident deltas.
    now: f64,
    entries: HashMap<DeltaId, Entry>,
    /// Ids in memory.
    resident: usize,
    /// Ids that have a count and are not in memory, by the longest half-life.
    remembered: BTreeSet<(Score, DeltaId)>,
    shadows: [Shadow; KINDS],
    /// Requests, fading like the shadows' hits.
    requests: f64,
    /// Which half-life is gone by.
    chosen: usize,
}

impl Demand {
    /// Of a cache of so many bytes.
    pub(super) fn new(room: u64) -> Self {
        Self {
            room,
            now: 0.0,
            entries: HashMap::new(),
            resident: 0,
            remembered: BTreeSet::new(),
            shadows: Default::default(),
            requests: 0.0,
            chosen: LONGEST,
        }
    }

    /// A delta of the id is in memory.
    pub(super) fn seated(&mut self, id: DeltaId) {
        let entry = self.entries.entry(id).or_insert(Entry { scores: [Score::NEVER; KINDS], seats: 0 });
        if entry.seats == 0 {
            self.resident += 1;
            self.remembered.remove(&(entry.scores[LONGEST], id));
        }
        entry.seats += 1;
    }

    /// One that was, is no more.
    pub(super) fn left(&mut self, id: DeltaId) {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.seats > 0) else { return };
        entry.seats -= 1;
        if entry.seats > 0 {
            return;
        }
        self.resident -= 1;
        let score = entry.scores[LONGEST];
        if score == Score::NEVER {
            self.entries.remove(&id);
            return;
        }
        self.remembered.insert((score, id));
        let most = (REMEMBERED * self.resident).clamp(FEWEST_REMEMBERED, MOST_REMEMBERED);
        while self.remembered.len() > most
            && let Some((_, least)) = self.remembered.pop_first()
        {
            self.drop_entry(&least);
        }
    }

    /// Counts a request for a delta in memory of so many bytes. Whether scores are those of another half-life from now on.
    pub(super) fn asked(&mut self, id: DeltaId, bytes: u64) -> bool {
        let Some(entry) = self.entries.get_mut(&id) else { return false };
        let resident = self.resident.max(1) as f64;
        self.now += 1.0 / resident;
        let fades = (-1.0 / (LATELY * resident)).exp2();
        self.requests = self.requests * fades + 1.0;
        for ((shadow, score), half_life) in self.shadows.iter_mut().zip(&mut entry.scores).zip(HALF_LIVES) {
            let before = *score;
            *score = before.and(self.now / half_life);
            shadow.hits *= fades;
            shadow.ask(id, (before, *score), bytes, self.room);
        }
        let hits = |kind: usize| self.shadows[kind].hits;
        let best = (0..KINDS).max_by(|a, b| hits(*a).total_cmp(&hits(*b))).unwrap_or(self.chosen);
        let changes = hits(best) - hits(self.chosen) > MARGIN * self.requests;
        if changes {
            self.chosen = best;
        }
        changes
    }

    /// By how much an id is asked for; the lowest is to go first.
    pub(super) fn score(&self, id: &DeltaId) -> Score {
        self.entries.get(id).map_or(Score::NEVER, |entry| entry.scores[self.chosen])
    }

    /// Nobody can ask for the id any more, as far as is known.
    pub(super) fn forget(&mut self, id: &DeltaId) {
        let Some(mut entry) = self.drop_entry(id) else { return };
        self.remembered.remove(&(entry.scores[LONGEST], *id));
        if entry.seats > 0 {
            entry.scores = [Score::NEVER; KINDS];
            self.entries.insert(*id, entry);
        }
    }

    fn drop_entry(&mut self, id: &DeltaId) -> Option<Entry> {
        let entry = self.entries.remove(id)?;
        for (shadow, score) in self.shadows.iter_mut().zip(entry.scores) {
            shadow.remove(score, *id);
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests;
