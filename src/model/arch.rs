//! What a model is, as data: the blocks read it, families fill it in.

use std::path::PathBuf;

use crate::{
    delta::Task,
    nn::{HeadShape, RopeScaling},
    ops::{Act, AttnMask},
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
    /// A trained table.
    Learned,
    /// Rotation of queries and keys.
    Rotary {
        /// Base of the frequencies.
        theta: f64,
        /// Stretching.
        scaling: RopeScaling,
    },
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
    /// Label names in index order.
    pub labels: Vec<String>,
}

/// Names of a family's modules below the bare model; `{}` is the layer.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// What a model with a head puts before the bare model's names, e.g. `model.`.
    pub prefix: &'static str,
    /// Token table.
    pub embed: &'static str,
    /// Position table, if learned.
    pub position: &'static str,
    /// Segment table, if any.
    pub token_type: &'static str,
    /// Norm after the embeddings, if any.
    pub embed_norm: &'static str,
    /// Query, or the fused projection.
    pub q: &'static str,
    /// Key; empty if fused.
    pub k: &'static str,
    /// Value; empty if fused.
    pub v: &'static str,
    /// Attention output.
    pub o: &'static str,
    /// Gate; empty for a plain MLP.
    pub gate: &'static str,
    /// First MLP projection.
    pub up: &'static str,
    /// Second MLP projection.
    pub down: &'static str,
    /// Norm of the attention half.
    pub norm_attn: &'static str,
    /// Norm of the MLP half.
    pub norm_mlp: &'static str,
    /// Final norm; empty if none.
    pub final_norm: &'static str,
    /// Pooler; empty if none.
    pub pooler: &'static str,
    /// Language-model head; empty for encoders. Never prefixed.
    pub lm_head: &'static str,
    /// Classification head that PEFT saves for this family: `score` or `classifier`. Never prefixed.
    pub cls_head: &'static str,
}

/// A model family member, completely described.
#[derive(Debug, Clone)]
pub struct Architecture {
    /// `llama`, `gpt2`, `bert`.
    pub family: &'static str,
    /// `model_type` of the config.
    pub model_type: String,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Blocks.
    pub layers: usize,
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
    /// Where norms stand.
    pub placement: Placement,
    /// Positions.
    pub positions: Positions,
    /// Who sees whom.
    pub mask: AttnMask,
    /// MLP form.
    pub mlp: MlpKind,
    /// MLP nonlinearity.
    pub act: Act,
    /// Matrices are stored `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
    pub conv1d: bool,
    /// Segment embeddings; 0 = none.
    pub token_types: usize,
    /// The head shares the embedding table.
    pub tied_head: bool,
    /// Scores of layer i are divided by i + 1 (a GPT-2 option).
    pub scale_by_layer: bool,
    /// First token of a sequence.
    pub bos: Option<u32>,
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
        self.mask.causal
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
