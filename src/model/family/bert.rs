//! BERT (Devlin et al. 2018): bidirectional, post-norm, learned positions and segments, pooler.

use super::{Architecture, Config, ModelError, Names};
use crate::{
    model::{MlpKind, NormKind, Placement, Positions},
    nn::HeadShape,
    ops::{Act, AttnMask},
};

const NAMES: Names = Names {
    prefix: "bert.",
    embed: "embeddings.word_embeddings",
    position: "embeddings.position_embeddings",
    token_type: "embeddings.token_type_embeddings",
    embed_norm: "embeddings.LayerNorm",
    q: "encoder.layer.{}.attention.self.query",
    k: "encoder.layer.{}.attention.self.key",
    v: "encoder.layer.{}.attention.self.value",
    o: "encoder.layer.{}.attention.output.dense",
    gate: "",
    up: "encoder.layer.{}.intermediate.dense",
    down: "encoder.layer.{}.output.dense",
    norm_attn: "encoder.layer.{}.attention.output.LayerNorm",
    norm_mlp: "encoder.layer.{}.output.LayerNorm",
    final_norm: "",
    pooler: "pooler.dense",
    lm_head: "",
    cls_head: "classifier",
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let hidden = c.usize("hidden_size")?;
    let heads = c.usize("num_attention_heads")?;
    let head_dim = hidden / heads.max(1);
    let act = c.str("hidden_act")?;
    let kind = c.get("position_embedding_type").and_then(|v| v.as_str()).unwrap_or("absolute");
    if kind != "absolute" {
        return Err(ModelError::Unsupported(format!(
            "config.json: position_embedding_type {kind:?} is not supported; absolute is accepted"
        )));
    }
    if c.bool_or("is_decoder", false) {
        return Err(ModelError::Unsupported("config.json: bert with is_decoder is not supported".into()));
    }
    Ok(Architecture {
        family: "bert",
        model_type: "bert".into(),
        hidden,
        layers: c.usize("num_hidden_layers")?,
        heads: HeadShape { heads, kv_heads: heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() },
        ff: c.usize("intermediate_size")?,
        vocab: c.usize("vocab_size")?,
        max_positions: c.usize("max_position_embeddings")?,
        norm: NormKind::LayerNorm,
        norm_eps: c.f64_or("layer_norm_eps", 1e-12),
        placement: Placement::Post,
        positions: Positions::Learned,
        mask: AttnMask { causal: false, window: None },
        mlp: MlpKind::Plain,
        act: Act::from_hf(&act).ok_or_else(|| ModelError::Config(format!("hidden_act {act:?} is not known")))?,
        conv1d: false,
        token_types: c.usize_or("type_vocab_size", 2),
        tied_head: false,
        scale_by_layer: false,
        bos: None,
        eos: vec![],
        pad: c.tokens("pad_token_id").first().copied(),
        head: c.head(),
        names: NAMES,
    })
}
