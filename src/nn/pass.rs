//! What all layers of one forward share: sequences as attention sees them, by kind of layer, and rotary angles.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::{Cx, Encoded, Rotary};
use crate::{
    delta::{Keys, Prefixes, SiteId, Stack, prefix_keys},
    ops::{AttnMask, AttnPlan, AttnSpan, RelativeBias, RopeTable},
    rows::{Runs, Span},
};

/// Heads of attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Squeezes the scores (Gemma 2).
    pub cap: Option<f32>,
}

impl HeadShape {
    /// As many key heads as query heads, scores over the root of the head's width, no cap.
    pub fn plain(heads: usize, head_dim: usize) -> Self {
        Self { heads, kv_heads: heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), cap: None }
    }

    fn plan(self, spans: Arc<[AttnSpan]>, mask: AttnMask, bias: Option<RelativeBias>) -> Arc<AttnPlan> {
        let Self { heads, kv_heads, head_dim, scale, cap } = self;
        Arc::new(AttnPlan { spans, mask, heads, kv_heads, head_dim, scale, cap, bias })
    }
}

/// How layers of one kind attend.
#[derive(Debug, Clone)]
pub struct Style {
    /// Who sees whom.
    pub mask: AttnMask,
    /// Rotary positions, if any.
    pub rotary: Option<Rotary>,
    /// Bias by distance, if any.
    pub bias: Option<RelativeBias>,
}

/// A [`Style`] on the rows of a step.
#[derive(Clone)]
pub(super) struct Applied {
    pub(super) plan: Arc<AttnPlan>,
    pub(super) rope: Option<RopeTable>,
}

/// What the keys of an attention come from beside those of the step, and where they are kept.
#[derive(Clone)]
pub(super) struct KeyStore {
    /// Cache slots of the step's keys; empty without a cache.
    slots: Vec<u32>,
    /// Keys and values that deltas put ahead.
    prefixes: Prefixes,
}

impl KeyStore {
    /// Whether keys are kept in the cache.
    pub(super) fn is_cached(&self) -> bool {
        !self.slots.is_empty()
    }

    /// Whether the step's own keys are all there is to see.
    pub(super) fn are_the_rows(&self) -> bool {
        !self.is_cached() && self.prefixes.is_empty()
    }

    /// Everything that the step's queries may see, as the plan's key rows name it: the cache with the new rows and the
    /// prefixes of sequences that begin written to it; or, without a cache, the new rows and then all prefixes. `site` is
    /// that of the layer's prefixes.
    pub(super) fn all(
        &self,
        (layer, site): (usize, SiteId),
        (k, v): (Tensor, Tensor),
        cx: &Cx<'_>,
    ) -> Result<(Tensor, Tensor)> {
        match cx.kv.filter(|_| self.is_cached()) {
            Some(cache) => {
                let dtype = k.dtype();
                let write = |slots: &[u32], k: &Tensor, v: &Tensor| {
                    cache.write(layer, slots, &k.to_dtype(dtype)?, &v.to_dtype(dtype)?).map(drop)
                };
                self.prefixes.write(site, cx.deltas, write)?;
                cache.write(layer, &self.slots, &k, &v)
            }
            None if self.prefixes.is_empty() => Ok((k, v)),
            None => self.prefixes.join(site, cx.deltas, &k, &v),
        }
    }
}

/// Cross-attention on the rows of a step.
#[derive(Clone)]
pub(super) struct Crossing<'a> {
    pub(super) plan: Arc<AttnPlan>,
    /// What is to be projected in this step.
    pub(super) encoded: Option<Encoded<'a>>,
    pub(super) keys: KeyStore,
}

/// What all layers of one forward share, computed once; the last one has its own where not all rows are wanted.
pub struct Pass<'a> {
    /// The step.
    pub cx: Cx<'a>,
    /// The step behind self-attention, as linears and norms see it: in the last layer, that of the wanted rows.
    pub after: Cx<'a>,
    /// Which rows those are; `None`: all.
    wanted: Option<Vec<u32>>,
    /// By kind of layer.
    pub(super) styles: Vec<Applied>,
    /// Of self-attention.
    pub(super) keys: KeyStore,
    /// For decoders with an encoder.
    pub(super) crossing: Option<Crossing<'a>>,
}

