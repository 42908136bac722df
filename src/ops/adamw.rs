//! What an optimizer does with every number of every variable: AdamW's update (Loshchilov & Hutter 2019) in one pass over
//! memory instead of a dozen, and the sum of squares that clipping asks for.

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};
use parking_lot::Mutex;

use super::{each, is_cpu_f32, with_f32};

/// Numbers that one thread takes at a time: its four or three rows of them fit into a core's cache. Also what is summed in
/// f32, so that a sum of squares does not depend on the number of threads.
const PART: usize = 16 * 1024;

/// The numbers of one update of one variable.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// `1 - beta1^t` of the t-th update.
    pub correct1: f64,
    /// `sqrt(1 - beta2^t)`.
    pub correct2: f64,
    /// Learning rate of this variable.
    pub lr: f64,
    /// The gradient is multiplied by it first (clipping).
    pub scale: f64,
    /// The variable is multiplied by it first (decoupled weight decay).
    pub decay: f64,
}

/// Updates the f32 variable `var` and its f32 moments `m` and `v` in place: they have storages of their own and one shape,
/// as has `grad`. Untracked.
///
/// `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`, `var = decay var - lr (m / correct1) / (sqrt(v) / correct2 + eps)`.
///
/// # Errors
/// Shapes that differ; tensors that are not whole, or share a storage; the device.
pub fn adamw_in_place(var: &Tensor, m: &Tensor, v: &Tensor, grad: &Tensor, step: &AdamStep) -> Result<()> {
    if [m, v, grad].iter().any(|t| t.shape() != var.shape()) || [var, m, v].iter().any(|t| t.dtype() != DType::F32) {
        let of = |t: &Tensor| format!("{:?} {:?}", t.dtype(), t.shape());
        bail!("adamw: a variable {}, moments {} and {}, a gradient {}", of(var), of(m), of(v), of(grad));
    }
    if one_storage(var, m) || one_storage(var, v) || one_storage(m, v) {
        bail!("adamw: a variable and its moments share their numbers");
    }
    let grad = grad.detach().to_dtype(DType::F32)?.contiguous()?;
    if [var, m, v, &grad].iter().all(|t| is_cpu_f32(t)) {
        return with_f32(&grad, |g| {
            var.inplace_op1(&Taken(&|var: &mut [f32]| {
                let var = Mutex::new(var);
                m.inplace_op1(&Taken(&|m: &mut [f32]| {
                    let m = Mutex::new(m);
                    v.inplace_op1(&Taken(&|v: &mut [f32]| {
                        update(&mut var.lock(), &mut m.lock(), v, g, step);
                        Ok(())
                    }))
                }))
            }))
        });
    }
    reference(var, m, v, &grad, step)
}

/// Whether two tensors are of one storage.
fn one_storage(a: &Tensor, b: &Tensor) -> bool {
    let address = |t: &Tensor| std::ptr::from_ref(&*t.storage_and_layout().0).addr();
    address(a) == address(b)
}

/// The same in plain tensors.
fn reference(var: &Tensor, m: &Tensor, v: &Tensor, grad: &Tensor, step: &AdamStep) -> Result<()> {
    let AdamStep { beta1, beta2, eps, correct1, correct2, lr, scale, decay } = *step;
    let grad = (grad * scale)?;
    let first = ((m * beta1)? + (&grad * (1.0 - beta1))?)?;
    let second = ((v * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
    let denom = ((second.sqrt()? / correct2)? + eps)?;
    let update = ((&first / denom)? * (lr / correct1))?;
    let value = ((var.detach() * decay)? - update)?;
    for (t, value) in [(m, first), (v, second), (var, value)] {
        put(t, &value)?;
    }
    Ok(())
}

/// Writes a whole tensor over another's numbers.
fn put(t: &Tensor, value: &Tensor) -> Result<()> {
    let (all, value) = (t.detach().flatten_all()?, value.flatten_all()?);
    all.slice_set(&value, 0, 0)
}

/// An op in place that hands the numbers on.
struct Taken<'a>(&'a (dyn Fn(&mut [f32]) -> Result<()> + Sync));

impl InplaceOp1 for Taken<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(all) = storage else { bail!("adamw: what is updated is not f32") };
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("adamw: what is updated is not contiguous") };
        (self.0)(&mut all[from..to])
    }
}

fn update(var: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], step: &AdamStep) {
    let parts = var.chunks_mut(PART).zip(m.chunks_mut(PART)).zip(v.chunks_mut(PART).zip(grad.chunks(PART)));
    // the order of operations and their roundings are those of the reference
    let [b1, c1, b2, c2] = [step.beta1, 1.0 - step.beta1, step.beta2, 1.0 - step.beta2].map(|x| x as f32);
    let [root, eps, rate] = [1.0 / step.correct2, step.eps, step.lr / step.correct1].map(|x| x as f32);
    let [scale, decay] = [step.scale, step.decay].map(|x| x as f32);
    each(parts.collect(), |((var, m), (v, grad))| {
        for (((var, m), v), g) in var.iter_mut().zip(m).zip(v).zip(grad) {
            let g = *g * scale;
            *m = *m * b1 + g * c1;
            *v = *v * b2 + g * g * c2;
            let denom = v.sqrt() * root + eps;
            *var = *var * decay - *m / denom * rate;
        }
    });
}

