//! Laws of learned mixing: it starts at the mean, its gradients are right, only weights move, and what is published is the
//! weighted sum.

use std::sync::Arc;

use candle_core::Tensor;

use super::{
    batches::{Stream, rng},
    encode::{Encoded, tests::byte_codec},
    gradients,
    laws::{examples, finish, flat, hyper, input, lora, shape, tiny, train},
    mixing::Mix,
    objective::{Reads, Sequence, losses, losses_of},
    plan::{BaseInfo, Inputs, Prepared, prepare, tests::params},
    run::{Outcome, Run, RunInput},
    spec::TrainSpec,
    testing::Differences,
    trainable::Trainable,
    transfer::{Continue, StartingDelta},
};
use crate::{
    admission::train_params::{
        BitfitPart, JobEventBody, LoraBias, LoraPart, MethodPart, MixParams, MixRow, PrefixPart, ResolvedTraining,
        StartedFrom,
    },
    delta::{Delta, Patch, Problem, Task},
    ids::DeltaId,
    interop::{self, EncodeMeta},
    merge::{Source, compose},
    model::Base,
    nn::Cx,
};

fn bitfit() -> Vec<MethodPart> {
    vec![MethodPart::Bitfit(BitfitPart::default())]
}

/// Deltas that each learned something else.
fn trained(base: &Arc<Base>, task: Task, methods: &[MethodPart], seed: u64) -> Arc<Delta> {
    let resolved = ResolvedTraining { seed, ..hyper(6) };
    let mut wanted = input(base, task, methods, resolved);
    wanted.train = examples(task, 24).iter().skip(seed as usize * 8).take(8).cloned().collect();
    Arc::new(train(base, wanted).delta)
}

fn starting(name: &str, id: u8, delta: &Arc<Delta>) -> StartingDelta {
    StartingDelta::new(name.into(), DeltaId::from_bytes([id; 32]), Arc::clone(delta), ())
}

fn start(base: &Base, deltas: &[Arc<Delta>], per_layer: bool) -> Result<StartingDelta, (String, String)> {
    let parts = deltas.iter().zip(1..).map(|(d, i)| starting(&format!("d{i}@1"), i, d)).collect();
    Mix::start(parts, per_layer, &base.sites).map_err(|v| (v.field, v.message))
}

fn mix(base: &Base, deltas: &[Arc<Delta>], per_layer: bool) -> Mix {
    start(base, deltas, per_layer).unwrap().mix().cloned().unwrap()
}

fn labels(task: Task) -> Vec<String> {
    if task.generates() { vec![] } else { vec!["a".into(), "b".into()] }
}

fn trainable(base: &Base, task: Task, deltas: &[Arc<Delta>], per_layer: bool) -> (TrainSpec, Trainable) {
    let from = start(base, deltas, per_layer).unwrap();
    let kind = (task, Problem::SingleLabel);
    let spec = TrainSpec::of_delta(from.delta(), kind, &labels(task), shape(base)).unwrap();
    let mixing = Trainable::mixing(from.mix().unwrap(), &spec, base, 5).unwrap();
    (spec, mixing)
}

fn loss(base: &Base, delta: &Arc<Delta>, examples: &[Encoded]) -> f64 {
    let all: Vec<&Encoded> = examples.iter().collect();
    let each = losses(base, Arc::clone(delta), &all, None).unwrap().each;
    f64::from(each.mean_all().unwrap().to_scalar::<f32>().unwrap())
}

/// The weighted sum by the code that requests with several deltas use.
fn summed(base: &Base, deltas: &[Arc<Delta>], weights: &[f64]) -> Arc<Delta> {
    let sources: Vec<Source<'_>> = (deltas.iter().zip(weights))
        .map(|(delta, weight)| Source { name: "d", delta: delta.as_ref(), weight: *weight })
        .collect();
    Arc::new(compose(&sources, &base.sites).unwrap())
}

fn lora_with_biases() -> Vec<MethodPart> {
    vec![MethodPart::Lora(LoraPart { rank: Some(3), bias: LoraBias::All, ..LoraPart::default() })]
}

#[test]
fn it_starts_at_the_mean_of_the_deltas() {
    for family in ["llama", "gpt2", "t5"] {
        let base = tiny(family);
        let task = if family == "t5" { Task::Seq2Seq } else { Task::CausalLm };
        let mut deltas = vec![trained(&base, task, &lora(), 0), trained(&base, task, &lora(), 1)];
        if family == "gpt2" {
            // another rank, with biases: and a delta of biases alone
            deltas.push(trained(&base, task, &lora_with_biases(), 2));
            deltas.push(trained(&base, task, &bitfit(), 2));
        }
        let data = examples(task, 12);
        let mean = summed(&base, &deltas, &vec![1.0 / deltas.len() as f64; deltas.len()]);
        for per_layer in [false, true] {
            let (_, mixing) = trainable(&base, task, &deltas, per_layer);
            let own = mixing.delta(&mut rng(0, Stream::Dropout)).unwrap();
            let (want, got) = (loss(&base, &mean, &data), loss(&base, &own, &data));
            assert!((want - got).abs() < 1e-5, "{family} {per_layer}: {want} and {got}");
            let count: usize = mixing.vars().iter().map(|v| v.var.elem_count()).sum();
            let planned = mix(&base, &deltas, per_layer).parameters(&base.sites);
            assert_eq!(count as u64, planned);
            assert_eq!(per_layer, count > deltas.len(), "{family}");
        }
    }
}

