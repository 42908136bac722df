//! Training parity: loss and gradients at step 0, then the losses, gradient norms and weights of all AdamW steps.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Tensor, backprop::GradStore};
use deltaserve::{
    admission::train_params::Schedule,
    delta::{Delta, DeltaBatch, DoraBase, Half, NormAt, Patch, PrefixForm, PromptStage, Site, Task},
    model::{Base, Input, Source},
    nn::Cx,
    rows::RowLayout,
    train::{
        batches::{Stream, rng},
        optim::{AdamParams, AdamW, LrSchedule, clip_scale, global_norm},
        trainable::{NamedVar, Trainable},
    },
};
use serde_json::Value;

use crate::{
    cases::source,
    fixtures::{Batch, Fixtures, Outcome, Step, fail},
};

pub(crate) fn run(f: &Fixtures, case: &Value) -> Outcome {
    match check(f, case) {
        Ok(what) => Outcome::Passed(what),
        Err(outcome) => outcome,
    }
}

fn check(f: &Fixtures, case: &Value) -> Step<String> {
    let base = f.base(case["model"].as_str().unwrap_or_default())?;
    let Some(path) = case["delta"].as_str() else { return full(f, case, &base) };
    let own = f.list("cases").iter().find(|c| c["delta"] == path);
    let own = own.ok_or_else(|| fail(format!("no case for {path}")))?;
    let delta = f.delta(&base, own)?.ok_or_else(|| fail("no delta"))?;
    let matrix = |site| match base.linear(site)? {
        Some((weight, bias)) => DoraBase::new(weight, bias),
        None => candle_core::bail!("no matrix at {site}"),
    };
    let delta = delta.over(matrix).map_err(fail)?;
    let trainable = Trainable::from_delta(&delta, &base.sites).map_err(fail)?;
    let delta = trainable.delta(&mut rng(0, Stream::Dropout)).map_err(fail)?;
    let want = f.tensors(case["expected"].as_str().unwrap_or_default())?;
    let task = case["task"].as_str().unwrap_or_default();
    let first = loss(&base, &delta, task, &want).map_err(fail)?;
    let value = f64::from(first.to_scalar::<f32>().map_err(fail)?);
    let expected = case["losses"][0].as_f64().ok_or_else(|| fail("no losses"))?;
    if (value - expected).abs() > f.tolerance("loss_step0_atol") {
        return Err(fail(format!("loss at step 0 is {value}, expected {expected}")));
    }
    let grads = first.backward().map_err(fail)?;
    let n = gradients(f, &base, &delta, &grads, &want)?;
    let steps = steps(f, case, (&base, &trainable), || loss(&base, &delta, task, &want))?;
    let finals = finals(f, case, (&base, &delta), &want)?;
    Ok(format!("loss and {n} gradients at step 0, {steps} steps, {finals} final tensors"))
}

