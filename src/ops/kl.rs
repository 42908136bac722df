//! The divergence from a frozen model's distribution over the vocabulary: what holds a trained model to it (distillation;
//! Li & Hoiem 2017, "Learning without Forgetting").
//!
//! `KL(q || p) = sum_v q_v (ln q_v - ln p_v)` of each row, `q` being the reference's softmax and `p` the trained one's. Its
//! gradient by the trained logits is `p - q`. The reference is kept as hidden states: its logits are there for a chunk of
//! rows at a time, and are computed again where the backward pass needs them.

use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

use super::{
    Weight, each, is_cpu_f32, linear, math,
    nll::{CHUNK_ELEMENTS, capped},
    vectorized, with_f32,
};

/// What rows are compared with: a frozen model's hidden states ahead of its language-model head, and that head.
#[derive(Debug, Clone)]
pub struct Reference {
    h: Tensor,
    weight: Weight,
    bias: Option<Tensor>,
    cap: Option<f32>,
}

impl Reference {
    /// `h` `[rows, hidden]`, `weight` hidden -> vocabulary; logits are squeezed to `cap * tanh(logit / cap)`. No gradient goes
    /// to any of them.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn new(h: &Tensor, weight: &Weight, bias: Option<&Tensor>, cap: Option<f32>) -> Result<Self> {
        let (_, hidden) = h.dims2()?;
        if hidden != weight.in_dim() || bias.is_some_and(|b| b.elem_count() != weight.out_dim()) {
            let (i, o) = (weight.in_dim(), weight.out_dim());
            bail!("kl: hidden states {:?} and bias {:?} for a head {i} -> {o}", h.shape(), bias.map(Tensor::shape));
        }
        let h = h.detach().contiguous()?;
        Ok(Self { h, weight: weight.clone(), bias: bias.map(Tensor::detach), cap })
    }

    /// Whether it is for so many rows over so many tokens.
    ///
    /// # Errors
    /// It is not.
    pub(super) fn check(&self, rows: usize, vocab: usize) -> Result<()> {
        let (own, of) = (self.h.dim(0)?, self.weight.out_dim());
        if (own, of) != (rows, vocab) {
            bail!("kl: logits of {rows} rows over {vocab} tokens, and a reference of {own} rows over {of}");
        }
        Ok(())
    }

    /// Logits of some of the rows, `[n, vocab]` f32.
    pub(super) fn logits(&self, at: usize, n: usize) -> Result<Tensor> {
        let logits = linear(&self.h.narrow(0, at, n)?, &self.weight, self.bias.as_ref())?;
        Ok(capped(logits.detach().to_dtype(DType::F32)?, self.cap)?.0)
    }
}

/// Rows of logits that may be there at a time, those of the reference included.
pub(super) fn rows_of_chunk(rows: usize, vocab: usize) -> usize {
    (CHUNK_ELEMENTS / 2 / vocab.max(1)).clamp(1, rows.max(1))
}

/// Divergences of a chunk, and `p - q` in the dtype of `logits` if wanted: `logits` and `reference` `[n, vocab]`.
pub(super) fn chunk(logits: &Tensor, reference: &Tensor, grad: bool) -> Result<(Vec<f32>, Option<Tensor>)> {
    if is_cpu_f32(logits) && is_cpu_f32(reference) {
        chunk_cpu(logits, reference, grad)
    } else {
        chunk_reference(logits, reference, grad)
    }
}

fn chunk_reference(logits: &Tensor, reference: &Tensor, grad: bool) -> Result<(Vec<f32>, Option<Tensor>)> {
    let log_softmax = |t: &Tensor| candle_nn::ops::log_softmax(&t.to_dtype(DType::F32)?, D::Minus1);
    let (logp, logq) = (log_softmax(logits)?, log_softmax(reference)?);
    let q = logq.exp()?;
    let kl = (&q * (&logq - &logp)?)?.sum(1)?.to_vec1::<f32>()?;
    let apart = if grad { Some((logp.exp()? - q)?.to_dtype(logits.dtype())?) } else { None };
    Ok((kl, apart))
}

fn chunk_cpu(logits: &Tensor, reference: &Tensor, grad: bool) -> Result<(Vec<f32>, Option<Tensor>)> {
    let (rows, vocab) = logits.dims2()?;
    let mut trained = with_f32(logits, |l| Ok(l.to_vec()))?;
    let mut frozen = with_f32(reference, |l| Ok(l.to_vec()))?;
    let mut kl = vec![0f32; rows];
    let parts = trained.chunks_mut(vocab).zip(frozen.chunks_mut(vocab)).zip(&mut kl).collect();
    each(parts, |((p, q), kl): ((&mut [f32], &mut [f32]), &mut f32)| {
        *kl = vectorized(
            #[inline(always)]
            || row(p, q, grad),
        );
    });
    let apart = if grad { Some(Tensor::from_vec(trained, (rows, vocab), &Device::Cpu)?) } else { None };
    Ok((kl, apart))
}

