//! Matrix products with few rows: decode steps, where reading the weights once at full memory speed is everything.
//!
//! candle's GEMM reads a weight with one thread at one row (half of the bandwidth) and packs it at a few rows. These two
//! kernels stream the weight once, over all threads, with the rows' accumulators in registers or L1.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Weight rows that are folded into the accumulators at a time.
const DEPTH: usize = 8;

/// `x [m, k]` times `w [k, n]` -> `[m, n]`.
pub(super) fn in_out(x: &[f32], w: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
    let threads = rayon::current_num_threads().max(1);
    let cols = n.div_ceil(threads).next_multiple_of(16).min(n);
    // Column blocks in their own buffers, so that threads write without sharing; merged below (n is small).
    let run = |from: usize| {
        let cols = cols.min(n - from);
        let mut acc = vec![0f32; m * cols];
        Arch::new().dispatch(InOut { x, w, k, n, from, cols, acc: &mut acc });
        acc
    };
    if k * n < 64 * 1024 || cols == n {
        let mut acc = vec![0f32; m * n];
        Arch::new().dispatch(InOut { x, w, k, n, from: 0, cols: n, acc: &mut acc });
        return acc;
    }
    let starts: Vec<usize> = (0..n).step_by(cols).collect();
    let blocks: Vec<Vec<f32>> = starts.par_iter().map(|&from| run(from)).collect();
    let mut out = vec![0f32; m * n];
    for (&from, block) in starts.iter().zip(&blocks) {
        let width = block.len() / m;
        for (row, part) in block.chunks(width).enumerate() {
            out[row * n + from..row * n + from + width].copy_from_slice(part);
        }
    }
    out
}

struct InOut<'a> {
    x: &'a [f32],
    w: &'a [f32],
    k: usize,
    n: usize,
    from: usize,
    cols: usize,
    acc: &'a mut [f32],
}

impl WithSimd for InOut<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, w, k, n, from, cols, acc } = self;
        let mut depth = 0;
        while depth + DEPTH <= k {
            let rows: [&[f32]; DEPTH] =
                std::array::from_fn(|j| &w[(depth + j) * n + from..(depth + j) * n + from + cols]);
            for (row, acc) in acc.chunks_exact_mut(cols).enumerate() {
                let xs = &x[row * k + depth..row * k + depth + DEPTH];
                fold::<S>(simd, rows, xs, acc);
            }
            depth += DEPTH;
        }
        for j in depth..k {
            let wr = &w[j * n + from..j * n + from + cols];
            for (row, acc) in acc.chunks_exact_mut(cols).enumerate() {
                let v = x[row * k + j];
                for (a, w) in acc.iter_mut().zip(wr) {
                    *a = w.mul_add(v, *a);
                }
            }
        }
    }
}

/// `acc += sum_j xs[j] * rows[j]`.
#[inline(always)]
fn fold<S: Simd>(simd: S, rows: [&[f32]; DEPTH], xs: &[f32], acc: &mut [f32]) {
    let scale: [S::f32s; DEPTH] = std::array::from_fn(|j| simd.splat_f32s(xs[j]));
    let (vecs, tail) = S::as_mut_simd_f32s(acc);
    let heads: [&[S::f32s]; DEPTH] = std::array::from_fn(|j| S::as_simd_f32s(rows[j]).0);
    let n = heads.iter().map(|h| h.len()).min().unwrap_or(0).min(vecs.len());
    let heads: [&[S::f32s]; DEPTH] = std::array::from_fn(|j| &heads[j][..n]);
    for i in 0..n {
        let mut a = vecs[i];
        for j in 0..DEPTH {
            a = simd.mul_add_e_f32s(heads[j][i], scale[j], a);
        }
        vecs[i] = a;
    }
    let at = rows[0].len() - tail.len();
    for (i, a) in tail.iter_mut().enumerate() {
        for j in 0..DEPTH {
            *a = rows[j][at + i].mul_add(xs[j], *a);
        }
    }
}

