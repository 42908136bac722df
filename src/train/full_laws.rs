//! Laws of full fine-tuning: the resident base stays as it is, every weight gets its gradient, and the folder that comes of
//! it computes what was trained.

use std::sync::Arc;

use candle_core::Tensor;

use super::{
    batches::{Stream, rng},
    encode::Encoded,
    laws::{config, examples, hyper, input, tiny},
    objective::losses,
    optim::global_norm,
    run::{Advance, Outcome, Run, RunInput, Trained},
    spec::{BaseShape, TrainSpec},
    testing::Differences,
    trainable::Trainable,
    transfer_laws::other,
};
use crate::{
    admission::train_params::{JobEventBody, MethodPart, ResolvedTraining},
    delta::{DeltaBatch, Task},
    model::{Base, Input, LoadOptions, Source, testing, write_folder},
    nn::Cx,
    rows::RowLayout,
};

/// A base whose folder stays.
pub(super) fn kept(kind: &str) -> (tempfile::TempDir, Arc<Base>) {
    let dir = tempfile::tempdir().unwrap();
    testing::write_random(&dir.path().join("base"), &config(kind), 7).unwrap();
    let base = Base::load(&dir.path().join("base"), &LoadOptions::default()).unwrap();
    (dir, Arc::new(base))
}

pub(super) const CASES: [(&str, Task); 13] = [
    ("llama", Task::CausalLm),
    ("gpt2", Task::CausalLm),
    ("qwen3", Task::CausalLm),
    ("gemma2", Task::CausalLm),
    ("llama", Task::SeqCls),
    ("gpt2", Task::SeqCls),
    ("bert", Task::SeqCls),
    ("bert", Task::TokenCls),
    ("roberta", Task::SeqCls),
    ("distilbert", Task::SeqCls),
    ("phi3", Task::CausalLm),
    ("gemma3", Task::CausalLm),
    ("t5", Task::Seq2Seq),
];

pub(super) fn full(base: &Base, task: Task, resolved: ResolvedTraining) -> RunInput {
    input(base, task, &[MethodPart::Full], resolved)
}

