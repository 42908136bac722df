//! Several deltas in one forward and one backward pass on the shared base, each on examples of its own: the candidates of a
//! sweep, or independent jobs.
//!
//! The packed rows of member `i` come after those of member `i - 1`. Rows of different deltas never meet: each delta's loss is a
//! function of its own rows and variables, so the gradient of the sum of the losses is, for each variable, that of its own
//! delta's loss. What members want of the final hidden states is computed by kind: learned tokens by label smoothing, heads of
//! texts, heads of words.

use std::{
    iter::{once, repeat_n},
    ops::Range,
    sync::Arc,
};

use candle_core::{Result, Tensor};

use super::{
    encode::{Encoded, Target},
    gradients::{Gradients, Sums},
    objective::{Reads, Sequence, next_token, of_logits},
    trainable::NamedVar,
};
use crate::{
    delta::{Delta, DeltaBatch},
    model::{Base, HeadLogits, Input, Source},
    nn::{Cx, Wanted},
    ops,
    pacing::Pacer,
    rows::RowLayout,
};

/// A delta, and what it is trained on in this pass.
pub(super) struct Member<'a> {
    /// Formed of the variables.
    pub(super) delta: Arc<Delta>,
    pub(super) vars: &'a [NamedVar],
    /// At least one; all of one kind.
    pub(super) examples: &'a [&'a Encoded],
    /// Label smoothing, in [0, 1).
    pub(super) smoothing: f64,
    /// Divides the sum of its losses.
    pub(super) weight: f64,
}

/// What is read off the final hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tokens,
    Texts,
    Words,
}

impl Kind {
    fn reads(self) -> Reads {
        match self {
            Self::Tokens => Reads::Learned,
            Self::Texts => Reads::Heads,
            Self::Words => Reads::All,
        }
    }
}

impl Member<'_> {
    fn kind(&self) -> Result<Kind> {
        let mut kinds = self.examples.iter().map(|e| match e.target {
            Target::Tokens(_) => Ok(Kind::Tokens),
            Target::Label(_) | Target::Labels(_) | Target::Value(_) => Ok(Kind::Texts),
            Target::Tags(_) => Ok(Kind::Words),
            Target::Preferred(..) | Target::Rated(..) => candle_core::bail!("preferences have losses of their own"),
        });
        let Some(first) = kinds.next().transpose()? else { candle_core::bail!("an empty micro-batch") };
        match kinds.all(|kind| kind.is_ok_and(|kind| kind == first)) {
            true => Ok(first),
            false => candle_core::bail!("mixed targets in a micro-batch"),
        }
    }
}

/// By member: the micro-batch's share of its loss, and its gradients, as
/// [`gradients::whole`](super::gradients::whole) has them: the sum of its losses over its weight, and no gradients where that
/// is not finite. Such a member has no part in the others' backward pass.
///
/// # Errors
/// Those of the forward and of the losses; preferences, which have losses of their own.
pub(super) fn gradients(
    base: &Base,
    members: &[Member<'_>],
    pacer: Option<&Arc<Pacer>>,
) -> Result<Vec<(f64, Gradients)>> {
    ops::in_step(|| by_one_pass(base, members, pacer))
}

fn by_one_pass(base: &Base, members: &[Member<'_>], pacer: Option<&Arc<Pacer>>) -> Result<Vec<(f64, Gradients)>> {
    let each = losses(base, members, pacer)?;
    let mut total: Option<Tensor> = None;
    let mut values = Vec::with_capacity(each.len());
    for (member, losses) in members.iter().zip(&each) {
        let share = (losses.sum_all()? / member.weight)?;
        let value = f64::from(share.to_scalar::<f32>()?);
        values.push(value);
        if value.is_finite() {
            total = Some(match total {
                Some(before) => (before + share)?,
                None => share,
            });
        }
    }
    drop(each);
    let mut grads = total.map(|total| total.backward()).transpose()?;
    let taken = members.iter().zip(values).map(|(member, value)| {
        let mut sums = Sums::of(member.vars, &[]);
        if let Some(grads) = grads.as_mut().filter(|_| value.is_finite()) {
            sums.take(grads)?;
        }
        Ok((value, sums.grads(member.vars.len())))
    });
    taken.collect()
}

/// The losses of each member's examples, `[n]` each.
fn losses(base: &Base, members: &[Member<'_>], pacer: Option<&Arc<Pacer>>) -> Result<Vec<Tensor>> {
    let kinds: Vec<Kind> = members.iter().map(Member::kind).collect::<Result<_>>()?;
    let sequences: Vec<Sequence<'_>> =
        members.iter().flat_map(|m| m.examples).map(|example| Sequence::from(*example)).collect();
    let of: Vec<&Arc<Delta>> = members.iter().flat_map(|m| repeat_n(&m.delta, m.examples.len())).collect();
    let per_span: Vec<Option<Arc<Delta>>> = of.iter().map(|delta| Some(Arc::clone(delta))).collect();
    let spans = || sequences.iter().zip(&of);
    let source = if base.arch.is_encoder_decoder() {
        let rows = RowLayout::packed_after(spans().map(|(s, delta)| (s.source.len(), delta.source_ahead())));
        let tokens: Vec<u32> = sequences.iter().flat_map(|s| s.source.iter().copied()).collect();
        Some(Source::encode(base, rows, &tokens, &per_span, pacer)?)
    } else {
        None
    };
    let memory = source.as_ref().map(Source::memory);
    let rows = RowLayout::packed_after(spans().map(|(s, delta)| (s.tokens.len(), delta.ahead())));
    let tokens: Vec<u32> = sequences.iter().flat_map(|s| s.tokens.iter().copied()).collect();
    let deltas = DeltaBatch::new(&rows, &per_span, base.sites.len());
    let cx = Cx { memory: memory.as_ref(), pacer, ..Cx::new(&rows, &deltas) };
    let ends = members.iter().scan(0, |end, m| {
        *end += m.examples.len();
        Some(*end)
    });
    let ends: Vec<usize> = once(0).chain(ends).collect();
    let spans: Vec<Range<usize>> = ends.windows(2).map(|w| w[0]..w[1]).collect();
    let read = kinds.iter().zip(&spans);
    let read = read.flat_map(|(kind, own)| kind.reads().rows(base, &sequences[own.clone()], own.clone(), &cx));
    let wanted = Wanted::of(&rows, &deltas, read);
    let cx = Cx { wanted: wanted.as_ref(), ..cx };
    let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx)?; // [wanted rows, hidden]
    Pass { base, hidden: &hidden, cx: &cx, members, sequences: &sequences, spans, kinds }.losses()
}

/// A forward whose losses are to be computed.
struct Pass<'a> {
    base: &'a Base,
    /// `[wanted rows, hidden]`.
    hidden: &'a Tensor,
    cx: &'a Cx<'a>,
    members: &'a [Member<'a>],
    sequences: &'a [Sequence<'a>],
    /// By member: its spans, one per example.
    spans: Vec<Range<usize>>,
    /// By member.
    kinds: Vec<Kind>,
}

