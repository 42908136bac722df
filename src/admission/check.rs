//! Limits of requests that need no base to check: numbers in range, counts, non-empty texts. All problems of a request
//! are found at once. Limits that depend on the base (context length, vocabulary, labels) are checked where it is known.

use super::{
    input_checks::check_priority,
    params::{BeamParams, GenerateParams, MAX_BEAMS, Prompt, Sampling, ServeError, Violation},
    train_params::{
        AdapterPart, AdapterScaling, HyperParams, LoraPart, MAX_MIXED, MethodPart, TrainData, TrainParams, Validation,
    },
};
use crate::{delta::Task, ids::check_name};

/// Most texts of a Classify or Embed request.
pub const MAX_INPUTS: usize = 1024;
/// Most pairs of a Score request, and most prompts of a batch.
pub const MAX_PROMPTS: usize = 256;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_STOP_TOKENS: usize = 64;
const MAX_LOGPROBS: u32 = 20;
const MAX_N: u32 = 16;
const MAX_METHODS: usize = 8;
const MAX_PATTERNS: usize = 1024;
/// Most tokens with trained rows.
const MAX_TOKENS: usize = 10_000;
/// Most labels of a head.
pub const MAX_LABELS: usize = 10_000;
const MAX_KEY_BYTES: usize = 128;

/// Collects what is wrong with a request.
#[derive(Debug, Default)]
pub struct Problems(Vec<Violation>);

impl Problems {
    /// Notes a problem of `field`.
    pub fn push(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Violation { field: field.into(), code: String::new(), message: message.into() });
    }

    /// Notes a problem unless `ok`.
    pub fn require(&mut self, ok: bool, field: &str, message: impl FnOnce() -> String) {
        if !ok {
            self.push(field, message());
        }
    }

    /// The error, if there was a problem.
    ///
    /// # Errors
    /// [`ServeError::Invalid`] with all problems.
    pub fn finish(self) -> Result<(), ServeError> {
        if self.0.is_empty() { Ok(()) } else { Err(ServeError::Invalid(self.0)) }
    }

    /// A number in a range. `(low, high]` and the like are told by the description; NaN is never in range.
    pub(super) fn range(&mut self, field: &str, value: f64, accepted: &Range) {
        if !accepted.holds(value) {
            self.push(field, format!("is {value}; accepted is {accepted}"));
        }
    }

    pub(super) fn count(&mut self, field: &str, count: usize, low: usize, high: usize) {
        self.require((low..=high).contains(&count), field, || {
            format!("has {count} entries; accepted are {low} to {high}")
        });
    }

    pub(super) fn integer(&mut self, field: &str, value: u32, low: u32, high: u32) {
        self.require((low..=high).contains(&value), field, || format!("is {value}; accepted is {low} to {high}"));
    }
}

/// An interval of numbers.
pub(super) struct Range {
    low: f64,
    low_open: bool,
    high: f64,
    high_open: bool,
}

impl Range {
    pub(super) const fn closed(low: f64, high: f64) -> Self {
        Self { low, low_open: false, high, high_open: false }
    }

    pub(super) const fn above(low: f64, high: f64) -> Self {
        Self { low, low_open: true, high, high_open: false }
    }

    pub(super) const fn below(low: f64, high: f64) -> Self {
        Self { low, low_open: false, high, high_open: true }
    }

    fn holds(&self, v: f64) -> bool {
        let low = if self.low_open { v > self.low } else { v >= self.low };
        let high = if self.high_open { v < self.high } else { v <= self.high };
        low && high && v.is_finite()
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let low = if self.low_open { "over " } else { "" };
        let high = if self.high_open { "less than " } else { "" };
        match self.high == f64::MAX {
            true if self.low_open => write!(f, "any number over {}", self.low),
            true => write!(f, "any number from {}", self.low),
            false => write!(f, "{low}{} to {high}{}", self.low, self.high),
        }
    }
}

/// Longest run of tokens that can be kept from coming twice.
const MAX_NGRAM: u32 = 256;

