//! What training clients ask for and get, in the domain's own types. Everything here is serialisable: a job's request,
//! its resolved form and its events are stored as JSON, and a replayed event equals the one first sent.
//!
//! No tensors, no wire format. Unset hyper-parameters are `None` in [`TrainParams`] and never in [`ResolvedTraining`].

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use super::eval_metric::EvalMetric;
pub use super::generation_params::{GenerationParams, ResolvedGeneration};
pub use super::jobs::{
    CheckpointEvent, EvalEvent, ForgettingEvent, JobEventBody, JobEventInfo, JobFailure, JobInfo, JobResult, JobState,
    MetricsEvent, MixEvent, MixRow, ModelResult, NoteEvent, ResumedEvent, StateEvent, WorstEvent, WorstExample,
};
pub use super::method_parts::{
    AdapterPart, AdapterScaling, AdapterVariant, Ia3Part, LnPart, LoraBias, LoraInit, TokensPart,
};
use super::params::{PublishPolicy, Violation};
pub use super::position_params::{
    MAX_VIRTUAL_TOKENS, PTuningPart, PrefixInit, PrefixLibrary, PrefixPart, PromptInit, PromptPart,
};
pub use super::preference_params::{PreferenceMethod, PreferenceParams, ResolvedPreference};
pub use super::resolved_training::ResolvedTraining;
pub use super::sweep_params::{SweepCandidate, SweepEvent, SweepParams, SweepRow, with_rank};
pub use super::transfer_params::{EwcParams, MAX_MIXED, MixParams, ResolvedEwc, ResolvedMix, StartedFrom};
use crate::delta::{Problem, Task};

/// A training request (`CreateJob`, `Plan`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainParams {
    /// The name under which the finished delta is published.
    pub output_name: String,
    /// What the delta is for; a classification task brings a head.
    pub task: Task,
    /// What a text head's outputs are; `SingleLabel` for other tasks.
    #[serde(default)]
    pub problem: Problem,
    /// The examples.
    pub data: TrainData,
    /// The examples for evaluation; `None` = no evaluation.
    pub validation: Option<Validation>,
    /// A held text of language modelling, whose loss with and without the delta is compared at the end.
    #[serde(default)]
    pub forgetting: Option<TrainData>,
    /// Texts that `hyper.kl_to_base` is taken on; `None` = the job's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<TrainData>,
    /// What is trained beside the head; at least one part unless `from_delta` says it. Kinds do not repeat.
    pub methods: Vec<MethodPart>,
    /// Label names in index order; empty = sorted names found in the data.
    pub labels: Vec<String>,
    /// Train on this many examples of each label, drawn by the seed; `None` = on all.
    #[serde(default)]
    pub k_per_class: Option<u32>,
    /// Hyper-parameters; unset ones get per-method defaults.
    pub hyper: HyperParams,
    /// Learn which answers are preferred, not texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceParams>,
    /// Train several candidates side by side and publish the best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweep: Option<SweepParams>,
    /// What the publish may do to an existing name.
    pub publish: PublishPolicy,
    /// Start at the values of this delta (`name` or `name@version`).
    #[serde(default)]
    pub from_delta: Option<String>,
    /// Hold on to what that delta knows.
    #[serde(default)]
    pub ewc: Option<EwcParams>,
    /// Learn how much of each of these deltas to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mix: Option<MixParams>,
    /// Two creates with one key are one job; the same key with another request is an error.
    pub idempotency_key: Option<String>,
}

/// Where examples come from. Examples given as messages are turned into JSON lines at the edge, so that there is one
/// validation: line `i` is example `i`, counting from 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainData {
    /// JSON lines, one example each.
    Jsonl(String),
    /// Id of an uploaded dataset.
    Dataset(String),
}

/// Where examples for evaluation come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Validation {
    /// Separate examples.
    Data(TrainData),
    /// This share of the training examples, drawn by the seed and not trained on; in (0, 0.5].
    Fraction(f64),
}

