//! The end of a half block: adapters, the residual sum, and the norm of a post-norm block.

use candle_core::{Result, Tensor};

use super::{Cx, Norm};
use crate::delta::{AdapterIo, SiteId};

/// Where a half block ends.
#[derive(Debug, Clone, Copy)]
pub struct Sublayer {
    /// Its site.
    pub site: SiteId,
}

impl Sublayer {
    /// A half block from its residual input `x` `[rows, hidden]`: `norm(x + half)`, or `x + half` without a norm. `half` adds its
    /// output to the residual, if it is given that.
    ///
    /// # Errors
    /// Those of candle and of `half`.
    pub fn run(
        &self,
        x: &Tensor,
        norm: Option<&Norm>,
        cx: &Cx<'_>,
        half: impl FnOnce(Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if cx.deltas.touches(self.site) {
            return self.close(x, half(None)?, norm, cx);
        }
        let sum = half(Some(x))?;
        norm.map_or(Ok(sum.clone()), |n| n.forward(&sum, cx))
    }

    /// `norm(x + h)`, or `x + h` without a norm: `h` the sublayer's output, `x` its residual input, `[rows, hidden]`.
    ///
    /// # Errors
    /// Those of candle.
    fn close(&self, x: &Tensor, h: Tensor, norm: Option<&Norm>, cx: &Cx<'_>) -> Result<Tensor> {
        let end = |h: &Tensor| -> Result<Tensor> {
            let sum = (x + h)?;
            norm.map_or(Ok(sum.clone()), |n| n.forward(&sum, cx))
        };
        let needs = cx.deltas.adapter_needs(self.site);
        let sum = if needs.sum || needs.normed { Some((x + &h)?) } else { None };
        let normed = match (&sum, norm) {
            (Some(sum), Some(norm)) if needs.normed => Some(norm.forward(sum, cx)?),
            _ => sum.clone(),
        };
        let io = AdapterIo { residual: x.clone(), sum, normed };
        let h = cx.deltas.adapt(self.site, h, &io)?;
        let y = end(&h)?;
        cx.deltas.close(self.site, &h, y)
    }
}
