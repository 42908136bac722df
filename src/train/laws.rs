//! Laws of training that need a whole (tiny) model: gradients reach every variable, the base never changes, seeds decide,
//! accumulation is exact, divergence fails.

pub(super) mod positions;

use std::sync::Arc;

use candle_core::Tensor;
use rand::Rng as _;

use super::{
    batches::{Stream, rng},
    encode::{Encoded, Target},
    objective::{losses, smoothed_losses},
    optim::global_norm,
    plan::{Prepared, tests::params},
    run::{Advance, Outcome, Run, RunInput, Trained},
    spec::{BaseShape, TrainSpec},
    testing::Differences,
    trainable::Trainable,
};
use crate::{
    admission::train_params::{
        BitfitPart, EvalMetric, JobEventBody, LoraPart, MethodPart, PlanReply, ResolvedTraining, Schedule,
    },
    delta::{DeltaBatch, Task},
    model::{Base, Input, testing},
    nn::Cx,
    rows::RowLayout,
};

pub(super) fn config(kind: &str) -> serde_json::Value {
    match kind {
        "llama" => testing::tiny_llama(),
        "gpt2" => testing::tiny_gpt2(),
        "qwen3" => testing::tiny_qwen3(),
        "gemma2" => testing::tiny_gemma2(),
        "gemma3" => testing::tiny_gemma3(),
        "roberta" => testing::tiny_roberta(),
        "distilbert" => testing::tiny_distilbert(),
        "phi3" => testing::tiny_phi3(),
        "t5" => {
            // smooth, so that central differences meet no kink
            let mut config = testing::tiny_t5();
            config["feed_forward_proj"] = "gated-gelu".into();
            config
        }
        _ => testing::tiny_bert(),
    }
}

pub(super) fn tiny(kind: &str) -> Arc<Base> {
    Arc::new(testing::random_base(&config(kind), 7).unwrap())
}

pub(super) fn shape(base: &Base) -> BaseShape<'_> {
    BaseShape::of(base)
}

/// Texts that count upwards from a start, of different lengths; labels and tags follow from the start.
pub(super) fn examples(task: Task, n: usize) -> Arc<[Encoded]> {
    let one = |i: usize| {
        let tokens: Vec<u32> = (0..4 + i % 5).map(|j| (3 + (i * 13) % 40 + j) as u32).collect();
        let target = match task {
            Task::CausalLm | Task::Seq2Seq => Target::Tokens((0..tokens.len()).map(|t| t > 0).collect()),
            Task::SeqCls => Target::Label(u32::from(tokens[0] > 22)),
            _ => Target::Tags(tokens.iter().enumerate().skip(1).map(|(t, id)| (t as u32, id % 2)).collect()),
        };
        let source =
            if task == Task::Seq2Seq { tokens.iter().rev().map(|t| t + 50).chain([1]).collect() } else { vec![] };
        Encoded { tokens, target, source, line: i as u64 + 1 }
    };
    (0..n).map(one).collect()
}

pub(super) fn hyper(total_steps: u32) -> ResolvedTraining {
    ResolvedTraining {
        task: Task::CausalLm,
        problem: Default::default(),
        methods: vec![],
        labels: vec![],
        epochs: 1.0,
        total_steps,
        batch_size: 8,
        grad_accumulation: 1,
        learning_rate: 1e-2,
        schedule: Schedule::Constant,
        warmup_steps: 0,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        clip_norm: 1.0,
        max_length: 32,
        seed: 11,
        eval_every: 0,
        packing: false,
        started_from: None,
        mix: None,
        ewc: None,
        eval_metric: EvalMetric::Loss,
        patience: 0,
        min_delta: 0.0,
        label_smoothing: 0.0,
        checkpoint_every: 0,
        keep_last: false,
        worst_examples: 0,
        gradient_checkpointing: false,
        preference: None,
        generation: None,
        kl_to_base: 0.0,
        replay_examples: 0,
        keep_best: 1,
        sweep: vec![],
    }
}

