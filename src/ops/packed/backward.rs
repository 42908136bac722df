//! The gradient of the product's input.

use pulp::{Arch, Simd, WithSimd};

use super::{DEPTH, PANEL, Panels, WORTH_A_THREAD, prefetch_row, scratch};
use crate::ops::{
    LINE,
    team::{each, threads},
};

/// `g [m, n] W^T` -> `[m, k]`: the gradient of the input of [`super::product`].
pub(in crate::ops) fn product_t<W: Panels>(g: &[f32], w: W, (m, k, n): (usize, usize, usize)) -> Vec<f32> {
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
