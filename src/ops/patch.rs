//! Patches of many deltas at one site, applied in place to the rows of a step.
//!
//! The fast form of what `delta::Patch::apply` defines; only for rows that need no gradient.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Storage, Tensor, bail};

use super::{f32_slice, math::dot, norm::norm_row, par_rows, vectorized};

/// One operation on the rows of one delta.
#[derive(Debug, Clone, Copy)]
pub enum PatchRows<'a> {
    /// `out += scale * (x A^T) B`; `a` `[rank, in]`, `b` `[rank, out]`.
    LowRank {
        /// `[rank, in]`.
        a: &'a Tensor,
        /// `[rank, out]`.
        b: &'a Tensor,
        /// Multiplies the update.
        scale: f32,
    },
    /// `out += b`, `[out]`.
    Bias(&'a Tensor),
    /// `out *= s`, `[out]`.
    Scale(&'a Tensor),
    /// `out = normalised(x) * gain + bias`: a norm's affine map replaced.
    Affine {
        /// `[hidden]`.
        gain: &'a Tensor,
        /// `[hidden]`.
        bias: Option<&'a Tensor>,
        /// Whether the mean is subtracted.
        center: bool,
        /// Added to the variance.
        eps: f32,
    },
}

impl<'a> PatchRows<'a> {
    fn tensors(&self) -> [Option<&'a Tensor>; 2] {
        match *self {
            Self::LowRank { a, b, .. } => [Some(a), Some(b)],
            Self::Bias(t) | Self::Scale(t) => [Some(t), None],
            Self::Affine { gain, bias, .. } => [Some(gain), bias],
        }
    }
}

/// What one delta does at one site, and to which rows.
#[derive(Debug, Clone)]
pub struct SitePatches<'a> {
    /// Row ranges of the delta.
    pub rows: &'a [Range<usize>],
    /// Its operations, in order.
    pub ops: Vec<PatchRows<'a>>,
}

/// The operations of one delta with their numbers at hand.
enum Op<'a> {
    LowRank { a: &'a [f32], b: &'a [f32], scale: f32, rank: usize },
    Bias(&'a [f32]),
    Scale(&'a [f32]),
    Affine { gain: &'a [f32], bias: Option<&'a [f32]>, center: bool, eps: f32 },
}

struct PatchInPlace<'a> {
    columns: Range<usize>,
    groups: &'a [SitePatches<'a>],
}

impl InplaceOp2 for PatchInPlace<'_> {
    fn name(&self) -> &'static str {
        "patch-in-place"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        let (rows, width) = out_l.shape().dims2()?;
        let in_dim = x_l.shape().dims2()?.1;
        let x = f32_slice(x, x_l)?;
        let CpuStorage::F32(out) = out else { bail!("patch: the output is not f32") };
        let Some((from, to)) = out_l.contiguous_offsets() else { bail!("patch: the output is not contiguous") };
        let out = &mut out[from..to];

        // Storages stay locked (shared) while their numbers are in use.
        let guards: Vec<_> = self
            .groups
            .iter()
            .flat_map(|g| g.ops.iter().flat_map(PatchRows::tensors).flatten())
            .map(Tensor::storage_and_layout)
            .collect();
        let mut slices = Vec::with_capacity(guards.len());
        for (storage, layout) in &guards {
            let Storage::Cpu(cpu) = &**storage else { bail!("patch: a delta is on another device") };
            slices.push(f32_slice(cpu, layout)?);
        }
        let mut slices = slices.into_iter();
        let mut next = || slices.next().ok_or_else(|| candle_core::Error::Msg("patch: tensor missing".into()));
        let n = self.columns.len();
        let mut groups = Vec::with_capacity(self.groups.len());
        for group in self.groups {
            let mut ops = Vec::with_capacity(group.ops.len());
            for op in &group.ops {
                ops.push(match *op {
                    PatchRows::LowRank { scale, .. } => {
                        let (a, b) = (next()?, next()?);
                        let rank = a.len() / in_dim.max(1);
                        if a.len() != rank * in_dim || b.len() != rank * n {
                            bail!("patch: low-rank factors do not fit {in_dim} -> {n}");
                        }
                        Op::LowRank { a, b, scale, rank }
                    }
                    PatchRows::Bias(_) => Op::Bias(checked(next()?, n)?),
                    PatchRows::Scale(_) => Op::Scale(checked(next()?, n)?),
                    PatchRows::Affine { bias, center, eps, .. } => {
                        let gain = checked(next()?, n)?;
                        let bias = bias.map(|_| checked(next()?, n)).transpose()?;
                        if in_dim != n {
                            bail!("patch: a norm maps {in_dim} -> {n}");
                        }
                        Op::Affine { gain, bias, center, eps }
                    }
                });
            }
            groups.push(ops);
        }

        let mut row_group = vec![usize::MAX; rows];
        let mut cost = 0;
        for (i, group) in self.groups.iter().enumerate() {
            for range in group.rows {
                row_group[range.clone()].fill(i);
                cost += range.len() * groups[i].iter().map(|op| op.cost(in_dim, n)).sum::<usize>();
            }
        }
        let columns = self.columns.clone();
        let run = |row: usize, out: &mut [f32]| {
            if let Some(ops) = groups.get(row_group[row]) {
                let x = &x[row * in_dim..(row + 1) * in_dim];
                let out = &mut out[columns.clone()];
                vectorized(
                    #[inline(always)]
                    || {
                        // plain loops: an iterator's `for_each` is not inlined here and would lose the vector unit
                        for op in ops {
                            op.apply(x, out);
                        }
                    },
                );
            }
        };
        par_rows(out, width, cost / rows.max(1), |first, out| {
            out.chunks_exact_mut(width).enumerate().for_each(|(i, out)| run(first + i, out));
        });
        Ok(())
    }
}

