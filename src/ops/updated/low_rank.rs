//! Products with matrices of a few rows: the factors of low-rank updates and their gradients.
//!
//! Such a product does two operations per number that it reads of the long side, so each number of it is read once for
//! four rows of the short one, and sums stay in registers.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use crate::ops::{each, par_rows};

/// Columns of the rows of a matrix.
#[derive(Debug, Clone)]
pub(super) struct Rows<'a> {
    data: &'a [f32],
    /// Numbers from one row to the next.
    stride: usize,
    columns: Range<usize>,
}

impl<'a> Rows<'a> {
    /// All columns of `[rows, width]`.
    pub(super) fn of(data: &'a [f32], width: usize) -> Self {
        Self { data, stride: width, columns: 0..width }
    }

    /// Only these columns.
    pub(super) fn narrowed(self, columns: Range<usize>) -> Self {
        Self { columns, ..self }
    }

    fn len(&self) -> usize {
        self.data.len() / self.stride.max(1)
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..(i + 1) * self.stride][self.columns.clone()]
    }
}

/// `out += low B`; `b` `[low.len(), out.len()]`. To be called inside [`vectorized`](crate::ops::vectorized).
#[inline(always)]
pub(super) fn add_product(low: &[f32], b: &[f32], out: &mut [f32]) {
    let n = out.len();
    let mut done = 0;
    // four ranks at a time: `out` is read and written once per four
    while done + 4 <= low.len() {
        let rows: [&[f32]; 4] = std::array::from_fn(|j| &b[(done + j) * n..(done + j + 1) * n]);
        let l: [f32; 4] = std::array::from_fn(|j| low[done + j]);
        for (i, o) in out.iter_mut().enumerate() {
            let v = rows[0][i].mul_add(l[0], *o);
            let v = rows[1][i].mul_add(l[1], v);
            let v = rows[2][i].mul_add(l[2], v);
            *o = rows[3][i].mul_add(l[3], v);
        }
        done += 4;
    }
    for j in done..low.len() {
        for (o, b) in out.iter_mut().zip(&b[j * n..(j + 1) * n]) {
            *o = b.mul_add(low[j], *o);
        }
    }
}

/// `scale * x A^T`, into the columns `ranks` of `out` `[rows, stride]`; `a` `[ranks.len(), columns of x]`.
pub(super) fn project(x: Rows<'_>, a: &[f32], scale: f32, (out, stride, ranks): (&mut [f32], usize, Range<usize>)) {
    if ranks.is_empty() {
        return;
    }
    par_rows(out, stride, a.len(), |first, out| {
        let (x, ranks) = (x.clone(), ranks.clone());
        Arch::new().dispatch(Project { x, first, a, scale, out, stride, ranks });
    });
}

struct Project<'a> {
    x: Rows<'a>,
    /// The row of `x` that the first of `out` is of.
    first: usize,
    a: &'a [f32],
    scale: f32,
    out: &'a mut [f32],
    stride: usize,
    ranks: Range<usize>,
}

impl WithSimd for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let rows = self.out.len() / self.stride;
        let mut row = 0;
        while row + 4 <= rows {
            self.ranks_of::<S, 4>(simd, row);
            row += 4;
        }
        while row < rows {
            self.ranks_of::<S, 1>(simd, row);
            row += 1;
        }
    }
}