/// Full fine-tuning. The file has the gradients and last values of some of the weights.
fn full(f: &Fixtures, case: &Value, base: &Arc<Base>) -> Step<String> {
    let task = case["task"].as_str().unwrap_or_default();
    if task != "causal_lm" {
        return Err(Outcome::Unsupported(format!("full fine-tuning for {task}")));
    }
    let trainable = Trainable::of_base(base, Task::CausalLm).map_err(fail)?;
    let delta = trainable.delta(&mut rng(0, Stream::Dropout)).map_err(fail)?;
    let want = f.tensors(case["expected"].as_str().unwrap_or_default())?;
    let count: usize = trainable.vars().iter().map(|v| v.var.elem_count()).sum();
    if case["n_trained"].as_u64() != Some(count as u64) {
        return Err(fail(format!("{count} numbers are trained, expected {}", case["n_trained"])));
    }
    let now = || loss(&*trainable.base(base)?, &delta, task, &want);
    let grads = now().and_then(|l| l.backward()).map_err(fail)?;
    let (atol, rel) = (f.tolerance("grad_atol"), f.tolerance("grad_rel"));
    let of = |name: &str| {
        let own = |v: &&NamedVar| name == v.name || name.strip_suffix(&v.name).is_some_and(|rest| rest.ends_with('.'));
        trainable.vars().iter().find(own).ok_or_else(|| fail(format!("no variable {name}")))
    };
    let wanted = |kind: &'static str| want.iter().filter_map(move |(k, t)| Some((k.strip_prefix(kind)?, t)));
    for (name, t) in wanted("grad::") {
        let got = grads.get(&of(name)?.var).ok_or_else(|| fail(format!("no gradient of {name}")))?;
        let (got, t) = (flat(got)?, flat(t)?);
        let bad =
            got.iter().zip(&t).find(|(a, b)| !near(f64::from(**a), f64::from(**b), atol + rel * f64::from(b.abs())));
        if let Some((a, b)) = bad {
            return Err(fail(format!("gradient of {name}: {a} instead of {b}")));
        }
    }
    let steps = steps(f, case, (base, &trainable), now)?;
    let noise = 20.0 * case["noise_f64"]["final"].as_f64().unwrap_or(0.0);
    let (atol, floor) = (f.tolerance("final_atol").max(noise), f.tolerance("grad_floor"));
    for (name, t) in wanted("final::") {
        let first = want.get(&format!("grad::{name}")).map(flat).transpose()?.unwrap_or_default();
        for (i, (a, b)) in flat(of(name)?.var.as_tensor())?.into_iter().zip(flat(t)?).enumerate() {
            let moved = first.get(i).is_some_and(|g| f64::from(g.abs()) >= floor);
            if moved && !near(f64::from(a), f64::from(b), atol) {
                return Err(fail(format!("{name} ends at {a} instead of {b}")));
            }
        }
    }
    let (grads, finals) = (wanted("grad::").count(), wanted("final::").count());
    Ok(format!("all {count} weights; {grads} gradients at step 0, {steps} steps, {finals} final tensors"))
}

/// The losses before each step and after the last, with our optimizer, schedule and clipping.
fn steps(
    f: &Fixtures,
    case: &Value,
    (base, trainable): (&Base, &Trainable),
    loss: impl Fn() -> candle_core::Result<Tensor>,
) -> Step<usize> {
    let hp = |name: &str| case["hp"][name].as_f64().ok_or_else(|| fail(format!("no hyper-parameter {name}")));
    let params = AdamParams {
        beta1: case["hp"]["betas"][0].as_f64().unwrap_or(0.9),
        beta2: case["hp"]["betas"][1].as_f64().unwrap_or(0.999),
        eps: hp("eps")?,
        weight_decay: hp("weight_decay")?,
    };
    let total = hp("steps")? as u32;
    let kind = match case["hp"]["schedule"].as_str() {
        Some("linear") => Schedule::Linear,
        Some("cosine") => Schedule::Cosine,
        _ => Schedule::Constant,
    };
    let warmup = case["hp"]["warmup_steps"].as_u64().unwrap_or(0) as u32;
    let schedule = LrSchedule { peak: hp("lr")?, kind, warmup, total };
    let clip = case["hp"]["clip_norm"].as_f64().unwrap_or(0.0);
    // the library decays every trained tensor, biases of heads too
    let vars = trainable.vars().iter().map(|v| (v.var.clone(), true));
    let mut adam = AdamW::new(params, vars).map_err(fail)?;
    let atol = f.tolerance("losses_atol");
    for step in 0..=total {
        let now = loss().map_err(fail)?;
        let value = f64::from(now.to_scalar::<f32>().map_err(fail)?);
        let expected = case["losses"][step as usize].as_f64().unwrap_or(f64::NAN);
        if !near(value, expected, atol) {
            return Err(fail(format!("loss before step {step} is {value}, expected {expected}")));
        }
        if step == total {
            break;
        }
        let grads = now.backward().map_err(fail)?;
        let grads: Vec<Tensor> = (trainable.vars().iter())
            .map(|v| grads.get(&v.var).cloned().ok_or_else(|| fail(format!("no gradient of {}", v.name))))
            .collect::<Step<_>>()?;
        let norm = global_norm(&grads).map_err(fail)?;
        let expected = case["grad_norms"][step as usize].as_f64().unwrap_or(f64::NAN);
        if !near(norm, expected, 1e-3 * expected + 1e-4) {
            return Err(fail(format!("gradient norm of step {step} is {norm}, expected {expected}")));
        }
        let lr = schedule.at(step);
        let expected = case["lrs"][step as usize].as_f64().unwrap_or(f64::NAN);
        if !near(lr, expected, 1e-9) {
            return Err(fail(format!("learning rate of step {step} is {lr}, expected {expected}")));
        }
        adam.step(&grads, lr, clip_scale(norm, clip)).map_err(fail)?;
        // the library trains whole biases, so it decays the base's share of them, too
        for v in trainable.vars().iter().filter(|_| !trainable.is_full()) {
            let site = v.name.strip_suffix(".bias").and_then(|m| base.sites.by_module(m));
            if let Some(own) = site.map(|s| base.bias(s)).transpose().map_err(fail)?.flatten() {
                let share = (own * (lr * params.weight_decay)).map_err(fail)?;
                v.var.set(&(v.var.as_detached_tensor() - share).map_err(fail)?).map_err(fail)?;
            }
        }
    }
    Ok(total as usize)
}

