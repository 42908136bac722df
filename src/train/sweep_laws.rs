//! Laws of sweeps: each candidate is what it is alone, the best by the job's figure wins, one that diverges leaves the others as
//! they are.
//!
//! "As alone" is up to rounding, since rows of several candidates share products: losses to 1e-4, weights to 1e-3 of their norm.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::Tensor;

use super::{
    batches::{Stream, rng},
    encode::{Encoded, Target},
    eval::better,
    gradients::{self, Gradients, Micro},
    laws::{examples, finish, flat, hyper, input, positions, tiny},
    method_laws::{BASES, all},
    objective::{Reads, Sequence, losses_of},
    optim::global_norm,
    plan::Candidate,
    resume_laws::busy,
    run::{Advance, Failed, Outcome, Run, RunInput, Sweep, Trained, Work},
    together,
    trainable::{NamedVar, Trainable},
};
use crate::{
    admission::train_params::{
        EvalEvent, EvalMetric, JobEventBody, LoraPart, MethodPart, ResolvedTraining, SweepCandidate, SweepEvent,
        with_rank,
    },
    delta::Task,
    model::Base,
};

pub(super) fn lora(dropout: f64) -> Vec<MethodPart> {
    vec![MethodPart::Lora(LoraPart { dropout: Some(dropout), ..LoraPart::default() })]
}

/// Smooth where gradients are small: the sign of one that is nothing but rounding does not decide a step.
pub(super) fn smooth(resolved: ResolvedTraining) -> ResolvedTraining {
    ResolvedTraining { eps: 1e-6, ..resolved }
}

/// Jobs that differ in learning rate and rank (0: that of the methods), and the sweep of them.
pub(super) fn sweep_of(
    base: &Base,
    task: Task,
    methods: &[MethodPart],
    resolved: &ResolvedTraining,
    candidates: &[(f64, u32)],
) -> (Vec<RunInput>, RunInput) {
    let alone: Vec<RunInput> = candidates
        .iter()
        .map(|(rate, rank)| {
            let methods = if *rank == 0 { methods.to_vec() } else { with_rank(methods, *rank) };
            let resolved = ResolvedTraining { learning_rate: *rate, ..resolved.clone() };
            RunInput { validation: examples(task, 7), ..input(base, task, &methods, resolved) }
        })
        .collect();
    let named =
        candidates.iter().map(|(learning_rate, rank)| SweepCandidate { learning_rate: *learning_rate, rank: *rank });
    let first = alone[0].clone();
    let whole = RunInput {
        resolved: ResolvedTraining { sweep: named.collect(), ..first.resolved.clone() },
        candidates: alone.iter().map(|a| Candidate { resolved: a.resolved.clone(), spec: a.spec.clone() }).collect(),
        ..first
    };
    (alone, whole)
}

/// By step, the loss and all variables after it.
pub(super) type History = BTreeMap<u32, (f64, Vec<f32>)>;

pub(super) fn note(history: &mut History, run: &Run) {
    let values = || run.trainable().vars().iter().flat_map(|v| flat(v.var.as_tensor())).collect();
    if run.step() > 0 {
        history.entry(run.step()).or_insert_with(|| (run.last_loss(), values()));
    }
}

pub(super) fn alone(base: &Arc<Base>, input: &RunInput) -> (History, Vec<JobEventBody>, Outcome) {
    let mut run = Run::new(Arc::clone(base), None, input.clone()).unwrap();
    let (mut history, mut all) = (History::new(), Vec::new());
    loop {
        let (events, end) = match run.advance() {
            Advance::More(events) => (events, None),
            Advance::Done(events, outcome) => (events, Some(*outcome)),
        };
        note(&mut history, &run);
        all.extend(events);
        if let Some(end) = end {
            return (history, all, end);
        }
    }
}

fn together_of(base: &Arc<Base>, input: &RunInput) -> (Vec<History>, Vec<JobEventBody>, Outcome) {
    let mut sweep = Sweep::new(Arc::clone(base), None, input.clone()).unwrap();
    let mut histories = vec![History::new(); input.candidates.len()];
    let mut all = Vec::new();
    loop {
        let (events, end) = match sweep.advance() {
            Advance::More(events) => (events, None),
            Advance::Done(events, outcome) => (events, Some(*outcome)),
        };
        for (history, run) in histories.iter_mut().zip(sweep.runs()) {
            run.into_iter().for_each(|run| note(history, run));
        }
        all.extend(events);
        if let Some(end) = end {
            return (histories, all, end);
        }
    }
}

