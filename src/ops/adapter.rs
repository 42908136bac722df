//! Bottleneck adapters of many deltas at one sublayer, applied in place to the rows of a step: the row kernel.
//!
//! The fast form of what `delta::Bottleneck::apply` defines; only for rows that need no gradient, and for adapters
//! without norms of their own. Ranks and activations differ between deltas. What a row comes to does not depend on the rows beside
//! it: see [`super::low_rank`].

use std::{cell::Cell, ops::Range};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

use super::{
    Act, f32_slice,
    low_rank::{Rows, expand, shrink},
    runs::{Piece, share_rows},
    vectorized,
};

/// The factor of an adapter's result.
#[derive(Debug, Clone, Copy)]
pub enum RowScale<'a> {
    /// A number.
    Fixed(f32),
    /// `[1]` or `[hidden]`.
    Tensor(&'a Tensor),
}

/// One delta's adapter and the rows it is for: `h = residual + scale * (act(input down^T + down_bias) up + up_bias)`.
#[derive(Debug, Clone)]
pub struct AdapterRows<'a> {
    /// Row ranges of the delta.
    pub rows: &'a [Range<usize>],
    /// What it reads, `[rows, hidden]`; `None` = the row that is changed.
    pub input: Option<&'a Tensor>,
    /// What it adds to, `[rows, hidden]`; `None` = the row that is changed.
    pub residual: Option<&'a Tensor>,
    /// `[d, hidden]`.
    pub down: &'a Tensor,
    /// `[d]`.
    pub down_bias: &'a Tensor,
    /// `[d, hidden]`.
    pub up: &'a Tensor,
    /// `[hidden]`.
    pub up_bias: &'a Tensor,
    /// The nonlinearity.
    pub act: Act,
    /// The factor.
    pub scale: RowScale<'a>,
}

/// The tensors of a group, in the order of [`Numbers`].
fn tensors<'a>(g: &AdapterRows<'a>) -> [Option<&'a Tensor>; 7] {
    let scale = match g.scale {
        RowScale::Tensor(t) => Some(t),
        RowScale::Fixed(_) => None,
    };
    [g.input, g.residual, Some(g.down), Some(g.down_bias), Some(g.up), Some(g.up_bias), scale]
}

/// A group with its numbers at hand.
struct Numbers<'a> {
    input: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
    down: &'a [f32],
    down_bias: &'a [f32],
    up: &'a [f32],
    up_bias: &'a [f32],
    act: Act,
    fixed: f32,
    scale: Option<&'a [f32]>,
}

impl Numbers<'_> {
    fn check(&self, rows: usize, width: usize) -> Result<()> {
        let d = self.down_bias.len();
        let whole = |s: Option<&[f32]>| s.is_none_or(|s| s.len() == rows * width);
        let scale = self.scale.is_none_or(|s| s.len() == 1 || s.len() == width);
        if self.down.len() != d * width || self.up.len() != d * width || self.up_bias.len() != width || !scale {
            bail!("adapter: factors of {} and {} numbers do not fit {d} x {width}", self.down.len(), self.up.len());
        }
        if !whole(self.input) || !whole(self.residual) {
            bail!("adapter: its input does not have {rows} rows of {width}");
        }
        Ok(())
    }

    /// Rows of `h`, `[rows, width]`, the first of which is row `first`.
    fn apply(&self, first: usize, h: &mut [f32], width: usize, scratch: &mut Scratch) {
        let (rows, d) = (h.len() / width, self.down_bias.len());
        let Scratch { low, before, sum } = scratch;
        for (scratch, len) in [(&mut *low, rows * d), (&mut *before, rows * d), (&mut *sum, rows * width)] {
            scratch.resize(len.max(scratch.len()), 0.0);
        }
        let (low, before, sum) = (&mut low[..rows * d], &mut before[..rows * d], &mut sum[..rows * width]);
        {
            let x = self.input.map_or((Rows::of(h, width), 0), |t| (Rows::of(t, width), first));
            shrink(x, (self.down, self.up), 1.0, (&mut *before, d, 0..d));
        }
        vectorized(
            #[inline(always)]
            || {
                for before in before.chunks_exact_mut(d.max(1)) {
                    for (v, b) in before.iter_mut().zip(self.down_bias) {
                        *v += b;
                    }
                }
            },
        );
        self.act.map(before, low);
        sum.chunks_exact_mut(width).for_each(|sum| sum.copy_from_slice(self.up_bias));
        expand((low, d.max(1), 0..d), (self.up, &[]), (&mut *sum, width, 0..width));
        let all = h.chunks_exact_mut(width).zip(sum.chunks_exact_mut(width)).zip(first..);
        vectorized(
            #[inline(always)]
            || {
                for ((h, sum), row) in all {
                    match self.scale {
                        Some([one]) => sum.iter_mut().for_each(|s| *s *= one),
                        Some(all) => sum.iter_mut().zip(all).for_each(|(s, f)| *s *= f),
                        None => sum.iter_mut().for_each(|s| *s *= self.fixed),
                    }
                    if let Some(r) = self.residual {
                        h.copy_from_slice(&r[row * width..(row + 1) * width]);
                    }
                    for (h, s) in h.iter_mut().zip(sum.iter()) {
                        *h += s;
                    }
                }
            },
        );
    }
}

