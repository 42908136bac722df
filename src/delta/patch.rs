//! Patches: what a delta does at a site, and the plain math of one delta on its own rows.

mod affine;
mod bottleneck;
mod dora;
mod fits;
mod tokens;

use candle_core::{Result, Tensor, bail};

use super::bytes_of;
use crate::ops;

pub use affine::Affine;
pub(crate) use bottleneck::AdapterIo;
pub use bottleneck::{AdapterInput, AdapterResidual, Bottleneck, Scaling, Wiring};
pub use dora::{Dora, DoraBase};
pub use tokens::{Matrix, TokenRows};

/// LoRA (Hu et al. 2021): `out += scale * (x A^T) B^T`. At the embedding `x` is the one-hot token, `in` the vocabulary.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, in]`, as PEFT stores `lora_A.weight`.
    pub a: Tensor,
    /// `[rank, out]`: PEFT's `lora_B.weight` transposed, so that each rank's row is contiguous.
    pub b: Tensor,
    /// `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    pub scale: f64,
}

/// Virtual rows ahead of the tokens (prompt tuning, Lester et al. 2021; P-tuning, Liu et al. 2021).
#[derive(Debug, Clone)]
pub struct Prompt {
    /// `[n, hidden]`.
    pub rows: Tensor,
    /// What the rows stand for.
    pub stage: PromptStage,
    /// Whose tokens they precede.
    pub stack: Stack,
}

/// What a delta may put positions ahead of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stack {
    /// What the only stack of blocks attends to; of an encoder-decoder, its decoder's own.
    Main,
    /// What the encoder of an encoder-decoder attends to: the source.
    Encoder,
    /// What the decoder's cross-attention reads: the encoder's output. It takes prefixes only.
    Memory,
}

/// What the rows of a prompt stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptStage {
    /// Token embeddings (PEFT): what the base adds to those is added, and they take the first positions.
    Tokens,
    /// Input of the first block (AdapterHub on bases with a position table): nothing is added, and tokens keep their
    /// positions.
    Hidden,
}

/// Keys and values of a layer ahead of the sequence's own (prefix tuning, Li and Liang 2021). Keys are used as they are:
/// rotary models do not rotate them.
#[derive(Debug, Clone)]
pub struct Prefix {
    /// `[n, kv_width]`.
    pub k: Tensor,
    /// `[n, kv_width]`.
    pub v: Tensor,
    /// How they count.
    pub form: PrefixForm,
    /// Whose keys they precede: those of their site.
    pub stack: Stack,
}

/// Which of the `pairs` of key and value in a PEFT prefix a decoder layer of an encoder-decoder reads. PEFT repeats the pairs
/// and gives each layer four tensors, of which it drops the two that were meant for cross-attention: so layer `l` has pair
/// `2 l` (mod `pairs`), and where their number is even, two layers share one.
pub fn seq2seq_pair(layer: usize, pairs: usize) -> usize {
    (2 * layer) % pairs.max(1)
}

/// How the positions of a prefix count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixForm {
    /// As context (PEFT): tokens take the positions after it, and a sliding window leaves it behind.
    Context,
    /// Not at all (AdapterHub): tokens keep their positions, and every query sees it.
    Pinned,
}

/// What a delta does at one site. At a linear, the order is: input scale, the matrix, then the other patches in order.
#[derive(Debug, Clone)]
pub enum Patch {
    /// A low-rank update of a linear, or of the embedding table.
    LowRank(LowRank),
    /// `out += b`, `[out]`: BitFit's difference to the base's bias (Ben Zaken et al. 2021), also of norms.
    Bias(Tensor),
    /// `out *= s`, `[out]` ((IA)3 on outputs; a base bias is scaled, too).
    Scale(Tensor),
    /// `x *= s`, `[in]`, ahead of the matrix ((IA)3 on inputs of feed-forward modules; Liu et al. 2022).
    InScale(Tensor),
    /// A norm's gain and bias replaced (LN tuning; Zhao et al. 2023).
    Affine(Affine),
    /// A low-rank update with a learned length of each weight column (Liu et al. 2024).
    Dora(Box<Dora>),
    /// A bottleneck adapter at a sublayer (Houlsby et al. 2019).
    Bottleneck(Box<Bottleneck>),
    /// Replaced rows of the embedding table, or of the head that is tied to it.
    TokenRows(TokenRows),
    /// A whole matrix in place of the base's.
    Matrix(Matrix),
    /// Virtual rows, at [`Site::Embedding`](super::Site::Embedding).
    Prompt(Prompt),
    /// Keys and values, at [`Site::KeyValue`](super::Site::KeyValue) of every layer.
    Prefix(Prefix),
}