impl Sampling {
    /// Checks every number.
    pub fn check(&self, at: &str, problems: &mut Problems) {
        let field = |name: &str| format!("{at}.{name}");
        problems.range(&field("temperature"), self.temperature.into(), &Range::closed(0.0, 100.0));
        problems.range(&field("top_p"), self.top_p.into(), &Range::above(0.0, 1.0));
        problems.range(&field("min_p"), self.min_p.into(), &Range::closed(0.0, 1.0));
        problems.range(&field("repetition_penalty"), self.repetition_penalty.into(), &Range::above(0.0, 100.0));
        problems.range(&field("frequency_penalty"), self.frequency_penalty.into(), &Range::closed(-2.0, 2.0));
        problems.range(&field("presence_penalty"), self.presence_penalty.into(), &Range::closed(-2.0, 2.0));
        problems.integer(&field("no_repeat_ngram_size"), self.no_repeat_ngram_size, 0, MAX_NGRAM);
    }

    /// The fields that leave tokens to chance, and whether they are set to.
    fn chances(&self) -> [(&'static str, bool); 4] {
        [
            ("temperature", self.temperature > 0.0),
            ("top_k", self.top_k != 0),
            ("top_p", self.top_p < 1.0),
            ("min_p", self.min_p > 0.0),
        ]
    }
}

impl Prompt {
    /// Checks that there is something to continue.
    pub fn check(&self, at: &str, problems: &mut Problems) {
        match self {
            Self::Text(text) => {
                problems.require(!text.is_empty(), &format!("{at}.text"), || "must not be empty".into())
            }
            Self::Chat(messages) => {
                problems.require(!messages.is_empty(), &format!("{at}.chat.messages"), || "must not be empty".into());
                for (i, message) in messages.iter().enumerate() {
                    let field = format!("{at}.chat.messages[{i}].role");
                    problems.require(!message.role.is_empty(), &field, || "must not be empty".into());
                }
            }
            Self::Tokens(ids) => {
                problems.require(!ids.is_empty(), &format!("{at}.tokens.ids"), || "must not be empty".into())
            }
        }
    }
}

impl GenerateParams {
    /// Checks everything but the prompt, which a batch names otherwise.
    pub fn check_options(&self, problems: &mut Problems) {
        check_priority("options.priority", self.priority, problems);
        problems.require(self.max_new_tokens >= 1, "options.max_new_tokens", || "is 0; at least 1 is accepted".into());
        self.sampling.check("options.sampling", problems);
        problems.count("options.stop", self.stop.len(), 0, MAX_STOPS);
        for (i, stop) in self.stop.iter().enumerate().take(MAX_STOPS) {
            problems.require((1..=MAX_STOP_BYTES).contains(&stop.len()), &format!("options.stop[{i}]"), || {
                format!("is {} bytes long; accepted are 1 to {MAX_STOP_BYTES}", stop.len())
            });
        }
        problems.count("options.stop_tokens", self.stop_tokens.len(), 0, MAX_STOP_TOKENS);
        problems.integer("options.logprobs", self.logprobs.unwrap_or(0), 0, MAX_LOGPROBS);
        problems.integer("options.n", self.n, 1, MAX_N);
        self.check_beams(problems);
        self.check_constraint(problems);
        self.check_speculation(problems);
    }

    /// Sequences that it has in the engine.
    pub fn sequences(&self) -> u32 {
        self.beams.map_or(self.n, |search| search.beams.max(self.n))
    }

    /// The field that asks for so many.
    pub(super) fn sequences_field(&self) -> &'static str {
        if self.beams.is_some() { "options.num_beams" } else { "options.n" }
    }

    fn check_beams(&self, problems: &mut Problems) {
        let Some(BeamParams { beams, length_penalty, .. }) = self.beams else { return };
        problems.integer("options.num_beams", beams, 1, MAX_BEAMS);
        problems.range("options.length_penalty", length_penalty.into(), &Range::closed(-10.0, 10.0));
        problems.require(self.n <= beams, "options.n", || format!("is {}, more than the {beams} beams", self.n));
        let beside = |field: &str, given: bool, problems: &mut Problems| {
            problems
                .require(!given, field, || "does not go with num_beams: beams are chosen by their scores".to_owned());
        };
        for (field, given) in self.sampling.chances() {
            beside(&format!("options.sampling.{field}"), given, problems);
        }
        beside("options.stop", !self.stop.is_empty(), problems);
        beside("options.logprobs", self.logprobs.is_some(), problems);
    }

