//! Linear maps. Frozen weights: backward gives dX only. A weight that is trained (full fine-tuning's private copy) takes
//! candle's matmul, which gives both gradients.
//!
//! candle's matmul computes and keeps gradients of both operands, also of frozen ones (PR 3773); for a base model that is
//! a second copy of the model per step.

mod holds;

use std::sync::Arc;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage, bail,
};

use super::{
    Activations, Quantized, cpu_result, f32_slice, is_cpu_f32,
    packed::{self, Bf16},
    with_activations, with_f32,
};

/// How a frozen matrix lies in memory.
#[derive(Debug, Clone)]
enum Form {
    /// `[in, out]`.
    InOut(Tensor),
    /// `[out, in]`: shared with an embedding table.
    OutIn(Tensor),
    /// Panels, for the kernels of [`packed`]; f32 on the CPU.
    Panels(Tensor),
    /// Panels of bf16.
    Bf16(Arc<Bf16>),
    /// Panels of fewer bits, for the same kernels.
    Quantized(Arc<Quantized>),
    /// Matrices side by side, each in panels of its own kind.
    Joined(Arc<[Weight]>),
}

/// A frozen matrix in the form that its kernels like.
#[derive(Debug, Clone)]
pub struct Weight {
    form: Form,
    in_dim: usize,
    out_dim: usize,
}

impl Weight {
    /// From a matrix stored `[out, in]` as `nn.Linear` keeps it.
    ///
    /// # Errors
    /// Those of candle.
    pub fn from_out_in(w: &Tensor) -> Result<Self> {
        let (n, k) = w.dims2()?;
        if w.track_op() {
            return Ok(Self { form: Form::OutIn(w.clone()), in_dim: k, out_dim: n });
        }
        if is_cpu_f32(w) {
            let data = with_f32(&w.contiguous()?, |w| Ok(packed::pack(k, n, |row, column| w[column * k + row])))?;
            return Self::panels(data, k, n);
        }
        Ok(Self { form: Form::InOut(w.t()?.contiguous()?), in_dim: k, out_dim: n })
    }

    /// From a matrix stored `[in, out]` as GPT-2's Conv1D keeps it.
    ///
    /// # Errors
    /// Those of candle.
    pub fn from_in_out(w: &Tensor) -> Result<Self> {
        let (k, n) = w.dims2()?;
        if is_cpu_f32(w) && !w.track_op() {
            let data = with_f32(&w.contiguous()?, |w| Ok(packed::pack(k, n, |row, column| w[row * n + column])))?;
            return Self::panels(data, k, n);
        }
        Ok(Self { form: Form::InOut(w.contiguous()?), in_dim: k, out_dim: n })
    }

    /// From a matrix stored `[out, in]`, rounded to bf16 (to the nearest, ties to even) where the CPU's kernels take it.
    ///
    /// # Errors
    /// Those of candle.
    pub fn bf16_from_out_in(w: &Tensor) -> Result<Self> {
        let (n, k) = w.dims2()?;
        if !is_cpu_f32(w) || w.track_op() {
            return Self::from_out_in(w);
        }
        with_f32(&w.contiguous()?, |w| Ok(Bf16::pack((k, n), |row, column| w[column * k + row]).into()))
    }