/// Numbers between the steps of an adapter.
#[derive(Default)]
struct Scratch {
    low: Vec<f32>,
    before: Vec<f32>,
    sum: Vec<f32>,
}

thread_local! {
    /// Kept for the next.
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch { low: Vec::new(), before: Vec::new(), sum: Vec::new() }) };
}

struct AdaptInPlace<'a>(&'a [AdapterRows<'a>]);

impl InplaceOp1 for AdaptInPlace<'_> {
    fn name(&self) -> &'static str {
        "adapt-in-place"
    }

    fn cpu_fwd(&self, h: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (rows, width) = layout.shape().dims2()?;
        let CpuStorage::F32(h) = h else { bail!("adapter: the output is not f32") };
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("adapter: the output is not contiguous") };
        let h = &mut h[from..to];
        // Storages stay locked (shared) while their numbers are in use.
        let guards: Vec<_> =
            self.0.iter().flat_map(|g| tensors(g).into_iter().flatten()).map(Tensor::storage_and_layout).collect();
        let mut slices = Vec::with_capacity(guards.len());
        for (storage, layout) in &guards {
            let Storage::Cpu(cpu) = &**storage else { bail!("adapter: a delta is on another device") };
            slices.push(f32_slice(cpu, layout)?);
        }
        let mut slices = slices.into_iter();
        let mut groups = Vec::with_capacity(self.0.len());
        for g in self.0 {
            let numbers = numbers(g, &mut slices)?;
            numbers.check(rows, width)?;
            groups.push(numbers);
        }
        let owners = self.0.iter().map(|g| (g.rows, 2 * g.down.elem_count()));
        share_rows(h, width, owners, |pieces| {
            let mut scratch = SCRATCH.take();
            for Piece { owner, rows, out } in pieces {
                groups[owner].apply(rows.start, out, width, &mut scratch);
            }
            SCRATCH.set(scratch);
        })
    }
}

fn numbers<'a>(g: &AdapterRows<'_>, slices: &mut impl Iterator<Item = &'a [f32]>) -> Result<Numbers<'a>> {
    let mut all: [Option<&[f32]>; 7] = [None; 7];
    for (place, tensor) in all.iter_mut().zip(tensors(g)) {
        if tensor.is_some() {
            *place = slices.next();
        }
    }
    let [input, residual, Some(down), Some(down_bias), Some(up), Some(up_bias), scale] = all else {
        bail!("adapter: a tensor is missing")
    };
    let fixed = if let RowScale::Fixed(s) = g.scale { s } else { 1.0 };
    Ok(Numbers { input, residual, down, down_bias, up, up_bias, act: g.act, fixed, scale })
}

/// Applies the groups' adapters to their rows of `h` `[rows, hidden]`.
///
/// `h` must own its storage (it is written in place) and need no gradient; all tensors are contiguous f32 on the CPU.
///
/// # Errors
/// Shapes that do not fit.
pub fn adapt_in_place(h: &Tensor, groups: &[AdapterRows<'_>]) -> Result<()> {
    let rows = h.dims2()?.0;
    if groups.iter().any(|g| g.rows.iter().any(|r| r.end > rows)) {
        bail!("adapter: rows outside {:?}", h.shape());
    }
    if groups.is_empty() {
        return Ok(());
    }
    h.inplace_op1(&AdaptInPlace(groups))
}
