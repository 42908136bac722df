//! A frozen linear, what is trained on it (low-rank updates and biases), and what follows it (an activation, a residual
//! sum), as one op with a backward of its own.
//!
//! As separate ops of a graph, every update keeps its product, its scaled product and a sum, each as wide as the output,
//! until the backward; a linear's own output is kept, too, though nobody reads it again. In the backward candle adds each
//! gradient to zeros, so that every op costs two more passes over memory for each of its arguments. Here one output is made.

mod low_rank;

use std::{ops::Range, sync::OnceLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use self::low_rank::{Rows, add_product, outer_sums, project};
use super::{
    Act, Weight, activate, activation::mul_grad, columns::column_sums_of, cpu_result, f32_slice, is_cpu_f32, par_rows,
    vectorized, with_f32,
};

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

/// One low-rank update's place: its columns, its ranks within all ranks, and where its factors begin in the vector.
#[derive(Debug, Clone)]
struct Place {
    columns: Range<usize>,
    ranks: Range<usize>,
    scale: f32,
    /// Of `A`, behind which `B` lies.
    at: usize,
}

impl Place {
    fn a(&self, in_dim: usize) -> Range<usize> {
        self.at..self.at + self.ranks.len() * in_dim
    }

    fn b(&self, in_dim: usize) -> Range<usize> {
        let from = self.a(in_dim).end;
        from..from + self.ranks.len() * self.columns.len()
    }
}

/// Arguments: `x` `[rows, in]`; where something is trained, one vector of all factors, `A` before `B`, and behind them a
/// bias `[out]` if there is one; and the residual `[rows, out]`, if any.
struct UpdatedLinear {
    weight: Weight,
    /// The base's own.
    bias: Option<Tensor>,
    places: Vec<Place>,
    ranks: usize,
    /// Numbers of the vector.
    numbers: usize,
    /// Where the trained bias begins in the vector.
    trained_bias: Option<usize>,
    act: Option<Act>,
    /// What the forward leaves for the backward.
    kept: OnceLock<Kept>,
}

#[derive(Default)]
struct Kept {
    /// All `scale * x A^T` side by side, `[rows, ranks]`.
    low: Vec<f32>,
    /// What the activation was given, `[rows, out]`; empty without one.
    before: Vec<f32>,
}

/// Whether [`updated_linear`] takes these: f32 on the CPU, a frozen weight in panels.
pub fn takes_updates(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    updates: &[Update<'_>],
    ending: Ending<'_>,
) -> bool {
    weight.has_kernels()
        && is_cpu_f32(x)
        && bias.is_none_or(|b| is_cpu_f32(b) && !b.track_op())
        && updates.iter().flat_map(Update::tensors).all(is_cpu_f32)
        && ending.residual.is_none_or(is_cpu_f32)
}

/// `act(x W + b + updates) + residual`: `[rows, in]` -> `[rows, out]`. Gradients go to `x`, to the updates' tensors and to the
/// residual.
///
/// # Errors
/// Shapes that do not fit; what [`takes_updates`] does not take.
pub fn updated_linear(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    updates: &[Update<'_>],
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
    let (mut vector, mut places) = (Vec::new(), Vec::new());
    let (mut ranks, mut at) = (0, 0);
    for update in updates {
        for (a, b, scale) in &update.low {
            let (rank, n) = b.dims2()?;
            if a.dims2()? != (rank, in_dim) || n != update.columns.len() || update.columns.end > out_dim {
                bail!("linear: factors {:?} and {:?} do not fit {in_dim} -> {n}", a.shape(), b.shape());
            }
            vector.extend([a.flatten_all()?, b.flatten_all()?]);
            let (columns, scale) = (update.columns.clone(), *scale as f32);
            let place = Place { columns, ranks: ranks..ranks + rank, scale, at };
            (ranks, at) = (ranks + rank, place.b(in_dim).end);
            places.push(place);
        }
    }
    let trained_bias = joined_bias(updates, out_dim)?;
    let begin = trained_bias.is_some().then_some(at);
    at += trained_bias.as_ref().map_or(0, Tensor::elem_count);
    vector.extend(trained_bias);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let op = UpdatedLinear {
        weight: weight.clone(),
        bias,
        places,
        ranks,
        numbers: at,
        trained_bias: begin,
        act: ending.act,
        kept: OnceLock::new(),
    };
    let vector = if vector.len() > 1 { Some(Tensor::cat(&vector, 0)?) } else { vector.pop() };
    let residual = ending.residual.map(Tensor::contiguous).transpose()?;
    match (vector, residual) {
        (None, None) => x.apply_op1(op),
        (Some(other), None) | (None, Some(other)) => x.apply_op2(&other, op),
        (Some(vector), Some(residual)) => x.apply_op3(&vector, &residual, op),
    }
}

/// The updates' biases over all columns, `[out]`.
fn joined_bias(updates: &[Update<'_>], out_dim: usize) -> Result<Option<Tensor>> {
    let mut pieces: Vec<Tensor> = Vec::new();
    let mut end = 0;
    for update in updates.iter().filter(|u| !u.bias.is_empty()) {
        let [first, more @ ..] = update.bias.as_slice() else { continue };
        let mut sum = (*first).clone();
        for b in more {
            sum = (sum + *b)?;
        }
        if sum.dims1()? != update.columns.len() || update.columns.start < end {
            bail!("linear: a bias {:?} for columns {:?}", sum.shape(), update.columns);
        }
        if update.columns.start > end {
            pieces.push(Tensor::zeros(update.columns.start - end, sum.dtype(), sum.device())?);
        }
        end = update.columns.end;
        pieces.push(sum);
    }
    let Some(first) = pieces.first() else { return Ok(None) };
    if end < out_dim {
        pieces.push(Tensor::zeros(out_dim - end, first.dtype(), first.device())?);
    }
    if pieces.len() == 1 { Ok(pieces.pop()) } else { Tensor::cat(&pieces, 0).map(Some) }
}

/// Gradients of `x`, of the vector and of the residual.
type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl UpdatedLinear {
    /// Whether the second of two arguments is the vector.
    fn has_vector(&self) -> bool {
        self.numbers > 0
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
        let trained = self.trained_bias.map(|at| &vector[at..at + n]);
        let own = self.bias.as_ref().map(|own| with_f32(own, |own| Ok(own.to_vec()))).transpose()?;
        let bias = match (own, trained) {
            (Some(mut own), Some(more)) => {
                own.iter_mut().zip(more).for_each(|(a, b)| *a += b);
                Some(own)
            }
            (own, more) => own.or(more.map(<[f32]>::to_vec)),
        };
        let mut out = self.weight.kernel_product(x, bias.as_deref(), rows)?;
        let mut kept = Kept::default();
        if self.ranks > 0 {
            kept.low = vec![0f32; rows * self.ranks];
            for p in &self.places {
                project(Rows::of(x, k), &vector[p.a(k)], p.scale, (&mut kept.low, self.ranks, p.ranks.clone()));
            }
        }
        let fused_residual = residual.filter(|_| self.act.is_none());
        if self.ranks > 0 || fused_residual.is_some() {
            let cost = n + self.places.iter().map(|p| p.b(k).len()).sum::<usize>();
            let low = &kept.low;
            par_rows(&mut out, n, cost, |first, out| {
                for (i, out) in out.chunks_exact_mut(n).enumerate() {
                    let row = first + i;
                    let low = &low[row * self.ranks..(row + 1) * self.ranks];
                    vectorized(
                        #[inline(always)]
                        || {
                            for p in &self.places {
                                add_product(&low[p.ranks.clone()], &vector[p.b(k)], &mut out[p.columns.clone()]);
                            }
                            if let Some(residual) = fused_residual {
                                out.iter_mut().zip(&residual[row * n..(row + 1) * n]).for_each(|(o, r)| *o += r);
                            }
                        },
                    );
                }
            });
        }
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
                    with_f32(x, |x| self.factors_backward((x, k), vector, (grad, &kept.low), gx.as_mut()))
                })?),
                None => None,
            };
            let gx = gx.map(|gx| Tensor::from_vec(gx, (rows, k), device)).transpose()?;
            let gvector = gvector.map(|g| Tensor::from_vec(g, self.numbers, device)).transpose()?;
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
    ) -> Result<Vec<f32>> {
        let n = self.weight.out_dim();
        let rows = grad.len() / n.max(1);
        let mut out = vec![0f32; self.numbers];
        // scale * g B^T, [rows, ranks]
        let mut glow = vec![0f32; rows * self.ranks];
        for p in &self.places {
            let g = Rows::of(grad, n).narrowed(p.columns.clone());
            project(g.clone(), &vector[p.b(k)], p.scale, (&mut glow, self.ranks, p.ranks.clone()));
            outer_sums((&glow, self.ranks, p.ranks.clone()), Rows::of(x, k), &mut out[p.a(k)]);
            outer_sums((low, self.ranks, p.ranks.clone()), g, &mut out[p.b(k)]);
        }
        if let Some(gx) = gx.filter(|_| self.ranks > 0) {
            par_rows(gx, k, self.ranks * k, |first, out| {
                for (i, out) in out.chunks_exact_mut(k).enumerate() {
                    let glow = &glow[(first + i) * self.ranks..(first + i + 1) * self.ranks];
                    vectorized(
                        #[inline(always)]
                        || {
                            for p in &self.places {
                                add_product(&glow[p.ranks.clone()], &vector[p.a(k)], out);
                            }
                        },
                    );
                }
            });
        }
        if let Some(at) = self.trained_bias {
            out[at..at + n].copy_from_slice(&column_sums_of(grad, n));
        }
        Ok(out)
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
mod tests;
