//! What all layers of one forward share: sequences as attention sees them, by kind of layer, and rotary angles.

use std::sync::Arc;

use candle_core::{Device, Result, bail};

use super::{Cx, Encoded, Rotary};
use crate::{
    delta::{Prefixes, Stack, prefix_keys},
    ops::{AttnMask, AttnPlan, AttnSpan, KeyRows, RelativeBias, RopeTable},
    rows::RowLayout,
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
pub(super) struct Applied {
    pub(super) plan: Arc<AttnPlan>,
    pub(super) rope: Option<RopeTable>,
}

/// Cross-attention on the rows of a step.
pub(super) struct Crossing<'a> {
    pub(super) plan: Arc<AttnPlan>,
    /// What is to be projected in this step.
    pub(super) encoded: Option<Encoded<'a>>,
    /// Cache slots of its rows; empty without a cache.
    pub(super) slots: Vec<u32>,
}

/// What all layers of one forward share, computed once.
pub struct Pass<'a> {
    /// The step.
    pub cx: Cx<'a>,
    /// By kind of layer.
    pub(super) styles: Vec<Applied>,
    /// Cache slots of the step's rows; empty without a cache.
    pub(super) slots: Vec<u32>,
    /// Keys and values that deltas put ahead of the rows.
    pub(super) prefixes: Prefixes,
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
        let (spans, slots, prefixes) = spans(&cx, stack)?;
        let applied = |style: &Style| -> Result<Applied> {
            let rope = style.rotary.as_ref().map(|r| r.table(positions, device)).transpose()?;
            Ok(Applied { plan: heads.plan(Arc::clone(&spans), style.mask, style.bias.clone()), rope })
        };
        let styles = styles.iter().map(applied).collect::<Result<_>>()?;
        let crossing = if cx.memory.is_some() { Some(crossing(&cx, heads)?) } else { None };
        Ok(Self { cx, styles, slots, prefixes, crossing })
    }
}

/// Each sequence looks at itself (at rows of this step, or at its cache slots) and at its prefix. With the slots of the
/// step's rows.
fn spans(cx: &Cx<'_>, stack: Stack) -> Result<(Arc<[AttnSpan]>, Vec<u32>, Prefixes)> {
    let cached = cx.kv.is_some() && cx.rows.spans().iter().all(|s| !s.slots.is_empty());
    let (keys, prefixes) = prefix_keys(cx.rows, cx.deltas, stack, cached)?;
    let mut slots = Vec::new();
    let span = |(s, keys): (&crate::rows::Span, KeyRows)| {
        if cached {
            slots.extend_from_slice(&s.slots[s.first_key()..]);
        }
        let pinned = if s.ahead.pinned { s.ahead.keys } else { 0 };
        let (context_len, keys_len) = (s.first_key(), s.keys_len());
        AttnSpan { q_start: s.start, q_len: s.len, context_len, pinned, keys, keys_len }
    };
    let spans = cx.rows.spans().iter().zip(keys).map(span).collect();
    Ok((spans, slots, prefixes))
}

/// Each sequence of the decoder looks at its encoder's positions.
fn crossing<'a>(cx: &Cx<'a>, heads: HeadShape) -> Result<Crossing<'a>> {
    let Some(memory) = cx.memory else { bail!("a decoder without its encoder's output") };
    let cached = cx.kv.is_some() && !memory.slots.is_empty();
    let rows: &[_] = memory.encoded.as_ref().map_or(&[], |e| RowLayout::spans(e.rows));
    let known = if cached { memory.slots.len() } else { rows.len() };
    if known != cx.rows.spans().len() {
        bail!("{known} encoded sequences for {} of the decoder", cx.rows.spans().len());
    }
    let keys = |i: usize| {
        if cached {
            (KeyRows::Slots(Arc::clone(&memory.slots[i])), memory.slots[i].len())
        } else {
            (KeyRows::From(rows[i].start), rows[i].len)
        }
    };
    let span = |(i, s): (usize, &crate::rows::Span)| {
        let (keys, keys_len) = keys(i);
        AttnSpan { q_start: s.start, q_len: s.len, context_len: 0, pinned: 0, keys, keys_len }
    };
    let spans = cx.rows.spans().iter().enumerate().map(span).collect();
    let slots = if cached { rows.iter().flat_map(|s| s.slots.iter().copied()).collect() } else { vec![] };
    let mask = AttnMask { causal: false, window: None };
    Ok(Crossing { plan: heads.plan(spans, mask, None), encoded: memory.encoded, slots })
}
