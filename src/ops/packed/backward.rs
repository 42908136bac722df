//! The gradient of the product's input.

use std::{mem::MaybeUninit, ops::Range};

use pulp::{Arch, Simd, WithSimd};

use super::{
    DEPTH, PANEL, Panels, WORTH_A_THREAD,
    halves::{self, Factor},
    scratch,
};
use crate::ops::{
    LINE, prefetch,
    team::{each, threads},
    vectorized,
};

/// Rows whose sums over a block of the weight's rows are kept at a time: with the block they stay in the second level.
const ROWS: usize = 5 * PANEL;
/// Panels whose columns of the gradient are turned at a time: with all rows they stay in the third level.
const AT_ONCE: usize = 64;

/// `g [m, n] W^T` -> `[m, k]`: the gradient of the input of [`super::product`].
#[allow(unsafe_code, reason = "an output is not filled with zeros before it is written")]
pub(in crate::ops) fn product_t<W: Panels>(g: &[f32], w: W, (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    assert_eq!(g.len(), m * n, "rows of a gradient"); // what is not computed would not be written
    if n == 0 {
        return vec![0f32; m * k];
    }
    let mut data = Vec::with_capacity(m * k);
    let all = &mut data.spare_capacity_mut()[..m * k];
    if halves::takes(m, n, k) {
        halves::product(g, (w, Factor::Turned), None, (k, n), all);
        // SAFETY: it has written all of them
        unsafe { data.set_len(m * k) };
        return data;
    }
    let parallel = threads() > 1 && m * k * n >= WORTH_A_THREAD;
    // whole strips, but for the last
    let size = m.div_ceil(m.div_ceil(ROWS).max(1));
    let size = size.next_multiple_of(if size > PANEL { PANEL } else { LINE });
    for (g, out) in g.chunks((size * n).max(1)).zip(all.chunks_mut((size * k).max(1))) {
        let rows = out.len() / k;
        let step = rows.next_multiple_of(LINE).min(PANEL);
        // a block of the weight's rows is one of the output's columns
        let part = |_| Part { out: Vec::with_capacity(rows), sums: vec![0f32; rows.div_ceil(step) * DEPTH * step] };
        let mut parts: Vec<Part<'_>> = (0..k.div_ceil(DEPTH)).map(part).collect();
        for row in out.chunks_exact_mut(k) {
            parts.iter_mut().zip(row.chunks_mut(DEPTH)).for_each(|(part, columns)| part.out.push(columns));
        }
        let panels = n.div_ceil(PANEL);
        for first in (0..panels).step_by(AT_ONCE) {
            let own = first..panels.min(first + AT_ONCE);
            let last = own.end == panels;
            let turned = Turned::of(g, (rows, n), step, own, parallel);
            let run = |(block, part)| Arch::new().dispatch(Backward { turned: &turned, w, k, block, part, last });
            if parallel {
                each(parts.iter_mut().enumerate().collect(), run);
            } else {
                parts.iter_mut().enumerate().for_each(run);
            }
        }
    }
    // SAFETY: chunks cover all rows and blocks all columns, the last panels are gone through, and `Backward` writes its own of every row
    unsafe { data.set_len(m * k) };
    data
}

/// Some columns of the output.
struct Part<'a> {
    /// Of each row.
    out: Vec<&'a mut [MaybeUninit<f32>]>,
    /// `[strips, DEPTH, rows of a strip]`.
    sums: Vec<f32>,
}

/// Rows of a gradient in the columns of some panels, turned: `[panels, strips, PANEL columns, rows of a strip]`, padded with
/// zeros.
struct Turned {
    data: Vec<f32>,
    /// Rows of a strip: one, two or three vectors of 512 bits.
    step: usize,
    strips: usize,
    panels: Range<usize>,
}

impl Turned {
    fn of(g: &[f32], (rows, n): (usize, usize), step: usize, panels: Range<usize>, parallel: bool) -> Self {
        let strips = rows.div_ceil(step);
        let mut data = vec![0f32; panels.len() * strips * PANEL * step];
        let run = |(i, out): (usize, &mut [f32])| {
            let panel = panels.start + i;
            vectorized(
                #[inline(always)]
                || {
                    let columns = PANEL.min(n - panel * PANEL);
                    for (strip, out) in out.chunks_exact_mut(PANEL * step).enumerate() {
                        let first = strip * step;
                        let mut row = first;
                        while row < rows.min(first + step) {
                            let count = LINE.min(rows - row);
                            turn(&g[row * n + panel * PANEL..], n, (count, columns), &mut out[row - first..], step);
                            row += LINE;
                        }
                    }
                },
            );
        };
        let parts = data.chunks_exact_mut((strips * PANEL * step).max(1)).enumerate();
        if parallel {
            each(parts.collect(), run)
        } else {
            parts.for_each(run)
        }
        Self { data, step, strips, panels }
    }
}

/// `out[c, r] = g[r, c]` for at most [`LINE`] rows.
#[inline(always)]
fn turn(g: &[f32], n: usize, (rows, columns): (usize, usize), out: &mut [f32], step: usize) {
    let mut from = 0;
    while rows == LINE && from + LINE <= columns {
        let block: [&[f32; LINE]; LINE] =
            std::array::from_fn(|r| g[r * n + from..].first_chunk().unwrap_or(&[0.0; LINE]));
        for c in 0..LINE {
            let Some(line) = out[(from + c) * step..].first_chunk_mut::<LINE>() else { continue };
            for r in 0..LINE {
                line[r] = block[r][c];
            }
        }
        from += LINE;
    }
    for r in 0..rows {
        for c in from..columns {
            out[c * step + r] = g[r * n + c];
        }
    }
}

