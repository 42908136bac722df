//! Where AdapterHub puts an adapter's tensors: by the names of the blocks' norms.

use crate::{
    delta::{Half, Site, SiteId},
    model::{Architecture, Base},
};

/// The path ahead of the adapter's name, without the family's prefix: `encoder.layer.3.output.adapters`.
///
/// BERT's and T5's sublayers are modules of their own and hold their adapters (`....output.LayerNorm` beside
/// `....output.adapters`); other blocks hold both (`h.3.ln_2` beside `h.3.output_adapters.adapters`).
pub(super) fn path(arch: &Architecture, layer: usize, half: Half) -> String {
    let norm = match half {
        Half::Attn => arch.names.norm_attn,
        Half::Mlp => arch.names.norm_mlp,
    };
    let (parent, own) = norm.rsplit_once('.').unwrap_or(("", norm));
    let in_sublayer = own == "LayerNorm" || parent.rsplit('.').next().is_some_and(|p| p.parse::<usize>().is_ok());
    let module = match (in_sublayer, half) {
        (true, _) => "adapters",
        (false, Half::Attn) => "attention_adapters.adapters",
        (false, Half::Mlp) => "output_adapters.adapters",
    };
    format!("{}.{module}", Architecture::module(parent, layer))
}

/// All sublayers of a base with their paths.
pub(super) fn all(base: &Base) -> Vec<(SiteId, usize, Half, String)> {
    let of = |(id, e): (SiteId, &crate::delta::SiteEntry)| match e.site {
        Site::Sublayer { layer, half } => Some((id, layer, half, path(&base.arch, layer, half))),
        _ => None,
    };
    base.sites.iter().filter_map(of).collect()
}
