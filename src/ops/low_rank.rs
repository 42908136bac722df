//! Products with matrices of a few rows, the factors of low-rank updates, in one order for every row.
//!
//! A row's numbers are the same bits in any company, however many rows are computed together and however they are shared out over
//! threads. [`shrink`] adds up a product of a row of `x` and a row of a factor in [`LANES`] lanes, each from front to back, and
//! folds the lanes in halves; [`expand`] adds the rows of a factor to a row one after the other. Tiles of rows and ranks only
//! decide which of these sums are under way at a time. Vectors of any width, down to one number, come to the same where the
//! machine multiplies and adds in one step.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::{LINE, prefetch};

/// Lanes of a sum.
const LANES: usize = 16;

/// Rows of `x` that take some ranks before the next: they stay in the second level.
const BLOCK: usize = 32;

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

    /// Only these of its columns.
    pub(super) fn within(self, columns: Range<usize>) -> Self {
        let from = self.columns.start;
        self.narrowed(from + columns.start..from + columns.end)
    }

    /// How many columns.
    pub(super) fn width(&self) -> usize {
        self.columns.len()
    }

    /// Of one row.
    #[inline(always)]
    pub(super) fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..(i + 1) * self.stride][self.columns.clone()]
    }
}

/// `scale * x A^T` of rows of `x`, those from `first` on, into the columns `ranks` of `out` `[rows, stride]`; `a`
/// `[ranks.len(), columns of x]`. Memory is asked for `ahead`, what will be read behind `a`.
pub(super) fn shrink(
    (x, first): (Rows<'_>, usize),
    (a, ahead): (&[f32], &[f32]),
    scale: f32,
    (out, stride, ranks): (&mut [f32], usize, Range<usize>),
) {
    if !ranks.is_empty() {
        assert!(a.len() == ranks.len() * x.width() && ranks.end <= stride, "a factor of the rows' width");
        for (i, out) in out.chunks_mut(BLOCK * stride).enumerate() {
            let (x, ranks) = (x.clone(), ranks.clone());
            Arch::new().dispatch(Shrink { x, first: first + i * BLOCK, a, ahead, scale, out, stride, ranks });
        }
    }
}

struct Shrink<'a> {
    x: Rows<'a>,
    /// The row of `x` that the first of `out` is of.
    first: usize,
    a: &'a [f32],
    ahead: &'a [f32],
    scale: f32,
    out: &'a mut [f32],
    stride: usize,
    ranks: Range<usize>,
}

impl WithSimd for Shrink<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // as many sums as registers hold beside the factors; a row alone has more ranks under way
        match S::F32_LANES {
            16 => self.run::<S, 1, 4, 4, 8>(simd),
            8 => self.run::<S, 2, 2, 2, 4>(simd),
            4 => self.run::<S, 4, 2, 2, 4>(simd),
            _ => self.run::<S, LANES, 1, 1, 1>(simd),
        }
    }
}

