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
    /// `norm(x + h)`, or `x + h` without a norm: `h` the sublayer's output, `x` its residual input, `[rows, hidden]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn close(&self, x: &Tensor, h: Tensor, norm: Option<&Norm>, cx: &Cx<'_>) -> Result<Tensor> {
        let end = |h: &Tensor| -> Result<Tensor> {
            let sum = (x + h)?;
            norm.map_or(Ok(sum.clone()), |n| n.forward(&sum, cx))
        };
        if !cx.deltas.touches(self.site) {
            return end(&h);
        }
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
