//! How a base's matrices are kept in fewer bits than its checkpoint has.

use candle_core::Tensor;

use super::{LoadOptions, ModelError, weights::Checkpoint};
use crate::ops::{self, QuantKind, Quantized, Weight};

/// What the frozen linears are quantised to when a base is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    /// 8 bits, a scale per 32.
    Q8_0,
    /// 4 bits, nested scales per 32 and 256; Q8_0 where the input is no multiple of 256 wide.
    Q4K,
}

impl Quantize {
    /// The format of a matrix with an input so wide; none where it is kept as it is.
    fn kind(self, in_dim: usize) -> Option<QuantKind> {
        let fits = |kind: &QuantKind| in_dim.is_multiple_of(kind.block());
        let wanted = match self {
            Self::Q8_0 => QuantKind::Q8_0,
            Self::Q4K => QuantKind::Q4K,
        };
        [wanted, QuantKind::Q8_0].into_iter().find(fits)
    }
}

/// The format of a language-model head, whichever is asked for, with an input so wide: 8 bits at least, since what is lost here
/// is in every choice of a token, and nothing behind it makes up for it.
pub(super) fn of_head(in_dim: usize) -> Option<QuantKind> {
    Quantize::Q8_0.kind(in_dim)
}

/// The blocks of a module's matrix `[out, in]`.
///
/// # Errors
/// The matrix's name, and why: a number that is not finite.
pub(super) fn blocks(w: &Tensor, kind: QuantKind, module: &str) -> Result<Vec<u8>, ModelError> {
    ops::quantize(w, kind).map_err(|e| ModelError::Checkpoint(format!("{module}.weight cannot be quantised: {e}")))
}

/// A part of a matrix, `[out, in]`.
enum Rows {
    Floats(Tensor),
    Blocks(QuantKind, Vec<u8>),
}

/// The matrix of some modules side by side (each with its output's width), where any of them is stored in blocks or is to
/// be quantised; in the file's format where it has one, else as `options` say.
pub(super) fn weight(
    ckpt: &Checkpoint,
    options: &LoadOptions,
    quantize: Option<Quantize>,
    parts: &[(String, usize)],
    (in_dim, conv1d): (usize, bool),
) -> Result<Option<Weight>, ModelError> {
    let wanted = quantize.and_then(|q| q.kind(in_dim));
    if wanted.is_none() && !ckpt.is_converted() {
        return Ok(None);
    }
    let mut rows: Vec<(Rows, usize)> = Vec::new();
    for (module, out_dim) in parts {
        let part = match ckpt.blocks(module, [*out_dim, in_dim])? {
            Some((kind, bytes)) => Rows::Blocks(kind, bytes.into_owned()),
            None => {
                let shape = if conv1d { [in_dim, *out_dim] } else { [*out_dim, in_dim] };
                let w = ckpt.get(module, "weight", &shape)?;
                let w = if conv1d { w.t()? } else { w };
                match wanted {
                    Some(kind) => Rows::Blocks(kind, blocks(&w, kind, module)?),
                    None => Rows::Floats(w),
                }
            }
        };
        // rows of one format are one matrix
        match (rows.last_mut(), part) {
            (Some((Rows::Blocks(kind, bytes), n)), Rows::Blocks(other, more)) if *kind == other => {
                bytes.extend(more);
                *n += out_dim;
            }
            (Some((Rows::Floats(w), n)), Rows::Floats(more)) => {
                *w = Tensor::cat(&[&*w, &more], 0)?;
                *n += out_dim;
            }
            (_, part) => rows.push((part, *out_dim)),
        }
    }
    let weight = |(rows, out_dim)| match rows {
        Rows::Floats(w) => options.out_in(&w),
        Rows::Blocks(kind, bytes) => Quantized::from_blocks(kind, &bytes, (out_dim, in_dim)).map(Weight::from),
    };
    let parts = rows.into_iter().map(weight).collect::<candle_core::Result<_>>()?;
    Ok(Some(Weight::joined(parts)?))
}

#[cfg(test)]
pub(super) mod tests;
