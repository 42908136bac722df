//! What the measurements of a run come to: rates, percentiles, goodput. Pure arithmetic.

use serde::{Deserialize, Serialize};

use super::{record::Reservoir, workload::Op};

/// One counted request, by the client's clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) op: Op,
    /// Which delta, by rank; none: the bare base.
    pub(super) target: Option<u32>,
    /// Seconds from the beginning of counting to when it was to be sent.
    pub(super) at: f64,
    /// Seconds from then to when it was sent.
    pub(super) lag: f32,
    /// Seconds from when it was to be sent to its first token; of calls that answer at once, to the answer.
    pub(super) first: Option<f32>,
    /// Mean seconds between its tokens; none where they came at once.
    pub(super) between: Option<f32>,
    /// Seconds from when it was to be sent to its end.
    pub(super) total: f32,
    pub(super) input_tokens: u32,
    /// Of those, found in the server's prefix cache.
    pub(super) cached_tokens: u32,
    pub(super) output_tokens: u32,
    /// Seconds that it waited for the engine, and of its prompt's computation, as the server says.
    pub(super) server: Option<(f32, f32)>,
    pub(super) outcome: Outcome,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Succeeded,
    Failed,
    /// It was not sent, since too many were under way.
    Shed,
}

/// What a request is to keep to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Slo {
    /// Most milliseconds to the first token (of calls that answer at once: to the answer).
    pub(super) ttft_ms: Option<f64>,
    /// Most milliseconds between its tokens, on the request's average.
    pub(super) itl_ms: Option<f64>,
}

impl Slo {
    /// Whether a request kept to it. One that failed, or was not sent, did not.
    pub(super) fn met(&self, sample: &Sample) -> bool {
        let within = |limit: Option<f64>, seconds: Option<f32>, absent: bool| match (limit, seconds) {
            (Some(limit), Some(seconds)) => f64::from(seconds) * 1e3 <= limit,
            (Some(_), None) => absent,
            (None, _) => true,
        };
        sample.outcome == Outcome::Succeeded
            && within(self.ttft_ms, sample.first, false)
            && within(self.itl_ms, sample.between, true)
    }
}

/// Percentiles of a quantity, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(in crate::cli) struct Percentiles {
    /// How many values there were.
    pub(super) count: u64,
    pub(super) mean: f64,
    pub(in crate::cli) p50: f64,
    pub(super) p90: f64,
    pub(super) p95: f64,
    pub(in crate::cli) p99: f64,
    pub(super) max: f64,
}

/// The value at a share of sorted values, by nearest rank: the smallest one with at least this share of all at or below it.
pub(super) fn rank(sorted: &[f32], share: f64) -> Option<f32> {
    // less than a place, more than what rounding makes of a product that is whole
    let place = (share * sorted.len() as f64 - 1e-9).ceil() as usize;
    sorted.get(place.max(1) - 1).or(sorted.last()).copied()
}

impl Percentiles {
    /// Of seconds; none of nothing. What is not a number is left out.
    pub(in crate::cli) fn of(seconds: impl IntoIterator<Item = f32>) -> Option<Self> {
        let mut sorted: Vec<f32> = seconds.into_iter().filter(|s| s.is_finite()).collect();
        sorted.sort_by(f32::total_cmp);
        let mean = sorted.iter().map(|s| f64::from(*s)).sum::<f64>() / sorted.len() as f64;
        Self::of_sorted(&sorted, sorted.len() as u64, mean, *sorted.last()?)
    }

    /// Of sorted seconds that stand for `count` ones with this mean and maximum.
    pub(super) fn of_sorted(sorted: &[f32], count: u64, mean: f64, max: f32) -> Option<Self> {
        let at = |share| rank(sorted, share).map(|s| f64::from(s) * 1e3);
        Some(Self {
            count,
            mean: mean * 1e3,
            p50: at(0.50)?,
            p90: at(0.90)?,
            p95: at(0.95)?,
            p99: at(0.99)?,
            max: f64::from(max) * 1e3,
        })
    }
}

/// Requests that met the objective.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Goodput {
    /// How many.
    pub(super) met: u64,
    /// Of all that were to be sent.
    pub(super) share: f64,
    pub(super) requests_per_second: f64,
}

