//! Token cross-entropy through a frozen head, without ever keeping `[rows, vocab]`.
//!
//! With a frozen head only dH is wanted, and it is linear in each row's incoming gradient: the forward pass computes, a
//! chunk of rows at a time, the loss and `(softmax - onehot) W`, which backward scales (FORMATS 5.3; Liger kernels).

use std::sync::Arc;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, Device, Layout, Result, Shape, Storage, Tensor, bail};
use parking_lot::Mutex;

use super::{
    Activations, Weight, each, is_cpu_f32,
    kl::{self, Reference},
    math, vectorized, with_activations,
};

/// Elements of logits that live at a time (64 MiB of f32).
pub(super) const CHUNK_ELEMENTS: usize = 16 << 20;

struct HeadNll {
    weight: Weight,
    /// `None`: only the divergence counts.
    targets: Option<Vec<u32>>,
    /// Logits are squeezed to `cap * tanh(logit / cap)`.
    cap: Option<f32>,
    /// Share of the target's weight that all tokens share.
    smoothing: f32,
    tracked: bool,
    /// What is added to the losses: so many times the divergence from this.
    against: Option<(Reference, f64)>,
    /// The sum of the divergences.
    apart: Arc<Mutex<f64>>,
    /// `(softmax - onehot) W` per row, for backward; with a reference, also the divergence's share.
    unit_grad: Mutex<Option<Tensor>>,
}

impl HeadNll {
    fn run(&self, h: &Tensor) -> Result<Vec<f32>> {
        // gradients are those of a quantised head's numbers
        if self.tracked { with_activations(Activations::F32, || self.losses(h)) } else { self.losses(h) }
    }

    fn losses(&self, h: &Tensor) -> Result<Vec<f32>> {
        let (rows, hidden) = h.dims2()?;
        let vocab = self.weight.out_dim();
        let per = match self.against {
            Some(_) => kl::rows_of_chunk(rows, vocab),
            None => (CHUNK_ELEMENTS / vocab.max(1)).clamp(1, rows.max(1)),
        };
        let mut apart = 0.0;
        let mut nll = Vec::with_capacity(rows);
        let mut grads = Vec::new();
        let mut at = 0;
        while at < rows {
            let n = per.min(rows - at);
            if let Some(targets) = self.targets.as_ref().filter(|_| self.is_plain(h)) {
                let (loss, grad) = self.plain_chunk(h, (at, n), &targets[at..at + n])?;
                nll.extend(loss);
                grads.extend(grad);
                at += n;
                continue;
            }
            let logits = self.weight.product(&h.narrow(0, at, n)?)?; // [n, vocab]
            let (logits, slope) = capped(logits, self.cap)?;
            let (mut loss, mut probs) = match self.targets.as_ref().map(|targets| &targets[at..at + n]) {
                None => (vec![0.0; n], None),
                Some(targets) if is_cpu_f32(&logits) => {
                    let data = super::with_f32(&logits, |l| Ok(l.to_vec()))?;
                    let (nll, probs) = chunk_cpu(data, vocab, targets, self.smoothing, self.tracked);
                    (nll, probs.map(|p| Tensor::from_vec(p, (n, vocab), &Device::Cpu)).transpose()?)
                }
                Some(targets) => chunk_reference(&logits, targets, self.smoothing, self.tracked)?,
            };
            if let Some((reference, weight)) = &self.against {
                let (kl, slopes) = kl::chunk(&logits, &reference.logits(at, n)?, self.tracked)?;
                loss.iter_mut().zip(&kl).for_each(|(loss, kl)| *loss += *weight as f32 * kl);
                apart += kl.into_iter().map(f64::from).sum::<f64>();
                if let Some(slopes) = slopes {
                    let slopes = (slopes * *weight)?;
                    probs = Some(match probs {
                        Some(p) => (p + slopes)?,
                        None => slopes,
                    });
                }
            }
            nll.extend(loss);
            if let Some(p) = probs {
                let p = if let Some(slope) = slope { (p * slope)? } else { p };
                grads.push(self.weight.product_t(&p)?); // [n, hidden]
            }
            at += n;
        }
        *self.apart.lock() = apart;
        if self.tracked {
            let unit = if grads.is_empty() {
                Tensor::zeros((0, hidden), h.dtype(), h.device())?
            } else {
                Tensor::cat(&grads, 0)?
            };
            *self.unit_grad.lock() = Some(unit);
        }
        Ok(nll)
    }
}

