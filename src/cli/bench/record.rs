//! Where measurements are kept while a run goes on, within bounds: at most [`MAX_COUNTED`] requests of a fixed size each, and of
//! times between tokens all up to [`MAX_GAPS`], beyond that a uniform sample of so many.

use std::collections::BTreeMap;

use rand::{Rng, rngs::StdRng};

use super::{
    call::{Answer, Failure},
    figures::{Gaps, Outcome, Percentiles, Sample},
    workload::{Op, Stream, generator},
};

/// Requests that a run counts at most; then it ends.
pub(super) const MAX_COUNTED: usize = 2_000_000;
/// Times that are kept of all requests, and of those of each kind of delta.
const MAX_GAPS: usize = 4_000_000;
const MAX_GAPS_OF_KIND: usize = 500_000;
/// Distinct failures that are told apart.
const MAX_FAILURES: usize = 256;
/// Tokens are counted by tenths of seconds, for so many.
pub(super) const SLICE: f64 = 0.1;
const MAX_SLICES: usize = 6_048_000;

/// A uniform sample of bounded size, with exact count, sum and maximum (Vitter's algorithm R).
#[derive(Debug, Clone)]
pub(super) struct Reservoir {
    kept: Vec<f32>,
    most: usize,
    seen: u64,
    sum: f64,
    max: f32,
    rng: StdRng,
}

impl Reservoir {
    /// Of at most so many.
    pub(super) fn new(most: usize, seed: u64) -> Self {
        let rng = generator(seed, Stream::Kept, most as u64);
        Self { kept: Vec::new(), most, seen: 0, sum: 0.0, max: 0.0, rng }
    }

    /// Takes a value.
    pub(super) fn add(&mut self, value: f32) {
        self.seen += 1;
        self.sum += f64::from(value);
        self.max = self.max.max(value);
        if self.kept.len() < self.most {
            self.kept.push(value);
            return;
        }
        let place = self.rng.random_range(0..self.seen);
        let kept = usize::try_from(place).ok().and_then(|place| self.kept.get_mut(place));
        if let Some(kept) = kept {
            *kept = value;
        }
    }

    /// What was kept, sorted.
    pub(super) fn sorted(&self) -> Vec<f32> {
        let mut sorted = self.kept.clone();
        sorted.sort_by(f32::total_cmp);
        sorted
    }

    /// Percentiles of what was kept; count, mean and maximum of all.
    pub(super) fn percentiles(&self) -> Option<Percentiles> {
        let sorted = self.sorted();
        Percentiles::of_sorted(&sorted, self.seen, self.sum / self.seen as f64, self.max)
    }
}

/// What a request was, for the record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Meta {
    pub(super) op: Op,
    pub(super) target: Option<usize>,
    /// Seconds from the beginning of counting to when it was to be sent.
    pub(super) at: f64,
    /// Seconds from then to when it was sent.
    pub(super) lag: f64,
}

/// The measurements of a run.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) samples: Vec<Sample>,
    /// Times between tokens of all requests, then of those of each kind.
    pub(super) gaps: Gaps,
    pub(super) gaps_of: Vec<Gaps>,
    /// Kind of each delta, by rank; the base's is the last of `gaps_of`.
    kinds: Vec<usize>,
    /// Tokens by tenth of a second.
    pub(super) tokens: Vec<u32>,
    pub(super) failures: BTreeMap<(Op, Failure), u64>,
    /// Requests that were given up under way when the run was ended.
    pub(super) cut: u64,
}

impl Record {
    /// Nothing yet, of deltas of these kinds (by rank), which are below `kind_count`.
    pub(super) fn new(kinds: Vec<usize>, kind_count: usize, seed: u64) -> Self {
        let gaps = |most| Gaps { tokens: Reservoir::new(most, seed), chunks: Reservoir::new(most, seed ^ 1) };
        Self {
            samples: Vec::new(),
            gaps: gaps(MAX_GAPS),
            gaps_of: (0..=kind_count).map(|_| gaps(MAX_GAPS_OF_KIND)).collect(),
            kinds,
            tokens: Vec::new(),
            failures: BTreeMap::new(),
            cut: 0,
        }
    }

    /// Whether it takes no more requests.
    pub(super) fn is_full(&self) -> bool {
        self.samples.len() >= MAX_COUNTED
    }

    /// A request has ended.
    pub(super) fn add(&mut self, meta: Meta, answer: Answer) {
        let mut sample = Sample {
            op: meta.op,
            target: meta.target.map(|rank| rank as u32),
            at: meta.at,
            lag: meta.lag as f32,
            first: answer.first().map(|s| s as f32),
            between: answer.chunks.mean_between(),
            total: answer.total as f32,
            input_tokens: answer.input_tokens,
            cached_tokens: answer.cached_tokens,
            output_tokens: answer.chunks.tokens() as u32,
            server: answer.server,
            outcome: Outcome::Succeeded,
        };
        match answer.failure {
            Some(failure) => {
                sample.outcome = Outcome::Failed;
                self.failed(meta.op, failure);
            }
            None => self.add_times(meta, &answer),
        }
        self.samples.push(sample);
    }

