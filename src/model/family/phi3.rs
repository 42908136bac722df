//! Phi-3 (Abdin et al. 2024): Llama's block with fused qkv and fused gate and up projections, possibly partial rotation.

use super::{Architecture, Config, ModelError, Names, llama::LLAMA, plain, rope};
use crate::{
    model::{BlockNames, LayerAttn, MlpKind, Positions},
    nn::HeadShape,
};

const NAMES: Names = Names {
    block: BlockNames {
        q: "layers.{}.self_attn.qkv_proj",
        k: "",
        v: "",
        gate: "",
        up: "layers.{}.mlp.gate_up_proj",
        ..LLAMA.block
    },
    ..LLAMA
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let hidden = c.usize("hidden_size")?;
    let heads = c.usize("num_attention_heads")?;
    let layers = c.layers("num_hidden_layers")?;
    let head_dim = c.usize_or("head_dim", hidden / heads.max(1));
    // a window as long as the context hides nothing
    let max_positions = c.usize("max_position_embeddings")?;
    let window = c.maybe_usize("sliding_window").filter(|w| *w < max_positions);
    let attn = LayerAttn { window, rotary: Some(rope::shape(c, head_dim)?) };
    Ok(Architecture {
        family: "phi3",
        hidden,
        heads: HeadShape { kv_heads: c.usize_or("num_key_value_heads", heads), ..HeadShape::plain(heads, head_dim) },
        ff: c.usize("intermediate_size")?,
        vocab: c.usize("vocab_size")?,
        max_positions,
        norm_eps: c.f64_or("rms_norm_eps", 1e-5),
        positions: Positions::Rotary,
        causal: true,
        attn: vec![attn; layers],
        mlp: MlpKind::Gated,
        act: c.act("hidden_act", "silu")?,
        tied_head: c.bool_or("tie_word_embeddings", false),
        ..plain(c, NAMES, layers)?
    })
}
