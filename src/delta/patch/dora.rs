//! DoRA (Liu et al. 2024): `y = b + g * ((W + s B A) x)`, `g = m / ||W + s B A||` over each output's inputs. The norm is a
//! constant to gradients (section 4.3 of the paper).

use candle_core::{D, DType, Result, Tensor, bail};

use super::{LowRank, bytes_of};

/// What the base gives to a DoRA patch. A whole matrix, and where the base keeps its own in another form a copy of it: a
/// patch that is trained needs it, one that is served must let it go ([`Dora::served`]).
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

/// Where `||W + s B A||` comes from.
#[derive(Debug, Clone)]
enum Norm {
    /// Computed from the weight, which is kept.
    Of(DoraBase),
    /// As it was when the patch was loaded, f32 `[out]`.
    Was(Tensor),
}

/// A low-rank update and a magnitude.
#[derive(Debug, Clone)]
pub struct Dora {
    /// The update.
    pub low: LowRank,
    /// `[out]`.
    pub magnitude: Tensor,
    bias: Option<Tensor>,
    norm: Norm,
    folded: Option<Folded>,
}

impl Dora {
    /// Puts a patch together that is trained, or that others are made of; the fast form is made at once where no gradient
    /// is wanted.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn new(low: LowRank, magnitude: Tensor, base: DoraBase) -> Result<Self> {
        let mut dora = Self { low, magnitude, bias: base.bias.clone(), norm: Norm::Of(base), folded: None };
        dora.fold_if_fixed()?;
        Ok(dora)
    }

    /// A patch that is served: keeps the norm and the fast form, and nothing of the base's matrix.
    ///
    /// # Errors
    /// Shapes that do not fit; a column of `W + s B A` that is zero, which has no direction.
    pub fn served(low: LowRank, magnitude: Tensor, base: DoraBase) -> Result<Self> {
        let mut dora = Self::new(low, magnitude, base)?;
        let norm = dora.norm()?;
        if norm.to_vec1::<f32>()?.iter().any(|n| *n < 1e-12) {
            bail!("a merged weight row is zero, DoRA's direction is undefined");
        }
        dora.norm = Norm::Was(norm);
        Ok(dora)
    }

    /// The same with a weight to take its norm from, whatever becomes of its tensors: what training one that was served
    /// needs.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn over(&self, base: DoraBase) -> Result<Self> {
        Self::new(self.low.clone(), self.magnitude.clone(), base)
    }

    fn fold_if_fixed(&mut self) -> Result<()> {
        if !self.tensors().iter().any(|(_, t)| t.track_op()) {
            self.folded = Some(self.fold()?);
        }
        Ok(())
    }

    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("lora_A", &self.low.a), ("lora_B", &self.low.b), ("magnitude", &self.magnitude)]
    }

    /// With each tensor put through `f`. The norm of a patch that is served stays what it was, so `f` must keep the values.
    pub(super) fn map(&self, f: &mut dyn FnMut(&'static str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let (a, b) = (f("lora_A", &self.low.a)?, f("lora_B", &self.low.b)?);
        let low = LowRank { a, b, scale: self.low.scale };
        let magnitude = f("magnitude", &self.magnitude)?;
        let mut dora = Self { low, magnitude, bias: self.bias.clone(), norm: self.norm.clone(), folded: None };
        dora.fold_if_fixed()?;
        Ok(dora)
    }

    pub(crate) fn folded(&self) -> Option<&Folded> {
        self.folded.as_ref()
    }

    pub(super) fn extra_bytes(&self) -> usize {
        let folded =
            self.folded.iter().map(|f| bytes_of(&f.gain) + bytes_of(&f.low.b) + f.keep.as_ref().map_or(0, bytes_of));
        let norm = match &self.norm {
            Norm::Of(base) => bytes_of(&base.weight) + bytes_of(&base.square),
            Norm::Was(norm) => bytes_of(norm),
        };
        norm + folded.sum::<usize>()
    }

    /// `||W + s B A||` by column, f32 `[out]`, without making the sum: `w.w + 2 s (A W).B + s^2 B.(A A^T) B`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn norm(&self) -> Result<Tensor> {
        let f32 = |t: &Tensor| t.detach().to_dtype(DType::F32)?.contiguous();
        let base = match &self.norm {
            Norm::Of(base) => base,
            Norm::Was(norm) => return Ok(norm.clone()),
        };
        let (a, b, s) = (f32(&self.low.a)?, f32(&self.low.b)?, self.low.scale);
        let aw = a.matmul(&base.weight.to_dtype(DType::F32)?)?; // [rank, out]
        let cross = ((&b * aw)?.sum(0)? * (2.0 * s))?;
        let own = ((&b * a.matmul(&a.t()?)?.matmul(&b)?)?.sum(0)? * (s * s))?;
        // rounding must not make a square negative
        ((&base.square + cross)? + own)?.maximum(f64::from(f32::MIN_POSITIVE))?.sqrt()
    }

    fn gain(&self) -> Result<Tensor> {
        self.magnitude.to_dtype(DType::F32)?.flatten_all()? / self.norm()?
    }

    fn fold(&self) -> Result<Folded> {
        let dtype = self.low.b.dtype();
        let gain = self.gain()?;
        let keep = match &self.bias {
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
        let plain = match &self.bias {
            Some(b) => out.broadcast_sub(b)?,
            None => out.clone(),
        };
        let turned = plain.broadcast_mul(&(&gain - 1.0)?)?;
        let update = self.low.update(x)?.broadcast_mul(&gain)?;
        debug_assert_eq!(update.dim(D::Minus1)?, out.dim(D::Minus1)?);
        (out + turned)? + update
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_served_patch_keeps_nothing_of_the_base_and_says_the_same() {
        let rand = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
        let (x, out) = (rand(&[5, 24]), rand(&[5, 40]));
        for bias in [None, Some(rand(&[40]))] {
            let low = LowRank { a: rand(&[2, 24]), b: rand(&[2, 40]), scale: 0.7 };
            let base = DoraBase::new(rand(&[24, 40]), bias).unwrap();
            let magnitude = (base.magnitude().unwrap() * 1.3).unwrap();
            let whole = Dora::new(low.clone(), magnitude.clone(), base.clone()).unwrap();
            let served = Dora::served(low.clone(), magnitude, base.clone()).unwrap();
            let (a, b) = (whole.apply(&x, &out).unwrap(), served.apply(&x, &out).unwrap());
            let off = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(off < 1e-5, "{off}");
            let matrix = 24 * 40 * 4;
            assert!(whole.extra_bytes() >= matrix && served.extra_bytes() < matrix / 4);
            let again = served.map(&mut |_, t| Ok(t.clone())).unwrap().apply(&x, &out).unwrap();
            assert_eq!(again.to_vec2::<f32>().unwrap(), served.apply(&x, &out).unwrap().to_vec2::<f32>().unwrap());

            let none = LowRank { b: low.b.zeros_like().unwrap(), ..low };
            let fresh = Dora::served(none, base.magnitude().unwrap(), base).unwrap().apply(&x, &out).unwrap();
            assert_eq!(fresh.to_vec2::<f32>().unwrap(), out.to_vec2::<f32>().unwrap(), "a fresh patch changes no bit");
        }
    }
}