/// Weights after the last step. Elements whose first gradient is rounding noise are left out: Adam turns it into steps.
fn finals(f: &Fixtures, case: &Value, (base, delta): (&Base, &Delta), want: &HashMap<String, Tensor>) -> Step<usize> {
    let vars = named(base, delta, want);
    let noise = 20.0 * case["noise_f64"]["final"].as_f64().unwrap_or(0.0);
    let (atol, floor) = (f.tolerance("final_atol").max(noise), f.tolerance("grad_floor"));
    let n = vars.len();
    for v in vars {
        let mut got = v.in_file(&v.vars)?;
        // BitFit's file has whole biases, the variable is what was added
        if let Some(own) = v.bias_of.map(|site| base.bias(site)).transpose().map_err(fail)?.flatten() {
            got = got.iter().zip(flat(&own)?).map(|(a, b)| a + b).collect();
        }
        let (end, first) = (flat(&want[v.key(want, "final::")?])?, flat(&want[v.key(want, "grad::")?])?);
        for ((a, b), g) in got.iter().zip(end).zip(first) {
            if f64::from(g.abs()) >= floor && !near(f64::from(*a), f64::from(b), atol) {
                return Err(fail(format!("{} ends at {a} instead of {b}", v.suffix)));
            }
        }
    }
    Ok(n)
}

fn flat(t: &Tensor) -> Step<Vec<f32>> {
    t.contiguous().and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f32>()).map_err(fail)
}

/// Whether two figures agree; NaN agrees with nothing.
fn near(got: f64, want: f64, atol: f64) -> bool {
    (got - want).abs() <= atol
}

