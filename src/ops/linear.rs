//! Linear maps with a frozen weight: backward gives dX only.
//!
//! candle's matmul computes and keeps gradients of both operands, also of frozen ones (PR 3773); for a base model that is
//! a second copy of the model per step.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage, bail,
};

use super::{cpu_result, f32_slice, is_cpu_f32, skinny, tiled, with_f32};

/// Most rows that the streaming kernels take.
const SKINNY_ROWS: usize = 4;
/// Most rows that the tiled kernels take, where the machine has them; above, the blocked GEMM wins.
const TILED_ROWS: usize = 96;
/// Most rows that the streaming kernel takes of weights in `[out, in]` order, whose GEMM is slower, without tiles.
const SKINNY_ROWS_OUT_IN: usize = 64;

/// A frozen matrix in the order that its kernel likes.
#[derive(Debug, Clone)]
pub struct Weight {
    tensor: Tensor,
    /// `[in, out]` if true (fastest for batches), else `[out, in]` (shared with an embedding table).
    in_out: bool,
}

impl Weight {
    /// From a matrix stored `[out, in]` as `nn.Linear` keeps it; laid out anew as `[in, out]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn from_out_in(w: &Tensor) -> Result<Self> {
        Ok(Self { tensor: w.t()?.contiguous()?, in_out: true })
    }

    /// From a matrix stored `[in, out]` as GPT-2's Conv1D keeps it.
    ///
    /// # Errors
    /// Those of candle.
    pub fn from_in_out(w: &Tensor) -> Result<Self> {
        Ok(Self { tensor: w.contiguous()?, in_out: true })
    }

    /// Shares an embedding table `[vocab, hidden]` as the head that maps hidden to vocab.
    ///
    /// # Errors
    /// Those of candle.
    pub fn tied(table: &Tensor) -> Result<Self> {
        Ok(Self { tensor: table.contiguous()?, in_out: false })
    }

    /// Width of the input.
    pub fn in_dim(&self) -> usize {
        self.tensor.dims()[usize::from(!self.in_out)]
    }

    /// Width of the output.
    pub fn out_dim(&self) -> usize {
        self.tensor.dims()[usize::from(self.in_out)]
    }

    /// As `[in, out]`, possibly strided.
    ///
    /// # Errors
    /// Those of candle.
    pub fn as_in_out(&self) -> Result<Tensor> {
        if self.in_out { Ok(self.tensor.clone()) } else { self.tensor.t() }
    }

    /// Numbers in it.
    pub fn elem_count(&self) -> usize {
        self.in_dim() * self.out_dim()
    }

    /// Its tensor as stored.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// `x W` by a kernel of our own; `None` where the blocked GEMM is better.
    fn few_rows(&self, x: &[f32], w: &[f32], rows: usize) -> Option<Vec<f32>> {
        let (k, n) = (self.in_dim(), self.out_dim());
        let tiled = rows > SKINNY_ROWS && rows <= TILED_ROWS && tiled::available();
        match (self.in_out, tiled) {
            (true, true) => Some(tiled::in_out(x, w, rows, k, n)),
            (false, true) => Some(tiled::out_in(x, w, rows, k, n)),
            (true, false) if rows <= 2 * SKINNY_ROWS => Some(skinny::in_out(x, w, rows, k, n)),
            (false, false) if rows <= SKINNY_ROWS_OUT_IN => Some(skinny::out_in(x, w, rows, k, n)),
            _ => None,
        }
    }
}

struct FrozenLinear(Weight);

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        let n = self.0.out_dim();
        if rows <= TILED_ROWS && is_cpu_f32(&self.0.tensor) {
            let x = f32_slice(storage, layout)?;
            if let Some(out) = with_f32(&self.0.tensor, |w| Ok(self.0.few_rows(x, w, rows)))? {
                return cpu_result(out, (rows, n));
            }
        }
        let w = self.0.as_in_out()?;
        let (ws, wl) = w.storage_and_layout();
        let Storage::Cpu(wc) = &*ws else { bail!("weight and input are on different devices") };
        Ok((storage.matmul(wc, (1, rows, n, k), layout, wl)?, (rows, n).into()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        let n = self.0.out_dim();
        let w = self.0.as_in_out()?;
        let (ws, wl) = w.storage_and_layout();
        let Storage::Cuda(wc) = &*ws else { bail!("weight and input are on different devices") };
        Ok((storage.matmul(wc, (1, rows, n, k), layout, wl)?, (rows, n).into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.matmul(&self.0.as_in_out()?.t()?)?)) // [rows, in]
    }
}

/// `x W + b`: `[rows, in]` -> `[rows, out]`; the result's storage is fresh.
///
/// # Errors
/// Shapes that do not fit.
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let x = x.contiguous()?;
    if x.dim(1)? != weight.in_dim() {
        bail!("linear: input is {} wide, the weight takes {}", x.dim(1)?, weight.in_dim());
    }
    let op = FrozenLinear(weight.clone());
    let y = if x.track_op() { x.apply_op1(op)? } else { x.apply_op1_no_bwd(&op)? };
    match bias {
        Some(b) => y.broadcast_add(b),
        None => Ok(y),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn every_layout_and_row_count_equals_a_plain_matmul() {
        let dev = Device::Cpu;
        for (k, n) in [(48, 96), (33, 65), (64, 17), (7, 300), (96, 1031)] {
            let w = Tensor::randn(0f32, 1.0, (n, k), &dev).unwrap();
            for rows in [1, 2, 3, 5, 8, 9, 31, 65, 97] {
                let x = Tensor::randn(0f32, 1.0, (rows, k), &dev).unwrap();
                let want = x.matmul(&w.t().unwrap()).unwrap();
                for weight in [Weight::from_out_in(&w).unwrap(), Weight::tied(&w).unwrap()] {
                    let got = linear(&x, &weight, None).unwrap();
                    let d = (&got - &want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
                    assert!(d.to_scalar::<f32>().unwrap() < 1e-4, "{rows}x{k}x{n} {}", weight.in_out);
                }
            }
        }
    }

    #[test]
    fn backward_gives_dx_and_keeps_no_gradient_of_the_weight() {
        let dev = Device::Cpu;
        let w = Tensor::randn(0f32, 1.0, (12, 8), &dev).unwrap();
        let weight = Weight::from_out_in(&w).unwrap();
        let x = Var::randn(0f32, 1.0, (5, 8), &dev).unwrap();
        let grads = linear(&x, &weight, None).unwrap().sum_all().unwrap().backward().unwrap();
        let want = Tensor::ones((5, 12), candle_core::DType::F32, &dev).unwrap().matmul(&w).unwrap();
        let d = (grads.get(&x).unwrap() - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(d.to_scalar::<f32>().unwrap() < 1e-5);
        assert!(grads.get(weight.tensor()).is_none(), "the frozen weight has no gradient");
    }
}