impl<'a> Pass<'a> {
    /// A pass of rows at these positions through a stack with layers of these styles.
    ///
    /// # Errors
    /// Those of candle; a memory that does not fit the rows; a row layout that was not made for the step's deltas.
    pub(crate) fn new(
        cx: Cx<'a>,
        (stack, heads): (Stack, HeadShape),
        styles: &[Style],
        positions: &[u32],
        device: &Device,
    ) -> Result<Self> {
        let (spans, keys) = spans(&cx, stack)?;
        let applied = |style: &Style| -> Result<Applied> {
            let rope = style.rotary.as_ref().map(|r| r.table(positions, device)).transpose()?;
            Ok(Applied { plan: heads.plan(Arc::clone(&spans), style.mask, style.bias.clone()), rope })
        };
        let styles = styles.iter().map(applied).collect::<Result<_>>()?;
        let crossing = if cx.memory.is_some() { Some(crossing(&cx, heads)?) } else { None };
        Ok(Self { cx, after: cx, wanted: None, styles, keys, crossing })
    }

    /// That of the last layer, where all rows have keys and only the wanted ones have queries; `None` where all are wanted.
    ///
    /// # Errors
    /// Rows that are wanted of another step.
    pub(crate) fn of_last(&self) -> Result<Option<Self>> {
        let Some(wanted) = self.cx.wanted else { return Ok(None) };
        let runs = &wanted.runs;
        if !runs.are_of(self.cx.rows) {
            bail!("{} rows are wanted of another step", runs.len());
        }
        let applied = |style: &Applied| Applied { plan: asking(&style.plan, runs, false), rope: style.rope.clone() };
        let crossing = |c: &Crossing<'a>| Crossing { plan: asking(&c.plan, runs, true), ..c.clone() };
        Ok(Some(Self {
            cx: self.cx,
            after: Cx { deltas: &wanted.deltas, ..self.cx },
            wanted: Some(runs.rows().map(|row| row as u32).collect()),
            styles: self.styles.iter().map(applied).collect(),
            keys: self.keys.clone(),
            crossing: self.crossing.as_ref().map(crossing),
        }))
    }

    /// The rows of `x` `[rows, hidden]` that go on behind self-attention.
    ///
    /// # Errors
    /// Those of candle.
    pub fn going_on(&self, x: &Tensor) -> Result<Tensor> {
        match &self.wanted {
            Some(rows) => x.contiguous()?.index_select(&Tensor::new(rows.as_slice(), x.device())?, 0),
            None => Ok(x.clone()),
        }
    }

    /// Whether no row goes on: only the layer's keys and values are of use.
    pub fn ends_with_keys(&self) -> bool {
        self.wanted.as_ref().is_some_and(Vec::is_empty)
    }
}

/// The plan with these queries only. Where they are `picked`, the queries' matrix has no others; else it has all rows.
fn asking(plan: &Arc<AttnPlan>, runs: &Runs, picked: bool) -> Arc<AttnPlan> {
    let spans = runs.runs().iter().filter_map(|run| {
        let span = plan.spans.get(run.span)?;
        let before = run.rows.start - span.q_start;
        Some(AttnSpan {
            q_start: if picked { run.at } else { run.rows.start },
            q_len: run.rows.len(),
            context_len: span.context_len + before,
            position: span.position + before,
            ..span.clone()
        })
    });
    Arc::new(AttnPlan { spans: spans.collect(), ..AttnPlan::clone(plan) })
}

