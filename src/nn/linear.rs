//! A frozen linear whose output columns are one or more sites.

use candle_core::{Result, Tensor};

use super::Cx;
use crate::{
    delta::Part,
    ops::{self, Ending, Weight},
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
        self.forward_to(x, Ending::default(), cx)
    }

    /// The same and what its output goes through: `[rows, in]` -> `[rows, out]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn forward_to(&self, x: &Tensor, ending: Ending<'_>, cx: &Cx<'_>) -> Result<Tensor> {
        if cx.deltas.scales_input(&self.parts) {
            return ending.apply(self.forward_scaled(x, cx)?);
        }
        // while training, product, updates and ending are one op: it keeps one output where separate ones keep several
        let updates = match cx.deltas.updates(&self.parts, x.dim(0)?) {
            None if x.track_op() && !self.parts.iter().any(|(site, _)| cx.deltas.touches(*site)) => Some(Vec::new()),
            updates => updates,
        };
        if let Some(updates) = updates
            && ops::takes_updates(x, &self.weight, self.bias.as_ref(), &updates, ending)
        {
            return ops::updated_linear(x, &self.weight, self.bias.as_ref(), &updates, ending);
        }
        let y = ops::linear(x, &self.weight, self.bias.as_ref())?;
        ending.apply(cx.deltas.patch(&self.parts, x, y)?)
    }

    /// Input scales first. Fused projections see different inputs then, so each part is computed from its own.
    fn forward_scaled(&self, x: &Tensor, cx: &Cx<'_>) -> Result<Tensor> {
        let mut pieces = Vec::with_capacity(self.parts.len());
        let mut plain: Option<Tensor> = None; // the whole output of the input as it is
        for part in &self.parts {
            let (site, columns) = part;
            let scaled = cx.deltas.scales_input(std::slice::from_ref(part));
            let own_x = if scaled { cx.deltas.scaled_input(*site, x)? } else { x.clone() };
            let whole = match &plain {
                Some(y) if !scaled => y.clone(),
                _ => ops::linear(&own_x, &self.weight, self.bias.as_ref())?,
            };
            if self.parts.len() == 1 {
                return cx.deltas.patch(&self.parts, &own_x, whole);
            }
            let y = whole.narrow(1, columns.start, columns.len())?.contiguous()?;
            if !scaled {
                plain = Some(whole);
            }
            pieces.push(cx.deltas.patch(&[(*site, 0..columns.len())], &own_x, y)?);
        }
        Tensor::cat(&pieces, 1)
    }
}
