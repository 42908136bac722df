//! Bottleneck adapters of many deltas at one sublayer, applied in place to the rows of a step: the row kernel.
//!
//! The fast form of what `delta::Bottleneck::apply` defines; only for rows that need no gradient, and for adapters
//! without norms of their own. Ranks and activations differ between deltas.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

use super::{Act, f32_slice, math::dot, par_rows, vectorized};

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

    /// One row; `low` and `sum` are scratch.
    fn apply(&self, row: usize, h: &mut [f32], low: &mut Vec<f32>, sum: &mut Vec<f32>) {
        let n = h.len();
        let at = row * n..(row + 1) * n;
        low.clear();
        {
            let x: &[f32] = self.input.map_or(&*h, |t| &t[at.clone()]);
            vectorized(
                #[inline(always)]
                || {
                    for (d, b) in self.down.chunks_exact(n).zip(self.down_bias) {
                        low.push(dot(d, x) + b);
                    }
                },
            );
        }
        let before = low.clone();
        self.act.map(&before, low);
        sum.clear();
        sum.extend_from_slice(self.up_bias);
        vectorized(
            #[inline(always)]
            || {
                for (v, u) in low.iter().zip(self.up.chunks_exact(n)) {
                    for (s, u) in sum.iter_mut().zip(u) {
                        *s = u.mul_add(*v, *s);
                    }
                }
                match self.scale {
                    Some([one]) => sum.iter_mut().for_each(|s| *s *= one),
                    Some(all) => sum.iter_mut().zip(all).for_each(|(s, f)| *s *= f),
                    None => sum.iter_mut().for_each(|s| *s *= self.fixed),
                }
                if let Some(r) = self.residual {
                    h.copy_from_slice(&r[at]);
                }
                for (h, s) in h.iter_mut().zip(sum.iter()) {
                    *h += s;
                }
            },
        );
    }
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
        let mut row_group = vec![usize::MAX; rows];
        let mut groups = Vec::with_capacity(self.0.len());
        for (i, g) in self.0.iter().enumerate() {
            let numbers = numbers(g, &mut slices)?;
            numbers.check(rows, width)?;
            groups.push(numbers);
            g.rows.iter().for_each(|r| row_group[r.clone()].fill(i));
        }
        let cost = self.0.iter().map(|g| 2 * g.down.elem_count()).max().unwrap_or(0);
        par_rows(h, width, cost, |first, h| {
            let (mut low, mut sum) = (Vec::new(), Vec::new());
            for (row, h) in h.chunks_exact_mut(width).enumerate().map(|(i, h)| (first + i, h)) {
                if let Some(group) = groups.get(row_group[row]) {
                    group.apply(row, h, &mut low, &mut sum);
                }
            }
        });
        Ok(())
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
