//! Llama 2 and 3 (Touvron et al. 2023), and the same block for Mistral (sliding window), Qwen2 (qkv bias) and Qwen3 (norms
//! of queries and keys).

use super::{Architecture, Config, ModelError, Names, plain, rope};
use crate::{
    model::{BlockNames, LayerAttn, MlpKind, Positions},
    nn::HeadShape,
};

pub(super) const LLAMA: Names = Names {
    prefix: "model.",
    embed: "embed_tokens",
    block: BlockNames {
        q: "layers.{}.self_attn.q_proj",
        k: "layers.{}.self_attn.k_proj",
        v: "layers.{}.self_attn.v_proj",
        o: "layers.{}.self_attn.o_proj",
        gate: "layers.{}.mlp.gate_proj",
        up: "layers.{}.mlp.up_proj",
        down: "layers.{}.mlp.down_proj",
        norm_attn: "layers.{}.input_layernorm",
        norm_mlp: "layers.{}.post_attention_layernorm",
        final_norm: "norm",
        ..BlockNames::NONE
    },
    lm_head: "lm_head",
    cls_head: "score",
    ..Names::NONE
};

const QWEN3: Names = Names {
    block: BlockNames { q_norm: "layers.{}.self_attn.q_norm", k_norm: "layers.{}.self_attn.k_norm", ..LLAMA.block },
    ..LLAMA
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let model_type = c.str("model_type")?;
    let hidden = c.usize("hidden_size")?;
    let heads = c.usize("num_attention_heads")?;
    let layers = c.layers("num_hidden_layers")?;
    let qwen3 = model_type == "qwen3";
    let head_dim = c.usize_or("head_dim", if qwen3 { 128 } else { hidden / heads.max(1) });
    let attn = LayerAttn { window: window(c, &model_type)?, rotary: Some(rope::shape(c, head_dim)?) };
    Ok(Architecture {
        family: "llama",
        hidden,
        heads: HeadShape { kv_heads: c.usize_or("num_key_value_heads", heads), ..HeadShape::plain(heads, head_dim) },
        ff: c.usize("intermediate_size")?,
        vocab: c.usize("vocab_size")?,
        max_positions: c.usize("max_position_embeddings")?,
        norm_eps: c.f64_or("rms_norm_eps", 1e-6),
        positions: Positions::Rotary,
        causal: true,
        attn: vec![attn; layers],
        mlp: MlpKind::Gated,
        act: c.act("hidden_act", "silu")?,
        tied_head: c.bool_or("tie_word_embeddings", false),
        ..plain(c, if qwen3 { QWEN3 } else { LLAMA }, layers)?
    })
}

/// Mistral always slides when a window is given; Qwen only with `use_sliding_window`, and then only in upper layers.
fn window(c: &Config<'_>, model_type: &str) -> Result<Option<usize>, ModelError> {
    match model_type {
        "mistral" => Ok(c.maybe_usize("sliding_window")),
        "qwen2" | "qwen3" if c.bool_or("use_sliding_window", false) => Err(ModelError::Unsupported(format!(
            "config.json: {model_type} with use_sliding_window is not supported; false is accepted"
        ))),
        _ => Ok(None),
    }
}
