//! Which examples form a step: seeded order, length bucketing, packing, micro-batches, and the validation split.
//!
//! Pure integers: the same lengths and seed give the same batches on every machine.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

/// What a seed is used for; each purpose has its own stream, so that one more draw in one does not change the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Initial values.
    Init = 1,
    /// Order of the examples.
    Order = 2,
    /// Validation split.
    Split = 3,
    /// Dropout.
    Dropout = 4,
    /// Few-shot sample.
    Sample = 5,
    /// Validation examples that are answered.
    Questions = 9,
}

/// The generator of one purpose of a job's seed.
pub fn rng(seed: u64, stream: Stream) -> StdRng {
    StdRng::seed_from_u64(seed ^ (stream as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The generator of one purpose in one step of a job.
pub fn rng_at(seed: u64, stream: Stream, step: u32) -> StdRng {
    rng(seed ^ u64::from(step).wrapping_mul(0xd1b5_4a32_d192_ed03), stream)
}

/// Batches per length pool: within a pool, examples of like length meet (a quarter less time, measured by PEFT).
const POOL: usize = 20;

/// Draws a share of the examples for validation: (train, validation), each in the old order. Both are non-empty when
/// there are at least two examples.
pub fn split(n: usize, fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    if n < 2 {
        return ((0..n).collect(), Vec::new());
    }
    let wanted = ((n as f64 * fraction).round() as usize).clamp(1, n - 1);
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut rng(seed, Stream::Split));
    let mut valid = order.split_off(n - wanted);
    order.sort_unstable();
    valid.sort_unstable();
    (order, valid)
}

/// Draws `k` examples of each class (classes by example, 0 to `classes`); the old order is kept.
///
/// # Errors
/// Classes with fewer examples than `k`, with how many they have.
pub fn sample(of: &[u32], classes: usize, k: usize, seed: u64) -> Result<Vec<usize>, Vec<(usize, usize)>> {
    let mut by_class = vec![Vec::new(); classes];
    for (i, class) in of.iter().enumerate() {
        by_class.get_mut(*class as usize).into_iter().for_each(|all: &mut Vec<usize>| all.push(i));
    }
    let few: Vec<_> = by_class.iter().map(Vec::len).enumerate().filter(|(_, n)| *n < k).collect();
    if !few.is_empty() {
        return Err(few);
    }
    let mut rng = rng(seed, Stream::Sample);
    let mut chosen = Vec::with_capacity(classes * k);
    for mut all in by_class {
        all.shuffle(&mut rng);
        chosen.extend_from_slice(&all[..k]);
    }
    chosen.sort_unstable();
    Ok(chosen)
}

/// Groups examples into units of at most `capacity` tokens, first fit over the longest first. Attention stays within
/// each example, so packing changes what shares a step, never what an example sees.
pub fn pack(lens: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    const OPEN: usize = 64; // units that still take examples: bounds the search
    let mut order: Vec<usize> = (0..lens.len()).collect();
    order.sort_by_key(|i| (std::cmp::Reverse(lens[*i]), *i));
    let mut units: Vec<(usize, Vec<usize>)> = Vec::new();
    for i in order {
        let from = units.len().saturating_sub(OPEN);
        match units[from..].iter_mut().find(|(used, _)| used + lens[i] <= capacity) {
            Some((used, unit)) => {
                *used += lens[i];
                unit.push(i);
            }
            None => units.push((lens[i], vec![i])),
        }
    }
    units.into_iter().map(|(_, unit)| unit).collect()
}

/// The endless sequence of a job's batches.
#[derive(Debug)]
pub struct Batches {
    units: Vec<Vec<usize>>,
    lens: Vec<usize>,
    size: usize,
    rng: StdRng,
    queue: std::vec::IntoIter<Vec<usize>>,
}

impl Batches {
    /// `lens`: tokens of each example; `size`: units per batch (examples, or packs of up to `pack_to` tokens).
    pub fn new(lens: &[usize], size: usize, pack_to: Option<usize>, seed: u64) -> Self {
        let units = match pack_to {
            Some(capacity) => pack(lens, capacity),
            None => (0..lens.len()).map(|i| vec![i]).collect(),
        };
        let (lens, rng) = (lens.to_vec(), rng(seed, Stream::Order));
        Self { units, lens, size: size.max(1), rng, queue: Vec::new().into_iter() }
    }

    /// Batches of one pass over the examples.
    pub fn per_epoch(&self) -> usize {
        // every pool but the last holds a whole number of batches, so only the last batch can be short
        self.units.len().div_ceil(self.size)
    }

    /// The next batch: example indices, sorted by length within it. Empty only when there are no examples.
    pub fn next_batch(&mut self) -> Vec<usize> {
        if let Some(batch) = self.queue.next() {
            return batch;
        }
        self.queue = self.epoch().into_iter();
        self.queue.next().unwrap_or_default()
    }

    /// Leaves out the next `n` batches. Costs what shuffling their epochs costs.
    pub fn skip(&mut self, n: usize) {
        let mut left = n;
        while left > self.queue.len() {
            left -= self.queue.len();
            self.queue = self.epoch().into_iter();
            if self.queue.len() == 0 {
                return; // no examples
            }
        }
        self.queue.by_ref().take(left).for_each(drop);
    }

    fn epoch(&mut self) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.units.len()).collect();
        order.shuffle(&mut self.rng);
        let len = |unit: usize| self.units[unit].iter().map(|i| self.lens[*i]).max().unwrap_or(0);
        let mut batches = Vec::with_capacity(self.per_epoch());
        for pool in order.chunks_mut(self.size * POOL) {
            pool.sort_by_key(|unit| len(*unit));
            for batch in pool.chunks(self.size) {
                batches.push(batch.iter().flat_map(|unit| self.units[*unit].iter().copied()).collect());
            }
        }
        batches.shuffle(&mut self.rng);
        batches
    }
}

