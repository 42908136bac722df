//! Matrix products with a frozen weight that was laid out at load for this.
//!
//! A blocked GEMM packs the weight at every call, which costs as much as the product when there are few rows; a weight
//! read as it lies, a few columns of every row at a time, defeats the prefetcher. So the weight is kept in panels of
//! [`PANEL`] columns, each a contiguous `[k, PANEL]`: every kernel here, for one row or for thousands, forward or
//! backward, streams them from front to end. Where a panel is kept in fewer bits ([`Quantized`]), its blocks are expanded
//! one by one into the first level, and the same kernels go on from there.

use std::{borrow::Cow, mem::MaybeUninit, ops::Range};

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    LINE,
    memory::huge_pages,
    prefetch,
    quantized::Quantized,
    team::{each, threads},
};

/// Columns of a panel: three vectors of 512 bits, six of 256.
pub(super) const PANEL: usize = 48;
/// Depth of a block, which stays in L1 with the same columns of some tens of rows while they are multiplied, so that the
/// first level's few outstanding misses are free for memory.
const DEPTH: usize = 96;
/// Numbers of a whole block.
const BLOCK: usize = DEPTH * PANEL;
/// From this many rows on, threads share the rows; below, the columns.
const SPLIT_ROWS: usize = 64;
/// Cache lines of a panel's row.
const LINES: usize = PANEL / LINE;
/// Weight rows that are asked of memory ahead of their use, so that reading them and computing overlap.
const AHEAD: usize = 32;
/// Weight rows that are multiplied without a check between them.
const STEP: usize = 8;
/// Multiply-adds that are worth a second thread.
const WORTH_A_THREAD: usize = 128 * 1024;

/// Numbers of a packed `[k, n]` matrix; the last panel is padded with zeros.
fn packed_len(k: usize, n: usize) -> usize {
    n.div_ceil(PANEL) * PANEL * k
}

/// A packed matrix, read a block at a time.
pub(super) trait Panels: Copy + Sync {
    /// Whether a block lies in memory as it is multiplied, so that memory is to be asked for later ones.
    const AS_THEY_LIE: bool;

    /// Rows of a panel, `[depth, PANEL]`, and what lies behind them; `k` rows are the whole panel. `scratch` has room for a
    /// block; `depth` is at most [`DEPTH`] and `from` a multiple of it.
    fn block<'a>(
        &'a self,
        k: usize,
        panel: usize,
        rows: Range<usize>,
        scratch: &'a mut [f32],
    ) -> (&'a [f32], &'a [f32]);
}

impl Panels for &[f32] {
    const AS_THEY_LIE: bool = true;

    #[inline(always)]
    fn block<'a>(&'a self, k: usize, panel: usize, rows: Range<usize>, _: &'a mut [f32]) -> (&'a [f32], &'a [f32]) {
        self[(panel * k + rows.start) * PANEL..].split_at(rows.len() * PANEL)
    }
}

impl Panels for &Quantized {
    const AS_THEY_LIE: bool = false;

    #[inline(always)]
    fn block<'a>(
        &'a self,
        _: usize,
        panel: usize,
        rows: Range<usize>,
        scratch: &'a mut [f32],
    ) -> (&'a [f32], &'a [f32]) {
        let out = &mut scratch[..rows.len() * PANEL];
        self.expand(panel, rows, out);
        (out, &[])
    }
}

