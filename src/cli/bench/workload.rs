//! What is drawn at random: lengths, arrivals, operations, and which delta a request names. What request number `i` is
//! follows from the seed and `i` alone, however many callers there are and however fast the server answers; but the words of
//! made-up prompts are new with each load, since a server may know those of the load before (a prefix cache).

use std::{fmt, str::FromStr};

use clap::ValueEnum;
use rand::{Rng, SeedableRng, distr::weighted::WeightedIndex, rngs::StdRng};
use rand_distr::{Distribution, Exp, LogNormal};
use serde::{Deserialize, Serialize, Serializer};

/// What a generator of random numbers is for; those of different purposes and numbers are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    /// Requests that are counted.
    Counted = 1,
    /// Requests of the warm-up.
    WarmUp = 2,
    /// When they arrive.
    Arrivals = 3,
    /// Which samples are kept where there are too many.
    Kept = 4,
    /// Texts by which the tokenizer is tried.
    Trial = 5,
}

/// The generator of number `i` of a stream.
pub(super) fn generator(seed: u64, stream: Stream, i: u64) -> StdRng {
    generator_of_load(seed, stream, i, 0)
}

/// The same for what is to differ from load to load.
pub(super) fn generator_of_load(seed: u64, stream: Stream, i: u64, load: u64) -> StdRng {
    let mut key = [0; 32];
    for (place, number) in key.chunks_exact_mut(8).zip([seed, stream as u64, i, load]) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    StdRng::from_seed(key)
}

/// A number of tokens of each request: `32`, `16..64` (both ends included), `lognormal:MEAN,SIGMA,16..512`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Lengths {
    /// Always this many.
    Fixed(u32),
    /// All numbers of a range alike.
    Uniform { from: u32, to: u32 },
    /// `mean` is that of the distribution without bounds, `sigma` the standard deviation of its logarithm; what is drawn outside
    /// of the bounds becomes the bound.
    LogNormal { mean: f64, sigma: f64, from: u32, to: u32 },
}

impl Lengths {
    /// A number of tokens.
    pub(super) fn draw(&self, rng: &mut impl Rng) -> u32 {
        match *self {
            Self::Fixed(n) => n,
            Self::Uniform { from, to } => rng.random_range(from..=to),
            Self::LogNormal { mean, sigma, from, to } => {
                // checked where it was read: mean is over 0, sigma is finite
                let value = LogNormal::new(mean.ln() - sigma * sigma / 2.0, sigma).map_or(mean, |d| d.sample(rng));
                // a float beyond u32 saturates
                (value.round() as u32).clamp(from, to)
            }
        }
    }

    /// The largest number that can come.
    pub(super) fn most(&self) -> u32 {
        match *self {
            Self::Fixed(n) => n,
            Self::Uniform { to, .. } | Self::LogNormal { to, .. } => to,
        }
    }
}

fn tokens(text: &str) -> Result<u32, String> {
    match text.trim().parse() {
        Ok(0) => Err("a length is at least 1 token".to_owned()),
        Ok(n) => Ok(n),
        Err(_) => Err(format!("{text:?} is no number of tokens")),
    }
}

