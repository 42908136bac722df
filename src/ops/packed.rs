//! Matrix products with a frozen weight that was laid out at load for this.
//!
//! A blocked GEMM packs the weight at every call, which costs as much as the product when there are few rows; a weight
//! read as it lies, a few columns of every row at a time, defeats the prefetcher. So the weight is kept in panels of
//! [`PANEL`] columns, each a contiguous `[k, PANEL]`: every kernel here, for one row or for thousands, forward or
//! backward, streams them from front to end.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    LINE,
    memory::huge_pages,
    prefetch,
    team::{each, threads},
};

/// Columns of a panel: three vectors of 512 bits, six of 256.
const PANEL: usize = 48;
/// Depth of a block that stays in L1 while some tens of rows pass by, so that the first level's few outstanding misses
/// are free for memory.
const DEPTH: usize = 96;
/// Depth of a block that stays in L2 while more rows pass by: memory no longer matters, reloading sums does.
const DEPTH_MANY: usize = 1024;
/// Rows that are many.
const MANY_ROWS: usize = 64;
/// From this many rows on, threads share the rows; below, the columns.
const SPLIT_ROWS: usize = 64;
/// Cache lines of a panel's row.
const LINES: usize = PANEL / LINE;
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
    huge_pages(&out);
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
    let threads = threads();
    let panels = n.div_ceil(PANEL);
    let mut data = vec![0f32; m * n];
    let run = |x: &[f32], panels: Range<usize>, out: Vec<&mut [f32]>| {
        Arch::new().dispatch(Forward { x, w, bias, k, n, panels, out });
    };
    if threads == 1 || m * k * n < WORTH_A_THREAD {
        run(x, 0..panels, data.chunks_mut(n.max(1)).collect());
    } else if m >= SPLIT_ROWS {
        let rows = m.div_ceil(2 * threads).next_multiple_of(8);
        let parts = data.chunks_mut(rows * n).zip(x.chunks(rows * k)).collect();
        each(parts, |(out, x): (&mut [f32], &[f32])| run(x, 0..panels, out.chunks_mut(n).collect()));
    } else {
        let per = panels.div_ceil(threads * 4).max(1);
        let mut parts: Vec<Vec<&mut [f32]>> = (0..panels.div_ceil(per)).map(|_| Vec::with_capacity(m)).collect();
        for row in data.chunks_mut(n) {
            parts.iter_mut().zip(row.chunks_mut(per * PANEL)).for_each(|(part, columns)| part.push(columns));
        }
        let part = |(i, out)| run(x, i * per..panels.min((i + 1) * per), out);
        each(parts.into_iter().enumerate().collect(), part);
    }
    data
}

