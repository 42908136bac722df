//! Patches of the input embeddings: low-rank updates of the table, replaced rows, whole tables.

use candle_core::{Result, Tensor};

use super::DeltaBatch;
use crate::delta::SiteId;

impl DeltaBatch {
    /// `out` `[rows, hidden]`: the base's embeddings of `tokens`, one per row. Differentiable, any device.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn embed(&self, site: SiteId, tokens: &[u32], mut out: Tensor) -> Result<Tensor> {
        for (slot, patches) in self.at(site) {
            let Some(idx) = slot.index(out.device())? else { continue };
            let own_tokens: Vec<u32> = slot.rows.iter().flat_map(|r| &tokens[r.clone()]).copied().collect();
            let before = out.index_select(&idx, 0)?;
            let mut own = before.clone();
            for (_, patch) in patches {
                own = patch.embed(&own_tokens, &own)?;
            }
            out = out.index_add(&idx, &(own - before)?, 0)?;
        }
        Ok(out)
    }
}