fn bounds(text: &str) -> Result<(u32, u32), String> {
    let (from, to) = text.split_once("..").ok_or_else(|| format!("{text:?} is no range FROM..TO"))?;
    match (tokens(from)?, tokens(to)?) {
        (from, to) if from > to => Err(format!("the range {text:?} is empty")),
        both => Ok(both),
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((name, rest)) = text.split_once(':') {
            if name != "lognormal" {
                return Err(format!(
                    "unknown distribution {name:?}; there are N, FROM..TO, lognormal:MEAN,SIGMA,FROM..TO"
                ));
            }
            let parts: Vec<&str> = rest.split(',').collect();
            let [mean, sigma, range] = parts[..] else {
                return Err("lognormal wants MEAN,SIGMA,FROM..TO".to_owned());
            };
            let number = |what: &str, text: &str, least: f64| match text.trim().parse::<f64>() {
                Ok(x) if x.is_finite() && x > least => Ok(x),
                _ => Err(format!("lognormal's {what} is {text:?}, not a number over {least}")),
            };
            let (mean, sigma) = (number("mean", mean, 0.0)?, number("sigma", sigma, 0.0)?);
            let (from, to) = bounds(range)?;
            return Ok(Self::LogNormal { mean, sigma, from, to });
        }
        if text.contains("..") {
            return bounds(text).map(|(from, to)| Self::Uniform { from, to });
        }
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match digits {
            true => tokens(text).map(Self::Fixed),
            false => {
                Err(format!("unknown distribution {text:?}; there are N, FROM..TO, lognormal:MEAN,SIGMA,FROM..TO"))
            }
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Uniform { from, to } => write!(f, "{from}..{to}"),
            Self::LogNormal { mean, sigma, from, to } => write!(f, "lognormal:{mean},{sigma},{from}..{to}"),
        }
    }
}

impl Serialize for Lengths {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// How requests of an open loop arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Arrivals {
    /// Independently of each other: times between them are exponential.
    Poisson,
    /// At even distances.
    Uniform,
}

impl Arrivals {
    /// Seconds to the next arrival at this many per second, which is over 0.
    pub(super) fn gap(self, rate: f64, rng: &mut impl Rng) -> f64 {
        match (self, Exp::new(rate)) {
            (Self::Poisson, Ok(exp)) => exp.sample(rng),
            _ => 1.0 / rate,
        }
    }
}

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Op {
    Generate,
    Classify,
    Embed,
    Score,
}

impl Op {
    const ALL: [Self; 4] = [Self::Generate, Self::Classify, Self::Embed, Self::Score];

    /// Its name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Classify => "classify",
            Self::Embed => "embed",
            Self::Score => "score",
        }
    }
}

/// Operations with their weights, all over 0: `generate=3,classify=1`, or a name alone, whose weight is 1.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Mix(pub(super) Vec<(Op, f64)>);

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all: Vec<(Op, f64)> = Vec::new();
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let op = Op::ALL.into_iter().find(|op| op.name() == name.trim());
            let op =
                op.ok_or_else(|| format!("unknown operation {name:?}; there are generate, classify, embed, score"))?;
            let weight = weight.trim().parse::<f64>().ok().filter(|w| w.is_finite() && *w > 0.0);
            let weight = weight.ok_or_else(|| format!("the weight in {part:?} is not a number over 0"))?;
            if all.iter().any(|(other, _)| *other == op) {
                return Err(format!("{name:?} is given twice"));
            }
            all.push((op, weight));
        }
        Ok(Self(all))
    }
}

impl Serialize for Mix {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let parts: Vec<String> = self.0.iter().map(|(op, weight)| format!("{}={weight}", op.name())).collect();
        to.serialize_str(&parts.join(","))
    }
}

/// Which delta a request names. Deltas have ranks: the first of the list is the most popular.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Popularity {
    /// Each alike.
    Uniform,
    /// The k-th in proportion to 1 / k^s.
    Zipf,
    /// One after the other.
    RoundRobin,
    /// The first one only.
    Single,
}

/// Draws among deltas of given ranks.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    ranks: Vec<usize>,
    /// None: in turn.
    weights: Option<WeightedIndex<f64>>,
}

impl Choice {
    /// Among deltas of these ranks, counted from 0 in all that there are; `exponent` is zipf's. None of nothing.
    pub(super) fn new(popularity: Popularity, exponent: f64, mut ranks: Vec<usize>) -> Option<Self> {
        let first = *ranks.first()? as f64 + 1.0;
        let exponent = match popularity {
            Popularity::Zipf => exponent,
            Popularity::Uniform | Popularity::RoundRobin => 0.0,
            Popularity::Single => {
                ranks.truncate(1);
                0.0
            }
        };
        // relative to the first, so that no exponent makes all weights 0
        let weights = WeightedIndex::new(ranks.iter().map(|&rank| ((rank as f64 + 1.0) / first).powf(-exponent)));
        let weights = weights.ok().filter(|_| popularity != Popularity::RoundRobin);
        Some(Self { ranks, weights })
    }

