//! Laws of continuing a delta: it starts where the delta ended, a request that says otherwise is told how, and EWC holds on.

use std::sync::Arc;

use candle_core::Tensor;

use super::{
    batches::{Stream, rng},
    beginning::Beginning,
    encode::{Encoded, Target, tests::byte_codec},
    ewc::Fisher,
    laws::{examples, hyper, input, positions, shape, tiny},
    method_laws::all,
    objective::losses,
    plan::{BaseInfo, Inputs, Prepared, prepare, tests::params},
    run::{Advance, Outcome, Run, RunInput, Trained},
    spec::{TrainSpec, adopt, parts_of},
    trainable::Trainable,
    transfer::{Continue, Ewc, StartingDelta},
};
use crate::{
    admission::train_params::{
        EwcParams, JobEventBody, LoraPart, MethodPart, PrefixLibrary, PrefixPart, PromptPart, ResolvedTraining,
        TrainData, TrainParams,
    },
    delta::{Delta, DeltaSpec, HeadLayer, Matrix, Patch, Problem, Task},
    ids::DeltaId,
    interop::{self, EncodeMeta},
    model::Base,
};

fn lora(rank: Option<u32>) -> Vec<MethodPart> {
    vec![MethodPart::Lora(LoraPart { rank, ..LoraPart::default() })]
}

fn train(base: &Arc<Base>, input: RunInput) -> Trained {
    finish(Run::new(Arc::clone(base), None, input).unwrap())
}

fn finish(mut run: Run) -> Trained {
    loop {
        match run.advance() {
            Advance::More(_) => {}
            Advance::Done(_, outcome) => match *outcome {
                Outcome::Trained(trained) => return *trained,
                Outcome::Failed(failed) => panic!("{failed:?}"),
            },
        }
    }
}

fn loss(base: &Base, delta: &Arc<Delta>, examples: &[Encoded]) -> f32 {
    let all: Vec<&Encoded> = examples.iter().collect();
    losses(base, Arc::clone(delta), &all, None).unwrap().each.mean_all().unwrap().to_scalar().unwrap()
}

fn labels(task: Task) -> Vec<String> {
    if task.generates() { vec![] } else { vec!["a".into(), "b".into()] }
}

#[test]
fn every_method_goes_on_from_where_its_delta_ended() {
    for (family, task) in [("llama", Task::CausalLm), ("bert", Task::SeqCls)] {
        let base = tiny(family);
        for (name, methods) in all() {
            let old = Arc::new(train(&base, input(&base, task, &methods, hyper(3))).delta);
            let data = examples(task, 12);
            let spec = TrainSpec::of_delta(&old, (task, Problem::SingleLabel), &labels(task), shape(&base))
                .unwrap_or_else(|e| panic!("{family} {name}: {e:?}"));
            let own = Trainable::continuing(&old, &spec, &base.sites, 5, &base.device).unwrap();
            let start = own.delta(&mut rng(0, Stream::Dropout)).unwrap();
            let (was, is) = (loss(&base, &old, &data), loss(&base, &start, &data));
            assert!((was - is).abs() < 1e-5, "{family} {name}: {was} and {is}");
            let end = finish(
                Run::with_trainable(Arc::clone(&base), None, input(&base, task, &methods, hyper(3)), own).unwrap(),
            );
            assert_eq!(end.delta.patches().len(), old.patches().len(), "{family} {name}");
            assert!(!parts_of(&old, &base.sites).is_empty(), "{family} {name}");
        }
    }
}

