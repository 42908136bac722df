//! One delta on one model: outputs of a padded batch, and greedy generation.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Tensor, Var};
use deltaserve::{
    delta::{Delta, DeltaBatch},
    interop::{self, EncodeMeta, InteropError},
    kv::KvCache,
    model::{Base, Input},
    nn::Cx,
    rows::RowLayout,
};
use serde_json::Value;

use crate::fixtures::{Batch, Fixtures, Outcome, Step, fail, max_diff};

pub(crate) fn run(f: &Fixtures, case: &Value) -> Outcome {
    match check(f, case) {
        Ok(what) => Outcome::Passed(what),
        Err(outcome) => outcome,
    }
}

fn check(f: &Fixtures, case: &Value) -> Step<String> {
    let base = f.base(case["model"].as_str().unwrap_or_default())?;
    let task = case["task"].as_str().unwrap_or_default();
    if task == "masked_lm" || task == "seq2seq" {
        return Err(Outcome::Unsupported(format!("task {task}")));
    }
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
    if let Some(delta) = &delta {
        match written(&base, delta)? {
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

/// The same delta written and read again; `None` where no format holds it.
fn written(base: &Base, delta: &Delta) -> Step<Option<Arc<Delta>>> {
    match interop::encode(delta, base, &EncodeMeta::default()) {
        Ok(files) => interop::decode(&files, base).map(|d| Some(Arc::new(d))).map_err(fail),
        Err(InteropError::Unapplied(_)) => Ok(None),
        Err(e) => Err(fail(e)),
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
    let batch = Batch::read(want, "input_ids", "attention_mask")?;
    let lens: Vec<usize> = batch.tokens.iter().map(Vec::len).collect();
    let rows = RowLayout::packed(&lens);
    let deltas = DeltaBatch::new(&rows, &vec![delta; lens.len()], base.sites.len());
    let cx = Cx::new(&rows, &deltas);
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
                let places: Vec<u32> = batch.places(i).into_iter().map(|p| p as u32).collect();
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

/// An output of every sequence: `[len, x]` or `[x]`.
fn rows_of(base: &Base, name: &str, task: &str, hidden: &Tensor, cx: &Cx<'_>) -> Step<Vec<Tensor>> {
    let t = &base.transformer;
    let spans = cx.rows.spans();
    let go = || -> candle_core::Result<Option<Vec<Tensor>>> {
        match (name, task) {
            ("logits", "causal_lm") => {
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
                    let mean = hidden.narrow(0, s.start, s.len)?.mean(0)?;
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
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + steps;
    let cache =
        KvCache::new(base.arch.layers, prompts.len() * longest, base.arch.kv_width(), base.dtype, &base.device)?;
    // interleaved slots: a sequence's positions are never neighbours
    let n = prompts.len();
    let slots = |i: usize, len: usize| -> Arc<[u32]> { (0..len).map(|p| (p * n + i) as u32).collect() };
    let mut out: Vec<Vec<u32>> = vec![vec![]; n];
    for step in 0..steps {
        let mut rows = RowLayout::default();
        let mut tokens = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let total = prompt.len() + out[i].len();
            match out[i].last() {
                None => {
                    rows.push(prompt.len(), 0, slots(i, total));
                    tokens.extend_from_slice(prompt);
                }
                Some(&last) => {
                    rows.push(1, total - 1, slots(i, total));
                    tokens.push(last);
                }
            }
        }
        let batch = DeltaBatch::new(&rows, deltas, base.sites.len());
        let cx = Cx { kv: Some(&cache), ..Cx::new(&rows, &batch) };
        let hidden = base.transformer.forward(&Input::tokens(&tokens), &cx)?;
        let logits = base.transformer.logits(&hidden, &rows.last_rows(), &cx)?;
        for (out, best) in out.iter_mut().zip(logits.argmax(1)?.to_vec1::<u32>()?) {
            out.push(best);
        }
        let _ = step;
    }
    Ok(out)
}