/// Each sequence looks at itself (at rows of this step, or at its cache slots) and at its prefix.
fn spans(cx: &Cx<'_>, stack: Stack) -> Result<(Arc<[AttnSpan]>, KeyStore)> {
    let cached = cx.kv.is_some() && cx.rows.spans().iter().all(|s| !s.slots.is_empty());
    let own = cx.rows.spans().iter();
    let own = own.map(|s| Keys { rows: s.rows(), slots: cached.then_some(&s.slots), begins: s.keys_due });
    let sequences: Vec<Keys<'_>> = own.collect();
    let (keys, prefixes) = prefix_keys(&sequences, cx.rows.rows(), cx.deltas, stack)?;
    let (mut slots, mut spans) = (Vec::new(), Vec::with_capacity(keys.len()));
    for (s, (keys, ahead)) in cx.rows.spans().iter().zip(keys) {
        if s.ahead.keys != ahead {
            bail!("rows from {} on were laid out for {} prefix keys, their delta has {ahead}", s.start, s.ahead.keys);
        }
        if cached {
            slots.extend_from_slice(&s.slots[s.first_key()..]);
        }
        let pinned = if s.ahead.pinned { s.ahead.keys } else { 0 };
        let (context_len, position, keys_len) = (s.first_key(), s.ahead.position(s.context_len), s.keys_len());
        spans.push(AttnSpan { q_start: s.start, q_len: s.len, context_len, position, pinned, keys, keys_len });
    }
    Ok((spans.into(), KeyStore { slots, prefixes }))
}

/// Each sequence of the decoder looks at its encoder's positions, and at its prefix of those.
fn crossing<'a>(cx: &Cx<'a>, heads: HeadShape) -> Result<Crossing<'a>> {
    let Some(memory) = cx.memory else { bail!("a decoder without its encoder's output") };
    let cached = cx.kv.is_some() && !memory.slots.is_empty();
    let encoded: &[Span] = memory.encoded.as_ref().map_or(&[], |e| e.rows.spans());
    let decoded = cx.rows.spans();
    // with a cache, a sequence is encoded in the step in which it begins
    let begins = |s: &&Span| !cached || s.context_len == 0;
    let known = if cached { memory.slots.len() } else { encoded.len() };
    let due = if memory.encoded.is_some() { decoded.iter().filter(begins).count() } else { 0 };
    if known != decoded.len() || encoded.len() != due {
        bail!(
            "{known} sequences with a source, {} of them encoded now, for {} of the decoder",
            encoded.len(),
            decoded.len()
        );
    }
    let mut fresh = encoded.iter();
    let own = |(i, s): (usize, &Span)| {
        let rows = Some(s).filter(begins).and_then(|_| fresh.next()).map(Span::rows);
        let slots = cached.then(|| &memory.slots[i]);
        Keys { begins: rows.is_some(), rows: rows.unwrap_or_default(), slots }
    };
    let sequences: Vec<Keys<'_>> = decoded.iter().enumerate().map(own).collect();
    let rows = memory.encoded.as_ref().map_or(0, |e| e.rows.rows());
    let (keys, prefixes) = prefix_keys(&sequences, rows, cx.deltas, Stack::Memory)?;
    let (mut slots, mut spans) = (Vec::new(), Vec::with_capacity(keys.len()));
    for ((s, own), (keys, ahead)) in decoded.iter().zip(&sequences).zip(keys) {
        let keys_len = own.slots.map_or(ahead + own.rows.len(), |all| all.len());
        if let Some(all) = own.slots.filter(|_| own.begins) {
            if all.len() != ahead + own.rows.len() {
                bail!("{} slots for {ahead} prefix keys and {} encoded rows", all.len(), own.rows.len());
            }
            slots.extend_from_slice(&all[ahead..]);
        }
        let (q_start, q_len) = (s.start, s.len);
        spans.push(AttnSpan { q_start, q_len, context_len: 0, position: 0, pinned: 0, keys, keys_len });
    }
    let mask = AttnMask { causal: false, window: None };
    let plan = heads.plan(spans.into(), mask, None);
    Ok(Crossing { plan, encoded: memory.encoded, keys: KeyStore { slots, prefixes } })
}
