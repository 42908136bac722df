//! GPT-2 (Radford et al. 2019): pre-norm, learned positions, fused qkv stored `[in, out]`.

use super::{Architecture, Config, ModelError, Names, plain};
use crate::{
    model::{BlockNames, NormKind, Positions},
    nn::HeadShape,
};

const NAMES: Names = Names {
    prefix: "transformer.",
    embed: "wte",
    position: "wpe",
    block: BlockNames {
        q: "h.{}.attn.c_attn",
        o: "h.{}.attn.c_proj",
        up: "h.{}.mlp.c_fc",
        down: "h.{}.mlp.c_proj",
        norm_attn: "h.{}.ln_1",
        norm_mlp: "h.{}.ln_2",
        final_norm: "ln_f",
        ..BlockNames::NONE
    },
    lm_head: "lm_head",
    cls_head: "score",
    tag_head: "classifier",
    ..Names::NONE
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let hidden = c.usize("n_embd")?;
    let heads = c.usize("n_head")?;
    let layers = c.layers("n_layer")?;
    let mut shape = HeadShape::plain(heads, hidden / heads.max(1));
    if !c.bool_or("scale_attn_weights", true) {
        shape.scale = 1.0;
    }
    Ok(Architecture {
        family: "gpt2",
        hidden,
        heads: shape,
        ff: c.usize_or("n_inner", 4 * hidden),
        vocab: c.usize("vocab_size")?,
        max_positions: c.usize_or("n_positions", 1024),
        norm: NormKind::LayerNorm,
        norm_eps: c.f64_or("layer_norm_epsilon", 1e-5),
        positions: Positions::Learned { first: 0 },
        causal: true,
        act: c.act("activation_function", "gelu_new")?,
        conv1d: true,
        tied_head: c.bool_or("tie_word_embeddings", true),
        scale_by_layer: c.bool_or("scale_attn_by_inverse_layer_idx", false),
        ..plain(c, NAMES, layers)?
    })
}
