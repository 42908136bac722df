//! Softmax attention over ragged sequences (Vaswani et al. 2017), grouped-query (Ainslie et al. 2023), causal with an
//! optional sliding window or bidirectional.
//!
//! Keys and values are rows of two matrices; each span names the rows that are its positions `0, 1, ...`: either rows of
//! this step (training, encoders) or slots of a cache (serving). So one op serves all.

use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::{attention_cpu, is_cpu_f32};

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttnMask {
    /// Only its own and earlier positions.
    pub causal: bool,
    /// Only the last so many positions (its own included).
    pub window: Option<usize>,
}

impl AttnMask {
    /// The keys that the query at absolute position `at` sees, of `keys` in all, the first `pinned` of which are always
    /// seen.
    pub(super) fn seen(self, at: usize, keys: usize, pinned: usize) -> Seen {
        let to = if self.causal { (at + 1).min(keys) } else { keys };
        let from = self.window.map_or(0, |w| (at + 1).saturating_sub(w)).min(to);
        // pinned keys that the window reaches, or touches, are part of its run
        if from <= pinned && pinned > 0 { Seen { pinned: 0, from: 0, to } } else { Seen { pinned, from, to } }
    }
}

/// Keys that a query sees: the first `pinned`, then `from..to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pinned: usize,
    from: usize,
    to: usize,
}

impl Seen {
    /// How many.
    #[inline(always)]
    pub(super) fn len(self) -> usize {
        self.pinned + self.to - self.from
    }

    /// The run behind the pinned ones: all of them, where none is pinned.
    #[inline(always)]
    pub(super) fn range(self) -> std::ops::Range<usize> {
        self.from..self.to
    }

    /// The key index of the `i`-th.
    #[inline(always)]
    pub(super) fn at(self, i: usize) -> usize {
        if i < self.pinned { i } else { self.from + i - self.pinned }
    }
}

/// Where a span's keys are.
#[derive(Debug, Clone)]
pub enum KeyRows {
    /// Consecutive rows from here.
    From(usize),
    /// These rows, in order of position.
    Slots(Arc<[u32]>),
}

/// One sequence.
#[derive(Debug, Clone)]
pub struct AttnSpan {
    /// First query row: of the queries' matrix. The output has the rows of the spans in order, and no others.
    pub q_start: usize,
    /// Query rows.
    pub q_len: usize,
    /// Key index of the first query: what the mask counts from.
    pub context_len: usize,
    /// Position id of the first query: what a bias by distance counts from, to the index of the key. It is `context_len`
    /// but behind pinned keys, which take no position.
    pub position: usize,
    /// So many of the first keys are seen by every query, whatever the window; at most `context_len`.
    pub pinned: usize,
    /// Rows of keys and values. Spans may share rows.
    pub keys: KeyRows,
    /// How many: `context_len + q_len` where all of a sequence looks at itself, or more where only some of its rows do; another
    /// sequence's length in cross-attention.
    pub keys_len: usize,
}

impl AttnSpan {
    /// The row of position `j`.
    #[inline(always)]
    pub(super) fn key_row(&self, j: usize) -> usize {
        match &self.keys {
            KeyRows::From(start) => start + j,
            KeyRows::Slots(slots) => slots[j] as usize,
        }
    }
}

/// A bias of the scores by head and distance (T5; Raffel et al. 2020).
#[derive(Debug, Clone)]
pub struct RelativeBias {
    /// Distances beyond this many positions count as this many.
    pub reach: usize,
    /// `[heads, 2 reach + 1]`: the bias of key position - query position = `-reach ..= reach`.
    pub values: Arc<[f32]>,
    /// The same values as a tensor that a gradient is wanted of; `None`: frozen.
    trained: Option<Tensor>,
}

impl RelativeBias {
    /// Of values `[heads, 2 reach + 1]`.
    ///
    /// # Errors
    /// Another shape; those of candle.
    pub fn new(values: &Tensor) -> Result<Self> {
        let (_, width) = values.dims2()?;
        if width % 2 == 0 {
            bail!("a bias by distance has {width} values by head; an odd number is accepted");
        }
        let trained = values.track_op().then(|| values.clone());
        let values: Vec<f32> = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(Self { reach: width / 2, values: values.into(), trained })
    }