/// One part of a combination of methods.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum MethodPart {
    /// Low-rank updates of linears (Hu et al. 2021).
    Lora(LoraPart),
    /// Bias terms (Ben Zaken et al. 2021).
    Bitfit(BitfitPart),
    /// Scales of activations (Liu et al. 2022).
    Ia3(Ia3Part),
    /// Gains and biases of norms (Zhao et al. 2023).
    Ln(LnPart),
    /// Bottleneck adapters (Houlsby et al. 2019).
    Adapter(AdapterPart),
    /// Embedding rows of some tokens.
    Tokens(TokensPart),
    /// Keys and values ahead of each layer's own (Li and Liang 2021).
    Prefix(PrefixPart),
    /// Embeddings ahead of the tokens (Lester et al. 2021).
    Prompt(PromptPart),
    /// A prompt that a network makes while training (Liu et al. 2021).
    PTuning(PTuningPart),
    /// Every weight of a private copy of the base; the job makes a model instead of a delta.
    Full,
}

impl MethodPart {
    /// The method's name in specs and tables.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Lora(_) => "lora",
            Self::Bitfit(_) => "bitfit",
            Self::Ia3(_) => "ia3",
            Self::Ln(_) => "ln",
            Self::Adapter(_) => "adapter",
            Self::Tokens(_) => "tokens",
            Self::Prefix(_) => "prefix",
            Self::Prompt(_) => "prompt",
            Self::PTuning(_) => "p_tuning",
            Self::Full => "full",
        }
    }
}

/// LoRA: `out += scale * B(A(x))`, scale = alpha / rank, or alpha / sqrt(rank) with rsLoRA.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraPart {
    /// 1 to 1024; default 16.
    pub rank: Option<u32>,
    /// Default 2 x rank.
    pub alpha: Option<f64>,
    /// Scale by alpha / sqrt(rank) (Kalajdzievski 2023).
    pub rslora: bool,
    /// Which linears.
    pub targets: Targets,
    /// Rank of modules whose name ends with (or matches) the key; overrides `rank`.
    pub rank_pattern: BTreeMap<String, u32>,
    /// Alpha of modules whose name ends with (or matches) the key; overrides `alpha`.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Dropout on the input of A while training, in [0, 1); default 0.
    pub dropout: Option<f64>,
    /// A learned magnitude per output beside the pair (DoRA; Liu et al. 2024).
    pub dora: bool,
    /// Biases that are trained, too.
    pub bias: LoraBias,
    /// A bias on every B (PEFT's `lora_bias`).
    pub b_bias: bool,
    /// Layers whose modules are targets; empty = all.
    pub layers: Vec<u32>,
    /// Modules that are no targets, named as `targets`.
    pub exclude: Vec<String>,
    /// Learning rate of B over that of A (LoRA+; Hayou et al. 2024, about 16); default 1.
    pub plus_ratio: Option<f64>,
    /// Initial values.
    pub init: LoraInit,
    /// Tokens whose embedding rows are trained, too.
    pub tokens: Vec<u32>,
    /// Modules that are trained whole (PEFT's `modules_to_save`), e.g. `lm_head`.
    pub save_modules: Vec<String>,
}

/// Which linears of the base a LoRA changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Targets {
    /// Every linear of the blocks (not the head, not the embedding).
    #[default]
    AllLinear,
    /// Module names as in the base's checkpoint: the last part (`q_proj`) or a longer suffix.
    Modules(Vec<String>),
}

/// BitFit: trains bias terms only.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BitfitPart {
    /// Which biases.
    pub subset: BiasSubset,
    /// Add zero biases to linears and norms that have none (Llama has none at all).
    pub added: bool,
}

/// Which biases BitFit trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasSubset {
    /// All that the base offers.
    #[default]
    All,
    /// Those of the attention's linears.
    Attention,
    /// Those of the MLP's linears.
    Mlp,
    /// Query and the MLP's first linear: the paper's small subset.
    QueryAndMlpUp,
    /// Those of the norms.
    Norm,
}

