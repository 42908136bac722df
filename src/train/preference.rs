//! The losses of preferences: what the log-probabilities of answers say, and the slope of that by each of them.
//!
//! Plain numbers: a loss is a function of one or two of them, so its slope is worked out here in f64 and the graph of
//! tensors gets it as it is (`losses`). A reward is `beta (log p - log p of the reference)`.

mod losses;

pub use losses::{Answered, Judged, judge, log_probs};

use crate::admission::train_params::{PreferenceMethod, ResolvedPreference};

/// The closest that a mean log-probability counts to 0, where the odds have no end: f32 tells no closer ones apart.
const SUREST: f64 = -1e-7;

/// A loss, its slope by each log-probability, and the rewards.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss<const N: usize> {
    /// The loss.
    pub value: f64,
    /// By the policy's log-probabilities.
    pub slope: [f64; N],
    /// Of each answer.
    pub reward: [f64; N],
}

/// `ln sigmoid(x)`, without overflow.
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}

/// `ln(1 - exp(x))` for `x < 0`, exact at both ends (Maechler 2012).
pub fn log1m_exp(x: f64) -> f64 {
    if x > -std::f64::consts::LN_2 { (-x.exp_m1()).ln() } else { (-x.exp()).ln_1p() }
}

/// DPO: `-(1 - e) ln sigmoid(h) - e ln sigmoid(-h)` with `h = beta ((c - c_ref) - (r - r_ref))`; `[c, r]` are the summed
/// log-probabilities of the chosen and the rejected answer, `e` the label smoothing (cDPO).
pub fn dpo(policy: [f64; 2], reference: [f64; 2], beta: f64, smoothing: f64) -> Loss<2> {
    let reward = [0, 1].map(|i| beta * (policy[i] - reference[i]));
    let h = reward[0] - reward[1];
    let value = -(1.0 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h);
    let by_h = smoothing * sigmoid(h) - (1.0 - smoothing) * sigmoid(-h);
    Loss { value, slope: [beta * by_h, -beta * by_h], reward }
}

/// ORPO: `-c - beta ln sigmoid(o)`, where `o` is the logarithm of the ratio of the answers' odds `p / (1 - p)`; `[c, r]` are
/// mean log-probabilities per token.
pub fn orpo(mean: [f64; 2], beta: f64) -> Loss<2> {
    let [c, r] = mean.map(|x| x.min(SUREST));
    let o = (c - r) - (log1m_exp(c) - log1m_exp(r));
    // the slope of ln(p / (1 - p)) by ln p is 1 / (1 - p)
    let by_o = -beta * sigmoid(-o);
    let slope = [by_o / -c.exp_m1() - 1.0, by_o / r.exp_m1()];
    Loss { value: -mean[0] - beta * log_sigmoid(o), slope, reward: mean.map(|x| beta * x) }
}

/// KTO: `w (1 - sigmoid(s))` with `s = beta (l - z)` for a good answer and `beta (z - l)` for a bad one; `l` is the answer's
/// log-ratio to the reference, `z` the estimate of KL, at least 0, which no gradient goes through.
pub fn kto(policy: f64, reference: f64, kl: f64, good: bool, p: &ResolvedPreference) -> Loss<1> {
    let (sign, weight) = if good { (1.0, p.desirable_weight) } else { (-1.0, p.undesirable_weight) };
    let ratio = policy - reference;
    let s = sign * p.beta * (ratio - kl);
    let slope = -weight * sign * p.beta * sigmoid(s) * sigmoid(-s);
    Loss { value: weight * sigmoid(-s), slope: [slope], reward: [p.beta * ratio] }
}

/// The estimate of KL of a micro-batch: the mean log-ratio of answers to other prompts, at least 0; 0 without any.
pub fn kl_estimate(ratios: &[f64]) -> f64 {
    (ratios.iter().sum::<f64>() / ratios.len().max(1) as f64).max(0.0)
}

impl ResolvedPreference {
    /// Whether the loss compares with the bare base.
    pub fn has_reference(&self) -> bool {
        self.method != PreferenceMethod::Orpo
    }
}

