//! Matrix products with a frozen weight that was laid out at load for this.
//!
//! A blocked GEMM packs the weight at every call, which costs as much as the product when there are few rows; a weight
//! read as it lies, a few columns of every row at a time, defeats the prefetcher. So the weight is kept in panels of
//! [`PANEL`] columns, each a contiguous `[k, PANEL]`: every kernel here, for one row or for thousands, forward or
//! backward, streams them from front to end. Where a panel is kept in fewer bits ([`Quantized`]), its blocks are expanded
//! one by one into the first level, and the same kernels go on from there. Panels of bf16 ([`Bf16`]) have kernels of their own
//! for the forward.

mod activations;
mod backward;
mod bf16;
mod forward;
mod halves;
mod rows;

use std::{borrow::Cow, mem::MaybeUninit, ops::Range};

use pulp::Arch;
use rayon::prelude::*;

use super::{LINE, memory::huge_pages, prefetch, quantized::Quantized, team::each};
pub(super) use activations::activations;
pub use activations::{Activations, with_activations};
pub(super) use backward::product_t;
pub(super) use bf16::Bf16;
use forward::Forward;
use halves::Factor;
#[cfg(test)]
pub(crate) use halves::asked;
pub use halves::{Halves, in_step, permitting};
use rows::Output;

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

    /// Whether [`Self::multiply`] rounds activations, which it then does for any number of rows.
    fn rounds(self) -> bool {
        false
    }

    /// `x [m, k] W + bias` -> `out [m, n]`, all of which is written. Each row's numbers are the same in any company.
    fn multiply(self, x: &[f32], bias: Option<&[f32]>, (m, k, n): (usize, usize, usize), out: &mut [MaybeUninit<f32>]) {
        let run = |x: &[f32], out: Output<'_>| Arch::new().dispatch(Forward { x, w: self, bias, k, out });
        rows::share_out(x, (m, k, n), out, |x| blocked(x, k), run);
    }
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
    assert_eq!(x.len(), m * k, "rows of a product"); // what is not computed would not be written
    let mut data = Vec::with_capacity(m * n);
    let all = &mut data.spare_capacity_mut()[..m * n];
    // where few rows are rounded, many are too: a row's numbers are the same in any company
    if halves::takes(m, k, n) && !w.rounds() {
        halves::product(x, (w, Factor::Straight), bias, (k, n), all);
    } else {
        w.multiply(x, bias, (m, k, n), all);
    }
    // SAFETY: either has written all of them
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

/// Asks memory for a panel's row that will be read soon.
#[inline(always)]
fn prefetch_row(w: &[f32], row: usize) {
    for line in 0..LINES {
        prefetch::<false, _>(w, row * PANEL + line * LINE);
    }
}

#[cfg(test)]
mod tests;
