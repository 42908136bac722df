//! A trace of requests and what caches of a fixed room make of it: the optimum (Belady's), and policies that know only the past.
//! All deltas take the same room. Nothing of the server is in here, so that it can be checked by itself.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A generator of random numbers whose sequence is the same everywhere (Steele et al. 2014, SplitMix64).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// `requests` draws of `0..deltas`, number `i` with a weight of `1 / (i + 1)^exponent` (Zipf's law), each for itself.
pub(crate) fn zipf(deltas: usize, exponent: f64, requests: usize, seed: u64) -> Vec<u32> {
    let mut sum = 0.0;
    let cumulative: Vec<f64> = (1..=deltas)
        .map(|rank| {
            sum += (rank as f64).powf(-exponent);
            sum
        })
        .collect();
    let mut rng = Rng(seed);
    (0..requests)
        .map(|_| {
            let at = rng.uniform() * sum;
            cumulative.partition_point(|c| *c <= at).min(deltas.saturating_sub(1)) as u32
        })
        .collect()
}

/// Another trace of as many requests, in which others are popular after every `every` of them.
pub(crate) fn shifting(trace: &[u32], deltas: usize, every: usize) -> Vec<u32> {
    let moved = |(i, id): (usize, &u32)| ((*id as usize + i / every * (deltas / 7 + 1)) % deltas) as u32;
    trace.iter().enumerate().map(moved).collect()
}

/// Another trace of as many requests, in which after every four times `length` of them, `length` are for all deltas in turn.
pub(crate) fn scanning(trace: &[u32], deltas: usize, length: usize) -> Vec<u32> {
    let mut next = (0..deltas as u32).cycle();
    let scanned = |(i, id): (usize, &u32)| if i % (5 * length) < 4 * length { Some(*id) } else { next.next() };
    trace.iter().enumerate().filter_map(scanned).collect()
}

/// The share of independent draws by Zipf's law that are for the `room` most popular: what none that knows only the past exceeds on
/// average (Aho et al. 1971), since what comes next does not depend on it.
pub(crate) fn most_popular(deltas: usize, exponent: f64, room: usize) -> f64 {
    let weight = |most: usize| (1..=most.min(deltas)).map(|rank| (rank as f64).powf(-exponent)).sum::<f64>();
    weight(room) / weight(deltas)
}

/// Hits of the optimum (Belady 1966): what is needed last goes. Every request has to be held while it is served, as in the server,
/// so that what is requested always comes in.
pub(crate) fn belady(trace: &[u32], room: usize) -> u64 {
    let mut next = vec![usize::MAX; trace.len()];
    let mut seen = HashMap::new();
    for (i, id) in trace.iter().enumerate().rev() {
        next[i] = seen.insert(*id, i).unwrap_or(usize::MAX);
    }
    // what is there, by when it is needed next
    let (mut there, mut order): (HashMap<u32, usize>, BTreeSet<(usize, u32)>) = Default::default();
    let mut hits = 0;
    for (id, next) in trace.iter().zip(next) {
        if let Some(at) = there.insert(*id, next) {
            hits += 1;
            order.remove(&(at, *id));
        } else if there.len() > room
            && let Some((_, last)) = order.pop_last()
        {
            there.remove(&last);
        }
        order.insert((next, *id));
    }
    hits
}

/// Hits of an LRU: what was used longest ago goes.
pub(crate) fn lru(trace: &[u32], room: usize) -> u64 {
    let (mut there, mut order): (HashMap<u32, usize>, BTreeMap<usize, u32>) = Default::default();
    let mut hits = 0;
    for (i, id) in trace.iter().enumerate() {
        if let Some(at) = there.insert(*id, i) {
            hits += 1;
            order.remove(&at);
        } else if there.len() > room
            && let Some((_, oldest)) = order.pop_first()
        {
            there.remove(&oldest);
        }
        order.insert(i, *id);
    }
    hits
}

/// Hits of what keeps the most frequent ones so far, with counts of all requests; of equally frequent ones the longest unused goes.
/// Among those that know only the past, none is better on independent draws once its counts are right (Aho et al. 1971).
pub(crate) fn lfu(trace: &[u32], room: usize) -> u64 {
    let mut counts: HashMap<u32, (u64, usize)> = HashMap::new();
    let mut order: BTreeSet<(u64, usize, u32)> = BTreeSet::new();
    let mut hits = 0;
    for (i, id) in trace.iter().enumerate() {
        let (count, last) = counts.get(id).copied().unwrap_or_default();
        if order.remove(&(count, last, *id)) {
            hits += 1;
        } else if order.len() >= room {
            order.pop_first();
        }
        counts.insert(*id, (count + 1, i));
        order.insert((count + 1, i, *id));
    }
    hits
}

/// Hits of what keeps those with the most requests so far, where a request counts half after `half_life` others: it forgets what is no
/// longer asked for. The score is the logarithm of that count at any moment, so that it only changes with a request for its own.
pub(crate) fn fading(trace: &[u32], room: usize, half_life: f64) -> u64 {
    let mut scores: HashMap<u32, f64> = HashMap::new();
    // scores are 0 or more, and such numbers are in the order of their bits
    let mut order: BTreeSet<(u64, u32)> = BTreeSet::new();
    let mut hits = 0;
    for (i, id) in trace.iter().enumerate() {
        let now = i as f64 / half_life;
        let old = scores.get(id).copied();
        if old.is_some_and(|old| order.remove(&(old.to_bits(), *id))) {
            hits += 1;
        } else if order.len() >= room {
            order.pop_first();
        }
        // log2(2^old + 2^now)
        let new = old.map_or(now, |old| now.max(old) + (-(now - old).abs()).exp2().ln_1p() / std::f64::consts::LN_2);
        scores.insert(*id, new);
        order.insert((new.to_bits(), *id));
    }
    hits
}