#[test]
fn an_uploaded_prefix_of_every_attention_goes_on() {
    let base = tiny("t5");
    let methods = [positions::everywhere(3)];
    let made = train(&base, input(&base, Task::Seq2Seq, &methods, hyper(3))).delta;
    // as it comes back from its files
    let files = interop::encode(&made, &base, &EncodeMeta::default()).unwrap();
    let old = Arc::new(interop::decode(&files, &base).unwrap());
    let spec = TrainSpec::of_delta(&old, (Task::Seq2Seq, Problem::SingleLabel), &[], shape(&base)).unwrap();
    let own = Trainable::continuing(&old, &spec, &base.sites, 5, &base.device).unwrap();
    let data = examples(Task::Seq2Seq, 12);
    let start = own.delta(&mut rng(0, Stream::Dropout)).unwrap();
    assert!((loss(&base, &old, &data) - loss(&base, &start, &data)).abs() < 1e-5);
    let run =
        Run::with_trainable(Arc::clone(&base), None, input(&base, Task::Seq2Seq, &methods, hyper(30)), own).unwrap();
    let end = Arc::new(finish(run).delta);
    assert!(loss(&base, &end, &data) < loss(&base, &old, &data));
    // a request that leaves the form open takes the delta's; another is told
    let with = |form| {
        let part = MethodPart::Prefix(PrefixPart { form, ..PrefixPart::default() });
        let (parts, clashes) = adopt(&[part], &old, base.arch.hidden);
        assert!(clashes.is_empty());
        let spec = TrainSpec::resolve(&parts, Task::Seq2Seq, &[], shape(&base)).unwrap();
        spec.check_continues(&old, &base.sites).map_err(|v| v.message)
    };
    assert_eq!((with(None), with(Some(PrefixLibrary::AdapterHub))), (Ok(()), Ok(())));
    let message = with(Some(PrefixLibrary::Peft)).unwrap_err();
    assert!(message.contains("layers.0.keys, the request trains nothing"), "{message}");
    assert_eq!(parts_of(&old, &base.sites), [positions::everywhere(3)]);
}

#[test]
fn a_request_continues_what_is_the_same_and_is_told_what_differs() {
    let base = tiny("llama");
    let old = train(&base, input(&base, Task::CausalLm, &lora(Some(4)), hyper(1))).delta;
    let check = |parts: &[MethodPart]| {
        let (parts, clashes) = adopt(parts, &old, base.arch.hidden);
        assert!(clashes.is_empty());
        let spec = TrainSpec::resolve(&parts, Task::CausalLm, &[], shape(&base)).unwrap();
        spec.check_continues(&old, &base.sites).map_err(|v| v.message)
    };
    assert_eq!(check(&lora(None)), Ok(()), "an unset rank and alpha are the delta's");
    assert_eq!(check(&lora(Some(4))), Ok(()));
    let message = check(&lora(Some(8))).unwrap_err();
    assert!(message.contains("rank is 8 and the delta's is 4") && message.contains("q_proj"), "{message}");
    let alpha = LoraPart { rank: Some(4), alpha: Some(4.0), ..LoraPart::default() };
    let message = check(&[MethodPart::Lora(alpha)]).unwrap_err();
    assert!(message.contains("scale (alpha over rank) is 1 and the delta's is 2"), "{message}");
    let message = check(&[MethodPart::Prompt(PromptPart::default())]).unwrap_err();
    assert!(message.contains("trains a prompt and the delta has nothing"), "{message}");
    let pissa = LoraPart { init: crate::admission::train_params::LoraInit::Pissa, ..LoraPart::default() };
    let (_, clashes) = adopt(&[MethodPart::Lora(pissa)], &old, base.arch.hidden);
    assert_eq!(clashes[0].field, "methods[0].init");
}

#[test]
fn a_continued_lora_has_the_request_s_dropout_and_rates() {
    let base = tiny("llama");
    let old = train(&base, input(&base, Task::CausalLm, &lora(Some(4)), hyper(1))).delta;
    let part = LoraPart { rank: Some(4), dropout: Some(0.25), plus_ratio: Some(8.0), ..LoraPart::default() };
    for dora in [false, true] {
        let parts = [MethodPart::Lora(LoraPart { dora, dropout: part.dropout.filter(|_| !dora), ..part.clone() })];
        let old = if dora { train(&base, input(&base, Task::CausalLm, &parts, hyper(1))).delta } else { old.clone() };
        let spec = TrainSpec::resolve(&parts, Task::CausalLm, &[], shape(&base)).unwrap();
        let own = Trainable::continuing(&old, &spec, &base.sites, 5, &base.device).unwrap();
        assert_eq!(own.has_dropout(), !dora);
        for v in own.vars() {
            assert_eq!(v.rate, if v.name.ends_with(".lora_B") { 8.0 } else { 1.0 }, "{}", v.name);
        }
    }
}

