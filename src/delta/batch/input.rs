//! Input scales of linears: (IA)3 on feed-forward modules.

use candle_core::{Result, Tensor};

use super::{DeltaBatch, Entry, Part};
use crate::{
    delta::{Patch, SiteId},
    ops::{self, PatchRows, SitePatches},
};

impl DeltaBatch {
    /// Whether any delta of the step scales the input of one of these parts.
    pub(crate) fn scales_input(&self, parts: &[Part]) -> bool {
        self.scales_inputs && parts.iter().any(|(site, _)| !self.input_scales(*site).is_empty())
    }

    /// (slot, scale) of a site, in order.
    pub(super) fn input_scales(&self, site: SiteId) -> Vec<(usize, &Tensor)> {
        let plan = self.plan.get(site).map_or(&[][..], Vec::as_slice);
        let of = |entry: &Entry| {
            let (slot, (_, patches)) = (entry.0, self.entry(entry));
            patches.iter().filter_map(move |(_, p)| if let Patch::InScale(s) = p { Some((slot, s)) } else { None })
        };
        plan.iter().flat_map(of).collect()
    }

    /// The input of a site as its linear sees it: `x` `[rows, in]`, each delta's rows times its scale.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn scaled_input(&self, site: SiteId, x: &Tensor) -> Result<Tensor> {
        let scales = self.input_scales(site);
        if scales.is_empty() {
            return Ok(x.clone());
        }
        if !self.takes_kernels(&[x]) {
            return self.scaled_input_reference(&scales, x);
        }
        let y = x.contiguous()?.copy()?;
        let all = 0..y.dim(1)?;
        // the row kernel has one group per row: all scales of a delta are in it
        let mut groups: Vec<(usize, SitePatches<'_>)> = Vec::new();
        for (slot, s) in scales {
            let scale = (all.clone(), vec![PatchRows::Scale(s)]);
            match groups.last_mut().filter(|(last, _)| *last == slot) {
                Some((_, group)) => group.sites.push(scale),
                None => groups.push((slot, SitePatches { rows: &self.slots[slot].rows, sites: vec![scale] })),
            }
        }
        let groups: Vec<_> = groups.into_iter().map(|(_, group)| group).collect();
        ops::patch_in_place(&y, &y.copy()?, &groups)?;
        Ok(y)
    }

    /// Differentiable, any device.
    pub(super) fn scaled_input_reference(&self, scales: &[(usize, &Tensor)], x: &Tensor) -> Result<Tensor> {
        let mut y = x.clone();
        for (slot, s) in scales {
            let s = s.to_dtype(x.dtype())?;
            let slot = &self.slots[*slot];
            if slot.covers(self.rows) {
                y = ops::scale_columns(&y, &s)?;
                continue;
            }
            let Some(idx) = slot.index(x.device())? else { continue };
            let own = y.contiguous()?.index_select(&idx, 0)?;
            y = y.contiguous()?.index_add(&idx, &(own.broadcast_mul(&s)? - own)?, 0)?;
        }
        Ok(y)
    }
}
