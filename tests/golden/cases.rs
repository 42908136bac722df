//! One delta on one model: outputs of a padded batch, and greedy generation.

use std::{collections::HashMap, ops::Range, sync::Arc};

use candle_core::{Tensor, Var};
use deltaserve::{
    delta::{Delta, DeltaBatch, Stack},
    interop::{self, EncodeMeta, InteropError},
    kv::KvCache,
    model::{Base, Input, Source},
    nn::{Cx, Memory},
    rows::{Ahead, RowLayout, Span},
};
use serde_json::Value;

use crate::{
    fixtures::{Batch, Fixtures, Outcome, Step, fail, max_diff},
    scores,
};

pub(crate) fn run(f: &Fixtures, case: &Value) -> Outcome {
    match check(f, case) {
        Ok(what) => Outcome::Passed(what),
        Err(outcome) => outcome,
    }
}

fn check(f: &Fixtures, case: &Value) -> Step<String> {
    let base = f.base(case["model"].as_str().unwrap_or_default())?;
    let task = case["task"].as_str().unwrap_or_default();
    let delta = f.delta(&base, case)?;
    let want = f.tensors(case["expected"].as_str().unwrap_or_default())?;
    let atol = case["atol"].as_f64().unwrap_or_else(|| f.tolerance("logits_atol"));
    // once as serving runs it and once as training does: the same forward, other kernels
    let worst = outputs(&base, delta.clone(), task, &want, atol, case)?;
    if let Some(delta) = &delta {
        outputs(&base, Some(tracked(delta)?), task, &want, atol, case)
            .map_err(|o| relabel(o, "with gradients tracked: "))?;
    }
    let mut what = format!("max |diff| {worst:.1e} (atol {atol:.1e})");
    if matches!(task, "causal_lm" | "seq2seq") && want.contains_key("logits") {
        // a score is the difference of two numbers that are each as far off as a logit
        let worst = scores::check(&base, &delta, (case, task), &want, 2.0 * atol)?;
        what += &format!(", scores {worst:.1e}");
    }
    if let Some(delta) = &delta {
        match written(&base, delta, case)? {
            Some(again) => {
                outputs(&base, Some(again), task, &want, atol, case)
                    .map_err(|o| relabel(o, "written and read again: "))?;
            }
            None => what += ", not written by this version",
        }
    }
    if want.contains_key("generated") {
        let batch = Batch::read(&want, "gen_input_ids", "gen_attention_mask")?;
        let deltas = vec![delta; batch.tokens.len()];
        generated(&base, &batch, &deltas, &want)?;
        what += ", greedy tokens equal";
    }
    Ok(what)
}

/// The deltas of a step, each from where its sequence's prompt calls it on.
fn activated(base: &Base, rows: &RowLayout, per_span: &[Option<Arc<Delta>>], prompts: &[Vec<u32>]) -> DeltaBatch {
    let spared = |((span, delta), prompt): ((&Span, &Option<Arc<Delta>>), &Vec<u32>)| {
        let from = delta.as_ref().map_or(Some(0), |delta| delta.acts_from(prompt));
        from.map_or(span.len, |from| from.saturating_sub(span.context_len).min(span.len))
    };
    let spared: Vec<usize> = rows.spans().iter().zip(per_span).zip(prompts).map(spared).collect();
    DeltaBatch::sparing(rows, per_span, &spared, base.sites.len())
}

fn relabel(o: Outcome, prefix: &str) -> Outcome {
    match o {
        Outcome::Failed(m) => Outcome::Failed(format!("{prefix}{m}")),
        other => other,
    }
}

/// The same delta with variables for tensors, so that every op takes its differentiable path.
pub(crate) fn tracked(delta: &Delta) -> Step<Arc<Delta>> {
    let var = |_: &str, t: &Tensor| Ok(Var::from_tensor(t)?.as_tensor().clone());
    delta.map(&mut { var }).map(Arc::new).map_err(fail)
}

/// Why deltas that are read may not be written: AdapterHub's LoRA and (IA)3 are written as PEFT's folders, which have no
/// place for that library's head of two layers. No training makes such a delta.
const ONE_LAYER: &str = "the head, which only an adapter's folder can hold";

/// The same delta written and read again; `None` for those that are never written.
fn written(base: &Base, delta: &Delta, case: &Value) -> Step<Option<Arc<Delta>>> {
    let own_form = case["format"] == "adapterhub" && matches!(case["type"].as_str(), Some("LORA" | "IA3"));
    let excused = own_form && delta.head().is_some_and(|head| !head.layers.is_empty());
    match (interop::encode(delta, base, &EncodeMeta::default()), excused) {
        (Ok(files), false) => interop::decode(&files, base).map(|d| Some(Arc::new(d))).map_err(fail),
        (Ok(_), true) => Err(fail("is written now: it needs no excuse")),
        (Err(InteropError::Unapplied(all)), true) if all.iter().all(|what| what.contains(ONE_LAYER)) => Ok(None),
        (Err(e), _) => Err(fail(format!("it cannot be written: {e}"))),
    }
}

