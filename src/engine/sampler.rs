//! From one row of logits to the next token: a pure function.
//!
//! Order, as in vLLM and Hugging Face: what a constraint allows, penalties, repeated runs, temperature, min-p, top-k, top-p. The random number depends on the
//! request's seed and the position only, so neither the batch's composition nor a recomputation changes a token.

use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
};

use super::constraint::TokenSet;
use crate::admission::params::Sampling;

/// A row of logits that no token can be chosen from: NaN, positive infinity, or no finite value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model's logits are not finite")]
pub(super) struct NonFinite;

/// What was generated so far, as penalties see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct History<'a> {
    /// The prompt: repetition penalty only.
    pub(super) prompt: &'a [u32],
    /// The output: all penalties.
    pub(super) output: &'a [u32],
}

/// Chooses the next token of a row.
///
/// # Errors
/// Logits that are not finite.
pub(super) fn choose(logits: &[f32], history: History<'_>, how: &Sampling, seed: u64) -> Result<u32, NonFinite> {
    let (best, _) = scan(logits)?;
    if is_penalised(how) {
        let mut logits = logits.to_vec();
        penalise(&mut logits, history, how);
        forbid_repeats(&mut logits, history, how.no_repeat_ngram_size as usize);
        let (best, max) = scan(&logits)?;
        return Ok(draw(&logits, best, max, how, uniform(seed, position(history))));
    }
    if how.temperature <= 0.0 {
        return Ok(best);
    }
    Ok(draw(logits, best, logits[best as usize], how, uniform(seed, position(history))))
}

/// A row in which tokens that are not allowed cannot be chosen. Numbers that are none stay, wherever they are.
pub(super) fn masked(logits: &[f32], allowed: &TokenSet) -> Vec<f32> {
    let keep = |id: u32, logit: f32| allowed.contains(id) || logit.is_nan() || logit == f32::INFINITY;
    (0u32..).zip(logits).map(|(id, &logit)| if keep(id, logit) { logit } else { f32::NEG_INFINITY }).collect()
}

/// Natural-log probability of a token under the raw logits, and the `n` most likely tokens with theirs.
///
/// # Errors
/// Logits that are not finite.
pub(super) fn logprobs(logits: &[f32], token: u32, n: usize) -> Result<(f32, Vec<(u32, f32)>), NonFinite> {
    let norm = log_sum_exp(logits)?;
    let logprob = |l: f32| (f64::from(l) - norm) as f32;
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let n = n.min(ids.len());
    if n > 0 {
        keep_best(&mut ids, n, logits);
        ids.sort_unstable_by(|&a, &b| better(logits, a, b));
    }
    let top = ids[..n].iter().map(|&id| (id, logprob(logits[id as usize]))).collect();
    Ok((logits.get(token as usize).map_or(f32::NEG_INFINITY, |&l| logprob(l)), top))
}

/// The `n` likeliest tokens of a beam with their log-probabilities, best first. As in transformers, penalties are applied to
/// the log-probabilities, not to the logits.
///
/// # Errors
/// Logits that are not finite.
pub(super) fn candidates(
    logits: &[f32],
    history: History<'_>,
    how: &Sampling,
    n: usize,
) -> Result<Vec<(u32, f32)>, NonFinite> {
    let norm = log_sum_exp(logits)?;
    let mut scores: Vec<f32> = logits.iter().map(|&l| (f64::from(l) - norm) as f32).collect();
    if is_penalised(how) {
        penalise(&mut scores, history, how);
        forbid_repeats(&mut scores, history, how.no_repeat_ngram_size as usize);
    }
    let mut ids: Vec<u32> = (0..scores.len() as u32).collect();
    keep_best(&mut ids, n.clamp(1, scores.len().max(1)), &scores);
    ids.sort_unstable_by(|&a, &b| better(&scores, a, b));
    Ok(ids.into_iter().map(|id| (id, scores[id as usize])).collect())
}

/// The logarithm of the sum of the exponentials.
fn log_sum_exp(logits: &[f32]) -> Result<f64, NonFinite> {
    let (_, max) = scan(logits)?;
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    Ok(f64::from(max) + sum.ln())
}

