//! Classification: pooled rows (or every row) through the head of each row's delta, or the base's own.

use candle_core::{Result, Tensor};

use super::Transformer;
use crate::{
    delta::{Head, HeadPool, Task},
    nn::Cx,
    ops::{self, Act},
};

/// Logits of the spans that share a head.
#[derive(Debug, Clone)]
pub struct HeadLogits {
    /// Which spans, in order.
    pub spans: Vec<usize>,
    /// `[spans, labels]` f32; for token classification `[rows of all these spans, labels]`.
    pub logits: Tensor,
}

impl Transformer {
    /// One row per span: the pooled first row of an encoder, the last row of a decoder. `[spans, hidden]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn pooled(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Tensor> {
        let pick: Vec<u32> = if self.arch.is_causal() {
            cx.rows.last_rows()
        } else {
            cx.rows.spans().iter().map(|s| s.start as u32).collect()
        };
        let x = hidden.contiguous()?.index_select(&Tensor::new(pick, &self.device)?, 0)?; // [spans, hidden]
        match &self.pooler {
            Some(pooler) => {
                let deltas = cx.deltas.per_span();
                ops::activate(&pooler.forward(&x, &Cx { deltas: &deltas, ..*cx })?, Act::Tanh)
            }
            None => Ok(x),
        }
    }

    /// The first row of every span, as it is. `[spans, hidden]`.
    fn firsts(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Tensor> {
        let pick: Vec<u32> = cx.rows.spans().iter().map(|s| s.start as u32).collect();
        hidden.contiguous()?.index_select(&Tensor::new(pick, &self.device)?, 0)
    }

    /// Sequence classification, grouped by head; spans without any head are absent. Differentiable.
    ///
    /// # Errors
    /// Those of candle.
    pub fn head_logits(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Vec<HeadLogits>> {
        let (groups, rest) = self.heads(Task::SeqCls, cx);
        if groups.is_empty() {
            return Ok(vec![]);
        }
        let all = cx.rows.spans().len() - rest.len();
        let (mut pooled, mut firsts) = (None, None); // each made when the first head asks
        let mut out = Vec::with_capacity(groups.len());
        for (spans, head) in groups {
            let rows = match head.pool {
                HeadPool::Base => kept(&mut pooled, || self.pooled(hidden, cx))?,
                HeadPool::First => kept(&mut firsts, || self.firsts(hidden, cx))?,
            }; // [spans, hidden]
            let x = if spans.len() == all && rest.is_empty() && spans.windows(2).all(|w| w[0] < w[1]) {
                rows
            } else {
                let idx: Vec<u32> = spans.iter().map(|&s| s as u32).collect();
                rows.index_select(&Tensor::new(idx, &self.device)?, 0)?
            };
            out.push(HeadLogits { logits: head.logits(&x)?, spans });
        }
        Ok(out)
    }

    /// Token classification, grouped by head; rows of each span in order. Differentiable.
    ///
    /// # Errors
    /// Those of candle.
    pub fn token_head_logits(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Vec<HeadLogits>> {
        let (groups, _) = self.heads(Task::TokenCls, cx);
        let mut out = Vec::with_capacity(groups.len());
        for (spans, head) in groups {
            let idx: Vec<u32> = spans.iter().flat_map(|&s| cx.rows.spans()[s].rows().map(|r| r as u32)).collect();
            let x = hidden.contiguous()?.index_select(&Tensor::new(idx, &self.device)?, 0)?;
            out.push(HeadLogits { logits: head.logits(&x)?, spans });
        }
        Ok(out)
    }

    /// Sequence classification logits, one `[labels]` per span; `None` where neither delta nor base has a head.
    ///
    /// # Errors
    /// Those of candle.
    pub fn classify(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Vec<Option<Tensor>>> {
        let mut out = vec![None; cx.rows.spans().len()];
        for group in self.head_logits(hidden, cx)? {
            for (i, span) in group.spans.into_iter().enumerate() {
                out[span] = Some(group.logits.get(i)?);
            }
        }
        Ok(out)
    }

    /// Token classification logits, one `[len, labels]` per span; `None` where neither delta nor base has a head.
    ///
    /// # Errors
    /// Those of candle.
    pub fn classify_tokens(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Vec<Option<Tensor>>> {
        let mut out = vec![None; cx.rows.spans().len()];
        for group in self.token_head_logits(hidden, cx)? {
            let mut at = 0;
            for span in group.spans {
                let len = cx.rows.spans()[span].len;
                out[span] = Some(group.logits.narrow(0, at, len)?);
                at += len;
            }
        }
        Ok(out)
    }

    /// Spans by head: each delta's own, then the base's for the others (if it is for this task); and who has none.
    fn heads<'a>(&'a self, task: Task, cx: &Cx<'a>) -> (Vec<(Vec<usize>, &'a Head)>, Vec<usize>) {
        let (mut groups, rest) =
            if cx.deltas.distinct() == 0 { (vec![], (0..cx.rows.spans().len()).collect()) } else { cx.deltas.heads() };
        match (&self.head, &self.arch.head) {
            (Some(head), Some(own)) if own.task == task && !rest.is_empty() => {
                groups.push((rest, head));
                (groups, vec![])
            }
            _ => (groups, rest),
        }
    }
}

fn kept(place: &mut Option<Tensor>, make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    match place {
        Some(t) => Ok(t.clone()),
        None => Ok(place.insert(make()?).clone()),
    }
}