impl Patch {
    /// Its trained tensors with their names, in a fixed order.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::LowRank(l) => vec![("lora_A", &l.a), ("lora_B", &l.b)],
            Self::Bias(t) => vec![("bias", t)],
            Self::Scale(t) => vec![("scale", t)],
            Self::InScale(t) => vec![("in_scale", t)],
            Self::Affine(p) => p.tensors(),
            Self::Dora(p) => p.tensors(),
            Self::Bottleneck(p) => p.tensors(),
            Self::TokenRows(p) => vec![("token_rows", &p.rows)],
            Self::Matrix(p) => p.tensors(),
            Self::Prompt(p) => vec![("prompt", &p.rows)],
            Self::Prefix(p) => vec![("prefix_k", &p.k), ("prefix_v", &p.v)],
        }
    }

    /// The same patch with each of [`Self::tensors`] put through `f`, in that order.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn map(&self, f: &mut dyn FnMut(&'static str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::LowRank(l) => Self::LowRank(LowRank { a: f("lora_A", &l.a)?, b: f("lora_B", &l.b)?, scale: l.scale }),
            Self::Bias(t) => Self::Bias(f("bias", t)?),
            Self::Scale(t) => Self::Scale(f("scale", t)?),
            Self::InScale(t) => Self::InScale(f("in_scale", t)?),
            Self::Affine(p) => Self::Affine(p.map(f)?),
            Self::Dora(p) => Self::Dora(Box::new(p.map(f)?)),
            Self::Bottleneck(p) => Self::Bottleneck(Box::new(p.map(f)?)),
            Self::TokenRows(p) => Self::TokenRows(TokenRows { rows: f("token_rows", &p.rows)?, ..p.clone() }),
            Self::Matrix(p) => Self::Matrix(p.map(f)?),
            Self::Prompt(p) => Self::Prompt(Prompt { rows: f("prompt", &p.rows)?, ..p.clone() }),
            Self::Prefix(p) => Self::Prefix(Prefix { k: f("prefix_k", &p.k)?, v: f("prefix_v", &p.v)?, ..p.clone() }),
        })
    }

    /// Whether a gradient of its tensors is wanted.
    pub(crate) fn tracked(&self) -> bool {
        self.tensors().iter().any(|(_, t)| t.track_op())
    }

    /// Whether it adds positions instead of changing rows: such patches are no part of a site's plan.
    pub(crate) fn adds_positions(&self) -> bool {
        matches!(self, Self::Prompt(_) | Self::Prefix(_))
    }

    /// Bytes of its tensors.
    pub fn bytes(&self) -> usize {
        let extra = match self {
            Self::Dora(d) => d.extra_bytes(),
            _ => 0,
        };
        extra + self.tensors().iter().map(|(_, t)| bytes_of(t)).sum::<usize>()
    }

    /// Whether the row kernel of linears and norms knows it.
    pub(crate) fn has_kernel(&self) -> bool {
        match self {
            Self::LowRank(_) | Self::Bias(_) | Self::Scale(_) | Self::InScale(_) | Self::Affine(_) => true,
            Self::Dora(d) => d.folded().is_some(),
            Self::Prompt(_) | Self::Prefix(_) => true, // no part of a plan
            Self::Bottleneck(_) | Self::TokenRows(_) | Self::Matrix(_) => false,
        }
    }

    /// Whether it reads the site's input.
    pub(crate) fn reads_input(&self) -> bool {
        !matches!(self, Self::Bias(_) | Self::Scale(_) | Self::InScale(_))
    }

    /// The reference: applies this patch to rows that all belong to its delta.
    ///
    /// `x`: `[rows, in]`, the site's input (already scaled by an input scale); `out`: `[rows, out]`, the site's output so
    /// far. Differentiable. Patches that add positions change no row here: see [`DeltaBatch`](super::DeltaBatch).
    ///
    /// # Errors
    /// Shapes that do not fit; an adapter, which is no patch of a linear or norm.
    pub fn apply(&self, x: &Tensor, out: &Tensor) -> Result<Tensor> {
        match self {
            Self::LowRank(l) => out + l.update(x)?,
            Self::Bias(b) => ops::add_bias(out, &b.to_dtype(out.dtype())?),
            Self::Scale(s) => ops::scale_columns(out, &s.to_dtype(out.dtype())?),
            Self::InScale(_) | Self::Prompt(_) | Self::Prefix(_) => Ok(out.clone()), // applied elsewhere
            Self::Affine(p) => p.apply(x),
            Self::Dora(p) => p.apply(x, out),
            Self::TokenRows(p) => p.logits(x, out),
            Self::Matrix(p) => p.apply(x),
            Self::Bottleneck(_) => bail!("a bottleneck adapter acts on a sublayer, not on a linear or norm"),
        }
    }

    /// The reference at the embedding: `out` `[rows, hidden]`, the embeddings of `tokens`, all rows of this delta.
    ///
    /// # Errors
    /// Tokens outside the patch's vocabulary; a patch that embeddings cannot have.
    pub fn embed(&self, tokens: &[u32], out: &Tensor) -> Result<Tensor> {
        match self {
            Self::LowRank(l) => {
                let ids = Tensor::new(tokens, out.device())?;
                let low = l.a.to_dtype(out.dtype())?.index_select(&ids, 1)?.t()?.contiguous()?; // [rows, rank]
                out + (ops::times(&low, &l.b.to_dtype(out.dtype())?)? * l.scale)?
            }
            Self::TokenRows(p) => p.embed(tokens, out),
            Self::Matrix(p) => p.rows(tokens)?.to_dtype(out.dtype()),
            _ => bail!("the embedding takes low-rank updates, token rows and whole tables"),
        }
    }
}

impl LowRank {
    /// `scale * (x A^T) B`, `[rows, out]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn update(&self, x: &Tensor) -> Result<Tensor> {
        // factors may be kept in f32 over a 16-bit base (training)
        let (a, b) = (self.a.to_dtype(x.dtype())?, self.b.to_dtype(x.dtype())?);
        let low = x.matmul(&a.t()?)?; // [rows, rank]
        low.matmul(&b)? * self.scale // [rows, out]
    }
}