#[test]
fn gradients_of_the_weights_match_central_differences_also_layer_by_layer() {
    for (family, task) in
        [("llama", Task::CausalLm), ("gpt2", Task::CausalLm), ("bert", Task::SeqCls), ("t5", Task::Seq2Seq)]
    {
        let base = tiny(family);
        let mut deltas = vec![trained(&base, task, &lora(), 0), trained(&base, task, &lora(), 1)];
        if family == "gpt2" || family == "bert" {
            deltas.push(trained(&base, task, &bitfit(), 2));
        }
        let (_, mixing) = trainable(&base, task, &deltas, true);
        let data = examples(task, 8);
        let all: Vec<&Encoded> = data.iter().collect();
        let now = || mixing.delta(&mut rng(0, Stream::Dropout)).unwrap();
        let sequences: Vec<_> = data.iter().map(Sequence::from).collect();
        let of = |hidden: &Tensor, cx: &Cx<'_>| Ok(losses_of(&base, hidden, (&all, &sequences), 0.0, cx)?.each);
        let micro = gradients::Micro {
            base: &base,
            delta: now(),
            sequences: &sequences,
            losses: &of,
            reads: Reads::of(&all),
            weight: 1.0,
            pacer: None,
        };
        let (_, whole) = gradients::whole(&micro, mixing.vars()).unwrap();
        let (_, layers) = gradients::by_layer(&micro, mixing.vars()).unwrap();
        let mut moved = 0;
        for ((v, grad), again) in mixing.vars().iter().zip(whole).zip(layers) {
            let grad = grad.unwrap_or_else(|| panic!("{family} {}: no gradient", v.name));
            for (a, b) in flat(&grad).iter().zip(flat(&again.unwrap())) {
                assert!((a - b).abs() < 1e-4 * (1.0 + a.abs()), "{family} {}: {a} and {b}", v.name);
            }
            let norm = flat(&grad).iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            if norm < 1e-3 {
                continue;
            }
            moved += 1;
            let found = Differences::NEAR
                .slope(v, &grad, norm, || losses(&base, now(), &all, None).unwrap().each.sum_all().unwrap());
            assert!((found / norm - 1.0).abs() < 2e-2, "{family} {}: {found} and {norm}", v.name);
        }
        assert!(moved >= 2, "{family}: {moved}");
    }
}

/// A job that mixes.
fn job(base: &Arc<Base>, task: Task, deltas: &[Arc<Delta>], resolved: ResolvedTraining) -> (RunInput, Trainable) {
    let (spec, mixing) = trainable(base, task, deltas, false);
    let mut wanted = input(base, task, &lora(), resolved);
    wanted.spec = spec;
    wanted.resolved.mix = Some(mix(base, deltas, false).record());
    (wanted, mixing)
}

#[test]
fn the_delta_that_fits_gets_the_weight_and_the_sum_is_published() {
    let base = tiny("llama");
    let task = Task::CausalLm;
    let data = examples(task, 8);
    // one that knows the examples, one that was led away from everything
    let mut good = input(&base, task, &lora(), hyper(60));
    good.train = data.clone();
    let good = Arc::new(train(&base, good).delta);
    let other = trained(&base, task, &lora(), 2);
    let bad = Arc::new(other.map(&mut |name, t| if name == "lora_B" { t * -6.0 } else { Ok(t.clone()) }).unwrap());
    let deltas = [good, bad];
    let (mut wanted, mixing) = job(&base, task, &deltas, ResolvedTraining { learning_rate: 0.05, ..hyper(40) });
    wanted.train = data.clone();
    let before = loss(&base, &summed(&base, &deltas, &[0.5, 0.5]), &data);
    let run = Run::with_trainable(Arc::clone(&base), None, wanted, mixing).unwrap();
    let snapshot = run.trainable().snapshot().unwrap();
    assert_eq!(run.trainable().mix_rows(&snapshot).unwrap(), [MixRow { layer: None, weights: vec![0.5, 0.5] }]);
    let (events, Outcome::Trained(end)) = finish(run) else { panic!("it ends well") };
    let told = events.iter().find_map(|e| if let JobEventBody::Mix(m) = e { Some(m.clone()) } else { None });
    let told = told.expect("the weights are told");
    assert_eq!(told.deltas, ["d1@1", "d2@1"]);
    let weights = &told.rows[0].weights;
    assert!(weights[0] > 0.6 && weights[1] < 0.4, "{weights:?}");
    let published = Arc::new(end.delta);
    let (after, sum) = (loss(&base, &published, &data), loss(&base, &summed(&base, &deltas, weights), &data));
    assert!(after < before, "{before} before, {after} after");
    assert!((after - sum).abs() < 1e-5, "{after} and {sum}");
    assert!(published.patches().iter().all(|(_, p)| matches!(p, Patch::LowRank(_))));
    // as it is written and read again
    let files = interop::encode(&published, &base, &EncodeMeta::default()).unwrap();
    let read = Arc::new(interop::decode(&files, &base).unwrap());
    assert!((loss(&base, &read, &data) - after).abs() < 1e-5);
}

