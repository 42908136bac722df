//! What a model is, as data: the blocks read it, families fill it in.

use std::path::PathBuf;

use crate::{
    delta::{Problem, Site, Stack, Task},
    nn::{HeadShape, RopeScaling},
    ops::Act,
};

/// Why a base could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing or unreadable.
    #[error("cannot read {path}: {source}", path = .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `config.json` is not what it should be.
    #[error("config.json: {0}")]
    Config(String),
    /// The checkpoint lacks a tensor or has it in another shape.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// The option is not supported here.
    #[error("{0}")]
    Unsupported(String),
    /// The tensor library failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Which normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Mean and variance, gain and bias.
    LayerNorm,
    /// Root mean square, gain only.
    RmsNorm,
}

/// Where a block normalises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Before each half; a final norm closes the stack.
    Pre,
    /// After each half's residual sum.
    Post,
}

/// How positions enter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// A trained table, whose first so many rows are no positions (RoBERTa counts from its padding token's id + 1).
    Learned {
        /// The row of position 0.
        first: usize,
    },
    /// Rotation of queries and keys, by layer: [`LayerAttn::rotary`].
    Rotary,
    /// A bias of the scores by distance, one table for all layers of a stack (T5).
    Relative {
        /// Distances are counted in so many classes.
        buckets: usize,
        /// From this distance on all are one class.
        max_distance: usize,
    },
}

/// Frequencies of rotary positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RotaryShape {
    /// Base of the frequencies.
    pub theta: f64,
    /// Stretching.
    pub scaling: RopeScaling,
    /// Numbers of each head that turn; the others stay (Phi-3's partial rotary).
    pub dim: usize,
}

/// How one layer attends.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LayerAttn {
    /// Only the last so many positions are seen (its own included).
    pub window: Option<usize>,
    /// Its rotary positions, if the model has such.
    pub rotary: Option<RotaryShape>,
}

/// Which MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(act(up))`.
    Plain,
    /// `down(act(gate) * up)`.
    Gated,
}

/// A head that the base itself brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseHead {
    /// `SeqCls` or `TokenCls`.
    pub task: Task,
    /// How its outputs are read.
    pub problem: Problem,
    /// Label names in index order.
    pub labels: Vec<String>,
}

/// Names of a block's modules below the bare model; `{}` is the layer. Empty where the family has none.
#[derive(Debug, Clone, Copy)]
pub struct BlockNames {
    /// Query, or the fused projection.
    pub q: &'static str,
    /// Key; empty if fused.
    pub k: &'static str,
    /// Value; empty if fused.
    pub v: &'static str,
    /// Norm of each head's query.
    pub q_norm: &'static str,
    /// Norm of each head's key.
    pub k_norm: &'static str,
    /// Attention output.
    pub o: &'static str,
    /// Bias of the scores by distance, in the first layer.
    pub relative_bias: &'static str,
    /// Cross-attention: query, key, value, output.
    pub cross: [&'static str; 4],
    /// Gate; empty for a plain MLP, and if it is fused with `up`.
    pub gate: &'static str,
    /// First MLP projection.
    pub up: &'static str,
    /// Second MLP projection.
    pub down: &'static str,
    /// Norm of the attention half.
    pub norm_attn: &'static str,
    /// A second norm of the attention half, of its output before the residual sum.
    pub norm_attn_out: &'static str,
    /// Norm of the cross-attention.
    pub norm_cross: &'static str,
    /// Norm of the MLP half.
    pub norm_mlp: &'static str,
    /// A second norm of the MLP half, of its output before the residual sum.
    pub norm_mlp_out: &'static str,
    /// Norm of the stack's output; not by layer.
    pub final_norm: &'static str,
}

impl BlockNames {
    /// No module at all.
    pub const NONE: Self = Self {
        q: "",
        k: "",
        v: "",
        q_norm: "",
        k_norm: "",
        o: "",
        relative_bias: "",
        cross: [""; 4],
        gate: "",
        up: "",
        down: "",
        norm_attn: "",
        norm_attn_out: "",
        norm_cross: "",
        norm_mlp: "",
        norm_mlp_out: "",
        final_norm: "",
    };
}

/// Names of a family's modules below the bare model. Empty where the family has none.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// What a model with a head puts before the bare model's names, e.g. `model.`.
    pub prefix: &'static str,
    /// Token table.
    pub embed: &'static str,
    /// Position table.
    pub position: &'static str,
    /// Segment table.
    pub token_type: &'static str,
    /// Norm after the embeddings.
    pub embed_norm: &'static str,
    /// Blocks; of an encoder-decoder, the decoder's.
    pub block: BlockNames,
    /// Blocks of an encoder-decoder's encoder.
    pub encoder: BlockNames,
    /// Pooler.
    pub pooler: &'static str,
    /// Language-model head. Never prefixed.
    pub lm_head: &'static str,
    /// Module that holds the language-model head's bias. Never prefixed.
    pub lm_bias: &'static str,
    /// Dense layer before a masked-language-model head. Never prefixed.
    pub lm_dense: &'static str,
    /// Norm after that dense layer.
    pub lm_norm: &'static str,
    /// Classification head that PEFT saves for this family: `score` or `classifier`. Never prefixed.
    pub cls_head: &'static str,
    /// The head that labels tokens, where the family calls it otherwise (GPT-2). Never prefixed.
    pub tag_head: &'static str,
    /// Where texts are classified by two layers: the inner and the outer one, and what is between.
    pub cls_inner: Option<ClsInner>,
}

