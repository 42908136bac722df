//! Trainable tokens and whole tables: replaced rows of the embedding and of the head tied to it.

use candle_core::{Result, Tensor};

use crate::ops;

/// Rows that replace the base's for some tokens.
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// Token ids, distinct.
    pub ids: Vec<u32>,
    /// `[ids, hidden]`: the replacements, as PEFT's `trainable_tokens_delta` (which holds no differences).
    pub rows: Tensor,
    /// `[ids, hidden]`: the base's rows.
    pub base: Tensor,
}

impl TokenRows {
    fn change(&self, like: &Tensor) -> Result<Tensor> {
        self.rows.to_dtype(like.dtype())? - self.base.to_dtype(like.dtype())?
    }

    /// Replaces embeddings: `out` `[rows, hidden]` of `tokens`. As a sum, so that unchanged rows stay bit for bit.
    pub(super) fn embed(&self, tokens: &[u32], out: &Tensor) -> Result<Tensor> {
        let mut at = Vec::new();
        let mut which = Vec::new();
        for (row, token) in tokens.iter().enumerate() {
            if let Some(i) = self.ids.iter().position(|id| id == token) {
                at.push(row as u32);
                which.push(i as u32);
            }
        }
        if at.is_empty() {
            // an empty sum: the rows' gradient is zero, not absent
            let nothing = (self.rows.sum_all()?.to_dtype(out.dtype())? * 0.0)?;
            return if self.rows.track_op() { out.broadcast_add(&nothing) } else { Ok(out.clone()) };
        }
        let picked = self.change(out)?.index_select(&Tensor::new(which, out.device())?, 0)?; // [hits, hidden]
        out.index_add(&Tensor::new(at, out.device())?, &picked, 0)
    }

    /// Changes the logits of these tokens under a tied head: `x` `[rows, hidden]`, `out` `[rows, vocab]`.
    pub(super) fn logits(&self, x: &Tensor, out: &Tensor) -> Result<Tensor> {
        let more = ops::times_turned(x, &self.change(x)?)?; // [rows, ids]
        out.index_add(&Tensor::new(self.ids.as_slice(), out.device())?, &more, 1)
    }
}

/// A module's own matrix and bias, in place of the base's (PEFT's `modules_to_save`).
#[derive(Debug, Clone)]
pub struct Matrix {
    /// `[in, out]`; `[vocab, hidden]` at the embedding.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

impl Matrix {
    pub(super) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let bias = self.bias.iter().map(|b| ("own_bias", b));
        std::iter::once(("own_weight", &self.weight)).chain(bias).collect()
    }

    pub(super) fn map(&self, f: &mut dyn FnMut(&'static str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            weight: f("own_weight", &self.weight)?,
            bias: self.bias.as_ref().map(|b| f("own_bias", b)).transpose()?,
        })
    }

    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = ops::times(x, &self.weight.to_dtype(x.dtype())?)?;
        match &self.bias {
            Some(b) => y.broadcast_add(&b.to_dtype(x.dtype())?),
            None => Ok(y),
        }
    }

    pub(super) fn rows(&self, tokens: &[u32]) -> Result<Tensor> {
        self.weight.index_select(&Tensor::new(tokens, self.weight.device())?, 0)
    }
}
