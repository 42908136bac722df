//! The options of `bench`, and whether they make sense together.

use std::{path::PathBuf, str::FromStr};

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use super::{
    figures::Slo,
    record::MAX_COUNTED,
    workload::{Arrivals, Lengths, Mix, Popularity},
};

/// Most requests under way at a time, and most callers.
const MAX_IN_FLIGHT: usize = 16_384;
/// Loads of one sweep.
const MAX_LOADS: usize = 64;
/// Longest run or warm-up, in seconds: a week.
const MAX_SECONDS: f64 = 604_800.0;
/// Seconds of sending where neither these nor a number of requests are given.
const DEFAULT_DURATION: f64 = 10.0;

/// Options of `bench`.
#[derive(Debug, Clone, Args, Serialize)]
#[command(args_conflicts_with_subcommands = true)]
pub(in crate::cli) struct BenchArgs {
    #[command(subcommand)]
    #[serde(skip)]
    pub(super) command: Option<BenchCommand>,
    /// Closed loop: this many callers, each of which sends its next request when it has its answer.
    #[arg(long, short, value_name = "CALLERS", default_value_t = 8, conflicts_with_all = ["rate", "sweep"])]
    pub(super) concurrency: usize,
    /// Open loop: this many requests per second on average, whether or not answers come. Latency counts from when a request
    /// was to be sent.
    #[arg(long, short, value_name = "PER_SECOND", conflicts_with = "sweep")]
    pub(super) rate: Option<f64>,
    /// Several loads, one after the other: rate=1,2,4 or concurrency=1,4,16.
    #[arg(long, value_name = "LOADS")]
    pub(super) sweep: Option<Sweep>,
    /// Open loop: how requests arrive.
    #[arg(long, default_value = "poisson")]
    pub(super) arrivals: Arrivals,
    /// Open loop: most requests under way. Arrivals beyond are not sent and count as failed (SHED_BY_CLIENT).
    #[arg(long, value_name = "REQUESTS", default_value_t = 1024)]
    pub(super) max_in_flight: usize,
    /// Seconds of sending after the warm-up; what is under way then is waited for [default: 10].
    #[arg(long, value_name = "SECONDS", conflicts_with = "requests")]
    pub(super) duration: Option<f64>,
    /// This many requests after the warm-up, instead.
    #[arg(long, value_name = "REQUESTS")]
    pub(super) requests: Option<u64>,
    /// Seconds of load at the start that are not counted.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub(super) warmup: f64,
    /// What is called, with weights: generate, classify, embed, score.
    #[arg(long, value_name = "OP=WEIGHT,...", default_value = "generate")]
    pub(super) op: Mix,
    /// Tokens of made-up prompts and texts: N, FROM..TO or lognormal:MEAN,SIGMA,FROM..TO (mean in tokens, sigma of the
    /// logarithm).
    #[arg(long, value_name = "LENGTHS", default_value = "32", conflicts_with_all = ["prompt", "prompts"])]
    pub(super) prompt_tokens: Lengths,
    /// This text in place of made-up ones.
    #[arg(long, value_name = "TEXT", conflicts_with = "prompts")]
    pub(super) prompt: Option<String>,
    /// The texts of this file, in turn: JSON Lines with `prompt` or `text` (and `completion`, for score) if its name ends in
    /// .jsonl, else one per line.
    #[arg(long, value_name = "FILE")]
    pub(super) prompts: Option<PathBuf>,
    /// Tokens to generate, or of the completions to score, per request; as --prompt-tokens. End-of-sequence tokens are passed
    /// over.
    #[arg(long, short = 'm', value_name = "LENGTHS", default_value = "32")]
    pub(super) max_new_tokens: Lengths,
    /// Deltas, separated by commas, most popular first; `*` stands for anything in a name ('*': every delta). Nothing: the bare
    /// base. Each is called for what it can do.
    #[arg(long, value_delimiter = ',', value_name = "NAMES", conflicts_with = "delta_prefix")]
    pub(super) deltas: Vec<String>,
    /// All deltas whose names begin with this.
    #[arg(long, value_name = "PREFIX")]
    pub(super) delta_prefix: Option<String>,
    /// Which delta a request names.
    #[arg(long, default_value = "uniform")]
    pub(super) popularity: Popularity,
    /// Exponent s of zipf: the k-th delta in proportion to 1 / k^s.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub(super) zipf_s: f64,
    /// Share of the requests that name no delta, 0 to 1; classify always names one.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub(super) base_share: f64,
    /// Seed of arrivals, lengths, prompts, operations and deltas.
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
    /// Goodput: requests whose first token (of classify, embed, score: whose answer) came within these milliseconds.
    #[arg(long, value_name = "MS")]
    pub(super) slo_ttft_ms: Option<f64>,
    /// Goodput: and whose tokens after the first came at most so many milliseconds apart, on the request's average.
    #[arg(long, value_name = "MS")]
    pub(super) slo_itl_ms: Option<f64>,
    /// Fail at the end if more than this share of a load's requests failed, 0 to 1.
    #[arg(long, value_name = "SHARE")]
    pub(super) max_error_rate: Option<f64>,
    /// The server's metrics, e.g. http://127.0.0.1:9464/metrics; read before and after each load.
    #[arg(long, value_name = "URL")]
    pub(super) metrics: Option<String>,
    /// Write all results, options and the server's description as JSON.
    #[arg(long, short, value_name = "FILE")]
    pub(super) out: Option<PathBuf>,
    /// Write index.html with tables and plots into this folder; made if missing.
    #[arg(long, value_name = "DIR")]
    pub(super) report: Option<PathBuf>,
}

