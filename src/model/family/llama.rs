//! Llama 2 and 3 (Touvron et al. 2023), and the same block for Mistral (sliding window) and Qwen2 (qkv bias).

use serde_json::Value;

use super::{Architecture, Config, ModelError, Names};
use crate::{
    model::{MlpKind, NormKind, Placement, Positions},
    nn::{HeadShape, RopeScaling},
    ops::{Act, AttnMask},
};

const NAMES: Names = Names {
    prefix: "model.",
    embed: "embed_tokens",
    position: "",
    token_type: "",
    embed_norm: "",
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
    pooler: "",
    lm_head: "lm_head",
    cls_head: "score",
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let model_type = c.str("model_type")?;
    let hidden = c.usize("hidden_size")?;
    let heads = c.usize("num_attention_heads")?;
    let head_dim = c.usize_or("head_dim", hidden / heads.max(1));
    let act = c.str("hidden_act")?;
    Ok(Architecture {
        family: "llama",
        hidden,
        layers: c.usize("num_hidden_layers")?,
        heads: HeadShape {
            heads,
            kv_heads: c.usize_or("num_key_value_heads", heads),
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
        },
        ff: c.usize("intermediate_size")?,
        vocab: c.usize("vocab_size")?,
        max_positions: c.usize("max_position_embeddings")?,
        norm: NormKind::RmsNorm,
        norm_eps: c.f64_or("rms_norm_eps", 1e-6),
        placement: Placement::Pre,
        positions: rotary(c)?,
        mask: AttnMask { causal: true, window: window(c, &model_type)? },
        mlp: MlpKind::Gated,
        act: Act::from_hf(&act).ok_or_else(|| ModelError::Config(format!("hidden_act {act:?} is not known")))?,
        conv1d: false,
        token_types: 0,
        tied_head: c.bool_or("tie_word_embeddings", false),
        scale_by_layer: false,
        bos: c.tokens("bos_token_id").first().copied(),
        eos: c.tokens("eos_token_id"),
        pad: c.tokens("pad_token_id").first().copied(),
        head: c.head(),
        names: NAMES,
        model_type,
    })
}

/// Mistral always slides when a window is given; Qwen2 only with `use_sliding_window`, and then only in upper layers.
fn window(c: &Config<'_>, model_type: &str) -> Result<Option<usize>, ModelError> {
    match model_type {
        "mistral" => Ok(c.get("sliding_window").and_then(Value::as_u64).map(|w| w as usize)),
        "qwen2" if c.bool_or("use_sliding_window", false) => Err(ModelError::Unsupported(
            "config.json: qwen2 with use_sliding_window is not supported; false is accepted".into(),
        )),
        _ => Ok(None),
    }
}

/// Transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`.
fn rotary(c: &Config<'_>) -> Result<Positions, ModelError> {
    let params = c.get("rope_parameters").or_else(|| c.get("rope_scaling"));
    let num = |key: &str| params.and_then(|p| p.get(key)).and_then(Value::as_f64);
    let theta = num("rope_theta").unwrap_or_else(|| c.f64_or("rope_theta", 10_000.0));
    let kind =
        params.and_then(|p| p.get("rope_type").or_else(|| p.get("type"))).and_then(Value::as_str).unwrap_or("default");
    let need = |key: &str| num(key).ok_or_else(|| ModelError::Config(format!("rope scaling {kind:?} lacks {key}")));
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original: need("original_max_position_embeddings")?,
        },
        other => {
            return Err(ModelError::Unsupported(format!(
                "config.json: rope type {other:?} is not supported; supported are default, linear, llama3"
            )));
        }
    };
    Ok(Positions::Rotary { theta, scaling })
}
