//! AdamW with fp32 moments, global-norm clipping, and learning-rate schedules.
//!
//! Semantics are torch's: decoupled decay (Loshchilov & Hutter 2019), bias-corrected moments, epsilon outside the square
//! root; schedules are those of `transformers` (with warmup, the first step has learning rate 0).

use candle_core::{DType, Result, Tensor, Var};

use crate::{
    admission::train_params::Schedule,
    ops::{self, AdamStep},
};

/// Fixed numbers of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamParams {
    /// First moment decay.
    pub beta1: f64,
    /// Second moment decay.
    pub beta2: f64,
    /// Epsilon.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

#[derive(Debug)]
struct Slot {
    var: Var,
    decays: bool,
    rate: f64,
    m: Tensor,
    v: Tensor,
}

/// AdamW over a set of variables.
#[derive(Debug)]
pub struct AdamW {
    params: AdamParams,
    step: i32,
    slots: Vec<Slot>,
}

impl AdamW {
    /// `vars`: what is trained, and whether weight decay applies to it. Fixed order.
    ///
    /// # Errors
    /// Allocation of the moments.
    pub fn new(params: AdamParams, vars: impl IntoIterator<Item = (Var, bool)>) -> Result<Self> {
        let slot = |(var, decays): (Var, bool)| {
            let zeros = || Tensor::zeros(var.shape(), DType::F32, var.device());
            Ok(Slot { decays, rate: 1.0, m: zeros()?, v: zeros()?, var })
        };
        Ok(Self { params, step: 0, slots: vars.into_iter().map(slot).collect::<Result<_>>()? })
    }

    /// The same with a factor on the learning rate of each variable, in order (LoRA+).
    #[must_use]
    pub fn with_rates(mut self, rates: impl IntoIterator<Item = f64>) -> Self {
        self.slots.iter_mut().zip(rates).for_each(|(slot, rate)| slot.rate = rate);
        self
    }

    /// First and second moments, in order: the storages that the next update writes into.
    pub fn moments(&self) -> impl Iterator<Item = (&Tensor, &Tensor)> {
        self.slots.iter().map(|s| (&s.m, &s.v))
    }

    /// Goes on after `step` updates with these moments, in order.
    ///
    /// # Errors
    /// Moments of other shapes, or another number of them.
    pub fn restore(&mut self, step: u32, moments: impl ExactSizeIterator<Item = (Tensor, Tensor)>) -> Result<()> {
        if moments.len() != self.slots.len() {
            candle_core::bail!("moments of {} variables for {}", moments.len(), self.slots.len());
        }
        for (slot, (m, v)) in self.slots.iter_mut().zip(moments) {
            if m.shape() != slot.var.shape() || v.shape() != slot.var.shape() {
                candle_core::bail!("moments {:?} of a variable {:?}", m.shape(), slot.var.shape());
            }
            (slot.m, slot.v) = (m, v);
        }
        self.step = step as i32;
        Ok(())
    }

    /// One update. `grads` in the order of the variables, multiplied by `scale` first (clipping).
    ///
    /// # Errors
    /// Shapes that do not fit, or the device.
    pub fn step(&mut self, grads: &[Tensor], lr: f64, scale: f64) -> Result<()> {
        self.step += 1;
        let AdamParams { beta1, beta2, eps, weight_decay } = self.params;
        let correct1 = 1.0 - beta1.powi(self.step);
        let correct2 = (1.0 - beta2.powi(self.step)).sqrt();
        for (slot, grad) in self.slots.iter().zip(grads) {
            let lr = lr * slot.rate;
            let decay = if slot.decays { 1.0 - lr * weight_decay } else { 1.0 };
            let step = AdamStep { beta1, beta2, eps, correct1, correct2, lr, scale, decay };
            let var = slot.var.as_detached_tensor();
            if var.dtype() == DType::F32 {
                ops::adamw_in_place(&var, &slot.m, &slot.v, grad, &step)?;
            } else {
                let wide = var.to_dtype(DType::F32)?;
                ops::adamw_in_place(&wide, &slot.m, &slot.v, grad, &step)?;
                slot.var.set(&wide.to_dtype(var.dtype())?)?;
            }
        }
        Ok(())
    }
}

/// The global 2-norm of a set of tensors; NaN or infinite when any element is.
///
/// # Errors
/// The device.
pub fn global_norm<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<f64> {
    let mut sum = 0.0;
    let mut others = Vec::new(); // on a device: one transfer for all
    for t in tensors {
        if t.device().is_cpu() {
            sum += ops::sum_of_squares(t)?;
        } else {
            others.push(t.detach().to_dtype(DType::F32)?.sqr()?.sum_all()?);
        }
    }
    if !others.is_empty() {
        sum += Tensor::stack(&others, 0)?.to_vec1::<f32>()?.iter().map(|s| f64::from(*s)).sum::<f64>();
    }
    Ok(sum.sqrt())
}