/// Columns of the packed `[k, n]` matrix as rows: `[ids, k]`. The ids must be below `n`.
pub(super) fn columns(w: &[f32], k: usize, ids: &[u32]) -> Vec<f32> {
    let mut out = vec![0f32; ids.len() * k];
    let one = |(id, out): (&u32, &mut [f32])| {
        let (panel, column) = (*id as usize / PANEL, *id as usize % PANEL);
        let panel = &w[panel * PANEL * k..(panel + 1) * PANEL * k];
        out.iter_mut().zip(panel.chunks_exact(PANEL)).for_each(|(o, row)| *o = row[column]);
    };
    if out.len() < WORTH_A_THREAD {
        ids.iter().zip(out.chunks_mut(k.max(1))).for_each(one);
    } else {
        each(ids.iter().zip(out.chunks_mut(k.max(1))).collect(), one);
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
    /// The panels' columns of each row, zeros before.
    out: Vec<&'a mut [f32]>,
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
    fn run<S: Simd, const R: usize, const V: usize>(mut self, simd: S) {
        let (k, n, first) = (self.k, self.n, self.panels.start * PANEL);
        let step = V * S::F32_LANES;
        let most = if self.out.len() < MANY_ROWS { DEPTH } else { DEPTH_MANY };
        for panel in self.panels.clone() {
            let mut from = 0;
            while from < k || from == 0 {
                let depth = most.min(k - from);
                let block = (panel * k + from) * PANEL;
                let w = &self.w[block..block + depth * PANEL];
                let ahead = &self.w[block + depth * PANEL..];
                let mut column = 0;
                while column < PANEL && panel * PANEL + column < n {
                    let at = panel * PANEL + column;
                    let place = Place { at: at - first, columns: step.min(n - at) };
                    let start = if from == 0 { self.bias.map(|b| &b[at..at + place.columns]) } else { None };
                    let tile = Tile { x: &self.x[from..], stride: k, w, ahead, column, depth, start };
                    tile.rows::<S, R, V>(simd, &mut self.out, place);
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
    for line in 0..LINES {
        prefetch(w, row * PANEL + line * LINE);
    }
}

/// Where a tile's columns go.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    columns: usize,
}

/// Some columns of a block, to be computed for all rows.
struct Tile<'a> {
    /// From the first row's first element on.
    x: &'a [f32],
    stride: usize,
    w: &'a [f32],
    /// What lies behind the block: the next one, to be brought while this one is multiplied.
    ahead: &'a [f32],
    column: usize,
    depth: usize,
    /// The bias of the columns, where the block is a panel's first.
    start: Option<&'a [f32]>,
}

impl Tile<'_> {
    /// All rows. One tile asks for the stream of rows ahead of its own; several share the asking for the next block, so
    /// that memory is read all the time and not only while the first tile passes.
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const V: usize>(&self, simd: S, out: &mut [&mut [f32]], place: Place) {
        let rows = out.len();
        let tiles = rows / R;
        let mut row = 0;
        while row + R <= rows {
            match (tiles, row / R) {
                (1, _) => self.one::<S, R, V, LINES>(simd, row, out, place),
                (2, _) => self.one::<S, R, V, 2>(simd, row, out, place),
                (_, 0..LINES) => self.one::<S, R, V, 1>(simd, row, out, place),
                _ => self.one::<S, R, V, 0>(simd, row, out, place),
            }
            row += R;
        }
        let asked = tiles > 0;
        if R > 4 && row + 4 <= rows {
            self.rest::<S, 4, V>(simd, row, out, place, asked);
            row += 4;
        }
        if row + 2 <= rows {
            self.rest::<S, 2, V>(simd, row, out, place, asked || row > 0);
            row += 2;
        }
        while row < rows {
            self.rest::<S, 1, V>(simd, row, out, place, asked || row > 0);
            row += 1;
        }
    }

    /// A tile of fewer rows, which asks memory only where none did before it.
    #[inline(always)]
    fn rest<S: Simd, const R: usize, const V: usize>(
        &self,
        simd: S,
        row: usize,
        out: &mut [&mut [f32]],
        place: Place,
        asked: bool,
    ) {
        if asked {
            self.one::<S, R, V, 0>(simd, row, out, place);
        } else {
            self.one::<S, R, V, LINES>(simd, row, out, place);
        }
    }

    /// `R` rows by `V` vectors, accumulated in registers, asking for `P` lines at every row of the block.
    #[inline(always)]
    fn one<S: Simd, const R: usize, const V: usize, const P: usize>(
        &self,
        simd: S,
        row: usize,
        out: &mut [&mut [f32]],
        place: Place,
    ) {
        let lanes = S::F32_LANES;
        let x: [&[f32]; R] =
            std::array::from_fn(|r| &self.x[(row + r) * self.stride..(row + r) * self.stride + self.depth]);
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        let (wv, _) = S::as_simd_f32s(self.w);
        let per_row = PANEL / lanes;
        let skip = self.column / lanes;
        let lines = row / R * self.depth * P;
        for (p, w) in wv.chunks_exact(per_row).enumerate().take(self.depth) {
            if P == LINES {
                prefetch_row(self.w, p + AHEAD);
            } else {
                (0..P).for_each(|line| prefetch(self.ahead, (lines + p * P + line) * LINE));
            }
            let w = &w[skip..skip + V];
            let wv: [S::f32s; V] = std::array::from_fn(|v| w[v]);
            for r in 0..R {
                let xv = simd.splat_f32s(x[r][p]);
                for v in 0..V {
                    acc[r][v] = simd.mul_add_e_f32s(wv[v], xv, acc[r][v]);
                }
            }
        }
        for (acc, out) in acc.iter().zip(&mut out[row..row + R]) {
            let out = &mut out[place.at..place.at + place.columns];
            let acc: &[f32] = pulp::bytemuck::cast_slice(acc);
            match self.start {
                Some(bias) => out.iter_mut().zip(acc).zip(bias).for_each(|((o, a), b)| *o = a + b),
                None => out.iter_mut().zip(acc).for_each(|(o, a)| *o += a),
            }
        }
    }
}

/// `g [m, n] W^T` -> `[m, k]`: the gradient of the input of [`product`].
pub(super) fn product_t(g: &[f32], w: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    let mut out = vec![0f32; m * k];
    let run = |(g, out): (&[f32], &mut [f32])| Arch::new().dispatch(Backward { g, w, k, n, out });
    let threads = threads();
    if threads == 1 || m * k * n < WORTH_A_THREAD {
        g.chunks(PANEL * n).zip(out.chunks_mut(PANEL * k)).for_each(run);
    } else {
        let rows = m.div_ceil(threads).next_multiple_of(16).min(PANEL);
        each(g.chunks(rows * n).zip(out.chunks_mut(rows * k)).collect(), run);
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
            let k = if deep { DEPTH_MANY + k } else { k };
            let m = if deep { m % 4 * 20 + 1 } else { m };
            let (x, w, g, b) = (numbers(m * k, seed), numbers(k * n, seed ^ 5), numbers(m * n, seed ^ 9), numbers(n, seed ^ 3));
            let packed = pack(k, n, |r, c| w[r * n + c]);
            prop_assert_eq!(&unpack(&packed, k, n), &w);
            let y = product(&x, &packed, Some(&b), (m, k, n));
            let bare = product(&x, &packed, None, (m, k, n));
            let d = product_t(&g, &packed, (m, k, n));
            let ids: Vec<u32> = (0..m as u32).map(|i| (i * 31 + 7) % n as u32).collect();
            for (id, row) in ids.iter().zip(columns(&packed, k, &ids).chunks(k)) {
                prop_assert!(row.iter().enumerate().all(|(p, v)| *v == w[p * n + *id as usize]));
            }
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
