//! The sites that an architecture offers, in forward order.

use super::{
    Architecture, MlpKind,
    arch::{Names, StackShape},
};
use crate::delta::{Half, NormAt, Proj, Site, SiteEntry, SiteTable, Stack};

/// A linear of a layer: module template, projection, width of input and output.
pub(super) type Named = (&'static str, Proj, usize, usize);

/// Which linears of a layer are which columns of their fused matrix.
pub(super) fn qkv(a: &Architecture, stack: &StackShape<'_>) -> Vec<Named> {
    let (q, kv) = (a.q_width(), a.kv_width());
    let n = stack.names;
    if n.k.is_empty() {
        vec![(n.q, Proj::Qkv, a.hidden, q + 2 * kv)]
    } else {
        vec![(n.q, Proj::Q, a.hidden, q), (n.k, Proj::K, a.hidden, kv), (n.v, Proj::V, a.hidden, kv)]
    }
}

/// The linears of cross-attention: query, key, value, output.
pub(super) fn cross(a: &Architecture, stack: &StackShape<'_>) -> [Named; 4] {
    let (q, kv) = (a.q_width(), a.kv_width());
    let [nq, nk, nv, no] = stack.names.cross;
    [
        (nq, Proj::CrossQ, a.hidden, q),
        (nk, Proj::CrossK, a.hidden, kv),
        (nv, Proj::CrossV, a.hidden, kv),
        (no, Proj::CrossO, q, a.hidden),
    ]
}

/// The linears of the MLP's first matrix.
pub(super) fn up(a: &Architecture, stack: &StackShape<'_>) -> Vec<Named> {
    let n = stack.names;
    let up = (n.up, Proj::Up, a.hidden, a.ff);
    match a.mlp {
        MlpKind::Plain => vec![up],
        MlpKind::Gated if n.gate.is_empty() => vec![(n.up, Proj::GateUp, a.hidden, 2 * a.ff)],
        MlpKind::Gated => vec![(n.gate, Proj::Gate, a.hidden, a.ff), up],
    }
}

/// Builds the table. `has_bias(module)` says whether the checkpoint has a bias there.
pub(super) fn table(a: &Architecture, has_bias: impl Fn(&str) -> bool) -> SiteTable {
    let mut t = SiteTable::default();
    let n: &Names = &a.names;
    let mut push = |site, module: String, in_dim, out_dim| {
        let has_bias = !module.is_empty() && has_bias(&module);
        t.push(SiteEntry { site, module, in_dim, out_dim, has_bias });
    };
    push(Site::Embedding, n.embed.into(), 0, a.hidden);
    if !n.embed_norm.is_empty() {
        push(Site::EmbeddingNorm, n.embed_norm.into(), 0, a.hidden);
    }
    for stack in a.stacks() {
        for layer in 0..stack.layers {
            layer_sites(a, &stack, layer, &mut push);
        }
        if !stack.names.final_norm.is_empty() {
            push(stack.final_norm(), stack.names.final_norm.into(), 0, a.hidden);
        }
    }
    if !n.pooler.is_empty() {
        push(Site::Pooler, n.pooler.into(), a.hidden, a.hidden);
    }
    // a masked-language-model head is no site: no task trains or serves it
    if !n.lm_head.is_empty() && a.is_causal() {
        push(Site::LmHead, n.lm_head.into(), a.hidden, a.vocab);
    }
    t
}

fn layer_sites(a: &Architecture, stack: &StackShape<'_>, at: usize, push: &mut impl FnMut(Site, String, usize, usize)) {
    let (n, layer) = (stack.names, stack.first + at);
    let named = |template: &str| Architecture::module(template, at);
    let norm = |push: &mut dyn FnMut(Site, String, usize, usize), name: &str, at: NormAt, width: usize| {
        if !name.is_empty() {
            push(Site::Norm { layer, at }, named(name), 0, width);
        }
    };
    norm(push, n.norm_attn, NormAt::Attn, a.hidden);
    for (name, proj, i, o) in qkv(a, stack) {
        push(Site::Linear { layer, proj }, named(name), i, o);
    }
    norm(push, n.q_norm, NormAt::Query, a.heads.head_dim);
    norm(push, n.k_norm, NormAt::Key, a.heads.head_dim);
    push(Site::KeyValue { layer, stack: stack.which }, String::new(), 0, a.kv_width());
    push(Site::Linear { layer, proj: Proj::O }, named(n.o), a.q_width(), a.hidden);
    norm(push, n.norm_attn_out, NormAt::AttnOut, a.hidden);
    push(Site::Sublayer { layer, half: Half::Attn }, String::new(), a.hidden, a.hidden);
    if !n.norm_cross.is_empty() {
        norm(push, n.norm_cross, NormAt::Cross, a.hidden);
        for (name, proj, i, o) in cross(a, stack) {
            push(Site::Linear { layer, proj }, named(name), i, o);
        }
        push(Site::KeyValue { layer, stack: Stack::Memory }, String::new(), 0, a.kv_width());
    }
    norm(push, n.norm_mlp, NormAt::Mlp, a.hidden);
    for (name, proj, i, o) in up(a, stack) {
        push(Site::Linear { layer, proj }, named(name), i, o);
    }
    push(Site::Linear { layer, proj: Proj::Down }, named(n.down), a.ff, a.hidden);
    norm(push, n.norm_mlp_out, NormAt::MlpOut, a.hidden);
    push(Site::Sublayer { layer, half: Half::Mlp }, String::new(), a.hidden, a.hidden);
}
