//! Classification: pooled rows (or every row) through the head of each row's delta, or the base's own.

use candle_core::{Result, Tensor};

use super::Transformer;
use crate::{
    delta::{Head, HeadPool, Task},
    nn::Cx,
    ops::{self, Act},
    rows::Span,
};

/// Logits of the spans that share a head.
#[derive(Debug, Clone)]
pub struct HeadLogits {
    /// Which spans, in order.
    pub spans: Vec<usize>,
    /// `[spans, labels]` f32; for token classification `[token rows of all these spans, labels]`.
    pub logits: Tensor,
}

impl Transformer {
    /// The row of a span that a head reads: the first of an encoder (a virtual one where a delta has a prompt: PEFT reads what
    /// comes first), the last of a decoder.
    fn pooled_row(&self, pool: HeadPool, span: &Span) -> usize {
        match pool {
            HeadPool::Base if self.arch.is_causal() => span.start + span.len - 1,
            HeadPool::Base | HeadPool::First => span.start,
        }
    }

    /// By span, the row that sequence classification reads: as its head says, or the base's way.
    pub fn head_rows(&self, cx: &Cx<'_>) -> Vec<u32> {
        let spans = cx.rows.spans();
        let mut rows: Vec<u32> = spans.iter().map(|s| self.pooled_row(HeadPool::Base, s) as u32).collect();
        for (own, head) in self.heads(Task::SeqCls, cx).0 {
            own.into_iter().for_each(|s| rows[s] = self.pooled_row(head.pool, &spans[s]) as u32);
        }
        rows
    }

    /// One row per span, pooled the base's way; `[spans, hidden]`. Spans whose row is not wanted are absent.
    ///
    /// # Errors
    /// Those of candle.
    pub fn pooled(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Tensor> {
        Ok(self.pool(HeadPool::Base, hidden, cx)?.rows)
    }

    fn pool(&self, pool: HeadPool, hidden: &Tensor, cx: &Cx<'_>) -> Result<Pooled> {
        let rows = cx.rows.spans().iter().map(|s| self.pooled_row(pool, s)).enumerate();
        let (spans, pick): (Vec<usize>, Vec<u32>) =
            rows.filter(|(_, row)| cx.computes(*row)).map(|(span, row)| (span, row as u32)).unzip();
        let x = cx.states(hidden, &pick)?; // [spans, hidden]
        let rows = match &self.pooler {
            Some(pooler) if pool == HeadPool::Base => {
                let deltas = cx.deltas.picked(&pick);
                ops::activate(&pooler.forward(&x, &Cx { deltas: &deltas, ..*cx })?, Act::Tanh)?
            }
            _ => x,
        };
        Ok(Pooled { spans, rows })
    }

    /// Sequence classification, grouped by head; spans without any head, or whose row is not wanted, are absent.
    /// Differentiable.
    ///
    /// # Errors
    /// Those of candle.
    pub fn head_logits(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Vec<HeadLogits>> {
        let (mut pooled, mut firsts) = (None, None); // each made when the first head asks
        let mut out = Vec::new();
        for (mut spans, head) in self.heads(Task::SeqCls, cx).0 {
            spans.retain(|s| cx.computes(self.pooled_row(head.pool, &cx.rows.spans()[*s])));
            if spans.is_empty() {
                continue;
            }
            let place = match head.pool {
                HeadPool::Base => &mut pooled,
                HeadPool::First => &mut firsts,
            };
            let all = match place {
                Some(all) => all,
                None => place.insert(self.pool(head.pool, hidden, cx)?),
            };
            out.push(HeadLogits { logits: head.logits(&all.of(&spans)?)?, spans });
        }
        Ok(out)
    }

    /// Token classification, grouped by head; token rows of each span in order (virtual rows have no label); spans
    /// without token rows in this step may be absent, and those are whose rows are not wanted. Differentiable.
    ///
    /// # Errors
    /// Those of candle.
    pub fn token_head_logits(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Vec<HeadLogits>> {
        let (groups, _) = self.heads(Task::TokenCls, cx);
        let mut out = Vec::with_capacity(groups.len());
        for (mut spans, head) in groups {
            let rows = |s: usize| cx.rows.spans()[s].token_rows();
            spans.retain(|s| rows(*s).all(|row| cx.computes(row)));
            let pick: Vec<u32> = spans.iter().flat_map(|s| rows(*s)).map(|row| row as u32).collect();
            if !pick.is_empty() {
                out.push(HeadLogits { logits: head.logits(&cx.states(hidden, &pick)?)?, spans });
            }
        }
        Ok(out)
    }

    /// Sequence classification logits, one `[labels]` per span; `None` where neither delta nor base has a head, or where the
    /// row is not wanted.
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

    /// Token classification logits, one `[tokens, labels]` per span; `None` where neither delta nor base has a head, where
    /// no row of the span is a token, or where its rows are not wanted.
    ///
    /// # Errors
    /// Those of candle.
    pub fn classify_tokens(&self, hidden: &Tensor, cx: &Cx<'_>) -> Result<Vec<Option<Tensor>>> {
        let mut out = vec![None; cx.rows.spans().len()];
        for group in self.token_head_logits(hidden, cx)? {
            let mut at = 0;
            for span in group.spans {
                let len = cx.rows.spans()[span].token_rows().len();
                if len > 0 {
                    out[span] = Some(group.logits.narrow(0, at, len)?);
                }
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

/// One row for each of these spans.
struct Pooled {
    /// In order.
    spans: Vec<usize>,
    /// `[spans, hidden]`.
    rows: Tensor,
}

impl Pooled {
    /// The rows of some of the spans, in order.
    fn of(&self, spans: &[usize]) -> Result<Tensor> {
        if self.spans == spans {
            return Ok(self.rows.clone());
        }
        let at: Vec<u32> = spans.iter().map(|s| self.spans.partition_point(|own| own < s) as u32).collect();
        self.rows.index_select(&Tensor::new(at, self.rows.device())?, 0)
    }
}
