//! The losses: next token, label of a text, labels of words. One forward, the same as serving's.

use std::{ops::Range, sync::Arc};

use candle_core::{D, DType, Result, Tensor};

use crate::{
    delta::{Delta, DeltaBatch},
    model::{Base, HeadLogits, Input, Source},
    nn::{Cx, Memory, Wanted},
    ops,
    pacing::Pacer,
    rows::{RowLayout, Span},
    train::{
        encode::{Encoded, Target},
        preference::Rewards,
    },
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
    /// Multi-label classification and regression: what `logits` should become, of the same shape; else empty.
    pub targets: Vec<Vec<f32>>,
    /// Token classification: rows of `logits` of each example.
    pub words: Vec<usize>,
    /// Preferences: what rewards say.
    pub rewards: Rewards,
}

impl Losses {
    /// Losses alone.
    pub fn of(each: Tensor) -> Self {
        Self {
            each,
            logits: None,
            gold: Vec::new(),
            targets: Vec::new(),
            words: Vec::new(),
            rewards: Rewards::default(),
        }
    }
}

/// A sequence of a forward.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Token ids; for an encoder-decoder, the decoder's.
    pub tokens: &'a [u32],
    /// For an encoder-decoder: what the encoder reads. Else empty.
    pub source: &'a [u32],
    /// By token, whether it is learned; may be empty where labels are.
    pub learn: &'a [bool],
}

impl<'a> From<&'a Encoded> for Sequence<'a> {
    fn from(e: &'a Encoded) -> Self {
        Self { tokens: &e.tokens, source: &e.source, learn: e.learned() }
    }
}

/// Which final hidden states losses are computed of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// Those that predict learned tokens.
    Learned,
    /// Of each text, the one that its head reads.
    Heads,
    /// All.
    All,
}

impl Reads {
    /// What the losses of examples, all of one kind, read.
    pub fn of(examples: &[&Encoded]) -> Self {
        match examples.first().map(|e| &e.target) {
            Some(Target::Tokens(_) | Target::Preferred(..) | Target::Rated(..)) => Self::Learned,
            Some(Target::Label(_) | Target::Labels(_) | Target::Value(_)) => Self::Heads,
            Some(Target::Tags(_)) | None => Self::All,
        }
    }