pub(super) fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-4 * b.abs().max(1.0)
}

#[track_caller]
pub(super) fn assert_same(what: &str, got: &History, want: &History) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{what}: steps");
    for ((step, (loss, weights)), (wanted, values)) in got.iter().zip(want.values()) {
        assert!(near(*loss, *wanted), "{what} step {step}: loss {loss}, alone {wanted}");
        assert_eq!(weights.len(), values.len(), "{what}");
        let square = |x: f32| f64::from(x) * f64::from(x);
        let norm = values.iter().map(|v| square(*v)).sum::<f64>().sqrt();
        let apart = weights.iter().zip(values).map(|(a, b)| square(a - b)).sum::<f64>().sqrt();
        assert!(apart <= 1e-3 * norm, "{what} step {step}: weights are {apart} apart of {norm}");
    }
}

fn evals(events: &[JobEventBody], candidate: u32) -> Vec<EvalEvent> {
    let eval = |e: &JobEventBody| match e {
        JobEventBody::Eval(e) if e.candidate == candidate => Some(EvalEvent { candidate: 0, ..e.clone() }),
        _ => None,
    };
    events.iter().filter_map(eval).collect()
}

fn told(events: &[JobEventBody]) -> SweepEvent {
    let all: Vec<&SweepEvent> =
        events.iter().filter_map(|e| if let JobEventBody::Sweep(s) = e { Some(s) } else { None }).collect();
    assert_eq!(all.len(), 1, "told once");
    all[0].clone()
}

pub(super) fn trained(outcome: Outcome) -> Trained {
    match outcome {
        Outcome::Trained(t) => *t,
        Outcome::Failed(f) => panic!("{f:?}"),
    }
}

pub(super) fn failed(outcome: Outcome) -> Failed {
    match outcome {
        Outcome::Failed(f) => f,
        Outcome::Trained(_) => panic!("it is trained"),
    }
}

/// Away from the start, where many gradients are zero.
pub(super) fn shake(vars: &[NamedVar], seed: u64) {
    let mut draw = crate::model::testing::Rng(seed);
    for v in vars {
        let noise: Vec<f32> = (0..v.var.elem_count()).map(|_| 0.2 * draw.uniform() - 0.1).collect();
        let noise = Tensor::from_vec(noise, v.var.shape(), v.var.device()).unwrap();
        v.var.set(&(v.var.as_detached_tensor() + noise).unwrap()).unwrap();
    }
}

#[track_caller]
pub(super) fn assert_same_gradients(what: &str, vars: &[NamedVar], got: &Gradients, want: &Gradients) {
    for ((v, a), b) in vars.iter().zip(got).zip(want) {
        let (Some(a), Some(b)) = (a, b) else {
            let norm = global_norm(a.iter().chain(b)).unwrap();
            assert_eq!(norm, 0.0, "{what} {}: only one has a gradient", v.name);
            continue;
        };
        let (norm, apart) = (global_norm([b]).unwrap(), global_norm([&(a - b).unwrap()]).unwrap());
        assert!(apart <= 1e-4 * norm + 1e-5, "{what} {}: {apart} of {norm}", v.name);
    }
}

#[test]
fn gradients_of_every_method_on_every_family_are_those_of_each_delta_alone() {
    let dropout = ("lora with dropout", lora(0.3));
    for (family, task) in BASES {
        let base = tiny(family);
        let virtual_tokens = [("prompt", vec![positions::prompt(3)]), ("prefix", vec![positions::prefix(3)])];
        for (name, methods) in all().into_iter().chain([dropout.clone()]).chain(virtual_tokens) {
            let ranked = methods.iter().any(|m| matches!(m, MethodPart::Lora(_)));
            let made: Vec<(RunInput, Trainable)> = (1..4)
                .map(|i| {
                    let methods = if ranked { with_rank(&methods, 2 * i) } else { methods.clone() };
                    let input = input(&base, task, &methods, hyper(1));
                    let t = Trainable::init_on(&input.spec, &base, 3).unwrap();
                    shake(t.vars(), u64::from(i));
                    (input, t)
                })
                .collect();
            let examples: Vec<&Encoded> = made[0].0.train.iter().take(5).collect();
            let deltas: Vec<_> = made.iter().map(|(_, t)| t.delta(&mut rng(5, Stream::Dropout)).unwrap()).collect();
            let of = deltas.iter().zip(&made);
            let members: Vec<together::Member<'_>> = of
                .map(|(delta, (_, t))| {
                    let (delta, vars, examples) = (Arc::clone(delta), t.vars(), examples.as_slice());
                    together::Member { delta, vars, examples, smoothing: 0.1, weight: 5.0 }
                })
                .collect();
            let found = together::gradients(&base, &members, None).unwrap();
            for (i, ((loss, grads), (delta, (_, t)))) in found.iter().zip(deltas.iter().zip(&made)).enumerate() {
                let what = format!("{family} {task:?} {name}, candidate {i}");
                let sequences: Vec<Sequence<'_>> = examples.iter().map(|e| Sequence::from(*e)).collect();
                let losses: gradients::LossesOf<'_> =
                    &|hidden, cx| Ok(losses_of(&base, hidden, (&examples, &sequences), 0.1, cx)?.each);
                let (delta, pacer, reads) = (Arc::clone(delta), None, Reads::of(&examples));
                let micro = Micro { base: &base, delta, sequences: &sequences, losses, reads, weight: 5.0, pacer };
                let (alone, wanted) = gradients::whole(&micro, t.vars()).unwrap();
                assert!(near(*loss, alone), "{what}: {loss}, alone {alone}");
                assert_same_gradients(&what, t.vars(), grads, &wanted);
            }
        }
    }
}

