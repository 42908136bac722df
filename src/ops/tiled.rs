//! Products with the transpose of a table (the tied head) with some tens of rows: a decode step of a full batch.
//!
//! A blocked GEMM packs the weight at every call, which costs as much as the product when there are few rows. Here a tile
//! of eight weight rows by up to three vectors of input rows stays in registers while the table streams by as it lies.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{LINE, prefetch};

/// Rows of a tile.
const ROWS: usize = 8;

/// Whether this machine has the registers that the tiles are made for.
pub(super) fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::is_x86_feature_detected!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// `x [m, k]` times the transpose of `w [n, k]` -> `[m, n]`: the weight's rows take the tile's rows, `x` transposed its
/// columns, so that no vector is ever summed up across.
pub(super) fn out_in(x: &[f32], w: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
    let width = m.next_multiple_of(16);
    let mut xt = vec![0f32; k * width];
    for (row, x) in x.chunks_exact(k).enumerate() {
        for (p, v) in x.iter().enumerate() {
            xt[p * width + row] = *v;
        }
    }
    let per = n.div_ceil(rayon::current_num_threads().max(1) * 8).next_multiple_of(ROWS);
    let starts: Vec<usize> = (0..n).step_by(per).collect();
    let run = |&from: &usize| {
        let rows = per.min(n - from);
        let mut tiles = vec![0f32; rows * width];
        let w = &w[from * k..(from + rows) * k];
        Arch::new().dispatch(Tiles { x: w, w: &xt, k, n: width, from: 0, cols: width, out: &mut tiles });
        // turned here, where the block is in cache
        let mut out = vec![0f32; m * rows];
        for (j, tile) in tiles.chunks_exact(width).enumerate() {
            for (row, v) in tile[..m].iter().enumerate() {
                out[row * rows + j] = *v;
            }
        }
        out
    };
    let blocks: Vec<Vec<f32>> =
        if m * k * n < 256 * 1024 { starts.iter().map(run).collect() } else { starts.par_iter().map(run).collect() };
    merge(&blocks, &starts, m, n)
}

/// Column blocks side by side.
fn merge(blocks: &[Vec<f32>], starts: &[usize], m: usize, n: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(m * n);
    for row in 0..m {
        for (block, &from) in blocks.iter().zip(starts) {
            let width = block.len() / m.max(1);
            debug_assert!(from + width <= n);
            out.extend_from_slice(&block[row * width..(row + 1) * width]);
        }
    }
    out
}

/// All tiles of a block of columns `from .. from + cols` of `w`, into `out [rows, cols]`.
struct Tiles<'a> {
    x: &'a [f32],
    w: &'a [f32],
    k: usize,
    n: usize,
    from: usize,
    cols: usize,
    out: &'a mut [f32],
}

impl WithSimd for Tiles<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, w, k, n, from, cols, out } = self;
        let lanes = S::F32_LANES;
        let mut at = 0;
        while at + 3 * lanes <= cols {
            panel::<S, 3>(simd, (x, w, k, n), from + at, (at, cols), out);
            at += 3 * lanes;
        }
        while at + 2 * lanes <= cols {
            panel::<S, 2>(simd, (x, w, k, n), from + at, (at, cols), out);
            at += 2 * lanes;
        }
        while at + lanes <= cols {
            panel::<S, 1>(simd, (x, w, k, n), from + at, (at, cols), out);
            at += lanes;
        }
        for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(cols)) {
            for (j, o) in out.iter_mut().enumerate().skip(at) {
                let mut sum = 0.0;
                for (p, v) in x.iter().enumerate() {
                    sum = w[p * n + from + j].mul_add(*v, sum);
                }
                *o = sum;
            }
        }
    }
}

/// One panel of `V` vectors for all rows.
#[inline(always)]
fn panel<S: Simd, const V: usize>(
    simd: S,
    (x, w, k, n): (&[f32], &[f32], usize, usize),
    column: usize,
    (at, cols): (usize, usize),
    out: &mut [f32],
) {
    let mut xs = x.chunks_exact(ROWS * k);
    let mut outs = out.chunks_exact_mut(ROWS * cols);
    for (x, out) in (&mut xs).zip(&mut outs) {
        let rows: [&[f32]; ROWS] = std::array::from_fn(|r| &x[r * k..(r + 1) * k]);
        store::<S, ROWS, V>(tile::<S, ROWS, V>(simd, rows, w, n, column), out, at, cols);
    }
    for (x, out) in xs.remainder().chunks_exact(k).zip(outs.into_remainder().chunks_exact_mut(cols)) {
        store::<S, 1, V>(tile::<S, 1, V>(simd, [x], w, n, column), out, at, cols);
    }
}

#[inline(always)]
fn tile<S: Simd, const R: usize, const V: usize>(
    simd: S,
    x: [&[f32]; R],
    w: &[f32],
    n: usize,
    column: usize,
) -> [[S::f32s; V]; R] {
    let k = x[0].len();
    let x: [&[f32]; R] = std::array::from_fn(|r| &x[r][..k]);
    let width = V * S::F32_LANES;
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    for p in 0..k {
        if p % LINE == 0 {
            // the same place of the rows that come next
            (0..R).for_each(|r| prefetch(x[r], R * k + p));
        }
        let (row, _) = S::as_simd_f32s(&w[p * n + column..p * n + column + width]);
        let row = &row[..V];
        let wv: [S::f32s; V] = std::array::from_fn(|v| row[v]);
        for r in 0..R {
            let xv = simd.splat_f32s(x[r][p]);
            for v in 0..V {
                acc[r][v] = simd.mul_add_e_f32s(wv[v], xv, acc[r][v]);
            }
        }
    }
    acc
}

#[inline(always)]
fn store<S: Simd, const R: usize, const V: usize>(acc: [[S::f32s; V]; R], out: &mut [f32], at: usize, cols: usize) {
    let width = V * S::F32_LANES;
    for (acc, out) in acc.iter().zip(out.chunks_exact_mut(cols)) {
        let (vecs, _) = S::as_mut_simd_f32s(&mut out[at..at + width]);
        for (o, a) in vecs.iter_mut().zip(acc) {
            *o = *a;
        }
    }
}
