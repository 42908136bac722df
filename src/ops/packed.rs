//! Matrix products with a frozen weight that was laid out at load for this.
//!
//! A blocked GEMM packs the weight at every call, which costs as much as the product when there are few rows; a weight
//! read as it lies, a few columns of every row at a time, defeats the prefetcher. So the weight is kept in panels of
//! [`PANEL`] columns, each a contiguous `[k, PANEL]`: every kernel here, for one row or for thousands, forward or
//! backward, streams them from front to end.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{LINE, prefetch};

/// Columns of a panel: three vectors of 512 bits, six of 256.
const PANEL: usize = 48;
/// Depth of a panel that stays in L2 while all rows pass by.
const DEPTH: usize = 2048;
/// From this many rows on, threads share the rows; below, the columns.
const SPLIT_ROWS: usize = 64;
/// Weight rows that are asked of memory ahead of their use, so that reading them and computing overlap.
const AHEAD: usize = 32;
/// Multiply-adds that are worth a second thread.
const WORTH_A_THREAD: usize = 128 * 1024;

/// Numbers of a packed `[k, n]` matrix; the last panel is padded with zeros.
fn packed_len(k: usize, n: usize) -> usize {
    n.div_ceil(PANEL) * PANEL * k
}

/// Packs a matrix that `at(row, column)` reads.
pub(super) fn pack(k: usize, n: usize, at: impl Fn(usize, usize) -> f32 + Sync) -> Vec<f32> {
    let mut out = vec![0f32; packed_len(k, n)];
    out.par_chunks_mut((PANEL * k).max(1)).enumerate().for_each(|(panel, out)| {
        let columns = PANEL.min(n - panel * PANEL);
        for (row, out) in out.chunks_exact_mut(PANEL).enumerate() {
            for (c, o) in out[..columns].iter_mut().enumerate() {
                *o = at(row, panel * PANEL + c);
            }
        }
    });
    out
}

/// The matrix `[k, n]` of its panels.
pub(super) fn unpack(w: &[f32], k: usize, n: usize) -> Vec<f32> {
    let mut out = vec![0f32; k * n];
    out.par_chunks_mut(n.max(1)).enumerate().for_each(|(row, out)| {
        for (panel, out) in out.chunks_mut(PANEL).enumerate() {
            let from = panel * PANEL * k + row * PANEL;
            out.copy_from_slice(&w[from..from + out.len()]);
        }
    });
    out
}

/// `x [m, k] W + bias` -> `[m, n]`.
pub(super) fn product(x: &[f32], w: &[f32], bias: Option<&[f32]>, (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    let threads = rayon::current_num_threads().max(1);
    let panels = n.div_ceil(PANEL);
    let run = |x: &[f32], panels: Range<usize>, out: &mut [f32]| {
        Arch::new().dispatch(Forward { x, w, bias, k, n, panels, out });
    };
    let alone = threads == 1 || m * k * n < WORTH_A_THREAD;
    if alone || m >= SPLIT_ROWS {
        let mut out = vec![0f32; m * n];
        let rows = if alone { m } else { m.div_ceil(2 * threads).next_multiple_of(8) };
        if alone {
            run(x, 0..panels, &mut out);
        } else {
            out.par_chunks_mut(rows * n).zip(x.par_chunks(rows * k)).for_each(|(out, x)| run(x, 0..panels, out));
        }
        return out;
    }
    let per = panels.div_ceil(threads * 4).max(1);
    let starts: Vec<usize> = (0..panels).step_by(per).collect();
    let block = |&from: &usize| {
        let to = (from + per).min(panels);
        let mut out = vec![0f32; m * ((to * PANEL).min(n) - from * PANEL)];
        run(x, from..to, &mut out);
        out
    };
    let blocks: Vec<Vec<f32>> = starts.par_iter().map(block).collect();
    side_by_side(&blocks, m, n)
}

/// Column blocks of the same rows as one matrix.
fn side_by_side(blocks: &[Vec<f32>], m: usize, n: usize) -> Vec<f32> {
    if m == 1 {
        return blocks.concat();
    }
    let mut out = vec![0f32; m * n];
    let row = |(row, out): (usize, &mut [f32])| {
        let mut rest = out;
        for block in blocks {
            let width = block.len() / m;
            let (own, tail) = rest.split_at_mut(width);
            own.copy_from_slice(&block[row * width..(row + 1) * width]);
            rest = tail;
        }
    };
    if m * n < WORTH_A_THREAD {
        out.chunks_exact_mut(n).enumerate().for_each(row);
    } else {
        out.par_chunks_exact_mut(n).enumerate().for_each(row);
    }
    out
}

/// Columns of the given panels for all rows of `x`.
struct Forward<'a> {
    x: &'a [f32],
    w: &'a [f32],
    bias: Option<&'a [f32]>,
    k: usize,
    n: usize,
    panels: Range<usize>,
    /// `[rows, columns of the panels]`.
    out: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => self.run::<S, 8, 3>(simd),
            8 => self.run::<S, 4, 3>(simd),
            _ => self.run::<S, 4, 4>(simd),
        }
    }
}