/// A planned job on byte tokens.
pub(super) fn plan(base: &Base, params: &TrainParams, data: &str, from: &StartingDelta, old: &str) -> Prepared {
    let start = Some(Continue { from, old: Some(old.as_bytes()) });
    let inputs = Inputs { params, train: data.as_bytes(), validation: None, forgetting: None, replay: None, start };
    let info = BaseInfo { shape: shape(base), max_positions: base.arch.max_positions };
    prepare(inputs, info, &byte_codec(true)).unwrap()
}

/// Byte tokens of the tiny vocabularies: letters only.
fn labelled(label: [&str; 2]) -> String {
    let row = |i: usize| {
        format!("{{\"text\": \"{}\", \"label\": \"{}\"}}\n", "!#$%&"[i % 2..].repeat(1 + i / 2), label[i % 2])
    };
    (0..12).map(row).collect()
}

pub(super) fn continuing(task: Task) -> TrainParams {
    let ewc = EwcParams { data: TrainData::Jsonl(String::new()), lambda: 2.0, max_examples: None };
    TrainParams { from_delta: Some("old".into()), ewc: Some(ewc), ..params(task, vec![]) }
}

#[test]
fn old_examples_have_their_own_length_and_warnings() {
    let base = tiny("llama");
    let old = Arc::new(train(&base, input(&base, Task::CausalLm, &lora(Some(2)), hyper(1))).delta);
    let from = StartingDelta::new("old@1".into(), DeltaId::from_bytes([1; 32]), old, ());
    let text = format!("{{\"text\": \"{}\"}}\n", "! ".repeat(40));
    let mut p = continuing(Task::SeqCls);
    p.hyper.max_length = Some(8);
    let planned = plan(&base, &p, &labelled(["x", "y"]), &from, &[text.as_str(); 2].concat());
    let ewc = planned.start.as_ref().and_then(|s| s.ewc.as_ref()).unwrap();
    assert!(ewc.examples[0].tokens.len() > 60, "{}", ewc.examples[0].tokens.len());
    assert!(planned.train.iter().all(|e| e.tokens.len() <= 8));
    let of_old = planned.reply.warnings.iter().filter(|w| w.field.starts_with("ewc.data"));
    assert_eq!(of_old.map(|w| w.code.as_str()).collect::<Vec<_>>(), ["DUPLICATE"]);
    // the same task has the same length, and examples that are trained on may be old ones, too
    let mut p = continuing(Task::CausalLm);
    p.hyper.max_length = Some(8);
    let other = "{\"text\": \"#$%\"}\n";
    let planned = plan(&base, &p, &format!("{text}{other}"), &from, &text);
    let ewc = planned.start.as_ref().and_then(|s| s.ewc.as_ref()).unwrap();
    assert_eq!(ewc.examples[0].tokens.len(), 8);
    assert!(planned.reply.warnings.iter().all(|w| w.code != "TRAIN_VALID_OVERLAP"));
}