#[test]
fn candidates_are_together_what_they_are_alone() {
    for (family, task, dropout) in [
        ("llama", Task::CausalLm, 0.2),
        ("bert", Task::SeqCls, 0.0),
        ("bert", Task::TokenCls, 0.1),
        ("t5", Task::Seq2Seq, 0.1),
    ] {
        let base = tiny(family);
        let resolved = smooth(busy(9));
        let named = [(1e-3, 2), (1e-2, 2), (1e-3, 5), (1e-2, 5)];
        let (jobs, whole) = sweep_of(&base, task, &lora(dropout), &resolved, &named);
        let (histories, events, end) = together_of(&base, &whole);
        let mut best: Option<(u32, EvalEvent)> = None;
        for (i, (history, job)) in histories.iter().zip(&jobs).enumerate() {
            let what = format!("{family} {task:?} {:?}", named[i]);
            let (wanted, said, _) = alone(&base, job);
            assert_eq!(wanted.len(), 9, "{what}");
            assert_same(&what, history, &wanted);
            let (got, want) = (evals(&events, i as u32 + 1), evals(&said, 0));
            assert_eq!(got.len(), want.len(), "{what}");
            for (got, want) in got.iter().zip(&want) {
                assert!(got.step == want.step && near(got.loss, want.loss), "{what}: {got:?} {want:?}");
                let replaced = best.as_ref().is_none_or(|(_, b)| better(got, b, resolved.eval_metric));
                best = if replaced { Some((i as u32 + 1, got.clone())) } else { best };
            }
        }
        let (winner, eval) = best.expect("evaluations");
        let result = trained(end).best_eval.expect("the evaluation of what is published");
        assert_eq!((result.candidate, result.step, result.loss), (winner, eval.step, eval.loss), "{family} {task:?}");
        let told = told(&events);
        assert_eq!(told.candidates.iter().map(|row| row.candidate).collect::<Vec<_>>(), whole.resolved.sweep);
        let won: Vec<usize> = (0..4).filter(|i| told.candidates[*i].won).collect();
        assert_eq!(won, [winner as usize - 1]);
        assert!(told.candidates.iter().all(|row| row.failed.is_empty() && row.step == 9 && row.best.is_some()));
    }
}

/// Six candidates share the bound on a micro-batch's rows, so each step is cut, and where examples are long, candidates go in
/// groups; neither shows in their dropout.
#[test]
fn a_step_that_is_cut_for_all_candidates_has_the_dropout_of_one_that_is_not() {
    use super::plan::micro_tokens_of_delta;
    let base = tiny("llama");
    let resolved = smooth(ResolvedTraining { batch_size: 40, eval_every: 3, ..hyper(4) });
    let named = [(1e-3, 2), (3e-3, 2), (1e-2, 2), (1e-3, 4), (3e-3, 4), (1e-2, 4)];
    let long = |i: u32| {
        let tokens: Vec<u32> = (0..200).map(|t| 3 + (7 * i + t * t + t) % 100).collect();
        Encoded::new(tokens, Target::Tokens((0..200).map(|t| t > 0).collect()))
    };
    let long: Arc<[Encoded]> = (0..2).map(long).collect();
    for (train, cut) in [(examples(Task::CausalLm, 20), 2), (long, 3 * 2)] {
        let (jobs, whole) = sweep_of(&base, Task::CausalLm, &lora(0.3), &resolved, &named);
        let with = |input: &RunInput| RunInput { train: Arc::clone(&train), ..input.clone() };
        let whole = with(&whole);
        let rows: usize = train.iter().map(Encoded::rows).sum();
        let most = micro_tokens_of_delta(true);
        assert!(rows < most && 6 * rows > most, "{rows}");
        let mut sweep = Sweep::new(Arc::clone(&base), None, whole.clone()).unwrap();
        let mut turns = 0;
        while sweep.step() == 0 {
            sweep.advance();
            turns += 1;
        }
        assert_eq!(turns, cut);
        let (histories, _, _) = together_of(&base, &whole);
        for (i, (history, job)) in histories.iter().zip(&jobs).enumerate() {
            assert_same(&format!("candidate {i}"), history, &alone(&base, &with(job)).0);
        }
    }
}