pub(super) fn input(base: &Base, task: Task, methods: &[MethodPart], resolved: ResolvedTraining) -> RunInput {
    let labels: Vec<String> = if task.generates() { vec![] } else { vec!["a".into(), "b".into()] };
    let spec = TrainSpec::resolve(methods, task, &labels, shape(base)).unwrap();
    let resolved = ResolvedTraining { task, labels, methods: methods.to_vec(), ..resolved };
    RunInput {
        resolved,
        spec,
        train: examples(task, 40),
        validation: Arc::from([]),
        held: Arc::from([]),
        replay: Arc::from([]),
        start: None,
        candidates: vec![],
        separate_validation: true,
        decoder: Default::default(),
        quiz: Default::default(),
    }
}

pub(super) fn lora() -> Vec<MethodPart> {
    vec![MethodPart::Lora(LoraPart { rank: Some(4), alpha: Some(8.0), ..LoraPart::default() })]
}

fn bitfit() -> Vec<MethodPart> {
    vec![MethodPart::Bitfit(BitfitPart::default())]
}

pub(super) fn finish(mut run: Run) -> (Vec<JobEventBody>, Outcome) {
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

pub(super) fn train(base: &Arc<Base>, input: RunInput) -> Trained {
    match finish(Run::new(Arc::clone(base), None, input).unwrap()).1 {
        Outcome::Trained(t) => *t,
        Outcome::Failed(f) => panic!("{f:?}"),
    }
}

pub(super) fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_variable_gets_a_finite_gradient_for_every_family_method_and_task() {
    let cases = [
        ("llama", Task::CausalLm, lora()),
        ("llama", Task::SeqCls, lora()),
        ("gpt2", Task::CausalLm, [lora(), bitfit()].concat()),
        ("gpt2", Task::TokenCls, bitfit()),
        ("bert", Task::SeqCls, [lora(), bitfit()].concat()),
        ("bert", Task::TokenCls, [lora(), bitfit()].concat()),
        ("bert", Task::SeqCls, vec![]),
        ("roberta", Task::SeqCls, lora()),
        ("qwen3", Task::CausalLm, lora()),
        ("gemma2", Task::CausalLm, lora()),
        ("t5", Task::Seq2Seq, lora()),
        ("t5", Task::Seq2Seq, vec![positions::prefix(3)]),
        ("t5", Task::Seq2Seq, vec![positions::prompt(3)]),
        ("t5", Task::Seq2Seq, vec![positions::projected(3)]),
        ("t5", Task::Seq2Seq, vec![positions::p_tuning(3)]),
        ("llama", Task::CausalLm, vec![positions::prefix(3)]),
        ("llama", Task::CausalLm, vec![positions::prompt(3)]),
        ("gpt2", Task::CausalLm, vec![positions::projected(3)]),
        ("gpt2", Task::SeqCls, [lora(), vec![positions::p_tuning(2), positions::prefix(3)]].concat()),
        ("bert", Task::SeqCls, vec![positions::prefix(3)]),
        ("t5", Task::Seq2Seq, [lora(), vec![positions::everywhere(3)]].concat()),
        ("bert", Task::TokenCls, vec![positions::prompt(3)]),
        ("bert", Task::TokenCls, vec![positions::p_tuning(3)]),
    ];
    for (family, task, methods) in cases {
        let base = tiny(family);
        let input = input(&base, task, &methods, hyper(10));
        let t = Trainable::init(&input.spec, &base.sites, 1, &base.device).unwrap();
        let batch: Vec<&Encoded> = input.train.iter().take(8).collect();
        let grads = || {
            let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
            losses(&base, delta, &batch, None).unwrap().each.mean_all().unwrap().backward().unwrap()
        };
        let first = grads();
        for v in t.vars() {
            let norm = global_norm([first.get(&v.var).unwrap_or_else(|| panic!("{family} {task:?} {}: cut", v.name))])
                .unwrap();
            // B is zero before the first step, so A's first gradient is zero by design
            assert!(norm.is_finite(), "{family} {task:?} {}", v.name);
            assert!(
                v.name.ends_with("lora_A") == (norm == 0.0) || key_bias(&v.name),
                "{family} {task:?} {}: {norm}",
                v.name
            );
            if v.name.ends_with("lora_B") {
                v.var.set(&(v.var.ones_like().unwrap() * 0.01).unwrap()).unwrap();
            }
        }
        let second = grads();
        for v in t.vars() {
            let norm = global_norm([second.get(&v.var).unwrap()]).unwrap();
            assert!(norm.is_finite() && (norm > 0.0 || key_bias(&v.name)), "{family} {task:?} {}: {norm}", v.name);
        }
    }
}

/// A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
fn key_bias(name: &str) -> bool {
    name.ends_with("key.bias")
}

#[test]
fn gradients_match_central_differences() {
    use positions::{everywhere, p_tuning, prefix, projected, prompt};
    let with = |part: MethodPart| [lora(), vec![part]].concat();
    let cases = [
        ("llama", Task::CausalLm, lora()),
        ("gpt2", Task::CausalLm, lora()),
        ("bert", Task::SeqCls, lora()),
        ("roberta", Task::SeqCls, lora()),
        ("qwen3", Task::CausalLm, lora()),
        ("gemma2", Task::CausalLm, lora()),
        ("t5", Task::Seq2Seq, lora()),
        ("t5", Task::Seq2Seq, with(prefix(3))),
        ("t5", Task::Seq2Seq, with(prompt(3))),
        ("t5", Task::Seq2Seq, with(everywhere(3))),
        ("gemma2", Task::CausalLm, with(everywhere(3))),
        ("bert", Task::SeqCls, with(everywhere(3))),
        ("llama", Task::CausalLm, with(prefix(3))),
        ("llama", Task::CausalLm, with(prompt(3))),
        ("gpt2", Task::CausalLm, with(projected(3))),
        ("gpt2", Task::CausalLm, with(p_tuning(3))),
        ("bert", Task::SeqCls, with(prefix(3))),
        ("bert", Task::TokenCls, with(prompt(3))),
        ("roberta", Task::SeqCls, with(prompt(3))),
        ("gemma2", Task::CausalLm, with(prefix(3))),
    ];
    for (family, task, methods) in cases {
        let base = tiny(family);
        let input = input(&base, task, &methods, hyper(10));
        let t = Trainable::init(&input.spec, &base.sites, 1, &base.device).unwrap();
        let batch: Vec<&Encoded> = input.train.iter().take(6).collect();
        let loss = || {
            let delta = t.delta(&mut rng(0, Stream::Dropout)).unwrap();
            smoothed_losses(&base, delta, &batch, 0.1, None).unwrap().each.mean_all().unwrap()
        };
        let mut noise = rng(7, Stream::Init);
        for v in t.vars().iter().filter(|v| v.name.ends_with("lora_B")) {
            // seeded, so that what holds once holds always
            let values: Vec<f32> = (0..v.var.elem_count()).map(|_| noise.random_range(-0.1f32..0.1)).collect();
            v.var.set(&Tensor::from_vec(values, v.var.shape(), &base.device).unwrap()).unwrap();
        }
        Differences::NEAR.assert_all(family, t.vars(), loss);
    }
}

#[test]
fn base_unchanged() {
    let base = tiny("llama");
    let rows = RowLayout::packed(&[5, 3]);
    let hidden = || {
        let none = DeltaBatch::none();
        flat(&base.transformer.forward(&Input::tokens(&[1, 2, 3, 4, 5, 6, 7, 8]), &Cx::new(&rows, &none)).unwrap())
    };
    let matrices = || -> Vec<Vec<f32>> {
        base.sites.linears().filter_map(|(id, _)| base.linear(id).unwrap()).map(|(w, _)| flat(&w)).collect()
    };
    let before = (hidden(), matrices());
    train(&base, input(&base, Task::CausalLm, &lora(), hyper(5)));
    assert_eq!(before, (hidden(), matrices()), "bit for bit");
}

#[test]
fn the_loss_falls_by_more_than_half() {
    for (family, task, methods) in [
        ("llama", Task::CausalLm, lora()),
        ("bert", Task::SeqCls, lora()),
        ("bert", Task::TokenCls, bitfit()),
        ("gpt2", Task::SeqCls, lora()),
        ("roberta", Task::SeqCls, lora()),
    ] {
        let base = tiny(family);
        let run = Run::new(Arc::clone(&base), None, input(&base, task, &methods, hyper(120))).unwrap();
        let (events, outcome) = finish(run);
        let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
        let first = events.iter().find_map(|e| match e {
            JobEventBody::Metrics(m) => Some(m.loss),
            _ => None,
        });
        assert!(end.final_loss < 0.5 * first.unwrap(), "{family} {task:?}: {first:?} -> {}", end.final_loss);
    }
}

#[test]
fn the_same_seed_gives_the_same_delta_and_another_seed_another() {
    let base = tiny("bert");
    let run = |seed| {
        let methods = [MethodPart::Lora(LoraPart { rank: Some(2), dropout: Some(0.2), ..LoraPart::default() })];
        let end = train(&base, input(&base, Task::SeqCls, &methods, ResolvedTraining { seed, ..hyper(6) }));
        let tensors = |p: &crate::delta::Patch| p.tensors().iter().flat_map(|(_, t)| flat(t)).collect::<Vec<f32>>();
        let deltas = end.delta.patches().iter().flat_map(|(_, p)| tensors(p));
        deltas.chain(flat(&end.delta.head().unwrap().weight)).collect::<Vec<f32>>()
    };
    let first = run(1);
    assert!(first.iter().zip(run(1)).all(|(a, b)| (a - b).abs() < 1e-6));
    assert_ne!(first, run(2));
}

#[test]
fn accumulation_equals_one_large_batch() {
    let base = tiny("llama");
    let run = |batch_size, grad_accumulation| {
        let mut run = Run::new(
            Arc::clone(&base),
            None,
            input(&base, Task::CausalLm, &lora(), ResolvedTraining { batch_size, grad_accumulation, ..hyper(4) }),
        )
        .unwrap();
        while run.step() < 4 {
            assert!(matches!(run.advance(), Advance::More(_)));
        }
        let weights: Vec<f32> = run.trainable().vars().iter().flat_map(|v| flat(&v.var)).collect();
        (run.last_loss(), weights)
    };
    let (loss, weights) = run(16, 1);
    let (split_loss, split_weights) = run(2, 8);
    assert!((loss - split_loss).abs() < 1e-5, "{loss} {split_loss}");
    let worst = weights.iter().zip(&split_weights).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
}

#[test]
fn divergence_fails_with_the_step_and_keeps_the_last_good_checkpoint() {
    let base = tiny("llama");
    for (lr, code) in [(f64::NAN, "DIVERGED"), (1e9, "DIVERGED"), (f64::INFINITY, "DIVERGED")] {
        let resolved = ResolvedTraining { learning_rate: lr, ..hyper(20) };
        let run = Run::new(Arc::clone(&base), None, input(&base, Task::CausalLm, &lora(), resolved)).unwrap();
        let (_, outcome) = finish(run);
        let Outcome::Failed(f) = outcome else { panic!("{lr}: {outcome:?}") };
        assert_eq!(f.code, code);
        assert!(f.message.contains("step 1"), "{}", f.message);
        let (step, bytes) = f.checkpoint.unwrap();
        assert_eq!(step, 0);
        let kept = candle_core::safetensors::load_buffer(&bytes, &base.device).unwrap();
        assert!(global_norm(kept.values()).unwrap().is_finite());
    }
}

#[test]
fn the_best_evaluation_is_what_is_published() {
    let base = tiny("bert");
    let resolved = ResolvedTraining { eval_every: 5, eval_metric: EvalMetric::Accuracy, ..hyper(23) };
    let input = RunInput { validation: examples(Task::SeqCls, 60), ..input(&base, Task::SeqCls, &lora(), resolved) };
    let (events, outcome) = finish(Run::new(Arc::clone(&base), None, input).unwrap());
    let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
    let evals: Vec<_> =
        events.iter().filter_map(|e| if let JobEventBody::Eval(e) = e { Some(e) } else { None }).collect();
    assert_eq!(evals.iter().map(|e| e.step).collect::<Vec<_>>(), [5, 10, 15, 20, 23]);
    let best = evals.iter().rfind(|e| e.best).unwrap();
    assert_eq!(end.best_eval.as_ref(), Some(*best));
    assert!(evals.iter().all(|e| e.accuracy.unwrap() <= best.accuracy.unwrap()));
}

#[test]
fn the_worst_examples_are_those_of_the_best_evaluation_or_of_the_end() {
    let base = tiny("llama");
    let resolved = ResolvedTraining { eval_every: 2, worst_examples: 3, ..hyper(6) };
    let of = |validation: Arc<[Encoded]>| {
        let input = RunInput { validation, ..input(&base, Task::CausalLm, &lora(), resolved.clone()) };
        let (events, outcome) = finish(Run::new(Arc::clone(&base), None, input).unwrap());
        let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
        let told = events.into_iter().rev().find_map(|e| if let JobEventBody::Worst(w) = e { Some(w) } else { None });
        (told.unwrap(), end)
    };
    // one of the examples repeats a token that is nowhere else
    let mut odd = examples(Task::CausalLm, 12).to_vec();
    odd[5].tokens = vec![3, 60, 60, 3];
    odd[5].target = Target::Tokens(vec![false, true, true, true]);
    for (validation, held_out) in [(Arc::from(odd), true), (Arc::from([]), false)] {
        let (worst, end) = of(Arc::clone(&validation));
        let all = if held_out { validation } else { examples(Task::CausalLm, 40) };
        assert_eq!((worst.held_out, worst.of_validation, worst.examples.len()), (held_out, held_out, 3));
        let delta = Arc::new(end.delta);
        let mean = |e: &Encoded| {
            let each = flat(&losses(&base, Arc::clone(&delta), &[e], None).unwrap().each);
            f64::from(each.iter().sum::<f32>()) / each.len() as f64
        };
        let mut expected: Vec<(f64, u64)> = all.iter().map(|e| (mean(e), e.line)).collect();
        expected.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (told, (loss, line)) in worst.examples.iter().zip(&expected) {
            assert!((told.loss - loss).abs() < 1e-4, "{told:?} {loss} {line}");
        }
        if held_out {
            assert_eq!(worst.examples[0].line, 6);
            assert_eq!(Some(worst.step), end.best_eval.map(|e| e.step));
        }
    }
}

#[test]
fn forgetting_is_the_loss_with_the_delta_less_the_loss_without() {
    let base = tiny("llama");
    let held = examples(Task::CausalLm, 70);
    let input = RunInput { held: Arc::clone(&held), ..input(&base, Task::CausalLm, &lora(), hyper(5)) };
    let (events, outcome) = finish(Run::new(Arc::clone(&base), None, input).unwrap());
    let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
    let Some(JobEventBody::Forgetting(f)) = events.last() else { panic!("{events:?}") };
    let all: Vec<&Encoded> = held.iter().collect();
    let mean = |delta| {
        let each = flat(&losses(&base, Arc::new(delta), &all, None).unwrap().each);
        f64::from(each.iter().sum::<f32>()) / each.len() as f64
    };
    let bare = crate::delta::Delta::new(end.delta.spec.clone(), vec![], None);
    assert!((mean(bare) - f.base_loss).abs() < 1e-4 && (mean(end.delta) - f.delta_loss).abs() < 1e-4);
    assert!((f.base_loss - f.delta_loss).abs() > 1e-3, "the delta was trained on such texts: {f:?}");
}

#[test]
fn packing_changes_what_shares_a_step_not_what_an_example_sees() {
    let base = tiny("llama");
    let input = input(&base, Task::CausalLm, &lora(), hyper(10));
    let t = Trainable::init(&input.spec, &base.sites, 1, &base.device).unwrap();
    let each = |batch: &[&Encoded]| {
        let delta = Arc::new(t.detached().unwrap());
        flat(&losses(&base, delta, batch, None).unwrap().each)
    };
    let all: Vec<&Encoded> = input.train.iter().take(7).collect();
    let together = each(&all);
    let alone: Vec<f32> = all.iter().flat_map(|e| each(&[*e])).collect();
    assert!(together.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-4));
}

#[test]
fn a_prepared_request_runs() {
    let base = tiny("llama");
    let p = params(Task::CausalLm, lora());
    let spec = TrainSpec::resolve(&p.methods, p.task, &[], shape(&base)).unwrap();
    let prepared = Prepared {
        reply: PlanReply {
            resolved: hyper(3),
            trainable_parameters: 0,
            train_examples: 0,
            validation_examples: 0,
            train_tokens: 0,
            supervised_tokens: 0,
            longest_example: 0,
            memory: Default::default(),
            warnings: vec![],
        },
        spec,
        train: examples(Task::CausalLm, 5),
        held: Arc::from([]),
        replay: Arc::from([]),
        validation: Arc::from([]),
        start: None,
        separate_validation: false,
        decoder: Default::default(),
        quiz: Default::default(),
        lean: None,
        candidates: vec![],
    };
    assert!(train(&base, RunInput::from(&prepared)).final_loss.is_finite());
}
