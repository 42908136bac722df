//! What a request leaves open: the values that are known to work, and a job's hyper-parameters with all of them.

use super::MAX_STEPS;
use crate::{
    admission::train_params::{
        AdapterPart, AdapterVariant, EvalMetric, HyperParams, LoraPart, MethodPart, PreferenceMethod, PreferenceParams,
        ResolvedTraining, Schedule, TrainParams,
    },
    delta::Task,
    train::{
        batches::Batches,
        encode::Encoded,
        spec::{self, BaseShape},
        transfer::Continued,
        validate::LabelSet,
    },
};

/// Examples with the highest loss that a job with an evaluation tells unless it is asked for another number.
const WORST: u32 = 10;

/// Method parts with every field set.
pub(super) fn with_defaults(methods: &[MethodPart], task: Task, base: BaseShape<'_>) -> Vec<MethodPart> {
    let rank_default = if task.generates() && base.causal { 16 } else { 8 };
    let part = |part: &MethodPart| match part {
        MethodPart::Lora(p) => {
            let rank = p.rank.unwrap_or(rank_default);
            MethodPart::Lora(LoraPart {
                rank: Some(rank),
                alpha: p.alpha.or(Some(2.0 * f64::from(rank))),
                dropout: p.dropout.or(Some(0.0)),
                ..p.clone()
            })
        }
        MethodPart::Adapter(p) => MethodPart::Adapter(AdapterPart {
            reduction_factor: p.reduction_factor.or(Some(match p.variant {
                AdapterVariant::Houlsby | AdapterVariant::Pfeiffer => 16.0,
                AdapterVariant::Parallel => 2.0,
            })),
            ..p.clone()
        }),
        MethodPart::Prefix(p) => MethodPart::Prefix(spec::prefix_defaults(p, base.encoder_decoder)),
        MethodPart::Prompt(p) => MethodPart::Prompt(spec::prompt_defaults(p)),
        MethodPart::PTuning(p) => MethodPart::PTuning(spec::p_tuning_defaults(p)),
        MethodPart::Bitfit(_) | MethodPart::Ia3(_) | MethodPart::Ln(_) | MethodPart::Tokens(_) | MethodPart::Full => {
            part.clone()
        }
    };
    methods.iter().map(part).collect()
}

/// Learning rate of the weights of deltas, which are about 1.
const MIX_RATE: f64 = 2e-2;

/// Learning rates that are known to work (FORMATS 5.5); of a combination, the smallest.
fn learning_rate(methods: &[MethodPart], task: Task, hidden: usize) -> f64 {
    let lm = task.generates();
    let of = |part: &MethodPart| match part {
        MethodPart::Lora(_) if lm => (5e-4 * (2000.0 / hidden as f64).sqrt()).clamp(1e-4, 3e-3),
        MethodPart::Lora(_) => 1e-3,
        MethodPart::Bitfit(_) => 2e-3,
        MethodPart::Ia3(_) => 5e-3,
        MethodPart::Ln(_) => 2e-3,
        MethodPart::Adapter(_) if lm => 5e-4,
        MethodPart::Adapter(_) => 2e-3,
        MethodPart::Tokens(_) => 1e-2,
        MethodPart::Prefix(p) if p.projection => 3e-4,
        MethodPart::Prefix(_) if lm => 5e-3,
        MethodPart::Prefix(_) => 1e-2,
        MethodPart::Prompt(_) => 1e-2,
        MethodPart::PTuning(_) => 1e-3,
        MethodPart::Full if lm => 5e-5,
        MethodPart::Full => 2e-5,
    };
    methods.iter().map(of).fold(None, |least: Option<f64>, lr| Some(least.map_or(lr, |l| l.min(lr)))).unwrap_or(5e-3)
}

/// Rounds through the data. Methods that train a few numbers per layer need more steps than those with matrices for the same
/// score: on TweetEval's emotions, BitFit and prefixes gained two points of accuracy from the fifth round to the eighth.
fn epochs_of(methods: &[MethodPart], task: Task) -> f64 {
    let has_matrices =
        |part: &MethodPart| matches!(part, MethodPart::Lora(_) | MethodPart::Adapter(_) | MethodPart::Full);
    match task.generates() {
        true => 3.0,
        false if methods.is_empty() || methods.iter().any(has_matrices) => 4.0,
        false => 8.0,
    }
}