    /// The same from a matrix stored `[in, out]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn bf16_from_in_out(w: &Tensor) -> Result<Self> {
        let (k, n) = w.dims2()?;
        if !is_cpu_f32(w) || w.track_op() {
            return Self::from_in_out(w);
        }
        with_f32(&w.contiguous()?, |w| Ok(Bf16::pack((k, n), |row, column| w[row * n + column]).into()))
    }

    fn panels(data: Vec<f32>, in_dim: usize, out_dim: usize) -> Result<Self> {
        let len = data.len();
        let tensor = Tensor::from_vec(data, len, &Device::Cpu)?;
        Ok(Self { form: Form::Panels(tensor), in_dim, out_dim })
    }

    /// Shares a matrix `[out, in]` as it lies, without a copy.
    ///
    /// # Errors
    /// Those of candle.
    pub fn view_of(w: &Tensor) -> Result<Self> {
        let (out_dim, in_dim) = w.dims2()?;
        Ok(Self { form: Form::OutIn(w.contiguous()?), in_dim, out_dim })
    }

    /// Matrices with one input, side by side; all of them for the CPU's kernels.
    ///
    /// # Errors
    /// None at all; widths that differ; a form that is no panels.
    pub fn joined(mut parts: Vec<Self>) -> Result<Self> {
        if parts.len() == 1 {
            return Ok(parts.swap_remove(0));
        }
        let in_dim = parts.first().map_or(0, |p| p.in_dim);
        if in_dim == 0 || parts.iter().any(|p| p.in_dim != in_dim || !p.has_kernels()) {
            bail!("linear: matrices that do not lie side by side: {parts:?}");
        }
        let out_dim = parts.iter().map(|p| p.out_dim).sum();
        Ok(Self { form: Form::Joined(parts.into()), in_dim, out_dim })
    }

    /// Rows of the `[out, in]` matrix, as of an embedding table: `[ids, in]`. No gradient.
    ///
    /// # Errors
    /// Ids that the table does not have.
    pub fn lookup(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(bad) = ids.iter().find(|&&id| id as usize >= self.out_dim) {
            bail!("lookup: row {bad} of a table of {}", self.out_dim);
        }
        let shape = (ids.len(), self.in_dim);
        match &self.form {
            Form::OutIn(w) => w.index_select(&Tensor::new(ids, w.device())?, 0),
            Form::InOut(w) => w.index_select(&Tensor::new(ids, w.device())?, 1)?.t()?.contiguous(),
            Form::Panels(w) => {
                let rows = with_f32(w, |w| Ok(packed::columns(w, self.in_dim, ids)))?;
                Tensor::from_vec(rows, shape, &Device::Cpu)
            }
            Form::Bf16(w) => Tensor::from_vec(w.columns(ids), shape, &Device::Cpu),
            Form::Quantized(w) => Tensor::from_vec(w.columns(ids), shape, &Device::Cpu),
            Form::Joined(_) => bail!("lookup: several matrices are no table"),
        }
    }

    /// Whether it is trained: a gradient of the matrix is wanted.
    pub fn is_trained(&self) -> bool {
        match &self.form {
            Form::InOut(w) | Form::OutIn(w) | Form::Panels(w) => w.track_op(),
            Form::Bf16(_) | Form::Quantized(_) | Form::Joined(_) => false,
        }
    }

    /// Whether it lies as the CPU's kernels take it.
    pub(super) fn has_kernels(&self) -> bool {
        matches!(self.form, Form::Panels(_) | Form::Bf16(_) | Form::Quantized(_) | Form::Joined(_))
    }

    /// Whether it shares a table as it lies.
    pub fn is_view(&self) -> bool {
        matches!(self.form, Form::OutIn(_))
    }

    /// Its parts: formats, numbers, and bytes in memory.
    pub fn parts(&self) -> Vec<WeightPart> {
        match &self.form {
            Form::InOut(w) | Form::OutIn(w) => vec![WeightPart::of(w)],
            Form::Panels(w) => vec![WeightPart { numbers: self.elem_count(), ..WeightPart::of(w) }],
            Form::Bf16(w) => vec![WeightPart { kind: "bf16", numbers: self.elem_count(), bytes: w.bytes() }],
            Form::Quantized(w) => {
                vec![WeightPart { kind: w.kind().name(), numbers: self.elem_count(), bytes: w.bytes() }]
            }
            Form::Joined(parts) => parts.iter().flat_map(Self::parts).collect(),
        }
    }

    /// Width of the input.
    pub fn in_dim(&self) -> usize {
        self.in_dim
    }

    /// Width of the output.
    pub fn out_dim(&self) -> usize {
        self.out_dim
    }

    /// As `[in, out]`, possibly strided; a copy where the matrix is kept in panels.
    ///
    /// # Errors
    /// Those of candle.
    pub fn as_in_out(&self) -> Result<Tensor> {
        let (k, n) = (self.in_dim, self.out_dim);
        match &self.form {
            Form::InOut(w) => Ok(w.clone()),
            Form::OutIn(w) => w.t(),
            Form::Panels(w) => Tensor::from_vec(with_f32(w, |w| Ok(packed::unpack(w, k, n)))?, (k, n), &Device::Cpu),
            Form::Bf16(w) => Tensor::from_vec(w.unpack(), (k, n), &Device::Cpu),
            Form::Quantized(w) => Tensor::from_vec(w.unpack(), (k, n), &Device::Cpu),
            Form::Joined(parts) => Tensor::cat(&parts.iter().map(Self::as_in_out).collect::<Result<Vec<_>>>()?, 1),
        }
    }

    /// Numbers in it.
    pub fn elem_count(&self) -> usize {
        self.in_dim * self.out_dim
    }

    /// `x W`: `[rows, in]` -> `[rows, out]`, without a graph.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(super) fn product(&self, x: &Tensor) -> Result<Tensor> {
        x.contiguous()?.apply_op1_no_bwd(&FrozenLinear { weight: self.clone(), bias: None })
    }

    /// `x W + bias` by the CPU's kernels, where it has them: `x` `[rows, in]`.
    pub(super) fn kernel_product(&self, x: &[f32], bias: Option<&[f32]>, rows: usize) -> Result<Vec<f32>> {
        let shape = (rows, self.in_dim, self.out_dim);
        match &self.form {
            Form::Panels(w) => with_f32(w, |w| Ok(packed::product(x, w, bias, shape))),
            Form::Bf16(w) => Ok(packed::product(x, &**w, bias, shape)),
            Form::Quantized(w) => Ok(w.product(x, bias, rows)),
            Form::Joined(parts) => {
                let mut out = vec![0f32; rows * self.out_dim];
                let mut at = 0;
                for part in &**parts {
                    let n = part.out_dim;
                    let own = part.kernel_product(x, bias.map(|b| &b[at..at + n]), rows)?;
                    let rows = out.chunks_exact_mut(self.out_dim).zip(own.chunks_exact(n));
                    rows.for_each(|(out, own)| out[at..at + n].copy_from_slice(own));
                    at += n;
                }
                Ok(out)
            }
            Form::InOut(_) | Form::OutIn(_) => bail!("linear: a weight in panels is needed"),
        }
    }

    /// `g W^T`: `[rows, out]` -> `[rows, in]`, without a graph: the gradient of [`Self::product`]'s input.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(super) fn product_t(&self, g: &Tensor) -> Result<Tensor> {
        let g = g.detach().contiguous()?;
        let (rows, n) = g.dims2()?;
        if n != self.out_dim {
            bail!("linear: a gradient is {n} wide, the weight gives {}", self.out_dim);
        }
        if !self.has_kernels() || !is_cpu_f32(&g) {
            return g.matmul(&self.as_in_out()?.t()?);
        }
        let out = with_f32(&g, |g| self.kernel_product_t(g, rows))?;
        Tensor::from_vec(out, (rows, self.in_dim), &Device::Cpu)
    }

    /// `g W^T` by the CPU's kernels, where it has them: `g` `[rows, out]`.
    pub(super) fn kernel_product_t(&self, g: &[f32], rows: usize) -> Result<Vec<f32>> {
        let (k, n) = (self.in_dim, self.out_dim);
        match &self.form {
            Form::Panels(w) => with_f32(w, |w| Ok(packed::product_t(g, w, (rows, k, n)))),
            Form::Bf16(w) => Ok(packed::product_t(g, &**w, (rows, k, n))),
            Form::Quantized(w) => Ok(packed::product_t(g, &**w, (rows, k, n))),
            Form::Joined(parts) => {
                let mut sum: Option<Vec<f32>> = None;
                let mut at = 0;
                for part in &**parts {
                    let own: Vec<f32> =
                        g.chunks_exact(n).flat_map(|row| &row[at..at + part.out_dim]).copied().collect();
                    let own = part.kernel_product_t(&own, rows)?;
                    at += part.out_dim;
                    match &mut sum {
                        Some(sum) => sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own),
                        None => sum = Some(own),
                    }
                }
                sum.ok_or_else(|| candle_core::Error::Msg("linear: a weight of no parts".into()))
            }
            Form::InOut(_) | Form::OutIn(_) => bail!("linear: a weight in panels is needed"),
        }
    }
}