#[test]
fn ewc_holds_a_head_in_either_order_of_its_labels() {
    let base = tiny("bert");
    let old = Arc::new(train(&base, input(&base, Task::SeqCls, &lora(Some(2)), hyper(20))).delta);
    let from = StartingDelta::new("old@1".into(), DeltaId::from_bytes([1; 32]), Arc::clone(&old), ());
    let data = labelled(["a", "b"]);
    let mut seen = Vec::new();
    for labels in [["a", "b"], ["b", "a"]] {
        let mut p = continuing(Task::SeqCls);
        p.labels = labels.map(str::to_owned).to_vec();
        let planned = plan(&base, &p, &data, &from, &data);
        let start = planned.start.clone().unwrap();
        let ewc = start.ewc.clone().unwrap();
        assert!(ewc.head && start.delta.head().is_some());
        let before = loss(&base, &ewc.delta, &ewc.examples);
        let own = Trainable::continuing(&start.delta, &planned.spec, &base.sites, 3, &base.device).unwrap();
        let numbers: usize = own.vars().iter().map(|v| v.var.elem_count()).sum();
        assert_eq!(planned.reply.trainable_parameters, numbers as u64);
        let mut fisher = Fisher::new(ewc, &base).unwrap();
        while fisher.advance(&base, None).unwrap() {}
        let penalty = fisher.penalty(own.vars()).unwrap();
        let zeros = || -> Vec<Tensor> { own.vars().iter().map(|v| v.var.zeros_like().unwrap().detach()).collect() };
        assert_eq!(penalty.add_to(own.vars(), &mut zeros()).unwrap(), 0.0);
        for v in own.vars().iter().filter(|v| v.name.starts_with("head.")) {
            v.var.set(&(v.var.as_detached_tensor() + 0.5).unwrap()).unwrap();
        }
        let held = penalty.add_to(own.vars(), &mut zeros()).unwrap();
        assert!(held > 0.0, "the head is held");
        seen.push((f64::from(before), held));
        // it trains to its end
        let run = RunInput { start: Some(Beginning::from(&start)), ..RunInput::from(&planned) };
        finish(Run::new(Arc::clone(&base), None, run).unwrap());
    }
    let [(a, held_a), (b, held_b)] = seen[..] else { panic!("two orders") };
    assert!((a - b).abs() < 1e-5 && (held_a - held_b).abs() < 1e-4 * held_a, "{seen:?}");
}

#[test]
fn a_carried_head_of_any_form_counts_and_a_matrix_alone_is_refused_with_its_name() {
    let base = tiny("bert");
    let old = train(&base, input(&base, Task::SeqCls, &lora(Some(2)), hyper(1))).delta;
    let mut head = old.head().unwrap().clone();
    let square = Tensor::eye(base.arch.hidden, candle_core::DType::F32, &base.device).unwrap();
    head.layers = vec![HeadLayer { weight: square, bias: None, act: None }];
    let spec = DeltaSpec { labels: labels(Task::SeqCls), ..old.spec.clone() };
    let old = Arc::new(Delta::new(spec, old.patches().to_vec(), Some(head)));
    let from = StartingDelta::new("old@1".into(), DeltaId::from_bytes([1; 32]), Arc::clone(&old), ());
    let data = labelled(["a", "b"]);
    let planned = plan(&base, &continuing(Task::SeqCls), &data, &from, &data);
    let own = Trainable::from_delta(&old, &base.sites).unwrap();
    let numbers: usize = own.vars().iter().map(|v| v.var.elem_count()).sum();
    assert_eq!(planned.reply.trainable_parameters, numbers as u64);
    assert_eq!(planned.reply.memory.gradients, 4 * numbers as u64);

    let (site, entry) = base.sites.linears().next().unwrap();
    let (weight, bias) = base.linear(site).unwrap().unwrap();
    let matrix = Patch::Matrix(Matrix { weight: weight.contiguous().unwrap(), bias });
    let whole = Delta::new(old.spec.clone(), vec![(site, matrix)], None);
    let found = TrainSpec::of_delta(&whole, (Task::SeqCls, Problem::SingleLabel), &labels(Task::SeqCls), shape(&base))
        .unwrap_err();
    assert!(found.len() == 1 && found[0].field == "from_delta", "{found:?}");
    assert!(found[0].message.contains(&entry.label()) && found[0].message.contains("whole"), "{found:?}");
}

/// Texts of a task of its own: other starts, counting downwards.
pub(super) fn other(n: usize) -> Arc<[Encoded]> {
    let one = |i: usize| {
        let tokens: Vec<u32> = (0..5 + i % 3).map(|j| (60 + (i * 7) % 30 - j) as u32).collect();
        let target = Target::Tokens((0..tokens.len()).map(|t| t > 0).collect());
        Encoded::new(tokens, target)
    };
    (0..n).map(one).collect()
}

