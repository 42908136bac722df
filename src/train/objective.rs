//! The losses: next token, label of a text, labels of words. One forward, the same as serving's.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};

use crate::{
    delta::{Delta, DeltaBatch},
    model::{Base, HeadLogits, Input, Source},
    nn::Cx,
    ops,
    pacing::Pacer,
    rows::RowLayout,
    train::encode::{Encoded, Target},
};

/// Losses of a micro-batch, one per supervised token, text or word.
#[derive(Debug)]
pub struct Losses {
    /// `[n]`, f32; tracked when the delta's tensors are variables.
    pub each: Tensor,
    /// Classification: `[n, labels]`, f32.
    pub logits: Option<Tensor>,
    /// Classification: the right label of each row of `logits`.
    pub gold: Vec<u32>,
    /// Token classification: rows of `logits` of each example.
    pub words: Vec<usize>,
}

/// Runs examples (all of one kind) through the base with a delta.
///
/// # Errors
/// Those of the forward, or a target that the base cannot serve.
pub fn losses(base: &Base, delta: Arc<Delta>, examples: &[&Encoded], pacer: Option<&Arc<Pacer>>) -> Result<Losses> {
    smoothed_losses(base, delta, examples, 0.0, pacer)
}

/// As [`losses`], with label smoothing in [0, 1) ([`ops::smoothed_nll`]): what training minimises.
///
/// # Errors
/// As [`losses`].
pub fn smoothed_losses(
    base: &Base,
    delta: Arc<Delta>,
    examples: &[&Encoded],
    smoothing: f64,
    pacer: Option<&Arc<Pacer>>,
) -> Result<Losses> {
    let lens: Vec<usize> = examples.iter().map(|e| e.tokens.len()).collect();
    let rows = RowLayout::packed_after(lens.iter().map(|&len| (len, delta.ahead())));
    let tokens: Vec<u32> = examples.iter().flat_map(|e| e.tokens.iter().copied()).collect();
    let deltas = DeltaBatch::single(Arc::clone(&delta), &rows, base.sites.len());
    let source = source(base, &delta, examples, pacer)?;
    let memory = source.as_ref().map(Source::memory);
    let cx = Cx { rows: &rows, deltas: &deltas, kv: None, pacer, memory: memory.as_ref() };
    let hidden = base.transformer.forward(&Input { tokens: &tokens, token_types: None }, &cx)?; // [rows, hidden]
    match examples.first().map(|e| &e.target) {
        Some(Target::Tokens(_)) => next_token(base, &hidden, examples, smoothing, &cx),
        Some(Target::Label(_)) => text_label(base, &hidden, examples, smoothing, &cx),
        Some(Target::Tags(_)) => word_labels(base, &hidden, examples, smoothing, &cx),
        None => candle_core::bail!("an empty micro-batch"),
    }
}

/// What an encoder-decoder's encoder makes of the examples' sources.
fn source(
    base: &Base,
    delta: &Arc<Delta>,
    examples: &[&Encoded],
    pacer: Option<&Arc<Pacer>>,
) -> Result<Option<Source>> {
    if !base.arch.is_encoder_decoder() {
        return Ok(None);
    }
    let rows = RowLayout::packed_after(examples.iter().map(|e| (e.source.len(), delta.source_ahead())));
    let tokens: Vec<u32> = examples.iter().flat_map(|e| e.source.iter().copied()).collect();
    let deltas = vec![Some(Arc::clone(delta)); examples.len()];
    Source::encode(base, rows, &tokens, &deltas, pacer).map(Some)
}

/// Row `t - 1` predicts token `t`, for every supervised `t`.
fn next_token(base: &Base, hidden: &Tensor, examples: &[&Encoded], smoothing: f64, cx: &Cx<'_>) -> Result<Losses> {
    let (mut pick, mut targets) = (Vec::new(), Vec::new());
    for (example, span) in examples.iter().zip(cx.rows.spans()) {
        let Target::Tokens(mask) = &example.target else { candle_core::bail!("mixed targets in a micro-batch") };
        for (t, _) in mask.iter().enumerate().skip(1).filter(|(_, learn)| **learn) {
            pick.push((span.token_rows().start + t - 1) as u32);
            targets.push(example.tokens[t]);
        }
    }
    let each = base.transformer.smoothed_nll(hidden, (&pick, &targets), smoothing, cx)?; // [n]
    Ok(Losses { each, logits: None, gold: Vec::new(), words: Vec::new() })
}

fn text_label(base: &Base, hidden: &Tensor, examples: &[&Encoded], smoothing: f64, cx: &Cx<'_>) -> Result<Losses> {
    let mut gold = Vec::with_capacity(examples.len());
    for example in examples {
        let Target::Label(label) = &example.target else { candle_core::bail!("mixed targets in a micro-batch") };
        gold.push(*label);
    }
    let logits = only_group(base.transformer.head_logits(hidden, cx)?, examples.len())?; // [texts, labels]
    cross_entropy(logits, gold, smoothing)
}

fn word_labels(base: &Base, hidden: &Tensor, examples: &[&Encoded], smoothing: f64, cx: &Cx<'_>) -> Result<Losses> {
    let logits = only_group(base.transformer.token_head_logits(hidden, cx)?, examples.len())?; // [tokens, labels]
    let (mut pick, mut gold, mut words, mut start) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (example, span) in examples.iter().zip(cx.rows.spans()) {
        let Target::Tags(tags) = &example.target else { candle_core::bail!("mixed targets in a micro-batch") };
        pick.extend(tags.iter().map(|(at, _)| start + at));
        start += span.token_rows().len() as u32;
        gold.extend(tags.iter().map(|(_, label)| *label));
        words.push(tags.len());
    }
    let logits = logits.index_select(&Tensor::new(pick, logits.device())?, 0)?; // [words, labels]
    Ok(Losses { words, ..cross_entropy(logits, gold, smoothing)? })
}

/// One delta, so one head for all spans, in order.
fn only_group(mut groups: Vec<HeadLogits>, spans: usize) -> Result<Tensor> {
    match (groups.pop(), groups.is_empty()) {
        (Some(group), true) if group.spans.len() == spans => Ok(group.logits),
        _ => candle_core::bail!("classification without a head"),
    }
}

fn cross_entropy(logits: Tensor, gold: Vec<u32>, smoothing: f64) -> Result<Losses> {
    let logits = logits.to_dtype(DType::F32)?;
    let log_probs = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
    let index = Tensor::new(gold.as_slice(), logits.device())?.unsqueeze(1)?; // [n, 1]
    let each = ops::smoothed_nll(&log_probs, &index, smoothing)?; // [n]
    Ok(Losses { each, logits: Some(logits), gold, words: Vec::new() })
}