    /// A request was not sent.
    pub(super) fn shed(&mut self, meta: Meta) {
        self.failed(meta.op, Failure { code: "CLIENT".to_owned(), reason: "SHED_BY_CLIENT".to_owned() });
        self.samples.push(Sample {
            op: meta.op,
            target: meta.target.map(|rank| rank as u32),
            at: meta.at,
            lag: 0.0,
            first: None,
            between: None,
            total: 0.0,
            input_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            server: None,
            outcome: Outcome::Shed,
        });
    }

    fn failed(&mut self, op: Op, failure: Failure) {
        let full = self.failures.len() >= MAX_FAILURES && !self.failures.contains_key(&(op, failure.clone()));
        let failure = match full {
            true => Failure { code: failure.code, reason: "OTHER".to_owned() },
            false => failure,
        };
        *self.failures.entry((op, failure)).or_insert(0) += 1;
    }

    fn add_times(&mut self, meta: Meta, answer: &Answer) {
        let kind = meta.target.and_then(|rank| self.kinds.get(rank).copied());
        let kind = kind.unwrap_or(self.gaps_of.len() - 1);
        for gaps in std::iter::once(&mut self.gaps).chain(self.gaps_of.get_mut(kind)) {
            answer.chunks.between_tokens().for_each(|gap| gaps.tokens.add(gap));
            answer.chunks.pauses().for_each(|pause| gaps.chunks.add(pause));
        }
        for (seconds, tokens) in answer.chunks.times() {
            let slice = ((meta.at + seconds) / SLICE) as usize;
            if slice >= MAX_SLICES {
                continue;
            }
            if slice >= self.tokens.len() {
                self.tokens.resize(slice + 1, 0);
            }
            self.tokens[slice] = self.tokens[slice].saturating_add(tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::chunks::Chunks;

    fn answer(times: &[(f64, u32)], total: f64) -> Answer {
        let mut chunks = Chunks::default();
        times.iter().for_each(|(seconds, tokens)| chunks.came(*seconds, *tokens));
        Answer { chunks, total, input_tokens: 3, ..Answer::default() }
    }

    #[test]
    fn a_reservoir_is_exact_while_it_has_room_and_even_beyond() {
        let mut small = Reservoir::new(100, 1);
        assert_eq!(small.percentiles(), None);
        (1..=100).rev().for_each(|i| small.add(i as f32));
        assert_eq!(small.percentiles(), Percentiles::of((1..=100).map(|i| i as f32)));
        // of 0..n each value is kept with the same probability: the means of many reservoirs gather around that of all
        let (n, most) = (20_000_i32, 500);
        let mut mean = 0.0;
        for seed in 0..40 {
            let mut r = Reservoir::new(most, seed);
            (0..n).for_each(|i| r.add(i as f32));
            assert_eq!((r.kept.len(), r.seen, r.max), (most, n as u64, (n - 1) as f32));
            let p = r.percentiles().expect("values");
            assert!((p.mean / 1e3 - f64::from(n - 1) / 2.0).abs() < 1e-6, "the mean is that of all");
            mean += r.kept.iter().map(|v| f64::from(*v)).sum::<f64>() / most as f64 / 40.0;
        }
        // standard error: n / sqrt(12 * 500 * 40)
        let error = f64::from(n) / (12.0 * most as f64 * 40.0).sqrt();
        assert!((mean - f64::from(n) / 2.0).abs() < 5.0 * error, "{mean}");
    }

    #[test]
    fn answers_are_kept_by_kind_and_their_tokens_by_time() {
        // two deltas of kind 1 and 0; the base is the third
        let mut record = Record::new(vec![1, 0], 2, 5);
        let meta = |target, at| Meta { op: Op::Generate, target, at, lag: 0.25 };
        record.add(meta(Some(0), 0.0), answer(&[(0.15, 1), (0.45, 3)], 0.5));
        record.add(meta(None, 0.0), answer(&[(0.12, 2)], 0.2));
        let failure = Failure { code: "Unavailable".into(), reason: "DRAINING".into() };
        let failed = Answer { failure: Some(failure.clone()), ..answer(&[(0.1, 1), (0.2, 1)], 0.3) };
        record.add(meta(Some(1), 0.0), failed);
        record.shed(meta(Some(1), 1.0));
        let counts: Vec<u64> = record.gaps_of.iter().map(|g| g.tokens.seen).collect();
        assert_eq!((counts, record.gaps.tokens.seen, record.gaps.chunks.seen), (vec![0, 3, 0], 3, 1));
        assert_eq!(record.tokens, [0, 3, 0, 0, 3]);
        assert_eq!(record.failures.get(&(Op::Generate, failure)), Some(&1));
        let outcomes: Vec<Outcome> = record.samples.iter().map(|s| s.outcome).collect();
        assert_eq!(outcomes, [Outcome::Succeeded, Outcome::Succeeded, Outcome::Failed, Outcome::Shed]);
        assert_eq!((record.samples[0].output_tokens, record.samples[0].lag), (4, 0.25));
    }

    #[test]
    fn endless_reasons_stay_few() {
        let mut record = Record::new(vec![], 0, 0);
        for i in 0..1_000 {
            record.failed(Op::Embed, Failure { code: "Internal".into(), reason: format!("R{i}") });
        }
        assert!(record.failures.len() <= MAX_FAILURES + 1);
        assert_eq!(record.failures.values().sum::<u64>(), 1_000);
    }
}
