//! What a request says of its evaluations: the figure that decides, and for how long there may be no gain.

use super::violation;
use crate::{
    admission::{
        params::Violation,
        train_params::{EvalMetric, HyperParams},
    },
    delta::{Problem, Task},
    train::eval::metrics_of,
};

/// The figure that chooses the best checkpoint.
///
/// # Errors
/// A figure that the task's evaluations do not have, and wishes that need an evaluation where there is none.
pub(super) fn metric(
    h: &HyperParams,
    (task, problem): (Task, Problem),
    labels: &[String],
    evaluates: bool,
) -> Result<EvalMetric, Vec<Violation>> {
    let mut problems = Vec::new();
    let known = metrics_of(task, problem, labels);
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
    for (field, _) in wishes.iter().filter(|(_, given)| *given && !evaluates) {
        let message = "needs examples for evaluation: validation_data or validation_fraction";
        problems.push(violation(&format!("hyper.{field}"), message));
    }
    if h.min_delta.is_some() && h.patience.is_none() {
        problems.push(violation("hyper.min_delta", "is given without patience, which it is for"));
    }
    if problem != Problem::SingleLabel && h.label_smoothing.is_some_and(|s| s > 0.0) {
        let message = format!("smooths one label of several; this job is {}", problem.as_str());
        problems.push(violation("hyper.label_smoothing", message));
    }
    match (metric, problems.is_empty()) {
        (Some(metric), true) => Ok(metric),
        _ => Err(problems),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(h: &HyperParams, task: Task, evaluates: bool) -> Result<EvalMetric, Vec<String>> {
        let labels = ["O".to_owned(), "B-x".to_owned()];
        metric(h, (task, Problem::SingleLabel), &labels, evaluates)
            .map_err(|v| v.into_iter().map(|v| v.field + " " + &v.message).collect())
    }

    #[test]
    fn a_task_has_its_own_figures_and_a_default() {
        let by = |name: &str| HyperParams { eval_metric: Some(name.into()), ..HyperParams::default() };
        assert_eq!(fields(&HyperParams::default(), Task::SeqCls, false), Ok(EvalMetric::Accuracy));
        assert_eq!(fields(&HyperParams::default(), Task::CausalLm, true), Ok(EvalMetric::Loss));
        assert_eq!(fields(&by("mcc"), Task::SeqCls, true), Ok(EvalMetric::Mcc));
        assert_eq!(fields(&by("span_f1"), Task::TokenCls, true), Ok(EvalMetric::SpanF1));
        let error = fields(&by("bleu"), Task::CausalLm, true).unwrap_err();
        assert_eq!(error, ["hyper.eval_metric is \"bleu\"; evaluations of this task have loss, perplexity"]);
        assert!(fields(&by("span_f1"), Task::SeqCls, true).is_err());
    }

    #[test]
    fn wishes_for_an_evaluation_need_one() {
        let h = HyperParams { eval_metric: Some("loss".into()), patience: Some(2), ..HyperParams::default() };
        assert_eq!(fields(&h, Task::SeqCls, false).unwrap_err().len(), 2);
        assert_eq!(fields(&h, Task::SeqCls, true), Ok(EvalMetric::Loss));
        let h = HyperParams { min_delta: Some(0.1), ..HyperParams::default() };
        assert!(fields(&h, Task::SeqCls, true).unwrap_err()[0].starts_with("hyper.min_delta"));
    }
}