    /// Checks everything.
    ///
    /// # Errors
    /// [`ServeError::Invalid`] with all problems.
    pub fn check(&self) -> Result<(), ServeError> {
        let mut problems = Problems::default();
        self.prompt.check("prompt", &mut problems);
        self.check_options(&mut problems);
        problems.finish()
    }
}

impl TrainParams {
    /// Checks everything that needs neither the base nor the data.
    ///
    /// # Errors
    /// [`ServeError::Invalid`] with all problems.
    pub fn check(&self) -> Result<(), ServeError> {
        let mut problems = Problems::default();
        if let Err(error) = check_name(&self.output_name) {
            problems.push("spec.output_name", error.to_string());
        }
        problems.require(self.task != Task::Feature, "spec.task", || "embedding deltas cannot be trained".into());
        self.data.check("spec.data", &mut problems);
        match &self.validation {
            None => {}
            Some(Validation::Data(data)) => data.check("spec.validation_data", &mut problems),
            Some(Validation::Fraction(share)) => {
                problems.range("spec.validation_fraction", *share, &Range::above(0.0, 0.5))
            }
        }
        self.forgetting.iter().for_each(|data| data.check("spec.forgetting", &mut problems));
        self.replay.iter().for_each(|data| data.check("spec.replay", &mut problems));
        self.check_methods(&mut problems);
        self.check_ewc(&mut problems);
        self.check_mix(&mut problems);
        self.check_preference(&mut problems);
        self.check_sweep(&mut problems);
        self.check_labels(&mut problems);
        self.hyper.check("spec.hyper", &mut problems);
        if let Some(key) = &self.idempotency_key {
            problems.require((1..=MAX_KEY_BYTES).contains(&key.len()), "idempotency_key", || {
                format!("is {} bytes long; accepted are up to {MAX_KEY_BYTES}", key.len())
            });
        }
        problems.finish()
    }

    fn check_methods(&self, problems: &mut Problems) {
        // deltas to start from say what they are made of
        let least = usize::from(self.from_delta.is_none() && self.mix.is_none());
        problems.count("spec.methods", self.methods.len(), least, MAX_METHODS);
        let mut kinds: Vec<&str> = Vec::new();
        for (i, method) in self.methods.iter().enumerate().take(MAX_METHODS) {
            let at = format!("spec.methods[{i}]");
            problems.require(!kinds.contains(&method.kind()), &at, || format!("{} is given twice", method.kind()));
            kinds.push(method.kind());
            match method {
                MethodPart::Lora(lora) => lora.check(&format!("{at}.lora"), problems),
                MethodPart::Adapter(adapter) => adapter.check(&format!("{at}.adapter"), problems),
                MethodPart::Ia3(p) => {
                    if let Some(targets) = &p.targets {
                        check_targets(targets, &format!("{at}.ia3"), problems);
                    }
                    names(p.feedforward.as_deref().unwrap_or(&[]), &format!("{at}.ia3.feedforward"), problems);
                }
                MethodPart::Ln(p) => names(&p.targets, &format!("{at}.ln.targets"), problems),
                MethodPart::Tokens(p) => problems.count(&format!("{at}.tokens.ids"), p.ids.len(), 1, MAX_TOKENS),
                MethodPart::Bitfit(_) | MethodPart::Full => {}
                MethodPart::Prefix(prefix) => prefix.check(&format!("{at}.prefix"), problems),
                MethodPart::Prompt(prompt) => prompt.check(&format!("{at}.prompt"), problems),
                MethodPart::PTuning(part) => part.check(&format!("{at}.p_tuning"), problems),
            }
        }
    }