impl HeadNll {
    /// Whether nothing but the softmax stands between the head's kernels.
    fn is_plain(&self, h: &Tensor) -> bool {
        self.cap.is_none() && self.against.is_none() && self.weight.has_kernels() && is_cpu_f32(h)
    }

    /// Losses of some rows of `h` `[rows, hidden]` and, if wanted, `(softmax - onehot) W`: the logits are never copied.
    fn plain_chunk(&self, h: &Tensor, (at, n): (usize, usize), targets: &[u32]) -> Result<(Vec<f32>, Option<Tensor>)> {
        let (hidden, vocab) = (self.weight.in_dim(), self.weight.out_dim());
        let logits = super::with_f32(h, |h| self.weight.kernel_product(&h[at * hidden..(at + n) * hidden], None, n))?;
        let (loss, probs) = chunk_cpu(logits, vocab, targets, self.smoothing, self.tracked);
        let grad = probs.map(|p| self.weight.kernel_product_t(&p, n)).transpose()?;
        Ok((loss, grad.map(|g| Tensor::from_vec(g, (n, hidden), &Device::Cpu)).transpose()?))
    }
}

/// Squeezed logits and the squeeze's derivative.
pub(super) fn capped(logits: Tensor, cap: Option<f32>) -> Result<(Tensor, Option<Tensor>)> {
    let Some(cap) = cap.map(f64::from) else { return Ok((logits, None)) };
    let t = super::activate(&(logits / cap)?, super::Act::Tanh)?;
    let slope = (1.0 - t.sqr()?)?;
    Ok(((t * cap)?, Some(slope)))
}

/// Losses of a chunk of logits `[rows, vocab]`, and `softmax - (1 - s) onehot - s / vocab` in their place if wanted.
fn chunk_cpu(
    mut data: Vec<f32>,
    vocab: usize,
    targets: &[u32],
    smoothing: f32,
    grad: bool,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let rows = data.len() / vocab.max(1);
    let (sharp, shared_out) = (1.0 - smoothing, smoothing / vocab as f32);
    let mut nll = vec![0f32; rows];
    let parts = data.chunks_mut(vocab).zip(targets).zip(&mut nll).collect();
    each(parts, |((row, &target), nll): ((&mut [f32], &u32), &mut f32)| {
        *nll = vectorized(
            #[inline(always)]
            || {
                let mut max = f32::NEG_INFINITY;
                for v in row.iter() {
                    max = max.max(*v);
                }
                let picked = row[target as usize] - max;
                let shared = if smoothing > 0.0 { mean(row) - max } else { 0.0 };
                let mut acc = [0f32; 16];
                for chunk in row.chunks_mut(16) {
                    for (a, v) in acc.iter_mut().zip(chunk) {
                        *v = math::exp(*v - max);
                        *a += *v;
                    }
                }
                let sum: f32 = acc.iter().sum();
                if grad {
                    let inv = 1.0 / sum;
                    for v in row.iter_mut() {
                        *v = *v * inv - shared_out;
                    }
                    row[target as usize] -= sharp;
                }
                // a NaN anywhere in the row must reach the loss: max() skips it, the sum does not
                sum.ln() - sharp * picked - smoothing * shared
            },
        );
    });
    (nll, grad.then_some(data))
}

fn mean(row: &[f32]) -> f32 {
    row.iter().sum::<f32>() / row.len() as f32
}

fn chunk_reference(logits: &Tensor, targets: &[u32], smoothing: f32, grad: bool) -> Result<(Vec<f32>, Option<Tensor>)> {
    let (rows, vocab) = logits.dims2()?;
    let dev = logits.device();
    let dtype = logits.dtype();
    let logp = candle_nn::ops::log_softmax(&logits.to_dtype(candle_core::DType::F32)?, D::Minus1)?;
    let idx = Tensor::new(targets, dev)?.reshape((rows, 1))?;
    let nll = smoothed_nll(&logp, &idx, smoothing.into())?.to_vec1::<f32>()?;
    let probs = if grad {
        let minus = Tensor::full(smoothing - 1.0, (rows, 1), dev)?;
        let onehot = Tensor::zeros((rows, vocab), candle_core::DType::F32, dev)?.scatter_add(&idx, &minus, 1)?;
        let each = f64::from(smoothing) / vocab as f64;
        Some(((logp.exp()? + onehot)? - each)?.to_dtype(dtype)?)
    } else {
        None
    };
    Ok((nll, probs))
}

