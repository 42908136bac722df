//! Frozen matrices in bf16, in the panels of [`super`]: half of the bytes of f32, to read at every step and to keep.
//!
//! In a panel, the numbers of two rows of a column lie side by side, the even row's in the low half of 32 bits, as the
//! processor's dot product of bf16 pairs takes them; either becomes f32 by a shift or a mask. A product with f32
//! activations is exact in that sense: it is, bit for bit, what the f32 kernels make of the rounded matrix. What a block
//! is expanded for (the gradient, the matrix unit) is that matrix, too.

mod dot;
mod forward;

use std::{mem::MaybeUninit, ops::Range};

use half::bf16;
use pulp::Arch;
use rayon::prelude::*;

use self::{dot::Dot, forward::Exact};
use super::{
    AHEAD, Activations, DEPTH, PANEL, Panels, WORTH_A_THREAD, activations, blocked,
    rows::{self, Output},
};
use crate::ops::{LINE, memory::huge_pages, prefetch, team::each};

/// Pairs of rows of a whole block.
const PAIRS: usize = DEPTH / 2;
/// The half of a pair that has the odd row's number.
const ODD: u32 = 0xffff_0000;

// a block begins with a pair
const _: () = assert!(DEPTH.is_multiple_of(2));

/// A matrix `[in, out]` in panels `[in / 2, PANEL]` of pairs, padded with zeros.
pub(in crate::ops) struct Bf16 {
    pairs: Vec<u32>,
    in_dim: usize,
    out_dim: usize,
}

impl std::fmt::Debug for Bf16 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bf16({} -> {})", self.in_dim, self.out_dim)
    }
}

/// The even row's number of a pair, and the odd row's.
#[inline(always)]
fn numbers(pair: u32) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & ODD)]
}

impl Bf16 {
    /// Packs a matrix `[in, out]` that `at(row, column)` reads; rounded to the nearest, ties to even.
    pub(in crate::ops) fn pack((in_dim, out_dim): (usize, usize), at: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let depth = in_dim.div_ceil(2);
        let mut pairs = vec![0u32; out_dim.div_ceil(PANEL) * PANEL * depth];
        huge_pages(&pairs);
        let rounded = |row: usize, column: usize| {
            let number = if row < in_dim { bf16::from_f32(at(row, column)) } else { bf16::ZERO };
            u32::from(number.to_bits())
        };
        pairs.par_chunks_mut((PANEL * depth).max(1)).enumerate().for_each(|(panel, out)| {
            let first = panel * PANEL;
            for (i, out) in out.chunks_exact_mut(PANEL).enumerate() {
                for (c, o) in out[..PANEL.min(out_dim - first)].iter_mut().enumerate() {
                    *o = rounded(2 * i, first + c) | rounded(2 * i + 1, first + c) << 16;
                }
            }
        });
        Self { pairs, in_dim, out_dim }
    }

    /// Width of the input.
    pub(in crate::ops) fn in_dim(&self) -> usize {
        self.in_dim
    }

    /// Width of the output.
    pub(in crate::ops) fn out_dim(&self) -> usize {
        self.out_dim
    }

    /// Bytes in memory.
    pub(in crate::ops) fn bytes(&self) -> usize {
        size_of_val(&*self.pairs)
    }

    /// A panel's rows, two by two, from the pair `from` on, and what lies behind them.
    #[inline(always)]
    fn rows(&self, panel: usize, from: usize) -> &[[u32; PANEL]] {
        &self.pairs.as_chunks().0[panel * self.in_dim.div_ceil(2) + from..]
    }

    /// The values of a panel's rows, `[rows, PANEL]`. The first row is an even one.
    #[inline(always)]
    fn expand(&self, panel: usize, rows: Range<usize>, out: &mut [f32]) {
        let pairs = self.rows(panel, rows.start / 2);
        for (pair, out) in pairs.iter().zip(out.chunks_mut(2 * PANEL)) {
            ask(pair);
            if let Some((even, odd)) = out.split_first_chunk_mut::<PANEL>() {
                for c in 0..PANEL {
                    [even[c], _] = numbers(pair[c]);
                }
                if let Some(odd) = odd.first_chunk_mut::<PANEL>() {
                    for c in 0..PANEL {
                        [_, odd[c]] = numbers(pair[c]);
                    }
                }
            }
        }
    }

    /// The matrix, `[in, out]`.
    pub(in crate::ops) fn unpack(&self) -> Vec<f32> {
        let n = self.out_dim;
        let mut out = vec![0f32; self.in_dim * n];
        out.par_chunks_mut(n.max(1)).enumerate().for_each(|(row, out)| {
            for (panel, out) in out.chunks_mut(PANEL).enumerate() {
                let pairs = self.rows(panel, row / 2).iter().flatten();
                out.iter_mut().zip(pairs).for_each(|(o, pair)| *o = numbers(*pair)[row % 2]);
            }
        });
        out
    }

    /// Columns of the matrix as rows, `[ids, in]`. The ids must be below the output's width.
    pub(in crate::ops) fn columns(&self, ids: &[u32]) -> Vec<f32> {
        let k = self.in_dim.max(1);
        let mut out = vec![0f32; ids.len() * self.in_dim];
        let one = |(id, out): (&u32, &mut [f32])| {
            let (panel, column) = (*id as usize / PANEL, *id as usize % PANEL);
            for (out, pairs) in out.chunks_mut(2).zip(self.rows(panel, 0)) {
                out.iter_mut().zip(numbers(pairs[column])).for_each(|(o, number)| *o = number);
            }
        };
        if out.len() < WORTH_A_THREAD {
            ids.iter().zip(out.chunks_mut(k)).for_each(one);
        } else {
            each(ids.iter().zip(out.chunks_mut(k)).collect(), one);
        }
        out
    }
}

/// Asks memory for a pair of rows that will be read soon.
#[inline(always)]
fn ask(pair: &[u32; PANEL]) {
    for line in 0..PANEL / LINE {
        prefetch::<false, _>(pair, AHEAD * PANEL + line * LINE);
    }
}

impl Panels for &Bf16 {
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

    fn rounds(self) -> bool {
        activations() == Activations::AsWeights && dot::available()
    }

    fn multiply(self, x: &[f32], bias: Option<&[f32]>, (m, k, n): (usize, usize, usize), out: &mut [MaybeUninit<f32>]) {
        if self.rounds() {
            let run = |x: &[_], out: Output<'_>| Dot { x, w: self, bias }.compute(out);
            rows::share_out(x, (m, k, n), out, |x| dot::rounded(x, k).into(), run);
        } else {
            let run = |x: &[_], out: Output<'_>| Arch::new().dispatch(Exact { x, w: self, bias, out });
            rows::share_out(x, (m, k, n), out, |x| blocked(x, k), run);
        }
    }
}

#[cfg(test)]
mod tests;