/// A block of the weight's rows in some panels, with all rows of the gradient.
struct Backward<'a, 'p, W> {
    turned: &'a Turned,
    w: W,
    k: usize,
    block: usize,
    part: &'a mut Part<'p>,
    /// Whether no panels come behind these, so that the output is written: all of the part's.
    last: bool,
}

impl<W: Panels> WithSimd for Backward<'_, '_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (S::F32_LANES, self.turned.step / LINE) {
            (16, 3) => self.run::<S, 8, 3>(simd),
            (16, 2) => self.run::<S, 8, 2>(simd),
            (16, _) => self.run::<S, 8, 1>(simd),
            // 12 sums, 2 of the gradient, a number of the weight: what 16 registers hold; 8 numbers or fewer each
            _ => self.run::<S, 6, 2>(simd),
        }
    }
}

impl<W: Panels> Backward<'_, '_, W> {
    /// Panel by panel, `sums [DEPTH, rows]` grow by the block times its columns of the gradient: the weight is read once,
    /// and no vector is summed up across.
    #[inline(always)]
    fn run<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        let Turned { data, step, strips, panels } = self.turned;
        let (step, strips) = (*step, *strips);
        let Part { out, sums } = self.part;
        let from = self.block * DEPTH;
        let depth = DEPTH.min(self.k - from);
        let mut scratch = scratch::<W>();
        let part = V * S::F32_LANES; // rows of a tile, some or all of a strip's
        for (i, panel) in panels.clone().enumerate() {
            let (w, _) = self.w.block(self.k, panel, from..from + depth, &mut scratch);
            let ahead = W::AS_THEY_LIE.then(|| self.k * PANEL); // to the next panel's block
            let turned = &data[i * strips * PANEL * step..(i + 1) * strips * PANEL * step];
            // the next panel's block is asked for evenly
            let mut line = 0;
            let lines = (depth * PANEL / LINE).div_ceil(strips * (step / part) * (depth / R).max(1));
            for (turned, sums) in turned.chunks_exact(PANEL * step).zip(sums.chunks_exact_mut(DEPTH * step)) {
                for at in (0..step).step_by(part) {
                    let mut blocks = w.chunks_exact(R * PANEL);
                    let mut outs = sums[..depth * step].chunks_exact_mut(R * step);
                    for (block, out) in (&mut blocks).zip(&mut outs) {
                        if let Some(ahead) = ahead {
                            for l in line..line + lines {
                                prefetch::<true, _>(w, ahead + l * LINE);
                            }
                            line += lines;
                        }
                        fold::<S, R, V>(simd, block, (turned, at), (out, at), step);
                    }
                    let rest = blocks.remainder().chunks_exact(PANEL);
                    for (w, out) in rest.zip(outs.into_remainder().chunks_exact_mut(step)) {
                        fold::<S, 1, V>(simd, w, (turned, at), (out, at), step);
                    }
                }
            }
        }
        if !self.last {
            return;
        }
        let rows = out.len();
        for (strip, sums) in sums.chunks_exact(DEPTH * step).enumerate() {
            let outs = &mut out[strip * step..rows.min((strip + 1) * step)];
            for first in (0..depth).step_by(LINE) {
                let columns = first..depth.min(first + LINE);
                for (r, out) in outs.iter_mut().enumerate() {
                    for (o, c) in out[columns.clone()].iter_mut().zip(columns.clone()) {
                        o.write(sums[c * step + r]);
                    }
                }
            }
        }
    }
}

/// `out [R, V vectors] += w [R, PANEL] turned [PANEL, V vectors]`, both in rows of `step`.
#[inline(always)]
fn fold<S: Simd, const R: usize, const V: usize>(
    simd: S,
    w: &[f32],
    (turned, from): (&[f32], usize),
    (out, at): (&mut [f32], usize),
    step: usize,
) {
    let lanes = S::F32_LANES;
    let Some(w) = w.as_chunks::<PANEL>().0.first_chunk::<R>() else {
        debug_assert!(false, "a block of {R} rows");
        return;
    };
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    for r in 0..R {
        let (row, _) = S::as_simd_f32s(&out[r * step + at..r * step + at + V * lanes]);
        acc[r].copy_from_slice(&row[..V]);
    }
    for (c, row) in turned.chunks_exact(step).enumerate().take(PANEL) {
        let (x, _) = S::as_simd_f32s(&row[from..from + V * lanes]);
        let x: [S::f32s; V] = std::array::from_fn(|v| x[v]);
        for r in 0..R {
            let wv = simd.splat_f32s(w[r][c]);
            for v in 0..V {
                acc[r][v] = simd.mul_add_e_f32s(x[v], wv, acc[r][v]);
            }
        }
    }
    for r in 0..R {
        let (row, _) = S::as_mut_simd_f32s(&mut out[r * step + at..r * step + at + V * lanes]);
        row.copy_from_slice(&acc[r]);
    }
}