/// Room for a block that is expanded.
fn scratch<W: Panels>() -> Vec<f32> {
    vec![0f32; if W::AS_THEY_LIE { 0 } else { BLOCK }]
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
#[allow(unsafe_code, reason = "an output is not filled with zeros before it is written")]
pub(super) fn product<W: Panels>(x: &[f32], w: W, bias: Option<&[f32]>, (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    let threads = threads();
    let panels = n.div_ceil(PANEL);
    let mut data = Vec::with_capacity(m * n);
    let all = &mut data.spare_capacity_mut()[..m * n];
    let run = |x: &[f32], panels: Range<usize>, out: Vec<&mut [MaybeUninit<f32>]>| {
        Arch::new().dispatch(Forward { x, w, bias, k, n, panels, out });
    };
    if threads == 1 || m * k * n < WORTH_A_THREAD {
        run(&blocked(x, k), 0..panels, all.chunks_mut(n.max(1)).collect());
    } else if m >= SPLIT_ROWS {
        let rows = m.div_ceil(2 * threads).next_multiple_of(8);
        let parts = all.chunks_mut(rows * n).zip(x.chunks(rows * k)).collect();
        each(parts, |(out, x): (&mut [_], &[f32])| run(&blocked(x, k), 0..panels, out.chunks_mut(n).collect()));
    } else {
        // a part's first blocks are not asked for ahead
        let per = panels.div_ceil(threads * 8).max(2);
        let mut parts: Vec<Vec<&mut [_]>> = (0..panels.div_ceil(per)).map(|_| Vec::with_capacity(m)).collect();
        for row in all.chunks_mut(n) {
            parts.iter_mut().zip(row.chunks_mut(per * PANEL)).for_each(|(part, columns)| part.push(columns));
        }
        let x = blocked(x, k);
        let part = |(i, out)| run(&x, i * per..panels.min((i + 1) * per), out);
        each(parts.into_iter().enumerate().collect(), part);
    }
    // SAFETY: the panels of a product cover all columns and `Forward` writes each of theirs in every row it is given
    unsafe { data.set_len(m * n) };
    data
}

/// `x [m, k]` as `[blocks of DEPTH columns, m, DEPTH]`, the last block padded with zeros: rows that lie a power of two apart
/// would fall on the same few lines of the cache, and rows a constant apart need one register.
fn blocked(x: &[f32], k: usize) -> Cow<'_, [f32]> {
    let m = x.len() / k.max(1);
    if m < 2 && k.is_multiple_of(DEPTH) {
        return Cow::Borrowed(x);
    }
    let mut out = Vec::with_capacity(m * k.next_multiple_of(DEPTH));
    for from in (0..k).step_by(DEPTH) {
        let to = k.min(from + DEPTH);
        for row in x.chunks_exact(k) {
            out.extend_from_slice(&row[from..to]);
            out.resize(out.len() + DEPTH - (to - from), 0.0);
        }
    }
    Cow::Owned(out)
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
struct Forward<'a, W> {
    /// As [`blocked`] lays it.
    x: &'a [f32],
    w: W,
    bias: Option<&'a [f32]>,
    k: usize,
    n: usize,
    panels: Range<usize>,
    /// The panels' columns of each row; all of them are written.
    out: Vec<&'a mut [MaybeUninit<f32>]>,
}

impl<W: Panels> WithSimd for Forward<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (S::F32_LANES, self.out.len()) {
            (16, _) => self.run::<S, 8, 3>(simd),
            // 12 sums, 2 weights and a number of x: one more and the compiler keeps sums on the stack, at half the speed
            (8, 4..) => self.run::<S, 6, 2>(simd),
            (8, _) => self.run::<S, 4, 3>(simd),
            _ => self.run::<S, 4, 4>(simd),
        }
    }
}

