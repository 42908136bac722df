//! A frozen linear with trained low-rank updates and biases, as one op with a backward of its own.
//!
//! As separate ops of a graph, every update keeps its product, its scaled product and a sum, each as wide as the output,
//! until the backward; a linear's own output is kept, too, though nobody reads it again. Here one output is made.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::{Weight, cpu_result, f32_slice, is_cpu_f32, par_rows, vectorized, with_f32};

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

/// One low-rank update's place: its columns, its ranks within all ranks, and where its `B` begins.
#[derive(Debug, Clone)]
struct Place {
    columns: Range<usize>,
    ranks: Range<usize>,
    at: usize,
}

impl Place {
    fn numbers(&self) -> Range<usize> {
        self.at..self.at + self.ranks.len() * self.columns.len()
    }
}

/// Arguments: `x` `[rows, in]`, all `scale * x A^T` side by side `[rows, ranks]`, and one vector of all `B` and, behind
/// them, a bias `[out]` if there is one. Without ranks: `x` and the vector.
struct UpdatedLinear {
    weight: Weight,
    /// The base's own.
    bias: Option<Tensor>,
    places: Vec<Place>,
    ranks: usize,
    /// Where the trained bias begins in the vector.
    trained_bias: Option<usize>,
}

/// Whether [`updated_linear`] takes these: f32 on the CPU, a frozen weight in panels.
pub fn takes_updates(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, updates: &[Update<'_>]) -> bool {
    weight.has_kernels()
        && is_cpu_f32(x)
        && bias.is_none_or(|b| is_cpu_f32(b) && !b.track_op())
        && updates.iter().flat_map(Update::tensors).all(is_cpu_f32)
}

/// `x W + b` with the updates added: `[rows, in]` -> `[rows, out]`. Gradients go to `x` and to the updates' tensors.
///
/// # Errors
/// Shapes that do not fit; what [`takes_updates`] does not take.
pub fn updated_linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, updates: &[Update<'_>]) -> Result<Tensor> {
    let (in_dim, out_dim) = (weight.in_dim(), weight.out_dim());
    if x.dim(1)? != in_dim || bias.is_some_and(|b| b.elem_count() != out_dim) {
        bail!(
            "linear: input {:?} and bias {:?} for a weight {in_dim} -> {out_dim}",
            x.shape(),
            bias.map(Tensor::shape)
        );
    }
    let x = x.contiguous()?;
    let (mut lows, mut vector, mut places) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ranks, mut at) = (0, 0);
    for update in updates {
        for (a, b, scale) in &update.low {
            let (rank, n) = b.dims2()?;
            if a.dims2()? != (rank, in_dim) || n != update.columns.len() || update.columns.end > out_dim {
                bail!("linear: factors {:?} and {:?} do not fit {in_dim} -> {n}", a.shape(), b.shape());
            }
            lows.push((x.matmul(&a.t()?)? * *scale)?); // [rows, rank]
            vector.push(b.flatten_all()?);
            let place = Place { columns: update.columns.clone(), ranks: ranks..ranks + rank, at };
            (ranks, at) = (ranks + rank, place.numbers().end);
            places.push(place);
        }
    }
    let trained_bias = joined_bias(updates, out_dim)?;
    let begin = trained_bias.is_some().then_some(at);
    vector.extend(trained_bias);
    if vector.is_empty() {
        return super::linear(&x, weight, bias);
    }
    let vector = if vector.len() == 1 { vector.swap_remove(0) } else { Tensor::cat(&vector, 0)? };
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let op = UpdatedLinear { weight: weight.clone(), bias, places, ranks, trained_bias: begin };
    match lows.len() {
        0 => x.apply_op2(&vector, op),
        1 => x.apply_op3(&lows.swap_remove(0), &vector, op),
        _ => x.apply_op3(&Tensor::cat(&lows, 1)?, &vector, op),
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

/// `out += low B`; `b` `[low.len(), out.len()]`.
#[inline(always)]
fn add_product(low: &[f32], b: &[f32], out: &mut [f32]) {
    let n = out.len();
    let mut done = 0;
    // four ranks at a time: `out` is read and written once per four
    while done + 4 <= low.len() {
        let rows: [&[f32]; 4] = std::array::from_fn(|j| &b[(done + j) * n..(done + j + 1) * n]);
        let l: [f32; 4] = std::array::from_fn(|j| low[done + j]);
        for (i, o) in out.iter_mut().enumerate() {
            let v = rows[0][i].mul_add(l[0], *o);
            let v = rows[1][i].mul_add(l[1], v);
            let v = rows[2][i].mul_add(l[2], v);
            *o = rows[3][i].mul_add(l[3], v);
        }
        done += 4;
    }
    for j in done..low.len() {
        for (o, b) in out.iter_mut().zip(&b[j * n..(j + 1) * n]) {
            *o = b.mul_add(low[j], *o);
        }
    }
}

impl UpdatedLinear {
    fn forward(&self, x: (&CpuStorage, &Layout), low: &[f32], vector: &[f32]) -> Result<(CpuStorage, Shape)> {
        let rows = x.1.shape().dims2()?.0;
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
        if self.ranks > 0 {
            let cost = self.places.iter().map(|p| p.numbers().len()).sum::<usize>();
            par_rows(&mut out, n, cost, |first, out| {
                for (i, out) in out.chunks_exact_mut(n).enumerate() {
                    let low = &low[(first + i) * self.ranks..(first + i + 1) * self.ranks];
                    for p in &self.places {
                        let (b, out) = (&vector[p.numbers()], &mut out[p.columns.clone()]);
                        vectorized(
                            #[inline(always)]
                            || add_product(&low[p.ranks.clone()], b, out),
                        );
                    }
                }
            });
        }
        cpu_result(out, (rows, n))
    }

    /// Gradients of `x`, of the low products, and of the vector; those of `x` and the products only where they are wanted.
    fn backward(
        &self,
        x: &Tensor,
        low: Option<&Tensor>,
        vector: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Tensor)> {
        let grad = grad.detach().contiguous()?; // [rows, out]
        let gx = if x.track_op() { Some(self.weight.product_t(&grad)?) } else { None };
        let vector = vector.detach();
        let (mut glow, mut gvector) = (Vec::new(), Vec::new());
        if let Some(low) = low {
            let low = low.detach();
            for p in &self.places {
                let g = grad.narrow(1, p.columns.start, p.columns.len())?; // [rows, columns]
                let b = vector.narrow(0, p.at, p.numbers().len())?.reshape((p.ranks.len(), p.columns.len()))?;
                glow.push(g.matmul(&b.t()?)?); // [rows, rank]
                let own = low.narrow(1, p.ranks.start, p.ranks.len())?.contiguous()?; // [rows, rank]
                gvector.push(own.t()?.matmul(&g)?.flatten_all()?); // [rank * columns]
            }
        }
        if self.trained_bias.is_some() {
            gvector.push(super::columns::column_sums(&grad)?);
        }
        let glow = match glow.len() {
            0 => None,
            1 => glow.pop(),
            _ => Some(Tensor::cat(&glow, 1)?),
        };
        let gvector = if gvector.len() == 1 { gvector.swap_remove(0) } else { Tensor::cat(&gvector, 0)? };
        Ok((gx, glow, gvector))
    }
}

impl CustomOp3 for UpdatedLinear {
    fn name(&self) -> &'static str {
        "updated-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        low: &CpuStorage,
        low_l: &Layout,
        vector: &CpuStorage,
        vector_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((x, x_l), f32_slice(low, low_l)?, f32_slice(vector, vector_l)?)
    }

    fn bwd(
        &self,
        x: &Tensor,
        low: &Tensor,
        vector: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (gx, glow, gvector) = self.backward(x, Some(low), vector, grad)?;
        Ok((gx, glow, Some(gvector)))
    }
}

impl CustomOp2 for UpdatedLinear {
    fn name(&self) -> &'static str {
        "updated-linear-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        vector: &CpuStorage,
        vector_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((x, x_l), &[], f32_slice(vector, vector_l)?)
    }

    fn bwd(&self, x: &Tensor, vector: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (gx, _, gvector) = self.backward(x, None, vector, grad)?;
        Ok((gx, Some(gvector)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn diff(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn var(shape: impl Into<Shape>) -> Var {
        Var::randn(0f32, 0.5, shape, &Device::Cpu).unwrap()
    }

    /// Three parts of unequal width: two updates and a bias, a bias alone, an update alone.
    #[test]
    fn outputs_and_all_gradients_equal_those_of_separate_ops() {
        let dev = Device::Cpu;
        for (rows, k, widths) in [(5, 24, [32, 16, 16]), (67, 33, [7, 19, 40]), (1, 8, [8, 8, 8])] {
            let n: usize = widths.iter().sum();
            let weight = Weight::from_out_in(&Tensor::randn(0f32, 0.5, (n, k), &dev).unwrap()).unwrap();
            let own = Tensor::randn(0f32, 0.5, n, &dev).unwrap();
            let (x, [b0, b1]) = (var((rows, k)), [var(widths[0]), var(widths[1])]);
            let lows: Vec<(Var, Var)> =
                [(3, 0), (8, 0), (5, 2)].iter().map(|&(r, p)| (var((r, k)), var((r, widths[p])))).collect();
            let (first, second) = (0..widths[0], widths[0]..widths[0] + widths[1]);
            let third = second.end..n;
            let low = |i: usize, scale: f64| (lows[i].0.as_tensor(), lows[i].1.as_tensor(), scale);
            let updates = [
                Update {
                    columns: first,
                    low: vec![low(0, 2.0), low(1, 0.5)],
                    bias: vec![b0.as_tensor(), b0.as_tensor()],
                },
                Update { columns: second, low: vec![], bias: vec![b1.as_tensor()] },
                Update { columns: third, low: vec![low(2, -1.5)], bias: vec![] },
            ];
            assert!(takes_updates(&x, &weight, Some(&own), &updates));
            let all: Vec<&Var> = lows.iter().flat_map(|(a, b)| [a, b]).chain([&x, &b0, &b1]).collect();
            for own in [Some(&own), None] {
                let separate = |x: &Tensor| {
                    let base = super::super::linear(x, &weight, own).unwrap();
                    let pieces: Vec<Tensor> = updates
                        .iter()
                        .map(|u| {
                            let mut y = base.narrow(1, u.columns.start, u.columns.len()).unwrap();
                            for (a, b, s) in &u.low {
                                y = (y + (x.matmul(&a.t().unwrap()).unwrap().matmul(b).unwrap() * *s).unwrap())
                                    .unwrap();
                            }
                            u.bias.iter().fold(y, |y, b| y.broadcast_add(b).unwrap())
                        })
                        .collect();
                    Tensor::cat(&pieces, 1).unwrap()
                };
                let g = Tensor::randn(0f32, 1.0, (rows, n), &dev).unwrap();
                let (want, got) = (separate(&x), updated_linear(&x, &weight, own, &updates).unwrap());
                assert!(diff(&want, &got) < 1e-4);
                let grads = |y: &Tensor| (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
                let (want, got) = (grads(&want), grads(&got));
                for v in &all {
                    let (want, got) = (want.get(v).unwrap(), got.get(v).unwrap());
                    assert!(diff(want, got) < 1e-3, "{:?}: {}", v.shape(), diff(want, got));
                }
                // an input that wants no gradient gets none, and costs none
                let plain = updated_linear(&x.as_detached_tensor(), &weight, own, &updates).unwrap();
                let got = grads(&plain);
                assert!(got.get(&x).is_none() && diff(got.get(&b1).unwrap(), want.get(&b1).unwrap()) < 1e-3);
            }
        }
    }

    #[test]
    fn a_bias_alone_and_nothing_at_all() {
        let dev = Device::Cpu;
        let weight = Weight::from_out_in(&Tensor::randn(0f32, 0.5, (12, 8), &dev).unwrap()).unwrap();
        let (x, bias) = (var((4, 8)), var(4));
        let update = Update { columns: 4..8, low: vec![], bias: vec![bias.as_tensor()] };
        let y = updated_linear(&x, &weight, None, &[update]).unwrap();
        let plain = super::super::linear(&x, &weight, None).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&bias).unwrap().to_vec1::<f32>().unwrap(), [4.0; 4]);
        let moved = (y - &plain).unwrap().to_vec2::<f32>().unwrap();
        let bias = bias.to_vec1::<f32>().unwrap();
        for row in moved {
            assert!(row[..4].iter().chain(&row[8..]).all(|v| *v == 0.0));
            assert!(row[4..8].iter().zip(&bias).all(|(a, b)| (a - b).abs() < 1e-5));
        }
        assert_eq!(diff(&updated_linear(&x, &weight, None, &[]).unwrap(), &plain), 0.0);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let dev = Device::Cpu;
        let weight = Weight::from_out_in(&Tensor::randn(0f32, 0.5, (12, 8), &dev).unwrap()).unwrap();
        let (x, a, b, bias) = (var((4, 8)), var((2, 8)), var((2, 12)), var(5));
        let of = |columns: Range<usize>, low, bias| {
            updated_linear(&x, &weight, None, &[Update { columns, low, bias }]).unwrap_err().to_string()
        };
        assert!(of(0..11, vec![(a.as_tensor(), b.as_tensor(), 1.0)], vec![]).contains("do not fit"));
        assert!(of(4..16, vec![(a.as_tensor(), b.as_tensor(), 1.0)], vec![]).contains("do not fit"));
        assert!(of(0..12, vec![(b.as_tensor(), b.as_tensor(), 1.0)], vec![]).contains("do not fit"));
        assert!(of(0..4, vec![], vec![bias.as_tensor()]).contains("a bias"));
        assert!(updated_linear(&var((4, 7)), &weight, None, &[]).unwrap_err().to_string().contains("8 -> 12"));
    }
}
