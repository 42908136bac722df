//! LN tuning: a norm's gain and bias replaced.

use candle_core::{Result, Tensor};

use crate::ops;

/// `normalised(x) * gain + bias`, computed from the norm's input: the base's gain is never divided by.
#[derive(Debug, Clone)]
pub struct Affine {
    /// `[hidden]`.
    pub gain: Tensor,
    /// `[hidden]`, for LayerNorm.
    pub bias: Option<Tensor>,
    /// Whether the mean is subtracted (LayerNorm).
    pub center: bool,
    /// Added to the variance.
    pub eps: f64,
}

impl Affine {
    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let bias = self.bias.iter().map(|b| ("ln_bias", b));
        std::iter::once(("ln_gain", &self.gain)).chain(bias).collect()
    }

    pub(super) fn map(&self, f: &mut dyn FnMut(&'static str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        self.map_as(["ln_gain", "ln_bias"], f)
    }

    /// As `map`, with other names of gain and bias.
    pub(super) fn map_as(
        &self,
        [gain, bias]: [&'static str; 2],
        f: &mut dyn FnMut(&'static str, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        Ok(Self { gain: f(gain, &self.gain)?, bias: self.bias.as_ref().map(|b| f(bias, b)).transpose()?, ..*self })
    }

    /// `[rows, hidden]` -> the same; gradients reach gain and bias where they are variables.
    ///
    /// # Errors
    /// Those of candle.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (center, eps) = (self.center, self.eps);
        let gain = self.gain.to_dtype(x.dtype())?;
        let bias = self.bias.as_ref().map(|b| b.to_dtype(x.dtype())).transpose()?;
        if !gain.track_op() && !bias.as_ref().is_some_and(Tensor::track_op) {
            return ops::norm(x, &ops::Norm { gain, bias, center, eps });
        }
        // a norm without an affine map, whose backward gives dX only; the affine map is left to autograd
        let unit = ops::Norm { gain: gain.ones_like()?.detach(), bias: None, center, eps };
        let y = ops::scale_columns(&ops::norm(x, &unit)?, &gain)?;
        match bias {
            Some(b) => ops::add_bias(&y, &b),
            None => Ok(y),
        }
    }
}
