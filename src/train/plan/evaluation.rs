//! What a request says of its evaluations: the figure that decides, and for how long there may be no gain.

use super::violation;
use crate::{
    admission::{
        params::Violation,
        train_params::{EvalMetric, TrainParams},
    },
    delta::Problem,
    train::eval::{METRICS_OF_PREFERENCES, metrics_of},
};

/// The figure that chooses the best checkpoint. Adds a figure that the task's evaluations do not have, and wishes that need
/// an evaluation where there is none, to the problems.
pub(super) fn metric(params: &TrainParams, labels: &[String], problems: &mut Vec<Violation>) -> EvalMetric {
    let h = &params.hyper;
    let known = match params.preference {
        Some(_) => METRICS_OF_PREFERENCES.to_vec(),
        None => metrics_of(params.task, params.problem, labels),
    };
    let metric = match &h.eval_metric {
        None => known.first().copied(),
        Some(name) => known.iter().copied().find(|m| m.as_str() == name),
    };
    if let (None, Some(name)) = (metric, &h.eval_metric) {
        let names: Vec<&str> = known.iter().map(|m| m.as_str()).collect();
        let message = format!("is {name:?}; evaluations of this task have {}", names.join(", "));
        problems.push(violation("hyper.eval_metric", message));
    }
    let wishes = [("eval_metric", h.eval_metric.is_some()), ("patience", h.patience.is_some())];
    for (field, _) in wishes.iter().filter(|(_, given)| *given && params.validation.is_none()) {
        let message = "needs examples for evaluation: validation_data or validation_fraction";
        problems.push(violation(&format!("hyper.{field}"), message));
    }
    if h.min_delta.is_some() && h.patience.is_none() {
        problems.push(violation("hyper.min_delta", "is given without patience, which it is for"));
    }
    if params.problem != Problem::SingleLabel && h.label_smoothing.is_some_and(|s| s > 0.0) {
        let message = format!("smooths one label of several; this job is {}", params.problem.as_str());
        problems.push(violation("hyper.label_smoothing", message));
    }
    metric.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::train_params::{HyperParams, Validation},
        delta::Task,
        train::plan::tests::{lora, params},
    };

    fn metric_of(hyper: &HyperParams, task: Task, labels: &[&str], evaluates: bool) -> Result<EvalMetric, Vec<String>> {
        let labels: Vec<String> = labels.iter().map(|l| (*l).to_owned()).collect();
        let mut problems = Vec::new();
        let validation = evaluates.then_some(Validation::Fraction(0.1));
        let wanted = TrainParams { hyper: hyper.clone(), validation, ..params(task, lora()) };
        let metric = metric(&wanted, &labels, &mut problems);
        if problems.is_empty() {
            Ok(metric)
        } else {
            Err(problems.into_iter().map(|v| v.field + " " + &v.message).collect())
        }
    }

    #[test]
    fn a_task_has_its_own_figures_and_a_default() {
        let by = |name: &str| HyperParams { eval_metric: Some(name.into()), ..HyperParams::default() };
        let unset = HyperParams::default();
        let (tags, parts) = (["O", "B-x"], ["NOUN", "VERB"]);
        assert_eq!(metric_of(&unset, Task::SeqCls, &tags, false), Ok(EvalMetric::Accuracy));
        assert_eq!(metric_of(&unset, Task::TokenCls, &tags, true), Ok(EvalMetric::SpanF1));
        assert_eq!(metric_of(&unset, Task::TokenCls, &parts, true), Ok(EvalMetric::Accuracy));
        assert_eq!(metric_of(&unset, Task::CausalLm, &[], true), Ok(EvalMetric::Loss));
        assert_eq!(metric_of(&unset, Task::Seq2Seq, &[], true), Ok(EvalMetric::Loss));
        assert_eq!(metric_of(&by("perplexity"), Task::Seq2Seq, &[], true), Ok(EvalMetric::Perplexity));
        assert_eq!(metric_of(&by("mcc"), Task::SeqCls, &tags, true), Ok(EvalMetric::Mcc));
        assert_eq!(metric_of(&by("span_f1"), Task::TokenCls, &tags, true), Ok(EvalMetric::SpanF1));
        assert_eq!(metric_of(&by("rouge_l"), Task::CausalLm, &[], true), Ok(EvalMetric::RougeL));
        let error = metric_of(&by("mcc"), Task::CausalLm, &[], true).unwrap_err();
        let known = "loss, perplexity, exact_match, bleu, rouge_l";
        assert_eq!(error, [format!("hyper.eval_metric is \"mcc\"; evaluations of this task have {known}")]);
        assert!(metric_of(&by("bleu"), Task::SeqCls, &tags, true).is_err());
        assert!(metric_of(&by("span_f1"), Task::SeqCls, &tags, true).is_err());
        assert!(metric_of(&by("span_f1"), Task::TokenCls, &parts, true).is_err());
        assert!(metric_of(&by("accuracy"), Task::Seq2Seq, &[], true).is_err());
    }

    #[test]
    fn wishes_for_an_evaluation_need_one() {
        let h = HyperParams { eval_metric: Some("loss".into()), patience: Some(2), ..HyperParams::default() };
        assert_eq!(metric_of(&h, Task::SeqCls, &["a", "b"], false).unwrap_err().len(), 2);
        assert_eq!(metric_of(&h, Task::SeqCls, &["a", "b"], true), Ok(EvalMetric::Loss));
        let h = HyperParams { min_delta: Some(0.1), ..HyperParams::default() };
        assert!(metric_of(&h, Task::SeqCls, &["a", "b"], true).unwrap_err()[0].starts_with("hyper.min_delta"));
    }
}
