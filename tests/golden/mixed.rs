//! Different deltas in one batch.

use std::sync::Arc;

use candle_core::Tensor;
use deltaserve::{
    delta::{Delta, DeltaBatch},
    model::{Base, Input, Source},
    nn::Cx,
    rows::RowLayout,
};
use serde_json::Value;

use crate::{
    cases::{generated, places, source},
    fixtures::{Batch, Fixtures, Outcome, Step, fail, max_diff},
};

pub(crate) fn run(f: &Fixtures, case: &Value) -> Outcome {
    let result = match case["expected"].as_str() {
        Some(expected) => one_file(f, case, expected),
        None => by_case(f, case),
    };
    match result {
        Ok(what) => Outcome::Passed(what),
        Err(outcome) => outcome,
    }
}

/// The logits of each sequence of a batch.
fn logits(
    base: &Base,
    task: &str,
    (tokens, inputs): (&[Vec<u32>], &[Vec<u32>]),
    types: Option<&[Vec<u32>]>,
    deltas: &[Option<Arc<Delta>>],
) -> candle_core::Result<Vec<Option<Tensor>>> {
    let rows = RowLayout::packed_for(&tokens.iter().map(Vec::len).collect::<Vec<_>>(), deltas);
    let batch = DeltaBatch::new(&rows, deltas, base.sites.len());
    let source = source(base, inputs, deltas)?;
    let memory = source.as_ref().map(Source::memory);
    let cx = Cx { memory: memory.as_ref(), ..Cx::new(&rows, &batch) };
    let t = &base.transformer;
    let types = types.map(|t| t.concat());
    let hidden = t.forward(&Input { tokens: &tokens.concat(), token_types: types.as_deref() }, &cx)?;
    match task {
        "seq_cls" => t.classify(&hidden, &cx),
        "token_cls" => t.classify_tokens(&hidden, &cx),
        _ => {
            let all: Vec<u32> = (0..rows.rows() as u32).collect();
            let logits = t.logits(&hidden, &all, &cx)?;
            rows.spans().iter().map(|s| logits.narrow(0, s.start, s.len).map(Some)).collect()
        }
    }
}

fn compare(got: &[Option<Tensor>], want: &[Tensor], atol: f64) -> Step<f64> {
    let mut worst = 0f64;
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let got = got.as_ref().ok_or_else(|| fail(format!("row {i} has no head")))?;
        let d = max_diff(got, want)?;
        worst = worst.max(d);
        if d > atol {
            return Err(fail(format!("row {i} differs by {d:.2e} (atol {atol:.1e})")));
        }
    }
    Ok(worst)
}

fn cut(t: &Tensor, places: &[u32]) -> candle_core::Result<Tensor> {
    if t.rank() < 2 { Ok(t.clone()) } else { t.index_select(&Tensor::new(places, t.device())?, 0) }
}

/// Rows are adapter names, with an expected file of the whole batch.
fn one_file(f: &Fixtures, case: &Value, expected: &str) -> Step<String> {
    let model = case["model"].as_str().unwrap_or_default();
    let base = f.base(model)?;
    let mut deltas = Vec::new();
    for name in case["rows"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let delta = if name == "__base__" {
            None
        } else {
            let id = format!("{model}/{name}");
            let own = f.list("cases").iter().find(|c| c["id"] == id.as_str());
            f.delta(&base, own.ok_or_else(|| fail(format!("no case {id}")))?)?
        };
        deltas.push(delta);
    }
    let want = f.tensors(expected)?;
    let batch = Batch::read_output(&want, &base)?;
    let inputs = Batch::read(&want, "input_ids", "attention_mask")?;
    let atol = case["atol"].as_f64().unwrap_or_else(|| f.tolerance("logits_atol"));
    let task = case["task"].as_str().unwrap_or_default();
    let got = logits(&base, task, (&batch.tokens, &inputs.tokens), batch.types.as_deref(), &deltas).map_err(fail)?;
    let all = want.get("logits").ok_or_else(|| fail("no logits"))?;
    let rows: Vec<Tensor> = (0..batch.tokens.len())
        .map(|i| cut(&all.get(i)?, &batch.places(i).iter().map(|&p| p as u32).collect::<Vec<_>>()))
        .collect::<candle_core::Result<_>>()
        .map_err(fail)?;
    let worst = compare(&got, &rows, atol)?;
    let mut what = format!("{} rows, max |diff| {worst:.1e}", rows.len());
    if want.contains_key("generated") {
        // generated from all of input_ids: in these files no row is padded
        let whole = Batch::unpadded(&want, "input_ids")?;
        generated(&base, &whole, &deltas, &want)?;
        what += ", greedy tokens equal";
    }
    Ok(what)
}

/// Rows are rows of other cases: each must equal its own case's golden. Kinds that are not supported yet are left out.
fn by_case(f: &Fixtures, case: &Value) -> Step<String> {
    let base = f.base(case["model"].as_str().unwrap_or_default())?;
    let task = case["task"].as_str().unwrap_or_default();
    let (mut tokens, mut inputs, mut types, mut deltas, mut want) = (vec![], vec![], vec![], vec![], vec![]);
    let mut left_out = 0;
    for row in case["rows"].as_array().into_iter().flatten() {
        let own = f.list("cases").iter().find(|c| c["id"] == row["case"]);
        let own = own.ok_or_else(|| fail(format!("no case {}", row["case"])))?;
        let delta = match f.delta(&base, own) {
            Ok(delta) => delta,
            Err(Outcome::Unsupported(_)) => {
                left_out += 1;
                continue;
            }
            Err(other) => return Err(other),
        };
        let tensors = f.tensors(own["expected"].as_str().unwrap_or_default())?;
        let batch = Batch::read_output(&tensors, &base)?;
        let input = Batch::read(&tensors, "input_ids", "attention_mask")?;
        let i = row["row"].as_u64().unwrap_or(0) as usize;
        let logits = tensors.get("logits").ok_or_else(|| fail("no logits"))?;
        let ahead = delta.as_ref().map(|d| d.ahead()).unwrap_or_default();
        let span = RowLayout::packed_after([(batch.tokens[i].len(), ahead)]).spans()[0].clone();
        let places = places(own, task, &span, &batch.places(i));
        want.push(logits.get(i).and_then(|t| cut(&t, &places)).map_err(fail)?);
        tokens.push(batch.tokens[i].clone());
        inputs.push(input.tokens[i].clone());
        types.push(batch.types.as_ref().map_or_else(|| vec![0; batch.tokens[i].len()], |t| t[i].clone()));
        deltas.push(delta);
    }
    if tokens.is_empty() {
        return Err(Outcome::Unsupported("no row's kind".into()));
    }
    let types = (base.arch.token_types > 0).then_some(types);
    let got = logits(&base, task, (&tokens, &inputs), types.as_deref(), &deltas).map_err(fail)?;
    let worst = compare(&got, &want, f.tolerance("logits_atol"))?;
    Ok(format!("{} rows in one batch, max |diff| {worst:.1e}; {left_out} rows of kinds not yet supported", want.len()))
}