fn checked(t: &[f32], n: usize) -> Result<&[f32]> {
    if t.len() == n { Ok(t) } else { bail!("patch: {} numbers for {n} columns", t.len()) }
}

impl Op<'_> {
    fn cost(&self, in_dim: usize, n: usize) -> usize {
        match self {
            Self::LowRank { rank, .. } => rank * (in_dim + n),
            Self::Bias(_) | Self::Scale(_) => n,
            Self::Affine { .. } => 3 * n,
        }
    }

    #[inline(always)]
    fn apply(&self, x: &[f32], out: &mut [f32]) {
        match self {
            Self::LowRank { a, b, scale, rank } => {
                let mut low = [0f32; 8];
                let mut done = 0;
                // eight ranks at a time: `out` is read and written once per eight
                while done < *rank {
                    let take = (*rank - done).min(8);
                    for (j, l) in low.iter_mut().enumerate().take(take) {
                        let a = &a[(done + j) * x.len()..(done + j + 1) * x.len()];
                        *l = dot(a, x) * scale;
                    }
                    let n = out.len();
                    let b = &b[done * n..(done + take) * n];
                    if take == 8 {
                        let rows: [&[f32]; 8] = std::array::from_fn(|j| &b[j * n..(j + 1) * n]);
                        for (i, o) in out.iter_mut().enumerate() {
                            let mut v = *o;
                            for j in 0..8 {
                                v = rows[j][i].mul_add(low[j], v);
                            }
                            *o = v;
                        }
                    } else {
                        for (l, b) in low.iter().zip(b.chunks_exact(n)) {
                            for (o, b) in out.iter_mut().zip(b) {
                                *o = b.mul_add(*l, *o);
                            }
                        }
                    }
                    done += take;
                }
            }
            Self::Bias(b) => {
                for (o, b) in out.iter_mut().zip(*b) {
                    *o += b;
                }
            }
            Self::Scale(s) => {
                for (o, s) in out.iter_mut().zip(*s) {
                    *o *= s;
                }
            }
            Self::Affine { gain, bias, center, eps } => norm_row(x, gain, *bias, *center, *eps, out),
        }
    }
}

/// Applies the groups' operations to `columns` of `out` `[rows, width]`, given the site's input `x` `[rows, in]`.
///
/// `out` must own its storage (it is written in place) and need no gradient; both are f32 on the CPU.
///
/// # Errors
/// Shapes that do not fit.
pub fn patch_in_place(out: &Tensor, columns: Range<usize>, x: &Tensor, groups: &[SitePatches<'_>]) -> Result<()> {
    let (rows, width) = out.dims2()?;
    if x.dim(0)? != rows || columns.end > width || groups.iter().any(|g| g.rows.iter().any(|r| r.end > rows)) {
        bail!("patch: rows or columns outside {:?}", out.shape());
    }
    out.inplace_op2(x, &PatchInPlace { columns, groups })
}

struct AddBlock {
    row: usize,
    column: usize,
}

impl InplaceOp2 for AddBlock {
    fn name(&self) -> &'static str {
        "add-block"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, block: &CpuStorage, block_l: &Layout) -> Result<()> {
        let width = out_l.shape().dims2()?.1;
        let columns = block_l.shape().dims2()?.1;
        let block = f32_slice(block, block_l)?;
        let CpuStorage::F32(out) = out else { bail!("add-block: the output is not f32") };
        let Some((from, to)) = out_l.contiguous_offsets() else { bail!("add-block: the output is not contiguous") };
        let rows = out[from..to].chunks_exact_mut(width).skip(self.row);
        for (out, add) in rows.zip(block.chunks_exact(columns)) {
            out[self.column..self.column + columns].iter_mut().zip(add).for_each(|(o, a)| *o += a);
        }
        Ok(())
    }
}

/// `out[row.., column..] += block`, in place.
///
/// # Errors
/// A block that does not fit.
pub fn add_block_in_place(out: &Tensor, row: usize, column: usize, block: &Tensor) -> Result<()> {
    let ((rows, width), (n, columns)) = (out.dims2()?, block.dims2()?);
    if row + n > rows || column + columns > width {
        bail!("add-block: {n}x{columns} at {row},{column} of {rows}x{width}");
    }
    out.inplace_op2(&block.contiguous()?, &AddBlock { row, column })
}