impl<W: Panels> Forward<'_, W> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const V: usize>(mut self, simd: S) {
        let (k, n, rows) = (self.k, self.n, self.out.len());
        let (mut sums, mut scratch) = (vec![0f32; rows * PANEL], scratch::<W>());
        for (i, panel) in self.panels.clone().enumerate() {
            for from in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - from);
                let (w, ahead) = self.w.block(k, panel, from..from + depth, &mut scratch);
                let x = self.x[from * rows..(from + DEPTH) * rows].as_chunks().0;
                // all tiles share a block's lines; two of them ask twice at every row of the block
                let (tiles, strips) = (rows / R, PANEL / (V * S::F32_LANES));
                let requests = if tiles * strips == 2 { 4 } else { tiles * strips };
                let pace = (LINES * 256).div_ceil(requests.max(LINES));
                for strip in 0..strips {
                    // what one tile asks for ahead of itself, later strips find in the first level
                    let ask = W::AS_THEY_LIE && (tiles > 1 || strip == 0);
                    let column = strip * V * S::F32_LANES;
                    let tile = Tile { x, w, ahead, ask, pace, strip, strips, column, depth, first: from == 0 };
                    tile.rows::<S, R, V>(simd, &mut sums);
                }
            }
            let (at, columns) = (i * PANEL, PANEL.min(n - panel * PANEL));
            let bias = self.bias.map(|b| &b[panel * PANEL..][..columns]);
            for (out, sums) in self.out.iter_mut().zip(sums.chunks_exact(PANEL)) {
                let out = out[at..at + columns].iter_mut().zip(sums);
                match bias {
                    Some(bias) => out.zip(bias).for_each(|((o, s), b)| _ = o.write(s + b)),
                    None => out.for_each(|(o, s)| _ = o.write(*s)),
                }
            }
        }
    }
}

/// Asks memory for a panel's row that will be read soon.
#[inline(always)]
fn prefetch_row(w: &[f32], row: usize) {
    for line in 0..LINES {
        prefetch::<false, _>(w, row * PANEL + line * LINE);
    }
}

/// Some columns of a block, to be computed for all rows.
struct Tile<'a> {
    /// The block's columns of all rows; those behind `depth` are not read.
    x: &'a [[f32; DEPTH]],
    w: &'a [f32],
    /// What lies behind the block: the one after the next is brought to the second level while this one is multiplied,
    /// evenly over its tiles.
    ahead: &'a [f32],
    /// Whether memory is asked at all.
    ask: bool,
    /// Lines that each request moves on by, in 256ths.
    pace: usize,
    /// Which of the panel's strips of `V` vectors these are, of how many, and their first column.
    strip: usize,
    strips: usize,
    column: usize,
    depth: usize,
    /// Whether the block is its panel's first: the sums begin with it.
    first: bool,
}