impl CustomOp1 for HeadNll {
    fn name(&self) -> &'static str {
        "head-nll"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let data = super::f32_slice(storage, layout)?.to_vec();
        let h = Tensor::from_vec(data, layout.shape(), &Device::Cpu)?;
        let nll = self.run(&h)?;
        let n = nll.len();
        super::cpu_result(nll, n)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let device = storage.device().clone();
        let copy = storage.try_clone(layout)?;
        let h = Tensor::from_storage(
            Storage::Cuda(copy),
            layout.shape().clone(),
            candle_core::op::BackpropOp::none(),
            false,
        );
        let nll = self.run(&h)?;
        let n = nll.len();
        Ok((device.storage_from_cpu_storage(&CpuStorage::F32(nll))?, n.into()))
    }

    fn bwd(&self, h: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        match &*self.unit_grad.lock() {
            Some(unit) => {
                let g = grad.to_dtype(h.dtype())?.reshape((grad.elem_count(), 1))?;
                Ok(Some(unit.broadcast_mul(&g)?))
            }
            None => bail!("head-nll: backward without a tracked forward"),
        }
    }
}

/// Cross-entropy with label smoothing (Szegedy et al. 2016; torch's `CrossEntropyLoss(label_smoothing=s)`):
/// `-(1 - s) logp[target] - s mean(logp)` of each row. `logp` `[n, labels]` f32, `targets` `[n, 1]` -> `[n]`;
/// differentiable.
///
/// # Errors
/// Shapes that do not fit.
pub fn smoothed_nll(logp: &Tensor, targets: &Tensor, smoothing: f64) -> Result<Tensor> {
    let picked = logp.gather(targets, 1)?.squeeze(1)?.neg()?;
    if smoothing == 0.0 {
        return Ok(picked);
    }
    (picked * (1.0 - smoothing))? - (logp.mean(1)? * smoothing)?
}

/// [`smoothed_nll`] of `log softmax(cap(h W))`: `h` `[rows, hidden]`, `targets` `[rows]` -> `[rows]` f32. Without
/// smoothing (0), the negative log-likelihood of the targets.
///
/// # Errors
/// A target outside the vocabulary; shapes that do not fit.
pub fn head_nll(h: &Tensor, weight: &Weight, targets: &[u32], cap: Option<f32>, smoothing: f64) -> Result<Tensor> {
    Ok(head_nll_against(h, weight, (targets, smoothing), cap, None)?.0)
}

/// As [`head_nll`], plus, of each row, so many times its divergence from a reference ([`super::kl_rows`]); and the sum of the
/// divergences. The logits of both are there for a chunk of rows at a time.
///
/// # Errors
/// As [`head_nll`]; a reference of other rows or another vocabulary.
pub fn head_nll_against(
    h: &Tensor,
    weight: &Weight,
    (targets, smoothing): (&[u32], f64),
    cap: Option<f32>,
    against: Option<(&Reference, f64)>,
) -> Result<(Tensor, f64)> {
    let (rows, vocab) = (h.dim(0)?, weight.out_dim());
    if targets.len() != rows {
        bail!("head-nll: {rows} rows, {} targets", targets.len());
    }
    if let Some(bad) = targets.iter().find(|&&t| t as usize >= vocab) {
        bail!("head-nll: target {bad} of a vocabulary of {vocab}");
    }
    apply(h, weight, (Some(targets.to_vec()), smoothing), cap, against)
}

/// So many times the divergence of each row of `log softmax(cap(h W))` from a reference ([`super::kl_rows`]), `[rows]` f32; and
/// the sum of the divergences. Logits are there for a chunk of rows at a time.
///
/// # Errors
/// A reference of other rows or another vocabulary; shapes that do not fit.
pub fn head_kl(h: &Tensor, weight: &Weight, cap: Option<f32>, against: (&Reference, f64)) -> Result<(Tensor, f64)> {
    apply(h, weight, (None, 0.0), cap, Some(against))
}

