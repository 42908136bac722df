//! The embedding table, which may be the language-model head's weight, too.

use candle_core::{DType, Result, Tensor};

use crate::ops::{Weight, WeightPart};

/// A `[vocab, hidden]` table; a variable where every weight is trained, then as it is.
pub(super) enum Table {
    /// As it is; on the CPU possibly in bf16, while what is computed is f32.
    Own(Tensor),
    /// In a form that kernels like: the head's weight, kept once for both, possibly in blocks, or blocks that a file has it in.
    Packed(Weight),
}

/// In the type that is computed in.
fn computed(rows: Tensor) -> Result<Tensor> {
    if rows.device().is_cpu() { rows.to_dtype(DType::F32) } else { Ok(rows) }
}

impl Table {
    /// Rows of it, `[ids, hidden]`. Gradients reach a table that is as it is, never one in another form.
    ///
    /// # Errors
    /// Ids outside the vocabulary.
    pub(super) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::Own(table) => computed(table.index_select(&Tensor::new(ids, table.device())?, 0)?),
            Self::Packed(weight) => weight.lookup(ids),
        }
    }

    /// All of it, `[vocab, hidden]`; a copy where it is kept in another form.
    ///
    /// # Errors
    /// Those of candle.
    pub(super) fn whole(&self) -> Result<Tensor> {
        match self {
            Self::Own(table) => computed(table.clone()),
            Self::Packed(weight) => weight.as_in_out()?.t()?.contiguous(),
        }
    }

    /// Whether it was made of this table `[vocab, hidden]` ([`Weight::holds`]).
    ///
    /// # Errors
    /// Those of candle.
    pub(super) fn holds(&self, table: &Tensor) -> Result<bool> {
        let weight = match self {
            Self::Own(own) => Weight::view_of(own)?,
            Self::Packed(weight) => weight.clone(),
        };
        weight.holds(0..weight.out_dim(), table)
    }

    /// Numbers in it.
    pub(super) fn elem_count(&self) -> usize {
        match self {
            Self::Own(table) => table.elem_count(),
            Self::Packed(weight) => weight.elem_count(),
        }
    }

    /// Its parts: formats, numbers, and bytes in memory; none where it is the head's.
    pub(super) fn parts(&self, is_head: bool) -> Vec<WeightPart> {
        match self {
            Self::Own(table) => vec![WeightPart::of(table)],
            Self::Packed(_) if is_head => Vec::new(),
            Self::Packed(weight) => weight.parts(),
        }
    }
}