/// The divergence of a row; with `grad`, `p - q` in the place of the trained logits. Equal rows give exactly 0.
#[inline(always)]
fn row(p: &mut [f32], q: &mut [f32], grad: bool) -> f32 {
    let (max_p, max_q) = (largest(p), largest(q));
    let (mut sums_p, mut sums_q, mut crossed) = ([0f32; 16], [0f32; 16], [0f32; 16]);
    for (p, q) in p.chunks_mut(16).zip(q.chunks_mut(16)) {
        for ((p, q), ((sum_p, sum_q), cross)) in
            p.iter_mut().zip(q).zip(sums_p.iter_mut().zip(&mut sums_q).zip(&mut crossed))
        {
            let (log_p, log_q) = (*p - max_p, *q - max_q);
            (*p, *q) = (math::exp(log_p), math::exp(log_q));
            *sum_p += *p;
            *sum_q += *q;
            *cross += *q * (log_q - log_p);
        }
    }
    let sum = |lanes: [f32; 16]| lanes.iter().sum::<f32>();
    let (sum_p, sum_q) = (sum(sums_p), sum(sums_q));
    if grad {
        let (of_p, of_q) = (1.0 / sum_p, 1.0 / sum_q);
        for (p, q) in p.iter_mut().zip(q.iter()) {
            *p = *p * of_p - *q * of_q;
        }
    }
    // a NaN anywhere reaches the sums, which max() skips
    sum(crossed) / sum_q + (sum_p / sum_q).ln()
}

#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    for v in row {
        max = max.max(*v);
    }
    max
}

struct KlRows {
    reference: Reference,
}

impl KlRows {
    fn run(&self, logits: &Tensor) -> Result<Vec<f32>> {
        Ok(self.chunks(logits, false)?.into_iter().flat_map(|(kl, _)| kl).collect())
    }

    fn chunks(&self, logits: &Tensor, grad: bool) -> Result<Vec<(Vec<f32>, Option<Tensor>)>> {
        let (rows, vocab) = logits.dims2()?;
        let per = rows_of_chunk(rows, vocab);
        let part = |at: usize| {
            let n = per.min(rows - at);
            chunk(&logits.narrow(0, at, n)?, &self.reference.logits(at, n)?, grad)
        };
        (0..rows).step_by(per).map(part).collect()
    }
}

impl CustomOp1 for KlRows {
    fn name(&self) -> &'static str {
        "kl-rows"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let data = super::f32_slice(storage, layout)?.to_vec();
        let kl = self.run(&Tensor::from_vec(data, layout.shape(), &Device::Cpu)?)?;
        let n = kl.len();
        super::cpu_result(kl, n)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let device = storage.device().clone();
        let copy = Storage::Cuda(storage.try_clone(layout)?);
        let logits = Tensor::from_storage(copy, layout.shape().clone(), candle_core::op::BackpropOp::none(), false);
        let kl = self.run(&logits)?;
        let n = kl.len();
        Ok((device.storage_from_cpu_storage(&CpuStorage::F32(kl))?, n.into()))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let parts: Vec<Tensor> =
            self.chunks(&logits.detach(), true)?.into_iter().filter_map(|(_, apart)| apart).collect();
        if parts.is_empty() {
            return Ok(Some(logits.zeros_like()?.detach()));
        }
        let g = grad.to_dtype(logits.dtype())?.reshape((grad.elem_count(), 1))?;
        Ok(Some(Tensor::cat(&parts, 0)?.broadcast_mul(&g)?))
    }
}

