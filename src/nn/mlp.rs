//! The feed-forward half of a block: plain (`down(act(up(x)))`) or gated (`down(act(gate(x)) * up(x))`, Shazeer 2020).

use candle_core::{Result, Tensor};

use super::{Cx, Linear};
use crate::ops::{self, Act, Ending};

/// A feed-forward layer.
#[derive(Debug, Clone)]
pub struct Mlp {
    /// `[hidden, f]`, or `[hidden, 2 f]` = gate and up side by side.
    pub up: Linear,
    /// `[f, hidden]`.
    pub down: Linear,
    /// The nonlinearity.
    pub act: Act,
    /// Whether `up` holds a gate.
    pub gated: bool,
}

impl Mlp {
    /// `[rows, hidden]` -> the same, added to the residual if one is given.
    ///
    /// # Errors
    /// Those of candle.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>, cx: &Cx<'_>) -> Result<Tensor> {
        let h = if self.gated {
            ops::gate(&self.up.forward(x, cx)?, self.act)? // [rows, 2 f] -> [rows, f]
        } else {
            self.up.forward_to(x, Ending { act: Some(self.act), residual: None }, cx)? // [rows, f]
        };
        self.down.forward_to(&h, Ending { act: None, residual }, cx) // [rows, hidden]
    }
}