#[test]
fn the_best_by_the_figure_wins_whether_more_or_less_is_better() {
    let base = tiny("bert");
    for metric in [EvalMetric::Loss, EvalMetric::Accuracy] {
        let mut winners = Vec::new();
        for named in [[(1e-7, 0), (1e-2, 0)], [(1e-2, 0), (1e-7, 0)]] {
            let resolved = smooth(ResolvedTraining { eval_metric: metric, eval_every: 25, ..hyper(100) });
            let (_, whole) = sweep_of(&base, Task::SeqCls, &lora(0.0), &resolved, &named);
            let (_, events, end) = finish_work(&base, &whole);
            let event = told(&events);
            assert_eq!(event.metric, metric);
            let figures: Vec<f64> =
                event.candidates.iter().map(|row| metric.of(row.best.as_ref().unwrap()).unwrap()).collect();
            let won = event.candidates.iter().position(|row| row.won).unwrap();
            assert!(metric.gain(figures[won], figures[1 - won]) > 0.0, "{metric:?} {figures:?}: {won}");
            let best = trained(end).best_eval.unwrap();
            assert_eq!((best.candidate, metric.of(&best)), (won as u32 + 1, Some(figures[won])));
            winners.push(won);
        }
        assert_eq!(winners, [1, 0], "{metric:?}: the rate that learns, wherever it stands");
    }
}

fn finish_work(base: &Arc<Base>, input: &RunInput) -> (u32, Vec<JobEventBody>, Outcome) {
    let mut work = Work::new(Arc::clone(base), None, input.clone()).unwrap();
    let mut all = Vec::new();
    loop {
        match work.advance() {
            Advance::More(events) => all.extend(events),
            Advance::Done(events, outcome) => {
                all.extend(events);
                return (work.step(), all, *outcome);
            }
        }
    }
}

#[test]
fn what_is_published_and_told_of_the_examples_is_the_winners_alone() {
    let base = tiny("llama");
    let resolved = smooth(ResolvedTraining { eval_every: 4, worst_examples: 3, ..hyper(8) });
    let (jobs, whole) = sweep_of(&base, Task::CausalLm, &lora(0.1), &resolved, &[(1e-6, 2), (1e-2, 3)]);
    let held = examples(Task::CausalLm, 3);
    let whole = RunInput { held: Arc::clone(&held), ..whole };
    let (_, events, end) = finish_work(&base, &whole);
    let job = RunInput { held, ..jobs[1].clone() };
    let (said, wanted) = finish(Run::new(Arc::clone(&base), None, job).unwrap());
    let (end, wanted) = (trained(end), trained(wanted));
    assert_eq!(end.best_eval.as_ref().map(|e| e.candidate), Some(2));
    assert!(near(end.final_loss, wanted.final_loss));
    let numbers = |t: &Trained| -> Vec<f32> {
        t.delta.patches().iter().flat_map(|(_, p)| p.tensors()).flat_map(|(_, t)| flat(t)).collect()
    };
    let (got, want) = (numbers(&end), numbers(&wanted));
    assert_eq!(got.len(), want.len());
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 2e-3), "other weights");
    let worst = |events: &[JobEventBody]| -> Vec<(u32, Vec<u64>)> {
        let of = |e: &JobEventBody| match e {
            JobEventBody::Worst(w) => Some((w.step, w.examples.iter().map(|e| e.line).collect())),
            _ => None,
        };
        events.iter().filter_map(of).collect()
    };
    let (got, want) = (worst(&events), worst(&said));
    assert_eq!((got.len(), got.last()), (1, want.last()), "once, those of the best evaluation");
    let forgetting = |events: &[JobEventBody]| -> Vec<[f64; 2]> {
        let of = |e: &JobEventBody| match e {
            JobEventBody::Forgetting(f) => Some([f.base_loss, f.delta_loss]),
            _ => None,
        };
        events.iter().filter_map(of).collect()
    };
    let (got, want) = (forgetting(&events), forgetting(&said));
    assert_eq!((got.len(), want.len()), (1, 1));
    assert!(near(got[0][0], want[0][0]) && near(got[0][1], want[0][1]), "{got:?} {want:?}");
}

