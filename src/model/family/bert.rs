//! BERT (Devlin et al. 2018): bidirectional, post-norm, learned positions and segments, pooler. RoBERTa (Liu et al. 2019)
//! counts positions from its padding token on, has no pooler, and a classification head of two layers.

use super::{Architecture, Config, ModelError, Names, plain};
use crate::{
    model::{BlockNames, ClsInner, NormKind, Placement, Positions},
    nn::HeadShape,
    ops::Act,
};

const BERT: Names = Names {
    prefix: "bert.",
    embed: "embeddings.word_embeddings",
    position: "embeddings.position_embeddings",
    token_type: "embeddings.token_type_embeddings",
    embed_norm: "embeddings.LayerNorm",
    block: BlockNames {
        q: "encoder.layer.{}.attention.self.query",
        k: "encoder.layer.{}.attention.self.key",
        v: "encoder.layer.{}.attention.self.value",
        o: "encoder.layer.{}.attention.output.dense",
        up: "encoder.layer.{}.intermediate.dense",
        down: "encoder.layer.{}.output.dense",
        norm_attn: "encoder.layer.{}.attention.output.LayerNorm",
        norm_mlp: "encoder.layer.{}.output.LayerNorm",
        ..BlockNames::NONE
    },
    pooler: "pooler.dense",
    lm_head: "cls.predictions.decoder",
    lm_bias: "cls.predictions",
    lm_dense: "cls.predictions.transform.dense",
    lm_norm: "cls.predictions.transform.LayerNorm",
    cls_head: "classifier",
    ..Names::NONE
};

const ROBERTA: Names = Names {
    prefix: "roberta.",
    lm_head: "lm_head.decoder",
    lm_bias: "lm_head",
    lm_dense: "lm_head.dense",
    lm_norm: "lm_head.layer_norm",
    cls_inner: Some(ClsInner { dense: "classifier.dense", out: "classifier.out_proj", act: Act::Tanh }),
    ..BERT
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let model_type = c.str("model_type")?;
    let roberta = model_type == "roberta";
    let heads = c.usize("num_attention_heads")?;
    let kind = c.get("position_embedding_type").and_then(|v| v.as_str()).unwrap_or("absolute");
    if kind != "absolute" {
        return Err(ModelError::Unsupported(format!(
            "config.json: position_embedding_type {kind:?} is not supported; absolute is accepted"
        )));
    }
    if c.bool_or("is_decoder", false) {
        return Err(ModelError::Unsupported(format!("config.json: {model_type} with is_decoder is not supported")));
    }
    let hidden = c.usize("hidden_size")?;
    let layers = c.layers("num_hidden_layers")?;
    let table = c.usize("max_position_embeddings")?;
    let first = if roberta { c.usize_or("pad_token_id", 1) + 1 } else { 0 };
    Ok(Architecture {
        family: if roberta { "roberta" } else { "bert" },
        hidden,
        heads: HeadShape::plain(heads, hidden / heads.max(1)),
        ff: c.usize("intermediate_size")?,
        vocab: c.usize("vocab_size")?,
        max_positions: table.saturating_sub(first),
        norm: NormKind::LayerNorm,
        norm_eps: c.f64_or("layer_norm_eps", if roberta { 1e-5 } else { 1e-12 }),
        placement: Placement::Post,
        positions: Positions::Learned { first },
        act: c.act("hidden_act", "gelu")?,
        token_types: c.usize_or("type_vocab_size", 2),
        tied_head: c.bool_or("tie_word_embeddings", true),
        ..plain(c, if roberta { ROBERTA } else { BERT }, layers)?
    })
}
