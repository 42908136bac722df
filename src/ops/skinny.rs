//! Products with the transpose of a table (the tied head) with few rows, where reading the table once at full memory
//! speed is everything: it streams once, over all threads, with the rows' accumulators in registers.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

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