fn outputs(
    base: &Base,
    delta: Option<Arc<Delta>>,
    task: &str,
    want: &HashMap<String, Tensor>,
    atol: f64,
    case: &Value,
) -> Step<f64> {
    let batch = Batch::read_output(want, base)?;
    let lens: Vec<usize> = batch.tokens.iter().map(Vec::len).collect();
    let per_span = vec![delta; lens.len()];
    let rows = RowLayout::packed_for(&lens, &per_span);
    let deltas = activated(base, &rows, &per_span, &batch.tokens);
    let input = Batch::read(want, "input_ids", "attention_mask")?;
    let source = source(base, &input.tokens, &per_span).map_err(fail)?;
    let memory = source.as_ref().map(Source::memory);
    let cx = Cx { memory: memory.as_ref(), ..Cx::new(&rows, &deltas) };
    let tokens = batch.tokens.concat();
    let types = batch.types.as_ref().map(|t| t.concat()).filter(|_| base.arch.token_types > 0);
    let t = &base.transformer;
    let hidden = t.forward(&Input { tokens: &tokens, token_types: types.as_deref() }, &cx).map_err(fail)?;
    let mut worst = 0f64;
    for name in case["outputs"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let expected = want.get(name).ok_or_else(|| fail(format!("no expected {name}")))?;
        let got = rows_of(base, name, task, &hidden, &cx)?;
        for (i, got) in got.iter().enumerate() {
            let own = expected.get(i).map_err(fail)?;
            let own = if own.rank() == 2 {
                let places = places(case, task, &rows.spans()[i], &batch.places(i));
                own.index_select(&Tensor::new(places, own.device()).map_err(fail)?, 0).map_err(fail)?
            } else {
                own
            };
            let d = max_diff(got, &own)?;
            worst = worst.max(d);
            if d > atol {
                return Err(fail(format!("{name} row {i} differs by {d:.2e} (atol {atol:.1e})")));
            }
        }
    }
    Ok(worst)
}

/// What an encoder-decoder's encoder makes of the texts.
pub(crate) fn source(
    base: &Base,
    texts: &[Vec<u32>],
    deltas: &[Option<Arc<Delta>>],
) -> candle_core::Result<Option<Source>> {
    if !base.arch.is_encoder_decoder() {
        return Ok(None);
    }
    let rows = RowLayout::packed_after(texts.iter().zip(deltas).map(|(t, d)| (t.len(), source_ahead(d))));
    Source::encode(base, rows, &texts.concat(), deltas, None).map(Some)
}

fn source_ahead(delta: &Option<Arc<Delta>>) -> Ahead {
    delta.as_ref().map(|d| d.source_ahead()).unwrap_or_default()
}

/// Rows of a padded expected output. Where it includes virtual positions, they come first; a language model's are compared,
/// too.
pub(crate) fn places(case: &Value, task: &str, span: &Span, places: &[usize]) -> Vec<u32> {
    let n = if case["logits_include_virtual"].as_bool() == Some(true) { span.virtual_len() } else { 0 };
    let first = if task == "causal_lm" { 0..n } else { 0..0 };
    first.chain(places.iter().map(|p| p + n)).map(|p| p as u32).collect()
}

/// An output of every sequence: `[len, x]` or `[x]`.
fn rows_of(base: &Base, name: &str, task: &str, hidden: &Tensor, cx: &Cx<'_>) -> Step<Vec<Tensor>> {
    let t = &base.transformer;
    let spans = cx.rows.spans();
    let go = || -> candle_core::Result<Option<Vec<Tensor>>> {
        match (name, task) {
            ("logits", "causal_lm" | "masked_lm" | "seq2seq") => {
                let all: Vec<u32> = (0..cx.rows.rows() as u32).collect();
                let logits = t.logits(hidden, &all, cx)?;
                spans.iter().map(|s| logits.narrow(0, s.start, s.len)).collect::<Result<_, _>>().map(Some)
            }
            ("logits", "seq_cls") => Ok(t.classify(hidden, cx)?.into_iter().collect()),
            ("logits", "token_cls") => Ok(t.classify_tokens(hidden, cx)?.into_iter().collect()),
            ("last_hidden_state", _) => {
                spans.iter().map(|s| hidden.narrow(0, s.start, s.len)).collect::<Result<_, _>>().map(Some)
            }
            ("pooler_output", _) => {
                let pooled = t.pooled(hidden, cx)?;
                (0..spans.len()).map(|i| pooled.get(i)).collect::<Result<_, _>>().map(Some)
            }
            ("mean_pooled_unit", _) => spans
                .iter()
                .map(|s| {
                    let own = s.token_rows();
                    let mean = hidden.narrow(0, own.start, own.len())?.mean(0)?;
                    let norm = mean.sqr()?.sum_all()?.sqrt()?;
                    mean.broadcast_div(&norm)
                })
                .collect::<Result<_, _>>()
                .map(Some),
            _ => Ok(None),
        }
    };
    go().map_err(fail)?.ok_or_else(|| fail(format!("no way to compute {name} of {task}")))
}