/// Learning-rate schedule after the warmup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Falls linearly to 0.
    #[default]
    Linear,
    /// Falls to 0 on a half cosine.
    Cosine,
    /// Stays.
    Constant,
}

/// Hyper-parameters as asked for; `None` = the method's default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HyperParams {
    /// Passes over the data, (0, 1000].
    pub epochs: Option<f64>,
    /// Optimizer steps; the smaller of this and `epochs` ends the run.
    pub max_steps: Option<u32>,
    /// Examples per micro-batch.
    pub batch_size: Option<u32>,
    /// Micro-batches per optimizer step.
    pub grad_accumulation: Option<u32>,
    /// Peak learning rate.
    pub learning_rate: Option<f64>,
    /// Learning-rate schedule.
    pub schedule: Option<Schedule>,
    /// Share of the steps with rising learning rate, [0, 1).
    pub warmup_ratio: Option<f64>,
    /// Decoupled weight decay (not on biases).
    pub weight_decay: Option<f64>,
    /// AdamW's first moment decay, [0, 1).
    pub beta1: Option<f64>,
    /// AdamW's second moment decay, [0, 1).
    pub beta2: Option<f64>,
    /// AdamW's epsilon, > 0.
    pub eps: Option<f64>,
    /// Largest gradient norm; 0 = no clipping.
    pub clip_norm: Option<f64>,
    /// Longest example in tokens; longer ones are cut (text) or refused (where the completion would be lost).
    pub max_length: Option<u32>,
    /// Seed of initial values, data order, dropout and validation split.
    pub seed: Option<u64>,
    /// Evaluate every so many optimizer steps; 0 = only at the end of every epoch.
    pub eval_every: Option<u32>,
    /// Put several short examples into one row sequence (attention stays per example).
    pub packing: Option<bool>,
    /// The figure that chooses the best checkpoint and that `patience` watches, by name; default: the task's.
    #[serde(default)]
    pub eval_metric: Option<String>,
    /// Evaluations without a gain after which the job ends; `None` = never.
    #[serde(default)]
    pub patience: Option<u32>,
    /// A gain is more than this; default 0.
    #[serde(default)]
    pub min_delta: Option<f64>,
    /// Share of each target's weight that all labels (or tokens) share while training, [0, 1); default 0.
    #[serde(default)]
    pub label_smoothing: Option<f64>,
    /// Optimizer steps between checkpoints; `None` = by the clock.
    #[serde(default)]
    pub checkpoint_every: Option<u32>,
    /// Publish the last checkpoint, not the best of the evaluations.
    #[serde(default)]
    pub keep_last: bool,
    /// How many of the examples with the highest loss are told; `None` = 10 of those for evaluation.
    #[serde(default)]
    pub worst_examples: Option<u32>,
    /// Keep only the layers' inputs for the backward pass; `None` = where the memory asks for it.
    #[serde(default)]
    pub gradient_checkpointing: Option<bool>,
    /// Answers to the prompts of validation examples.
    #[serde(default, skip_serializing_if = "GenerationParams::is_unset")]
    pub generation: GenerationParams,
    /// Times the divergence from the bare base that is added to the loss of each learned token; `None` = 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_to_base: Option<f64>,
    /// How many of the best evaluations' weights are kept, 1 to 8; `None` = 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<u32>,
}

/// What a job would do: the reply of `Plan`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanReply {
    /// Hyper-parameters as they would be used.
    pub resolved: ResolvedTraining,
    /// Numbers that would be trained.
    pub trainable_parameters: u64,
    /// Examples trained on.
    pub train_examples: u64,
    /// Examples for evaluation.
    pub validation_examples: u64,
    /// Tokens of one pass over the training examples.
    pub train_tokens: u64,
    /// Those of them that carry loss.
    pub supervised_tokens: u64,
    /// Longest example in tokens, after cutting.
    pub longest_example: u32,
    /// Estimated peak bytes beside the resident base.
    pub memory: MemoryEstimate,
    /// Things to know that do not stop the job (cut examples, duplicates ...): line, code, message.
    pub warnings: Vec<Violation>,
}

