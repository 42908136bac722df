//! A frozen linear whose output columns are one or more sites.

use candle_core::{Result, Tensor};

use super::Cx;
use crate::{
    delta::Part,
    ops::{self, Weight},
};

/// `x W + b`, then the deltas' patches.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[in, out]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// Sites and their columns (several where projections are fused).
    pub parts: Vec<Part>,
}

impl Linear {
    /// `[rows, in]` -> `[rows, out]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn forward(&self, x: &Tensor, cx: &Cx<'_>) -> Result<Tensor> {
        let y = ops::linear(x, &self.weight, self.bias.as_ref())?;
        cx.deltas.patch(&self.parts, x, y)
    }
}