impl Names {
    /// No module at all.
    pub const NONE: Self = Self {
        prefix: "",
        embed: "",
        position: "",
        token_type: "",
        embed_norm: "",
        block: BlockNames::NONE,
        encoder: BlockNames::NONE,
        pooler: "",
        lm_head: "",
        lm_bias: "",
        lm_dense: "",
        lm_norm: "",
        cls_head: "",
        tag_head: "",
        cls_inner: None,
    };

    /// The name of a head of one layer for a task.
    pub fn head_of(&self, task: Task) -> &'static str {
        if task == Task::TokenCls && !self.tag_head.is_empty() { self.tag_head } else { self.cls_head }
    }
}

/// A classification head of two layers, which reads a text's first row: `out(act(dense(x)))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClsInner {
    /// The inner layer, `[hidden, hidden]`.
    pub dense: &'static str,
    /// The outer layer, `[labels, hidden]`.
    pub out: &'static str,
    /// Between them.
    pub act: Act,
}

/// A model family member, completely described.
#[derive(Debug, Clone)]
pub struct Architecture {
    /// `llama`, `gpt2`, `bert` ...
    pub family: &'static str,
    /// `model_type` of the config.
    pub model_type: String,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Blocks; of an encoder-decoder, the decoder's.
    pub layers: usize,
    /// Blocks of an encoder-decoder's encoder; 0 for all others. Sites count these layers first, then the decoder's.
    pub encoder_layers: usize,
    /// Heads of attention.
    pub heads: HeadShape,
    /// Width of the MLP.
    pub ff: usize,
    /// Tokens.
    pub vocab: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Which norm.
    pub norm: NormKind,
    /// Added to the variance.
    pub norm_eps: f64,
    /// Checkpoints store gains less this much (Gemma: 1).
    pub norm_offset: f64,
    /// Where norms stand.
    pub placement: Placement,
    /// Positions.
    pub positions: Positions,
    /// Whether each position sees earlier ones only (of an encoder-decoder, the decoder's).
    pub causal: bool,
    /// How each of `layers` attends.
    pub attn: Vec<LayerAttn>,
    /// MLP form.
    pub mlp: MlpKind,
    /// MLP nonlinearity.
    pub act: Act,
    /// Matrices are stored `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
    pub conv1d: bool,
    /// Segment embeddings; 0 = none.
    pub token_types: usize,
    /// The embeddings are multiplied by this (Gemma: the root of the width).
    pub embed_scale: f64,
    /// The head shares the embedding table.
    pub tied_head: bool,
    /// What the head reads is multiplied by this (tied T5: 1 over the root of the width).
    pub head_scale: f64,
    /// Logits are squeezed to `cap * tanh(logit / cap)` (Gemma 2).
    pub logit_cap: Option<f32>,
    /// Scores of layer i are divided by i + 1 (a GPT-2 option).
    pub scale_by_layer: bool,
    /// First token of a sequence.
    pub bos: Option<u32>,
    /// First token of an encoder-decoder's output.
    pub decoder_start: Option<u32>,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
    /// Padding token.
    pub pad: Option<u32>,
    /// A head of its own, if the checkpoint has one.
    pub head: Option<BaseHead>,
    /// Module names.
    pub names: Names,
}

impl Architecture {
    /// Whether it generates (each position sees only earlier ones).
    pub fn is_causal(&self) -> bool {
        self.causal
    }

    /// Whether its input goes through an encoder and its output through a decoder.
    pub fn is_encoder_decoder(&self) -> bool {
        self.encoder_layers > 0
    }

    /// What it is, in words: for error texts.
    pub fn kind(&self) -> String {
        let kind = match (self.is_encoder_decoder(), self.causal) {
            (true, _) => "encoder-decoder",
            (false, true) => "decoder",
            (false, false) => "encoder",
        };
        format!("a {} {kind}", self.model_type)
    }

    /// Both stacks in the order in which sites count their layers: module names, first layer's number, layers.
    pub(super) fn stacks(&self) -> impl Iterator<Item = StackShape<'_>> {
        let encoder = (self.encoder_layers > 0).then_some(StackShape {
            which: Stack::Encoder,
            names: &self.names.encoder,
            first: 0,
            layers: self.encoder_layers,
            attn: &[],
            causal: false,
        });
        let main = StackShape {
            which: Stack::Main,
            names: &self.names.block,
            first: self.encoder_layers,
            layers: self.layers,
            attn: &self.attn,
            causal: self.causal,
        };
        encoder.into_iter().chain([main])
    }

    /// The row of position 0 in a table of positions.
    pub(super) fn first_position(&self) -> usize {
        match self.positions {
            Positions::Learned { first } => first,
            Positions::Rotary | Positions::Relative { .. } => 0,
        }
    }

    /// Width of the queries of one position.
    pub fn q_width(&self) -> usize {
        self.heads.heads * self.heads.head_dim
    }

    /// The module path of a layer's part, without the family prefix.
    pub fn module(template: &str, layer: usize) -> String {
        template.replacen("{}", &layer.to_string(), 1)
    }

    /// Width of keys (and values) of one position of one layer.
    pub fn kv_width(&self) -> usize {
        self.heads.kv_heads * self.heads.head_dim
    }
}

/// One stack of blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct StackShape<'a> {
    pub(super) which: Stack,
    pub(super) names: &'a BlockNames,
    /// Number of its first layer among the model's sites.
    pub(super) first: usize,
    pub(super) layers: usize,
    /// How each layer attends; empty: to everything.
    pub(super) attn: &'a [LayerAttn],
    pub(super) causal: bool,
}

impl StackShape<'_> {
    /// The site of the norm behind its last layer.
    pub(super) fn final_norm(&self) -> Site {
        if self.which == Stack::Encoder { Site::EncoderNorm } else { Site::FinalNorm }
    }
}
