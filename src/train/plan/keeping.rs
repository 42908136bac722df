//! What a request says of holding on to the base, and of keeping several evaluations' weights: what it cannot be had with.

use super::violation;
use crate::{
    admission::{
        params::Violation,
        train_params::{MethodPart, ResolvedTraining, TrainParams},
    },
    delta::Problem,
    train::{run::KEEP_EVERY, spec::TrainSpec},
};

/// Wishes that this job cannot fulfil, by name.
pub(super) fn problems(params: &TrainParams) -> Vec<Violation> {
    let mut problems = Vec::new();
    let h = &params.hyper;
    if let Some(kl) = h.kl_to_base.filter(|kl| *kl != 0.0) {
        let mut refuse = |why: String| problems.push(violation("hyper.kl_to_base", format!("is {kl}; {why}")));
        if let Some(p) = &params.preference {
            let name = p.method.as_str();
            refuse(format!("{name} has a loss of its own: leave it out, or raise preference.beta"));
        } else if !params.task.generates() {
            let task = match params.problem {
                Problem::SingleLabel => params.task.as_str(),
                other => other.as_str(),
            };
            refuse(format!("the base has no head for {task} to compare with; accepted is 0 (off)"));
        }
    }
    if let Some(most) = h.keep_best.filter(|most| *most > 1) {
        let mut refuse = |why: &str| problems.push(violation("hyper.keep_best", format!("is {most}; {why}")));
        if params.validation.is_none() {
            refuse("more than 1 needs examples for evaluation: validation_data or validation_fraction");
        }
        if params.methods.contains(&MethodPart::Full) {
            refuse("full fine-tuning keeps the best model only: accepted is 1");
        }
        if h.keep_last {
            refuse("keep_last publishes the last evaluation's weights, whichever are the best: give one of the two");
        }
    }
    problems
}