    fn check_ewc(&self, problems: &mut Problems) {
        let Some(ewc) = &self.ewc else { return };
        problems.require(self.from_delta.is_some(), "spec.ewc", || {
            "is given without from_delta: there is nothing to hold on to".into()
        });
        ewc.data.check("spec.ewc.data", problems);
        problems.range("spec.ewc.lambda", ewc.lambda, &Range::above(0.0, 1e9));
        problems.integer("spec.ewc.max_examples", ewc.max_examples.unwrap_or(1), 1, 100_000);
    }

    fn check_mix(&self, problems: &mut Problems) {
        let Some(mix) = &self.mix else { return };
        problems.count("spec.mix.deltas", mix.deltas.len(), 2, MAX_MIXED);
        for (i, delta) in mix.deltas.iter().enumerate().take(MAX_MIXED) {
            let at = format!("spec.mix.deltas[{i}]");
            problems.require(!delta.is_empty(), &at, || "is empty; accepted is name or name@version".into());
            problems.require(!mix.deltas[..i].contains(delta), &at, || format!("{delta} is given twice"));
        }
        for (given, what) in [
            (!self.methods.is_empty(), "spec.methods"),
            (self.from_delta.is_some(), "spec.from_delta"),
            (self.ewc.is_some(), "spec.ewc"),
        ] {
            problems.require(!given, what, || "is given with mix, which trains nothing but weights of deltas".into());
        }
    }

    fn check_preference(&self, problems: &mut Problems) {
        let Some(preference) = &self.preference else { return };
        let (at, method) = ("spec.preference", preference.method.as_str());
        problems.require(self.task.generates(), at, || {
            format!("{method} is for causal_lm and seq2seq; the task is {}", self.task.as_str())
        });
        preference.check(at, problems);
        let smooths = self.hyper.label_smoothing.is_some_and(|s| s > 0.0);
        problems.require(!smooths, "spec.hyper.label_smoothing", || {
            format!(
                "smooths a target among tokens, which {method} has none of; for dpo there is preference.label_smoothing"
            )
        });
    }

    fn check_labels(&self, problems: &mut Problems) {
        problems.count("spec.labels", self.labels.len(), 0, MAX_LABELS);
        let mut seen = std::collections::HashSet::new();
        for (i, label) in self.labels.iter().enumerate().take(MAX_LABELS) {
            let field = format!("spec.labels[{i}]");
            problems.require(!label.is_empty(), &field, || "must not be empty".into());
            problems.require(seen.insert(label), &field, || format!("{label:?} is given twice"));
        }
    }
}

impl TrainData {
    fn check(&self, at: &str, problems: &mut Problems) {
        let (field, text) = match self {
            Self::Jsonl(text) => (format!("{at}.jsonl"), text),
            Self::Dataset(id) => (format!("{at}.dataset_id"), id),
        };
        problems.require(!text.is_empty(), &field, || "must not be empty".into());
    }
}

impl LoraPart {
    fn check(&self, at: &str, problems: &mut Problems) {
        const ALPHA: Range = Range::above(0.0, 1e6);
        let field = |name: &str| format!("{at}.{name}");
        problems.integer(&field("rank"), self.rank.unwrap_or(1), 1, 1024);
        problems.range(&field("alpha"), self.alpha.unwrap_or(1.0), &ALPHA);
        problems.range(&field("dropout"), self.dropout.unwrap_or(0.0), &Range::below(0.0, 1.0));
        problems.count(&field("rank_pattern"), self.rank_pattern.len(), 0, MAX_PATTERNS);
        problems.count(&field("alpha_pattern"), self.alpha_pattern.len(), 0, MAX_PATTERNS);
        for (name, rank) in self.rank_pattern.iter().take(MAX_PATTERNS) {
            problems.integer(&field(&format!("rank_pattern[{name:?}]")), *rank, 1, 1024);
        }
        for (name, alpha) in self.alpha_pattern.iter().take(MAX_PATTERNS) {
            problems.range(&field(&format!("alpha_pattern[{name:?}]")), *alpha, &ALPHA);
        }
        check_targets(&self.targets, at, problems);
        names(&self.exclude, &field("exclude"), problems);
        names(&self.save_modules, &field("save_modules"), problems);
        problems.range(&field("plus_ratio"), self.plus_ratio.unwrap_or(1.0), &Range::above(0.0, 1000.0));
        problems.count(&field("layers"), self.layers.len(), 0, MAX_PATTERNS);
        problems.count(&field("tokens"), self.tokens.len(), 0, MAX_TOKENS);
    }
}