/// What else `bench` does.
#[derive(Debug, Clone, Subcommand)]
pub(super) enum BenchCommand {
    /// Set the figures of two result files (--out) side by side, with the second's over the first's.
    Compare {
        /// The first file.
        a: PathBuf,
        /// The second file.
        b: PathBuf,
    },
}

/// The load of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum Load {
    /// So many callers.
    Closed { concurrency: usize },
    /// So many requests per second.
    Open { rate: f64 },
}

impl Load {
    /// For people.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Closed { concurrency } => format!("closed loop, {concurrency} callers"),
            Self::Open { rate } => format!("open loop, {rate} requests/s"),
        }
    }

    /// Most requests under way at a time, where an open loop may have `open`.
    pub(super) fn most_in_flight(&self, open: usize) -> usize {
        match self {
            Self::Closed { concurrency } => *concurrency,
            Self::Open { .. } => open,
        }
    }
}

/// Several loads.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub(super) struct Sweep(pub(super) Vec<Load>);

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (what, list) = text.split_once('=').ok_or("a sweep is rate=LIST or concurrency=LIST")?;
        let one = |value: &str| {
            let bad = || format!("{value:?} is no {what}");
            match what {
                "rate" => value.trim().parse().map(|rate| Load::Open { rate }).map_err(|_| bad()),
                "concurrency" => {
                    value.trim().parse().map(|concurrency| Load::Closed { concurrency }).map_err(|_| bad())
                }
                _ => Err(format!("there is no sweep over {what:?}, but over rate and concurrency")),
            }
        };
        let loads = list.split(',').map(one).collect::<Result<Vec<_>, _>>()?;
        match loads.len() {
            n if n > MAX_LOADS => Err(format!("{n} loads are more than {MAX_LOADS}")),
            _ => Ok(Self(loads)),
        }
    }
}

