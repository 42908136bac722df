//! The results of `bench` as they are written, and how they are made of measurements.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    drive::Measured,
    figures::{Figures, Outcome, Percentiles, Sample, Slo, rank},
    options::Load,
    plan::Plan,
    record::{Record, SLICE},
    server::ServerFigures,
    targets::Target,
    workload::Op,
};

/// What the files call themselves.
const FORMAT: &str = "deltaserve.bench";
const VERSION: u32 = 1;
/// Buckets of a run's course.
const BUCKETS: usize = 100;
/// Steps of a distribution function.
const STEPS: usize = 100;
/// What stands for the bare base among kinds of deltas.
pub(super) const BASE: &str = "base";

/// All of one call of `bench`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Results {
    pub(super) format: String,
    pub(super) version: u32,
    /// Version of the client.
    pub(super) client: String,
    /// When it began, Unix time in milliseconds.
    pub(super) started_ms: u64,
    /// The options, with defaults.
    pub(super) options: Value,
    pub(super) slo: Option<Slo>,
    /// What the server said of itself at the beginning.
    pub(super) server: Value,
    pub(super) tenants: Vec<String>,
    /// By rank.
    pub(super) targets: Vec<Target>,
    /// One per load.
    pub(super) points: Vec<Point>,
}

/// The results of one load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Point {
    pub(super) load: Load,
    /// From the end of the warm-up to the last answer.
    pub(super) seconds: f64,
    /// Whether it was ended by a signal; `cut` requests were under way then, and are in no figure.
    pub(super) interrupted: bool,
    pub(super) cut: u64,
    /// Whether it ended early since it had counted as many requests as are kept.
    pub(super) full: bool,
    pub(super) all: Figures,
    pub(super) by_op: BTreeMap<Op, Figures>,
    /// By the deltas' methods; `base` is that of none.
    pub(super) by_kind: BTreeMap<String, Figures>,
    /// Those that were asked for, by rank.
    pub(super) by_delta: Vec<DeltaFigures>,
    pub(super) failures: Vec<FailureCount>,
    pub(super) course: Vec<Bucket>,
    pub(super) distributions: Distributions,
    /// Unless the server stopped answering.
    pub(super) server: Option<ServerFigures>,
}

/// Requests of one delta.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct DeltaFigures {
    /// Its popularity, from 1.
    pub(super) rank: usize,
    pub(super) requests: u64,
    pub(super) failed: u64,
    pub(super) ttft_ms: Option<Percentiles>,
    pub(super) latency_ms: Option<Percentiles>,
}

/// Failures of one sort.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FailureCount {
    pub(super) op: Op,
    pub(super) code: String,
    pub(super) reason: String,
    pub(super) count: u64,
}

/// A part of a run's time. Requests are in that part in which they ended, tokens in that in which they came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Bucket {
    /// Its beginning, in seconds after the warm-up, and its length.
    pub(super) at: f64,
    pub(super) seconds: f64,
    pub(super) succeeded: u64,
    pub(super) failed: u64,
    pub(super) output_tokens: u64,
    pub(super) ttft_ms: Option<Percentiles>,
    pub(super) latency_ms: Option<Percentiles>,
}

/// Distribution functions in steps of a hundredth, from the smallest value to the largest; empty where there is nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Distributions {
    pub(super) ttft_ms: Vec<f64>,
    pub(super) itl_ms: Vec<f64>,
    pub(super) latency_ms: Vec<f64>,
}

impl Results {
    /// Without points yet.
    ///
    /// # Errors
    /// What has no JSON form.
    pub(super) fn new(plan: &Plan, options: &impl Serialize, slo: Option<Slo>) -> anyhow::Result<Self> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            client: env!("CARGO_PKG_VERSION").to_owned(),
            started_ms: u64::try_from(now.as_millis()).unwrap_or(0),
            options: serde_json::to_value(options)?,
            slo,
            server: serde_json::to_value(&plan.info)?,
            tenants: plan.tenants.clone(),
            targets: plan.targets.clone(),
            points: Vec::new(),
        })
    }

    /// Reads a file.
    ///
    /// # Errors
    /// What is no results of this form.
    pub(super) fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        let value: Value = serde_json::from_slice(bytes).context("is not JSON")?;
        let format = value.get("format").and_then(Value::as_str);
        ensure!(format == Some(FORMAT), "is no result file of `bench --out`");
        let version = value.get("version").and_then(Value::as_u64);
        ensure!(version == Some(u64::from(VERSION)), "is of another version of `bench`");
        serde_json::from_value(value).context("is no whole result file")
    }
}

