//! Gemma 2 and 3 (Gemma Team 2024, 2025): norms before and after both halves with gains stored less one, scaled
//! embeddings, layers that see a window and layers that see all; Gemma 2 caps scores and logits, Gemma 3 norms queries and
//! keys and turns the two kinds of layers by different frequencies.

use serde_json::Value;

use super::{Architecture, Config, ModelError, Names, llama::LLAMA, plain, rope};
use crate::{
    model::{BlockNames, LayerAttn, MlpKind, Positions, RotaryShape},
    nn::{HeadShape, RopeScaling},
};

const GEMMA2: Names = Names {
    block: BlockNames {
        norm_attn_out: "layers.{}.post_attention_layernorm",
        norm_mlp: "layers.{}.pre_feedforward_layernorm",
        norm_mlp_out: "layers.{}.post_feedforward_layernorm",
        ..LLAMA.block
    },
    ..LLAMA
};

const GEMMA3: Names = Names {
    block: BlockNames { q_norm: "layers.{}.self_attn.q_norm", k_norm: "layers.{}.self_attn.k_norm", ..GEMMA2.block },
    ..GEMMA2
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let model_type = c.str("model_type")?;
    let three = model_type == "gemma3_text";
    let hidden = c.usize("hidden_size")?;
    let heads = c.usize("num_attention_heads")?;
    let layers = c.layers("num_hidden_layers")?;
    let head_dim = c.usize_or("head_dim", 256);
    let scale = c.f64_or("query_pre_attn_scalar", 256.0).powf(-0.5) as f32;
    if c.bool_or("use_bidirectional_attention", false) {
        return Err(ModelError::Unsupported(
            "config.json: use_bidirectional_attention is not supported; false is accepted".into(),
        ));
    }
    Ok(Architecture {
        family: "gemma",
        hidden,
        heads: HeadShape {
            heads,
            kv_heads: c.usize_or("num_key_value_heads", 4),
            head_dim,
            scale,
            cap: c.cap("attn_logit_softcapping", (!three).then_some(50.0)),
        },
        ff: c.usize("intermediate_size")?,
        vocab: c.usize("vocab_size")?,
        max_positions: c.usize_or("max_position_embeddings", if three { 131_072 } else { 8192 }),
        norm_eps: c.f64_or("rms_norm_eps", 1e-6),
        norm_offset: 1.0,
        positions: Positions::Rotary,
        causal: true,
        attn: attention(c, layers, head_dim, three)?,
        mlp: MlpKind::Gated,
        act: c.act("hidden_activation", "gelu_pytorch_tanh")?,
        embed_scale: (hidden as f64).sqrt(),
        tied_head: c.bool_or("tie_word_embeddings", true),
        logit_cap: c.cap("final_logit_softcapping", (!three).then_some(30.0)),
        ..plain(c, if three { GEMMA3 } else { GEMMA2 }, layers)?
    })
}

/// Which layers slide and how each kind turns: `layer_types`, else every second (Gemma 2) or all but every
/// `sliding_window_pattern`-th (Gemma 3).
fn attention(c: &Config<'_>, layers: usize, head_dim: usize, three: bool) -> Result<Vec<LayerAttn>, ModelError> {
    let window = Some(c.usize_or("sliding_window", 4096));
    let kinds = c.get("rope_parameters").filter(|p| p.get("full_attention").is_some());
    let (global, local) = match kinds {
        // transformers 5: one set of parameters per kind of layer
        Some(p) => {
            let of = |kind: &str| rope::read(c, p.get(kind), head_dim);
            (of("full_attention")?, of("sliding_attention")?)
        }
        None if three => {
            let global = match c.get("rope_theta") {
                Some(_) => rope::shape(c, head_dim)?,
                None => RotaryShape { theta: 1e6, ..rope::shape(c, head_dim)? },
            };
            let theta = c.f64_or("rope_local_base_freq", 10_000.0);
            (global, RotaryShape { theta, scaling: RopeScaling::None, dim: head_dim })
        }
        None => (rope::shape(c, head_dim)?, rope::shape(c, head_dim)?),
    };
    let sliding = LayerAttn { window, rotary: Some(local) };
    let full = LayerAttn { window: None, rotary: Some(global) };
    let Some(types) = c.get("layer_types") else {
        let every = if three { c.usize_or("sliding_window_pattern", 6) } else { 2 };
        return Ok((1..=layers).map(|i| if i % every.max(1) == 0 { full } else { sliding }).collect());
    };
    let types = types.as_array().filter(|t| t.len() == layers);
    let types = types.ok_or_else(|| ModelError::Config(format!("layer_types is not a list of {layers} names")))?;
    let one = |t: &Value| match t.as_str() {
        Some("sliding_attention") => Ok(sliding),
        Some("full_attention") => Ok(full),
        _ => Err(ModelError::Config(format!(
            "layer_types has {t}; accepted are \"sliding_attention\", \"full_attention\""
        ))),
    };
    types.iter().map(one).collect()
}