/// A request with its data, as a server prepares it.
fn prepared(base: &Base, task: Task, from: &StartingDelta) -> Prepared {
    let row =
        |i: usize| format!("{{\"text\": \"{}\", \"label\": \"{}\"}}\n", "!#$%&"[i % 2..].repeat(1 + i / 2), i % 2);
    let data: String = (0..24).map(row).collect();
    let mut wanted = params(task, vec![]);
    wanted.mix = Some(MixParams { deltas: vec!["d1".into(), "d2".into()], per_layer: true });
    (wanted.hyper.batch_size, wanted.hyper.epochs) = (Some(6), Some(2.0));
    let start = Some(Continue { from, old: None });
    let inputs =
        Inputs { params: &wanted, train: data.as_bytes(), validation: None, forgetting: None, replay: None, start };
    let info = BaseInfo { shape: shape(base), max_positions: base.arch.max_positions };
    prepare(inputs, info, &byte_codec(true)).unwrap()
}

#[test]
fn a_request_is_planned_by_its_weights_and_a_run_that_goes_on_gives_what_it_would_have_given() {
    let base = tiny("bert");
    let task = Task::SeqCls;
    let deltas = [trained(&base, task, &lora(), 0), trained(&base, task, &lora(), 1)];
    let from = start(&base, &deltas, true).unwrap();
    let prepared = prepared(&base, task, &from);
    let resolved = &prepared.reply.resolved;
    assert_eq!((resolved.learning_rate, resolved.started_from.clone()), (0.02, None));
    assert_eq!(resolved.mix.as_ref().map(|m| m.deltas.len()), Some(2));
    let run = || Run::new(Arc::clone(&base), None, RunInput::from(&prepared)).unwrap();
    let (mut first, whole) = (run(), finish(run()).1);
    let count: usize = first.trainable().vars().iter().map(|v| v.var.elem_count()).sum();
    assert_eq!(prepared.reply.trainable_parameters, count as u64, "the weights of each layer and a fresh head");
    while first.step() < 3 {
        first.advance();
    }
    let bytes = first.to_bytes().unwrap().unwrap();
    let again = Run::from_bytes(Arc::clone(&base), None, RunInput::from(&prepared), &bytes).unwrap();
    let (Outcome::Trained(a), Outcome::Trained(b)) = (whole, finish(again).1) else { panic!("both end well") };
    let all = |d: &Delta| {
        let patches = d.patches().iter().flat_map(|(_, p)| p.tensors()).map(|(_, t)| flat(t));
        patches.chain(d.head().unwrap().tensors().into_iter().map(|(_, t)| flat(t))).collect::<Vec<_>>()
    };
    assert_eq!(all(&a.delta), all(&b.delta));
    let fresh = run();
    assert_ne!(all(&a.delta), all(&fresh.delta().unwrap()), "it learned");
}

#[test]
fn what_cannot_be_mixed_is_refused_by_name() {
    let base = tiny("llama");
    let task = Task::CausalLm;
    let a = trained(&base, task, &lora(), 0);
    let prefix = trained(
        &base,
        task,
        &[MethodPart::Prefix(PrefixPart { num_virtual_tokens: Some(2), ..PrefixPart::default() })],
        1,
    );
    let (field, message) = start(&base, &[Arc::clone(&a), prefix], false).unwrap_err();
    assert_eq!(field, "mix.deltas[1]");
    assert!(message.contains("d2@1 has a prefix at layers.0.keys"), "{message}");
    let (field, message) = start(&base, &[Arc::clone(&a)], false).unwrap_err();
    assert!(field == "mix.deltas" && message.contains("accepted are 2 to 16"), "{message}");
    let twice = vec![starting("a@1", 1, &a), starting("b@7", 1, &a)];
    let refused = Mix::start(twice, false, &base.sites).unwrap_err();
    assert_eq!(refused.field, "mix.deltas[1]");
    assert!(refused.message.contains("b@7 is the same version as a@1"), "{}", refused.message);
    let record = mix(&base, &[Arc::clone(&a), trained(&base, task, &lora(), 1)], true).record();
    let names: Vec<&str> = record.deltas.iter().map(|d: &StartedFrom| d.name.as_str()).collect();
    assert_eq!((names, record.per_layer), (vec!["d1@1", "d2@1"], true));
}