impl AdapterPart {
    fn check(&self, at: &str, problems: &mut Problems) {
        const FACTOR: Range = Range::above(0.0, 65_536.0);
        let field = |name: &str| format!("{at}.{name}");
        problems.range(&field("reduction_factor"), self.reduction_factor.unwrap_or(1.0), &FACTOR);
        problems.count(&field("reduction_by_layer"), self.reduction_by_layer.len(), 0, MAX_PATTERNS);
        problems.count(&field("leave_out"), self.leave_out.len(), 0, MAX_PATTERNS);
        for (layer, factor) in self.reduction_by_layer.iter().take(MAX_PATTERNS) {
            problems.range(&field(&format!("reduction_by_layer[{layer}]")), *factor, &FACTOR);
        }
        if let Some(AdapterScaling::Fixed(s)) = self.scaling {
            problems.range(&field("scaling"), s, &Range::above(0.0, 1e6));
        }
    }
}

fn check_targets(targets: &super::train_params::Targets, at: &str, problems: &mut Problems) {
    if let super::train_params::Targets::Modules(list) = targets {
        let field = format!("{at}.modules.names");
        problems.count(&field, list.len(), 1, MAX_PATTERNS);
        names(list, &field, problems);
    }
}

/// At most so many names, none of them empty.
fn names(list: &[String], field: &str, problems: &mut Problems) {
    problems.count(field, list.len(), 0, MAX_PATTERNS);
    for (i, name) in list.iter().enumerate().take(MAX_PATTERNS) {
        problems.require(!name.is_empty(), &format!("{field}[{i}]"), || "must not be empty".into());
    }
}

/// Most examples that a job tells the losses of.
const MAX_WORST: u32 = 100;

/// Most evaluations whose weights a job keeps.
const MAX_KEPT_BEST: u32 = 8;

impl HyperParams {
    fn check(&self, at: &str, problems: &mut Problems) {
        let numbers = [
            ("epochs", self.epochs, Range::above(0.0, 1000.0)),
            ("learning_rate", self.learning_rate, Range::above(0.0, 10.0)),
            ("warmup_ratio", self.warmup_ratio, Range::below(0.0, 1.0)),
            ("weight_decay", self.weight_decay, Range::closed(0.0, 10.0)),
            ("beta1", self.beta1, Range::below(0.0, 1.0)),
            ("beta2", self.beta2, Range::below(0.0, 1.0)),
            ("eps", self.eps, Range::above(0.0, 1.0)),
            ("clip_norm", self.clip_norm, Range::closed(0.0, f64::MAX)),
            ("label_smoothing", self.label_smoothing, Range::below(0.0, 1.0)),
            ("min_delta", self.min_delta, Range::closed(0.0, f64::MAX)),
            ("kl_to_base", self.kl_to_base, Range::closed(0.0, 1000.0)),
        ];
        for (name, value, range) in numbers {
            if let Some(value) = value {
                problems.range(&format!("{at}.{name}"), value, &range);
            }
        }
        let integers = [
            ("max_steps", self.max_steps, 10_000_000),
            ("batch_size", self.batch_size, 4096),
            ("grad_accumulation", self.grad_accumulation, 4096),
            ("max_length", self.max_length, u32::MAX),
            ("patience", self.patience, 10_000),
            ("checkpoint_every", self.checkpoint_every, 10_000_000),
            ("keep_best", self.keep_best, MAX_KEPT_BEST),
        ];
        for (name, value, high) in integers {
            if let Some(value) = value {
                problems.integer(&format!("{at}.{name}"), value, 1, high);
            }
        }
        self.generation.check(at, problems);
        if let Some(value) = self.worst_examples {
            problems.integer(&format!("{at}.worst_examples"), value, 0, MAX_WORST);
        }
    }
}
