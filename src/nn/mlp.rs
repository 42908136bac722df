//! The feed-forward half of a block: plain (`down(act(up(x)))`) or gated (`down(act(gate(x)) * up(x))`, Shazeer 2020).

use candle_core::{Result, Tensor};

use super::{Cx, Linear};
use crate::ops::{self, Act};

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
    /// `[rows, hidden]` -> the same.
    ///
    /// # Errors
    /// Those of candle.
    pub fn forward(&self, x: &Tensor, cx: &Cx<'_>) -> Result<Tensor> {
        let h = self.up.forward(x, cx)?; // [rows, f] or [rows, 2 f]
        let h = if self.gated { ops::gate(&h, self.act)? } else { ops::activate(&h, self.act)? };
        self.down.forward(&h, cx) // [rows, hidden]
    }
}
