//! Gradients of the factors of low-rank updates: products of two sides with rows.
//!
//! Such a product does two operations per number that it reads of the long side, so each number of it is read once for
//! four rows of the short one, and sums stay in registers. Each delta has runs of rows of its own and ranks of its own; what a
//! sum comes to does not depend on what lies beside it.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::shares::Run;
use crate::ops::{cut, low_rank::Rows, part_of, share_out};

/// Columns whose sums are computed at a time, so that those of all rows stay near.
const STRIP: usize = 64;

/// Sums over a delta's rows of outer products: `low^T x`, `[ranks, columns of x]`.
#[derive(Debug, Clone)]
pub(super) struct OuterSum<'a> {
    /// The delta's rows.
    pub(super) runs: &'a [Run],
    /// The small sides of all rows; those of the runs are `[rows, stride]`.
    pub(super) low: &'a [f32],
    pub(super) stride: usize,
    pub(super) ranks: Range<usize>,
    pub(super) x: Rows<'a>,
    /// Where in the output they go.
    pub(super) out: Range<usize>,
}

impl OuterSum<'_> {
    /// Work on one column.
    fn per_column(&self) -> usize {
        self.ranks.len() * self.runs.iter().map(|run| run.rows.len()).sum::<usize>()
    }
}

/// All of these sums, each over its rows in order: the same on any number of threads. What is not summed stays as it is.
pub(super) fn outer_sums(all: &[OuterSum<'_>], out: &mut [f32]) {
    let work = all.iter().map(|sum| sum.per_column() * sum.x.width()).sum();
    let part = part_of(work);
    let mut parts: Vec<(&OuterSum<'_>, Range<usize>)> = Vec::new(); // and the columns of it
    for sum in all.iter().filter(|sum| sum.per_column() > 0) {
        let (n, width) = (sum.x.width(), part.div_ceil(sum.per_column()).next_multiple_of(STRIP));
        parts.extend((0..n).step_by(width).map(|from| (sum, from..(from + width).min(n))));
    }
    let numbers = |(sum, columns): &(&OuterSum<'_>, Range<usize>)| sum.ranks.len() * columns.len();
    let mut sums = vec![0f32; parts.iter().map(numbers).sum()];
    let mut rest = sums.as_mut_slice();
    let items = parts.iter().map(|part| (part, cut(&mut rest, numbers(part)))).collect();
    share_out(items, work, |((sum, columns), sums): (&(&OuterSum<'_>, Range<usize>), &mut [f32])| {
        for from in columns.clone().step_by(STRIP) {
            let to = (from + STRIP).min(columns.end);
            let x = sum.x.clone().within(from..to);
            let out = &mut sums[from - columns.start..];
            Arch::new().dispatch(Strip { sum, x, out, width: columns.len() });
        }
    });
    let mut rest = sums.as_slice();
    for part in &parts {
        let (sum, columns) = part;
        let (own, more) = rest.split_at(numbers(part));
        rest = more;
        let rows = out[sum.out.clone()].chunks_exact_mut(sum.x.width()).zip(own.chunks_exact(columns.len()));
        rows.for_each(|(out, own)| out[columns.clone()].copy_from_slice(own));
    }
}

/// A strip of columns of a sum.
struct Strip<'a> {
    sum: &'a OuterSum<'a>,
    /// Of these columns only.
    x: Rows<'a>,
    /// `[ranks, columns of x]`, each rank's `width` after the one before.
    out: &'a mut [f32],
    width: usize,
}

impl WithSimd for Strip<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (mut rank, ranks) = (0, self.sum.ranks.len());
        while rank + 4 <= ranks {
            self.columns::<S, 4>(simd, rank);
            rank += 4;
        }
        while rank < ranks {
            self.columns::<S, 1>(simd, rank);
            rank += 1;
        }
    }
}

impl Strip<'_> {
    #[inline(always)]
    fn columns<S: Simd, const C: usize>(&mut self, simd: S, rank: usize) {
        let (n, lanes) = (self.x.width(), S::F32_LANES);
        let mut column = 0;
        while column + 4 * lanes <= n {
            self.tile::<S, C, 4>(simd, rank, column);
            column += 4 * lanes;
        }
        while column + lanes <= n {
            self.tile::<S, C, 1>(simd, rank, column);
            column += lanes;
        }
        if column < n {
            let (sum, ranks) = (self.sum, self.sum.ranks.start + rank..self.sum.ranks.start + rank + C);
            for run in sum.runs {
                let lows = sum.low[run.low..].chunks_exact(sum.stride);
                for (row, low) in run.rows.clone().zip(lows) {
                    for (i, x) in self.x.row(row)[column..].iter().enumerate() {
                        for (c, low) in low[ranks.clone()].iter().enumerate() {
                            self.out[(rank + c) * self.width + column + i] += low * x;
                        }
                    }
                }
            }
        }
    }

    /// `C` ranks by `V` vectors of columns.
    #[inline(always)]
    fn tile<S: Simd, const C: usize, const V: usize>(&mut self, simd: S, rank: usize, column: usize) {
        let lanes = S::F32_LANES;
        let (sum, from) = (self.sum, self.sum.ranks.start + rank);
        let mut acc = [[simd.splat_f32s(0.0); V]; C];
        for run in sum.runs {
            let lows = sum.low[run.low..].chunks_exact(sum.stride);
            for (row, low) in run.rows.clone().zip(lows) {
                let low = &low[from..from + C];
                let (x, _) = S::as_simd_f32s(&self.x.row(row)[column..column + V * lanes]);
                let x: [S::f32s; V] = std::array::from_fn(|v| x[v]);
                for c in 0..C {
                    let l = simd.splat_f32s(low[c]);
                    for v in 0..V {
                        acc[c][v] = simd.mul_add_e_f32s(x[v], l, acc[c][v]);
                    }
                }
            }
        }
        for (c, acc) in acc.iter().enumerate() {
            let at = (rank + c) * self.width + column;
            let (out, _) = S::as_mut_simd_f32s(&mut self.out[at..at + V * lanes]);
            out.copy_from_slice(acc);
        }
    }
}