/// `x [m, k]` times the transpose of `w [n, k]` -> `[m, n]`: rows of `w` are dotted with rows of `x`.
pub(super) fn out_in(x: &[f32], w: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
    // Outputs are produced as [n, m] so that every weight row has its own contiguous place.
    const BLOCK: usize = 4;
    let mut out_t = vec![0f32; n * m];
    let job = |(first, out): (usize, &mut [f32])| {
        Arch::new().dispatch(OutIn { x, w: &w[first * k..(first + out.len() / m) * k], m, k, out });
    };
    let per = n.div_ceil(rayon::current_num_threads().max(1) * 4).next_multiple_of(BLOCK);
    if n * k < 64 * 1024 {
        job((0, &mut out_t));
    } else {
        out_t.par_chunks_mut(per * m).enumerate().for_each(|(i, out)| job((i * per, out)));
    }
    if m == 1 {
        return out_t;
    }
    let mut out = vec![0f32; m * n];
    for (row, out) in out.chunks_exact_mut(n).enumerate() {
        for (j, o) in out.iter_mut().enumerate() {
            *o = out_t[j * m + row];
        }
    }
    out
}

struct OutIn<'a> {
    x: &'a [f32],
    w: &'a [f32],
    m: usize,
    k: usize,
    out: &'a mut [f32],
}

impl WithSimd for OutIn<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, w, m, k, out } = self;
        let mut w_rows = w.chunks_exact(4 * k);
        let mut outs = out.chunks_exact_mut(4 * m);
        for (w, out) in (&mut w_rows).zip(&mut outs) {
            let w4: [&[f32]; 4] = std::array::from_fn(|j| &w[j * k..(j + 1) * k]);
            let mut row = 0;
            while row + 4 <= m {
                let x4: [&[f32]; 4] = std::array::from_fn(|i| &x[(row + i) * k..(row + i + 1) * k]);
                let d = dots::<S, 4, 4>(simd, w4, x4);
                for j in 0..4 {
                    for i in 0..4 {
                        out[j * m + row + i] = d[j][i];
                    }
                }
                row += 4;
            }
            while row < m {
                let d = dots::<S, 4, 1>(simd, w4, [&x[row * k..(row + 1) * k]]);
                for j in 0..4 {
                    out[j * m + row] = d[j][0];
                }
                row += 1;
            }
        }
        for (w, out) in w_rows.remainder().chunks_exact(k).zip(outs.into_remainder().chunks_exact_mut(m)) {
            for (row, o) in out.iter_mut().enumerate() {
                *o = dots::<S, 1, 1>(simd, [w], [&x[row * k..(row + 1) * k]])[0][0];
            }
        }
    }
}

/// All dot products of `W` weight rows with `X` input rows, accumulators in registers.
#[inline(always)]
fn dots<S: Simd, const W: usize, const X: usize>(simd: S, w: [&[f32]; W], x: [&[f32]; X]) -> [[f32; X]; W] {
    let wv: [(&[S::f32s], &[f32]); W] = std::array::from_fn(|j| S::as_simd_f32s(w[j]));
    let xv: [(&[S::f32s], &[f32]); X] = std::array::from_fn(|i| S::as_simd_f32s(x[i]));
    let n = wv[0].0.len().min(xv[0].0.len());
    let wh: [&[S::f32s]; W] = std::array::from_fn(|j| &wv[j].0[..n]);
    let xh: [&[S::f32s]; X] = std::array::from_fn(|i| &xv[i].0[..n]);
    let mut acc = [[simd.splat_f32s(0.0); X]; W];
    for p in 0..n {
        let xs: [S::f32s; X] = std::array::from_fn(|i| xh[i][p]);
        for j in 0..W {
            let wv = wh[j][p];
            for i in 0..X {
                acc[j][i] = simd.mul_add_e_f32s(wv, xs[i], acc[j][i]);
            }
        }
    }
    let mut out = [[0f32; X]; W];
    for j in 0..W {
        for i in 0..X {
            let rest: f32 = wv[j].1.iter().zip(xv[i].1).map(|(a, b)| a * b).sum();
            out[j][i] = simd.reduce_sum_f32s(acc[j][i]) + rest;
        }
    }
    out
}