/// The share of that rate at which preferences are learned: the papers take about a twentieth of what texts are learned
/// with for DPO and KTO, and less than half for ORPO, most of whose loss is that of texts. A tenth suits small data.
fn of_preference(p: Option<&PreferenceParams>) -> f64 {
    match p.map(|p| p.method) {
        None => 1.0,
        Some(PreferenceMethod::Orpo) => 0.4,
        Some(PreferenceMethod::Dpo | PreferenceMethod::Kto) => 0.1,
    }
}

pub(super) fn max_length(h: &HyperParams, task: Task, max_positions: usize) -> usize {
    h.max_length.map_or(default_length(task), |n| n as usize).min(max_positions)
}

/// Longest example in tokens, unless a request says otherwise.
pub(in crate::train) fn default_length(task: Task) -> usize {
    if task.generates() { 512 } else { 128 }
}

/// What the hyper-parameters depend on.
pub(super) struct Chosen<'a> {
    pub(super) params: &'a TrainParams,
    pub(super) methods: &'a [MethodPart],
    pub(super) labels: &'a LabelSet,
    pub(super) max_length: usize,
    pub(super) eval_metric: EvalMetric,
    pub(super) base: BaseShape<'a>,
}

impl Chosen<'_> {
    pub(super) fn resolve(&self, train: &[Encoded], start: Option<&Continued>) -> ResolvedTraining {
        let Self { params, methods, labels, max_length, eval_metric, base } = *self;
        let h = &params.hyper;
        let lm = params.task.generates();
        let batch_size = h.batch_size.unwrap_or(if lm { 8 } else { 32 });
        let grad_accumulation = h.grad_accumulation.unwrap_or(1);
        let packing = h.packing.unwrap_or(false);
        let seed = h.seed.unwrap_or(0);
        let lens: Vec<usize> = train.iter().map(Encoded::rows).collect();
        let size = batch_size as usize * grad_accumulation as usize;
        let per_epoch = Batches::new(&lens, size, packing.then_some(max_length), seed).per_epoch();
        let cap = h.max_steps.unwrap_or(MAX_STEPS);
        // a step limit alone decides how long a job is
        let epochs = h.epochs.unwrap_or(match h.max_steps {
            Some(steps) => f64::from(steps) / per_epoch.max(1) as f64,
            None => epochs_of(methods, params.task),
        });
        let total_steps = ((epochs * per_epoch as f64).ceil().max(1.0) as u32).min(cap);
        let warmup_ratio = h.warmup_ratio.unwrap_or(if lm { 0.03 } else { 0.06 });
        ResolvedTraining {
            task: params.task,
            problem: params.problem,
            methods: methods.to_vec(),
            labels: if lm { Vec::new() } else { labels.names().to_vec() },
            epochs,
            total_steps,
            batch_size,
            grad_accumulation,
            learning_rate: h.learning_rate.unwrap_or_else(|| {
                let rate = match params.mix {
                    Some(_) => MIX_RATE,
                    None => learning_rate(methods, params.task, base.hidden),
                };
                rate * of_preference(params.preference.as_ref())
            }),
            schedule: h.schedule.unwrap_or(Schedule::Linear),
            warmup_steps: (warmup_ratio * f64::from(total_steps)).floor() as u32,
            weight_decay: h.weight_decay.unwrap_or(0.0),
            beta1: h.beta1.unwrap_or(0.9),
            beta2: h.beta2.unwrap_or(0.999),
            eps: h.eps.unwrap_or(1e-8),
            clip_norm: h.clip_norm.unwrap_or(1.0),
            max_length: max_length as u32,
            seed,
            eval_every: h.eval_every.unwrap_or(0),
            packing,
            started_from: start.and_then(Continued::record),
            mix: start.and_then(Continued::mix_record),
            ewc: start.and_then(Continued::ewc_record),
            eval_metric,
            patience: h.patience.unwrap_or(0),
            min_delta: h.min_delta.unwrap_or(0.0),
            label_smoothing: h.label_smoothing.unwrap_or(0.0),
            checkpoint_every: h.checkpoint_every.unwrap_or(0),
            keep_last: h.keep_last,
            gradient_checkpointing: h.gradient_checkpointing.unwrap_or(false),
            preference: params.preference.map(|p| p.resolve()),
            generation: None,
            kl_to_base: h.kl_to_base.unwrap_or(0.0),
            replay_examples: 0,
            keep_best: h.keep_best.unwrap_or(1),
            sweep: Vec::new(),
            worst_examples: h.worst_examples.unwrap_or(if params.validation.is_some() { WORST } else { 0 }),
        }
    }
}
