//! Whether a matrix is the one that a weight was made of; some rows at a time, so that no copy of either is made whole.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::{Form, Weight};
use crate::ops::{Quantized, quantize};

/// Rows that are compared at a time.
const ROWS: usize = 512;

fn flat(t: &Tensor) -> Result<Vec<f32>> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?.flatten_all()?.to_vec1()
}

impl Weight {
    /// Whether these of its columns are this matrix `[columns, in]`, whatever type it is stored in: have its numbers, or those
    /// that it comes to where it is kept as they are, rounded or quantised.
    ///
    /// # Errors
    /// Those of candle.
    pub fn holds(&self, columns: Range<usize>, w: &Tensor) -> Result<bool> {
        if columns.end > self.out_dim || w.dims() != [columns.len(), self.in_dim] {
            return Ok(false);
        }
        let w = w.to_device(&Device::Cpu)?;
        if let Form::Joined(parts) = &self.form {
            let mut at = 0;
            for part in &**parts {
                let (from, to) = (columns.start.max(at), columns.end.min(at + part.out_dim));
                if from < to && !part.holds(from - at..to - at, &w.narrow(0, from - columns.start, to - from)?)? {
                    return Ok(false);
                }
                at += part.out_dim;
            }
            return Ok(true);
        }
        for from in (0..columns.len()).step_by(ROWS) {
            let rows = w.narrow(0, from, ROWS.min(columns.len() - from))?.to_dtype(DType::F32)?.contiguous()?;
            let ids: Vec<u32> = (columns.start + from..).map(|id| id as u32).take(rows.dim(0)?).collect();
            let own = flat(&self.lookup(&ids)?)?;
            // the numbers first: those that a quantised matrix has need not come to the same codes again
            if flat(&rows)? != own
                && self.kept(&rows)?.map(|kept| flat(&kept)).transpose()?.is_none_or(|kept| kept != own)
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What rows of a matrix `[out, in]`, f32, come to where they are kept as this one is; `None` where they cannot be.
    fn kept(&self, rows: &Tensor) -> Result<Option<Tensor>> {
        match &self.form {
            Form::InOut(w) | Form::OutIn(w) => rows.to_dtype(w.dtype()).map(Some),
            Form::Bf16(_) => rows.to_dtype(DType::BF16).map(Some),
            Form::Quantized(own) => {
                let shape @ (n, k) = rows.dims2()?;
                // what cannot be quantised is another matrix
                let Ok(blocks) = quantize(rows, own.kind()) else { return Ok(None) };
                let Ok(kept) = Quantized::from_blocks(own.kind(), &blocks, shape) else { return Ok(None) };
                let ids: Vec<u32> = (0..n as u32).collect();
                Tensor::from_vec(kept.columns(&ids), (n, k), &Device::Cpu).map(Some)
            }
            Form::Panels(_) | Form::Joined(_) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::QuantKind;

    fn random(shape: (usize, usize)) -> Tensor {
        Tensor::randn(0f32, 0.7, shape, &Device::Cpu).unwrap()
    }

    fn quantized(w: &Tensor, kind: QuantKind) -> Weight {
        Quantized::from_blocks(kind, &quantize(w, kind).unwrap(), w.dims2().unwrap()).unwrap().into()
    }

    /// Its numbers as they are kept, and those that it was made of; more rows than are compared at a time.
    #[test]
    fn a_weight_knows_what_it_was_made_of_and_its_own_numbers() {
        let w = random((600, 256));
        let mut weights = vec![Weight::from_out_in(&w).unwrap(), Weight::view_of(&w).unwrap()];
        weights.push(Weight::bf16_from_out_in(&w).unwrap());
        weights.push(Weight::view_of(&w.to_dtype(DType::BF16).unwrap()).unwrap());
        weights.extend(QuantKind::ALL.map(|kind| quantized(&w, kind)));
        for weight in weights {
            let what = format!("{:?}", weight.parts());
            let own = weight.as_in_out().unwrap().t().unwrap().to_dtype(DType::F32).unwrap();
            for made_of in [&w, &own, &own.contiguous().unwrap()] {
                assert!(weight.holds(0..600, made_of).unwrap(), "{what}");
                assert!(weight.holds(40..590, &made_of.narrow(0, 40, 550).unwrap()).unwrap(), "{what}");
                assert!(!weight.holds(41..591, &made_of.narrow(0, 40, 550).unwrap()).unwrap(), "{what}");
                assert!(!weight.holds(0..600, &(made_of * 1.5).unwrap()).unwrap(), "{what}");
            }
            // the last row of all
            let last = Tensor::cat(&[&w.narrow(0, 0, 599).unwrap(), &random((1, 256))], 0).unwrap();
            assert!(!weight.holds(0..600, &last).unwrap(), "{what}");
            for other in [w.narrow(0, 0, 599).unwrap(), w.t().unwrap(), w.flatten_all().unwrap()] {
                assert!(!weight.holds(0..600, &other).unwrap(), "{what}");
            }
            assert!(!weight.holds(1..601, &w).unwrap(), "{what}");
        }
    }

    #[test]
    fn of_joined_weights_each_knows_its_own() {
        let w = random((120, 256));
        let part = |from| w.narrow(0, from, 40).unwrap().contiguous().unwrap();
        let parts = vec![
            quantized(&part(0), QuantKind::Q4K),
            Weight::bf16_from_out_in(&part(40)).unwrap(),
            quantized(&part(80), QuantKind::Q6K),
        ];
        let joined = Weight::joined(parts).unwrap();
        for columns in [0..120, 0..40, 40..80, 80..120, 30..90] {
            let rows = w.narrow(0, columns.start, columns.len()).unwrap();
            assert!(joined.holds(columns.clone(), &rows).unwrap(), "{columns:?}");
            assert!(!joined.holds(columns.clone(), &(rows * 1.5).unwrap()).unwrap(), "{columns:?}");
        }
    }
}
