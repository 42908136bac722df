//! A frozen linear, what is trained on it (low-rank updates and biases of one delta or of several, each on its own rows), and what
//! follows it (an activation, a residual sum), as one op with a backward of its own.
//!
//! As separate ops of a graph, every update keeps its product, its scaled product and a sum, each as wide as the output,
//! until the backward; a linear's own output is kept, too, though nobody reads it again. In the backward candle adds each
//! gradient to zeros, so that every op costs two more passes over memory for each of its arguments. Here one output is made.
//! An op has three arguments at most, so the factors and biases of all deltas are one vector, whose parts `Tensor::cat` gives
//! their gradients.

mod low_rank;
mod shares;

use std::{ops::Range, sync::OnceLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use self::{
    low_rank::{OuterSum, outer_sums},
    shares::{Piece, Share, Shares},
};
use super::{
    Act, Activations, Weight, activate,
    activation::mul_grad,
    columns::column_sums_of,
    cpu_result, cut, f32_slice, is_cpu_f32,
    low_rank::{Rows, expand, shrink},
    par_rows, share_out, vectorized, with_activations, with_f32,
};

/// What one delta adds to a frozen linear's output, and to which rows.
#[derive(Debug, Clone)]
pub struct RowUpdates<'a> {
    /// Its rows, apart from those of every other delta.
    pub rows: &'a [Range<usize>],
    /// What it adds to them.
    pub updates: Vec<Update<'a>>,
}

impl RowUpdates<'_> {
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.updates.iter().flat_map(Update::tensors)
    }
}

/// What is added to columns of a frozen linear's output.
#[derive(Debug, Clone)]
pub struct Update<'a> {
    /// The columns.
    pub columns: Range<usize>,
    /// `scale * (x A^T) B`: `(A [rank, in], B [rank, columns], scale)`; several add up.
    pub low: Vec<(&'a Tensor, &'a Tensor, f64)>,
    /// `[columns]`; several add up.
    pub bias: Vec<&'a Tensor>,
}

impl Update<'_> {
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.low.iter().flat_map(|(a, b, _)| [*a, *b]).chain(self.bias.iter().copied())
    }
}

/// What a linear's output goes through: the activation, then the sum with a residual.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ending<'a> {
    /// The activation.
    pub act: Option<Act>,
    /// `[rows, out]`.
    pub residual: Option<&'a Tensor>,
}

impl Ending<'_> {
    /// The ending of `y` `[rows, out]` by separate ops.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn apply(self, y: Tensor) -> Result<Tensor> {
        let y = match self.act {
            Some(act) => activate(&y, act)?,
            None => y,
        };
        self.residual.map_or(Ok(y.clone()), |residual| residual + y)
    }
}

/// Arguments: `x` `[rows, in]`; where something is trained, the one vector of it ([`Shares::of`]); and the residual
/// `[rows, out]`, if any.
struct UpdatedLinear {
    weight: Weight,
    /// The base's own.
    bias: Option<Tensor>,
    shares: Shares,
    act: Option<Act>,
    /// What the forward leaves for the backward.
    kept: OnceLock<Kept>,
}

#[derive(Default)]
struct Kept {
    /// `scale * x A^T` of each row with all pairs of its delta: [`Shares::lows`] numbers.
    low: Vec<f32>,
    /// What the activation was given, `[rows, out]`; empty without one.
    before: Vec<f32>,
}

