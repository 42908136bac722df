//! The best approximation of a sum of low-rank updates by one of a given rank, in f64, without forming the matrix.
//!
//! `U = sum_i w_i A_i^T B_i = C^T Q`, with `Q` orthonormal rows that span those of all `B_i` (Gram-Schmidt) and `C` the rest;
//! `C = L P` in the same way, so `U = P^T L^T Q` with a core `L` as small as the ranks. Rotating the rows of `L` until they are
//! orthogonal (one-sided Jacobi; Hestenes 1958), `J L` with `J` orthogonal, gives the singular value decomposition: lengths of
//! the core's rows, their directions along `P`, and the rows of `J Q`. No rotation touches a row as wide as the model.

use candle_core::{Result, Tensor};

use super::{MergeError, Pair, on_host};
use crate::{
    delta::LowRank,
    ops::{dot, rotate},
};

type Rows = Vec<Vec<f64>>;

fn rows(t: &Tensor, factor: f64, out: &mut Rows) -> Result<()> {
    let width = t.dim(1)?;
    out.extend(on_host(t)?.chunks(width.max(1)).map(|r| r.iter().map(|x| f64::from(*x) * factor).collect::<Vec<_>>()));
    Ok(())
}

/// A with orthonormal rows, B with the singular values, scale 1, as PEFT writes it. Directions that are not there are not
/// made up: the rank may come out smaller, but at least 1. `stop` is asked all the while.
pub(super) fn best(
    pairs: &[Pair<'_>],
    rank: usize,
    stop: &dyn Fn() -> bool,
) -> std::result::Result<LowRank, MergeError> {
    let (mut a, mut b) = (Rows::new(), Rows::new());
    for pair in pairs {
        rows(&pair.low.a, pair.weight, &mut a)?;
        rows(&pair.low.b, 1.0, &mut b)?;
    }
    let (inputs, outputs) = (a.first().map_or(0, Vec::len), b.first().map_or(0, Vec::len));
    let (q, parts) = orthonormal(&b, stop)?;
    let mut c: Rows = vec![vec![0.0; inputs]; q.len()];
    for (a, along) in a.iter().zip(&parts) {
        c.iter_mut().zip(along).for_each(|(row, part)| add(row, *part, a));
    }
    let (p, mut core) = orthonormal(&c, stop)?;
    core.iter_mut().for_each(|row| row.resize(p.len(), 0.0));
    let mut turned: Rows = (0..q.len()).map(|i| (0..q.len()).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    if !rotate(&mut core, &mut turned, stop) {
        return Err(MergeError::Stopped);
    }
    let mut order: Vec<(f64, usize)> = core.iter().map(|r| dot(r, r).sqrt()).zip(0..).collect();
    order.sort_by(|x, y| y.0.total_cmp(&x.0));
    let largest = order.first().map_or(0.0, |o| o.0);
    order.truncate(rank.max(1));
    let there = order.iter().filter(|(n, _)| *n > 1e-12 * largest).count().max(1);
    order.truncate(there);
    let (mut low, mut high) = (Vec::new(), Vec::new());
    for (n, i) in &order {
        let unit = if *n > 0.0 { 1.0 / n } else { 0.0 };
        low.extend(along(&core[*i], &p, inputs).iter().map(|x| (x * unit) as f32));
        high.extend(along(&turned[*i], &q, outputs).iter().map(|x| (x * n) as f32));
    }
    let device = pairs[0].low.a.device();
    let k = order.len();
    if k == 0 {
        // all B are zero
        low.resize(inputs, 0.0);
        high.resize(outputs, 0.0);
    }
    let k = k.max(1);
    let (a, b) = (Tensor::from_vec(low, (k, inputs), device)?, Tensor::from_vec(high, (k, outputs), device)?);
    Ok(LowRank { a, b, scale: 1.0 })
}

/// Orthonormal rows that span these (none for rows of zeros), and the parts of each along them, shorter where the last are 0.
fn orthonormal(rows: &Rows, stop: &dyn Fn() -> bool) -> std::result::Result<(Rows, Rows), MergeError> {
    let (mut set, mut parts) = (Rows::new(), Rows::new());
    for row in rows {
        if stop() {
            return Err(MergeError::Stopped);
        }
        parts.push(split(row, &mut set));
    }
    Ok((set, parts))
}

fn add(row: &mut [f64], part: f64, other: &[f64]) {
    row.iter_mut().zip(other).for_each(|(x, y)| *x += part * y);
}

/// The row that has these parts along a set.
fn along(parts: &[f64], set: &Rows, width: usize) -> Vec<f64> {
    let mut row = vec![0.0; width];
    parts.iter().zip(set).for_each(|(part, direction)| add(&mut row, *part, direction));
    row
}

/// The parts of a row along an orthonormal set, which grows if the row leaves it.
fn split(row: &[f64], q: &mut Rows) -> Vec<f64> {
    let mut rest = row.to_vec();
    let mut along = vec![0.0; q.len()];
    for _ in 0..2 {
        for (part, d) in along.iter_mut().zip(q.iter()) {
            let more = dot(d, &rest);
            *part += more;
            rest.iter_mut().zip(d).for_each(|(r, d)| *r -= more * d);
        }
    }
    let (norm, whole) = (dot(&rest, &rest).sqrt(), dot(row, row).sqrt());
    if norm > 1e-12 * whole && q.len() < row.len() {
        rest.iter_mut().for_each(|r| *r /= norm);
        q.push(rest);
        along.push(norm);
    }
    along
}