impl Forward<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        let Self { x, w, bias, k, n, panels, out } = self;
        let first = panels.start * PANEL;
        let width = (panels.end * PANEL).min(n) - first;
        let step = V * S::F32_LANES;
        for panel in panels {
            let w = &w[panel * PANEL * k..(panel + 1) * PANEL * k];
            let mut from = 0;
            while from < k || from == 0 {
                let depth = DEPTH.min(k - from);
                let w = &w[from * PANEL..(from + depth) * PANEL];
                let mut column = 0;
                while column < PANEL && panel * PANEL + column < n {
                    let at = panel * PANEL + column;
                    let place = Place { at: at - first, columns: step.min(n - at), width };
                    let start = if from == 0 { bias.map(|b| &b[at..at + place.columns]) } else { None };
                    let tile = Tile { x: &x[from..], stride: k, w, column, depth, start, add: from > 0 };
                    tile.rows::<S, R, V>(simd, out, place);
                    column += step;
                }
                from += depth.max(1);
            }
        }
    }
}

/// Asks memory for a panel's row that will be read soon.
#[inline(always)]
fn prefetch_row(w: &[f32], row: usize) {
    for line in 0..PANEL / LINE {
        prefetch(w, row * PANEL + line * LINE);
    }
}

/// Where a tile's columns go.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    columns: usize,
    width: usize,
}

/// Some columns of a panel, to be computed for all rows.
struct Tile<'a> {
    /// From the first row's first element on.
    x: &'a [f32],
    stride: usize,
    w: &'a [f32],
    column: usize,
    depth: usize,
    /// The bias of the columns.
    start: Option<&'a [f32]>,
    /// Whether `out` holds the part of a shallower depth.
    add: bool,
}

impl Tile<'_> {
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const V: usize>(&self, simd: S, out: &mut [f32], place: Place) {
        let rows = out.len() / place.width;
        let mut row = 0;
        while row + R <= rows {
            self.one::<S, R, V>(simd, row, out, place);
            row += R;
        }
        if R > 4 && row + 4 <= rows {
            self.one::<S, 4, V>(simd, row, out, place);
            row += 4;
        }
        if row + 2 <= rows {
            self.one::<S, 2, V>(simd, row, out, place);
            row += 2;
        }
        while row < rows {
            self.one::<S, 1, V>(simd, row, out, place);
            row += 1;
        }
    }

    /// `R` rows by `V` vectors, accumulated in registers.
    #[inline(always)]
    fn one<S: Simd, const R: usize, const V: usize>(&self, simd: S, row: usize, out: &mut [f32], place: Place) {
        let lanes = S::F32_LANES;
        let x: [&[f32]; R] =
            std::array::from_fn(|r| &self.x[(row + r) * self.stride..(row + r) * self.stride + self.depth]);
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        let (wv, _) = S::as_simd_f32s(self.w);
        let per_row = PANEL / lanes;
        let skip = self.column / lanes;
        for (p, w) in wv.chunks_exact(per_row).enumerate().take(self.depth) {
            prefetch_row(self.w, p + AHEAD);
            let w = &w[skip..skip + V];
            let wv: [S::f32s; V] = std::array::from_fn(|v| w[v]);
            for r in 0..R {
                let xv = simd.splat_f32s(x[r][p]);
                for v in 0..V {
                    acc[r][v] = simd.mul_add_e_f32s(wv[v], xv, acc[r][v]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let from = (row + r) * place.width + place.at;
            let out = &mut out[from..from + place.columns];
            let acc: &[f32] = pulp::bytemuck::cast_slice(acc);
            match (self.start, self.add) {
                (Some(bias), _) => out.iter_mut().zip(acc).zip(bias).for_each(|((o, a), b)| *o = a + b),
                (None, true) => out.iter_mut().zip(acc).for_each(|(o, a)| *o += a),
                (None, false) => out.copy_from_slice(&acc[..place.columns]),
            }
        }
    }
}

/// `g [m, n] W^T` -> `[m, k]`: the gradient of the input of [`product`].
pub(super) fn product_t(g: &[f32], w: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    let mut out = vec![0f32; m * k];
    let run = |(g, out): (&[f32], &mut [f32])| Arch::new().dispatch(Backward { g, w, k, n, out });
    let threads = rayon::current_num_threads().max(1);
    if threads == 1 || m * k * n < WORTH_A_THREAD {
        g.chunks(PANEL * n).zip(out.chunks_mut(PANEL * k)).for_each(run);
    } else {
        let rows = m.div_ceil(threads).next_multiple_of(16).min(PANEL);
        g.par_chunks(rows * n).zip(out.par_chunks_mut(rows * k)).for_each(run);
    }
    out
}

/// At most [`PANEL`] rows.
struct Backward<'a> {
    g: &'a [f32],
    w: &'a [f32],
    k: usize,
    n: usize,
    out: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.out.len() / self.k.max(1);
        match (S::F32_LANES, rows.div_ceil(S::F32_LANES)) {
            (16, 3..) => self.run::<S, 8, 3>(simd),
            (16, 2) => self.run::<S, 8, 2>(simd),
            (16, _) => self.run::<S, 8, 1>(simd),
            _ => self.run::<S, 4, 3>(simd),
        }
    }
}