impl BenchArgs {
    /// The loads, in order, if the options can be used.
    ///
    /// # Errors
    /// Every bad option, by name.
    pub(super) fn loads(&self) -> anyhow::Result<Vec<Load>> {
        let loads = match (&self.sweep, self.rate) {
            (Some(sweep), _) => sweep.0.clone(),
            (None, Some(rate)) => vec![Load::Open { rate }],
            (None, None) => vec![Load::Closed { concurrency: self.concurrency }],
        };
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: &str| {
            if !holds && !problems.iter().any(|p| p == problem) {
                problems.push(problem.to_owned());
            }
        };
        for load in &loads {
            match load {
                Load::Closed { concurrency } => require(
                    (1..=MAX_IN_FLIGHT).contains(concurrency),
                    &format!("--concurrency {concurrency}: 1 to {MAX_IN_FLIGHT} callers"),
                ),
                Load::Open { rate } => require(
                    rate.is_finite() && (1e-6..=1e6).contains(rate),
                    &format!("--rate {rate}: over 0 requests per second, at most 1000000"),
                ),
            }
        }
        let open = loads.iter().any(|load| matches!(load, Load::Open { .. }));
        require(open || self.arrivals == Arrivals::Poisson, "--arrivals is for an open loop (--rate)");
        require(
            (1..=MAX_IN_FLIGHT).contains(&self.max_in_flight),
            &format!("--max-in-flight {}: 1 to {MAX_IN_FLIGHT}", self.max_in_flight),
        );
        let seconds = |s: f64, least: f64| s.is_finite() && s >= least && s <= MAX_SECONDS;
        let duration = self.duration.unwrap_or(DEFAULT_DURATION);
        require(seconds(duration, 1e-3), &format!("--duration {duration}: over 0 seconds, at most a week"));
        require(seconds(self.warmup, 0.0), &format!("--warmup {}: 0 or more seconds, at most a week", self.warmup));
        let most = MAX_COUNTED as u64;
        require(
            self.requests.is_none_or(|n| (1..=most).contains(&n)),
            &format!("--requests {}: 1 to {most}", self.requests.unwrap_or(0)),
        );
        let with_deltas = !self.deltas.is_empty() || self.delta_prefix.is_some();
        require(!self.deltas.iter().any(|name| name.trim().is_empty()), "--deltas has an empty name");
        let share = self.base_share;
        require((0.0..=1.0).contains(&share), &format!("--base-share {share}: 0 to 1"));
        require(share == 0.0 || with_deltas, "--base-share is for a run with deltas (--deltas, --delta-prefix)");
        require(share < 1.0 || !with_deltas, "--base-share 1 names no delta; leave the deltas out");
        require(
            with_deltas || self.popularity == Popularity::Uniform,
            "--popularity is for a run with deltas (--deltas, --delta-prefix)",
        );
        let exponent = self.zipf_s;
        require(exponent.is_finite() && exponent >= 0.0, &format!("--zipf-s {exponent}: a number, 0 or more"));
        let positive = |x: Option<f64>| x.is_none_or(|x| x.is_finite() && x > 0.0);
        require(positive(self.slo_ttft_ms), "--slo-ttft-ms is over 0 milliseconds");
        require(positive(self.slo_itl_ms), "--slo-itl-ms is over 0 milliseconds");
        let rate = self.max_error_rate;
        require(rate.is_none_or(|r| (0.0..=1.0).contains(&r)), "--max-error-rate is 0 to 1");
        require(self.prompt.as_ref().is_none_or(|text| !text.is_empty()), "--prompt is empty");
        match &problems[..] {
            [] => Ok(loads),
            [problem] => bail!("{problem}"),
            several => bail!("these options cannot be used:\n  {}", several.join("\n  ")),
        }
    }

    /// Seconds of sending; none where a number of requests is given.
    pub(super) fn seconds(&self) -> Option<f64> {
        match self.requests {
            Some(_) => None,
            None => Some(self.duration.unwrap_or(DEFAULT_DURATION)),
        }
    }

    /// The objective, if there is one.
    pub(super) fn slo(&self) -> Option<Slo> {
        let slo = Slo { ttft_ms: self.slo_ttft_ms, itl_ms: self.slo_itl_ms };
        (slo != Slo::default()).then_some(slo)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: BenchArgs,
    }