#[test]
fn each_candidate_has_a_patience_of_its_own() {
    let base = tiny("llama");
    let resolved = smooth(ResolvedTraining { eval_every: 2, patience: 2, min_delta: 0.02, ..hyper(12) });
    let (jobs, whole) = sweep_of(&base, Task::CausalLm, &lora(0.0), &resolved, &[(1e-7, 2), (1e-2, 2)]);
    let (histories, events, end) = together_of(&base, &whole);
    trained(end);
    let lens: Vec<usize> = histories.iter().map(History::len).collect();
    assert!(lens[0] == 6 && lens[1] > 6, "{lens:?}: three evaluations without a gain, or more steps");
    for (i, (history, job)) in histories.iter().zip(&jobs).enumerate() {
        assert_same(&format!("candidate {i}"), history, &alone(&base, job).0);
    }
    let early = |e: &JobEventBody| matches!(e, JobEventBody::Log(n) if n.code == "EARLY_STOP" && n.message.starts_with("candidate 1: "));
    assert!(events.iter().any(early), "{events:?}");
}

/// A decay of 100 x 2.4 per step multiplies the weights by -239.
pub(super) fn wild(rates: &[f64]) -> (ResolvedTraining, Vec<(f64, u32)>) {
    let resolved = ResolvedTraining { weight_decay: 2.4, clip_norm: 0.0, eval_every: 5, ..hyper(10) };
    (smooth(resolved), rates.iter().map(|rate| (*rate, 2)).collect())
}

#[test]
fn a_candidate_that_diverges_drops_out_and_the_others_go_on_as_alone() {
    let base = tiny("llama");
    let (resolved, named) = wild(&[1e-3, 100.0, 1e-2]);
    let (jobs, whole) = sweep_of(&base, Task::CausalLm, &lora(0.1), &resolved, &named);
    let (histories, events, end) = together_of(&base, &whole);
    for i in [0, 2] {
        let (wanted, _, _) = alone(&base, &jobs[i]);
        assert_eq!(wanted.len(), 10);
        assert_same(&format!("candidate {i}"), &histories[i], &wanted);
    }
    let why = failed(alone(&base, &jobs[1]).2);
    assert!(["NON_FINITE_LOSS", "DIVERGED"].contains(&why.code), "{}", why.code);
    let warned: Vec<&str> = events
        .iter()
        .filter_map(|e| match e {
            JobEventBody::Warning(n) if n.code == "CANDIDATE_FAILED" => Some(n.message.as_str()),
            _ => None,
        })
        .collect();
    let [warned] = warned[..] else { panic!("{warned:?}") };
    assert!(warned.starts_with("candidate 2 (learning rate 100, rank 2) drops out: "), "{warned}");
    assert!(warned.contains("step"), "{warned}");
    let told = told(&events);
    assert!(!told.candidates[1].failed.is_empty() && !told.candidates[1].won);
    assert!(told.candidates[0].failed.is_empty() && told.candidates[2].failed.is_empty());
    let best = trained(end).best_eval.expect("an evaluation");
    assert!(best.candidate == 1 || best.candidate == 3, "{best:?}");
}

#[test]
fn a_sweep_fails_when_all_candidates_have_diverged() {
    let base = tiny("llama");
    let (resolved, named) = wild(&[100.0, 200.0]);
    let (_, whole) = sweep_of(&base, Task::CausalLm, &lora(0.0), &resolved, &named);
    let (_, events, end) = finish_work(&base, &whole);
    let end = failed(end);
    assert!(["NON_FINITE_LOSS", "DIVERGED"].contains(&end.code), "{}", end.code);
    assert!(end.message.starts_with("all 2 candidates dropped out") && end.message.contains("step"), "{}", end.message);
    assert!(end.checkpoint.is_some(), "the last good weights are kept as of any job");
    assert!(told(&events).candidates.iter().all(|row| !row.won && !row.failed.is_empty()));
}