/// Hidden states, and logits of the language-model head or of the base's own head.
fn outputs(base: &Base) -> Vec<f32> {
    let rows = RowLayout::packed(&[5, 4]);
    let deltas = DeltaBatch::none();
    let texts = RowLayout::packed(&[4, 3]);
    let source = (base.arch.is_encoder_decoder())
        .then(|| Source::encode(base, texts, &[9, 4, 3, 8, 6, 40, 5], &[None, None], None).unwrap());
    let memory = source.as_ref().map(Source::memory);
    let cx = Cx { memory: memory.as_ref(), ..Cx::new(&rows, &deltas) };
    let hidden = base.transformer.forward(&Input::tokens(&[3, 9, 4, 40, 5, 6, 7, 8, 9]), &cx).unwrap();
    let mut out: Vec<f32> = hidden.flatten_all().unwrap().to_vec1().unwrap();
    let mut add = |t: Tensor| out.extend(t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    base.transformer.head_logits(&hidden, &cx).unwrap().into_iter().for_each(|h| add(h.logits));
    if base.arch.is_causal() && base.arch.head.is_none() {
        add(base.transformer.logits(&hidden, &[1, 4, 8], &cx).unwrap());
    }
    out
}

fn train(base: &Arc<Base>, input: RunInput) -> Trained {
    match drive(&mut Run::new(Arc::clone(base), None, input).unwrap()).1 {
        Outcome::Trained(t) => *t,
        Outcome::Failed(f) => panic!("{f:?}"),
    }
}

fn drive(run: &mut Run) -> (Vec<JobEventBody>, Outcome) {
    let mut all = Vec::new();
    loop {
        match run.advance() {
            Advance::More(events) => all.extend(events),
            Advance::Done(events, outcome) => {
                all.extend(events);
                return (all, *outcome);
            }
        }
    }
}

#[test]
fn every_weight_gets_its_gradient_equal_to_central_differences() {
    for (family, task) in CASES {
        let (_dir, base) = kept(family);
        let input = full(&base, task, hyper(10));
        let t = Trainable::init_on(&input.spec, &base, 1).unwrap();
        let numbers: usize = t.vars().iter().map(|v| v.var.elem_count()).sum();
        assert_eq!(numbers as u64, input.spec.parameters(&base.sites), "{family} {task:?}");
        let batch: Vec<&Encoded> = input.train.iter().take(6).collect();
        let loss = || {
            let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
            losses(&t.base(&base).unwrap(), delta, &batch, None).unwrap().each.mean_all().unwrap()
        };
        let grads = loss().backward().unwrap();
        for v in t.vars() {
            let what = format!("{family} {task:?} {}", v.name);
            let g = grads.get(&v.var).unwrap_or_else(|| panic!("{what}: cut"));
            let norm = global_norm([g]).unwrap();
            // a key's bias shifts all scores of a query alike
            assert!(norm.is_finite() && (norm > 0.0 || v.name.ends_with("key.bias")), "{what}: {norm}");
            Differences { absolute: 5e-4, ..Differences::default() }.assert(&what, v, &grads, loss);
        }
    }
}

#[test]
fn the_resident_base_stays_and_the_folder_computes_what_was_trained() {
    for (family, task) in CASES {
        let (dir, base) = kept(family);
        let before = outputs(&base);
        let mut resolved = hyper(12);
        resolved.learning_rate = 1e-3;
        let mut input = full(&base, task, resolved);
        input.validation = examples(task, 8);
        let trained = train(&base, input);
        assert!(outputs(&base) == before, "{family} {task:?}: the resident base");
        let model = trained.model.expect("a model");
        assert_eq!(model.head.is_some(), !task.generates());
        write_folder(&base, &model, &dir.path().join("out")).unwrap();
        let served = Arc::new(Base::load(&dir.path().join("out"), &LoadOptions::default()).unwrap());
        assert_ne!(served.fingerprint, base.fingerprint);
        // the published checkpoint's evaluation, by the served model alone
        let spec = TrainSpec::resolve(&[MethodPart::Full], task, &model.labels, BaseShape::of(&served)).unwrap();
        let plain = crate::delta::Delta::new(spec_of(&spec), vec![], model.head.clone());
        let held = examples(task, 8);
        let held: Vec<&Encoded> = held.iter().collect();
        let each = losses(&served, Arc::new(plain), &held, None).unwrap().each;
        let loss = f64::from(each.mean_all().unwrap().to_scalar::<f32>().unwrap());
        let best = trained.best_eval.expect("an evaluation");
        assert!((loss - best.loss).abs() < 1e-5, "{family} {task:?}: {loss} {}", best.loss);
    }
}

fn spec_of(spec: &TrainSpec) -> crate::delta::DeltaSpec {
    crate::delta::DeltaSpec {
        methods: spec.methods.clone(),
        task: spec.task,
        problem: spec.problem,
        labels: spec.labels.clone(),
        num_virtual_tokens: 0,
        parameters: 0,
        resident_bytes: 0,
    }
}

#[test]
fn a_seed_decides_and_accumulation_is_one_large_batch() {
    let (_dir, base) = kept("gpt2");
    let weights = |batch_size: u32, grad_accumulation: u32| {
        let resolved = ResolvedTraining { batch_size, grad_accumulation, learning_rate: 1e-3, ..hyper(4) };
        let model = train(&base, full(&base, Task::CausalLm, resolved)).model.expect("a model");
        model.weights.iter().flat_map(|(_, t)| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect::<Vec<_>>()
    };
    let once = weights(8, 1);
    assert!(once == weights(8, 1), "the same seed");
    let worst = once.iter().zip(weights(4, 2)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-3, "{worst}"); // Adam turns rounding of tiny gradients into steps
}

#[test]
fn a_job_whose_patience_runs_out_makes_the_model_of_its_best_evaluation() {
    let (dir, base) = kept("bert");
    let resolved = ResolvedTraining { eval_every: 1, patience: 2, min_delta: 1e9, learning_rate: 1e-3, ..hyper(30) };
    let mut input = full(&base, Task::SeqCls, resolved);
    input.validation = examples(Task::SeqCls, 8);
    let (held, spec) = (Arc::clone(&input.validation), input.spec.clone());
    let mut run = Run::new(Arc::clone(&base), None, input).unwrap();
    let (events, outcome) = drive(&mut run);
    let Outcome::Trained(trained) = outcome else { panic!("{outcome:?}") };
    assert_eq!(run.step(), 3, "one evaluation to compare with and two without a gain");
    assert!(events.iter().any(|e| matches!(e, JobEventBody::Log(note) if note.code == "EARLY_STOP")), "{events:?}");
    let best = trained.best_eval.expect("an evaluation");
    let model = trained.model.expect("a model");
    write_folder(&base, &model, &dir.path().join("out")).unwrap();
    let served = Base::load(&dir.path().join("out"), &LoadOptions::default()).unwrap();
    let plain = crate::delta::Delta::new(spec_of(&spec), vec![], model.head.clone());
    let held: Vec<&Encoded> = held.iter().collect();
    let each = losses(&served, Arc::new(plain), &held, None).unwrap().each;
    assert!((f64::from(each.mean_all().unwrap().to_scalar::<f32>().unwrap()) - best.loss).abs() < 1e-5);
}

#[test]
fn forgetting_compares_the_model_of_the_best_evaluation_with_the_base() {
    let (dir, base) = kept("llama");
    let resolved = ResolvedTraining { eval_every: 1, learning_rate: 3e-2, ..hyper(6) };
    let mut input = full(&base, Task::CausalLm, resolved);
    // texts of another kind: the more it learns of the others, the worse
    input.validation = other(8);
    input.held = examples(Task::CausalLm, 9);
    let (held, spec) = (Arc::clone(&input.held), input.spec.clone());
    let (events, outcome) = drive(&mut Run::new(Arc::clone(&base), None, input).unwrap());
    let Outcome::Trained(trained) = outcome else { panic!("{outcome:?}") };
    assert!(trained.best_eval.as_ref().is_some_and(|e| e.step < 6), "the last is not the best: {events:?}");
    let Some(JobEventBody::Forgetting(f)) = events.last() else { panic!("{events:?}") };
    write_folder(&base, &trained.model.expect("a model"), &dir.path().join("out")).unwrap();
    let served = Base::load(&dir.path().join("out"), &LoadOptions::default()).unwrap();
    let held: Vec<&Encoded> = held.iter().collect();
    let mean = |base: &Base| {
        let plain = crate::delta::Delta::new(spec_of(&spec), vec![], None);
        let each = losses(base, Arc::new(plain), &held, None).unwrap().each;
        f64::from(each.mean_all().unwrap().to_scalar::<f32>().unwrap())
    };
    assert!((mean(&base) - f.base_loss).abs() < 1e-4 && (mean(&served) - f.delta_loss).abs() < 1e-4, "{f:?}");
    assert!((f.base_loss - f.delta_loss).abs() > 1e-3, "{f:?}");
}

#[test]
fn full_is_alone() {
    let gpt2 = tiny("gpt2");
    let methods = [MethodPart::Full, MethodPart::Lora(Default::default())];
    let found = TrainSpec::resolve(&methods, Task::CausalLm, &[], BaseShape::of(&gpt2)).unwrap_err();
    assert!(found[0].field == "methods[0]" && found[0].message.contains("alone"), "{found:?}");
}

#[test]
fn the_estimate_counts_the_weights() {
    use super::{encode::tests::byte_codec, plan::tests::params};
    let base = tiny("gpt2");
    let text = "{\"text\": \"one two\"}\n{\"text\": \"three four\"}\n";
    let mut params = params(Task::CausalLm, vec![MethodPart::Full]);
    params.hyper.max_length = Some(16);
    let inputs = super::Inputs {
        params: &params,
        train: text.as_bytes(),
        validation: None,
        forgetting: None,
        replay: None,
        start: None,
    };
    let info = super::BaseInfo { shape: BaseShape::of(&base), max_positions: 256 };
    let need = super::prepare(inputs, info, &byte_codec(true)).unwrap().reply.memory;
    let weights = 4 * base.trained_by(Task::CausalLm);
    assert!(need.parameters >= weights && need.optimizer == 2 * weights);
    let llama = tiny("llama");
    let joined = |base: &Base| -> usize {
        use crate::delta::{Proj, Site};
        let joins =
            |site| matches!(site, Site::Linear { proj: Proj::Q | Proj::K | Proj::V | Proj::Gate | Proj::Up, .. });
        base.sites.iter().filter(|(_, e)| joins(e.site)).map(|(_, e)| e.in_dim * e.out_dim).sum()
    };
    assert_eq!((llama.joined_parameters(), base.joined_parameters()), (joined(&llama) as u64, 0));
    let spec = TrainSpec::resolve(&[MethodPart::Full], Task::CausalLm, &[], BaseShape::of(&llama)).unwrap();
    let of = |base: BaseShape<'_>| spec.memory(base, 1, (8, 8), false).activations;
    let without = BaseShape { base: None, ..BaseShape::of(&llama) };
    assert_eq!(of(BaseShape::of(&llama)) - of(without), 8 * joined(&llama) as u64, "copies and their gradients");
}

#[test]
fn a_failure_after_an_evaluation_keeps_no_whole_model() {
    let (_dir, base) = kept("gpt2");
    let mut input = full(&base, Task::CausalLm, ResolvedTraining { eval_every: 1, ..hyper(9) });
    input.validation = examples(Task::CausalLm, 4);
    let mut run = Run::new(Arc::clone(&base), None, input).unwrap();
    let evaluated = |events: &[JobEventBody]| events.iter().any(|e| matches!(e, JobEventBody::Eval(_)));
    loop {
        match run.advance() {
            Advance::More(events) if evaluated(&events) => break,
            Advance::More(_) => {}
            Advance::Done(_, outcome) => panic!("{outcome:?}"),
        }
    }
    let var = &run.trainable().vars()[0].var;
    var.set(&(var.as_detached_tensor() * f64::NAN).unwrap()).unwrap();
    let failed = loop {
        match run.advance() {
            Advance::More(_) => {}
            Advance::Done(_, outcome) => break *outcome,
        }
    };
    let Outcome::Failed(failed) = failed else { panic!("{failed:?}") };
    assert_eq!((failed.code, failed.checkpoint), ("NON_FINITE_LOSS", None));
}