impl Shrink<'_> {
    /// Vectors of `LANES / V` numbers; tiles of `R` rows by `C` ranks, or of one row by `W`.
    #[inline(always)]
    fn run<S: Simd, const V: usize, const R: usize, const C: usize, const W: usize>(mut self, simd: S) {
        let rows = self.out.len() / self.stride;
        let mut rank = 0;
        while rows < R && rank + W <= self.ranks.len() {
            // plain loops: an iterator's `for_each` is not inlined here and would lose the vector unit
            for row in 0..rows {
                self.tile::<S, V, 1, W>(simd, row, rank);
            }
            rank += W;
        }
        while rank + C <= self.ranks.len() {
            self.rows::<S, V, R, C>(simd, rank);
            rank += C;
        }
        while rank < self.ranks.len() {
            self.rows::<S, V, R, 1>(simd, rank);
            rank += 1;
        }
    }

    /// `C` ranks, of all rows.
    #[inline(always)]
    fn rows<S: Simd, const V: usize, const R: usize, const C: usize>(&mut self, simd: S, rank: usize) {
        let rows = self.out.len() / self.stride;
        let mut row = 0;
        while row + R <= rows {
            self.tile::<S, V, R, C>(simd, row, rank);
            row += R;
        }
        while row < rows {
            self.tile::<S, V, 1, C>(simd, row, rank);
            row += 1;
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const V: usize, const R: usize, const C: usize>(&mut self, simd: S, row: usize, rank: usize) {
        let k = self.x.width();
        let steps = k / LANES;
        let xs: [&[f32]; R] = std::array::from_fn(|r| self.x.row(self.first + row + r));
        let ws: [&[f32]; C] = std::array::from_fn(|c| &self.a[(rank + c) * k..(rank + c + 1) * k]);
        // the next ranks', or what comes behind
        let (soon, apart) = next((self.a, self.ahead), (rank + C, self.ranks.len()));
        let mut acc = [[[simd.splat_f32s(0.0); V]; C]; R];
        let (xv, wv) = (xs.map(|x| vectors::<S, V>(x, steps)), ws.map(|w| vectors::<S, V>(w, steps)));
        for i in 0..steps {
            if row == 0 {
                for c in 0..C {
                    prefetch::<true, _>(soon, c * apart + i * LINE);
                }
            }
            let (x, w) = (std::array::from_fn(|r| &xv[r][i]), std::array::from_fn(|c| &wv[c][i]));
            add::<S, V, R, C>(simd, &mut acc, x, w);
        }
        if k > steps * LANES {
            let (x, w) = (xs.map(|x| rest(x, steps)), ws.map(|w| rest(w, steps)));
            let (x, w) = (x.each_ref(), w.each_ref());
            add::<S, V, R, C>(
                simd,
                &mut acc,
                x.map(|x| &vectors::<S, V>(x, 1)[0]),
                w.map(|w| &vectors::<S, V>(w, 1)[0]),
            );
        }
        // out of the registers at once: sums that are picked one by one would be kept in memory from the beginning
        let mut lanes = [[[0f32; LANES]; C]; R];
        for (lanes, acc) in lanes.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
            S::as_mut_simd_f32s(lanes).0.copy_from_slice(acc);
        }
        for (r, lanes) in lanes.iter().enumerate() {
            let at = (row + r) * self.stride + self.ranks.start + rank;
            for (out, lanes) in self.out[at..at + C].iter_mut().zip(lanes) {
                *out = self.scale * folded(lanes);
            }
        }
    }
}

/// What is read behind the first `done` of so many ranks of a factor, and how far its rows lie apart: the factor's next ranks, or
/// `ahead`, of which as many ranks are expected.
#[inline(always)]
fn next<'a>((factor, ahead): (&'a [f32], &'a [f32]), (done, ranks): (usize, usize)) -> (&'a [f32], usize) {
    let of = if done < ranks { factor } else { ahead };
    let apart = of.len() / ranks;
    (of.get(done % ranks * apart..).unwrap_or_default(), apart)
}

/// The first `steps` times [`LANES`] numbers.
#[inline(always)]
fn vectors<S: Simd, const V: usize>(numbers: &[f32], steps: usize) -> &[[S::f32s; V]] {
    &S::as_simd_f32s(numbers).0.as_chunks::<V>().0[..steps]
}

/// The numbers behind them, and zeros.
#[inline(always)]
fn rest(numbers: &[f32], steps: usize) -> [f32; LANES] {
    let mut out = [0f32; LANES];
    let rest = &numbers[steps * LANES..];
    out[..rest.len()].copy_from_slice(rest);
    out
}