    /// Biases of one head.
    pub(super) fn head(&self, head: usize) -> &[f32] {
        let width = 2 * self.reach + 1;
        &self.values[head * width..(head + 1) * width]
    }

    /// Where in a head's biases the one of this query's position and this key's index stands.
    #[inline(always)]
    pub(super) fn place(&self, query: usize, key: usize) -> usize {
        if key >= query {
            self.reach + (key - query).min(self.reach)
        } else {
            self.reach - (query - key).min(self.reach)
        }
    }
}

/// All sequences of a step, and the shape of the heads.
#[derive(Debug, Clone)]
pub struct AttnPlan {
    /// The sequences; their query rows are in order, and rows that are in none are nobody's. Shared by the plans of a model's
    /// kinds of layers.
    pub spans: Arc<[AttnSpan]>,
    /// Visibility.
    pub mask: AttnMask,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores; `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
    /// Scores are squeezed to `cap * tanh(score / cap)` (Gemma 2).
    pub cap: Option<f32>,
    /// Added to the scores.
    pub bias: Option<RelativeBias>,
}

impl AttnPlan {
    /// The bias, if a gradient of it is wanted.
    pub(super) fn trained_bias(&self) -> Option<&RelativeBias> {
        self.bias.as_ref().filter(|b| b.trained.is_some())
    }

    /// Queries in all: rows of the output.
    pub(super) fn queries(&self) -> usize {
        self.spans.iter().map(|s| s.q_len).sum()
    }

    /// Checks the plan against the tensors, so that kernels may index without doubt.
    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let (rows, qw) = q.dims2()?;
        let (k_rows, kw) = k.dims2()?;
        if v.dims2()? != (k_rows, kw) || qw != self.heads * self.head_dim || kw != self.kv_heads * self.head_dim {
            bail!("attention: q {:?} k {:?} v {:?} do not fit {self:?}", q.shape(), k.shape(), v.shape());
        }
        if self.bias.as_ref().is_some_and(|b| b.values.len() != self.heads * (2 * b.reach + 1)) {
            bail!("attention: the bias is not one of {} heads", self.heads);
        }
        let mut at = 0;
        for s in self.spans.iter() {
            let fits = match &s.keys {
                KeyRows::From(from) => from + s.keys_len <= k_rows,
                KeyRows::Slots(slots) => {
                    slots.len() == s.keys_len && slots.iter().all(|&slot| (slot as usize) < k_rows)
                }
            };
            if s.q_start < at || !fits || s.pinned > s.context_len {
                bail!("attention: span at row {} (from {at} on) has keys outside the {k_rows} rows", s.q_start);
            }
            at = s.q_start + s.q_len;
        }
        if at > rows {
            bail!("attention: spans end at {at} of {rows} rows");
        }
        Ok(())
    }
}

/// `softmax(cap(scale * q k^T) + bias + mask) v`: `q [rows, heads * head_dim]`, `k` and `v` `[key_rows, kv_heads * head_dim]` ->
/// `[queries, heads * head_dim]`: the plan's queries, which are all rows as a rule.
///
/// # Errors
/// A plan that does not fit the tensors.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, plan: &Arc<AttnPlan>) -> Result<Tensor> {
    plan.check(q, k, v)?;
    let trained = plan.bias.as_ref().and_then(|b| b.trained.as_ref());
    if is_cpu_f32(q) && is_cpu_f32(k) && is_cpu_f32(v) && trained.is_none_or(is_cpu_f32) {
        attention_cpu::attention(&q.contiguous()?, &k.contiguous()?, &v.contiguous()?, trained, plan)
    } else {
        reference(q, k, v, plan)
    }
}

/// Whether every span looks at rows of its own and nothing else, a query's key being in the query's row, so that
/// [`attention_of_joined`] takes it.
pub fn attends_own_rows(plan: &AttnPlan) -> bool {
    let mut end = 0; // of the rows of the spans before
    let own = |s: &AttnSpan| {
        let KeyRows::From(from) = s.keys else { return false };
        let fits = from >= end && from + s.context_len == s.q_start && s.context_len + s.q_len <= s.keys_len;
        end = from + s.keys_len;
        fits
    };
    plan.trained_bias().is_none() && plan.spans.iter().all(own)
}

/// [`attention`] of query, key and value side by side, `qkv` `[rows, (heads + 2 kv_heads) * head_dim]`, as one op: its plan's
/// queries, `[queries, heads * head_dim]`.
///
/// # Errors
/// A plan that does not fit the tensor, or whose spans look elsewhere.
pub fn attention_of_joined(qkv: &Tensor, plan: &Arc<AttnPlan>) -> Result<Tensor> {
    let (qw, kw) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
    if qkv.dim(1)? != qw + 2 * kw || !attends_own_rows(plan) {
        bail!("attention: rows {:?} do not fit {plan:?}", qkv.shape());
    }
    let (q, k, v) = (qkv.narrow(1, 0, qw)?, qkv.narrow(1, qw, kw)?, qkv.narrow(1, qw + kw, kw)?);
    if !is_cpu_f32(qkv) {
        return attention(&q, &k, &v, plan);
    }
    plan.check(&q, &k, &v)?;
    attention_cpu::joined(&qkv.contiguous()?, plan)
}

/// The reference: span by span in candle tensors; differentiable, any device and dtype.
pub(super) fn reference(q: &Tensor, k: &Tensor, v: &Tensor, plan: &AttnPlan) -> Result<Tensor> {
    let (h, kh, d) = (plan.heads, plan.kv_heads, plan.head_dim);
    let mut outs = Vec::with_capacity(plan.spans.len());
    for span in plan.spans.iter() {
        let (len, n) = (span.q_len, span.keys_len);
        let pick = |t: &Tensor| -> Result<Tensor> {
            let rows = match &span.keys {
                KeyRows::From(start) => t.narrow(0, *start, n)?,
                KeyRows::Slots(slots) => t.index_select(&Tensor::new(&slots[..], t.device())?, 0)?,
            };
            let heads = rows.reshape((n, kh, 1, d))?.broadcast_as((n, kh, h / kh, d))?.reshape((n, h, d))?;
            heads.transpose(0, 1)?.contiguous() // [heads, keys, head_dim]
        };
        let qs = q.narrow(0, span.q_start, len)?.reshape((len, h, d))?.transpose(0, 1)?.contiguous()?;
        let (ks, vs) = (pick(k)?, pick(v)?);
        let scores = (qs.matmul(&ks.t()?.contiguous()?)? * f64::from(plan.scale))?; // [heads, len, keys]
        let mut scores = scores.to_dtype(DType::F32)?;
        if let Some(cap) = plan.cap.map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        if let Some(bias) = &plan.bias {
            scores = (scores + bias_tensor(bias, h, span, q.device())?)?;
        }
        let scores = scores.broadcast_add(&mask_tensor(plan.mask, span, q.device())?)?;
        let probs = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        outs.push(probs.matmul(&vs)?.transpose(0, 1)?.contiguous()?.reshape((len, h * d))?);
    }
    Tensor::cat(&outs, 0)
}

/// 0 where seen, -inf where not: `[len, keys]`.
fn mask_tensor(mask: AttnMask, span: &AttnSpan, device: &Device) -> Result<Tensor> {
    let n = span.keys_len;
    let mut data = vec![f32::NEG_INFINITY; span.q_len * n];
    for (i, row) in data.chunks_mut(n).enumerate() {
        let seen = mask.seen(span.context_len + i, n, span.pinned);
        (0..seen.len()).for_each(|j| row[seen.at(j)] = 0.0);
    }
    Tensor::from_vec(data, (span.q_len, n), device)
}

/// `[heads, len, keys]`.
fn bias_tensor(bias: &RelativeBias, heads: usize, span: &AttnSpan, device: &Device) -> Result<Tensor> {
    let (len, n) = (span.q_len, span.keys_len);
    if let Some(table) = &bias.trained {
        let places = (0..len).flat_map(|i| (0..n).map(move |j| bias.place(span.position + i, j) as u32));
        let places = Tensor::from_iter(places, device)?;
        return table.to_dtype(DType::F32)?.index_select(&places, 1)?.reshape((heads, len, n));
    }
    let mut data = Vec::with_capacity(heads * len * n);
    for head in 0..heads {
        let values = bias.head(head);
        for i in 0..len {
            data.extend((0..n).map(|j| values[bias.place(span.position + i, j)]));
        }
    }
    Tensor::from_vec(data, (heads, len, n), device)
}

#[cfg(test)]
mod tests;