impl Tile<'_> {
    /// All rows, into `sums [rows, PANEL]`. One tile asks for the stream of rows ahead of its own; several share the
    /// asking for a later block evenly: a core has few misses under way at a time, and computes only while it need not
    /// wait for one of them to be free.
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const V: usize>(&self, simd: S, sums: &mut [f32]) {
        let rows = sums.len() / PANEL;
        let tiles = rows / R;
        let mut row = 0;
        while row + R <= rows {
            match tiles {
                _ if !self.ask => self.one::<S, R, V, 0>(simd, row, sums),
                1 => self.one::<S, R, V, LINES>(simd, row, sums),
                2 if self.strips == 1 => self.one::<S, R, V, 2>(simd, row, sums),
                _ => self.one::<S, R, V, 1>(simd, row, sums),
            }
            row += R;
        }
        let asked = tiles > 0 || !self.ask;
        if R > 4 && row + 4 <= rows {
            self.rest::<S, 4, V>(simd, row, sums, asked);
            row += 4;
        }
        if row + 2 <= rows {
            self.rest::<S, 2, V>(simd, row, sums, asked || row > 0);
            row += 2;
        }
        while row < rows {
            self.rest::<S, 1, V>(simd, row, sums, asked || row > 0);
            row += 1;
        }
    }

    /// A tile of fewer rows, which asks memory only where none did before it.
    #[inline(always)]
    fn rest<S: Simd, const R: usize, const V: usize>(&self, simd: S, row: usize, sums: &mut [f32], asked: bool) {
        if asked {
            self.one::<S, R, V, 0>(simd, row, sums);
        } else {
            self.one::<S, R, V, LINES>(simd, row, sums);
        }
    }

    /// `R` rows by `V` vectors, accumulated in registers, asking `P` times at every row of the block.
    #[inline(always)]
    fn one<S: Simd, const R: usize, const V: usize, const P: usize>(&self, simd: S, row: usize, sums: &mut [f32]) {
        let (lanes, depth) = (S::F32_LANES, self.depth);
        let Some(x) = self.x[row..].first_chunk::<R>() else {
            debug_assert!(false, "{R} rows from {row} on");
            return;
        };
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        let (wv, _) = S::as_simd_f32s(self.w);
        let per_row = PANEL / lanes;
        let skip = self.column / lanes;
        let tiles = sums.len() / PANEL / R;
        let asked = (self.strip * tiles + row / R) * depth * P;
        for (i, w) in wv.chunks(STEP * per_row).enumerate().take(depth.min(DEPTH).div_ceil(STEP)) {
            let from = i * STEP;
            if P == 1 {
                self.ask(asked + from..asked + from + STEP);
            }
            let mut xs: [&[f32; STEP]; R] = [&[0.0; STEP]; R];
            for r in 0..R {
                xs[r] = &x[r].as_chunks().0[i];
            }
            // of constant length: nothing is checked and all is unrolled
            if let Some(w) = w.get(skip..skip + (STEP - 1) * per_row + V) {
                for p in 0..STEP {
                    self.ask_at::<P>(asked, from + p);
                    add::<S, R, V>(simd, &mut acc, &w[p * per_row..p * per_row + V], &xs, p);
                }
            } else {
                for (p, w) in w.chunks_exact(per_row).enumerate() {
                    self.ask_at::<P>(asked, from + p);
                    add::<S, R, V>(simd, &mut acc, &w[skip..skip + V], &xs, p);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let at = (row + r) * PANEL + self.column;
            let (sums, _) = S::as_mut_simd_f32s(&mut sums[at..at + V * lanes]);
            for (sum, acc) in sums.iter_mut().zip(acc) {
                *sum = if self.first { *acc } else { simd.add_f32s(*sum, *acc) };
            }
        }
    }
}

impl Tile<'_> {
    /// Asks for a later block's lines that fall to these of all requests.
    #[inline(always)]
    fn ask(&self, requests: Range<usize>) {
        for line in requests.start * self.pace / 256..requests.end * self.pace / 256 {
            prefetch::<true, _>(self.ahead, BLOCK + line * LINE);
        }
    }

    /// Asks at a row of the block, where few tiles share it.
    #[inline(always)]
    fn ask_at<const P: usize>(&self, asked: usize, p: usize) {
        if P == LINES {
            prefetch_row(self.w, p + AHEAD);
        } else if P > 1 {
            self.ask(asked + p * P..asked + (p + 1) * P);
        }
    }
}

/// Adds row `p` of a block, `w [V vectors]`, times column `p` of `x [R, STEP]`.
#[inline(always)]
fn add<S: Simd, const R: usize, const V: usize>(
    simd: S,
    acc: &mut [[S::f32s; V]; R],
    w: &[S::f32s],
    x: &[&[f32; STEP]; R],
    p: usize,
) {
    for r in 0..R {
        let xv = simd.splat_f32s(x[r][p]);
        for v in 0..V {
            acc[r][v] = simd.mul_add_e_f32s(w[v], xv, acc[r][v]);
        }
    }
}

/// `g [m, n] W^T` -> `[m, k]`: the gradient of the input of [`product`].
pub(super) fn product_t<W: Panels>(g: &[f32], w: W, (m, k, n): (usize, usize, usize)) -> Vec<f32> {
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
struct Backward<'a, W> {
    g: &'a [f32],
    w: W,
    k: usize,
    n: usize,
    out: &'a mut [f32],
}

impl<W: Panels> WithSimd for Backward<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.out.len() / self.k.max(1);
        match (S::F32_LANES, rows.div_ceil(S::F32_LANES)) {
            (16, 3..) => self.run::<S, 8, 3>(simd),
            (16, 2) => self.run::<S, 8, 2>(simd),
            (_, 1) => self.run::<S, 8, 1>(simd),
            _ => self.run::<S, 6, 2>(simd),
        }
    }
}

