//! DoRA (Liu et al. 2024): `y = b + g * ((W + s B A) x)`, `g = m / ||W + s B A||` over each output's inputs. The norm is a
//! constant to gradients (section 4.3 of the paper).

use candle_core::{D, DType, Result, Tensor};

use super::{LowRank, bytes_of};

/// What the base gives to a DoRA patch; shares the base's tensors.
#[derive(Debug, Clone)]
pub struct DoraBase {
    /// `[in, out]`, possibly strided.
    pub weight: Tensor,
    /// `[out]`, f32: squared norms of the weight's columns.
    pub square: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

impl DoraBase {
    /// From a frozen matrix `[in, out]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let square = weight.to_dtype(DType::F32)?.sqr()?.sum(0)?;
        Ok(Self { weight, square, bias })
    }

    /// The magnitude that changes nothing: the columns' norms, `[out]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn magnitude(&self) -> Result<Tensor> {
        self.square.sqrt()
    }
}

/// What the row kernels use instead: a scale, a bias and a low-rank pair.
#[derive(Debug, Clone)]
pub(crate) struct Folded {
    /// `g`, `[out]`.
    pub(crate) gain: Tensor,
    /// `b - g b`: the part of the base's bias that the scale takes away.
    pub(crate) keep: Option<Tensor>,
    /// `A` and `g B`.
    pub(crate) low: LowRank,
}

/// A low-rank update and a magnitude.
#[derive(Debug, Clone)]
pub struct Dora {
    /// The update.
    pub low: LowRank,
    /// `[out]`.
    pub magnitude: Tensor,
    base: DoraBase,
    folded: Option<Folded>,
}

impl Dora {
    /// Puts a patch together; the fast form is made at once where no gradient is wanted.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn new(low: LowRank, magnitude: Tensor, base: DoraBase) -> Result<Self> {
        let mut dora = Self { low, magnitude, base, folded: None };
        if !dora.tensors().iter().any(|(_, t)| t.track_op()) {
            dora.folded = Some(dora.fold()?);
        }
        Ok(dora)
    }

    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("lora_A", &self.low.a), ("lora_B", &self.low.b), ("magnitude", &self.magnitude)]
    }

    pub(super) fn map(&self, f: &mut dyn FnMut(&'static str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let (a, b) = (f("lora_A", &self.low.a)?, f("lora_B", &self.low.b)?);
        let low = LowRank { a, b, scale: self.low.scale };
        Self::new(low, f("magnitude", &self.magnitude)?, self.base.clone())
    }

    pub(crate) fn folded(&self) -> Option<&Folded> {
        self.folded.as_ref()
    }

    pub(super) fn extra_bytes(&self) -> usize {
        let folded =
            self.folded.iter().map(|f| bytes_of(&f.gain) + bytes_of(&f.low.b) + f.keep.as_ref().map_or(0, bytes_of));
        bytes_of(&self.base.square) + folded.sum::<usize>()
    }

    /// `||W + s B A||` by column, f32 `[out]`, without making the sum: `w.w + 2 s (A W).B + s^2 B.(A A^T) B`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn norm(&self) -> Result<Tensor> {
        let f32 = |t: &Tensor| t.detach().to_dtype(DType::F32)?.contiguous();
        let (a, b, s) = (f32(&self.low.a)?, f32(&self.low.b)?, self.low.scale);
        let aw = a.matmul(&self.base.weight.to_dtype(DType::F32)?)?; // [rank, out]
        let cross = ((&b * aw)?.sum(0)? * (2.0 * s))?;
        let own = ((&b * a.matmul(&a.t()?)?.matmul(&b)?)?.sum(0)? * (s * s))?;
        // rounding must not make a square negative
        ((&self.base.square + cross)? + own)?.maximum(f64::from(f32::MIN_POSITIVE))?.sqrt()
    }

    fn gain(&self) -> Result<Tensor> {
        self.magnitude.to_dtype(DType::F32)?.flatten_all()? / self.norm()?
    }

    fn fold(&self) -> Result<Folded> {
        let dtype = self.low.b.dtype();
        let gain = self.gain()?;
        let keep = match &self.base.bias {
            Some(bias) => {
                let bias = bias.to_dtype(DType::F32)?;
                Some((&bias - (&bias * &gain)?)?.to_dtype(dtype)?)
            }
            None => None,
        };
        let b = self.low.b.to_dtype(DType::F32)?.broadcast_mul(&gain)?.to_dtype(dtype)?;
        let low = LowRank { a: self.low.a.clone(), b, scale: self.low.scale };
        Ok(Folded { gain: gain.to_dtype(dtype)?, keep, low })
    }

    /// `[rows, out]`: `out + (g - 1) (out - b) + g s B A x`, so that a fresh patch changes no bit.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn apply(&self, x: &Tensor, out: &Tensor) -> Result<Tensor> {
        let gain = self.gain()?.to_dtype(out.dtype())?;
        let plain = match &self.base.bias {
            Some(b) => out.broadcast_sub(b)?,
            None => out.clone(),
        };
        let turned = plain.broadcast_mul(&(&gain - 1.0)?)?;
        let update = self.low.update(x)?.broadcast_mul(&gain)?;
        debug_assert_eq!(update.dim(D::Minus1)?, out.dim(D::Minus1)?);
        (out + turned)? + update
    }
}