/// What evaluations count of rewards.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rewards {
    right: u64,
    all: u64,
    /// Sum and number of rewards of preferred answers, and of the others.
    sums: [(f64, u64); 2],
}

impl Rewards {
    /// A pair; right where the chosen answer has the larger reward.
    pub fn pair(&mut self, [chosen, rejected]: [f64; 2]) {
        self.count(chosen > rejected);
        self.sum(true, chosen);
        self.sum(false, rejected);
    }

    /// A judged answer; right where a good one's reward is over `bar`, or a bad one's is not.
    pub fn judged(&mut self, reward: f64, good: bool, bar: f64) {
        self.count((reward > bar) == good);
        self.sum(good, reward);
    }

    /// Adds those of another micro-batch.
    pub fn add(&mut self, other: &Self) {
        self.right += other.right;
        self.all += other.all;
        for (a, b) in self.sums.iter_mut().zip(other.sums) {
            *a = (a.0 + b.0, a.1 + b.1);
        }
    }

    fn count(&mut self, right: bool) {
        self.right += u64::from(right);
        self.all += 1;
    }

    fn sum(&mut self, good: bool, reward: f64) {
        let side = &mut self.sums[usize::from(!good)];
        *side = (side.0 + reward, side.1 + 1);
    }

    /// The share that is right; `None` of nothing.
    pub fn accuracy(&self) -> Option<f64> {
        (self.all > 0).then(|| self.right as f64 / self.all as f64)
    }

