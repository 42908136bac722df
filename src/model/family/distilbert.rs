//! DistilBERT (Sanh et al. 2019): BERT's blocks without segments and pooler; texts are classified by two layers.

use super::{Architecture, Config, ModelError, Names, plain};
use crate::{
    model::{BlockNames, ClsInner, NormKind, Placement, Positions},
    nn::HeadShape,
    ops::Act,
};

const NAMES: Names = Names {
    prefix: "distilbert.",
    embed: "embeddings.word_embeddings",
    position: "embeddings.position_embeddings",
    embed_norm: "embeddings.LayerNorm",
    block: BlockNames {
        q: "transformer.layer.{}.attention.q_lin",
        k: "transformer.layer.{}.attention.k_lin",
        v: "transformer.layer.{}.attention.v_lin",
        o: "transformer.layer.{}.attention.out_lin",
        up: "transformer.layer.{}.ffn.lin1",
        down: "transformer.layer.{}.ffn.lin2",
        norm_attn: "transformer.layer.{}.sa_layer_norm",
        norm_mlp: "transformer.layer.{}.output_layer_norm",
        ..BlockNames::NONE
    },
    lm_head: "vocab_projector",
    lm_bias: "vocab_projector",
    lm_dense: "vocab_transform",
    lm_norm: "vocab_layer_norm",
    cls_head: "classifier",
    cls_inner: Some(ClsInner { dense: "pre_classifier", out: "classifier", act: Act::Relu }),
    ..Names::NONE
};

pub(super) fn architecture(c: &Config<'_>) -> Result<Architecture, ModelError> {
    let hidden = c.usize("dim")?;
    let heads = c.usize("n_heads")?;
    let layers = c.layers("n_layers")?;
    Ok(Architecture {
        family: "distilbert",
        hidden,
        heads: HeadShape::plain(heads, hidden / heads.max(1)),
        ff: c.usize("hidden_dim")?,
        vocab: c.usize("vocab_size")?,
        max_positions: c.usize("max_position_embeddings")?,
        norm: NormKind::LayerNorm,
        norm_eps: 1e-12,
        placement: Placement::Post,
        positions: Positions::Learned { first: 0 },
        act: c.act("activation", "gelu")?,
        tied_head: c.bool_or("tie_word_embeddings", true),
        ..plain(c, NAMES, layers)?
    })
}
