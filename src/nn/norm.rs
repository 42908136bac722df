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
}
