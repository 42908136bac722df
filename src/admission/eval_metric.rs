//! Figures of an evaluation that can choose the best checkpoint and end a job early.

use serde::{Deserialize, Serialize};

use super::jobs::EvalEvent;

/// A figure of an evaluation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvalMetric {
    /// Mean loss; every task has it.
    #[default]
    Loss,
    /// `exp(loss)`.
    Perplexity,
    /// Share of right labels.
    Accuracy,
    /// Macro-averaged F1.
    MacroF1,
    /// Matthews correlation.
    Mcc,
    /// F1 of spans.
    SpanF1,
    /// F1 over all labels of all texts.
    MicroF1,
    /// Mean squared error.
    Mse,
    /// Pearson's correlation.
    Pearson,
    /// Share of preferences that rewards are in line with.
    RewardAccuracy,
    /// How much larger rewards of preferred answers are.
    RewardMargin,
    /// Share of answers that are the completion, white space at the ends aside.
    ExactMatch,
    /// BLEU of all answers, 0 to 100.
    Bleu,
    /// Mean ROUGE-L of the answers.
    RougeL,
}

impl EvalMetric {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Loss,
        Self::Perplexity,
        Self::Accuracy,
        Self::MacroF1,
        Self::Mcc,
        Self::SpanF1,
        Self::MicroF1,
        Self::Mse,
        Self::Pearson,
        Self::RewardAccuracy,
        Self::RewardMargin,
        Self::ExactMatch,
        Self::Bleu,
        Self::RougeL,
    ];

    /// Its name in requests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::Perplexity => "perplexity",
            Self::Accuracy => "accuracy",
            Self::MacroF1 => "macro_f1",
            Self::Mcc => "mcc",
            Self::SpanF1 => "span_f1",
            Self::MicroF1 => "micro_f1",
            Self::Mse => "mse",
            Self::Pearson => "pearson",
            Self::RewardAccuracy => "reward_accuracy",
            Self::RewardMargin => "reward_margin",
            Self::ExactMatch => "exact_match",
            Self::Bleu => "bleu",
            Self::RougeL => "rouge_l",
        }
    }

    /// Whether more is better.
    pub fn rises(self) -> bool {
        !matches!(self, Self::Loss | Self::Perplexity | Self::Mse)
    }

    /// Whether it is of answers that an evaluation generates.
    pub fn is_of_answers(self) -> bool {
        matches!(self, Self::ExactMatch | Self::Bleu | Self::RougeL)
    }

    /// Its value in an evaluation, if the evaluation has it.
    pub fn of(self, eval: &EvalEvent) -> Option<f64> {
        match self {
            Self::Loss => Some(eval.loss),
            Self::Perplexity => eval.perplexity,
            Self::Accuracy => eval.accuracy,
            Self::MacroF1 => eval.macro_f1,
            Self::Mcc => eval.mcc,
            Self::SpanF1 => eval.span_f1,
            Self::MicroF1 => eval.micro_f1,
            Self::Mse => eval.mse,
            Self::Pearson => eval.pearson,
            Self::RewardAccuracy => eval.reward_accuracy,
            Self::RewardMargin => eval.reward_margin,
            Self::ExactMatch => eval.exact_match,
            Self::Bleu => eval.bleu,
            Self::RougeL => eval.rouge_l,
        }
    }

    /// How much better `a` is than `b`; negative where it is worse.
    pub fn gain(self, a: f64, b: f64) -> f64 {
        if self.rises() { a - b } else { b - a }
    }
}