/// Whether [`updated_linear`] takes these: f32 on the CPU, a frozen weight in panels.
pub fn takes_updates(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    updates: &[RowUpdates<'_>],
    ending: Ending<'_>,
) -> bool {
    weight.has_kernels()
        && is_cpu_f32(x)
        && bias.is_none_or(|b| is_cpu_f32(b) && !b.track_op())
        && updates.iter().flat_map(RowUpdates::tensors).all(is_cpu_f32)
        && ending.residual.is_none_or(is_cpu_f32)
}

/// `act(x W + b + updates) + residual`: `[rows, in]` -> `[rows, out]`; rows that are no delta's are the linear's own.
/// Gradients go to `x`, to the updates' tensors and to the residual. What a delta's rows add to the gradients of its tensors
/// does not depend on the other deltas.
///
/// # Errors
/// Shapes that do not fit, rows that two deltas have, or that are not there; what [`takes_updates`] does not take.
pub fn updated_linear(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    updates: &[RowUpdates<'_>],
    ending: Ending<'_>,
) -> Result<Tensor> {
    let (in_dim, out_dim) = (weight.in_dim(), weight.out_dim());
    let (rows, width) = x.dims2()?;
    if width != in_dim || bias.is_some_and(|b| b.elem_count() != out_dim) {
        bail!(
            "linear: input {:?} and bias {:?} for a weight {in_dim} -> {out_dim}",
            x.shape(),
            bias.map(Tensor::shape)
        );
    }
    if let Some(residual) = ending.residual
        && residual.dims2()? != (rows, out_dim)
    {
        bail!("linear: a residual {:?} for {rows} rows of {out_dim}", residual.shape());
    }
    let x = x.contiguous()?;
    let (shares, mut vector) = Shares::of(updates, (rows, in_dim, out_dim))?;
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let op = UpdatedLinear { weight: weight.clone(), bias, shares, act: ending.act, kept: OnceLock::new() };
    let vector = if vector.len() > 1 { Some(Tensor::cat(&vector, 0)?) } else { vector.pop() };
    let residual = ending.residual.map(Tensor::contiguous).transpose()?;
    let tracked = [Some(&x), vector.as_ref(), residual.as_ref()].into_iter().flatten().any(Tensor::track_op);
    let apply = || match (vector, residual) {
        (None, None) => x.apply_op1(op),
        (Some(other), None) | (None, Some(other)) => x.apply_op2(&other, op),
        (Some(vector), Some(residual)) => x.apply_op3(&vector, &residual, op),
    };
    // gradients are those of the dequantised matrix
    if tracked { with_activations(Activations::F32, apply) } else { apply() }
}

/// Adds a row of `more` to each row of `out`, all as wide as the first of `more`.
fn add_rows<'a>(out: &mut [f32], more: impl Iterator<Item = &'a [f32]>) {
    let mut more = more.peekable();
    let width = more.peek().map_or(1, |row| row.len().max(1));
    vectorized(
        #[inline(always)]
        || {
            for (out, more) in out.chunks_exact_mut(width).zip(more) {
                for (o, m) in out.iter_mut().zip(more) {
                    *o += m;
                }
            }
        },
    );
}

/// Gradients of `x`, of the vector and of the residual.
type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl UpdatedLinear {
    /// Whether the second of two arguments is the vector.
    fn has_vector(&self) -> bool {
        self.shares.numbers > 0
    }

    fn forward(
        &self,
        x: (&CpuStorage, &Layout),
        vector: &[f32],
        residual: Option<&[f32]>,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = x.1.shape().dims2()?;
        let n = self.weight.out_dim();
        let x = f32_slice(x.0, x.1)?;
        let own = self.bias.as_ref().map(|own| with_f32(own, |own| Ok(own.to_vec()))).transpose()?;
        // a bias of all rows is added with the base's
        let of_all = self.shares.whole().and_then(|share| share.bias).map(|at| &vector[at..at + n]);
        let bias = match (own, of_all) {
            (Some(mut own), Some(more)) => {
                own.iter_mut().zip(more).for_each(|(a, b)| *a += b);
                Some(own)
            }
            (own, more) => own.or(more.map(<[f32]>::to_vec)),
        };
        let mut out = self.weight.kernel_product(x, bias.as_deref(), rows)?;
        let low = self.add_updates((x, k), vector, residual.filter(|_| self.act.is_none()), &mut out);
        let mut kept = Kept { low, before: Vec::new() };
        if let Some(act) = self.act {
            let mut after = vec![0f32; out.len()];
            par_rows(&mut after, 1, 8, |at, after| {
                act.map(&out[at..at + after.len()], after);
                if let Some(residual) = residual {
                    after.iter_mut().zip(&residual[at..]).for_each(|(o, r)| *o += r);
                }
            });
            kept.before = std::mem::replace(&mut out, after);
        }
        // an op runs forward once
        let _ = self.kept.set(kept);
        cpu_result(out, (rows, n))
    }

    /// Adds to `out` `[rows, out]` what each delta adds to its rows, and the residual, if any. Returns the small sides:
    /// [`Kept::low`].
    fn add_updates(
        &self,
        (x, k): (&[f32], usize),
        vector: &[f32],
        residual: Option<&[f32]>,
        out: &mut [f32],
    ) -> Vec<f32> {
        let n = self.weight.out_dim();
        let by_row = self.shares.whole().is_none();
        let bias_of = |share: &Share| share.bias.filter(|_| by_row).map(|at| &vector[at..at + n]);
        let pieces = self.shares.pieces(|share| {
            let updates = share.map_or(0, |s| s.ranks * k + s.b_numbers() + bias_of(s).map_or(0, <[f32]>::len));
            let residual = residual.map_or(0, |_| n);
            updates + residual
        });
        let mut low = vec![0f32; self.shares.lows];
        let (mut lows, mut outs) = (low.as_mut_slice(), out);
        let mut parts = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let (rows, ranks) = (piece.rows.len(), piece.share.map_or(0, |s| s.ranks));
            let part = (cut(&mut lows, rows * ranks), cut(&mut outs, rows * n));
            if piece.work > 0 {
                parts.push((piece, part));
            }
        }
        let work = parts.iter().map(|(piece, _)| piece.work).sum();
        share_out(parts, work, |(Piece { rows, share, .. }, (low, out)): (Piece<'_>, (&mut [f32], &mut [f32]))| {
            let (places, ranks) = share.map_or((&[][..], 0), |s| (&s.places[..], s.ranks));
            for p in places {
                let x = (Rows::of(x, k), rows.start);
                shrink(x, (&vector[p.a(k)], &[]), p.scale, (&mut *low, ranks, p.ranks.clone()));
            }
            if let Some(bias) = share.and_then(bias_of) {
                add_rows(out, std::iter::repeat(bias));
            }
            for p in places {
                expand((low, ranks, p.ranks.clone()), (&vector[p.b(k)], &[]), (&mut *out, n, p.columns.clone()));
            }
            if let Some(residual) = residual {
                add_rows(out, residual[rows.start * n..rows.end * n].chunks_exact(n.max(1)));
            }
        });
        low
    }

    /// Gradients of `x`, if one is wanted, and of the vector.
    fn backward(&self, x: &Tensor, vector: Option<&Tensor>, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(kept) = self.kept.get() else { bail!("linear: a backward without its forward") };
        let (rows, k) = x.dims2()?;
        let device = x.device();
        with_f32(grad, |grad| {
            let through = self.act.map(|act| mul_grad(act, &kept.before, grad));
            let grad = through.as_deref().unwrap_or(grad); // [rows, out]
            let mut gx = if x.track_op() { Some(self.weight.kernel_product_t(grad, rows)?) } else { None };
            let gvector = match vector {
                Some(vector) => Some(with_f32(vector, |vector| {
                    with_f32(x, |x| Ok(self.factors_backward((x, k), vector, (grad, &kept.low), gx.as_mut())))
                })?),
                None => None,
            };
            let gx = gx.map(|gx| Tensor::from_vec(gx, (rows, k), device)).transpose()?;
            let gvector = gvector.map(|g| Tensor::from_vec(g, self.shares.numbers, device)).transpose()?;
            Ok((gx, gvector))
        })
    }

    /// The gradient of the vector; what the updates give to that of `x` is added to it.
    fn factors_backward(
        &self,
        (x, k): (&[f32], usize),
        vector: &[f32],
        (grad, low): (&[f32], &[f32]),
        gx: Option<&mut Vec<f32>>,
    ) -> Vec<f32> {
        let n = self.weight.out_dim();
        let glow = self.low_backward(grad, vector, k, gx.map(Vec::as_mut_slice));
        let mut sums = Vec::new();
        for Share { places, ranks, runs, .. } in &self.shares.all {
            for p in places {
                let g = Rows::of(grad, n).narrowed(p.columns.clone());
                let a = OuterSum {
                    runs,
                    low: &glow,
                    stride: *ranks,
                    ranks: p.ranks.clone(),
                    x: Rows::of(x, k),
                    out: p.a(k),
                };
                sums.extend([OuterSum { low, x: g, out: p.b(k), ..a.clone() }, a]);
            }
        }
        let mut out = vec![0f32; self.shares.numbers];
        outer_sums(&sums, &mut out);
        let (at, rows): (Vec<usize>, Vec<_>) =
            self.shares.all.iter().filter_map(|share| Some((share.bias?, share.rows()))).unzip();
        let sums = column_sums_of(grad, n, &rows);
        at.into_iter().zip(sums.chunks_exact(n.max(1))).for_each(|(at, sums)| out[at..at + n].copy_from_slice(sums));
        out
    }

    /// The gradients of the small sides, `scale * g B^T`; what they give to that of `x` `[rows, in]` is added to it.
    fn low_backward(&self, grad: &[f32], vector: &[f32], k: usize, mut gx: Option<&mut [f32]>) -> Vec<f32> {
        let n = self.weight.out_dim();
        let wanted = usize::from(gx.is_some());
        let pieces = self.shares.pieces(|share| share.map_or(0, |s| s.b_numbers() + wanted * s.ranks * k));
        let mut glow = vec![0f32; self.shares.lows];
        let mut glows = glow.as_mut_slice();
        let mut parts = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let (rows, ranks) = (piece.rows.len(), piece.share.map_or(0, |s| s.ranks));
            let part = (cut(&mut glows, rows * ranks), gx.as_mut().map(|gx| cut(gx, rows * k)));
            if ranks > 0 {
                parts.push((piece, part));
            }
        }
        let work = parts.iter().map(|(piece, _)| piece.work).sum();
        type Part<'a> = (Piece<'a>, (&'a mut [f32], Option<&'a mut [f32]>));
        share_out(parts, work, |(Piece { rows, share, .. }, (glow, gx)): Part<'_>| {
            let Some(Share { places, ranks, .. }) = share else { return };
            for p in places {
                let g = (Rows::of(grad, n).narrowed(p.columns.clone()), rows.start);
                shrink(g, (&vector[p.b(k)], &[]), p.scale, (&mut *glow, *ranks, p.ranks.clone()));
            }
            if let Some(gx) = gx {
                for p in places {
                    expand((glow, *ranks, p.ranks.clone()), (&vector[p.a(k)], &[]), (&mut *gx, k, 0..k));
                }
            }
        });
        glow
    }

    fn gradients(
        &self,
        x: &Tensor,
        vector: Option<&Tensor>,
        residual: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<Gradients> {
        let grad = grad.detach().contiguous()?;
        let (gx, gvector) = self.backward(x, vector, &grad)?;
        Ok((gx, gvector, residual.filter(|r| r.track_op()).map(|_| grad)))
    }
}