    /// These rows of sequences, or of some of a step's: `at` is where their spans are.
    pub(super) fn rows(self, base: &Base, sequences: &[Sequence<'_>], at: Range<usize>, cx: &Cx<'_>) -> Vec<u32> {
        let spans = &cx.rows.spans()[at.clone()];
        match self {
            Self::Learned => learned(sequences, spans).0,
            Self::Heads => base.transformer.head_rows(cx)[at].to_vec(),
            Self::All => spans.iter().flat_map(|s| s.rows()).map(|row| row as u32).collect(),
        }
    }
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
    let sequences: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
    forward(base, &delta, (&sequences, Reads::of(examples)), pacer, |hidden, cx| {
        losses_of(base, hidden, (examples, &sequences), smoothing, cx)
    })
}

/// The losses of examples, and of their own sequences, whose final hidden states these are, `[wanted rows, hidden]`.
///
/// # Errors
/// As [`losses`].
pub(super) fn losses_of(
    base: &Base,
    hidden: &Tensor,
    (examples, sequences): (&[&Encoded], &[Sequence<'_>]),
    smoothing: f64,
    cx: &Cx<'_>,
) -> Result<Losses> {
    match examples.first().map(|e| &e.target) {
        Some(Target::Tokens(_)) => {
            if examples.iter().any(|e| !matches!(e.target, Target::Tokens(_))) {
                candle_core::bail!("mixed targets in a micro-batch");
            }
            Ok(Losses::of(next_token(base, hidden, sequences, smoothing, cx)?.0))
        }
        Some(_) => {
            let logits = only_group(head_logits(base, hidden, examples, cx)?, examples.len())?;
            of_logits(logits, examples, smoothing, cx.rows.spans())
        }
        None => candle_core::bail!("an empty micro-batch"),
    }
}

/// The logits that examples with labels want, by head.
fn head_logits(base: &Base, hidden: &Tensor, examples: &[&Encoded], cx: &Cx<'_>) -> Result<Vec<HeadLogits>> {
    match examples.first().map(|e| &e.target) {
        Some(Target::Tags(_)) => base.transformer.token_head_logits(hidden, cx),
        Some(Target::Label(_) | Target::Labels(_) | Target::Value(_)) => base.transformer.head_logits(hidden, cx),
        Some(Target::Preferred(..) | Target::Rated(..)) => candle_core::bail!("preferences have losses of their own"),
        Some(Target::Tokens(_)) | None => candle_core::bail!("no example has a label"),
    }
}

/// The losses of examples with labels, whose logits of one head these are, and whose spans.
pub(super) fn of_logits(logits: Tensor, examples: &[&Encoded], smoothing: f64, spans: &[Span]) -> Result<Losses> {
    match examples.first().map(|e| &e.target) {
        Some(Target::Label(_)) => text_label(logits, examples, smoothing),
        Some(Target::Labels(_)) => text_targets(&logits, examples, several),
        Some(Target::Value(_)) => text_targets(&logits, examples, squared),
        Some(Target::Tags(_)) => word_labels(&logits, examples, smoothing, spans),
        _ => candle_core::bail!("no example has a label"),
    }
}

/// The negative log-likelihood of each learned token, `[n]`, in order, and how many each sequence has.
///
/// # Errors
/// Those of the forward.
pub fn token_losses(
    base: &Base,
    delta: &Arc<Delta>,
    sequences: &[Sequence<'_>],
    smoothing: f64,
    pacer: Option<&Arc<Pacer>>,
) -> Result<(Tensor, Vec<usize>)> {
    forward(base, delta, (sequences, Reads::Learned), pacer, |hidden, cx| {
        next_token(base, hidden, sequences, smoothing, cx)
    })
}

/// Sequences of a micro-batch as the forward takes them.
pub(super) struct Texts {
    pub(super) rows: RowLayout,
    pub(super) tokens: Vec<u32>,
    pub(super) deltas: DeltaBatch,
    /// The rows that are read of it.
    wanted: Option<Wanted>,
}

impl Texts {
    /// What the model (of an encoder-decoder, the decoder) reads, and what is read of it.
    pub(super) fn of(base: &Base, delta: &Arc<Delta>, (sequences, reads): (&[Sequence<'_>], Reads)) -> Self {
        let rows = RowLayout::packed_after(sequences.iter().map(|s| (s.tokens.len(), delta.ahead())));
        let tokens = sequences.iter().flat_map(|s| s.tokens.iter().copied()).collect();
        let deltas = DeltaBatch::single(Arc::clone(delta), &rows, base.sites.len());
        let pick = reads.rows(base, sequences, 0..sequences.len(), &Cx::new(&rows, &deltas));
        let wanted = Wanted::of(&rows, &deltas, pick);
        Self { rows, tokens, deltas, wanted }
    }

    /// What an encoder-decoder's encoder reads.
    pub(super) fn sources(base: &Base, delta: &Arc<Delta>, sequences: &[Sequence<'_>]) -> Option<Self> {
        base.arch.is_encoder_decoder().then(|| {
            let rows = RowLayout::packed_after(sequences.iter().map(|s| (s.source.len(), delta.source_ahead())));
            let tokens = sequences.iter().flat_map(|s| s.source.iter().copied()).collect();
            let deltas = DeltaBatch::single(Arc::clone(delta), &rows, base.sites.len());
            Self { rows, tokens, deltas, wanted: None }
        })
    }

    /// A step without a cache.
    pub(super) fn cx<'a>(&'a self, memory: Option<&'a Memory<'a>>, pacer: Option<&'a Arc<Pacer>>) -> Cx<'a> {
        Cx { memory, pacer, wanted: self.wanted.as_ref(), ..Cx::new(&self.rows, &self.deltas) }
    }
}

/// Runs sequences through the base with a delta, and gives the final hidden states to `then`, which reads these of them.
pub(super) fn forward<R>(
    base: &Base,
    delta: &Arc<Delta>,
    (sequences, reads): (&[Sequence<'_>], Reads),
    pacer: Option<&Arc<Pacer>>,
    then: impl FnOnce(&Tensor, &Cx<'_>) -> Result<R>,
) -> Result<R> {
    let texts = Texts::of(base, delta, (sequences, reads));
    let source = match Texts::sources(base, delta, sequences) {
        Some(Texts { rows, tokens, .. }) => {
            let deltas = vec![Some(Arc::clone(delta)); sequences.len()];
            Some(Source::encode(base, rows, &tokens, &deltas, pacer)?)
        }
        None => None,
    };
    let memory = source.as_ref().map(Source::memory);
    let cx = texts.cx(memory.as_ref(), pacer);
    then(&base.transformer.forward(&Input::tokens(&texts.tokens), &cx)?, &cx)
}

/// Row `t - 1` predicts token `t`, for every learned `t`: their negative log-likelihoods, and how many each sequence has.
///
/// # Errors
/// As [`losses`].
pub(super) fn next_token(
    base: &Base,
    hidden: &Tensor,
    sequences: &[Sequence<'_>],
    smoothing: f64,
    cx: &Cx<'_>,
) -> Result<(Tensor, Vec<usize>)> {
    let (pick, targets, counts) = learned(sequences, cx.rows.spans());
    let each = base.transformer.smoothed_nll(hidden, (&pick, &targets), smoothing, cx)?; // [n]
    Ok((each, counts))
}

/// As [`next_token`], plus, of each token, so many times its divergence from what [`bare`] gives for the same sequences; and
/// the sum of the divergences.
///
/// # Errors
/// As [`losses`].
pub(super) fn next_token_against(
    base: &Base,
    hidden: &Tensor,
    sequences: &[Sequence<'_>],
    smoothing: f64,
    against: (&ops::Reference, f64),
    cx: &Cx<'_>,
) -> Result<(Tensor, f64)> {
    let (pick, targets, _) = learned(sequences, cx.rows.spans());
    base.transformer.nll_against(hidden, (&pick, &targets), smoothing, Some(against), cx)
}

/// So many times the divergence of each learned token from what [`bare`] gives for the same sequences, `[n]`; and the sum of the
/// divergences.
///
/// # Errors
/// As [`losses`].
pub(super) fn divergence(
    base: &Base,
    hidden: &Tensor,
    sequences: &[Sequence<'_>],
    against: (&ops::Reference, f64),
    cx: &Cx<'_>,
) -> Result<(Tensor, f64)> {
    base.transformer.divergence(hidden, &learned(sequences, cx.rows.spans()).0, against, cx)
}

/// What the base gives at the learned tokens without a delta; no gradient goes through it.
///
/// # Errors
/// As [`losses`].
pub(super) fn bare(
    base: &Base,
    delta: &Delta,
    sequences: &[Sequence<'_>],
    pacer: Option<&Arc<Pacer>>,
) -> Result<ops::Reference> {
    let off = Arc::new(Delta::new(delta.spec.clone(), Vec::new(), None));
    forward(base, &off, (sequences, Reads::Learned), pacer, |hidden, cx| {
        base.transformer.reference(hidden, &learned(sequences, cx.rows.spans()).0, cx)
    })
}

/// The rows that predict a learned token, those tokens, and how many each sequence has.
fn learned(sequences: &[Sequence<'_>], spans: &[Span]) -> (Vec<u32>, Vec<u32>, Vec<usize>) {
    let (mut pick, mut targets, mut counts) = (Vec::new(), Vec::new(), Vec::with_capacity(sequences.len()));
    for (sequence, span) in sequences.iter().zip(spans) {
        let before = targets.len();
        for (t, _) in sequence.learn.iter().enumerate().skip(1).filter(|(_, learn)| **learn) {
            pick.push((span.token_rows().start + t - 1) as u32);
            targets.push(sequence.tokens[t]);
        }
        counts.push(targets.len() - before);
    }
    (pick, targets, counts)
}

fn text_label(logits: Tensor, examples: &[&Encoded], smoothing: f64) -> Result<Losses> {
    let mut gold = Vec::with_capacity(examples.len());
    for example in examples {
        let Target::Label(label) = &example.target else { candle_core::bail!("mixed targets in a micro-batch") };
        gold.push(*label);
    }
    cross_entropy(logits, gold, smoothing)
}

/// Losses of targets with one number per output.
fn text_targets(
    logits: &Tensor,
    examples: &[&Encoded],
    loss: fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Losses> {
    let logits = logits.to_dtype(DType::F32)?; // [texts, outputs]
    let outputs = logits.dim(1)?;
    let mut targets = Vec::with_capacity(examples.len());
    for example in examples {
        let mut row = vec![0f32; outputs];
        match &example.target {
            Target::Labels(all) => all.iter().filter_map(|l| row.get_mut(*l as usize).map(|x| *x = 1.0)).for_each(drop),
            Target::Value(bits) => row.fill(f32::from_bits(*bits)),
            _ => candle_core::bail!("mixed targets in a micro-batch"),
        }
        targets.push(row);
    }
    let wanted = Tensor::new(targets.concat(), logits.device())?.reshape(logits.shape())?; // [texts, outputs]
    let each = loss(&logits, &wanted)?.mean(1)?; // [texts]
    Ok(Losses { logits: Some(logits), targets, ..Losses::of(each) })
}

/// Binary cross-entropy of each output by itself, as torch's `BCEWithLogitsLoss`: `ln(1 + exp(z)) - z y`.
fn several(logits: &Tensor, wanted: &Tensor) -> Result<Tensor> {
    let softplus = Tensor::stack(&[logits, &logits.zeros_like()?], 2)?.log_sum_exp(2)?; // [texts, outputs]
    softplus - (logits * wanted)?
}

/// Squared error, as torch's `MSELoss`.
fn squared(outputs: &Tensor, wanted: &Tensor) -> Result<Tensor> {
    (outputs - wanted)?.sqr()
}

fn word_labels(logits: &Tensor, examples: &[&Encoded], smoothing: f64, spans: &[Span]) -> Result<Losses> {
    let (mut pick, mut gold, mut words, mut start) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (example, span) in examples.iter().zip(spans) {
        let Target::Tags(tags) = &example.target else { candle_core::bail!("mixed targets in a micro-batch") };
        pick.extend(tags.iter().map(|(at, _)| start + at));
        start += span.token_rows().len() as u32;
        gold.extend(tags.iter().map(|(_, label)| *label));
        words.push(tags.len());
    }
    let logits = logits.index_select(&Tensor::new(pick, logits.device())?, 0)?; // [tokens, labels] -> [words, labels]
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
    Ok(Losses { logits: Some(logits), gold, ..Losses::of(each) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn losses_of_numbers_and_their_gradients_equal_the_formulas() {
        let dev = Device::Cpu;
        let z = Var::new(&[[0.5f32, -2.0, 60.0], [-60.0, 0.0, 3.0]], &dev).unwrap();
        let y = Tensor::new(&[[1f32, 0.0, 1.0], [0.0, 1.0, 0.0]], &dev).unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let pairs: Vec<(f32, f32)> = flat(z.as_tensor()).into_iter().zip(flat(&y)).collect();
        let near = |got: Vec<f32>, want: &dyn Fn(f32, f32) -> f32| {
            got.iter().zip(&pairs).all(|(g, (z, y))| (g - want(*z, *y)).abs() < 1e-4)
        };
        let sigmoid = |z: f32| 1.0 / (1.0 + (-z).exp());
        let loss = several(&z, &y).unwrap();
        // -y ln s(z) - (1 - y) ln s(-z); far from 0 the logarithm is the logit
        let ln_sigmoid = |z: f32| if z < -30.0 { z } else { sigmoid(z).ln() };
        assert!(near(flat(&loss), &|z, y| -y * ln_sigmoid(z) - (1.0 - y) * ln_sigmoid(-z)), "{loss}");
        let grads = loss.sum_all().unwrap().backward().unwrap();
        assert!(near(flat(grads.get(&z).unwrap()), &|z, y| sigmoid(z) - y));
        // torch.nn.BCEWithLogitsLoss() of these, the mean over texts and labels
        assert!((loss.mean_all().unwrap().to_scalar::<f32>().unwrap() - 0.7237899).abs() < 1e-6);
        let loss = squared(&z, &y).unwrap();
        assert!(near(flat(&loss), &|z, y| (z - y) * (z - y)));
        let grads = loss.sum_all().unwrap().backward().unwrap();
        assert!(near(flat(grads.get(&z).unwrap()), &|z, y| 2.0 * (z - y)));
    }
}