/// The library's loss of the whole batch.
fn loss(base: &Base, delta: &Arc<Delta>, task: &str, want: &HashMap<String, Tensor>) -> candle_core::Result<Tensor> {
    let bad = |_| candle_core::Error::Msg("batch".into());
    let inputs = Batch::read(want, "input_ids", "attention_mask").map_err(bad)?;
    let labels = want["labels"].to_dtype(candle_core::DType::I64)?;
    let (batch, labels) = if base.arch.is_encoder_decoder() {
        shifted(base, &labels)?
    } else {
        (Batch::read(want, "input_ids", "attention_mask").map_err(bad)?, labels)
    };
    let rows = RowLayout::packed_after(batch.tokens.iter().map(|t| (t.len(), delta.ahead())));
    let deltas = DeltaBatch::single(Arc::clone(delta), &rows, base.sites.len());
    let per_span = vec![Some(Arc::clone(delta)); batch.tokens.len()];
    let source = source(base, &inputs.tokens, &per_span)?;
    let memory = source.as_ref().map(Source::memory);
    let cx = Cx { memory: memory.as_ref(), ..Cx::new(&rows, &deltas) };
    let types = batch.types.as_ref().map(|t| t.concat()).filter(|_| base.arch.token_types > 0);
    let tokens = batch.tokens.concat();
    let hidden = base.transformer.forward(&Input { tokens: &tokens, token_types: types.as_deref() }, &cx)?;
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
                // the last virtual row predicts the first token
                let first = usize::from(span.virtual_len() == 0);
                for (t, place) in batch.places(i).into_iter().enumerate().skip(first) {
                    if labels[i][place] >= 0 {
                        pick.push((span.token_rows().start + t - 1) as u32);
                        targets.push(labels[i][place] as u32);
                    }
                }
            }
            base.transformer.nll(&hidden, &pick, &targets, &cx)?.mean_all()
        }
    }
}

/// Labels moved on by one behind the start token: what the decoder reads, and the labels as a next-token task has them.
fn shifted(base: &Base, labels: &Tensor) -> candle_core::Result<(Batch, Tensor)> {
    let start = i64::from(base.arch.decoder_start.unwrap_or(0));
    let rows: Vec<Vec<i64>> =
        labels.to_vec2::<i64>()?.into_iter().map(|row| std::iter::once(start).chain(row).collect()).collect();
    let tokens = rows.iter().map(|r| r.iter().map(|t| (*t).max(0) as u32).collect()).collect();
    let mask = rows.iter().map(|r| vec![1; r.len()]).collect();
    Ok((Batch { tokens, types: None, mask }, Tensor::new(rows, labels.device())?))
}

/// Variables, and how their file names the tensor that has them side by side.
struct Named {
    /// How the key ends.
    suffix: String,
    /// What it has before that; empty = anything.
    inside: Vec<String>,
    vars: Vec<Tensor>,
    /// Kept transposed.
    transposed: bool,
    /// The bias that it is a difference to.
    bias_of: Option<usize>,
}

impl Named {
    fn new(suffix: String, var: &Tensor) -> Self {
        Self { suffix, inside: vec![], vars: vec![var.clone()], transposed: false, bias_of: None }
    }

    /// The key of this kind (`grad::`, `final::`).
    fn key<'a>(&self, want: &'a HashMap<String, Tensor>, kind: &str) -> Step<&'a String> {
        let hit = |k: &&String| {
            let named = k.ends_with(&format!(".{}", self.suffix)) || k.ends_with(&format!("::{}", self.suffix));
            k.starts_with(kind) && named && (self.inside.is_empty() || self.inside.iter().any(|i| k.contains(i)))
        };
        want.keys().find(hit).ok_or_else(|| fail(format!("no {kind} of {} in {:?}", self.suffix, self.inside)))
    }

    /// Numbers in the file's order.
    fn in_file(&self, tensors: &[Tensor]) -> Step<Vec<f32>> {
        match tensors {
            [one] if self.transposed => flat(&one.t().map_err(fail)?),
            [one] => flat(one),
            many => flat(&Tensor::cat(many, 1).map_err(fail)?),
        }
    }
}