/// The figures of a run, or of some of its requests. Latencies and tokens are those of requests that succeeded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Figures {
    /// Requests that were to be sent.
    pub(super) requests: u64,
    pub(super) succeeded: u64,
    /// Those that failed, with those that were not sent.
    pub(super) failed: u64,
    /// Those of them that were not sent.
    pub(super) shed: u64,
    /// Requests that succeeded, over the time.
    pub(super) requests_per_second: f64,
    pub(super) input_tokens: u64,
    /// Of those, found in the server's prefix cache.
    #[serde(default)]
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) input_tokens_per_second: f64,
    pub(super) output_tokens_per_second: f64,
    /// Time to the first token; generation only.
    pub(super) ttft_ms: Option<Percentiles>,
    /// Time between tokens.
    pub(super) itl_ms: Option<Percentiles>,
    /// Time between chunks.
    pub(super) pause_ms: Option<Percentiles>,
    /// Time of the whole request.
    pub(super) latency_ms: Option<Percentiles>,
    /// Time that it waited for the engine, as the server says.
    pub(super) queue_ms: Option<Percentiles>,
    /// Time from its first step to its first token or result, as the server says.
    pub(super) prefill_ms: Option<Percentiles>,
    /// How late the client itself sent it.
    pub(super) lag_ms: Option<Percentiles>,
    /// With an objective.
    pub(super) goodput: Option<Goodput>,
}

/// Times between tokens and between chunks of the same requests.
#[derive(Debug, Clone)]
pub(super) struct Gaps {
    pub(super) tokens: Reservoir,
    pub(super) chunks: Reservoir,
}

