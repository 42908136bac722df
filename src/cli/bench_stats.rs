//! The load generator's arithmetic: percentiles, popularity, arrivals, and the report. No network.

use std::{collections::BTreeMap, time::Duration};

use rand::Rng;
use serde::Serialize;

/// One request's measurements.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    /// Seconds from sending to the first token.
    pub(super) first_token: Option<f64>,
    /// Seconds between pieces, per token in the later piece.
    pub(super) gaps: Vec<f64>,
    /// Seconds from sending to the end.
    pub(super) total: f64,
    /// Tokens generated.
    pub(super) tokens: u64,
    /// How it failed: a stable reason.
    pub(super) failure: Option<String>,
}

/// Percentiles of a quantity, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Percentiles {
    /// Of seconds; `None` of nothing.
    pub(super) fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.retain(|s| s.is_finite());
        seconds.sort_by(f64::total_cmp);
        let max = *seconds.last()?;
        let mean = seconds.iter().sum::<f64>() / seconds.len() as f64;
        // Nearest rank: the smallest value with at least this share of the values at or below it.
        let rank = |share: f64| {
            let index = (share * seconds.len() as f64).ceil() as usize;
            seconds.get(index.clamp(1, seconds.len()) - 1).copied().unwrap_or(max) * 1e3
        };
        Some(Self { mean: mean * 1e3, p50: rank(0.50), p95: rank(0.95), p99: rank(0.99), max: max * 1e3 })
    }
}

/// What a run showed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    pub(super) seconds: f64,
    pub(super) completed: usize,
    pub(super) failed: usize,
    pub(super) failures: BTreeMap<String, usize>,
    pub(super) requests_per_second: f64,
    pub(super) tokens_per_second: f64,
    pub(super) first_token_ms: Option<Percentiles>,
    pub(super) inter_token_ms: Option<Percentiles>,
    pub(super) total_ms: Option<Percentiles>,
}

impl Report {
    /// Latencies are of completed requests; tokens of failed ones do not count.
    pub(super) fn new(samples: &[Sample], elapsed: Duration) -> Self {
        let seconds = elapsed.as_secs_f64();
        let rate = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
        let mut failures = BTreeMap::new();
        for reason in samples.iter().filter_map(|s| s.failure.clone()) {
            *failures.entry(reason).or_insert(0) += 1;
        }
        let completed = || samples.iter().filter(|s| s.failure.is_none());
        Self {
            seconds,
            completed: completed().count(),
            failed: samples.len() - completed().count(),
            failures,
            requests_per_second: rate(completed().count() as f64),
            tokens_per_second: rate(completed().map(|s| s.tokens).sum::<u64>() as f64),
            first_token_ms: Percentiles::of(completed().filter_map(|s| s.first_token).collect()),
            inter_token_ms: Percentiles::of(completed().flat_map(|s| s.gaps.iter().copied()).collect()),
            total_ms: Percentiles::of(completed().map(|s| s.total).collect()),
        }
    }
}

/// Chooses among `n` things: rank k has weight 1 / k^s; s = 0 is uniform.
#[derive(Debug, Clone)]
pub(super) struct Popularity {
    cumulative: Vec<f64>,
}

impl Popularity {
    pub(super) fn zipf(n: usize, s: f64) -> Self {
        let mut sum = 0.0;
        let weights = (1..=n).map(|k| (k as f64).powf(-s));
        let cumulative = weights.map(|w| {
            sum += w;
            sum
        });
        Self { cumulative: cumulative.collect() }
    }

    /// An index below `n` (0 if there is nothing).
    pub(super) fn draw(&self, rng: &mut impl Rng) -> usize {
        let Some(&sum) = self.cumulative.last() else { return 0 };
        let x = rng.random::<f64>() * sum;
        self.cumulative.partition_point(|&c| c <= x).min(self.cumulative.len() - 1)
    }
}

/// Time to the next arrival of a Poisson process.
pub(super) fn next_arrival(rate: f64, rng: &mut impl Rng) -> Duration {
    // 1 - u is in (0, 1], so the logarithm is finite.
    let u: f64 = rng.random();
    Duration::try_from_secs_f64(-(1.0 - u).ln() / rate).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let p = Percentiles::of((1..=100).map(|i| f64::from(i) / 1e3).rev().collect()).expect("values");
        assert_eq!([p.p50, p.p95, p.p99, p.max].map(|x| x.round()), [50.0, 95.0, 99.0, 100.0]);
        assert!((p.mean - 50.5).abs() < 1e-9);
        let one = Percentiles::of(vec![0.002]).expect("a value");
        assert_eq!((one.p50, one.p99), (2.0, 2.0));
        assert_eq!(Percentiles::of(vec![]), None);
        assert_eq!(Percentiles::of(vec![f64::NAN]), None);
    }

    #[test]
    fn failures_are_counted_by_reason_and_leave_the_latencies_alone() {
        let good = Sample { first_token: Some(0.1), gaps: vec![0.01; 9], total: 0.2, tokens: 10, failure: None };
        let bad = Sample { total: 99.0, tokens: 5, failure: Some("OVERLOADED".into()), ..Sample::default() };
        let report = Report::new(&[good, bad.clone(), bad], Duration::from_secs(2));
        assert_eq!((report.completed, report.failed), (1, 2));
        assert_eq!(report.failures.get("OVERLOADED"), Some(&2));
        assert!((report.tokens_per_second - 5.0).abs() < 1e-9);
        assert!(report.total_ms.is_some_and(|p| p.max < 201.0));
    }

    #[test]
    fn zipf_prefers_low_ranks_and_uniform_nobody() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut count = |s: f64| {
            let popularity = Popularity::zipf(10, s);
            let mut counts = [0u32; 10];
            (0..20_000).for_each(|_| counts[popularity.draw(&mut rng)] += 1);
            counts
        };
        let zipf = count(1.0);
        let expected = 20_000.0 / (1..=10).map(|k| 1.0 / f64::from(k)).sum::<f64>();
        assert!((f64::from(zipf[0]) - expected).abs() < 0.05 * expected, "{zipf:?}");
        assert!((f64::from(zipf[1]) - expected / 2.0).abs() < 0.1 * expected, "{zipf:?}");
        assert!(count(0.0).iter().all(|&c| (1_700..2_300).contains(&c)));
    }

    #[test]
    fn arrivals_have_the_rate_asked_for() {
        let mut rng = StdRng::seed_from_u64(7);
        let total: Duration = (0..20_000).map(|_| next_arrival(50.0, &mut rng)).sum();
        assert!((total.as_secs_f64() - 400.0).abs() < 12.0, "{total:?}");
    }
}