    /// The rank of request `i`'s delta.
    pub(super) fn draw(&self, i: u64, rng: &mut impl Rng) -> usize {
        let at = match &self.weights {
            Some(weights) => weights.sample(rng),
            None => (i % self.ranks.len() as u64) as usize,
        };
        self.ranks[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEDS: [u64; 5] = [0, 1, 7, 99, u64::MAX];

    fn moments(values: &[f64]) -> (f64, f64) {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        (mean, values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64)
    }

    #[test]
    fn poisson_arrivals_have_exponential_gaps_and_poisson_counts() {
        for (seed, rate) in SEEDS.into_iter().zip([0.5, 3.0, 50.0, 400.0, 1e4]) {
            let mut rng = generator(seed, Stream::Arrivals, 0);
            let n = 40_000;
            let gaps: Vec<f64> = (0..n).map(|_| Arrivals::Poisson.gap(rate, &mut rng)).collect();
            // mean 1 / rate, variance 1 / rate^2; five standard errors each (of the variance: sqrt(8 / n))
            let (mean, variance) = moments(&gaps);
            assert!((mean * rate - 1.0).abs() < 5.0 / f64::from(n).sqrt(), "{rate}: {mean}");
            assert!((variance * rate * rate - 1.0).abs() < 5.0 * (8.0 / f64::from(n)).sqrt(), "{rate}: {variance}");
            // arrivals in windows of 10 / rate: mean and variance are both 10
            let (mut now, mut counts) = (0.0, vec![0.0; 3_000]);
            for gap in &gaps {
                now += gap;
                if let Some(count) = counts.get_mut((now * rate / 10.0) as usize) {
                    *count += 1.0;
                }
            }
            let (mean, variance) = moments(&counts);
            assert!((mean - 10.0).abs() < 0.3 && (variance - 10.0).abs() < 1.4, "{rate}: {mean} {variance}");
        }
        let mut rng = generator(0, Stream::Arrivals, 0);
        assert!((0..10).all(|_| Arrivals::Uniform.gap(4.0, &mut rng) == 0.25));
    }

    #[test]
    fn popularity_is_that_of_the_theory_also_among_some_of_the_deltas() {
        let all: Vec<usize> = (0..20).collect();
        let some = vec![1, 4, 5, 19];
        for (seed, exponent) in SEEDS.into_iter().zip([0.5, 0.8, 1.0, 1.2, 2.0]) {
            for ranks in [&all, &some] {
                let choice = Choice::new(Popularity::Zipf, exponent, ranks.clone()).expect("deltas");
                let n = 50_000_u64;
                let mut counts = [0u64; 20];
                (0..n).for_each(|i| counts[choice.draw(i, &mut generator(seed, Stream::Counted, i))] += 1);
                let weight = |rank: usize| 1.0 / (rank as f64 + 1.0).powf(exponent);
                let sum: f64 = ranks.iter().map(|&r| weight(r)).sum();
                for rank in 0..20 {
                    let p = if ranks.contains(&rank) { weight(rank) / sum } else { 0.0 };
                    let bound = 5.0 * (n as f64 * p * (1.0 - p)).sqrt();
                    assert!(
                        (counts[rank] as f64 - n as f64 * p).abs() <= bound,
                        "s {exponent} rank {rank}: {counts:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn other_popularities_are_even_in_turn_or_the_first() {
        let draws = |popularity, n: u64| -> Vec<usize> {
            let choice = Choice::new(popularity, 1.0, vec![2, 5, 7]).expect("deltas");
            (0..n).map(|i| choice.draw(i, &mut generator(3, Stream::Counted, i))).collect()
        };
        assert_eq!(draws(Popularity::RoundRobin, 5), [2, 5, 7, 2, 5]);
        assert_eq!(draws(Popularity::Single, 4), [2; 4]);
        let even = draws(Popularity::Uniform, 30_000);
        for rank in [2, 5, 7] {
            let count = even.iter().filter(|r| **r == rank).count();
            assert!((9_600..10_400).contains(&count), "{rank}: {count}");
        }
        assert!(Choice::new(Popularity::Uniform, 1.0, vec![]).is_none());
        // an exponent that makes every other weight 0 leaves the first
        let steep = Choice::new(Popularity::Zipf, 1e6, vec![3, 9]).expect("deltas");
        assert!((0..50).all(|i| steep.draw(i, &mut generator(0, Stream::Counted, i)) == 3));
    }

    #[test]
    fn lengths_have_their_mean_and_keep_their_bounds() {
        for seed in SEEDS {
            let mut rng = generator(seed, Stream::Counted, 0);
            let mut draw = |text: &str| -> Vec<f64> {
                let lengths: Lengths = text.parse().expect("a distribution");
                let values: Vec<f64> = (0..40_000).map(|_| f64::from(lengths.draw(&mut rng))).collect();
                assert!(values.iter().all(|v| *v <= f64::from(lengths.most())), "{text}");
                values
            };
            assert!(draw("12").iter().all(|v| *v == 12.0));
            let uniform = draw("10..30");
            assert!((moments(&uniform).0 - 20.0).abs() < 0.2);
            assert!([10.0, 30.0].iter().all(|end| uniform.contains(end)) && uniform.iter().all(|v| *v >= 10.0));
            let free = draw("lognormal:100,0.5,1..100000");
            let logs: Vec<f64> = free.iter().map(|v| v.ln()).collect();
            let (mean, (log_mean, log_variance)) = (moments(&free).0, moments(&logs));
            assert!((mean - 100.0).abs() < 1.5, "{mean}");
            assert!((log_mean - (100f64.ln() - 0.125)).abs() < 0.02, "{log_mean}");
            assert!((log_variance.sqrt() - 0.5).abs() < 0.02, "{log_variance}");
            let bounded = draw("lognormal:100,0.5,80..120");
            assert!(bounded.iter().all(|v| (80.0..=120.0).contains(v)) && bounded.contains(&80.0));
        }
    }

    #[test]
    fn a_number_of_a_stream_is_the_same_each_time_and_another_than_its_neighbours() {
        let first = |seed, stream, i| generator(seed, stream, i).random::<u64>();
        let numbers = [
            first(1, Stream::Counted, 5),
            first(1, Stream::Counted, 6),
            first(1, Stream::WarmUp, 5),
            first(2, Stream::Counted, 5),
        ];
        assert_eq!(numbers[0], first(1, Stream::Counted, 5));
        assert!((0..4).all(|i| (0..i).all(|j| numbers[i] != numbers[j])));
    }

    #[test]
    fn distributions_and_mixes_read_as_they_are_written_and_bad_ones_are_named() {
        for text in ["32", "1..8", "lognormal:64,0.8,4..512"] {
            assert_eq!(text.parse::<Lengths>().expect(text).to_string(), text);
        }
        let bad = [
            ("0", "at least 1"),
            ("8..4", "empty"),
            ("0..4", "at least 1"),
            ("4..", "no number"),
            ("normal:3,1,1..2", "unknown distribution"),
            ("geometric", "unknown distribution"),
            ("-3", "unknown distribution"),
            ("", "unknown distribution"),
            ("99999999999", "no number"),
            ("lognormal:5,1", "wants"),
            ("lognormal:0,1,1..2", "mean"),
            ("lognormal:5,NaN,1..2", "sigma"),
            ("lognormal:5,1,12", "range"),
        ];
        for (text, word) in bad {
            let error = text.parse::<Lengths>().expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
        let mix: Mix = "generate=3,classify".parse().expect("a mix");
        assert_eq!(mix, Mix(vec![(Op::Generate, 3.0), (Op::Classify, 1.0)]));
        for (text, word) in
            [("train", "unknown operation"), ("embed=0", "over 0"), ("score=x", "over 0"), ("embed,embed", "twice")]
        {
            assert!(text.parse::<Mix>().expect_err(text).contains(word), "{text}");
        }
    }
}