/// Cuts a batch into micro-batches of at most `max_examples` and, unless one example alone is longer, `max_tokens`.
pub fn micro_batches(batch: &[usize], lens: &[usize], max_examples: usize, max_tokens: usize) -> Vec<Vec<usize>> {
    let mut out: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for &i in batch {
        match out.last_mut() {
            Some(last) if last.len() < max_examples && tokens + lens[i] <= max_tokens => {
                last.push(i);
                tokens += lens[i];
            }
            _ => {
                out.push(vec![i]);
                tokens = lens[i];
            }
        }
    }
    out
}

/// A dropout mask of `n` columns: 0 with probability `p`, else `1 / (1 - p)`.
pub fn dropout_mask(n: usize, p: f64, rng: &mut StdRng) -> Vec<f32> {
    let keep = (1.0 / (1.0 - p)) as f32;
    (0..n).map(|_| if rng.random::<f64>() < p { 0.0 } else { keep }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen(batches: &mut Batches, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).flat_map(|_| batches.next_batch()).collect();
        all.sort_unstable();
        all
    }

    proptest! {
        #[test]
        fn an_epoch_holds_every_example_once(
            lens in proptest::collection::vec(1usize..40, 1..200), size in 1usize..9, packed: bool, seed: u64,
        ) {
            let mut b = Batches::new(&lens, size, packed.then_some(64), seed);
            for _ in 0..2 {
                let n = b.per_epoch();
                prop_assert_eq!(seen(&mut b, n), (0..lens.len()).collect::<Vec<_>>());
            }
        }

        #[test]
        fn packs_never_overflow(lens in proptest::collection::vec(1usize..40, 1..200)) {
            let packs = pack(&lens, 64);
            for p in &packs {
                prop_assert!(p.iter().map(|i| lens[*i]).sum::<usize>() <= 64);
            }
            prop_assert_eq!(packs.iter().map(Vec::len).sum::<usize>(), lens.len());
        }

        #[test]
        fn micro_batches_are_the_batch_cut_at_the_limits(
            lens in proptest::collection::vec(1usize..40, 1..60), examples in 1usize..9, tokens in 1usize..90,
        ) {
            let batch: Vec<usize> = (0..lens.len()).collect();
            let micro = micro_batches(&batch, &lens, examples, tokens);
            for m in &micro {
                prop_assert!(m.len() <= examples);
                prop_assert!(m.len() == 1 || m.iter().map(|i| lens[*i]).sum::<usize>() <= tokens);
            }
            prop_assert_eq!(micro.concat(), batch);
        }

        #[test]
        fn a_split_is_a_partition_with_both_sides_filled(n in 2usize..500, f in 0.0f64..0.5, seed: u64) {
            let (train, valid) = split(n, f, seed);
            prop_assert!(!train.is_empty() && !valid.is_empty());
            let mut all = [train, valid].concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_skipped_is_what_would_have_come() {
        let lens: Vec<usize> = (0..23).map(|i| 1 + i % 7).collect();
        for n in [0, 1, 5, 6, 7, 20] {
            let (mut a, mut b) = (Batches::new(&lens, 4, None, 3), Batches::new(&lens, 4, None, 3));
            (0..n).for_each(|_| drop(a.next_batch()));
            b.skip(n);
            assert_eq!(a.next_batch(), b.next_batch(), "{n}");
        }
        Batches::new(&[], 4, None, 3).skip(2);
    }

    #[test]
    fn the_seed_decides_the_order() {
        let lens: Vec<usize> = (0..100).map(|i| 1 + i % 17).collect();
        let order = |seed| {
            let mut b = Batches::new(&lens, 8, None, seed);
            (0..30).map(|_| b.next_batch()).collect::<Vec<_>>()
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }

    #[test]
    fn batches_hold_examples_of_like_length() {
        let lens: Vec<usize> = (0..160).map(|i| 1 + (i * 37) % 160).collect();
        let mut b = Batches::new(&lens, 8, None, 0);
        for _ in 0..20 {
            let batch = b.next_batch();
            let (min, max) = (batch.iter().map(|i| lens[*i]).min(), batch.iter().map(|i| lens[*i]).max());
            assert_eq!(max.unwrap() - min.unwrap(), 7, "one pool: neighbours in length");
        }
    }

    #[test]
    fn a_sample_has_k_of_each_class_by_the_seed_alone() {
        let of: Vec<u32> = (0..60).map(|i| i % 3).collect();
        let drawn = sample(&of, 3, 4, 1).unwrap();
        assert!((0..3).all(|c| drawn.iter().filter(|i| of[**i] == c).count() == 4), "{drawn:?}");
        assert!(drawn.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(sample(&of, 3, 4, 1), Ok(drawn.clone()));
        assert_ne!(sample(&of, 3, 4, 2), Ok(drawn));
        assert_eq!(sample(&of, 4, 21, 1), Err(vec![(0, 20), (1, 20), (2, 20), (3, 0)]));
        assert_eq!(sample(&of, 3, 20, 1), Ok((0..60).collect()));
    }
}