/// The sum of the squares of a tensor's numbers: NaN or infinite where one of them is (or where 16,384 squares leave f32).
///
/// # Errors
/// The device.
pub fn sum_of_squares(t: &Tensor) -> Result<f64> {
    let t = t.detach();
    if !is_cpu_f32(&t) || !t.is_contiguous() {
        return t.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from);
    }
    with_f32(&t, |numbers| {
        let mut sums = vec![0.0f64; numbers.len().div_ceil(PART)];
        each(sums.iter_mut().zip(numbers.chunks(PART)).collect(), |(sum, part)| {
            const LANES: usize = 16;
            let (whole, rest) = part.as_chunks::<LANES>();
            let mut lanes = [0.0f32; LANES];
            for chunk in whole {
                lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x * x);
            }
            let squares = lanes.iter().map(|x| f64::from(*x)).sum::<f64>();
            *sum = squares + rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
        });
        Ok(sums.iter().sum())
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const STEP: AdamStep = AdamStep {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        correct1: 0.271,
        correct2: 0.0547,
        lr: 3e-3,
        scale: 0.37,
        decay: 0.9997,
    };

    #[test]
    fn in_one_pass_as_in_many_bit_for_bit() -> Result<()> {
        for n in [1, 7, PART, 2 * PART + 5] {
            let draw = |std: f32| Tensor::randn(0f32, std, (n,), &Device::Cpu);
            let (var, m, v, g) = (draw(1.0)?, draw(0.1)?, draw(0.1)?.sqr()?, draw(0.2)?);
            let copies = [var.copy()?, m.copy()?, v.copy()?];
            let zeroed = Tensor::cat(&[&g.narrow(0, 0, n / 2)?, &g.narrow(0, n / 2, n - n / 2)?.zeros_like()?], 0)?;
            for g in [&g, &zeroed] {
                adamw_in_place(&var, &m, &v, g, &STEP)?;
                reference(&copies[0], &copies[1], &copies[2], g, &STEP)?;
            }
            for (name, got, want) in [("var", &var, &copies[0]), ("m", &m, &copies[1]), ("v", &v, &copies[2])] {
                let bits =
                    |t: &Tensor| -> Result<Vec<u32>> { Ok(t.to_vec1::<f32>()?.iter().map(|x| x.to_bits()).collect()) };
                let (got, want) = (bits(got)?, bits(want)?);
                // -0 and 0 are one number
                let apart = got.iter().zip(&want).position(|(a, b)| a != b && (a << 1) | (b << 1) != 0);
                assert_eq!(apart, None, "{name} of {n}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_gradient_of_another_shape_or_layout() -> Result<()> {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let (var, m, v) = (zeros((2, 3))?, zeros((2, 3))?, zeros((2, 3))?);
        let error = adamw_in_place(&var, &m, &v, &zeros((3, 2))?, &STEP).unwrap_err().to_string();
        assert!(error.contains("[3, 2]") && error.contains("[2, 3]"), "{error}");
        assert!(adamw_in_place(&var, &m, &m.clone(), &v, &STEP).is_err(), "one storage for both moments");
        let turned = Tensor::arange(1f32, 7f32, &Device::Cpu)?.reshape((3, 2))?.t()?;
        adamw_in_place(&var, &m, &v, &turned, &STEP)?;
        let want = (turned * (STEP.scale * (1.0 - STEP.beta1)))?.flatten_all()?.to_vec1::<f32>()?;
        for (got, want) in m.flatten_all()?.to_vec1::<f32>()?.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        Ok(())
    }

    #[test]
    fn squares_are_summed_whatever_the_length() -> Result<()> {
        for n in [0, 1, 15, 16, 17, PART - 1, PART, 3 * PART + 19] {
            let t = Tensor::randn(0f32, 1f32, (n,), &Device::Cpu)?;
            let want: f64 = t.to_vec1::<f32>()?.iter().map(|x| f64::from(*x).powi(2)).sum();
            let got = sum_of_squares(&t)?;
            assert!((got - want).abs() <= 1e-6 * want, "{n}: {got} {want}");
        }
        let mut wild = vec![1.0f32; 2 * PART];
        wild[PART + 3] = f32::NAN;
        assert!(sum_of_squares(&Tensor::new(wild, &Device::Cpu)?)?.is_nan());
        let turned = Tensor::arange(0f32, 6f32, &Device::Cpu)?.reshape((2, 3))?.t()?;
        assert_eq!(sum_of_squares(&turned)?, 55.0);
        Ok(())
    }
}