#[inline(always)]
fn add<S: Simd, const V: usize, const R: usize, const C: usize>(
    simd: S,
    acc: &mut [[[S::f32s; V]; C]; R],
    x: [&[S::f32s; V]; R],
    w: [&[S::f32s; V]; C],
) {
    for v in 0..V {
        let w: [S::f32s; C] = std::array::from_fn(|c| w[c][v]);
        for r in 0..R {
            let x = x[r][v];
            for c in 0..C {
                acc[r][c][v] = simd.mul_add_e_f32s(x, w[c], acc[r][c][v]);
            }
        }
    }
}

/// The sum of all lanes, halves upon halves.
#[inline(always)]
fn folded(lanes: &[f32; LANES]) -> f32 {
    let half: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let quarter: [f32; 4] = std::array::from_fn(|i| half[i] + half[i + 4]);
    (quarter[0] + quarter[2]) + (quarter[1] + quarter[3])
}

/// `out += low B` in the `columns` of rows of `out` `[rows, stride]`: `low` `[rows, width]`, of which the columns `ranks` are
/// taken; `b` `[ranks.len(), columns.len()]`. Memory is asked for `ahead`, what will be read behind `b`.
pub(super) fn expand(
    (low, width, ranks): (&[f32], usize, Range<usize>),
    (b, ahead): (&[f32], &[f32]),
    (out, stride, columns): (&mut [f32], usize, Range<usize>),
) {
    if !ranks.is_empty() && !columns.is_empty() {
        assert!(b.len() == ranks.len() * columns.len() && ranks.end <= width, "a factor of the columns' width");
        assert!(columns.end <= stride && low.len() / width >= out.len() / stride, "rows of both");
        Arch::new().dispatch(Expand { low, width, ranks, b, ahead, out, stride, columns });
    }
}

struct Expand<'a> {
    low: &'a [f32],
    width: usize,
    ranks: Range<usize>,
    b: &'a [f32],
    ahead: &'a [f32],
    out: &'a mut [f32],
    stride: usize,
    columns: Range<usize>,
}

impl WithSimd for Expand<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let rows = self.out.len() / self.stride;
        // sums of four rows stay in registers; fewer rows read the factor from front to back, some ranks at a time
        let tiled = rows / 4 * 4;
        match S::F32_LANES {
            16 => {
                self.tiles::<S, 4, 4>(simd, tiled);
                self.streams::<S, 8>(simd, tiled);
            }
            8 => {
                self.tiles::<S, 4, 2>(simd, tiled);
                self.streams::<S, 8>(simd, tiled);
            }
            _ => {
                self.tiles::<S, 4, 4>(simd, tiled);
                self.streams::<S, 4>(simd, tiled);
            }
        }
    }
}