impl Backward<'_> {
    /// Panel by panel, `out^T [k, rows]` grows by the panel's rows times its columns of the gradient turned: the weight
    /// is read once and in order, and no vector is summed up across.
    #[inline(always)]
    fn run<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        let Self { g, w, k, n, out } = self;
        let rows = out.len() / k;
        let step = V * S::F32_LANES;
        let width = rows.next_multiple_of(step);
        let mut turned = vec![0f32; PANEL * width]; // [columns of the panel, rows]
        let mut sums = vec![0f32; k * width]; // [k, rows]
        for (panel, w) in w.chunks_exact(k * PANEL).enumerate() {
            let first = panel * PANEL;
            let columns = PANEL.min(n - first);
            for (row, g) in g.chunks_exact(n).enumerate() {
                for (c, v) in g[first..first + columns].iter().enumerate() {
                    turned[c * width + row] = *v;
                }
            }
            for at in (0..width).step_by(step) {
                let mut blocks = w.chunks_exact(R * PANEL);
                let mut outs = sums.chunks_exact_mut(R * width);
                for (i, (block, out)) in (&mut blocks).zip(&mut outs).enumerate() {
                    (0..R).for_each(|r| prefetch_row(w, (i + 2) * R + r));
                    fold::<S, R, V>(simd, block, &turned[at..], columns, &mut out[at..], width);
                }
                let rest = blocks.remainder().chunks_exact(PANEL);
                for (w, out) in rest.zip(outs.into_remainder().chunks_exact_mut(width)) {
                    fold::<S, 1, V>(simd, w, &turned[at..], columns, &mut out[at..], width);
                }
            }
        }
        for (p, sums) in sums.chunks_exact(width).enumerate() {
            for (row, v) in sums[..rows].iter().enumerate() {
                out[row * k + p] = *v;
            }
        }
    }
}

/// `out [R, V vectors] += w [R, columns] turned [columns, V vectors]`.
#[inline(always)]
fn fold<S: Simd, const R: usize, const V: usize>(
    simd: S,
    w: &[f32],
    turned: &[f32],
    columns: usize,
    out: &mut [f32],
    width: usize,
) {
    let lanes = S::F32_LANES;
    let w: [&[f32]; R] = std::array::from_fn(|r| &w[r * PANEL..r * PANEL + columns]);
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    for r in 0..R {
        let (row, _) = S::as_simd_f32s(&out[r * width..r * width + V * lanes]);
        acc[r].copy_from_slice(&row[..V]);
    }
    for c in 0..columns {
        let (g, _) = S::as_simd_f32s(&turned[c * width..c * width + V * lanes]);
        let gv: [S::f32s; V] = std::array::from_fn(|v| g[v]);
        for r in 0..R {
            let wv = simd.splat_f32s(w[r][c]);
            for v in 0..V {
                acc[r][v] = simd.mul_add_e_f32s(gv[v], wv, acc[r][v]);
            }
        }
    }
    for r in 0..R {
        let (row, _) = S::as_mut_simd_f32s(&mut out[r * width..r * width + V * lanes]);
        row.copy_from_slice(&acc[r]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2).wrapping_add(1);
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Both against sums in f64, for shapes on and off every border: rows, depth, columns.
        #[test]
        fn products_equal_plain_sums(m in 1usize..140, k in 1usize..200, n in 1usize..210, deep: bool, seed: u64) {
            let k = if deep { DEPTH + k } else { k };
            let m = if deep { m % 20 + 1 } else { m };
            let (x, w, g, b) = (numbers(m * k, seed), numbers(k * n, seed ^ 5), numbers(m * n, seed ^ 9), numbers(n, seed ^ 3));
            let packed = pack(k, n, |r, c| w[r * n + c]);
            prop_assert_eq!(&unpack(&packed, k, n), &w);
            let y = product(&x, &packed, Some(&b), (m, k, n));
            let bare = product(&x, &packed, None, (m, k, n));
            let d = product_t(&g, &packed, (m, k, n));
            let tolerance = 1e-5 * (k.max(n) as f64).sqrt();
            for i in 0..m {
                for j in 0..n {
                    let sum: f64 = (0..k).map(|p| f64::from(x[i * k + p]) * f64::from(w[p * n + j])).sum();
                    prop_assert!((f64::from(bare[i * n + j]) - sum).abs() < tolerance);
                    prop_assert!((f64::from(y[i * n + j]) - sum - f64::from(b[j])).abs() < tolerance);
                }
                for p in (0..k).step_by(if deep { 97 } else { 1 }) {
                    let sum: f64 = (0..n).map(|j| f64::from(g[i * n + j]) * f64::from(w[p * n + j])).sum();
                    prop_assert!((f64::from(d[i * k + p]) - sum).abs() < tolerance);
                }
            }
        }
    }
}
