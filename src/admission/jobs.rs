//! Training jobs as clients see them: states, results, and the gap-free stream of events. Stored as JSON, so that a
//! replayed event equals the one first sent. No behaviour beyond names; `train` owns the transitions.

use serde::{Deserialize, Serialize};

use super::train_params::{ResolvedTraining, SweepEvent};

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waiting for the trainer.
    Queued,
    /// Training.
    Running,
    /// Stopped by `PauseJob`, until `ResumeJob`.
    Paused,
    /// Trained; its version is being written.
    Publishing,
    /// Published. Terminal.
    Succeeded,
    /// Ended by an error. Terminal.
    Failed,
    /// Ended by `CancelJob`. Terminal.
    Cancelled,
    /// The server stopped while it ran. Terminal.
    Interrupted,
}

impl JobState {
    /// The name in the store and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Publishing => "publishing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }

    /// Reads [`Self::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        [
            Self::Queued,
            Self::Running,
            Self::Paused,
            Self::Publishing,
            Self::Succeeded,
            Self::Failed,
            Self::Cancelled,
            Self::Interrupted,
        ]
        .into_iter()
        .find(|s| s.as_str() == name)
    }

    /// No event follows a terminal state.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled | Self::Interrupted)
    }
}

/// What a succeeded job made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobResult {
    /// Name.
    pub name: String,
    /// Version number under that name; 0 for a model.
    pub number: u64,
    /// Version digest, 64 hexadecimal digits; empty for a model.
    pub id: String,
    /// Training loss of the last step.
    pub final_loss: f64,
    /// The best evaluation: the one whose checkpoint was published.
    pub best_eval: Option<EvalEvent>,
    /// What full fine-tuning made in place of a version.
    #[serde(default)]
    pub model: Option<ModelResult>,
}

/// A whole model in the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelResult {
    /// Its folder below the data directory.
    pub path: String,
    /// What a server that serves it as its base reports as the base's fingerprint, 64 hexadecimal digits.
    pub fingerprint: String,
    /// Bytes of its files.
    pub bytes: u64,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFailure {
    /// Stable code: `NON_FINITE_LOSS`, `PUBLISH_CONFLICT`, `OUT_OF_MEMORY`, `INTERNAL`, `INTERRUPTED` ...
    pub code: String,
    /// What happened, with the step.
    pub message: String,
}

/// A job, as clients see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Id (UUID v7).
    pub id: String,
    /// Name it publishes under.
    pub output_name: String,
    /// State.
    pub state: JobState,
    /// Hyper-parameters as used.
    pub resolved: ResolvedTraining,
    /// Optimizer steps done.
    pub step: u32,
    /// Unix milliseconds.
    pub created_ms: i64,
    /// Unix milliseconds of the last event.
    pub updated_ms: i64,
    /// Sequence number of the last event.
    pub last_seq: u64,
    /// If it succeeded.
    pub result: Option<JobResult>,
    /// If it failed or was interrupted.
    pub failure: Option<JobFailure>,
}

/// One event of a job's gap-free, replayable stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobEventInfo {
    /// Counts from 1 without gaps.
    pub seq: u64,
    /// Unix milliseconds.
    pub at_ms: i64,
    /// What happened.
    pub body: JobEventBody,
}

/// What happened; stored as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum JobEventBody {
    /// The state changed; a terminal one is the last event.
    State(StateEvent),
    /// An optimizer step.
    Metrics(MetricsEvent),
    /// An evaluation.
    Eval(EvalEvent),
    /// A checkpoint was stored: what the job goes on from, or, of a job that failed, its last good weights, or weights of one
    /// of the best evaluations beside the one that is published.
    Checkpoint(CheckpointEvent),
    /// Something to know that does not stop the job.
    Warning(NoteEvent),
    /// A line for people.
    Log(NoteEvent),
    /// What the delta does to a held text.
    Forgetting(ForgettingEvent),
    /// It goes on from a checkpoint.
    Resumed(ResumedEvent),
    /// The examples with the highest loss.
    Worst(WorstEvent),
    /// The weights of the deltas that were mixed.
    Mix(MixEvent),
    /// How the candidates of a sweep came out.
    Sweep(SweepEvent),
}

/// The learned weights of the deltas that were mixed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MixEvent {
    /// `name@number`.
    pub deltas: Vec<String>,
    /// One, or one per layer.
    pub rows: Vec<MixRow>,
}

/// Weights of one layer or of all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MixRow {
    /// Counts from 0; `None`: of all that has no row of its own.
    pub layer: Option<u32>,
    /// One per delta.
    pub weights: Vec<f64>,
}

/// The examples with the highest loss, worst first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorstEvent {
    /// After this many optimizer steps.
    pub step: u32,
    /// Whether they were held out for evaluation; else they were trained on.
    pub held_out: bool,
    /// Whether their lines are those of the separate examples for evaluation; else of the training data.
    pub of_validation: bool,
    /// They.
    pub examples: Vec<WorstExample>,
}

