//! Merges that work number by number on A and on B: linear, pruned by magnitude, TIES and DARE.

use candle_core::{Result, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{Method, Pair, on_host};
use crate::delta::LowRank;

/// How the sign of a number is elected (TIES).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// The sign of the sum.
    #[default]
    Total,
    /// The sign that more deltas have.
    Frequency,
}

/// DARE's draws: whether the next number is kept. The same seed draws the same.
pub(super) fn draws(method: Method) -> impl FnMut() -> bool {
    let seed = match method {
        Method::DareLinear { seed, .. } | Method::DareTies { seed, .. } => seed,
        _ => 0,
    };
    let (mut random, density) = (StdRng::seed_from_u64(seed), method.density().unwrap_or(1.0));
    move || random.random::<f64>() < density
}

/// Merges pairs of one rank; the sign of a weight goes to A.
pub(super) fn pairwise(pairs: &[Pair<'_>], method: Method, keep: &mut dyn FnMut() -> bool) -> Result<LowRank> {
    let roots = |signed: bool| -> Vec<f32> {
        let root = |p: &Pair<'_>| p.weight.abs().sqrt() * if signed && p.weight < 0.0 { -1.0 } else { 1.0 };
        pairs.iter().map(|p| root(p) as f32).collect()
    };
    let mut side = |of: fn(&LowRank) -> &Tensor, weights: &[f32]| -> Result<Tensor> {
        let tensors: Vec<Vec<f32>> = pairs.iter().map(|p| on_host(of(p.low))).collect::<Result<_>>()?;
        let first = of(pairs[0].low);
        let merged = tensor(tensors, weights, method, keep);
        Tensor::from_vec(merged, first.dims(), first.device())
    };
    let a = side(|l| &l.a, &roots(true))?;
    let b = side(|l| &l.b, &roots(false))?;
    Ok(LowRank { a, b, scale: 1.0 })
}

/// One tensor of several of the same shape.
fn tensor(mut all: Vec<Vec<f32>>, weights: &[f32], method: Method, keep: &mut dyn FnMut() -> bool) -> Vec<f32> {
    match method {
        Method::Ties { density, .. } | Method::MagnitudePrune { density } => {
            all.iter_mut().for_each(|t| keep_largest(t, density))
        }
        Method::DareLinear { density, .. } | Method::DareTies { density, .. } => {
            all.iter_mut().for_each(|t| drop_some(t, density, keep));
        }
        Method::Linear | Method::Cat | Method::Svd { .. } => {}
    }
    match method {
        Method::Ties { sign, .. } | Method::DareTies { sign, .. } => average_of_agreeing(&all, weights, sign),
        _ => weighted_sum(&all, weights),
    }
}

fn weighted_sum(all: &[Vec<f32>], weights: &[f32]) -> Vec<f32> {
    let n = all.first().map_or(0, Vec::len);
    (0..n).map(|i| all.iter().zip(weights).map(|(t, w)| t[i] * w).sum()).collect()
}

/// Zeros all but the `density` share of largest magnitude; of equals, the earlier stays.
fn keep_largest(t: &mut [f32], density: f64) {
    if density >= 1.0 {
        return;
    }
    let k = (density * t.len() as f64) as usize;
    let mut order: Vec<usize> = (0..t.len()).collect();
    order.sort_by(|a, b| t[*b].abs().total_cmp(&t[*a].abs()).then(a.cmp(b)));
    order[k.min(t.len())..].iter().for_each(|i| t[*i] = 0.0);
}

/// Keeps what is kept with probability `density`, over `density`: the mean stays what it was.
fn drop_some(t: &mut [f32], density: f64, keep: &mut dyn FnMut() -> bool) {
    if density >= 1.0 {
        return;
    }
    let share = density as f32;
    t.iter_mut().for_each(|x| *x = if keep() { *x / share } else { 0.0 });
}

/// The mean of the weighted numbers whose own sign is the elected one; signs are elected before weighting.
fn average_of_agreeing(all: &[Vec<f32>], weights: &[f32], method: MajoritySign) -> Vec<f32> {
    let n = all.first().map_or(0, Vec::len);
    let elect = |i: usize| -> f32 {
        let total: f32 = match method {
            MajoritySign::Total => all.iter().map(|t| t[i]).sum(),
            MajoritySign::Frequency => all.iter().map(|t| sign(t[i])).sum(),
        };
        if total >= 0.0 { 1.0 } else { -1.0 }
    };
    let mean = |i: usize| -> f32 {
        let elected = elect(i);
        let agree = all.iter().zip(weights).filter(|(t, _)| sign(t[i]) == elected);
        let (sum, count) = agree.fold((0.0, 0), |(sum, count), (t, w)| (sum + t[i] * w, count + 1));
        sum / count.max(1) as f32
    };
    (0..n).map(mean).collect()
}

/// -1, 0 or 1.
fn sign(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_stay_and_signs_are_elected_by_sum_or_by_count() {
        let mut t = vec![0.1, -3.0, 2.0, -2.0, 0.5];
        keep_largest(&mut t, 0.5); // int(2.5) = 2
        assert_eq!(t, [0.0, -3.0, 2.0, 0.0, 0.0]);
        let all = vec![vec![5.0, 1.0], vec![-1.0, 0.0], vec![-2.0, -1.0]];
        // sums 2 and 0: both positive
        assert_eq!(average_of_agreeing(&all, &[1.0, 1.0, 1.0], MajoritySign::Total), [5.0, 1.0]);
        // two of three are negative; in the second place one of each: positive
        assert_eq!(average_of_agreeing(&all, &[1.0, 1.0, 2.0], MajoritySign::Frequency), [-2.5, 1.0]);
    }

    #[test]
    fn dropping_keeps_the_share_and_the_mean_and_the_seed_decides() {
        let draw = |seed| {
            let mut t = vec![1.0f32; 40_000];
            drop_some(&mut t, 0.3, &mut draws(Method::DareLinear { density: 0.3, seed }));
            t
        };
        let t = draw(1);
        let kept = t.iter().filter(|x| **x != 0.0).count() as f64 / 40_000.0;
        let mean = t.iter().map(|x| f64::from(*x)).sum::<f64>() / 40_000.0;
        assert!((kept - 0.3).abs() < 0.01 && (mean - 1.0).abs() < 0.04, "{kept} {mean}");
        assert!(t == draw(1) && t != draw(2));
    }
}