/// The factor that brings a gradient of this norm to at most `clip` (torch's `clip_grad_norm_`); `clip` 0 = off.
pub fn clip_scale(norm: f64, clip: f64) -> f64 {
    if clip <= 0.0 { 1.0 } else { (clip / (norm + 1e-6)).min(1.0) }
}

/// Learning rate per step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// Peak.
    pub peak: f64,
    /// Form after the warmup.
    pub kind: Schedule,
    /// Steps with rising rate.
    pub warmup: u32,
    /// Steps in all.
    pub total: u32,
}

impl LrSchedule {
    /// The rate of a step, counting from 0.
    pub fn at(&self, step: u32) -> f64 {
        if step < self.warmup {
            return self.peak * f64::from(step) / f64::from(self.warmup);
        }
        let span = f64::from(self.total.saturating_sub(self.warmup).max(1));
        let left = f64::from(self.total.saturating_sub(step)) / span;
        self.peak
            * match self.kind {
                Schedule::Constant => 1.0,
                Schedule::Linear => left,
                Schedule::Cosine => 0.5 * (1.0 + ((1.0 - left) * std::f64::consts::PI).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const PARAMS: AdamParams = AdamParams { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

    #[test]
    fn one_step_by_hand() -> Result<()> {
        let var = Var::new(&[1.0f32, -2.0], &Device::Cpu)?;
        let mut adam = AdamW::new(PARAMS, [(var.clone(), true)])?;
        adam.step(&[Tensor::new(&[0.5f32, 0.0], &Device::Cpu)?], 0.1, 1.0)?;
        // m/(1-b1) = g, sqrt(v)/sqrt(1-b2) = |g|: the first update is lr * sign(g); decay multiplies by 1 - 0.1 * 0.01
        let got = var.to_vec1::<f32>()?;
        assert!((got[0] - (0.999 - 0.1)).abs() < 1e-6 && (got[1] - (-2.0 * 0.999)).abs() < 1e-6, "{got:?}");
        Ok(())
    }

    #[test]
    fn many_steps_equal_a_scalar_reference_in_f64() -> Result<()> {
        let grad = |t: usize, i: usize| ((t * 7 + i * 3) as f64 * 0.37).sin() * (0.1 + i as f64);
        let start = [0.3f64, -1.2, 4.0];
        let var = Var::new(&start.map(|x| x as f32), &Device::Cpu)?;
        let frozen_decay = Var::new(&[1.0f32], &Device::Cpu)?;
        let mut adam = AdamW::new(PARAMS, [(var.clone(), true), (frozen_decay.clone(), false)])?;
        let (mut p, mut m, mut v) = (start, [0.0f64; 3], [0.0f64; 3]);
        for t in 1..=50 {
            let lr = 0.01 * t as f64;
            let g: Vec<f32> = (0..3).map(|i| grad(t, i) as f32).collect();
            adam.step(&[Tensor::new(g, &Device::Cpu)?, Tensor::new(&[0.0f32], &Device::Cpu)?], lr, 0.5)?;
            for i in 0..3 {
                let g = grad(t, i) * 0.5;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t as i32)), v[i] / (1.0 - 0.999f64.powi(t as i32)));
                p[i] = p[i] * (1.0 - lr * 0.01) - lr * mh / (vh.sqrt() + 1e-8);
            }
        }
        for (got, want) in var.to_vec1::<f32>()?.iter().zip(p) {
            assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want}");
        }
        assert_eq!(frozen_decay.to_vec1::<f32>()?, [1.0], "no gradient and no decay: no change");
        Ok(())
    }

    #[test]
    fn clipping_is_torchs() -> Result<()> {
        let t = |x: &[f32]| Tensor::new(x, &Device::Cpu);
        let norm = global_norm(&[t(&[3.0])?, t(&[0.0, 4.0])?])?;
        assert!((norm - 5.0).abs() < 1e-9);
        assert!((clip_scale(norm, 0.5) - 0.5 / 5.000001).abs() < 1e-12);
        assert_eq!((clip_scale(norm, 0.0), clip_scale(norm, 10.0)), (1.0, 1.0));
        assert!(global_norm(&[t(&[f32::NAN])?])?.is_nan());
        assert_eq!(global_norm(&[])?, 0.0);
        Ok(())
    }

    #[test]
    fn schedules_are_those_of_transformers() {
        let s = |kind, warmup| LrSchedule { peak: 0.01, kind, warmup, total: 10 };
        let linear: Vec<f64> = (0..10).map(|i| s(Schedule::Linear, 3).at(i)).collect();
        let want = [0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0, 6.0 / 7.0, 5.0 / 7.0, 4.0 / 7.0, 3.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0];
        for (got, want) in linear.iter().zip(want) {
            assert!((got - 0.01 * want).abs() < 1e-15, "{linear:?}");
        }
        assert_eq!(s(Schedule::Linear, 0).at(0), 0.01);
        assert_eq!(s(Schedule::Constant, 0).at(9), 0.01);
        assert!((s(Schedule::Cosine, 0).at(5) - 0.005).abs() < 1e-15);
        assert_eq!(s(Schedule::Linear, 3).at(99), 0.0);
    }
}
