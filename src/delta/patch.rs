//! Patches: what a delta does at a site, and the plain math of one delta on its own rows.

use candle_core::{Result, Tensor};

use super::bytes_of;

/// LoRA (Hu et al. 2021): `out += scale * (x A^T) B^T`.
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
}

/// How the positions of a prefix count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixForm {
    /// As context (PEFT): tokens take the positions after it, and a sliding window leaves it behind.
    Context,
    /// Not at all (AdapterHub): tokens keep their positions, and every query sees it.
    Pinned,
}

/// What a delta does at one site.
#[derive(Debug, Clone)]
pub enum Patch {
    /// A low-rank update of a linear.
    LowRank(LowRank),
    /// `out += b`, `[out]`: BitFit's difference to the base's bias (Ben Zaken et al. 2021), also of norms.
    Bias(Tensor),
    /// `out *= s`, `[out]` ((IA)3 on outputs; DoRA's column norms).
    Scale(Tensor),
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
        self.tensors().iter().map(|(_, t)| bytes_of(t)).sum()
    }

    /// The reference: applies this patch to rows that all belong to its delta.
    ///
    /// `x`: `[rows, in]`, the site's input; `out`: `[rows, out]`, the site's output so far. Differentiable. Patches that
    /// add positions change no row here: see [`DeltaBatch`](super::DeltaBatch).
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn apply(&self, x: &Tensor, out: &Tensor) -> Result<Tensor> {
        match self {
            Self::LowRank(l) => {
                // factors may be kept in f32 over a 16-bit base (training)
                let (a, b) = (l.a.to_dtype(x.dtype())?, l.b.to_dtype(x.dtype())?);
                let low = x.matmul(&a.t()?)?; // [rows, rank]
                out + (low.matmul(&b)? * l.scale)? // [rows, out]
            }
            Self::Bias(b) => out.broadcast_add(&b.to_dtype(out.dtype())?),
            Self::Scale(s) => out.broadcast_mul(&s.to_dtype(out.dtype())?),
            Self::Prompt(_) | Self::Prefix(_) => Ok(out.clone()),
        }
    }
}