/// `KL(reference || softmax(logits))` of each row: `logits` `[rows, vocab]` f32 -> `[rows]` f32; differentiable.
///
/// # Errors
/// A reference of other rows or another vocabulary.
pub fn kl_rows(logits: &Tensor, reference: &Reference) -> Result<Tensor> {
    let (rows, vocab) = logits.dims2()?;
    reference.check(rows, vocab)?;
    let logits = logits.contiguous()?;
    let op = KlRows { reference: reference.clone() };
    if logits.track_op() { logits.apply_op1(op) } else { logits.apply_op1_no_bwd(&op) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{head_kl, head_nll, head_nll_against};
    use candle_core::Var;

    const ROWS: usize = 7;
    const HIDDEN: usize = 12;
    const VOCAB: usize = 37;

    fn draw(shape: (usize, usize)) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn rows_of(t: &Tensor) -> Vec<Vec<f64>> {
        t.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
    }

    /// `sum q (ln q - ln p)` of two rows of logits, in f64.
    fn dense(p: &[f64], q: &[f64]) -> f64 {
        let log_softmax = |row: &[f64]| -> Vec<f64> {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = row.iter().map(|z| (z - max).exp()).sum::<f64>().ln() + max;
            row.iter().map(|z| z - sum).collect()
        };
        let (p, q) = (log_softmax(p), log_softmax(q));
        q.iter().zip(&p).map(|(q, p)| q.exp() * (q - p)).sum()
    }

    /// The logits of a head, plainly: `[rows, vocab]`.
    fn logits_of(h: &Tensor, table: &Tensor, bias: Option<&Tensor>, cap: Option<f32>) -> Tensor {
        let mut z = h.matmul(&table.t().unwrap()).unwrap();
        if let Some(bias) = bias {
            z = z.broadcast_add(bias).unwrap();
        }
        match cap.map(f64::from) {
            Some(cap) => ((z / cap).unwrap().tanh().unwrap() * cap).unwrap(),
            None => z,
        }
    }

    fn near(a: &Tensor, b: &Tensor) -> bool {
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        flat(a).iter().zip(flat(b)).all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + b.abs()))
    }

    #[test]
    fn the_value_is_the_dense_one_and_the_slope_that_of_central_differences() {
        let (table, bias) = (draw((VOCAB, HIDDEN)), draw((1, VOCAB)).squeeze(0).unwrap());
        let weight = Weight::from_out_in(&table).unwrap();
        let frozen = draw((ROWS, HIDDEN));
        for (bias, cap) in [(None, None), (Some(&bias), None), (None, Some(2.5)), (Some(&bias), Some(2.5))] {
            let reference = Reference::new(&frozen, &weight, bias, cap).unwrap();
            let q = rows_of(&logits_of(&frozen, &table, bias, cap));
            let logits = Var::from_tensor(&(draw((ROWS, VOCAB)) * 2.0).unwrap()).unwrap();
            let scale = draw((1, ROWS)).squeeze(0).unwrap();
            let kl = kl_rows(&logits, &reference).unwrap();
            let p = rows_of(&logits);
            for ((got, p), q) in kl.to_vec1::<f32>().unwrap().iter().zip(&p).zip(&q) {
                assert!((f64::from(*got) - dense(p, q)).abs() < 2e-5 * (1.0 + dense(p, q)), "{got} {}", dense(p, q));
                assert!(*got > 0.0);
            }
            let grads = (kl * &scale).unwrap().sum_all().unwrap().backward().unwrap();
            let (found, scale) = (rows_of(grads.get(&logits).unwrap()), scale.to_vec1::<f32>().unwrap());
            let h = 1e-5;
            for (i, (p, q)) in p.iter().zip(&q).enumerate() {
                for (v, found) in found[i].iter().enumerate() {
                    let moved = |by: f64| {
                        let mut to = p.clone();
                        to[v] += by;
                        f64::from(scale[i]) * dense(&to, q)
                    };
                    let slope = (moved(h) - moved(-h)) / (2.0 * h);
                    assert!((slope - found).abs() < 2e-5, "row {i}, token {v}: {slope} {found}");
                }
            }
        }
    }

    #[test]
    fn the_kernel_is_the_reference() {
        // widths around those of the lanes
        for vocab in [1, 15, 16, 17, VOCAB] {
            let (p, q) = ((draw((ROWS, vocab)) * 3.0).unwrap(), (draw((ROWS, vocab)) * 3.0).unwrap());
            let (slow, slow_apart) = chunk_reference(&p, &q, true).unwrap();
            let (fast, fast_apart) = chunk_cpu(&p, &q, true).unwrap();
            assert!(
                slow.iter().zip(&fast).all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + a)),
                "{vocab}: {slow:?} {fast:?}"
            );
            assert!(near(&slow_apart.unwrap(), &fast_apart.unwrap()), "{vocab}");
            assert!(chunk_cpu(&p, &q, false).unwrap().1.is_none());
        }
    }

    #[test]
    fn equal_rows_are_not_apart_at_all() {
        let (table, h) = (draw((VOCAB, HIDDEN)), draw((ROWS, HIDDEN)));
        let weight = Weight::from_out_in(&table).unwrap();
        let reference = Reference::new(&h, &weight, None, Some(3.0)).unwrap();
        let logits = Var::from_tensor(&reference.logits(0, ROWS).unwrap()).unwrap();
        let kl = kl_rows(&logits, &reference).unwrap();
        assert_eq!(kl.to_vec1::<f32>().unwrap(), [0.0; ROWS]);
        let grads = kl.sum_all().unwrap().backward().unwrap();
        let grad = grads.get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(grad.iter().all(|g| *g == 0.0));
    }

    #[test]
    fn beside_the_loss_of_a_frozen_head_it_is_the_same_as_alone() {
        let (table, other) = (draw((VOCAB, HIDDEN)), draw((VOCAB, HIDDEN)));
        let targets: Vec<u32> = (0..ROWS as u32).map(|i| i * 5).collect();
        let weights = [Weight::view_of(&table).unwrap(), Weight::from_out_in(&table).unwrap()];
        for (weight, cap) in weights.iter().flat_map(|w| [(w, None), (w, Some(1.5f32))]) {
            // the reference may have a head of its own
            let against = Weight::from_out_in(&other).unwrap();
            let reference = Reference::new(&draw((ROWS, HIDDEN)), &against, None, cap).unwrap();
            let h = Var::from_tensor(&draw((ROWS, HIDDEN))).unwrap();
            let scale = draw((1, ROWS)).squeeze(0).unwrap();
            let (both, sum) = head_nll_against(&h, weight, (&targets, 0.1), cap, Some((&reference, 0.7))).unwrap();
            let kl = kl_rows(&logits_of(&h, &table, None, cap), &reference).unwrap();
            let alone = head_nll(&h, weight, &targets, cap, 0.1).unwrap();
            let apart = f64::from(kl.sum_all().unwrap().to_scalar::<f32>().unwrap());
            assert!((sum - apart).abs() < 1e-4, "{sum} {apart}");
            let sum = (alone + (kl * 0.7).unwrap()).unwrap();
            assert!(near(&both, &sum));
            let grad = |y: Tensor| {
                let store = (y * &scale).unwrap().sum_all().unwrap().backward().unwrap();
                store.get(&h).unwrap().clone()
            };
            assert!(near(&grad(both), &grad(sum)));
            let grad_alone = |y: Tensor| grad((y * 0.7).unwrap());
            let kl = kl_rows(&logits_of(&h, &table, None, cap), &reference).unwrap();
            let (only, told) = head_kl(&h, weight, cap, (&reference, 0.7)).unwrap();
            assert!((told - apart).abs() < 1e-4 && near(&only, &(&kl * 0.7).unwrap()));
            assert!(near(&grad(only), &grad_alone(kl)), "the divergence without the loss");
            let (plain, told) = head_nll_against(&h.detach(), weight, (&targets, 0.1), cap, None).unwrap();
            assert!(near(&plain, &head_nll(&h, weight, &targets, cap, 0.1).unwrap()) && told == 0.0);
        }
    }

    #[test]
    fn chunks_cover_every_row_and_misfits_and_nan_are_seen() {
        for (rows, vocab) in [(0, 5), (1, 1), (100, CHUNK_ELEMENTS), (5, CHUNK_ELEMENTS / 4), (7, 0)] {
            let per = rows_of_chunk(rows, vocab);
            assert!(per >= 1 && (per == 1 || per * vocab * 2 <= CHUNK_ELEMENTS), "{rows} {vocab}: {per}");
        }
        let weight = Weight::from_out_in(&draw((VOCAB, HIDDEN))).unwrap();
        let reference = Reference::new(&draw((ROWS, HIDDEN)), &weight, None, None).unwrap();
        let error = kl_rows(&draw((ROWS + 1, VOCAB)), &reference).unwrap_err().to_string();
        assert!(error.contains("8 rows") && error.contains("7 rows"), "{error}");
        assert!(kl_rows(&draw((ROWS, VOCAB + 1)), &reference).is_err());
        assert!(Reference::new(&draw((ROWS, HIDDEN + 1)), &weight, None, None).is_err());
        let empty = Reference::new(&draw((ROWS, HIDDEN)).narrow(0, 0, 0).unwrap(), &weight, None, None).unwrap();
        assert_eq!(kl_rows(&draw((ROWS, VOCAB)).narrow(0, 0, 0).unwrap(), &empty).unwrap().dims(), [0]);
        let mut sick = vec![0f32; ROWS * VOCAB];
        sick[VOCAB + 3] = f32::NAN;
        let sick = Tensor::from_vec(sick, (ROWS, VOCAB), &Device::Cpu).unwrap();
        let kl = kl_rows(&sick, &reference).unwrap().to_vec1::<f32>().unwrap();
        assert!(kl[1].is_nan() && kl[0].is_finite());
    }
}
