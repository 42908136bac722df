//! The losses of preferences on tensors.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::{Rewards, dpo, kl_estimate, kto, orpo};
use crate::{
    admission::train_params::{PreferenceMethod, ResolvedPreference},
    delta::Delta,
    model::Base,
    pacing::Pacer,
    train::{
        encode::{Encoded, Target},
        objective::{self, Losses, Sequence},
    },
};

/// Log-probabilities of answers, summed over each one's tokens.
#[derive(Debug)]
pub struct Answered {
    /// `[n]`, f32; tracked when the delta's tensors are variables.
    pub sums: Tensor,
    /// How many tokens each sum is over.
    pub counts: Vec<usize>,
}

/// The log-probability of each sequence's learned tokens, given those before.
///
/// # Errors
/// Those of the forward.
pub fn log_probs(
    base: &Base,
    delta: &Arc<Delta>,
    sequences: &[Sequence<'_>],
    pacer: Option<&Arc<Pacer>>,
) -> Result<Answered> {
    let n = sequences.len();
    if n == 0 {
        return Ok(Answered { sums: Tensor::new(Vec::<f32>::new(), &base.device)?, counts: Vec::new() });
    }
    Answered::of(objective::token_losses(base, delta, sequences, 0.0, pacer)?)
}

impl Answered {
    /// Sums of the negative log-likelihoods of tokens, `[tokens]`, of which each sequence has `counts`.
    ///
    /// # Errors
    /// The device.
    pub fn of((each, counts): (Tensor, Vec<usize>)) -> Result<Self> {
        let of: Vec<u32> = counts.iter().enumerate().flat_map(|(i, count)| vec![i as u32; *count]).collect();
        let zero = Tensor::zeros(counts.len(), each.dtype(), each.device())?;
        let sums = zero.index_add(&Tensor::new(of, each.device())?, &each.neg()?, 0)?;
        Ok(Self { sums, counts })
    }
}

impl Encoded {
    /// Its own answer, and the other one.
    pub fn answers(&self) -> impl Iterator<Item = Sequence<'_>> {
        let own = Sequence { tokens: &self.tokens, source: &self.source, learn: self.learned() };
        let other = self.other().map(|a| Sequence { tokens: &a.tokens, source: &self.source, learn: &a.learn });
        std::iter::once(own).chain(other)
    }
}

/// What a delta makes of examples: their own answers, and what is known of the others.
#[derive(Debug)]
pub struct Judged<'a> {
    /// The examples.
    pub examples: &'a [&'a Encoded],
    /// The log-probabilities of their own answers, and after them, of pairs, those of the others.
    pub policy: Answered,
    /// Of rated examples, those of the others where there are any, in order.
    pub mismatched: Vec<f32>,
    /// By example, what the reference gives its own answer and the other; empty where there is no reference.
    pub reference: Vec<[f32; 2]>,
}

/// The loss of each example, with the gradient of its answers' log-probabilities. A rated example's estimate of KL is that
/// of the micro-batch.
///
/// # Errors
/// The device; examples of another kind than the method's.
pub fn judge(of: &Judged<'_>, p: &ResolvedPreference) -> Result<Losses> {
    let sums = of.policy.sums.to_vec1::<f32>()?;
    let n = of.examples.len();
    let answers = sums.len() / n.max(1);
    let references = if p.has_reference() { n } else { 0 };
    if of.reference.len() != references {
        candle_core::bail!("{} references for {n} examples of {}", of.reference.len(), p.method.as_str());
    }
    let at = |i: usize| f64::from(sums[i]);
    let reference = |i: usize| of.reference.get(i).map_or([0.0; 2], |r| r.map(f64::from));
    let (mut values, mut slopes) = (Vec::with_capacity(n), vec![0f32; sums.len()]);
    let mut rewards = Rewards::default();
    let others = (0..n).filter(|i| of.examples[*i].other().is_some());
    let ratios: Vec<f64> = others.zip(&of.mismatched).map(|(i, log_p)| f64::from(*log_p) - reference(i)[1]).collect();
    let kl = kl_estimate(&ratios);
    for (i, example) in of.examples.iter().enumerate() {
        match (&example.target, p.method, answers) {
            (Target::Preferred(..), PreferenceMethod::Dpo, 2) => {
                let loss = dpo([at(i), at(n + i)], reference(i), p.beta, p.label_smoothing);
                values.push(loss.value as f32);
                (slopes[i], slopes[n + i]) = (loss.slope[0] as f32, loss.slope[1] as f32);
                rewards.pair(loss.reward);
            }
            (Target::Preferred(..), PreferenceMethod::Orpo, 2) => {
                let counts = [i, n + i].map(|at| of.policy.counts[at].max(1) as f64);
                let loss = orpo([at(i) / counts[0], at(n + i) / counts[1]], p.beta);
                values.push(loss.value as f32);
                slopes[i] = (loss.slope[0] / counts[0]) as f32;
                slopes[n + i] = (loss.slope[1] / counts[1]) as f32;
                rewards.pair(loss.reward);
            }
            (Target::Rated(_, good, _), PreferenceMethod::Kto, 1) => {
                let loss = kto(at(i), reference(i)[0], kl, *good, p);
                values.push(loss.value as f32);
                slopes[i] = loss.slope[0] as f32;
                rewards.judged(loss.reward[0], *good, p.beta * kl);
            }
            _ => candle_core::bail!("{} of other examples", p.method.as_str()),
        }
    }
    let each = linear(&of.policy.sums, values, slopes)?;
    Ok(Losses { rewards, ..Losses::of(each) })
}

/// These values, `[n]`, with these slopes by `x`, `[k n]`: value `i` has the gradient of `x[i]`, `x[n + i]`, ... and no
/// other, which is all that a loss of a few numbers needs of a graph.
fn linear(x: &Tensor, values: Vec<f32>, slopes: Vec<f32>) -> Result<Tensor> {
    let (n, device): (usize, &Device) = (values.len(), x.device());
    if n == 0 {
        candle_core::bail!("an empty micro-batch");
    }
    let change = (x - x.detach())?; // zeros, with the gradient of x
    let change = (change * Tensor::new(slopes, device)?)?.reshape((x.elem_count() / n, n))?.sum(0)?;
    change + Tensor::new(values, device)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    #[test]
    fn values_and_slopes_are_given_as_they_are() {
        let x = Var::new(&[1f32, -2.0, 30.0, 4.0], &Device::Cpu).unwrap();
        let y = linear(&x, vec![0.1, 0.7], vec![2.0, -3.0, 0.5, 0.0]).unwrap();
        assert_eq!(y.to_vec1::<f32>().unwrap(), [0.1, 0.7]);
        let weights = Tensor::new(&[10f32, 100.0], &Device::Cpu).unwrap();
        let grads = (y * weights).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>().unwrap(), [20.0, -300.0, 5.0, 0.0]);
        let sick = Var::new(&[f32::NAN], &Device::Cpu).unwrap();
        assert!(linear(&sick, vec![1.0], vec![1.0]).unwrap().to_vec1::<f32>().unwrap()[0].is_nan());
    }
}
