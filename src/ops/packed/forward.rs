//! The product's kernel: tiles of rows by columns whose sums stay in registers.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{AHEAD, BLOCK, DEPTH, LINES, PANEL, Panels, STEP, prefetch_row, rows::Output, scratch};
use crate::ops::{LINE, prefetch};

/// Columns of the given panels for all rows of `x`.
pub(super) struct Forward<'a, W> {
    /// As [`super::blocked`] lays it.
    pub(super) x: &'a [f32],
    pub(super) w: W,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) k: usize,
    pub(super) out: Output<'a>,
}

impl<W: Panels> WithSimd for Forward<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (S::F32_LANES, self.out.rows.len()) {
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
        let (k, rows) = (self.k, self.out.rows.len());
        let (mut sums, mut scratch) = (vec![0f32; rows * PANEL], scratch::<W>());
        for (i, panel) in self.out.panels.clone().enumerate() {
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
            self.out.write(i, &sums, self.bias);
        }
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