    /// The mean reward of preferred answers less that of the others; `None` where a side has none.
    pub fn margin(&self) -> Option<f64> {
        let [good, bad] = self.sums;
        (good.1 > 0 && bad.1 > 0).then(|| good.0 / good.1 as f64 - bad.0 / bad.1 as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::train_params::PreferenceParams;

    /// The slopes of a loss by central differences of its value.
    #[track_caller]
    fn assert_slopes<const N: usize>(at: [f64; N], loss: impl Fn([f64; N]) -> Loss<N>) {
        let (h, found) = (1e-5, loss(at));
        for (i, given) in found.slope.iter().enumerate() {
            let moved = |by: f64| {
                let mut to = at;
                to[i] += by;
                loss(to).value
            };
            let slope = (moved(h) - moved(-h)) / (2.0 * h);
            assert!((slope - given).abs() < 1e-8 + 1e-6 * slope.abs(), "{at:?}: {slope} {found:?}");
        }
    }

    #[test]
    fn slopes_are_those_of_the_values() {
        for (c, r) in [(-3.0, -4.0), (-0.2, -9.0), (-60.0, -2.0), (-1e3, -1.0), (-1.0, -1e3), (-5.0, -5.0)] {
            for smoothing in [0.0, 0.1, 0.45] {
                assert_slopes([c, r], |p| dpo(p, [-4.5, -4.0], 0.1, smoothing));
            }
            assert_slopes([c / 20.0, r / 20.0], |p| orpo(p, 0.3));
            for good in [true, false] {
                let p = PreferenceParams {
                    desirable_weight: Some(1.5),
                    undesirable_weight: Some(0.7),
                    ..PreferenceParams::of(PreferenceMethod::Kto)
                };
                assert_slopes([c], |p1| kto(p1[0], r, 0.4, good, &p.resolve()));
            }
        }
    }

    /// `tests/golden/preference.py`: the papers' formulas in long decimals.
    #[test]
    fn values_and_slopes_are_the_recorded_ones() {
        let cases: Vec<serde_json::Value> =
            serde_json::from_str(include_str!("../../tests/golden/preference.json")).unwrap();
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs() + 1e-300;
        for case in &cases {
            let list = |field: &str| -> Vec<f64> {
                case[field].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
            };
            let number = |field: &str| case[field].as_f64().unwrap();
            let (policy, beta) = (list("policy"), number("beta"));
            let two = |v: &[f64]| [v[0], v[1]];
            let (value, slope) = match case["loss"].as_str().unwrap() {
                "dpo" => {
                    let l = dpo(two(&policy), two(&list("reference")), beta, number("label_smoothing"));
                    (l.value, l.slope.to_vec())
                }
                "orpo" => {
                    let l = orpo(two(&policy), beta);
                    (l.value, l.slope.to_vec())
                }
                _ => {
                    let p = PreferenceParams {
                        beta: Some(beta),
                        desirable_weight: Some(number("desirable_weight")),
                        undesirable_weight: Some(number("undesirable_weight")),
                        ..PreferenceParams::of(PreferenceMethod::Kto)
                    };
                    let good = case["good"].as_bool().unwrap();
                    let l = kto(policy[0], list("reference")[0], number("kl"), good, &p.resolve());
                    (l.value, l.slope.to_vec())
                }
            };
            assert!(near(value, number("value")), "{value:e} {case}");
            assert!(slope.iter().zip(list("slope")).all(|(a, b)| near(*a, b)), "{slope:?} {case}");
        }
        assert_eq!(cases.len(), 100);
    }

    #[test]
    fn an_untrained_delta_is_at_the_known_values() {
        let start = dpo([-7.0, -3.0], [-7.0, -3.0], 0.1, 0.2);
        assert!((start.value - std::f64::consts::LN_2).abs() < 1e-15 && start.reward == [0.0, 0.0]);
        assert!((start.slope[0] + 0.1 * 0.3).abs() < 1e-15, "half of beta (1 - 2 e): {start:?}");
        let p = PreferenceParams { undesirable_weight: Some(3.0), ..PreferenceParams::of(PreferenceMethod::Kto) };
        assert_eq!(kto(-4.0, -4.0, 0.0, true, &p.resolve()).value, 0.5);
        assert_eq!(kto(-4.0, -4.0, 0.0, false, &p.resolve()).value, 1.5);
        assert!((orpo([-2.0, -2.0], 1.0).value - 2.0 - std::f64::consts::LN_2).abs() < 1e-15);
    }

    #[test]
    fn extremes_stay_finite() {
        for x in [0.0, 1e-9, -1e-9, 800.0, -800.0, 1e300, -1e300] {
            assert!(log_sigmoid(x).is_finite() && log_sigmoid(x) <= 0.0, "{x}");
        }
        assert_eq!(log_sigmoid(-800.0), -800.0);
        assert!((log1m_exp(-1e-20).exp() - 1e-20).abs() < 1e-30 && log1m_exp(-800.0) == 0.0);
        for mean in [[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [1e-8, -2.0], [-2.0, 1e-8], [-900.0, -1e-8], [-1e-8, -900.0]]
        {
            let loss = orpo(mean, 0.1);
            assert!(loss.value.is_finite() && loss.slope.iter().all(|s| s.is_finite()), "{mean:?} {loss:?}");
        }
        assert!(dpo([f64::NAN, 0.0], [0.0, 0.0], 0.1, 0.0).value.is_nan(), "what is no number is told");
    }

    #[test]
    fn rewards_are_counted_over_micro_batches() {
        let mut all = Rewards::default();
        assert_eq!((all.accuracy(), all.margin()), (None, None));
        all.pair([1.0, 0.5]);
        let mut more = Rewards::default();
        more.pair([0.0, 0.0]);
        all.add(&more);
        assert_eq!((all.accuracy(), all.margin()), (Some(0.5), Some(0.25)), "equal rewards prefer nothing");
        let mut judged = Rewards::default();
        judged.judged(0.4, true, 0.1);
        judged.judged(0.2, true, 0.3);
        assert_eq!((judged.accuracy(), judged.margin()), (Some(0.5), None));
        judged.judged(0.1, false, 0.3);
        assert!((judged.accuracy().unwrap() - 2.0 / 3.0).abs() < 1e-15);
        assert!((judged.margin().unwrap() - 0.2).abs() < 1e-15);
        assert_eq!((kl_estimate(&[]), kl_estimate(&[1.0, -4.0]), kl_estimate(&[1.0, 0.0])), (0.0, 0.0, 0.5));
    }
}
