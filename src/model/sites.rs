//! The sites that an architecture offers, in forward order.

use super::{Architecture, NormKind, arch::Names};
use crate::delta::{Half, NormAt, Proj, Site, SiteEntry, SiteTable};

/// Which linears of a layer are which columns of their fused matrix: (template, projection, in, out).
pub(super) fn qkv(a: &Architecture) -> Vec<(&'static str, Proj, usize, usize)> {
    let (q, kv) = (a.heads.heads * a.heads.head_dim, a.kv_width());
    let n = &a.names;
    if n.k.is_empty() {
        vec![(n.q, Proj::Qkv, a.hidden, q + 2 * kv)]
    } else {
        vec![(n.q, Proj::Q, a.hidden, q), (n.k, Proj::K, a.hidden, kv), (n.v, Proj::V, a.hidden, kv)]
    }
}

/// The same for the MLP's first matrix.
pub(super) fn up(a: &Architecture) -> Vec<(&'static str, Proj, usize, usize)> {
    let n = &a.names;
    let up = (n.up, Proj::Up, a.hidden, a.ff);
    if n.gate.is_empty() { vec![up] } else { vec![(n.gate, Proj::Gate, a.hidden, a.ff), up] }
}

/// Builds the table. `has_bias(module)` says whether the checkpoint has a bias there.
pub(super) fn table(a: &Architecture, has_bias: impl Fn(&str) -> bool) -> SiteTable {
    let mut t = SiteTable::default();
    let n: &Names = &a.names;
    let mut push = |site, module: String, in_dim, out_dim| {
        let has_bias = !module.is_empty() && has_bias(&module);
        t.push(SiteEntry { site, module, in_dim, out_dim, has_bias })
    };
    push(Site::Embedding, n.embed.into(), 0, a.hidden);
    if !n.embed_norm.is_empty() {
        push(Site::EmbeddingNorm, n.embed_norm.into(), 0, a.hidden);
    }
    let q_width = a.heads.heads * a.heads.head_dim;
    for layer in 0..a.layers {
        let at = |template: &str| Architecture::module(template, layer);
        push(Site::Norm { layer, at: NormAt::Attn }, at(n.norm_attn), 0, a.hidden);
        for (name, proj, i, o) in qkv(a) {
            push(Site::Linear { layer, proj }, at(name), i, o);
        }
        push(Site::KeyValue { layer }, String::new(), 0, a.kv_width());
        push(Site::Linear { layer, proj: Proj::O }, at(n.o), q_width, a.hidden);
        push(Site::Sublayer { layer, half: Half::Attn }, String::new(), a.hidden, a.hidden);
        push(Site::Norm { layer, at: NormAt::Mlp }, at(n.norm_mlp), 0, a.hidden);
        for (name, proj, i, o) in up(a) {
            push(Site::Linear { layer, proj }, at(name), i, o);
        }
        push(Site::Linear { layer, proj: Proj::Down }, at(n.down), a.ff, a.hidden);
        push(Site::Sublayer { layer, half: Half::Mlp }, String::new(), a.hidden, a.hidden);
    }
    if !n.final_norm.is_empty() {
        push(Site::FinalNorm, n.final_norm.into(), 0, a.hidden);
    }
    if !n.pooler.is_empty() {
        push(Site::Pooler, n.pooler.into(), a.hidden, a.hidden);
    }
    if !n.lm_head.is_empty() {
        push(Site::LmHead, n.lm_head.into(), a.hidden, a.vocab);
    }
    debug_assert!(a.norm == NormKind::LayerNorm || a.names.embed_norm.is_empty());
    t
}
