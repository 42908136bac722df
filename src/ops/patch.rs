//! Patches of many deltas at the sites of one matrix, applied in place to the rows of a step.
//!
//! The fast form of what `delta::Patch::apply` defines; only for rows that need no gradient. What a row comes to does not depend
//! on the rows beside it: see [`super::low_rank`].

use std::{cell::Cell, ops::Range};

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Storage, Tensor, bail};

use super::{
    f32_slice,
    low_rank::{Rows, expand, shrink},
    norm::norm_row,
    runs::{Piece, share_rows},
    vectorized,
};

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

/// What one delta does at the sites of a matrix, and to which rows.
#[derive(Debug, Clone)]
pub struct SitePatches<'a> {
    /// Row ranges of the delta, apart from those of every other.
    pub rows: &'a [Range<usize>],
    /// The columns of a site, and the delta's operations there, in order.
    pub sites: Vec<(Range<usize>, Vec<PatchRows<'a>>)>,
}

/// An operation with its numbers at hand.
enum Op<'a> {
    LowRank { a: &'a [f32], b: &'a [f32], scale: f32, rank: usize },
    Bias(&'a [f32]),
    Scale(&'a [f32]),
    Affine { gain: &'a [f32], bias: Option<&'a [f32]>, center: bool, eps: f32 },
}

struct PatchInPlace<'a>(&'a [SitePatches<'a>]);

thread_local! {
    /// Small sides of updates, kept for the next.
    static LOW: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl InplaceOp2 for PatchInPlace<'_> {
    fn name(&self) -> &'static str {
        "patch-in-place"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        let width = out_l.shape().dims2()?.1;
        let in_dim = x_l.shape().dims2()?.1;
        let x = f32_slice(x, x_l)?;
        let CpuStorage::F32(out) = out else { bail!("patch: the output is not f32") };
        let Some((from, to)) = out_l.contiguous_offsets() else { bail!("patch: the output is not contiguous") };
        let out = &mut out[from..to];

        // Storages stay locked (shared) while their numbers are in use.
        let all = self.0.iter().flat_map(|g| &g.sites).flat_map(|(_, ops)| ops);
        let guards: Vec<_> = all.flat_map(PatchRows::tensors).flatten().map(Tensor::storage_and_layout).collect();
        let mut slices = Vec::with_capacity(guards.len());
        for (storage, layout) in &guards {
            let Storage::Cpu(cpu) = &**storage else { bail!("patch: a delta is on another device") };
            slices.push(f32_slice(cpu, layout)?);
        }
        let mut slices = slices.into_iter();
        // of each delta its operations, one after the other, with their columns
        let mut groups = Vec::with_capacity(self.0.len());
        for group in self.0 {
            let mut ops = Vec::with_capacity(group.sites.iter().map(|(_, ops)| ops.len()).sum());
            for (columns, own) in &group.sites {
                for op in own {
                    ops.push((columns.clone(), Op::of(op, &mut slices, (in_dim, columns.len()))?));
                }
            }
            groups.push(ops);
        }
        let cost = |ops: &[(Range<usize>, Op<'_>)]| ops.iter().map(|(n, op)| op.cost(in_dim, n.len())).sum::<usize>();
        let owners = self.0.iter().zip(&groups).map(|(group, ops)| (group.rows, cost(ops)));
        share_rows(out, width, owners, |pieces| {
            let mut low = LOW.take();
            let mut pieces = pieces.into_iter().peekable();
            while let Some(Piece { owner, rows, out }) = pieces.next() {
                let mut ops = groups[owner].iter();
                while let Some((columns, op)) = ops.next() {
                    // what will be read next
                    let later = pieces.peek().map_or(&[][..], |piece| &groups[piece.owner][..]);
                    let ahead = ops.as_slice().iter().chain(later).find_map(|(_, op)| op.first()).unwrap_or_default();
                    let x = (Rows::of(x, in_dim), rows.start);
                    op.apply(x, (&mut *out, width, columns.clone()), ahead, &mut low);
                }
            }
            LOW.set(low);
        })
    }
}

fn checked(t: &[f32], n: usize) -> Result<&[f32]> {
    if t.len() == n { Ok(t) } else { bail!("patch: {} numbers for {n} columns", t.len()) }
}

impl<'a> Op<'a> {
    /// With the next of the `slices`, those of all operations in order.
    fn of(
        op: &PatchRows<'_>,
        slices: &mut impl Iterator<Item = &'a [f32]>,
        (in_dim, n): (usize, usize),
    ) -> Result<Self> {
        let mut next = || slices.next().ok_or_else(|| candle_core::Error::Msg("patch: tensor missing".into()));
        match *op {
            PatchRows::LowRank { scale, .. } => {
                let (a, b) = (next()?, next()?);
                let rank = a.len() / in_dim.max(1);
                if a.len() != rank * in_dim || b.len() != rank * n {
                    bail!("patch: low-rank factors do not fit {in_dim} -> {n}");
                }
                Ok(Self::LowRank { a, b, scale, rank })
            }
            PatchRows::Bias(_) => Ok(Self::Bias(checked(next()?, n)?)),
            PatchRows::Scale(_) => Ok(Self::Scale(checked(next()?, n)?)),
            PatchRows::Affine { bias, center, eps, .. } => {
                let gain = checked(next()?, n)?;
                let bias = bias.map(|_| checked(next()?, n)).transpose()?;
                if in_dim != n {
                    bail!("patch: a norm maps {in_dim} -> {n}");
                }
                Ok(Self::Affine { gain, bias, center, eps })
            }
        }
    }

    fn cost(&self, in_dim: usize, n: usize) -> usize {
        match self {
            Self::LowRank { rank, .. } => rank * (in_dim + n),
            Self::Bias(_) | Self::Scale(_) => n,
            Self::Affine { .. } => 3 * n,
        }
    }

    /// The numbers that it reads first, where there are many.
    fn first(&self) -> Option<&'a [f32]> {
        if let Self::LowRank { a, .. } = self { Some(a) } else { None }
    }

    /// On `columns` of rows of `out` `[rows, width]`, of which `first` is the first one's of `x`. Memory is asked for `ahead`;
    /// `low` is scratch.
    fn apply(
        &self,
        (x, first): (Rows<'_>, usize),
        (out, width, columns): (&mut [f32], usize, Range<usize>),
        ahead: &[f32],
        low: &mut Vec<f32>,
    ) {
        if let Self::LowRank { a, b, scale, rank } = *self {
            low.resize(low.len().max(out.len() / width * rank), 0.0);
            let low = &mut low[..out.len() / width * rank];
            shrink((x, first), (a, b), scale, (&mut *low, rank, 0..rank));
            return expand((low, rank, 0..rank), (b, ahead), (out, width, columns));
        }
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            let (row, out) = (first + i, &mut out[columns.clone()]);
            vectorized(
                #[inline(always)]
                || match self {
                    Self::LowRank { .. } => {}
                    // plain loops: an iterator's `for_each` is not inlined here and would lose the vector unit
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
                    Self::Affine { gain, bias, center, eps } => norm_row(x.row(row), gain, *bias, *center, *eps, out),
                },
            );
        }
    }
}

/// Applies the groups' operations to rows of `out` `[rows, width]`, given the sites' input `x` `[rows, in]`. What a row comes to
/// is the same in any company.
///
/// `out` must own its storage (it is written in place) and need no gradient; both are f32 on the CPU.
///
/// # Errors
/// Shapes that do not fit; rows that two groups have.
pub fn patch_in_place(out: &Tensor, x: &Tensor, groups: &[SitePatches<'_>]) -> Result<()> {
    let (rows, width) = out.dims2()?;
    let outside = |g: &SitePatches<'_>| {
        g.rows.iter().any(|r| r.end > rows) || g.sites.iter().any(|(columns, _)| columns.end > width)
    };
    if x.dim(0)? != rows || groups.iter().any(outside) {
        bail!("patch: rows or columns outside {:?}", out.shape());
    }
    out.inplace_op2(x, &PatchInPlace(groups))
}
