//! What a request says of holding on to the base, and of keeping several evaluations' weights: what it cannot be had with.

use super::violation;
use crate::{
    admission::{
        params::Violation,
        train_params::{MethodPart, TrainParams},
    },
    delta::Problem,
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
        assert_eq!(wished.memory.parameters, 3 * plain.memory.parameters);
        // what is kept beside changes nothing in what is trained; what holds on to the base does
        let of = |reply: &crate::admission::train_params::PlanReply| reply.resolved.of_training();
        assert_ne!(of(&plain), of(&wished));
        p.hyper.kl_to_base = None;
        assert_eq!(of(&plain), of(&run(&p, &texts, None).unwrap().reply));
        p.validation = None;
        assert_eq!(run(&p, &texts, None).unwrap_err()[0].field, "hyper.keep_best");
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
