//! The attention half of a block.

use candle_core::{Result, Tensor};

use super::{Linear, Norm, Pass};
use crate::{
    delta::SiteId,
    ops::{self, Ending},
};

/// Multi-head attention with its projections.
#[derive(Debug, Clone)]
pub struct Attention {
    /// `[hidden, (heads + 2 kv_heads) * head_dim]`: query, key and value side by side.
    pub qkv: Linear,
    /// `[heads * head_dim, hidden]`.
    pub out: Linear,
    /// Norm of each head's query, before it turns (Qwen 3, Gemma 3).
    pub q_norm: Option<Norm>,
    /// Norm of each head's key.
    pub k_norm: Option<Norm>,
    /// Which of the stack's styles this layer has.
    pub style: usize,
    /// Which layer of the cache.
    pub layer: usize,
    /// The site of its keys and values (prefixes).
    pub keys: SiteId,
    /// Multiplies the scores beside the plan's scale (GPT-2's per-layer option); 1 as a rule.
    pub layer_scale: f32,
}

impl Attention {
    /// `[rows, hidden]` -> `[rows that go on, hidden]`, added to the residual if one is given.
    ///
    /// # Errors
    /// Those of candle.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>, pass: &Pass<'_>) -> Result<Tensor> {
        let qkv = self.qkv.forward(x, &pass.cx)?; // [rows, qw + 2 kw]
        let y = if self.reads_joined(pass) { self.joined(&qkv, pass)? } else { self.apart(&qkv, pass)? }; // [.., qw]
        self.out.forward_to(&y, Ending { act: None, residual }, &pass.after)
    }

    /// Puts the keys and values of `x` `[rows, hidden]` into the cache, if there is one, and does nothing else.
    ///
    /// # Errors
    /// Those of candle.
    pub fn keep(&self, x: &Tensor, pass: &Pass<'_>) -> Result<()> {
        if pass.keys.is_cached() {
            self.keys_and_values(&self.qkv.forward(x, &pass.cx)?, pass)?;
        }
        Ok(())
    }

    /// Whether nothing but rotation happens to queries, keys and values of this step before they meet.
    fn reads_joined(&self, pass: &Pass<'_>) -> bool {
        let plain = self.q_norm.is_none() && self.k_norm.is_none() && self.layer_scale == 1.0;
        plain && pass.keys.are_the_rows() && ops::attends_own_rows(&pass.styles[self.style].plan)
    }

    fn joined(&self, qkv: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let style = &pass.styles[self.style];
        let turning = (style.plan.heads + style.plan.kv_heads) * style.plan.head_dim;
        match &style.rope {
            Some(rope) => ops::attention_of_joined(&ops::rope_leading(qkv, rope, turning)?, &style.plan),
            None => ops::attention_of_joined(qkv, &style.plan),
        }
    }

    fn apart(&self, qkv: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let style = &pass.styles[self.style];
        let plan = &style.plan;
        let mut q = qkv.narrow(1, 0, plan.heads * plan.head_dim)?;
        if let Some(norm) = &self.q_norm {
            q = norm.forward_heads(&q, plan.heads, &pass.cx)?;
        }
        if let Some(rope) = &style.rope {
            q = ops::rope(&q, rope)?;
        }
        if self.layer_scale != 1.0 {
            q = (q * f64::from(self.layer_scale))?;
        }
        let (k, v) = self.keys_and_values(qkv, pass)?;
        ops::attention(&q, &k, &v, plan)
    }

    /// Everything that the step's queries may see; with a cache, the step's own is in it from here on.
    fn keys_and_values(&self, qkv: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, Tensor)> {
        let style = &pass.styles[self.style];
        let plan = &style.plan;
        let (qw, kw) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let mut k = qkv.narrow(1, qw, kw)?;
        let v = qkv.narrow(1, qw + kw, kw)?;
        if let Some(norm) = &self.k_norm {
            k = norm.forward_heads(&k, plan.kv_heads, &pass.cx)?;
        }
        if let Some(rope) = &style.rope {
            k = ops::rope(&k, rope)?;
        }
        pass.keys.all((self.layer, self.keys), (k, v), &pass.cx)
    }
}