/// How many times a run has the values of what it trains: the variables, the last good ones (`Run::good`), those whose loss is
/// not known yet (`Run::unproven`, from step [`KEEP_EVERY`] on), and those of the best evaluations. Of a whole model,
/// [`TrainSpec::memory`] counts the one copy that there is.
pub(super) fn copies(resolved: &ResolvedTraining, spec: &TrainSpec, evaluates: bool) -> u64 {
    if spec.full.is_some() {
        return 1;
    }
    let unproven = resolved.total_steps >= KEEP_EVERY;
    let best = if evaluates { resolved.keep_best.max(1) } else { 0 };
    2 + u64::from(unproven) + u64::from(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::train_params::{HyperParams, PreferenceMethod, PreferenceParams, Validation},
        delta::Task,
        train::plan::tests::{lora, params, run},
    };

    fn said(params: &TrainParams) -> Vec<String> {
        problems(params).into_iter().map(|v| format!("{}: {}", v.field, v.message)).collect()
    }

    fn held(task: Task, kl: f64) -> TrainParams {
        TrainParams { hyper: HyperParams { kl_to_base: Some(kl), ..HyperParams::default() }, ..params(task, lora()) }
    }

    #[test]
    fn the_base_is_held_on_to_where_it_has_something_to_say() {
        for task in [Task::CausalLm, Task::Seq2Seq] {
            assert!(said(&held(task, 0.1)).is_empty());
        }
        let full = TrainParams { methods: vec![MethodPart::Full], ..held(Task::CausalLm, 0.1) };
        assert!(said(&full).is_empty());
        for task in [Task::SeqCls, Task::TokenCls] {
            let all = said(&held(task, 0.1));
            let [one] = &all[..] else { panic!("{task:?} {all:?}") };
            assert!(one.starts_with("hyper.kl_to_base: is 0.1; the base has no head for"), "{one}");
            assert!(one.contains(task.as_str()) && said(&held(task, 0.0)).is_empty(), "{one}");
        }
        let regression = TrainParams { problem: Problem::Regression, ..held(Task::SeqCls, 2.0) };
        assert!(said(&regression)[0].contains("regression"));
        for method in [PreferenceMethod::Dpo, PreferenceMethod::Orpo, PreferenceMethod::Kto] {
            let preference = Some(PreferenceParams::of(method));
            let all = said(&TrainParams { preference, ..held(Task::CausalLm, 0.1) });
            let [one] = &all[..] else { panic!("{method:?} {all:?}") };
            assert!(one.contains(method.as_str()) && one.contains("preference.beta"), "{one}");
        }
    }

    #[test]
    fn several_evaluations_are_kept_where_there_are_evaluations_to_rank() {
        let keeps = |most, validation, keep_last, methods| {
            let hyper = HyperParams { keep_best: Some(most), keep_last, ..HyperParams::default() };
            TrainParams { hyper, validation, methods, ..params(Task::CausalLm, vec![]) }
        };
        let some = || Some(Validation::Fraction(0.1));
        assert!(said(&keeps(3, some(), false, lora())).is_empty());
        assert!(said(&keeps(1, None, true, vec![MethodPart::Full])).is_empty());
        let all = said(&keeps(3, None, true, vec![MethodPart::Full]));
        assert_eq!(all.len(), 3);
        for (one, word) in all.iter().zip(["validation_fraction", "full fine-tuning", "keep_last"]) {
            assert!(one.starts_with("hyper.keep_best: is 3; ") && one.contains(word), "{one}");
        }
    }

    #[test]
    fn they_are_resolved_counted_and_refused_by_the_plan() {
        let texts: String = (0..20).map(|i| format!("{{\"text\": \"number {i}\"}}\n")).collect();
        let mut p = params(Task::CausalLm, lora());
        p.validation = Some(Validation::Fraction(0.2));
        let plain = run(&p, &texts, None).unwrap().reply;
        assert_eq!((plain.resolved.kl_to_base, plain.resolved.keep_best), (0.0, 1));
        (p.hyper.kl_to_base, p.hyper.keep_best) = (Some(0.25), Some(3));
        let wished = run(&p, &texts, None).unwrap().reply;
        assert_eq!((wished.resolved.kl_to_base, wished.resolved.keep_best), (0.25, 3));
        // what is kept beside changes nothing in what is trained; what holds on to the base does
        let of = |reply: &crate::admission::train_params::PlanReply| reply.resolved.of_training();
        assert_ne!(of(&plain), of(&wished));
        p.hyper.kl_to_base = None;
        assert_eq!(of(&plain), of(&run(&p, &texts, None).unwrap().reply));
        p.validation = None;
        assert_eq!(run(&p, &texts, None).unwrap_err()[0].field, "hyper.keep_best");
    }

    #[test]
    fn every_copy_that_a_run_keeps_is_in_the_estimate() {
        let texts: String = (0..20).map(|i| format!("{{\"text\": \"number {i}\"}}\n")).collect();
        let copies = |steps: u32, keep_best, validation| {
            let mut p = TrainParams { validation, ..params(Task::CausalLm, lora()) };
            p.hyper = HyperParams { max_steps: Some(steps), epochs: Some(100.0), keep_best, ..HyperParams::default() };
            let reply = run(&p, &texts, None).unwrap().reply;
            assert_eq!(reply.resolved.total_steps, steps);
            let once = 4 * reply.trainable_parameters;
            assert_eq!((reply.memory.optimizer, reply.memory.parameters % once), (2 * once, 0));
            reply.memory.parameters / once
        };
        let some = || Some(Validation::Fraction(0.2));
        // the variables and the last good ones; those without a loss yet; those of evaluations
        assert_eq!((copies(KEEP_EVERY - 1, None, None), copies(KEEP_EVERY, None, None)), (2, 3));
        assert_eq!((copies(5, None, some()), copies(50, None, some()), copies(50, Some(4), some())), (3, 4, 7));
    }

    /// What is planned for is what a run comes to hold.
    #[test]
    fn a_run_holds_as_many_copies_as_are_planned_for() {
        use crate::train::{
            laws::{self, hyper, input, tiny},
            run::{Advance, Run, RunInput},
        };
        let base = tiny("llama");
        let resolved = ResolvedTraining { eval_every: 2, keep_best: 2, ..hyper(KEEP_EVERY) };
        let wanted = input(&base, Task::CausalLm, &laws::lora(), resolved);
        let wanted = RunInput { validation: wanted.train.clone(), ..wanted };
        let most = copies(&wanted.resolved, &wanted.spec, true);
        let mut run = Run::new(base, None, wanted).unwrap();
        let mut held = 0;
        while let Advance::More(_) = run.advance() {
            held = held.max(run.copies());
        }
        assert_eq!((held as u64, most), (most, 5));
    }

    #[test]
    fn records_without_them_read_back_and_have_the_digest_that_they_had() {
        let texts = "{\"text\": \"one\"}\n{\"text\": \"two\"}";
        let resolved = run(&params(Task::CausalLm, lora()), texts, None).unwrap().reply.resolved;
        let stored = serde_json::to_string(&resolved).unwrap();
        assert!(!stored.contains("kl_to_base") && !stored.contains("keep_best"), "{stored}");
        let back: crate::admission::train_params::ResolvedTraining = serde_json::from_str(&stored).unwrap();
        assert_eq!(back, resolved);
    }
}
