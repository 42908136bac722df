//! Laws of keeping several evaluations: which are kept, and that their weights are those that were evaluated.

use std::sync::Arc;

use super::{
    encode::Encoded,
    laws::{examples, finish, flat, hyper, input, lora, positions, tiny},
    objective::losses,
    resume_laws::{assert_goes_on, busy},
    run::{Outcome, Run, RunInput},
};
use crate::{
    admission::train_params::{EvalEvent, EvalMetric, JobEventBody, MethodPart, ResolvedTraining},
    delta::Task,
    model::Base,
};

fn evaluated(base: &Base, task: Task, methods: &[MethodPart], resolved: ResolvedTraining) -> RunInput {
    RunInput { validation: examples(task, 12), ..input(base, task, methods, resolved) }
}

#[test]
fn the_next_best_are_kept_with_the_weights_that_were_evaluated() {
    let cases = [
        ("llama", Task::CausalLm, lora(), EvalMetric::Loss),
        ("llama", Task::CausalLm, vec![positions::p_tuning(3)], EvalMetric::Loss),
        ("bert", Task::SeqCls, lora(), EvalMetric::Accuracy),
        ("t5", Task::Seq2Seq, lora(), EvalMetric::Loss),
    ];
    for (family, task, methods, eval_metric) in cases {
        let base = tiny(family);
        // a high rate, so that evaluations go up and down
        let resolved = ResolvedTraining { eval_every: 2, eval_metric, keep_best: 3, learning_rate: 5e-2, ..hyper(18) };
        let of = || evaluated(&base, task, &methods, resolved.clone());
        let (events, outcome) = finish(Run::new(Arc::clone(&base), None, of()).unwrap());
        let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
        let mut evals: Vec<EvalEvent> =
            events.into_iter().filter_map(|e| if let JobEventBody::Eval(e) = e { Some(e) } else { None }).collect();
        assert_eq!(evals.len(), 9);
        // best first; a stable sort leaves equal ones in their order
        evals.sort_by(|a, b| {
            let by_figure = match eval_metric {
                EvalMetric::Accuracy => b.accuracy.unwrap().total_cmp(&a.accuracy.unwrap()),
                _ => std::cmp::Ordering::Equal,
            };
            by_figure.then(a.loss.total_cmp(&b.loss))
        });
        assert_eq!(end.best_eval.as_ref().map(|e| e.step), Some(evals[0].step), "{family}");
        let steps: Vec<u32> = end.runners.iter().map(|r| r.step).collect();
        assert_eq!(steps, [evals[1].step, evals[2].step], "{family}");
        let held = examples(task, 12);
        let held: Vec<&Encoded> = held.iter().collect();
        for (runner, eval) in end.runners.iter().zip(&evals[1..]) {
            assert_eq!(runner.figure, eval_metric.of(eval), "{family}");
            let delta = Run::delta_of(Arc::clone(&base), of(), &runner.bytes).unwrap();
            let each = flat(&losses(&base, Arc::new(delta), &held, None).unwrap().each);
            let mean = f64::from(each.iter().sum::<f32>()) / each.len() as f64;
            assert!((mean - eval.loss).abs() < 1e-4 * (1.0 + eval.loss), "{family}: {mean} {}", eval.loss);
        }
        // bytes of other variables
        if task == Task::SeqCls {
            let other = evaluated(&base, task, &[], resolved.clone());
            assert!(Run::delta_of(Arc::clone(&base), other, &end.runners[0].bytes).is_err());
        }
        assert!(Run::delta_of(Arc::clone(&base), of(), b"nonsense").is_err());
    }
}

#[test]
fn by_default_only_the_best_is_kept_and_it_is_the_same_one() {
    let base = tiny("llama");
    let end = |keep_best| {
        let resolved = ResolvedTraining { eval_every: 2, keep_best, learning_rate: 5e-2, ..hyper(12) };
        let input = evaluated(&base, Task::CausalLm, &lora(), resolved);
        match finish(Run::new(Arc::clone(&base), None, input).unwrap()).1 {
            Outcome::Trained(t) => *t,
            outcome => panic!("{outcome:?}"),
        }
    };
    let (one, eight) = (end(1), end(8));
    assert!(one.checkpoint.is_some() && one.checkpoint == eight.checkpoint);
    assert_eq!((one.best_eval, one.runners.len(), eight.runners.len()), (eight.best_eval, 0, 5));
}

#[test]
fn a_run_that_stops_keeps_the_same_ones_and_stays_as_near_to_the_base() {
    let some = &[4, 9, 14][..];
    for (family, task, methods, stops) in [
        ("llama", Task::CausalLm, lora(), &[][..]), // all of them
        ("llama", Task::CausalLm, vec![positions::prompt(3)], some),
        ("t5", Task::Seq2Seq, lora(), some),
    ] {
        let base = tiny(family);
        let resolved =
            ResolvedTraining { eval_every: 2, keep_best: 3, kl_to_base: 0.4, learning_rate: 5e-2, ..busy(9) };
        let of = || evaluated(&base, task, &methods, resolved.clone());
        assert_goes_on(&base, &format!("{family}, three best"), stops, &of);
    }
}

#[test]
fn a_checkpoint_of_before_there_were_several_is_read() {
    let base = tiny("llama");
    let of = |keep_best| {
        let resolved = ResolvedTraining { eval_every: 1, keep_best, ..hyper(6) };
        evaluated(&base, Task::CausalLm, &lora(), resolved)
    };
    let mut run = Run::new(Arc::clone(&base), None, of(1)).unwrap();
    while run.step() < 4 {
        run.advance();
    }
    let bytes = run.to_bytes().unwrap().unwrap();
    // the same without the word for the others, of the same length
    let (word, pad) = ("\\\"runners\\\":[],", " ".repeat("\\\"runners\\\":[],".len()));
    let at = bytes.windows(word.len()).position(|w| w == word.as_bytes()).expect("it is there");
    let mut old = bytes.clone();
    old[at..at + word.len()].copy_from_slice(pad.as_bytes());
    for (bytes, keep_best) in [(&bytes, 1), (&old, 1), (&old, 3)] {
        let run = Run::from_bytes(Arc::clone(&base), None, of(keep_best), bytes).unwrap();
        let (_, Outcome::Trained(end)) = finish(run) else { panic!("it fails") };
        assert!(end.runners.len() < keep_best as usize && end.best_eval.is_some());
    }
}
