//! A job's hyper-parameters as they are used.

use serde::{Deserialize, Serialize};

use super::train_params::{
    EvalMetric, MethodPart, ResolvedEwc, ResolvedGeneration, ResolvedMix, ResolvedPreference, Schedule, StartedFrom,
    SweepCandidate,
};
use crate::delta::{Problem, Task};

/// Hyper-parameters as used: echoed by `Plan` and kept with the job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResolvedTraining {
    /// Task.
    pub task: Task,
    /// What a text head's outputs are.
    #[serde(default)]
    pub problem: Problem,
    /// Method parts with every field set.
    pub methods: Vec<MethodPart>,
    /// Label names in index order (classification).
    pub labels: Vec<String>,
    /// Passes over the data.
    pub epochs: f64,
    /// Optimizer steps in all.
    pub total_steps: u32,
    /// Examples per micro-batch.
    pub batch_size: u32,
    /// Micro-batches per optimizer step.
    pub grad_accumulation: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Schedule.
    pub schedule: Schedule,
    /// Steps with rising learning rate.
    pub warmup_steps: u32,
    /// Weight decay.
    pub weight_decay: f64,
    /// First moment decay.
    pub beta1: f64,
    /// Second moment decay.
    pub beta2: f64,
    /// Epsilon.
    pub eps: f64,
    /// Largest gradient norm; 0 = no clipping.
    pub clip_norm: f64,
    /// Longest example in tokens.
    pub max_length: u32,
    /// Seed.
    pub seed: u64,
    /// Steps between evaluations; 0 = at the end of every epoch.
    pub eval_every: u32,
    /// Packing.
    pub packing: bool,
    /// Where the values start; `None` = fresh.
    #[serde(default)]
    pub started_from: Option<StartedFrom>,
    /// EWC.
    #[serde(default)]
    pub ewc: Option<ResolvedEwc>,
    /// The figure that chooses the best checkpoint.
    #[serde(default)]
    pub eval_metric: EvalMetric,
    /// Evaluations without a gain after which the job ends; 0 = never.
    #[serde(default)]
    pub patience: u32,
    /// A gain is more than this.
    #[serde(default)]
    pub min_delta: f64,
    /// Label smoothing.
    #[serde(default)]
    pub label_smoothing: f64,
    /// Optimizer steps between checkpoints; 0 = by the clock.
    #[serde(default)]
    pub checkpoint_every: u32,
    /// Whether the last checkpoint is published, not the best of the evaluations.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_last: bool,
    /// How many of the examples with the highest loss are told.
    #[serde(default)]
    pub worst_examples: u32,
    /// Whether only the layers' inputs are kept for the backward pass.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gradient_checkpointing: bool,
    /// What is learned of preferences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<ResolvedPreference>,
    /// The deltas whose weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mix: Option<ResolvedMix>,
    /// Answers to the prompts of validation examples; `None` = an evaluation generates none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<ResolvedGeneration>,
    /// Times the divergence from the bare base in the loss; 0 = none.
    #[serde(default, skip_serializing_if = "super::stored::is_zero")]
    pub kl_to_base: f64,
    /// Texts that the divergence is taken on; 0 = the job's own.
    #[serde(default, skip_serializing_if = "super::stored::is_none")]
    pub replay_examples: u32,
    /// How many of the best evaluations' weights are kept.
    #[serde(default = "super::stored::one", skip_serializing_if = "super::stored::is_one")]
    pub keep_best: u32,
    /// The candidates of a sweep; empty without one. What differs between them is above as of the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sweep: Vec<SweepCandidate>,
}

impl ResolvedTraining {
    /// What decides how the weights come out: without what is only told, stored or kept in memory meanwhile. A job goes on
    /// where this is what it was.
    pub fn of_training(&self) -> Self {
        let generation = self.generation.filter(|_| self.eval_metric.is_of_answers());
        Self {
            gradient_checkpointing: false,
            checkpoint_every: 0,
            worst_examples: 0,
            keep_best: 1,
            generation,
            ..self.clone()
        }
    }
}
