//! The embedding table, which may be the language-model head's weight, too.

use candle_core::{Result, Tensor};

use crate::ops::Weight;

/// A `[vocab, hidden]` table; a variable where every weight is trained, then as it is.
pub(super) enum Table {
    /// As it is.
    Own(Tensor),
    /// The head's weight, in the form that the head's kernels like; kept once for both.
    Head(Weight),
}

impl Table {
    /// Rows of it, `[ids, hidden]`. Gradients reach a table that is as it is, never one in the head's form.
    ///
    /// # Errors
    /// Ids outside the vocabulary.
    pub(super) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::Own(table) => table.index_select(&Tensor::new(ids, table.device())?, 0),
            Self::Head(weight) => weight.lookup(ids),
        }
    }

    /// All of it, `[vocab, hidden]`; a copy where it is kept in the head's form.
    ///
    /// # Errors
    /// Those of candle.
    pub(super) fn whole(&self) -> Result<Tensor> {
        match self {
            Self::Own(table) => Ok(table.clone()),
            Self::Head(weight) => weight.as_in_out()?.t()?.contiguous(),
        }
    }

    /// Numbers in it.
    pub(super) fn elem_count(&self) -> usize {
        match self {
            Self::Own(table) => table.elem_count(),
            Self::Head(weight) => weight.elem_count(),
        }
    }
}
