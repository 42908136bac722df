//! What tests of gradients share: variables moved away from where they start, and slopes by central differences.

use candle_core::{Tensor, backprop::GradStore};

use super::{optim::global_norm, trainable::NamedVar};
use crate::model::testing::Rng;

/// Moves every variable by up to 0.1, away from where many gradients are zero.
pub(super) fn shake(vars: &[NamedVar], seed: u64) {
    let mut draw = Rng(seed);
    for v in vars {
        let noise: Vec<f32> = (0..v.var.elem_count()).map(|_| 0.2 * draw.uniform() - 0.1).collect();
        let noise = Tensor::from_vec(noise, v.var.shape(), v.var.device()).unwrap();
        v.var.set(&(v.var.as_detached_tensor() + noise).unwrap()).unwrap();
    }
}

/// How a slope by central differences is taken, and how near to a gradient's norm it must be.
#[derive(Clone, Copy)]
pub(super) struct Differences {
    /// Length of the step to either side.
    pub(super) step: f64,
    /// Share of the norm.
    pub(super) relative: f64,
    /// Beside that, for gradients that are small.
    pub(super) absolute: f64,
}

impl Default for Differences {
    fn default() -> Self {
        Self { step: 5e-3, relative: 0.03, absolute: 4e-4 }
    }
}

impl Differences {
    /// As by default, but nearer.
    pub(super) const NEAR: Self = Self { step: 5e-3, relative: 0.02, absolute: 2e-4 };

    /// The slope of a loss along a variable's gradient of this norm: the norm, if the gradient is right.
    pub(super) fn slope(self, v: &NamedVar, grad: &Tensor, norm: f64, loss: impl Fn() -> Tensor) -> f64 {
        let unit = (grad.detach() / norm.max(1e-9)).unwrap();
        let at = v.var.as_detached_tensor().copy().unwrap();
        let value = |step: f64| {
            v.var.set(&(&at + (&unit * step).unwrap()).unwrap()).unwrap();
            f64::from(loss().to_scalar::<f32>().unwrap())
        };
        let slope = (value(self.step) - value(-self.step)) / (2.0 * self.step);
        v.var.set(&at).unwrap();
        slope
    }

    /// That a variable's gradient is there and is that of the loss.
    #[track_caller]
    pub(super) fn assert(self, what: &str, v: &NamedVar, grads: &GradStore, loss: impl Fn() -> Tensor) {
        let name = &v.name;
        let g = grads.get(&v.var).unwrap_or_else(|| panic!("{what} {name}: no gradient"));
        let norm = global_norm([g]).unwrap();
        let slope = self.slope(v, g, norm, loss);
        let near = (slope - norm).abs() <= self.relative * norm + self.absolute;
        assert!(near, "{what} {name}: {slope} by differences, {norm} by the gradient");
    }

    /// That of every variable.
    #[track_caller]
    pub(super) fn assert_all(self, what: &str, vars: &[NamedVar], loss: impl Fn() -> Tensor) {
        let grads = loss().backward().unwrap();
        vars.iter().for_each(|v| self.assert(what, v, &grads, &loss));
    }
}

/// That two gradients of a variable are near each other, or that there is neither.
#[track_caller]
pub(super) fn assert_near(what: &str, (a, b): (Option<&Tensor>, Option<&Tensor>), (relative, absolute): (f64, f64)) {
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (None, None) => return,
        _ => panic!("{what}: {} and {}", a.is_some(), b.is_some()),
    };
    let (norm, apart) = (global_norm([b]).unwrap(), global_norm([&(a - b).unwrap()]).unwrap());
    assert!(apart <= relative * norm + absolute, "{what}: {apart} of {norm}");
}