impl Figures {
    /// Of requests that took so many seconds together, with the times between their tokens.
    pub(super) fn of<'a>(
        samples: impl Iterator<Item = &'a Sample> + Clone,
        gaps: Option<&Gaps>,
        seconds: f64,
        slo: Option<Slo>,
    ) -> Self {
        let count = |outcome| samples.clone().filter(|s| s.outcome == outcome).count() as u64;
        let good = || samples.clone().filter(|s| s.outcome == Outcome::Succeeded);
        let per_second = |n: u64| if seconds > 0.0 { n as f64 / seconds } else { 0.0 };
        let (succeeded, shed) = (count(Outcome::Succeeded), count(Outcome::Shed));
        let failed = count(Outcome::Failed) + shed;
        let requests = succeeded + failed;
        let input_tokens = good().map(|s| u64::from(s.input_tokens)).sum();
        let cached_tokens = good().map(|s| u64::from(s.cached_tokens)).sum();
        let output_tokens = good().map(|s| u64::from(s.output_tokens)).sum();
        let goodput = slo.filter(|_| requests > 0).map(|slo| {
            let met = samples.clone().filter(|s| slo.met(s)).count() as u64;
            Goodput { met, share: met as f64 / requests as f64, requests_per_second: per_second(met) }
        });
        let sent = samples.clone().filter(|s| s.outcome != Outcome::Shed);
        Self {
            requests,
            succeeded,
            failed,
            shed,
            requests_per_second: per_second(succeeded),
            input_tokens,
            cached_tokens,
            output_tokens,
            input_tokens_per_second: per_second(input_tokens),
            output_tokens_per_second: per_second(output_tokens),
            ttft_ms: Percentiles::of(good().filter(|s| s.op == Op::Generate).filter_map(|s| s.first)),
            itl_ms: gaps.and_then(|g| g.tokens.percentiles()),
            pause_ms: gaps.and_then(|g| g.chunks.percentiles()),
            latency_ms: Percentiles::of(good().map(|s| s.total)),
            queue_ms: Percentiles::of(good().filter_map(|s| s.server.map(|(queue, _)| queue))),
            prefill_ms: Percentiles::of(good().filter_map(|s| s.server.map(|(_, prefill)| prefill))),
            lag_ms: Percentiles::of(sent.map(|s| s.lag)),
            goodput,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rand::Rng;

    use super::*;
    use crate::cli::bench::workload::{Stream, generator};

    pub(in crate::cli::bench) fn sample(at: f64, first: f32, between: Option<f32>, outcome: Outcome) -> Sample {
        Sample {
            op: Op::Generate,
            target: None,
            at,
            lag: 0.0,
            first: Some(first),
            between,
            total: first + 0.1,
            input_tokens: 7,
            cached_tokens: 3,
            output_tokens: 11,
            server: Some((0.001, 0.002)),
            outcome,
        }
    }

    /// The smallest value with at least a share of all values at or below it, by trying each.
    fn brute(values: &[f32], share: f64) -> f32 {
        let below = |v: f32| values.iter().filter(|o| **o <= v).count() as f64;
        let enough = values.iter().copied().filter(|v| below(*v) >= share * values.len() as f64 - 1e-9);
        enough.min_by(f32::total_cmp).expect("values")
    }

    #[test]
    fn percentiles_are_those_of_trying_every_value() {
        for seed in 0..20 {
            let mut rng = generator(seed, Stream::Counted, 0);
            let n = rng.random_range(1..400_i32);
            // few distinct values, so that there are ties
            let values: Vec<f32> = (0..n).map(|_| rng.random_range(1..50_u8) as f32 / 64.0).collect();
            let p = Percentiles::of(values.iter().copied()).expect("values");
            for (share, got) in [(0.5, p.p50), (0.9, p.p90), (0.95, p.p95), (0.99, p.p99), (1.0, p.max)] {
                assert_eq!(got, f64::from(brute(&values, share)) * 1e3, "{share} of {values:?}");
            }
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / f64::from(n) * 1e3;
            assert!((p.mean - mean).abs() < 1e-9 && p.count == n as u64);
        }
        assert_eq!(Percentiles::of([]), None);
        assert_eq!(Percentiles::of([f32::NAN]), None);
        assert_eq!(Percentiles::of([0.25]).map(|p| (p.p50, p.p99)), Some((250.0, 250.0)));
    }

    #[test]
    fn goodput_counts_what_keeps_to_every_objective() {
        use Outcome::{Failed, Shed, Succeeded};
        for seed in 0..10 {
            let mut rng = generator(seed, Stream::Counted, 1);
            let samples: Vec<Sample> = (0..500)
                .map(|i| {
                    let outcome = [Succeeded, Succeeded, Succeeded, Failed, Shed][rng.random_range(0..5)];
                    let between = rng.random_bool(0.8).then(|| rng.random_range(0.0..0.1));
                    sample(f64::from(i), rng.random_range(0.0..1.0), between, outcome)
                })
                .collect();
            for slo in [(Some(400.0), None), (None, Some(50.0)), (Some(400.0), Some(50.0))] {
                let slo = Slo { ttft_ms: slo.0, itl_ms: slo.1 };
                let mut met = 0;
                for s in &samples {
                    let slow_start = slo.ttft_ms.is_some_and(|limit| f64::from(s.first.expect("a time")) * 1e3 > limit);
                    let slow = slo.itl_ms.zip(s.between).is_some_and(|(limit, b)| f64::from(b) * 1e3 > limit);
                    met += u64::from(s.outcome == Succeeded && !slow_start && !slow);
                }
                let figures = Figures::of(samples.iter(), None, 50.0, Some(slo));
                let goodput = figures.goodput.expect("an objective");
                assert!(met > 0 && met < 400);
                assert_eq!((goodput.met, goodput.share), (met, met as f64 / 500.0));
                assert!((goodput.requests_per_second - met as f64 / 50.0).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn failures_leave_latencies_and_tokens_alone_but_count() {
        let all = [
            sample(0.0, 0.1, Some(0.01), Outcome::Succeeded),
            sample(1.0, 90.0, None, Outcome::Failed),
            sample(1.5, 90.0, None, Outcome::Shed),
        ];
        let figures = Figures::of(all.iter(), None, 2.0, Some(Slo { ttft_ms: Some(1e9), itl_ms: None }));
        assert_eq!((figures.requests, figures.succeeded, figures.failed, figures.shed), (3, 1, 2, 1));
        assert_eq!((figures.input_tokens, figures.cached_tokens, figures.output_tokens_per_second), (7, 3, 5.5));
        assert!(figures.ttft_ms.is_some_and(|p| p.max < 101.0) && figures.latency_ms.is_some_and(|p| p.count == 1));
        assert!(figures.goodput.is_some_and(|g| g.met == 1 && (g.share - 1.0 / 3.0).abs() < 1e-12));
        // no time, no rate; nothing, nothing
        assert_eq!(Figures::of(all.iter(), None, 0.0, None).requests_per_second, 0.0);
        assert_eq!(Figures::of([].iter(), None, 1.0, Some(Slo::default())), Figures::default());
    }
}
