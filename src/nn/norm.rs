//! A frozen normalisation that is a site.

use candle_core::{Result, Tensor};

use super::Cx;
use crate::{delta::Part, ops};

/// The norm, then the deltas' patches.
#[derive(Debug, Clone)]
pub struct Norm {
    /// Gain, bias, kind.
    pub norm: ops::Norm,
    /// Its site.
    pub part: Part,
}

impl Norm {
    /// `[rows, hidden]` -> the same.
    ///
    /// # Errors
    /// Those of candle.
    pub fn forward(&self, x: &Tensor, cx: &Cx<'_>) -> Result<Tensor> {
        let y = ops::norm(x, &self.norm)?;
        cx.deltas.patch(std::slice::from_ref(&self.part), x, y)
    }

    /// Each head of each row by itself: `[rows, heads * width]` -> the same.
    ///
    /// # Errors
    /// Those of candle.
    pub fn forward_heads(&self, x: &Tensor, heads: usize, cx: &Cx<'_>) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let x = x.reshape((rows * heads, width / heads))?; // [rows * heads, head_dim]
        let y = ops::norm(&x, &self.norm)?;
        if !cx.deltas.touches(self.part.0) {
            return y.reshape((rows, width));
        }
        cx.deltas.repeated(heads).patch(std::slice::from_ref(&self.part), &x, y)?.reshape((rows, width))
    }
}