impl Project<'_> {
    #[inline(always)]
    fn ranks_of<S: Simd, const R: usize>(&mut self, simd: S, row: usize) {
        let mut rank = 0;
        while rank + 4 <= self.ranks.len() {
            self.tile::<S, R, 4>(simd, row, rank);
            rank += 4;
        }
        while rank < self.ranks.len() {
            self.tile::<S, R, 1>(simd, row, rank);
            rank += 1;
        }
    }

    /// `R` rows of `x` times `C` of `a`.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const C: usize>(&mut self, simd: S, row: usize, rank: usize) {
        let k = self.x.columns.len();
        let xs: [&[f32]; R] = std::array::from_fn(|r| self.x.row(self.first + row + r));
        let ws: [&[f32]; C] = std::array::from_fn(|c| &self.a[(rank + c) * k..(rank + c + 1) * k]);
        let (xv, wv) = (xs.map(|x| S::as_simd_f32s(x)), ws.map(|w| S::as_simd_f32s(w)));
        let mut acc = [[simd.splat_f32s(0.0); C]; R];
        for i in 0..k / S::F32_LANES {
            let w: [S::f32s; C] = std::array::from_fn(|c| wv[c].0[i]);
            for r in 0..R {
                let x = xv[r].0[i];
                for c in 0..C {
                    acc[r][c] = simd.mul_add_e_f32s(x, w[c], acc[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let tail = xv[r].1.iter().zip(wv[c].1).map(|(x, w)| x * w).sum::<f32>();
                let at = (row + r) * self.stride + self.ranks.start + rank + c;
                self.out[at] = self.scale * (simd.reduce_sum_f32s(acc[r][c]) + tail);
            }
        }
    }
}

/// Columns that one thread sums at a time.
const STRIP: usize = 64;

/// `out [ranks, columns of x] = low^T x`: sums over rows of outer products. `low` is columns of `[rows, stride]`. Each sum is over
/// the rows in order, the same on any number of threads.
pub(super) fn outer_sums((low, stride, ranks): (&[f32], usize, Range<usize>), x: Rows<'_>, out: &mut [f32]) {
    let (n, rank) = (x.columns.len(), ranks.len());
    if n == 0 || rank == 0 {
        return;
    }
    let mut strips: Vec<(usize, Vec<f32>)> = (0..n).step_by(STRIP).map(|from| (from, Vec::new())).collect();
    let one = |(from, sums): &mut (usize, Vec<f32>)| {
        let width = STRIP.min(n - *from);
        *sums = vec![0f32; rank * width];
        let columns = x.columns.start + *from..x.columns.start + *from + width;
        let x = Rows { columns, ..x.clone() };
        Arch::new().dispatch(OuterSums { low, stride, ranks: ranks.clone(), x, out: sums });
    };
    if x.len() * n * rank < 32 * 1024 {
        strips.iter_mut().for_each(one);
    } else {
        each(strips.iter_mut().collect(), one);
    }
    for (from, sums) in &strips {
        let width = sums.len() / rank;
        let rows = out.chunks_exact_mut(n).zip(sums.chunks_exact(width));
        rows.for_each(|(out, sums)| out[*from..*from + width].copy_from_slice(sums));
    }
}

struct OuterSums<'a> {
    low: &'a [f32],
    stride: usize,
    ranks: Range<usize>,
    x: Rows<'a>,
    /// `[ranks, columns of x]`.
    out: &'a mut [f32],
}

impl WithSimd for OuterSums<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let mut rank = 0;
        while rank + 4 <= self.ranks.len() {
            self.columns::<S, 4>(simd, rank);
            rank += 4;
        }
        while rank < self.ranks.len() {
            self.columns::<S, 1>(simd, rank);
            rank += 1;
        }
    }
}

impl OuterSums<'_> {
    #[inline(always)]
    fn columns<S: Simd, const C: usize>(&mut self, simd: S, rank: usize) {
        let (n, lanes) = (self.x.columns.len(), S::F32_LANES);
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
            for row in 0..self.x.len() {
                let low = &self.low[row * self.stride + self.ranks.start + rank..];
                for (i, x) in self.x.row(row)[column..].iter().enumerate() {
                    for (c, low) in low.iter().enumerate().take(C) {
                        self.out[(rank + c) * n + column + i] += low * x;
                    }
                }
            }
        }
    }

    /// `C` ranks by `V` vectors of columns.
    #[inline(always)]
    fn tile<S: Simd, const C: usize, const V: usize>(&mut self, simd: S, rank: usize, column: usize) {
        let (n, lanes) = (self.x.columns.len(), S::F32_LANES);
        let mut acc = [[simd.splat_f32s(0.0); V]; C];
        let lows = self.low.chunks_exact(self.stride).enumerate();
        for (row, low) in lows {
            let low = &low[self.ranks.start + rank..self.ranks.start + rank + C];
            let (x, _) = S::as_simd_f32s(&self.x.row(row)[column..column + V * lanes]);
            let x: [S::f32s; V] = std::array::from_fn(|v| x[v]);
            for c in 0..C {
                let l = simd.splat_f32s(low[c]);
                for v in 0..V {
                    acc[c][v] = simd.mul_add_e_f32s(x[v], l, acc[c][v]);
                }
            }
        }
        for (c, acc) in acc.iter().enumerate() {
            let at = (rank + c) * n + column;
            let (out, _) = S::as_mut_simd_f32s(&mut self.out[at..at + V * lanes]);
            out.copy_from_slice(acc);
        }
    }
}
