//! Training parity: loss and gradients at step 0.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Tensor, backprop::GradStore};
use deltaserve::{
    delta::{Delta, DeltaBatch, Patch},
    model::{Base, Input},
    nn::Cx,
    rows::RowLayout,
};
use serde_json::Value;

use crate::{
    cases::tracked,
    fixtures::{Batch, Fixtures, Outcome, Step, fail},
};

pub fn run(f: &Fixtures, case: &Value) -> Outcome {
    match check(f, case) {
        Ok(what) => Outcome::Passed(what),
        Err(outcome) => outcome,
    }
}

fn check(f: &Fixtures, case: &Value) -> Step<String> {
    let base = f.base(case["model"].as_str().unwrap_or_default())?;
    let path = case["delta"].as_str().ok_or_else(|| Outcome::Unsupported("full fine-tuning".into()))?;
    let own = f.list("cases").iter().find(|c| c["delta"] == path);
    let own = own.ok_or_else(|| fail(format!("no case for {path}")))?;
    let delta = f.delta(&base, own)?.ok_or_else(|| fail("no delta"))?;
    if delta.patches().iter().any(|(_, p)| !matches!(p, Patch::LowRank(_))) {
        return Err(Outcome::Unsupported("training of this method".into()));
    }
    let delta = tracked(&delta)?;
    let want = f.tensors(case["expected"].as_str().unwrap_or_default())?;
    let task = case["task"].as_str().unwrap_or_default();
    let loss = loss(&base, &delta, task, &want).map_err(fail)?;
    let value = f64::from(loss.to_scalar::<f32>().map_err(fail)?);
    let expected = case["losses"][0].as_f64().ok_or_else(|| fail("no losses"))?;
    if (value - expected).abs() > f.tolerance("loss_step0_atol") {
        return Err(fail(format!("loss at step 0 is {value}, expected {expected}")));
    }
    let grads = loss.backward().map_err(fail)?;
    let n = gradients(f, &base, &delta, &grads, &want)?;
    Ok(format!("loss and {n} gradients at step 0"))
}

/// The library's loss of the whole batch.
fn loss(base: &Base, delta: &Arc<Delta>, task: &str, want: &HashMap<String, Tensor>) -> candle_core::Result<Tensor> {
    let bad = |_| candle_core::Error::Msg("batch".into());
    let batch = Batch::read(want, "input_ids", "attention_mask").map_err(bad)?;
    let rows = RowLayout::packed(&batch.tokens.iter().map(Vec::len).collect::<Vec<_>>());
    let deltas = DeltaBatch::single(Arc::clone(delta), &rows, base.sites.len());
    let cx = Cx::new(&rows, &deltas);
    let types = batch.types.as_ref().map(|t| t.concat()).filter(|_| base.arch.token_types > 0);
    let tokens = batch.tokens.concat();
    let hidden = base.transformer.forward(&Input { tokens: &tokens, token_types: types.as_deref() }, &cx)?;
    let labels = want["labels"].to_dtype(candle_core::DType::I64)?;
    match task {
        "seq_cls" => {
            let logits = base.transformer.head_logits(&hidden, &cx)?.swap_remove(0).logits;
            candle_nn::loss::cross_entropy(&logits, &labels.to_dtype(candle_core::DType::U32)?)
        }
        "token_cls" => {
            let logits = base.transformer.token_head_logits(&hidden, &cx)?.swap_remove(0).logits;
            let labels = labels.to_vec2::<i64>()?;
            let (mut pick, mut targets, mut row) = (vec![], vec![], 0u32);
            for (i, labels) in labels.iter().enumerate() {
                for place in batch.places(i) {
                    if labels[place] >= 0 {
                        pick.push(row);
                        targets.push(labels[place] as u32);
                    }
                    row += 1;
                }
            }
            let picked = logits.index_select(&Tensor::new(pick, logits.device())?, 0)?;
            candle_nn::loss::cross_entropy(&picked, &Tensor::new(targets, logits.device())?)
        }
        _ => {
            let labels = labels.to_vec2::<i64>()?;
            let (mut pick, mut targets) = (vec![], vec![]);
            for (i, span) in rows.spans().iter().enumerate() {
                let places = batch.places(i);
                for (j, next) in places.iter().skip(1).enumerate() {
                    if labels[i][*next] >= 0 {
                        pick.push((span.start + j) as u32);
                        targets.push(labels[i][*next] as u32);
                    }
                }
            }
            base.transformer.nll(&hidden, &pick, &targets, &cx)?.mean_all()
        }
    }
}

/// A delta's variables under the names of its file, in the file's layout.
fn named(base: &Base, delta: &Delta) -> Vec<(String, Tensor, bool)> {
    let mut out = Vec::new();
    for (site, patch) in delta.patches() {
        let module = base.sites.get(*site).map(|e| e.module.clone()).unwrap_or_default();
        if let Patch::LowRank(l) = patch {
            out.push((format!("{module}.lora_A.weight"), l.a.clone(), false));
            out.push((format!("{module}.lora_B.weight"), l.b.clone(), true)); // kept transposed
        }
    }
    if let Some(head) = delta.head() {
        let name = base.arch.names.cls_head;
        out.push((format!("{name}.weight"), head.weight.clone(), false));
        out.extend(head.bias.iter().map(|b| (format!("{name}.bias"), b.clone(), false)));
    }
    out
}

fn gradients(
    f: &Fixtures,
    base: &Base,
    delta: &Delta,
    grads: &GradStore,
    want: &HashMap<String, Tensor>,
) -> Step<usize> {
    let (atol, rel) = (f.tolerance("grad_atol"), f.tolerance("grad_rel"));
    let vars = named(base, delta);
    let keys: Vec<&String> = want.keys().filter(|k| k.starts_with("grad::")).collect();
    if keys.len() != vars.len() {
        return Err(fail(format!("{} gradients expected, {} variables", keys.len(), vars.len())));
    }
    for (name, var, transposed) in vars {
        let key = keys.iter().find(|k| k.ends_with(&format!(".{name}")) || k.ends_with(&format!("::{name}")));
        let expected = &want[*key.ok_or_else(|| fail(format!("no expected gradient of {name}")))?];
        let got = grads.get(&var).ok_or_else(|| fail(format!("no gradient of {name}")))?;
        let got = if transposed { got.t().map_err(fail)? } else { got.clone() };
        let flat = |t: &Tensor| t.contiguous().and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f32>());
        for (a, b) in flat(&got).map_err(fail)?.iter().zip(flat(expected).map_err(fail)?) {
            let (a, b) = (f64::from(*a), f64::from(b));
            if !((a - b).abs() <= atol + rel * b.abs()) {
                return Err(fail(format!("gradient of {name}: {a} instead of {b}")));
            }
        }
    }
    Ok(keys.len())
}