/// Greedy continuation of all rows in one batch through the cache: prefill, then one token per step.
pub(crate) fn generated(
    base: &Base,
    batch: &Batch,
    deltas: &[Option<Arc<Delta>>],
    want: &HashMap<String, Tensor>,
) -> Step<()> {
    let want: Vec<Vec<i64>> =
        want["generated"].to_dtype(candle_core::DType::I64).and_then(|t| t.to_vec2()).map_err(fail)?;
    let steps = want.first().map_or(0, Vec::len);
    let got = greedy(base, &batch.tokens, deltas, steps).map_err(fail)?;
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let got: Vec<i64> = got.iter().map(|&t| i64::from(t)).collect();
        if &got != want {
            return Err(fail(format!("greedy tokens of row {i}: {got:?}, expected {want:?}")));
        }
    }
    Ok(())
}

pub(crate) fn greedy(
    base: &Base,
    prompts: &[Vec<u32>],
    deltas: &[Option<Arc<Delta>>],
    steps: usize,
) -> candle_core::Result<Vec<Vec<u32>>> {
    let start: Option<Vec<u32>> = base.arch.is_encoder_decoder().then(|| base.arch.decoder_start.into_iter().collect());
    // an encoder-decoder reads the prompt with its encoder, and its output starts with a token of its own
    let heads: Vec<&[u32]> = prompts.iter().map(|p| start.as_deref().unwrap_or(p)).collect();
    let rows_read = |(p, d): (&Vec<u32>, &Option<Arc<Delta>>)| source_ahead(d).rows + p.len();
    let sources: Vec<usize> =
        prompts.iter().zip(deltas).map(|pair| start.as_ref().map_or(0, |_| rows_read(pair))).collect();
    let ahead: Vec<Ahead> = deltas.iter().map(|d| d.as_ref().map(|d| d.ahead()).unwrap_or_default()).collect();
    // what cross-attention reads: a prefix's keys, then the encoder's rows
    let memory_keys = |d: &Option<Arc<Delta>>| d.as_ref().map_or(0, |d| d.ahead_of(Stack::Memory).keys);
    let read: Vec<usize> =
        sources.iter().zip(deltas).map(|(rows, d)| if *rows > 0 { rows + memory_keys(d) } else { 0 }).collect();
    let before = |i: usize| read[i] + ahead[i].slots() + heads[i].len();
    let longest = (0..prompts.len()).map(before).max().unwrap_or(0) + steps;
    let n = prompts.len();
    let cache = KvCache::new(base.arch.layers, n * longest, base.arch.kv_width(), base.dtype, &base.device)?;
    // interleaved slots: a sequence's positions are never neighbours
    let slots = |i: usize, range: Range<usize>| -> Arc<[u32]> { range.map(|p| (p * n + i) as u32).collect() };
    let cross: Vec<Arc<[u32]>> = (0..n).map(|i| slots(i, 0..read[i])).collect();
    let source = if start.is_some() {
        let mut rows = RowLayout::default();
        (0..n).for_each(|i| rows.push_after(source_ahead(&deltas[i]), sources[i], 0, Arc::from([])));
        Some(Source::encode(base, rows, &prompts.concat(), deltas, None)?)
    } else {
        None
    };
    let mut out: Vec<Vec<u32>> = vec![vec![]; n];
    for step in 0..steps {
        let mut rows = RowLayout::default();
        let mut tokens = Vec::new();
        for (i, head) in heads.iter().enumerate() {
            let total = ahead[i].rows + head.len() + out[i].len();
            let own = slots(i, read[i]..read[i] + ahead[i].keys + total);
            match out[i].last() {
                None => {
                    rows.push_after(ahead[i], total, 0, own);
                    tokens.extend_from_slice(head);
                }
                Some(&last) => {
                    rows.push_after(ahead[i], 1, total - 1, own);
                    tokens.push(last);
                }
            }
        }
        let batch = activated(base, &rows, deltas, prompts);
        let encoded = source.as_ref().filter(|_| step == 0).map(Source::encoded);
        let memory = source.is_some().then_some(Memory { encoded, slots: &cross });
        let cx = Cx { kv: Some(&cache), memory: memory.as_ref(), ..Cx::new(&rows, &batch) };
        let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx)?;
        let logits = base.transformer.logits(&hidden, &rows.last_rows(), &cx)?;
        for (out, best) in out.iter_mut().zip(logits.argmax(1)?.to_vec1::<u32>()?) {
            out.push(best);
        }
    }
    Ok(out)
}
