//! GPT-2 (Radford et al. 2019): pre-norm, learned positions, fused qkv stored `[in, out]`.

use super::{Architecture, Config, ModelError, Names};
use crate::{
    model::{MlpKind, NormKind, Placement, Positions},
    nn::HeadShape,
    ops::{Act, AttnMask},
};

const NAMES: Names = Names {
    prefix: "transformer.",
    embed: "wte",
    position: "wpe",
    token_type: "",
    embed_norm: "",
    q: "h.{}.attn.c_attn",
    k: "",
    v: "",
    o: "h.{}.attn.c_proj",
    gate: "",
    up: "h.{}.mlp.c_fc",
    down: "h.{}.mlp.c_proj",
    norm_attn: "h.{}.ln_1",
    norm_mlp: "h.{}.ln_2",
    final_norm: "ln_f",
    pooler: "",
    lm_head: "lm_head",
    cls_head: "score",
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let hidden = c.usize("n_embd")?;
    let heads = c.usize("n_head")?;
    let head_dim = hidden / heads.max(1);
    let act = c.str("activation_function")?;
    let scale = if c.bool_or("scale_attn_weights", true) { 1.0 / (head_dim as f32).sqrt() } else { 1.0 };
    Ok(Architecture {
        family: "gpt2",
        model_type: "gpt2".into(),
        hidden,
        layers: c.usize("n_layer")?,
        heads: HeadShape { heads, kv_heads: heads, head_dim, scale },
        ff: c.usize_or("n_inner", 4 * hidden),
        vocab: c.usize("vocab_size")?,
        max_positions: c.usize_or("n_positions", 1024),
        norm: NormKind::LayerNorm,
        norm_eps: c.f64_or("layer_norm_epsilon", 1e-5),
        placement: Placement::Pre,
        positions: Positions::Learned,
        mask: AttnMask { causal: true, window: None },
        mlp: MlpKind::Plain,
        act: Act::from_hf(&act)
            .ok_or_else(|| ModelError::Config(format!("activation_function {act:?} is not known")))?,
        conv1d: true,
        token_types: 0,
        tied_head: c.bool_or("tie_word_embeddings", true),
        scale_by_layer: c.bool_or("scale_attn_by_inverse_layer_idx", false),
        bos: c.tokens("bos_token_id").first().copied(),
        eos: c.tokens("eos_token_id"),
        pad: c.tokens("pad_token_id").first().copied(),
        head: c.head(),
        names: NAMES,
    })
}