impl Point {
    /// The figures of a load.
    pub(super) fn new(
        load: Load,
        plan: &Plan,
        measured: Measured,
        slo: Option<Slo>,
        server: Option<ServerFigures>,
    ) -> Self {
        let (kinds, places) = plan.kinds();
        let Measured { record, seconds, interrupted, full } = measured;
        let of_kind = |place: usize| {
            let samples = record.samples.iter().filter(|s| kind(s, &places, kinds.len()) == place);
            Figures::of(samples, record.gaps_of.get(place), seconds, slo)
        };
        let names = kinds.iter().map(String::as_str).chain([BASE]);
        let by_kind = names.enumerate().map(|(place, name)| (name.to_owned(), of_kind(place)));
        let of_op = |op: Op| {
            let gaps = (op == Op::Generate).then_some(&record.gaps);
            Figures::of(record.samples.iter().filter(|s| s.op == op), gaps, seconds, slo)
        };
        let mut ops: Vec<Op> = record.samples.iter().map(|s| s.op).collect();
        ops.sort_unstable();
        ops.dedup();
        let failure = |((op, failure), count): (&(Op, super::call::Failure), &u64)| FailureCount {
            op: *op,
            code: failure.code.clone(),
            reason: failure.reason.clone(),
            count: *count,
        };
        Self {
            load,
            seconds,
            interrupted,
            cut: record.cut,
            full,
            all: Figures::of(record.samples.iter(), Some(&record.gaps), seconds, slo),
            by_op: ops.into_iter().map(|op| (op, of_op(op))).collect(),
            by_kind: by_kind.filter(|(_, figures)| figures.requests > 0).collect(),
            by_delta: by_delta(&record.samples, places.len()),
            failures: record.failures.iter().map(failure).collect(),
            course: course(&record.samples, &record.tokens, seconds),
            distributions: distributions(&record),
            server,
        }
    }

    /// The share of the requests that failed; 0 of none.
    pub(super) fn error_rate(&self) -> f64 {
        self.all.failed as f64 / self.all.requests.max(1) as f64
    }
}

/// The place of a request's kind of delta.
fn kind(sample: &Sample, places: &[usize], base: usize) -> usize {
    sample.target.and_then(|rank| places.get(rank as usize).copied()).unwrap_or(base)
}

fn by_delta(samples: &[Sample], deltas: usize) -> Vec<DeltaFigures> {
    let mut of: Vec<Vec<&Sample>> = vec![Vec::new(); deltas];
    for sample in samples {
        if let Some(own) = sample.target.and_then(|rank| of.get_mut(rank as usize)) {
            own.push(sample);
        }
    }
    let figures = |(i, own): (usize, &Vec<&Sample>)| {
        let good = || own.iter().filter(|s| s.outcome == Outcome::Succeeded);
        DeltaFigures {
            rank: i + 1,
            requests: own.len() as u64,
            failed: (own.len() - good().count()) as u64,
            ttft_ms: Percentiles::of(good().filter(|s| s.op == Op::Generate).filter_map(|s| s.first)),
            latency_ms: Percentiles::of(good().map(|s| s.total)),
        }
    };
    of.iter().enumerate().filter(|(_, own)| !own.is_empty()).map(figures).collect()
}

/// A run's time in equal parts, each a number of whole slices.
fn course(samples: &[Sample], tokens: &[u32], seconds: f64) -> Vec<Bucket> {
    let slices = ((seconds / SLICE).ceil() as usize).max(usize::from(!samples.is_empty()));
    let each = slices.div_ceil(BUCKETS).max(1);
    let count = slices.div_ceil(each);
    let mut of: Vec<Vec<&Sample>> = vec![Vec::new(); count];
    for sample in samples {
        let slice = ((sample.at + f64::from(sample.total)) / SLICE).max(0.0) as usize;
        let place = (slice / each).min(count.saturating_sub(1));
        if let Some(own) = of.get_mut(place) {
            own.push(sample);
        }
    }
    let bucket = |(i, own): (usize, &Vec<&Sample>)| {
        let good = || own.iter().filter(|s| s.outcome == Outcome::Succeeded);
        let at = (i * each) as f64 * SLICE;
        // the last one takes what came after the end by a rounding
        let end = if i + 1 == count { tokens.len() } else { (i + 1) * each };
        Bucket {
            at,
            seconds: (each as f64 * SLICE).min((seconds - at).max(SLICE)),
            succeeded: good().count() as u64,
            failed: (own.len() - good().count()) as u64,
            output_tokens: tokens.iter().take(end).skip(i * each).map(|n| u64::from(*n)).sum(),
            ttft_ms: Percentiles::of(good().filter(|s| s.op == Op::Generate).filter_map(|s| s.first)),
            latency_ms: Percentiles::of(good().map(|s| s.total)),
        }
    };
    of.iter().enumerate().map(bucket).collect()
}

fn distributions(record: &Record) -> Distributions {
    let good = || record.samples.iter().filter(|s| s.outcome == Outcome::Succeeded);
    let first = good().filter(|s| s.op == Op::Generate).filter_map(|s| s.first);
    Distributions {
        ttft_ms: steps(sorted(first)),
        itl_ms: steps(record.gaps.tokens.sorted()),
        latency_ms: steps(sorted(good().map(|s| s.total))),
    }
}

