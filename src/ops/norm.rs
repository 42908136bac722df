//! LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019). Frozen gain and bias: backward gives dX only; a gain or
//! bias that is trained takes the reference.

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor};

use super::{cpu_result, f32_slice, is_cpu_f32, par_rows, vectorized, with_f32};

/// A normalisation.
#[derive(Debug, Clone)]
pub struct Norm {
    /// `[hidden]`.
    pub gain: Tensor,
    /// `[hidden]`; present for LayerNorm.
    pub bias: Option<Tensor>,
    /// Subtract the mean (LayerNorm) or not (RMSNorm).
    pub center: bool,
    /// Added to the variance.
    pub eps: f64,
}

impl Norm {
    fn reference(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let x = x.to_dtype(DType::F32)?; // statistics in f32 for 16-bit bases
        let x = if self.center { x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)? } else { x };
        let var = x.sqr()?.mean_keepdim(D::Minus1)?;
        let y = x.broadcast_div(&(var + self.eps)?.sqrt()?)?;
        let y = super::scale_columns(&y.to_dtype(dtype)?, &self.gain)?;
        match &self.bias {
            Some(b) => super::add_bias(&y, b),
            None => Ok(y),
        }
    }
}

/// Mean (0 for RMSNorm) and reciprocal deviation of one row.
#[inline(always)]
fn stats(x: &[f32], center: bool, eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = if center { lanes(x, |v| v) / n } else { 0.0 };
    let var = lanes(x, |v| (v - mean) * (v - mean)) / n;
    (mean, 1.0 / (var + eps).sqrt())
}

/// One row: `(x - mean) / deviation * gain + bias`.
#[inline(always)]
pub(super) fn norm_row(row: &[f32], gain: &[f32], bias: Option<&[f32]>, center: bool, eps: f32, out: &mut [f32]) {
    let (mean, inv) = stats(row, center, eps);
    match bias {
        Some(b) => {
            for (((o, x), g), b) in out.iter_mut().zip(row).zip(gain).zip(b) {
                *o = ((x - mean) * inv).mul_add(*g, *b);
            }
        }
        None => {
            for ((o, x), g) in out.iter_mut().zip(row).zip(gain) {
                *o = (x - mean) * inv * g;
            }
        }
    }
}

/// Sum of `f(x)` in 16 lanes: strict left-to-right float addition would not become vector code.
#[inline(always)]
fn lanes(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut acc = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    for c in chunks {
        for (a, v) in acc.iter_mut().zip(c) {
            *a += f(*v);
        }
    }
    acc.iter().sum::<f32>() + rest.iter().map(|v| f(*v)).sum::<f32>()
}

struct NormOp(Norm);

impl CustomOp1 for NormOp {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.shape().dims().last().copied().unwrap_or(0);
        let x = f32_slice(storage, layout)?;
        let mut out = vec![0f32; x.len()];
        let norm = &self.0;
        with_f32(&norm.gain, |gain| {
            let mut run = |bias: Option<&[f32]>| {
                par_rows(&mut out, width, 3 * width, |first, out| {
                    vectorized(
                        #[inline(always)]
                        || {
                            for (i, o) in out.chunks_mut(width).enumerate() {
                                let row = &x[(first + i) * width..(first + i + 1) * width];
                                norm_row(row, gain, bias, norm.center, norm.eps as f32, o);
                            }
                        },
                    );
                });
                Ok(())
            };
            match &norm.bias {
                Some(b) => with_f32(b, |b| run(Some(b))),
                None => run(None),
            }
        })?;
        cpu_result(out, layout.shape())
    }

    /// `dx = inv (g dy - mean(g dy) - x^ mean(g dy x^))`, without the first mean for RMSNorm.
    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let width = x.dim(D::Minus1)?;
        let norm = &self.0;
        let grad = grad.contiguous()?;
        let mut out = vec![0f32; x.elem_count()];
        with_f32(x, |x| {
            with_f32(&grad, |dy| {
                with_f32(&norm.gain, |gain| {
                    par_rows(&mut out, width, 6 * width, |first, out| {
                        vectorized(
                            #[inline(always)]
                            || {
                                for (i, o) in out.chunks_mut(width).enumerate() {
                                    let at = (first + i) * width;
                                    let (row, dy) = (&x[at..at + width], &dy[at..at + width]);
                                    let (mean, inv) = stats(row, norm.center, norm.eps as f32);
                                    let n = width as f32;
                                    for ((o, dy), g) in o.iter_mut().zip(dy).zip(gain) {
                                        *o = dy * g;
                                    }
                                    let m1 = if norm.center { lanes(o, |v| v) / n } else { 0.0 };
                                    let mut acc = [0f32; 16];
                                    for (o, x) in o.chunks(16).zip(row.chunks(16)) {
                                        for ((a, o), x) in acc.iter_mut().zip(o).zip(x) {
                                            *a += o * (x - mean) * inv;
                                        }
                                    }
                                    let m2 = acc.iter().sum::<f32>() / n;
                                    for (o, x) in o.iter_mut().zip(row) {
                                        *o = inv * (*o - m1 - (x - mean) * inv * m2);
                                    }
                                }
                            },
                        );
                    });
                    Ok(())
                })
            })
        })?;
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

/// Normalises the last dimension of `x`, `[.., hidden]`.
///
/// # Errors
/// Those of candle.
pub fn norm(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    let trained = norm.gain.track_op() || norm.bias.as_ref().is_some_and(Tensor::track_op);
    if trained || !is_cpu_f32(x) || !is_cpu_f32(&norm.gain) {
        return norm.reference(x);
    }
    let x = x.contiguous()?;
    let op = NormOp(norm.clone());
    if x.track_op() { x.apply_op1(op) } else { x.apply_op1_no_bwd(&op) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn fast_and_reference_agree_forward_and_backward() {
        for (center, width) in [(true, 48), (true, 7), (false, 48), (false, 33)] {
            let gain = Tensor::randn(1f32, 0.3, width, &Device::Cpu).unwrap();
            let bias = center.then(|| Tensor::randn(0f32, 0.3, width, &Device::Cpu).unwrap());
            let n = Norm { gain, bias, center, eps: 1e-5 };
            let x = Var::randn(0.5f32, 2.0, (5, width), &Device::Cpu).unwrap();
            let w = Tensor::randn(0f32, 1.0, (5, width), &Device::Cpu).unwrap();
            let grad = |y: &Tensor| {
                let store = (y * &w).unwrap().sum_all().unwrap().backward().unwrap();
                store.get(&x).unwrap().clone()
            };
            let (fast, slow) = (norm(&x, &n).unwrap(), n.reference(&x).unwrap());
            let diff = |a: &Tensor, b: &Tensor| {
                (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
            };
            assert!(diff(&fast, &slow) < 1e-5);
            assert!(diff(&grad(&fast), &grad(&slow)) < 2e-5);
        }
    }
}