impl CustomOp1 for UpdatedLinear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward((x, x_l), &[], None)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.gradients(x, None, None, grad)?.0)
    }
}

impl CustomOp2 for UpdatedLinear {
    fn name(&self) -> &'static str {
        if self.has_vector() { "updated-linear" } else { "linear-and-residual" }
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        other: &CpuStorage,
        other_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let other = f32_slice(other, other_l)?;
        if self.has_vector() { self.forward((x, x_l), other, None) } else { self.forward((x, x_l), &[], Some(other)) }
    }

    fn bwd(&self, x: &Tensor, other: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if self.has_vector() {
            let (gx, gvector, _) = self.gradients(x, Some(other), None, grad)?;
            return Ok((gx, gvector));
        }
        let (gx, _, gresidual) = self.gradients(x, None, Some(other), grad)?;
        Ok((gx, gresidual))
    }
}

impl CustomOp3 for UpdatedLinear {
    fn name(&self) -> &'static str {
        "updated-linear-and-residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        vector: &CpuStorage,
        vector_l: &Layout,
        residual: &CpuStorage,
        residual_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((x, x_l), f32_slice(vector, vector_l)?, Some(f32_slice(residual, residual_l)?))
    }

    fn bwd(&self, x: &Tensor, vector: &Tensor, residual: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Gradients> {
        self.gradients(x, Some(vector), Some(residual), grad)
    }
}

#[cfg(test)]
mod range_tests;
#[cfg(test)]
mod tests;
