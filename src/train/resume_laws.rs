//! Laws of checkpoints: a run that stops anywhere and goes on from its bytes ends bit for bit as one that does not stop.

use std::sync::Arc;

use super::{
    laws::{examples, hyper, input, positions, tiny},
    method_laws::all,
    run::{Advance, Failed, Outcome, Run, RunInput, Trained},
    transfer::StartingDelta,
    transfer_laws::{continuing, plan},
};
use crate::{
    admission::train_params::{
        BitfitPart, EvalMetric, JobEventBody, LoraInit, LoraPart, MethodPart, ResolvedTraining, Schedule,
    },
    delta::{Delta, Task},
    ids::DeltaId,
    model::Base,
};

/// What a run says that is the same on every machine, and what each step came to.
type Story = Vec<String>;

/// Advances to the end, or `n` times.
fn go(run: &mut Run, n: usize, story: &mut Story) -> Option<Outcome> {
    for _ in 0..n {
        let before = run.step();
        let (events, end) = match run.advance() {
            Advance::More(events) => (events, None),
            Advance::Done(events, outcome) => (events, Some(*outcome)),
        };
        if run.step() != before {
            story.push(format!("step {}: {:x}", run.step(), run.last_loss().to_bits()));
        }
        // metrics are thinned out by the clock
        story.extend(events.iter().filter(|e| !matches!(e, JobEventBody::Metrics(_))).map(|e| format!("{e:?}")));
        if end.is_some() {
            return end;
        }
    }
    None
}

fn trained(outcome: Option<Outcome>) -> Trained {
    match outcome {
        Some(Outcome::Trained(t)) => *t,
        other => panic!("{other:?}"),
    }
}

