//! Figures of test rows by name: which of them an evaluation has, too, and how readers expect them.

use crate::{admission::eval_metric::EvalMetric, cli::generate, grpc::proto};

/// Figures of continuations, where a task asks for them.
pub(super) const GENERATED: [&str; 3] = generate::FIGURES;

/// Points in one of a figure: shares are told in percent, BLEU is in points already. Figures that fall as a model gets
/// better (perplexity, loss) have none: their differences say nothing across tasks.
pub(super) fn points(name: &str) -> Option<f64> {
    match name {
        "perplexity" | "loss" => None,
        "bleu" => Some(1.0),
        _ => Some(100.0),
    }
}

/// A figure as readers expect it: points with one digit, others with three.
pub(super) fn shown(name: &str, value: f64) -> String {
    match points(name) {
        Some(points) => format!("{:.1}", value * points),
        None => format!("{value:.3}"),
    }
}

/// Whether a study lets it choose the best checkpoint: not figures of answers, which would make every evaluation longer.
pub(super) fn chooses(name: &str) -> bool {
    EvalMetric::ALL.iter().any(|m| m.as_str() == name && !m.is_of_answers())
}

/// A figure of an evaluation by name.
pub(super) fn of_eval(e: &proto::EvalResult, name: &str) -> Option<f64> {
    match name {
        "loss" => Some(e.loss),
        "perplexity" => e.perplexity,
        "accuracy" => e.accuracy,
        "macro_f1" => e.macro_f1,
        "mcc" => e.mcc,
        "span_f1" => e.span_f1,
        "span_precision" => e.span_precision,
        "span_recall" => e.span_recall,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_percent_points_stay_and_losses_are_neither() {
        let all = [("accuracy", 0.5), ("exact_match", 0.123), ("bleu", 34.56), ("rouge_l", 1.0), ("perplexity", 2.5)];
        assert_eq!(all.map(|(name, x)| shown(name, x)), ["50.0", "12.3", "34.6", "100.0", "2.500"]);
        assert!(GENERATED.iter().all(|name| points(name).is_some() && !chooses(name)));
        assert!(chooses("span_f1") && !chooses("span_precision") && !chooses("macro_recall"));
    }
}