impl<W: Panels> Backward<'_, W> {
    /// Block by block, `out^T [k, rows]` grows by the block's rows times its columns of the gradient turned: the weight
    /// is read once and in order, and no vector is summed up across.
    #[inline(always)]
    fn run<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        let Self { g, w, k, n, out } = self;
        let rows = out.len() / k;
        let step = V * S::F32_LANES;
        let width = rows.next_multiple_of(step);
        let mut turned = vec![0f32; PANEL * width]; // [steps, columns of the panel, step rows]
        let mut sums = vec![0f32; k * width]; // [k, rows]
        let mut scratch = scratch::<W>();
        for panel in 0..n.div_ceil(PANEL) {
            let first = panel * PANEL;
            let columns = PANEL.min(n - first);
            if columns < PANEL {
                turned.fill(0.0);
            }
            for (row, g) in g.chunks_exact(n).enumerate() {
                let at = row / step * step * PANEL + row % step;
                for (c, v) in g[first..first + columns].iter().enumerate() {
                    turned[at + c * step] = *v;
                }
            }
            for from in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - from);
                let (w, _) = w.block(k, panel, from..from + depth, &mut scratch);
                let sums = &mut sums[from * width..(from + depth) * width];
                for (i, turned) in turned.chunks_exact(PANEL * step).enumerate() {
                    let at = i * step;
                    let mut blocks = w.chunks_exact(R * PANEL);
                    let mut outs = sums.chunks_exact_mut(R * width);
                    for (i, (block, out)) in (&mut blocks).zip(&mut outs).enumerate() {
                        if W::AS_THEY_LIE {
                            (0..R).for_each(|r| prefetch_row(w, (i + 2) * R + r));
                        }
                        fold::<S, R, V>(simd, block, turned, &mut out[at..], width);
                    }
                    let rest = blocks.remainder().chunks_exact(PANEL);
                    for (w, out) in rest.zip(outs.into_remainder().chunks_exact_mut(width)) {
                        fold::<S, 1, V>(simd, w, turned, &mut out[at..], width);
                    }
                }
            }
        }
        // a line of `out` is written whole: rows that lie a power of two apart share few lines of the cache
        for (i, sums) in sums.chunks(LINE * width).enumerate() {
            for (row, out) in out.chunks_exact_mut(k).enumerate() {
                let out = out[i * LINE..].iter_mut();
                out.zip(sums.chunks_exact(width)).for_each(|(o, sums)| *o = sums[row]);
            }
        }
    }
}

/// `out [R, V vectors] += w [R, PANEL] turned [PANEL, V vectors]`, `out` in rows of `width`. The lengths are constants, so that
/// no index is checked in the loop.
#[inline(always)]
fn fold<S: Simd, const R: usize, const V: usize>(simd: S, w: &[f32], turned: &[f32], out: &mut [f32], width: usize) {
    let lanes = S::F32_LANES;
    let (vectors, _) = S::as_simd_f32s(turned);
    let (w, turned) = (w.as_chunks::<PANEL>().0.first_chunk::<R>(), vectors.as_chunks::<V>().0.first_chunk::<PANEL>());
    let (Some(w), Some(turned)) = (w, turned) else {
        debug_assert!(false, "a block of {R} rows and a panel of {V} vectors");
        return;
    };
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    for r in 0..R {
        let (row, _) = S::as_simd_f32s(&out[r * width..r * width + V * lanes]);
        acc[r].copy_from_slice(&row[..V]);
    }
    for c in 0..PANEL {
        for r in 0..R {
            let wv = simd.splat_f32s(w[r][c]);
            for v in 0..V {
                acc[r][v] = simd.mul_add_e_f32s(turned[c][v], wv, acc[r][v]);
            }
        }
    }
    for r in 0..R {
        let (row, _) = S::as_mut_simd_f32s(&mut out[r * width..r * width + V * lanes]);
        row.copy_from_slice(&acc[r]);
    }
}

#[cfg(test)]
mod tests;