/// A uniform number in [0, 1) for a position of a request: two rounds of SplitMix64's finaliser (Steele et al. 2014) as
/// a counter-based generator. Fixed here, so that a seed means the same in every release.
pub(super) fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let golden = 0x9E37_79B9_7F4A_7C15_u64;
    let key = mix(seed.wrapping_add(golden));
    let bits = mix(key ^ mix(position.wrapping_add(1).wrapping_mul(golden)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

fn position(history: History<'_>) -> u64 {
    (history.prompt.len() + history.output.len()) as u64
}

fn is_penalised(how: &Sampling) -> bool {
    let penalties = how.repetition_penalty != 1.0 || how.frequency_penalty != 0.0 || how.presence_penalty != 0.0;
    penalties || how.no_repeat_ngram_size > 0
}

/// The first index of the largest logit, and that logit.
fn scan(logits: &[f32]) -> Result<(u32, f32), NonFinite> {
    const LANES: usize = 16;
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut sick = [false; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            max[i] = if chunk[i] > max[i] { chunk[i] } else { max[i] };
            sick[i] |= chunk[i].is_nan();
        }
    }
    let top = max.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max);
    if sick.contains(&true) || rest.iter().any(|x| x.is_nan()) || !top.is_finite() {
        return Err(NonFinite);
    }
    let at = logits.iter().position(|&l| l == top).ok_or(NonFinite)?;
    Ok((at as u32, top))
}

fn penalise(logits: &mut [f32], history: History<'_>, how: &Sampling) {
    // token -> occurrences in the output
    let mut seen: HashMap<u32, u32> = history.prompt.iter().map(|&t| (t, 0)).collect();
    history.output.iter().for_each(|&t| *seen.entry(t).or_default() += 1);
    for (token, count) in seen {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        if *logit > 0.0 {
            *logit /= how.repetition_penalty;
        } else {
            *logit *= how.repetition_penalty;
        }
        if count > 0 {
            *logit -= how.frequency_penalty * count as f32 + how.presence_penalty;
        }
    }
}

/// Forbids every token that would end a run of `n` tokens which prompt and output already have (as transformers'
/// `no_repeat_ngram_size`). Where no token would be left, nothing is forbidden.
fn forbid_repeats(logits: &mut [f32], history: History<'_>, n: usize) {
    let all = [history.prompt, history.output].concat();
    if n == 0 || all.len() < n {
        return;
    }
    let (ahead, end) = (n - 1, all.len() + 1 - n);
    let tail = &all[end..];
    let forbidden: HashSet<u32> = all.windows(n).filter(|run| run[..ahead] == *tail).map(|run| run[ahead]).collect();
    let finite = |(id, l): (usize, &f32)| l.is_finite() && !forbidden.contains(&(id as u32));
    if !logits.iter().enumerate().any(finite) {
        return;
    }
    for id in forbidden {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Draws from the filtered distribution with the uniform number `u`. Weights are `exp((l - max) / T)`: exact also where
/// `l / T` would overflow.
fn draw(logits: &[f32], best: u32, max: f32, how: &Sampling, u: f64) -> u32 {
    if how.temperature <= 0.0 {
        return best;
    }
    let weight = |id: u32| (f64::from(logits[id as usize] - max) / f64::from(how.temperature)).exp();
    // p >= min_p * p_max
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if how.min_p > 0.0 {
        ids.retain(|&id| id == best || weight(id) >= f64::from(how.min_p));
    }
    let k = how.top_k as usize;
    if k > 0 && k < ids.len() {
        keep_best(&mut ids, k, logits);
    }
    if how.top_p < 1.0 {
        keep_mass(&mut ids, f64::from(how.top_p), logits, weight);
    }
    // in order of ids, whatever the filters did to it
    ids.sort_unstable();
    let weights: Vec<f64> = ids.iter().map(|&id| weight(id)).collect();
    let target = u * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    for (&id, w) in ids.iter().zip(&weights) {
        sum += w;
        if sum > target {
            return id;
        }
    }
    best
}

/// Likelier first; of equals the smaller id.
fn better(logits: &[f32], a: u32, b: u32) -> Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// Keeps the `k` best, in no order; `k` is at least 1.
fn keep_best(ids: &mut Vec<u32>, k: usize, logits: &[f32]) {
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, |&a, &b| better(logits, a, b));
        ids.truncate(k);
    }
}

/// Keeps the smallest set of best tokens with at least this share of the mass. Sorts only as many as hold that share.
fn keep_mass(ids: &mut Vec<u32>, share: f64, logits: &[f32], weight: impl Fn(u32) -> f64) {
    let target = share * ids.iter().map(|&id| weight(id)).sum::<f64>();
    for k in [64, 1024, usize::MAX] {
        if k < ids.len() {
            ids.select_nth_unstable_by(k - 1, |&a, &b| better(logits, a, b));
            if ids[..k].iter().map(|&id| weight(id)).sum::<f64>() < target {
                continue;
            }
            ids.truncate(k);
        }
        ids.sort_unstable_by(|&a, &b| better(logits, a, b));
        let mut sum = 0.0;
        let enough = ids.iter().position(|&id| {
            sum += weight(id);
            sum >= target
        });
        ids.truncate(enough.map_or(ids.len(), |at| at + 1));
        return;
    }
}

#[cfg(test)]
mod tests;