impl Pass<'_> {
    fn losses(&self) -> Result<Vec<Tensor>> {
        let mut all: Vec<(usize, Tensor)> = Vec::with_capacity(self.members.len());
        let mut tokens = self.of_kind(Kind::Tokens);
        while let Some(first) = tokens.first().copied() {
            let smoothing = self.members[first].smoothing;
            let same = |i: &usize| self.members[*i].smoothing.to_bits() == smoothing.to_bits();
            let (alike, others) = tokens.into_iter().partition(same);
            tokens = others;
            all.extend(self.next_token(alike, smoothing)?);
        }
        let (texts, words) = (self.of_kind(Kind::Texts), self.of_kind(Kind::Words));
        if !texts.is_empty() {
            let groups = self.base.transformer.head_logits(self.hidden, self.cx)?;
            all.extend(self.labelled(texts, &groups, |_| 1)?);
        }
        if !words.is_empty() {
            let groups = self.base.transformer.token_head_logits(self.hidden, self.cx)?;
            let spans = self.cx.rows.spans();
            all.extend(self.labelled(words, &groups, |span| spans[span].token_rows().len())?);
        }
        all.sort_by_key(|(i, _)| *i);
        Ok(all.into_iter().map(|(_, losses)| losses).collect())
    }

    fn of_kind(&self, kind: Kind) -> Vec<usize> {
        (0..self.members.len()).filter(|i| self.kinds[*i] == kind).collect()
    }

    /// Losses of the learned tokens of members that have the same label smoothing.
    fn next_token(&self, alike: Vec<usize>, smoothing: f64) -> Result<Vec<(usize, Tensor)>> {
        // sequences of other members are passed over as those without a learned token
        let mut sequences: Vec<Sequence<'_>> = self.sequences.iter().map(|s| Sequence { learn: &[], ..*s }).collect();
        for i in &alike {
            let spans = self.spans[*i].clone();
            sequences[spans.clone()].copy_from_slice(&self.sequences[spans]);
        }
        let (each, counts) = next_token(self.base, self.hidden, &sequences, smoothing, self.cx)?;
        let mut from = 0;
        let piece = |i: usize| {
            let len = counts[self.spans[i].clone()].iter().sum();
            let piece = each.narrow(0, from, len)?;
            from += len;
            Ok((i, piece))
        };
        alike.into_iter().map(piece).collect()
    }

    /// Losses of members with labels, given the logits by head and how many rows of logits a span has.
    fn labelled(
        &self,
        members: Vec<usize>,
        groups: &[HeadLogits],
        rows: impl Fn(usize) -> usize,
    ) -> Result<Vec<(usize, Tensor)>> {
        let one = |i: usize| {
            let (member, spans) = (&self.members[i], self.spans[i].clone());
            let logits = logits_of(&spans, groups, &rows)?;
            let own = &self.cx.rows.spans()[spans];
            Ok((i, of_logits(logits, member.examples, member.smoothing, own)?.each))
        };
        members.into_iter().map(one).collect()
    }
}

/// The logits of a member's spans, which are of one head: its delta's, or the base's, which it may share with others.
fn logits_of(spans: &Range<usize>, groups: &[HeadLogits], rows: impl Fn(usize) -> usize) -> Result<Tensor> {
    for group in groups {
        let Some(at) = group.spans.iter().position(|s| *s == spans.start) else { continue };
        let own = group.spans.get(at..at + spans.len());
        if !own.is_some_and(|own| own.iter().copied().eq(spans.clone())) {
            candle_core::bail!("the examples of a micro-batch have several heads");
        }
        let before: usize = group.spans[..at].iter().map(|s| rows(*s)).sum();
        return group.logits.narrow(0, before, spans.clone().map(rows).sum());
    }
    candle_core::bail!("classification without a head")
}
