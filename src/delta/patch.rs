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

/// What a delta does at one site.
#[derive(Debug, Clone)]
pub enum Patch {
    /// A low-rank update of a linear.
    LowRank(LowRank),
    /// `out += b`, `[out]`: BitFit's difference to the base's bias (Ben Zaken et al. 2021), also of norms.
    Bias(Tensor),
    /// `out *= s`, `[out]` ((IA)3 on outputs; DoRA's column norms).
    Scale(Tensor),
}

impl Patch {
    /// Whether a gradient of its tensors is wanted.
    pub(crate) fn tracked(&self) -> bool {
        match self {
            Self::LowRank(l) => l.a.track_op() || l.b.track_op(),
            Self::Bias(t) | Self::Scale(t) => t.track_op(),
        }
    }

    /// Bytes of its tensors.
    pub fn bytes(&self) -> usize {
        match self {
            Self::LowRank(l) => bytes_of(&l.a) + bytes_of(&l.b),
            Self::Bias(t) | Self::Scale(t) => bytes_of(t),
        }
    }

    /// The reference: applies this patch to rows that all belong to its delta.
    ///
    /// `x`: `[rows, in]`, the site's input; `out`: `[rows, out]`, the site's output so far. Differentiable.
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
        }
    }
}