impl Expand<'_> {
    /// The rows before `to`, `R` of them by `V` vectors of columns.
    #[inline(always)]
    fn tiles<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, to: usize) {
        let (n, lanes) = (self.columns.len(), S::F32_LANES);
        let mut column = 0;
        while column < n {
            let mut row = 0;
            let left = n - column;
            while row < to {
                match left / lanes {
                    0 => self.last::<R>(row, column),
                    full if full >= V => self.tile::<S, R, V>(simd, row, column),
                    _ => self.tile::<S, R, 1>(simd, row, column),
                }
                row += R;
            }
            column += match left / lanes {
                0 => left,
                full if full >= V => V * lanes,
                _ => lanes,
            };
        }
    }

    /// Rows of `out`, from a column on.
    #[inline(always)]
    fn outs<const R: usize>(&mut self, row: usize, column: usize, width: usize) -> [&mut [f32]; R] {
        let at = self.columns.start + column;
        let mut rows = self.out[row * self.stride..].chunks_exact_mut(self.stride);
        std::array::from_fn(|_| rows.next().map_or(&mut [][..], |row| &mut row[at..at + width]))
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, row: usize, column: usize) {
        let (n, width, ranks) = (self.columns.len(), V * S::F32_LANES, self.ranks.clone());
        let b = self.b;
        let low: [&[f32]; R] = std::array::from_fn(|r| &self.low[(row + r) * self.width..][ranks.clone()]);
        let outs = self.outs::<R>(row, column, width);
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        for (acc, out) in acc.iter_mut().zip(&outs) {
            acc.copy_from_slice(S::as_simd_f32s(out).0);
        }
        for (j, b) in b.chunks_exact(n).enumerate().take(ranks.len()) {
            if row == 0 {
                for line in 0..width.div_ceil(LINE) {
                    prefetch::<false, _>(b, column + width + line * LINE);
                }
            }
            let (b, _) = S::as_simd_f32s(&b[column..column + width]);
            let b: [S::f32s; V] = std::array::from_fn(|v| b[v]);
            for r in 0..R {
                let l = simd.splat_f32s(low[r][j]);
                for v in 0..V {
                    acc[r][v] = simd.mul_add_e_f32s(b[v], l, acc[r][v]);
                }
            }
        }
        for (out, acc) in outs.into_iter().zip(&acc) {
            S::as_mut_simd_f32s(out).0.copy_from_slice(acc);
        }
    }

    /// The columns behind the last vector.
    #[inline(always)]
    fn last<const R: usize>(&mut self, row: usize, column: usize) {
        let (b, low, n, ranks) = (self.b, self.low, self.columns.len(), self.ranks.clone());
        let width = self.width;
        for (r, out) in self.outs::<R>(row, column, n - column).into_iter().enumerate() {
            for (l, b) in low[(row + r) * width..][ranks.clone()].iter().zip(b.chunks_exact(n)) {
                for (out, b) in out.iter_mut().zip(&b[column..]) {
                    *out = b.mul_add(*l, *out);
                }
            }
        }
    }

    /// The rows from `first` on, one by one, `J` ranks at a time.
    #[inline(always)]
    fn streams<S: Simd, const J: usize>(&mut self, simd: S, first: usize) {
        for row in first..self.out.len() / self.stride {
            let mut rank = 0;
            while rank + J <= self.ranks.len() {
                self.stream::<S, J>(simd, row, rank);
                rank += J;
            }
            if J > 4 && rank + 4 <= self.ranks.len() {
                self.stream::<S, 4>(simd, row, rank);
                rank += 4;
            }
            while rank < self.ranks.len() {
                self.stream::<S, 1>(simd, row, rank);
                rank += 1;
            }
        }
    }

    #[inline(always)]
    fn stream<S: Simd, const J: usize>(&mut self, simd: S, row: usize, rank: usize) {
        let n = self.columns.len();
        let b = self.b;
        let (soon, apart) = next((b, self.ahead), (rank + J, self.ranks.len()));
        let bs: [&[f32]; J] = std::array::from_fn(|j| &b[(rank + j) * n..(rank + j + 1) * n]);
        let at = row * self.width + self.ranks.start + rank;
        let ls: [f32; J] = std::array::from_fn(|j| self.low[at + j]);
        let l = ls.map(|l| simd.splat_f32s(l));
        let [out] = self.outs::<1>(row, 0, n);
        let vectors = n / S::F32_LANES;
        let bv: [&[S::f32s]; J] = bs.map(|b| &S::as_simd_f32s(b).0[..vectors]);
        for (i, out) in S::as_mut_simd_f32s(out).0.iter_mut().enumerate() {
            if (i * S::F32_LANES).is_multiple_of(LINE) {
                for j in 0..J {
                    prefetch::<true, _>(soon, j * apart + i * S::F32_LANES);
                }
            }
            let mut sum = *out;
            for j in 0..J {
                sum = simd.mul_add_e_f32s(bv[j][i], l[j], sum);
            }
            *out = sum;
        }
        for (i, out) in out.iter_mut().enumerate().skip(vectors * S::F32_LANES) {
            for (l, b) in ls.iter().zip(&bs) {
                *out = b[i].mul_add(*l, *out);
            }
        }
    }
}

#[cfg(test)]
mod tests;