impl From<Bf16> for Weight {
    fn from(w: Bf16) -> Self {
        Self { in_dim: w.in_dim(), out_dim: w.out_dim(), form: Form::Bf16(Arc::new(w)) }
    }
}

impl From<Quantized> for Weight {
    fn from(w: Quantized) -> Self {
        Self { in_dim: w.in_dim(), out_dim: w.out_dim(), form: Form::Quantized(Arc::new(w)) }
    }
}

/// A part of a weight that is kept in one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightPart {
    /// `f32`, `bf16`, `q8_0` ...
    pub kind: &'static str,
    /// How many.
    pub numbers: usize,
    /// Bytes in memory.
    pub bytes: usize,
}

impl WeightPart {
    /// Of a plain tensor.
    pub fn of(t: &Tensor) -> Self {
        let (kind, numbers) = (t.dtype().as_str(), t.elem_count());
        Self { kind, numbers, bytes: numbers * t.dtype().size_in_bytes() }
    }
}

struct FrozenLinear {
    weight: Weight,
    /// Only with panels, whose kernel adds it on the way.
    bias: Option<Tensor>,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        let (n, in_dim) = (self.weight.out_dim, self.weight.in_dim);
        if k != in_dim {
            bail!("linear: input is {k} wide, the weight takes {in_dim}");
        }
        if self.weight.has_kernels() {
            let x = f32_slice(storage, layout)?;
            let out = match &self.bias {
                Some(bias) => with_f32(bias, |b| self.weight.kernel_product(x, Some(b), rows))?,
                None => self.weight.kernel_product(x, None, rows)?,
            };
            return cpu_result(out, (rows, n));
        }
        let w = self.weight.as_in_out()?;
        let (ws, wl) = w.storage_and_layout();
        let Storage::Cpu(wc) = &*ws else { bail!("weight and input are on different devices") };
        Ok((storage.matmul(wc, (1, rows, n, k), layout, wl)?, (rows, n).into()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        let n = self.weight.out_dim;
        let w = self.weight.as_in_out()?;
        let (ws, wl) = w.storage_and_layout();
        let Storage::Cuda(wc) = &*ws else { bail!("weight and input are on different devices") };
        Ok((storage.matmul(wc, (1, rows, n, k), layout, wl)?, (rows, n).into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.weight.product_t(grad).map(Some) // [rows, in]
    }
}

/// `x W + b`: `[rows, in]` -> `[rows, out]`; the result's storage is fresh.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let x = x.contiguous()?;
    if x.dim(1)? != weight.in_dim() || bias.is_some_and(|b| b.elem_count() != weight.out_dim()) {
        let (i, o) = (weight.in_dim(), weight.out_dim());
        bail!("linear: input {:?} and bias {:?} for a weight {i} -> {o}", x.shape(), bias.map(Tensor::shape));
    }
    if weight.is_trained() {
        let y = x.matmul(&weight.as_in_out()?)?; // [rows, out]
        return bias.map_or(Ok(y.clone()), |b| super::add_bias(&y, b));
    }
    // a bias that is trained must stay in the graph
    let (inside, after) = match bias {
        Some(b) if weight.has_kernels() && is_cpu_f32(&x) && is_cpu_f32(b) && !b.track_op() => {
            (Some(b.contiguous()?), None)
        }
        other => (None, other),
    };
    let op = FrozenLinear { weight: weight.clone(), bias: inside };
    let y = if x.track_op() {
        // its gradient is that of the dequantised matrix
        with_activations(Activations::F32, || x.apply_op1(op))?
    } else {
        x.apply_op1_no_bwd(&op)?
    };
    match after {
        Some(b) => super::add_bias(&y, b),
        None => Ok(y),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    fn diff(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn every_form_and_row_count_equals_a_plain_matmul() {
        let dev = Device::Cpu;
        for (k, n) in [(48, 96), (33, 65), (64, 17), (7, 300), (96, 1031)] {
            let w = Tensor::randn(0f32, 1.0, (n, k), &dev).unwrap();
            let b = Tensor::randn(0f32, 1.0, n, &dev).unwrap();
            for rows in [1, 2, 3, 5, 8, 9, 31, 65, 97] {
                let x = Tensor::randn(0f32, 1.0, (rows, k), &dev).unwrap();
                let bare = x.matmul(&w.t().unwrap()).unwrap();
                let want = bare.broadcast_add(&b).unwrap();
                let in_out = Weight::from_in_out(&w.t().unwrap().contiguous().unwrap()).unwrap();
                for weight in [Weight::from_out_in(&w).unwrap(), Weight::view_of(&w).unwrap(), in_out] {
                    let what = format!("{rows}x{k}x{n} {:?}", weight.parts());
                    assert!(diff(&linear(&x, &weight, Some(&b)).unwrap(), &want) < 1e-4, "{what}");
                    assert!(diff(&linear(&x, &weight, None).unwrap(), &bare) < 1e-4, "{what}");
                    assert_eq!(diff(&weight.as_in_out().unwrap(), &w.t().unwrap()), 0.0, "{what}");
                    let last = n as u32 - 1;
                    let (found, index) =
                        (weight.lookup(&[last, 0, last]).unwrap(), Tensor::new(&[last, 0, last], &dev));
                    assert_eq!(diff(&found, &w.index_select(&index.unwrap(), 0).unwrap()), 0.0, "{what}");
                    assert!(weight.lookup(&[n as u32]).is_err(), "{what}");
                }
            }
        }
    }

    #[test]
    fn backward_gives_dx_and_keeps_no_gradient_of_the_weight_or_its_bias() {
        let dev = Device::Cpu;
        let w = Tensor::randn(0f32, 1.0, (12, 8), &dev).unwrap();
        let bias = Tensor::randn(0f32, 1.0, 12, &dev).unwrap();
        let weight = Weight::from_out_in(&w).unwrap();
        let x = Var::randn(0f32, 1.0, (5, 8), &dev).unwrap();
        let grads = linear(&x, &weight, Some(&bias)).unwrap().sum_all().unwrap().backward().unwrap();
        let want = Tensor::ones((5, 12), candle_core::DType::F32, &dev).unwrap().matmul(&w).unwrap();
        assert!(diff(grads.get(&x).unwrap(), &want) < 1e-5);
        let Form::Panels(panels) = &weight.form else { panic!("{weight:?}") };
        assert!(grads.get(panels).is_none() && grads.get(&bias).is_none(), "frozen tensors have no gradient");
    }

    #[test]
    fn a_trained_weight_gets_its_gradient_in_every_form() {
        let dev = Device::Cpu;
        let w = Var::randn(0f32, 1.0, (12, 8), &dev).unwrap();
        let (x, bias) =
            (Var::randn(0f32, 1.0, (5, 8), &dev).unwrap(), Var::zeros(12, candle_core::DType::F32, &dev).unwrap());
        let g = Tensor::randn(0f32, 1.0, (5, 12), &dev).unwrap();
        let in_out = Weight::from_in_out(&w.t().unwrap()).unwrap();
        let plain = Weight::from_out_in(&w.as_detached_tensor()).unwrap();
        for weight in [Weight::from_out_in(&w).unwrap(), Weight::view_of(&w).unwrap(), in_out] {
            let y = linear(&x, &weight, Some(&bias)).unwrap();
            assert!(weight.is_trained() && diff(&y, &linear(&x, &plain, Some(&bias)).unwrap()) < 1e-5);
            let grads = (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            let want = g.t().unwrap().matmul(&x).unwrap(); // [out, in]
            assert!(diff(grads.get(&w).unwrap(), &want) < 1e-5);
            assert!(diff(grads.get(&x).unwrap(), &g.matmul(&w).unwrap()) < 1e-5);
            assert!(diff(grads.get(&bias).unwrap(), &g.sum(0).unwrap()) < 1e-5);
        }
    }

    #[test]
    fn a_trained_bias_gets_its_gradient() {
        let dev = Device::Cpu;
        let weight = Weight::from_out_in(&Tensor::randn(0f32, 1.0, (12, 8), &dev).unwrap()).unwrap();
        let (x, bias) =
            (Tensor::randn(0f32, 1.0, (5, 8), &dev).unwrap(), Var::zeros(12, candle_core::DType::F32, &dev).unwrap());
        let grads = linear(&x, &weight, Some(&bias)).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&bias).unwrap().to_vec1::<f32>().unwrap(), [5.0; 12]);
    }

    #[test]
    fn a_width_that_does_not_fit_is_an_error() {
        let weight =
            Weight::from_out_in(&Tensor::ones((3, 2), candle_core::DType::F32, &Device::Cpu).unwrap()).unwrap();
        let x = Tensor::ones((4, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(linear(&x, &weight, None).unwrap_err().to_string().contains("2 -> 3"));
        assert!(weight.product_t(&Tensor::ones((4, 2), candle_core::DType::F32, &Device::Cpu).unwrap()).is_err());
    }
}
