//! Several deltas on the same examples in one forward and one backward pass on the shared base.
//!
//! The packed rows of delta `i` come after those of delta `i - 1`. Rows of different deltas never meet: each delta's loss is a
//! function of its own rows and variables, so the gradient of the sum of the losses is, for each variable, that of its own
//! delta's loss.

use std::{iter::repeat_n, sync::Arc};

use candle_core::{Result, Tensor};

use super::{
    encode::{Encoded, Target},
    gradients::{Gradients, Sums},
    objective::{Sequence, head_logits, next_token, of_logits},
    trainable::NamedVar,
};
use crate::{
    delta::{Delta, DeltaBatch},
    model::{Base, Input, Source},
    nn::Cx,
    pacing::Pacer,
    rows::RowLayout,
};

/// A delta and the variables that it is formed of.
pub(super) type Member<'a> = (Arc<Delta>, &'a [NamedVar]);

/// By member: the micro-batch's share of its loss, and its gradients, as
/// [`gradients::whole`](super::gradients::whole) has them: the sum of its losses over `weight`, and no gradients where that is
/// not finite. Such a member has no part in the others' backward pass.
///
/// # Errors
/// Those of the forward and of the losses; preferences, which have losses of their own.
pub(super) fn gradients(
    base: &Base,
    members: &[Member<'_>],
    examples: &[&Encoded],
    (smoothing, weight): (f64, f64),
    pacer: Option<&Arc<Pacer>>,
) -> Result<Vec<(f64, Gradients)>> {
    let each = losses(base, members, examples, smoothing, pacer)?;
    let mut total: Option<Tensor> = None;
    let mut values = Vec::with_capacity(each.len());
    for losses in &each {
        let share = (losses.sum_all()? / weight)?;
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
    let taken = members.iter().zip(values).map(|((_, vars), value)| {
        let mut sums = Sums::of(vars, &[]);
        if let Some(grads) = grads.as_mut().filter(|_| value.is_finite()) {
            sums.take(grads)?;
        }
        Ok((value, sums.grads(vars.len())))
    });
    taken.collect()
}

/// The losses of each member's run of the examples, `[n]` each.
fn losses(
    base: &Base,
    members: &[Member<'_>],
    examples: &[&Encoded],
    smoothing: f64,
    pacer: Option<&Arc<Pacer>>,
) -> Result<Vec<Tensor>> {
    let n = examples.len();
    let own: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
    let sequences: Vec<Sequence<'_>> = members.iter().flat_map(|_| own.iter().copied()).collect();
    let of: Vec<&Arc<Delta>> = members.iter().flat_map(|(delta, _)| repeat_n(delta, n)).collect();
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
    let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx)?; // [rows, hidden]
    match examples.first().map(|e| &e.target) {
        Some(Target::Tokens(_)) => {
            let (each, counts) = next_token(base, &hidden, &sequences, smoothing, &cx)?;
            let mut from = 0;
            let piece = |counts: &[usize]| {
                let len = counts.iter().sum();
                let piece = each.narrow(0, from, len);
                from += len;
                piece
            };
            counts.chunks(n).map(piece).collect()
        }
        _ => {
            let groups = head_logits(base, &hidden, examples, &cx)?;
            let in_order = groups.iter().enumerate().all(|(i, g)| g.spans.iter().copied().eq(i * n..(i + 1) * n));
            if groups.len() != members.len() || !in_order {
                candle_core::bail!("{} heads for {} candidates", groups.len(), members.len());
            }
            groups.into_iter().map(|g| Ok(of_logits(g.logits, examples, smoothing, &cx)?.each)).collect()
        }
    }
}