    pub(in crate::cli::bench) fn parse(words: &[&str]) -> Result<BenchArgs, String> {
        let line = Line::try_parse_from(std::iter::once("bench").chain(words.iter().copied()));
        line.map(|line| line.args).map_err(|e| e.to_string())
    }

    fn refusal(words: &[&str]) -> String {
        match parse(words) {
            Err(error) => error,
            Ok(args) => args.loads().expect_err("it must be refused").to_string(),
        }
    }

    #[test]
    fn options_make_loads() {
        let loads = |words: &[&str]| parse(words).expect("it parses").loads().expect("they can be used");
        assert_eq!(loads(&[]), [Load::Closed { concurrency: 8 }]);
        assert_eq!(loads(&["-c", "3"]), [Load::Closed { concurrency: 3 }]);
        assert_eq!(loads(&["--rate", "2.5", "--arrivals", "uniform"]), [Load::Open { rate: 2.5 }]);
        assert_eq!(loads(&["--sweep", "rate=1,2.5"]), [Load::Open { rate: 1.0 }, Load::Open { rate: 2.5 }]);
        assert_eq!(loads(&["--sweep", "concurrency=4"]), [Load::Closed { concurrency: 4 }]);
        let args = parse(&["--requests", "7", "--slo-itl-ms", "40"]).expect("it parses");
        assert_eq!((args.seconds(), args.slo()), (None, Some(Slo { ttft_ms: None, itl_ms: Some(40.0) })));
        let args = parse(&[]).expect("it parses");
        assert_eq!((args.seconds(), args.slo()), (Some(10.0), None));
        let compare = parse(&["compare", "a.json", "b.json"]).expect("it parses").command;
        assert!(matches!(compare, Some(BenchCommand::Compare { .. })));
    }

    #[test]
    fn bad_and_contradicting_options_are_named() {
        let bad: [(&[&str], &str); 21] = [
            (&["--rate", "0"], "--rate 0"),
            (&["--rate", "NaN"], "--rate NaN"),
            (&["--rate", "1", "--concurrency", "2"], "cannot be used with"),
            (&["--sweep", "rate=1,0"], "--rate 0"),
            (&["--sweep", "rate=1,x"], "\"x\" is no rate"),
            (&["--sweep", "tokens=1"], "no sweep over"),
            (&["--sweep", "rate=1", "--rate", "2"], "cannot be used with"),
            (&["--concurrency", "0"], "--concurrency 0"),
            (&["--duration", "1", "--requests", "2"], "cannot be used with"),
            (&["--duration=-1"], "--duration -1"),
            (&["--requests", "0"], "--requests 0"),
            (&["--warmup", "inf"], "--warmup"),
            (&["--arrivals", "uniform"], "--arrivals is for an open loop"),
            (&["--prompt-tokens", "pareto:3"], "unknown distribution"),
            (&["--prompt-tokens", "3", "--prompt", "x"], "cannot be used with"),
            (&["--deltas", "a", "--delta-prefix", "b"], "cannot be used with"),
            (&["--deltas", "a,,b"], "empty name"),
            (&["--base-share", "0.5"], "--base-share is for a run with deltas"),
            (&["--deltas", "a", "--base-share", "1"], "names no delta"),
            (&["--popularity", "zipf"], "--popularity is for a run with deltas"),
            (&["--slo-ttft-ms", "0"], "--slo-ttft-ms"),
        ];
        for (words, expected) in bad {
            let error = refusal(words);
            assert!(error.contains(expected), "{words:?}: {error}");
        }
        // all at once
        let error = refusal(&["--rate", "0", "--max-error-rate", "2", "--max-in-flight", "0"]);
        assert!(["--rate", "--max-error-rate", "--max-in-flight"].iter().all(|name| error.contains(name)), "{error}");
    }
}
