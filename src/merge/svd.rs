//! The best approximation of a sum of low-rank updates by one of a given rank, in f64, without forming the matrix.
//!
//! `U = sum_i w_i A_i^T B_i = C^T Q`, with `Q` orthonormal rows that span those of all `B_i` (Gram-Schmidt) and `C` the rest.
//! Rotating the rows of `C` until they are orthogonal (one-sided Jacobi; Hestenes 1958), and those of `Q` alike, gives the
//! singular value decomposition: lengths of `C`'s rows, their directions, and `Q`'s rows.

use candle_core::{Result, Tensor};

use super::{Pair, on_host};
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
/// made up: the rank may come out smaller, but at least 1.
pub(super) fn best(pairs: &[Pair<'_>], rank: usize) -> Result<LowRank> {
    let (mut a, mut b) = (Rows::new(), Rows::new());
    for pair in pairs {
        rows(&pair.low.a, pair.weight, &mut a)?;
        rows(&pair.low.b, 1.0, &mut b)?;
    }
    let (inputs, outputs) = (a.first().map_or(0, Vec::len), b.first().map_or(0, Vec::len));
    let mut q: Rows = Vec::new();
    let mut c: Rows = Vec::new();
    for (a, b) in a.iter().zip(&b) {
        let along = split(b, &mut q);
        c.resize(q.len(), vec![0.0; inputs]);
        for (row, part) in c.iter_mut().zip(&along) {
            row.iter_mut().zip(a).for_each(|(c, a)| *c += part * a);
        }
    }
    rotate(&mut c, &mut q);
    let mut order: Vec<(f64, usize)> = c.iter().map(|r| dot(r, r).sqrt()).zip(0..).collect();
    order.sort_by(|x, y| y.0.total_cmp(&x.0));
    let largest = order.first().map_or(0.0, |o| o.0);
    order.truncate(rank.max(1));
    let there = order.iter().filter(|(n, _)| *n > 1e-12 * largest).count().max(1);
    order.truncate(there);
    let (mut low, mut high) = (Vec::new(), Vec::new());
    for (n, i) in &order {
        let unit = if *n > 0.0 { 1.0 / n } else { 0.0 };
        low.extend(c[*i].iter().map(|x| (x * unit) as f32));
        high.extend(q[*i].iter().map(|x| (x * n) as f32));
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
