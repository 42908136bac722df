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
    /// Multi-label classification and regression: what `logits` should become, of the same shape; else empty.
    pub targets: Vec<Vec<f32>>,
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
    let texts = Texts::of(base, &delta, examples);
    let source = match Texts::sources(base, &delta, examples) {
        Some(Texts { rows, tokens, .. }) => {
            let deltas = vec![Some(delta); examples.len()];
            Some(Source::encode(base, rows, &tokens, &deltas, pacer)?)
        }
        None => None,
    };
    let memory = source.as_ref().map(Source::memory);
    let cx = Cx { memory: memory.as_ref(), pacer, ..Cx::new(&texts.rows, &texts.deltas) };
    let hidden = base.transformer.forward(&Input::tokens(&texts.tokens), &cx)?; // [rows, hidden]
    loss_of(base, &hidden, examples, smoothing, &cx)
}

/// Texts of a micro-batch as the forward takes them.
pub(super) struct Texts {
    pub(super) rows: RowLayout,
    pub(super) tokens: Vec<u32>,
    pub(super) deltas: DeltaBatch,
}

impl Texts {
    /// What the model (of an encoder-decoder, the decoder) reads.
    pub(super) fn of(base: &Base, delta: &Arc<Delta>, examples: &[&Encoded]) -> Self {
        let rows = RowLayout::packed_after(examples.iter().map(|e| (e.tokens.len(), delta.ahead())));
        let tokens = examples.iter().flat_map(|e| e.tokens.iter().copied()).collect();
        let deltas = DeltaBatch::single(Arc::clone(delta), &rows, base.sites.len());
        Self { rows, tokens, deltas }
    }

    /// What an encoder-decoder's encoder reads.
    pub(super) fn sources(base: &Base, delta: &Arc<Delta>, examples: &[&Encoded]) -> Option<Self> {
        base.arch.is_encoder_decoder().then(|| {
            let rows = RowLayout::packed_after(examples.iter().map(|e| (e.source.len(), delta.source_ahead())));
            let tokens = examples.iter().flat_map(|e| e.source.iter().copied()).collect();
            let deltas = DeltaBatch::single(Arc::clone(delta), &rows, base.sites.len());
            Self { rows, tokens, deltas }
        })
    }
}

/// The losses of examples whose final hidden states these are, `[rows, hidden]`.
///
/// # Errors
/// As [`losses`].
pub(super) fn loss_of(
    base: &Base,
    hidden: &Tensor,
    examples: &[&Encoded],
    smoothing: f64,
    cx: &Cx<'_>,
) -> Result<Losses> {
    match examples.first().map(|e| &e.target) {
        Some(Target::Tokens(_)) => next_token(base, hidden, examples, smoothing, cx),
        Some(Target::Label(_)) => text_label(base, hidden, examples, smoothing, cx),
        Some(Target::Labels(_)) => text_targets(base, hidden, examples, several, cx),
        Some(Target::Value(_)) => text_targets(base, hidden, examples, squared, cx),
        Some(Target::Tags(_)) => word_labels(base, hidden, examples, smoothing, cx),
        None => candle_core::bail!("an empty micro-batch"),
    }
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
    Ok(Losses { each, logits: None, gold: Vec::new(), targets: Vec::new(), words: Vec::new() })
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

/// Losses of targets with one number per output.
fn text_targets(
    base: &Base,
    hidden: &Tensor,
    examples: &[&Encoded],
    loss: fn(&Tensor, &Tensor) -> Result<Tensor>,
    cx: &Cx<'_>,
) -> Result<Losses> {
    let logits = only_group(base.transformer.head_logits(hidden, cx)?, examples.len())?.to_dtype(DType::F32)?; // [texts, outputs]
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
    Ok(Losses { each, logits: Some(logits), gold: Vec::new(), targets, words: Vec::new() })
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
    Ok(Losses { each, logits: Some(logits), gold, targets: Vec::new(), words: Vec::new() })
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