#[test]
fn the_penalty_and_its_gradient_are_the_formulas() {
    let base = tiny("llama");
    let old = Arc::new(train(&base, input(&base, Task::CausalLm, &lora(Some(2)), hyper(4))).delta);
    let data = examples(Task::CausalLm, 3);
    let ewc = Ewc { lambda: 3.0, delta: Arc::clone(&old), head: false, examples: Arc::clone(&data) };
    let own = Trainable::from_delta(&old, &base.sites).unwrap();
    let mut fisher = Fisher::new(ewc, &base).unwrap();
    let mut rounds = 0;
    while fisher.advance(&base, None).unwrap() {
        rounds += 1;
    }
    assert_eq!(rounds, 3);
    let penalty = fisher.penalty(own.vars()).unwrap();
    // F by hand: the mean of squared gradients of each example's own mean loss
    let live = own.delta(&mut rng(0, Stream::Dropout)).unwrap();
    let grads: Vec<_> = (data.iter())
        .map(|e| losses(&base, Arc::clone(&live), &[e], None).unwrap().each.mean_all().unwrap().backward().unwrap())
        .collect();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let away = 0.25f32;
    let mut want = 0.0f64;
    let mut pulls = Vec::new();
    for v in own.vars() {
        let squares: Vec<Vec<f32>> = grads.iter().map(|g| flat(g.get(v.var.as_tensor()).unwrap())).collect();
        let f: Vec<f32> =
            (0..squares[0].len()).map(|i| squares.iter().map(|s| s[i] * s[i]).sum::<f32>() / 3.0).collect();
        want += f.iter().map(|f| 0.5 * 3.0 * f64::from(f * away * away)).sum::<f64>();
        pulls.push(f.iter().map(|f| 3.0 * f * away).collect::<Vec<f32>>());
    }
    let zeros = || -> Vec<Tensor> { own.vars().iter().map(|v| v.var.zeros_like().unwrap().detach()).collect() };
    let mut none = zeros();
    assert_eq!(penalty.add_to(own.vars(), &mut none).unwrap(), 0.0, "it costs nothing at the start");
    for v in own.vars() {
        v.var.set(&(v.var.as_detached_tensor() + f64::from(away)).unwrap()).unwrap();
    }
    let mut got = zeros();
    let value = penalty.add_to(own.vars(), &mut got).unwrap();
    assert!(want > 0.0 && (value - want).abs() < 1e-4 * want, "{value} and {want}");
    for (got, want) in got.iter().zip(&pulls) {
        let largest = want.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        assert!(flat(got).iter().zip(want).all(|(g, w)| (g - w).abs() <= 1e-4 * largest + 1e-9));
    }
}

#[test]
fn label_smoothing_leaves_the_fisher_information_plain() {
    let base = tiny("llama");
    let old = Arc::new(train(&base, input(&base, Task::CausalLm, &lora(Some(2)), hyper(4))).delta);
    let data = examples(Task::CausalLm, 3);
    let ewc = || Ewc { lambda: 3e4, delta: Arc::clone(&old), head: false, examples: Arc::clone(&data) };
    let own = Trainable::from_delta(&old, &base.sites).unwrap();
    let mut plain = Fisher::new(ewc(), &base).unwrap();
    while plain.advance(&base, None).unwrap() {}
    let plain = plain.penalty(own.vars()).unwrap();
    let resolved = ResolvedTraining { label_smoothing: 0.6, ..hyper(3) };
    let smoothed = RunInput { train: other(24), ..input(&base, Task::CausalLm, &lora(Some(2)), resolved) };
    let mut run = Run::with_trainable(Arc::clone(&base), None, smoothed, own).unwrap();
    run.hold_on_to(ewc()).unwrap();
    // the weights that a step begins with, and the penalty that its metrics report
    let mut pairs = Vec::new();
    loop {
        let mut none: Vec<Tensor> =
            run.trainable().vars().iter().map(|v| v.var.zeros_like().unwrap().detach()).collect();
        let want = plain.add_to(run.trainable().vars(), &mut none).unwrap();
        let (events, done) = match run.advance() {
            Advance::More(events) => (events, false),
            Advance::Done(events, _) => (events, true),
        };
        let penalties = events.iter().filter_map(|e| match e {
            JobEventBody::Metrics(m) => Some(m.ewc_penalty),
            _ => None,
        });
        pairs.extend(penalties.map(|got| (got, want)));
        if done {
            break;
        }
    }
    let (got, want) = *pairs.last().expect("the last step reports");
    assert!(pairs.len() > 1 && want > 0.0 && (got - want).abs() < 1e-4 * want, "{pairs:?}");
}