fn apply(
    h: &Tensor,
    weight: &Weight,
    (targets, smoothing): (Option<Vec<u32>>, f64),
    cap: Option<f32>,
    against: Option<(&Reference, f64)>,
) -> Result<(Tensor, f64)> {
    let (rows, hidden) = h.dims2()?;
    if hidden != weight.in_dim() {
        bail!("head-nll: rows of {hidden} for a head of {}", weight.in_dim());
    }
    if let Some((reference, _)) = against {
        reference.check(rows, weight.out_dim())?;
    }
    let h = h.contiguous()?;
    let tracked = h.track_op();
    let apart = Arc::new(Mutex::new(0.0));
    let op = HeadNll {
        weight: weight.clone(),
        targets,
        cap,
        smoothing: smoothing as f32,
        tracked,
        against: against.map(|(reference, weight)| (reference.clone(), weight)),
        apart: Arc::clone(&apart),
        unit_grad: Mutex::new(None),
    };
    let each = if tracked { h.apply_op1(op)? } else { h.apply_op1_no_bwd(&op)? };
    let apart = *apart.lock();
    Ok((each, apart))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    #[test]
    fn loss_and_gradient_equal_those_of_plain_log_softmax() {
        let dev = Device::Cpu;
        let table = Tensor::randn(0f32, 1.0, (37, 12), &dev).unwrap();
        let weights = [Weight::view_of(&table).unwrap(), Weight::from_out_in(&table).unwrap()];
        let caps = weights.iter().flat_map(|w| [(w, None), (w, Some(1.5f32))]);
        for ((weight, cap), smoothing) in caps.flat_map(|c| [(c, 0.0), (c, 0.1), (c, 0.7)]) {
            let h = Var::randn(0f32, 1.0, (9, 12), &dev).unwrap();
            let targets: Vec<u32> = (0..9).map(|i| i * 4).collect();
            let scale = Tensor::randn(0f32, 1.0, 9, &dev).unwrap();
            let fast = head_nll(&h, weight, &targets, cap, smoothing).unwrap();
            let mut logits = h.matmul(&table.t().unwrap()).unwrap();
            if let Some(cap) = cap.map(f64::from) {
                logits = ((logits / cap).unwrap().tanh().unwrap() * cap).unwrap();
            }
            let logp = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap();
            let idx = Tensor::new(&targets[..], &dev).unwrap().reshape((9, 1)).unwrap();
            // torch: cross-entropy against (1 - s) onehot + s / classes
            let share = Tensor::full((smoothing / 37.0) as f32, (9, 37), &dev).unwrap();
            let rest = Tensor::full((1.0 - smoothing) as f32, (9, 1), &dev).unwrap();
            let aim = share.scatter_add(&idx, &rest, 1).unwrap();
            let slow = (&logp * aim).unwrap().sum(1).unwrap().neg().unwrap();
            let diff = |a: &Tensor, b: &Tensor| {
                (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
            };
            assert!(diff(&fast, &slow) < 1e-5);
            assert!(diff(&smoothed_nll(&logp, &idx, smoothing).unwrap(), &slow) < 1e-5);
            let values = logits.detach();
            let (losses, grads) = chunk_reference(&values, &targets, smoothing as f32, true).unwrap();
            let data = values.flatten_all().unwrap().to_vec1().unwrap();
            let (kernel, kernel_grads) = chunk_cpu(data, 37, &targets, smoothing as f32, true);
            assert!(losses.iter().zip(&kernel).all(|(a, b)| (a - b).abs() < 1e-5));
            let kernel_grads = Tensor::from_vec(kernel_grads.unwrap(), (9, 37), &dev).unwrap();
            assert!(diff(&grads.unwrap(), &kernel_grads) < 1e-5);
            let grad = |y: Tensor| {
                let store = (y * &scale).unwrap().sum_all().unwrap().backward().unwrap();
                store.get(&h).unwrap().clone()
            };
            assert!(diff(&grad(fast), &grad(slow)) < 1e-5);
        }
    }

    #[test]
    fn a_nan_in_the_hidden_state_reaches_the_loss() {
        let dev = Device::Cpu;
        let table = Tensor::randn(0f32, 1.0, (37, 2), &dev).unwrap();
        let h = Tensor::new(&[[1f32, f32::NAN]], &dev).unwrap();
        let nll = head_nll(&h, &Weight::view_of(&table).unwrap(), &[3], None, 0.0).unwrap().to_vec1::<f32>().unwrap();
        assert!(nll[0].is_nan());
    }
}
