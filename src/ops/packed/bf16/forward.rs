//! The product with f32 activations: pairs become f32 in registers, so that memory and caches hold bf16 only.

use pulp::{Simd, WithSimd};

use super::{
    super::{DEPTH, PANEL, forward::Forward, rows::Output},
    Bf16, ODD, PAIRS, ask,
};

/// Columns of some panels for all rows of `x`.
pub(super) struct Exact<'a> {
    /// As [`super::blocked`] lays it.
    pub(super) x: &'a [f32],
    pub(super) w: &'a Bf16,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) out: Output<'a>,
}

impl WithSimd for Exact<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, w, bias, out } = self;
        match (S::F32_LANES, out.rows.len()) {
            (16, _) => Exact { x, w, bias, out }.run::<S, 8, 3>(simd),
            // 8 sums, 2 pairs, 2 numbers of them, the mask and a number of x: what 16 registers hold
            (8, ..16) => Exact { x, w, bias, out }.run::<S, 4, 2>(simd),
            // more sums fit beside numbers that are f32 already, and a block is expanded once for many rows
            (8, _) => Forward { x, w, bias, k: w.in_dim, out }.with_simd(simd),
            _ => Exact { x, w, bias, out }.run::<S, 4, 4>(simd),
        }
    }
}

impl Exact<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const V: usize>(mut self, simd: S) {
        let (depth, rows) = (self.w.in_dim.div_ceil(2), self.out.rows.len());
        let mut sums = vec![0f32; rows * PANEL];
        for (i, panel) in self.out.panels.clone().enumerate() {
            for from in (0..depth).step_by(PAIRS) {
                let w = &self.w.rows(panel, from)[..PAIRS.min(depth - from)];
                let x = self.x[2 * from * rows..(2 * from + DEPTH) * rows].as_chunks().0;
                for column in (0..PANEL).step_by(V * S::F32_LANES) {
                    let tile = Tile { x, w, column, first: from == 0 };
                    tile.rows::<S, R, V>(simd, &mut sums);
                }
            }
            self.out.write(i, &sums, self.bias);
        }
    }
}

/// Some columns of a block, to be computed for all rows.
struct Tile<'a> {
    /// The block's columns of all rows; zeros behind the last one.
    x: &'a [[f32; DEPTH]],
    w: &'a [[u32; PANEL]],
    /// The first column.
    column: usize,
    /// Whether the block is its panel's first: the sums begin with it.
    first: bool,
}

impl Tile<'_> {
    /// All rows, into `sums [rows, PANEL]`. The first tile of a block asks memory for what comes.
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const V: usize>(&self, simd: S, sums: &mut [f32]) {
        let rows = sums.len() / PANEL;
        let mut row = 0;
        while row + R <= rows {
            self.at::<S, R, V>(simd, row, sums);
            row += R;
        }
        if R > 4 && row + 4 <= rows {
            self.at::<S, 4, V>(simd, row, sums);
            row += 4;
        }
        if row + 2 <= rows {
            self.at::<S, 2, V>(simd, row, sums);
            row += 2;
        }
        if row < rows {
            self.at::<S, 1, V>(simd, row, sums);
        }
    }

    #[inline(always)]
    fn at<S: Simd, const R: usize, const V: usize>(&self, simd: S, row: usize, sums: &mut [f32]) {
        if row == 0 && self.column == 0 {
            self.one::<S, R, V, true>(simd, row, sums);
        } else {
            self.one::<S, R, V, false>(simd, row, sums);
        }
    }

    /// `R` rows by `V` vectors, accumulated in registers in the order of the f32 kernel, whatever `R` is.
    #[inline(always)]
    fn one<S: Simd, const R: usize, const V: usize, const ASK: bool>(&self, simd: S, row: usize, sums: &mut [f32]) {
        let Some(x) = self.x[row..].first_chunk::<R>() else {
            debug_assert!(false, "{R} rows from {row} on");
            return;
        };
        let x: [&[[f32; 2]]; R] = std::array::from_fn(|r| x[r].as_chunks().0);
        let (shift, odd) = (simd.splat_u32s(16), simd.splat_u32s(ODD));
        let skip = self.column / S::F32_LANES;
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        for (p, pairs) in self.w.iter().enumerate().take(PAIRS) {
            if ASK {
                ask(pairs);
            }
            let (pairs, _) = S::as_simd_u32s(pairs);
            let Some(pairs) = pairs[skip..].first_chunk::<V>() else { return };
            let w: [S::f32s; V] =
                std::array::from_fn(|v| simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(pairs[v], shift)));
            add(simd, &mut acc, &w, &x, (p, 0));
            let w: [S::f32s; V] = std::array::from_fn(|v| simd.transmute_f32s_u32s(simd.and_u32s(pairs[v], odd)));
            add(simd, &mut acc, &w, &x, (p, 1));
        }
        for (r, acc) in acc.iter().enumerate() {
            let at = (row + r) * PANEL + self.column;
            let (sums, _) = S::as_mut_simd_f32s(&mut sums[at..at + V * S::F32_LANES]);
            for (sum, acc) in sums.iter_mut().zip(acc) {
                *sum = if self.first { *acc } else { simd.add_f32s(*sum, *acc) };
            }
        }
    }
}

/// Adds a row of a block, `w [V vectors]`, times its column of `x [R, PAIRS, 2]`.
#[inline(always)]
fn add<S: Simd, const R: usize, const V: usize>(
    simd: S,
    acc: &mut [[S::f32s; V]; R],
    w: &[S::f32s; V],
    x: &[&[[f32; 2]]; R],
    (p, half): (usize, usize),
) {
    for r in 0..R {
        let xv = simd.splat_f32s(x[r][p][half]);
        for v in 0..V {
            acc[r][v] = simd.mul_add_e_f32s(w[v], xv, acc[r][v]);
        }
    }
}