/// Estimated bytes of a run beside the resident base.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEstimate {
    /// Trained tensors, with the copies of them that are kept: the last good ones, and those of the best evaluations.
    pub parameters: u64,
    /// Their gradients.
    pub gradients: u64,
    /// AdamW's moments, and EWC's two tensors.
    pub optimizer: u64,
    /// Kept activations of one micro-batch and the largest temporary.
    pub activations: u64,
}

impl MemoryEstimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.activations
    }
}

/// A dataset upload.
#[derive(Debug, Clone)]
pub struct DatasetUpload {
    /// A name for people; need not be unique.
    pub name: Option<String>,
    /// JSON lines; UTF-8.
    pub data: Bytes,
}

/// A stored dataset, as clients see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetInfo {
    /// Id.
    pub id: String,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// `text`, `prompt_completion`, `messages`, `label`, `labels`, `tags`, `pairs`, `rated`.
    pub format: String,
    /// Examples.
    pub rows: u64,
    /// Bytes stored.
    pub bytes: u64,
    /// SHA-256 of the bytes, 64 hexadecimal digits.
    pub digest: String,
    /// Unix milliseconds.
    pub created_ms: i64,
}

/// Which events to watch.
#[derive(Debug, Clone)]
pub struct WatchParams {
    /// Job id.
    pub job: String,
    /// First sequence number wanted; 0 and 1 both replay everything.
    pub from_seq: u64,
    /// Give up when this much time has passed since arrival.
    pub timeout: Option<Duration>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_its_stored_form() -> Result<(), serde_json::Error> {
        let params = TrainParams {
            output_name: "style".into(),
            task: Task::SeqCls,
            problem: Problem::MultiLabel,
            data: TrainData::Dataset("d1".into()),
            validation: Some(Validation::Fraction(0.1)),
            methods: vec![
                MethodPart::Lora(LoraPart {
                    rank: Some(8),
                    targets: Targets::Modules(vec!["q_proj".into()]),
                    ..LoraPart::default()
                }),
                MethodPart::Bitfit(BitfitPart::default()),
            ],
            labels: vec!["no".into(), "yes".into()],
            k_per_class: Some(16),
            forgetting: Some(TrainData::Jsonl("{}".into())),
            replay: Some(TrainData::Dataset("d2".into())),
            hyper: HyperParams { learning_rate: Some(3e-4), ..HyperParams::default() },
            publish: PublishPolicy::CompareAndSwap(crate::ids::DeltaId::from_bytes([7; 32])),
            from_delta: Some("old@2".into()),
            mix: Some(MixParams { deltas: vec!["a".into(), "b@2".into()], per_layer: true }),
            ewc: Some(EwcParams { data: TrainData::Dataset("d0".into()), lambda: 2.0, max_examples: None }),
            preference: Some(PreferenceParams::of(PreferenceMethod::Kto)),
            sweep: Some(SweepParams { learning_rates: vec![1e-4, 1e-3], ranks: vec![4] }),
            idempotency_key: None,
        };
        let stored = serde_json::to_string(&params)?;
        assert_eq!(serde_json::from_str::<TrainParams>(&stored)?, params);
        Ok(())
    }

    /// Requests are known again by a digest of their stored form.
    #[test]
    fn what_a_request_does_not_say_is_not_in_its_stored_form() -> Result<(), serde_json::Error> {
        let stored = serde_json::to_string(&HyperParams::default())?;
        assert!(["kl_to_base", "keep_best", "generation"].iter().all(|name| !stored.contains(name)), "{stored}");
        Ok(())
    }
}