/// An example with a high loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorstExample {
    /// Its line, counting from 1.
    pub line: u64,
    /// Mean loss over its supervised tokens or words.
    pub loss: f64,
    /// An excerpt, as the model sees it.
    pub text: String,
    /// Its label, where it has one.
    pub label: String,
    /// The likeliest label, where it has one.
    pub predicted: String,
}

/// The job goes on from a checkpoint: what was said of later steps is void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumedEvent {
    /// Optimizer steps done.
    pub step: u32,
}

/// Loss on a held text, with the delta that is published and without it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ForgettingEvent {
    /// After this many optimizer steps.
    pub step: u32,
    /// Mean loss of the bare base.
    pub base_loss: f64,
    /// Mean loss with the delta.
    pub delta_loss: f64,
}

/// A change of state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateEvent {
    /// The new state.
    pub state: JobState,
    /// With `succeeded`.
    pub result: Option<JobResult>,
    /// With `failed` and `interrupted`.
    pub failure: Option<JobFailure>,
}

/// Metrics of one optimizer step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricsEvent {
    /// Optimizer steps done.
    pub step: u32,
    /// Optimizer steps in all.
    pub total_steps: u32,
    /// Passes done, with fraction.
    pub epoch: f64,
    /// Mean loss of the step.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens (with padding-free counting) per second of the step.
    pub tokens_per_second: f64,
    /// Expected seconds to the end.
    pub eta_seconds: f64,
    /// Milliseconds of the step.
    pub step_ms: f64,
    /// Those of them given to serving.
    pub yielded_ms: f64,
    /// EWC's penalty on the values that the step began with; not part of `loss`.
    #[serde(default)]
    pub ewc_penalty: f64,
    /// The step's mean divergence from the bare base per learned token, where that is part of the loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Of which candidate of a sweep, counting from 1; 0 = no sweep.
    #[serde(default)]
    pub candidate: u32,
}

/// Metrics of an evaluation on the validation examples.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalEvent {
    /// After this many optimizer steps.
    pub step: u32,
    /// Mean loss.
    pub loss: f64,
    /// `exp(loss)`; language modelling only.
    pub perplexity: Option<f64>,
    /// Share of right labels; classification only.
    pub accuracy: Option<f64>,
    /// Macro-averaged F1; classification only.
    pub macro_f1: Option<f64>,
    /// Matthews correlation; classification only.
    pub mcc: Option<f64>,
    /// Share of the predicted spans that are right; token classification with `B-` or `I-` labels only.
    pub span_precision: Option<f64>,
    /// Share of the gold spans that were found; as `span_precision`.
    pub span_recall: Option<f64>,
    /// Harmonic mean of the two; as `span_precision`.
    pub span_f1: Option<f64>,
    /// F1 over all labels of all texts; multi-label classification only.
    pub micro_f1: Option<f64>,
    /// Mean squared error; regression only.
    pub mse: Option<f64>,
    /// Pearson's correlation; regression only.
    pub pearson: Option<f64>,
    /// Share of preferences that rewards are in line with; preferences only.
    #[serde(default)]
    pub reward_accuracy: Option<f64>,
    /// Mean reward of preferred answers less that of the others; preferences only.
    #[serde(default)]
    pub reward_margin: Option<f64>,
    /// Share of answers that are their completion; where answers are generated only.
    #[serde(default)]
    pub exact_match: Option<f64>,
    /// BLEU of all answers, 0 to 100; as `exact_match`.
    #[serde(default)]
    pub bleu: Option<f64>,
    /// Mean ROUGE-L of the answers; as `exact_match`.
    #[serde(default)]
    pub rouge_l: Option<f64>,
    /// Of which candidate of a sweep, counting from 1; 0 = no sweep.
    #[serde(default)]
    pub candidate: u32,
    /// Whether it is the best so far (of its candidate).
    pub best: bool,
}

/// A kept checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointEvent {
    /// After this many optimizer steps.
    pub step: u32,
    /// Digest of the stored blob, or empty if it is in memory only.
    pub blob: String,
    /// Whether it is one of the best evaluations, kept beside the one that is published.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub best: bool,
    /// The figure of that evaluation that decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figure: Option<f64>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoteEvent {
    /// Stable code; may be empty.
    pub code: String,
    /// Text.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_names_read_back_and_exactly_four_are_terminal() {
        let names = ["queued", "running", "paused", "publishing", "succeeded", "failed", "cancelled", "interrupted"];
        let states: Vec<_> = names.iter().filter_map(|n| JobState::parse(n)).collect();
        assert_eq!(states.iter().map(|s| s.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(states.iter().filter(|s| s.is_terminal()).count(), 4);
        assert_eq!(JobState::parse("done"), None);
    }
}