#[test]
fn ewc_keeps_more_of_the_old_task() {
    let base = tiny("llama");
    let (old_data, new_data) = (examples(Task::CausalLm, 24), other(24));
    let resolved = |steps, lr| ResolvedTraining { learning_rate: lr, ..hyper(steps) };
    let first =
        RunInput { train: Arc::clone(&old_data), ..input(&base, Task::CausalLm, &lora(Some(4)), resolved(60, 1e-2)) };
    let old = Arc::new(train(&base, first).delta);
    let continued = |lambda: Option<f64>| {
        let next = RunInput {
            train: Arc::clone(&new_data),
            ..input(&base, Task::CausalLm, &lora(Some(4)), resolved(30, 5e-3))
        };
        let own = Trainable::from_delta(&old, &base.sites).unwrap();
        let mut run = Run::with_trainable(Arc::clone(&base), None, next, own).unwrap();
        if let Some(lambda) = lambda {
            run.hold_on_to(Ewc { lambda, delta: Arc::clone(&old), head: false, examples: Arc::clone(&old_data) })
                .unwrap();
        }
        Arc::new(finish(run).delta)
    };
    let (free, held) = (continued(None), continued(Some(3e3)));
    let before = loss(&base, &old, &old_data);
    let (forgot, kept) = (loss(&base, &free, &old_data), loss(&base, &held, &old_data));
    assert!(forgot > before + 0.05, "there is something to forget: {before}, then {forgot}");
    assert!(kept - before < 0.7 * (forgot - before), "{before}: {forgot} without and {kept} with");
    let (start, learnt) = (loss(&base, &old, &new_data), loss(&base, &held, &new_data));
    assert!(learnt < start, "it still learns the new task: {start}, then {learnt}");
}

/// The registry's deltas come from files and have let go of the base's matrices: what a job reports must be what the version
/// that it publishes does.
#[test]
fn a_dora_delta_from_files_goes_on_as_the_function_that_is_published() {
    let base = tiny("llama");
    let dora = vec![MethodPart::Lora(LoraPart { rank: Some(2), dora: true, ..LoraPart::default() })];
    let stored = |delta: &Delta| {
        let files = interop::encode(delta, &base, &EncodeMeta::default()).unwrap();
        Arc::new(interop::decode(&files, &base).unwrap())
    };
    let old = stored(&train(&base, input(&base, Task::CausalLm, &dora, hyper(4))).delta);
    let from = StartingDelta::new("old@1".into(), DeltaId::from_bytes([1; 32]), Arc::clone(&old), ());
    let rows: String = (0..12).map(|i| format!("{{\"text\": \"{}\"}}\n", "!#$%&"[i % 3..].repeat(1 + i / 3))).collect();
    let request = TrainParams { ewc: None, ..continuing(Task::CausalLm) };
    let planned = plan(&base, &request, &rows, &from, &rows);
    let next = RunInput { resolved: hyper(8), ..RunInput::from(&planned) };
    let data: Vec<Encoded> = planned.train.to_vec();
    let end = Arc::new(train(&base, next).delta);
    let (start, trained, published) =
        (loss(&base, &old, &data), loss(&base, &end, &data), loss(&base, &stored(&end), &data));
    assert!((start - trained).abs() > 0.05, "it moved: {start} -> {trained}");
    assert!((trained - published).abs() < 1e-3, "{trained} is published as {published}");
}