/// A delta's variables under the names of its file.
fn named(base: &Base, delta: &Delta, want: &HashMap<String, Tensor>) -> Vec<Named> {
    let mut out = Vec::new();
    let mut prefix: Option<Named> = None; // one tensor for all layers
    for (site, patch) in delta.patches() {
        let Some(entry) = base.sites.get(*site) else { continue };
        match patch {
            Patch::Prompt(p) => {
                let hub = p.stage == PromptStage::Hidden;
                let name = if hub { "prompt_embedding.weight" } else { "prompt_embeddings" };
                out.push(Named::new(name.into(), &p.rows));
                continue;
            }
            Patch::Prefix(p) => {
                let pinned = p.form == PrefixForm::Pinned;
                let name = if pinned { "self_prefix.control_trans" } else { "prompt_embeddings" };
                let all = prefix.get_or_insert_with(|| Named { vars: vec![], ..Named::new(name.into(), &p.k) });
                all.vars.extend([p.k.clone(), p.v.clone()]);
                continue;
            }
            _ => {}
        }
        for (name, var) in patch.tensors() {
            let module = &entry.module;
            let mut v = Named::new(String::new(), var);
            v.suffix = match (name, entry.site) {
                (name, Site::Sublayer { layer, half }) => {
                    // beside the norm of the same half block
                    let at = if half == Half::Attn { NormAt::Attn } else { NormAt::Mlp };
                    let norm = base.sites.id(Site::Norm { layer, at }).and_then(|id| base.sites.get(id));
                    let parent = norm.and_then(|n| n.module.rsplit_once('.')).map_or("", |(p, _)| p);
                    let own = if half == Half::Attn { "attention_adapters" } else { "output_adapters" };
                    v.inside = vec![format!("{parent}.adapters."), format!("{parent}.{own}.")];
                    v.transposed = name == "adapter_up.weight";
                    name.replace("adapter_down.", "adapter_down.0.")
                }
                ("lora_A", _) => format!("{module}.lora_A.weight"),
                ("lora_B", _) => {
                    v.transposed = true;
                    format!("{module}.lora_B.weight")
                }
                ("magnitude", _) => format!("{module}.lora_magnitude_vector"),
                ("scale" | "in_scale", _) => format!("{module}.ia3_l"),
                ("ln_gain", _) => format!("{module}.ln_tuning_layers.weight"),
                ("ln_bias", _) => format!("{module}.ln_tuning_layers.bias"),
                (name, _) => {
                    v.bias_of = (name == "bias").then_some(*site);
                    format!("{module}.{name}")
                }
            };
            out.push(v);
        }
    }
    out.extend(prefix);
    if let Some(head) = delta.head() {
        // AdapterHub's chain counts dropouts and activations, too: 1, 4, ...
        let chain = want.keys().any(|k| k.contains("heads."));
        let last = head.layers.len();
        let names = &base.arch.names;
        for (name, var) in head.tensors() {
            let kind = name.rsplit('.').next().unwrap_or_default();
            let index = name.split('.').nth(1).and_then(|i| i.parse::<usize>().ok()).unwrap_or(last);
            let module = match names.cls_inner {
                _ if chain => (3 * index + 1).to_string(),
                Some(known) if last > 0 => if index < last { known.dense } else { known.out }.to_owned(),
                _ => names.cls_head.to_owned(),
            };
            let named = Named::new(format!("{module}.{kind}"), var);
            out.push(if chain { Named { inside: vec!["heads.".into()], ..named } } else { named });
        }
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
    let vars = named(base, delta, want);
    let keys = want.keys().filter(|k| k.starts_with("grad::")).count();
    if keys != vars.len() {
        return Err(fail(format!("{keys} gradients expected, {} variables", vars.len())));
    }
    for v in vars {
        let expected = flat(&want[v.key(want, "grad::")?])?;
        let got: Vec<Tensor> = (v.vars.iter())
            .map(|t| grads.get(t).cloned().ok_or_else(|| fail(format!("no gradient of {}", v.suffix))))
            .collect::<Step<_>>()?;
        for (a, b) in v.in_file(&got)?.iter().zip(expected) {
            let (a, b) = (f64::from(*a), f64::from(b));
            if !near(a, b, atol + rel * b.abs()) {
                return Err(fail(format!("gradient of {}: {a} instead of {b}", v.suffix)));
            }
        }
    }
    Ok(keys)
}