fn numbers(delta: &Delta) -> Vec<Vec<f32>> {
    let patches = delta.patches().iter().flat_map(|(_, p)| p.tensors()).map(|(_, t)| t);
    let head = delta.head().into_iter().flat_map(|h| h.tensors()).map(|(_, t)| t);
    patches.chain(head).map(|t| t.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

/// Stops after each of these numbers of micro-steps (all of them: 0), and compares with the run that goes through.
#[track_caller]
pub(super) fn assert_goes_on(base: &Arc<Base>, what: &str, stops: &[usize], input: &dyn Fn() -> RunInput) {
    let start = || Run::new(Arc::clone(base), None, input()).unwrap();
    let (mut told, mut micro, mut run) = (Story::new(), 0, start());
    let straight = loop {
        micro += 1;
        if let Some(end) = go(&mut run, 1, &mut told) {
            break trained(Some(end));
        }
    };
    let all: Vec<usize> = (1..micro).collect();
    let stops = if stops.is_empty() { &all } else { stops };
    for &stop in stops.iter().filter(|s| **s < micro) {
        let (mut story, mut run) = (Story::new(), start());
        assert!(go(&mut run, stop, &mut story).is_none());
        let Some(bytes) = run.to_bytes().unwrap() else { continue };
        let step = run.step();
        drop(run);
        let mut run = Run::from_bytes(Arc::clone(base), None, input(), &bytes).unwrap();
        assert_eq!(run.step(), step);
        assert!(run.to_bytes().unwrap().as_deref() == Some(&bytes[..]), "{what}: other bytes after {stop}");
        let end = trained(go(&mut run, usize::MAX, &mut story));
        assert_eq!(story, told, "{what}: stopped after {stop} micro-steps, at step {step}");
        assert!(end.runners == straight.runners, "{what}: other evaluations are kept, stopped after {stop}");
        assert!(end.checkpoint == straight.checkpoint, "{what}: other weights, stopped after {stop} (step {step})");
        assert_eq!(numbers(&end.delta), numbers(&straight.delta), "{what} {stop}");
        assert_eq!(
            (end.final_loss.to_bits(), end.best_eval),
            (straight.final_loss.to_bits(), straight.best_eval.clone())
        );
    }
}

fn lora(part: LoraPart) -> Vec<MethodPart> {
    vec![MethodPart::Lora(LoraPart { rank: Some(4), ..part })]
}

/// Everything that has a state: warmup and decay of the rate, decay of weights, accumulation, evaluations.
pub(super) fn busy(steps: u32) -> ResolvedTraining {
    ResolvedTraining {
        schedule: Schedule::Cosine,
        warmup_steps: 3,
        weight_decay: 0.01,
        grad_accumulation: 2,
        batch_size: 3,
        eval_every: 4,
        ..hyper(steps)
    }
}

fn evaluated(input: RunInput) -> RunInput {
    RunInput { validation: examples(input.resolved.task, 7), ..input }
}

#[test]
fn every_method_goes_on_bit_for_bit() {
    let more = [
        ("prefix", vec![positions::prefix(3)]),
        ("projected prefix", vec![positions::projected(3)]),
        ("prompt", vec![positions::prompt(3)]),
        ("p-tuning", vec![positions::p_tuning(3)]),
        ("pissa", lora(LoraPart { init: LoraInit::Pissa, ..LoraPart::default() })),
    ];
    for (family, task) in [("llama", Task::CausalLm), ("bert", Task::SeqCls)] {
        let base = tiny(family);
        for (name, methods) in all().into_iter().chain(more.clone()) {
            let of = || evaluated(input(&base, task, &methods, ResolvedTraining { eval_every: 2, ..busy(5) }));
            assert_goes_on(&base, &format!("{family} {name}"), &[3, 8], &of);
        }
    }
    let base = tiny("t5");
    for methods in [lora(LoraPart::default()), vec![positions::prompt(3)]] {
        let of = || evaluated(input(&base, Task::Seq2Seq, &methods, busy(5)));
        assert_goes_on(&base, "t5", &[4, 7], &of);
    }
}

#[test]
fn a_run_may_stop_at_any_micro_step() {
    let base = tiny("llama");
    let dropout = |p| lora(LoraPart { dropout: Some(p), ..LoraPart::default() });
    for (p, packing) in [(0.0, false), (0.2, false), (0.1, true)] {
        let resolved = ResolvedTraining { packing, ..busy(12) };
        let of = || {
            let held = examples(Task::CausalLm, 3);
            RunInput { held, ..evaluated(input(&base, Task::CausalLm, &dropout(p), resolved.clone())) }
        };
        assert_goes_on(&base, &format!("dropout {p}, packing {packing}"), &[], &of);
    }
    // after the last step: a pass that tells the worst of the training examples, and the held text
    let of = || {
        let resolved = ResolvedTraining { worst_examples: 3, ..busy(4) };
        let held = examples(Task::CausalLm, 3);
        RunInput { held, ..input(&base, Task::CausalLm, &dropout(0.0), resolved) }
    };
    assert_goes_on(&base, "the worst are told once", &[], &of);
    // more than one epoch, and the last evaluations without a gain
    let methods = [lora(LoraPart::default()), vec![MethodPart::Bitfit(BitfitPart::default())]].concat();
    let base = tiny("bert");
    let of = || {
        let resolved = ResolvedTraining {
            patience: 3,
            min_delta: 0.4,
            eval_every: 2,
            eval_metric: EvalMetric::Accuracy,
            label_smoothing: 0.1,
            ..busy(60)
        };
        evaluated(input(&base, Task::SeqCls, &methods, resolved))
    };
    assert_goes_on(&base, "early stopping", &[], &of);
    let mut story = Story::new();
    trained(go(&mut Run::new(Arc::clone(&base), None, of()).unwrap(), usize::MAX, &mut story));
    assert!(story.iter().any(|s| s.contains("EARLY_STOP")), "its patience does not run out: {story:?}");
}

#[test]
fn ewc_holds_on_to_the_same_values_after_a_stop() {
    let base = tiny("llama");
    let first = input(&base, Task::CausalLm, &lora(LoraPart::default()), hyper(4));
    let old = trained(go(&mut Run::new(Arc::clone(&base), None, first).unwrap(), usize::MAX, &mut Story::new()));
    let from = StartingDelta::new("old@1".into(), DeltaId::from_bytes([1; 32]), Arc::new(old.delta), ());
    let data: String = (1..9).map(|i| format!("{{\"text\": \"{}\"}}\n", "!#$%&".repeat(i))).collect();
    let mut p = continuing(Task::CausalLm);
    p.hyper.max_steps = Some(5);
    p.hyper.batch_size = Some(2);
    p.hyper.learning_rate = Some(1e-2);
    p.ewc.iter_mut().for_each(|e| e.lambda = 1e5);
    let planned = plan(&base, &p, &data, &from, &data);
    assert!(planned.start.as_ref().is_some_and(|s| s.ewc.is_some()));
    assert_goes_on(&base, "ewc", &[], &|| RunInput::from(&planned));
    let mut early = Run::new(Arc::clone(&base), None, RunInput::from(&planned)).unwrap();
    go(&mut early, 3, &mut Story::new());
    assert_eq!(early.to_bytes().unwrap(), None, "while the information is gathered there is nothing to keep");
}

#[test]
fn a_run_that_fails_after_a_stop_keeps_the_same_weights() {
    let base = tiny("llama");
    // a decay of 1 x 2.4 multiplies the weights by -1.4 in each step, until they are out of range
    let of = || {
        let wild = ResolvedTraining { learning_rate: 1.0, weight_decay: 2.4, clip_norm: 0.0, ..hyper(4000) };
        input(&base, Task::CausalLm, &lora(LoraPart::default()), wild)
    };
    let failed = |outcome: Option<Outcome>| match outcome {
        Some(Outcome::Failed(Failed { code, message, checkpoint })) => (code, message, checkpoint),
        other => panic!("{other:?}"),
    };
    let mut story = Story::new();
    let straight = failed(go(&mut Run::new(Arc::clone(&base), None, of()).unwrap(), usize::MAX, &mut story));
    assert!(straight.2.is_some() && story.len() > 11, "{} steps", story.len());
    for stop in [1, 10, 11, story.len() - 1] {
        let mut run = Run::new(Arc::clone(&base), None, of()).unwrap();
        go(&mut run, stop, &mut Story::new());
        let bytes = run.to_bytes().unwrap().unwrap();
        let mut run = Run::from_bytes(Arc::clone(&base), None, of(), &bytes).unwrap();
        let end = failed(go(&mut run, usize::MAX, &mut Story::new()));
        assert!(end == straight, "stopped after {stop}: {} {}", end.0, end.1);
    }
}

#[test]
fn what_a_checkpoint_does_not_belong_to_is_refused_by_name() {
    let base = tiny("llama");
    let of = || evaluated(input(&base, Task::CausalLm, &lora(LoraPart::default()), busy(12)));
    let mut run = Run::new(Arc::clone(&base), None, of()).unwrap();
    go(&mut run, 7, &mut Story::new());
    let bytes = run.to_bytes().unwrap().unwrap();
    let says = |base: &Arc<Base>, input: RunInput, bytes: &[u8]| {
        let checked = input.check_resumes(bytes, &base.fingerprint).map_err(|e| e.to_string());
        let made = Run::from_bytes(Arc::clone(base), None, input, bytes).map(|run| run.step());
        assert_eq!(made.map_err(|e| e.to_string()), checked, "both say the same");
        checked
    };
    assert_eq!(says(&base, of(), &bytes), Ok(run.step()));
    let mut other = of();
    other.train = other.train.iter().cloned().rev().collect();
    assert!(says(&base, other, &bytes).unwrap_err().contains("other examples"));
    let mut other = of();
    other.validation = examples(Task::CausalLm, 6);
    assert!(says(&base, other, &bytes).unwrap_err().contains("other examples"));
    let mut other = of();
    other.resolved.learning_rate *= 2.0;
    assert!(says(&base, other, &bytes).unwrap_err().contains("other hyper-parameters"));
    let another = Arc::new(crate::model::testing::random_base(&crate::model::testing::tiny_llama(), 8).unwrap());
    let error = says(&another, of(), &bytes).unwrap_err();
    assert!(error.contains("belongs to the base") && error.contains(&another.fingerprint.to_string()), "{error}");
    for torn in [&bytes[..bytes.len() / 2], &bytes[..5], b"nonsense", b""] {
        assert!(says(&base, of(), torn).unwrap_err().contains("unreadable"));
    }
    let delta = trained(go(&mut run, usize::MAX, &mut Story::new())).checkpoint.unwrap();
    assert!(says(&base, of(), &delta).unwrap_err().contains("it is no run"), "weights are not a run");
}