fn sorted(seconds: impl Iterator<Item = f32>) -> Vec<f32> {
    let mut sorted: Vec<f32> = seconds.collect();
    sorted.sort_by(f32::total_cmp);
    sorted
}

fn steps(sorted: Vec<f32>) -> Vec<f64> {
    let at = |i: usize| rank(&sorted, i as f64 / STEPS as f64).map(|s| f64::from(s) * 1e3);
    (0..=STEPS).filter_map(at).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::bench::figures::tests::sample;

    /// A result file of one load with two deltas.
    pub(in crate::cli::bench) fn results(rate: f64) -> Results {
        let samples: Vec<Sample> = (0..40)
            .map(|i| Sample {
                target: (i % 4 < 3).then_some(u32::from(i % 4 == 2)),
                ..sample(f64::from(i) * 0.1, 0.05 + i as f32 * 1e-3, Some(0.01), Outcome::Succeeded)
            })
            .collect();
        let target = |delta: &str| Target {
            tenant: "default".into(),
            delta: delta.into(),
            kind: "lora".into(),
            task: "causal_lm".into(),
            parameters: 9,
        };
        let slo = Some(Slo { ttft_ms: Some(70.5), itl_ms: None });
        let all = Figures::of(samples.iter(), None, 5.0, slo);
        let point = Point {
            load: Load::Open { rate },
            seconds: 5.0,
            interrupted: false,
            cut: 0,
            full: false,
            by_op: [(Op::Generate, all.clone())].into(),
            by_kind: [("lora".to_owned(), all.clone()), (BASE.to_owned(), all.clone())].into(),
            by_delta: by_delta(&samples, 2),
            failures: vec![FailureCount {
                op: Op::Generate,
                code: "Unavailable".into(),
                reason: "<b>DRAINING</b>".into(),
                count: 3,
            }],
            course: course(&samples, &[3; 50], 5.0),
            distributions: Distributions {
                latency_ms: steps(sorted(samples.iter().map(|s| s.total))),
                ..Distributions::default()
            },
            server: Some(ServerFigures { hits: 3, misses: 1, hit_rate: Some(0.75), ..ServerFigures::default() }),
            all,
        };
        Results {
            format: FORMAT.into(),
            version: VERSION,
            client: "0".into(),
            started_ms: 5,
            options: serde_json::json!({"seed": 1}),
            slo,
            server: serde_json::json!({"base": {"name": "<script>alert(1)</script>"}}),
            tenants: vec!["default".into()],
            targets: vec![target("a"), target("b")],
            points: vec![point],
        }
    }

    #[test]
    fn results_are_read_as_they_were_written_and_other_files_are_refused() {
        let all = results(0.1 + 0.2);
        let text = serde_json::to_string_pretty(&all).expect("JSON");
        assert_eq!(Results::parse(text.as_bytes()).expect("results"), all);
        for (bad, expected) in [
            ("{", "not JSON"),
            ("{\"a\": 1}", "no result file"),
            (&text.replace("\"version\": 1", "\"version\": 9"), "another version"),
            (&text.replace("\"points\"", "\"dots\""), "no whole result file"),
        ] {
            let error = Results::parse(bad.as_bytes()).expect_err(expected);
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
    }

    #[test]
    fn a_course_has_every_request_and_token_once() {
        for seconds in [0.05, 0.1, 5.0, 9.99, 10.0, 1234.5] {
            let samples: Vec<Sample> = (0..500)
                .map(|i| {
                    sample(
                        seconds * f64::from(i) / 500.0,
                        0.01,
                        None,
                        [Outcome::Succeeded, Outcome::Failed][i as usize % 2],
                    )
                })
                .collect();
            let tokens: Vec<u32> = (0..(seconds / SLICE).ceil() as u32 + 2).collect();
            let course = course(&samples, &tokens, seconds);
            assert!(!course.is_empty() && course.len() <= BUCKETS, "{seconds}: {}", course.len());
            let sum = |f: fn(&Bucket) -> u64| course.iter().map(f).sum::<u64>();
            assert_eq!((sum(|b| b.succeeded), sum(|b| b.failed)), (250, 250), "{seconds}");
            assert_eq!(sum(|b| b.output_tokens), tokens.iter().map(|n| u64::from(*n)).sum::<u64>(), "{seconds}");
            assert!(course.windows(2).all(|w| w[0].at < w[1].at));
        }
        assert!(course(&[], &[], 0.0).is_empty());
    }

    #[test]
    fn deltas_are_told_apart_by_rank_and_steps_are_quantiles() {
        let all = results(1.0);
        let counts: Vec<(usize, u64)> = all.points[0].by_delta.iter().map(|d| (d.rank, d.requests)).collect();
        assert_eq!(counts, [(1, 20), (2, 10)]);
        let steps = steps((1..=200).map(|i| i as f32 / 1024.0).collect());
        assert_eq!((steps.len(), steps[0], steps[50], steps[100]), (101, 1e3 / 1024.0, 100e3 / 1024.0, 200e3 / 1024.0));
    }
}
