//! Values that virtual tokens start from and that only the base knows: embeddings of tokens, and what the base computes
//! for a text.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use rand::Rng;

use crate::{
    delta::{DeltaBatch, Site, SiteId, Stack},
    kv::KvCache,
    model::{Base, Input},
    nn::{Cx, Wanted},
    rows::RowLayout,
    train::{
        batches::{Stream, rng},
        encode::Encoded,
        spec::{PatchPlan, Start, TrainSpec},
        trainable::Trainable,
    },
};

/// Sets the variables of fresh prompts and prefixes that start from what the base knows; others keep their values.
///
/// # Errors
/// Those of the forward.
pub(super) fn from_base(
    trainable: &Trainable,
    spec: &TrainSpec,
    base: &Base,
    train: &[Encoded],
    seed: u64,
) -> Result<()> {
    if let Some(plan) = spec.positions.prompt.as_ref().filter(|p| p.encoder.is_none()) {
        let mut rng = rng(seed, Stream::Init);
        let tokens = match &plan.start {
            Start::Vocabulary => (0..plan.n).map(|_| rng.random_range(0..base.arch.vocab as u32)).collect(),
            Start::Text(text) => cycled(text, train, plan.n),
            Start::Random | Start::Zeros => vec![],
        };
        if !tokens.is_empty() {
            trainable.set_prompt(&base.transformer.token_embeddings(&tokens)?)?;
        }
    }
    if let Some(plan) = spec.positions.prefix.as_ref().filter(|p| p.encoder.is_none()) {
        let values = match &plan.start {
            Start::Text(text) => context(base, &cycled(text, train, plan.n))?,
            Start::Zeros => zeros(base, spec, plan.n)?,
            Start::Random | Start::Vocabulary => vec![],
        };
        values.iter().try_for_each(|(site, k, v)| trainable.set_prefix(*site, k, v))?;
    }
    Ok(())
}

/// `n` tokens of a text, repeated as often as needed; of the training examples where there is no text.
fn cycled(text: &[u32], train: &[Encoded], n: usize) -> Vec<u32> {
    let examples: Vec<u32>;
    let text = if text.is_empty() {
        // of an encoder-decoder, what the encoder reads
        let read = |e: &Encoded| if e.source.is_empty() { e.tokens.clone() } else { e.source.clone() };
        examples = train.iter().flat_map(read).take(n).collect();
        &examples
    } else {
        text
    };
    text.iter().copied().cycle().take(if text.is_empty() { 0 } else { n }).collect()
}

fn layers(base: &Base) -> impl Iterator<Item = (SiteId, usize)> {
    base.sites.iter().filter_map(|(id, e)| match e.site {
        Site::KeyValue { layer, stack: Stack::Main } => Some((id, layer)),
        _ => None,
    })
}

fn zeros(base: &Base, spec: &TrainSpec, n: usize) -> Result<Vec<(SiteId, Tensor, Tensor)>> {
    let zero = Tensor::zeros((n, base.arch.kv_width()), base.dtype, &base.device)?;
    let joined = spec.patches.iter().filter(|(_, p)| matches!(p, PatchPlan::Prefix { .. }));
    Ok(joined.map(|(site, _)| (*site, zero.clone(), zero.clone())).collect())
}

/// Keys and values of every layer for these tokens at positions 0, 1, ...: `[n, kv_width]` each, by site.
///
/// A rotary base's keys are taken as they stand in its cache, rotated: a prefix's keys are used as they are, and the tokens
/// after it take the positions after it. So the fresh prefix is exactly this text as context.
///
/// # Errors
/// Those of the forward; more tokens than the context holds.
pub(super) fn context(base: &Base, tokens: &[u32]) -> Result<Vec<(SiteId, Tensor, Tensor)>> {
    let n = tokens.len();
    if n == 0 {
        bail!("there is no text to start a prefix from");
    }
    let cache = KvCache::new(base.arch.layers, n, base.arch.kv_width(), base.dtype, &base.device)?;
    let mut rows = RowLayout::default();
    let slots: Arc<[u32]> = (0..n as u32).collect();
    rows.push(n, 0, slots);
    let deltas = DeltaBatch::none();
    // the cache is all that is read
    let wanted = Wanted::of(&rows, &deltas, []);
    let cx = Cx { kv: Some(&cache), wanted: wanted.as_ref(), ..Cx::new(&rows, &deltas) };
    base.transformer.forward(&Input::tokens(tokens), &cx)?;
    let of = |(site, layer): (SiteId, usize)| {
        let (k, v) = cache.layer(layer);
        (site, k, v)
    };
    Ok(layers(base).map(of).collect())
}
