//! From a request and its data to everything that a run needs: resolved hyper-parameters, tokens, sites, an estimate.
//!
//! `Plan` and `CreateJob` both end here, so a dry run says exactly what a job would do. Every problem is reported, not
//! only the first. No tensors.

mod defaults;
mod evaluation;
mod few_shot;
mod generation;
mod held;
mod hyper;
mod keeping;
mod replay;
mod sweep;

use std::sync::Arc;

pub(super) use defaults::default_length;
use defaults::{Chosen, max_length, with_defaults};
pub use sweep::Candidate;

use crate::{
    admission::{
        params::Violation,
        train_params::{MemoryEstimate, PlanReply, TrainParams, Validation},
    },
    train::{
        batches,
        dataset::Dataset,
        encode::{Encoded, TextCodec, add_mismatched, encode},
        generate::Quiz,
        issue::{Report, Severity},
        spec::{BaseShape, Start, TrainSpec},
        transfer::{self, Continue, Continued},
        validate::{LabelSet, check_train, check_validation},
        worst::Decoder,
    },
};

/// Rows of one forward and backward while training: the longest that serving ever waits for, and the activations' bound.
pub const MICRO_TOKENS: usize = 2048;
/// The same for deltas, whose gradients are small enough to be summed more often: fewer activations at no cost in time. On a
/// CPU what is between two products then stays in its caches.
pub fn micro_tokens_of_delta(on_cpu: bool) -> usize {
    if on_cpu { 512 } else { 1024 }
}

/// Most optimizer steps of a job.
pub const MAX_STEPS: u32 = 10_000_000;

/// A request with its data at hand.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The request.
    pub params: &'a TrainParams,
    /// JSON lines of the training examples.
    pub train: &'a [u8],
    /// JSON lines of the validation examples, if the request has separate ones.
    pub validation: Option<&'a [u8]>,
    /// The delta to continue.
    pub start: Option<Continue<'a>>,
    /// JSON lines of the held text, if the request has one.
    pub forgetting: Option<&'a [u8]>,
    /// JSON lines of the texts that the divergence from the base is taken on, if the request has some.
    pub replay: Option<&'a [u8]>,
}

/// What planning needs to know of the base.
#[derive(Debug, Clone, Copy)]
pub struct BaseInfo<'a> {
    /// Sites and widths.
    pub shape: BaseShape<'a>,
    /// Longest sequence.
    pub max_positions: usize,
}

/// A job, ready to run.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// What is told to the client: resolved hyper-parameters, counts, estimate, warnings.
    pub reply: PlanReply,
    /// Sites and patches.
    pub spec: TrainSpec,
    /// Training examples.
    pub train: Arc<[Encoded]>,
    /// Validation examples; may be empty.
    pub validation: Arc<[Encoded]>,
    /// The delta to continue.
    pub start: Option<Continued>,
    /// The held text whose loss is compared at the end; may be empty.
    pub held: Arc<[Encoded]>,
    /// The texts that the divergence from the base is taken on; empty = the training examples.
    pub replay: Arc<[Encoded]>,
    /// Whether the validation examples have a file of their own; else they were drawn from the training data.
    pub separate_validation: bool,
    /// Ids to text.
    pub decoder: Decoder,
    /// What evaluations ask; may be empty.
    pub quiz: Quiz,
    /// The estimate with gradient checkpointing, where the request leaves that open.
    pub lean: Option<MemoryEstimate>,
    /// The candidates of a sweep; empty without one. `spec` is that of the first.
    pub candidates: Vec<Candidate>,
}

/// Resolves a request. Runs long (it tokenises everything): not for an async thread.
///
/// # Errors
/// Every problem of the request and of its data.
pub fn prepare(inputs: Inputs<'_>, base: BaseInfo<'_>, codec: &TextCodec) -> Result<Prepared, Vec<Violation>> {
    let params = inputs.params;
    let mut problems = Vec::new();
    if let Some(Validation::Fraction(f)) = params.validation
        && !(f > 0.0 && f <= 0.5)
    {
        problems.push(violation("validation.fraction", format!("is {f}; accepted is (0, 0.5]")));
    }
    let (mut data, mut report) = Dataset::parse(inputs.train);
    let labels = LabelSet::resolve_for(params.problem, &params.labels, &data, &mut report);
    check_train(&data, params, &labels, &mut report);
    if report.is_ok() {
        problems.extend(few_shot::take(params, &labels, &mut data));
    }
    let (methods, clashes) = match inputs.start {
        Some(start) => transfer::methods(params, start, base.shape),
        None => (params.methods.clone(), Vec::new()),
    };
    problems.extend(clashes);
    let methods = with_defaults(&methods, params.task, base.shape);
    // while the data is bad, its labels are no ground to complain about the head
    let mut spec = match transfer::resolve(params, &methods, labels.names(), base.shape, inputs.start) {
        Ok(spec) => Some(spec),
        Err(found) => {
            problems.extend(found.into_iter().filter(|v| report.is_ok() || !v.field.starts_with("labels")));
            None
        }
    };
    // virtual tokens take positions of the context
    let room = match &mut spec {
        Some(spec) => place(spec, base.max_positions, codec, &mut problems),
        None => base.max_positions,
    };
    let sweep = sweep::resolve(params, (&methods, spec.as_ref()), labels.names(), base.shape, &mut problems);
    problems.extend(hyper::check(&params.hyper, room, base.max_positions));
    problems.extend(keeping::problems(params));
    let max_length = max_length(&params.hyper, params.task, room);
    let fits = problems.iter().all(|p| p.field != "hyper.max_length");
    let mut train = if fits { encode(&data, codec, &labels, max_length, &mut report) } else { Vec::new() };
    problems.extend(report.violations("data"));
    let mut warnings = warnings("data", &report);
    let (mut validation, mut separate) = (Vec::new(), None);
    if let Some(bytes) = inputs.validation {
        let (held, mut report) = Dataset::parse(bytes);
        check_validation(&held, &data, params, &labels, &mut report);
        validation = if fits { encode(&held, codec, &labels, max_length, &mut report) } else { Vec::new() };
        problems.extend(report.violations("validation"));
        warnings.extend(self::warnings("validation", &report));
        separate = Some(held);
    }
    let held = held::examples(&inputs, codec, max_length, &mut problems, &mut warnings);
    let replay = replay::examples(&inputs, codec, max_length, &mut problems, &mut warnings);
    let continued = inputs.start.filter(|_| fits).map(|start| {
        let context = transfer::Context { params, labels: labels.names(), codec, max_length, room };
        transfer::continued(start, &context)
    });
    let start = match continued.transpose() {
        Ok(found) => found.map(|(start, report)| {
            warnings.extend(self::warnings("ewc.data", &report));
            start
        }),
        Err(found) => {
            problems.extend(found);
            None
        }
    };
    let eval_metric = evaluation::metric(params, labels.names(), &mut problems);
    let evaluated = separate.as_ref().unwrap_or(&data);
    let asks = generation::is_wanted(params, eval_metric, evaluated.format, &mut problems);
    let (Some(mut spec), true) = (spec, problems.is_empty()) else { return Err(problems) };
    let seed = params.hyper.seed.unwrap_or(0);
    if let Some(Validation::Fraction(f)) = params.validation {
        let (keep, hold) = batches::split(train.len(), f, seed);
        validation = hold.iter().map(|i| train[*i].clone()).collect();
        train = keep.iter().map(|i| train[*i].clone()).collect();
    }
    add_mismatched(&mut train, max_length);
    add_mismatched(&mut validation, max_length);
    let chosen = Chosen { params, methods: &methods, labels: &labels, max_length, eval_metric, base: base.shape };
    let mut resolved = chosen.resolve(&train, start.as_ref());
    resolved.replay_examples = replay.len() as u32;
    let candidates = sweep::candidates(sweep, &mut spec, &mut resolved);
    let beside = candidates.len().max(1);
    let virtual_rows = spec.positions.count();
    let mut quiz = Quiz::default();
    if asks {
        let asks = generation::Asks { params, metric: eval_metric, codec, base: base.shape, room };
        let (asked, used, warning) = asks.quiz(evaluated, &validation)?;
        (quiz, resolved.generation) = (asked, Some(used));
        warnings.extend(warning);
    }
    let cache = generation::cache_bytes(base.shape, &quiz, 2 * virtual_rows);
    let most_of =
        |size: &dyn Fn(&Encoded) -> usize| train.iter().chain(&validation).chain(&replay).map(size).max().unwrap_or(0);
    let longest = most_of(&Encoded::longest);
    let longest_rows = longest + virtual_rows;
    let example_rows = most_of(&|e| e.rows() + e.sequences() * virtual_rows);
    let on_cpu = base.shape.base.is_none_or(|b| b.device.is_cpu());
    let most = if spec.full.is_some() { MICRO_TOKENS } else { micro_tokens_of_delta(on_cpu) };
    // candidates share a micro-batch's rows
    let rows = (resolved.batch_size as usize * example_rows * beside).min(most.max(example_rows));
    let sites = base.shape.sites;
    let of = |spec: &TrainSpec| start.as_ref().map_or_else(|| spec.parameters(sites), |s| s.parameters(spec, sites));
    let parameters = if candidates.is_empty() { of(&spec) } else { candidates.iter().map(|c| of(&c.spec)).sum() };
    let estimate = |by_layer| {
        let mut memory = spec.memory(base.shape, parameters, (rows, longest_rows), by_layer);
        if beside > 1 {
            memory.activations += sweep::activations(base.shape, rows);
        }
        if resolved.ewc.is_some() {
            memory.optimizer += 2 * memory.parameters;
        }
        memory.activations += start.as_ref().map_or(0, Continued::held_bytes);
        // prompts are answered between steps
        memory.activations = memory.activations.max(cache);
        memory.parameters *= keeping::copies(&resolved, &spec, !validation.is_empty());
        memory
    };
    let memory = estimate(resolved.gradient_checkpointing);
    let lean = (params.hyper.gradient_checkpointing.is_none() && beside == 1).then(|| estimate(true));
    let reply = PlanReply {
        trainable_parameters: parameters,
        train_examples: train.len() as u64,
        validation_examples: validation.len() as u64,
        train_tokens: train.iter().map(|e| e.rows() as u64).sum(),
        supervised_tokens: train.iter().map(|e| e.supervised() as u64).sum(),
        longest_example: longest as u32,
        memory,
        warnings,
        resolved,
    };
    let (train, validation, held, decoder) = (train.into(), validation.into(), held.into(), codec.decoder.clone());
    let replay = replay.into();
    let separate_validation = inputs.validation.is_some();
    Ok(Prepared {
        reply,
        spec,
        train,
        validation,
        held,
        replay,
        start,
        separate_validation,
        decoder,
        quiz,
        lean,
        candidates,
    })
}

impl Prepared {
    /// Turns gradient checkpointing on where the request leaves it open and the job needs more memory than this.
    pub fn fit(&mut self, room: u64) {
        if let Some(lean) = self.lean.take_if(|_| self.reply.memory.total() > room) {
            (self.reply.memory, self.reply.resolved.gradient_checkpointing) = (lean, true);
        }
    }
}

/// Shortest examples that a base must have room for.
const MIN_LENGTH: usize = 4;

/// Positions that virtual tokens leave for examples. Texts that they start from become tokens.
fn place(spec: &mut TrainSpec, max_positions: usize, codec: &TextCodec, problems: &mut Vec<Violation>) -> usize {
    let count = spec.positions.count();
    let Some(room) = max_positions.checked_sub(count).filter(|room| *room >= MIN_LENGTH) else {
        let fields: Vec<&str> = spec.positions.iter().map(|p| p.field.as_str()).collect();
        problems.push(violation(
            &format!("{}.num_virtual_tokens", fields.join(", ")),
            format!(
                "{count} virtual tokens and an example of {MIN_LENGTH} tokens exceed the base's context of {max_positions}"
            ),
        ));
        return max_positions;
    };
    for plan in spec.positions.iter_mut() {
        if let (Start::Text(tokens), Some(text)) = (&mut plan.start, &plan.text) {
            match (codec.encode)(text, true) {
                Ok(ids) if !ids.is_empty() => *tokens = ids,
                Ok(_) => problems.push(violation(&format!("{}.init_text", plan.field), "comes to no tokens")),
                Err(e) => problems.push(violation(&format!("{}.init_text", plan.field), e)),
            }
        }
    }
    room
}

fn violation(field: &str, message: impl Into<String>) -> Violation {
    Violation { field: field.to_owned(), code: String::new(), message: message.into() }
}

fn warnings(field: &str, report: &Report) -> Vec<Violation> {
    let all = report.issues.iter().filter(|i| i.severity == Severity::Warning);
    let place = |line: u64, pointer: &str| match line {
        0 => field.to_owned(),
        n => format!("{field} line {n} {pointer}").trim_end().to_owned(),
    };
    all.map(|i| Violation {
        field: place(i.line, &i.pointer),
        code: i.code.as_str().to_owned(),
        message: i.message.clone(),
    })
    .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        admission::{
            params::PublishPolicy,
            train_params::{BitfitPart, HyperParams, LoraPart, MethodPart, TrainData},
        },
        delta::{Problem, Task},
        train::{encode::tests::byte_codec, spec::tests::table},
    };

    pub(crate) fn params(task: Task, methods: Vec<MethodPart>) -> TrainParams {
        TrainParams {
            output_name: "out".into(),
            task,
            problem: Problem::SingleLabel,
            data: TrainData::Jsonl(String::new()),
            validation: None,
            methods,
            labels: vec![],
            k_per_class: None,
            forgetting: None,
            replay: None,
            hyper: HyperParams::default(),
            publish: PublishPolicy::Upsert,
            from_delta: None,
            mix: None,
            ewc: None,
            preference: None,
            sweep: None,
            idempotency_key: None,
        }
    }

    pub(super) fn lora() -> Vec<MethodPart> {
        vec![MethodPart::Lora(LoraPart::default())]
    }

    pub(super) fn run(params: &TrainParams, train: &str, validation: Option<&str>) -> Result<Prepared, Vec<Violation>> {
        let sites = table(true);
        let causal = params.task == Task::CausalLm;
        let shape =
            BaseShape { sites: &sites, hidden: 8, vocab: 300, causal, encoder_decoder: false, inner: None, base: None };
        let validation = validation.map(str::as_bytes);
        let inputs =
            Inputs { params, train: train.as_bytes(), validation, forgetting: None, replay: None, start: None };
        prepare(inputs, BaseInfo { shape, max_positions: 64 }, &byte_codec(true))
    }

    fn lines(n: usize) -> String {
        (0..n).map(|i| format!("{{\"text\": \"number {i}\", \"label\": \"{}\"}}\n", ["odd", "even"][i % 2])).collect()
    }

    #[test]
    fn defaults_are_resolved_and_echoed() {
        let p = run(&params(Task::SeqCls, lora()), &lines(100), None).unwrap();
        let r = &p.reply.resolved;
        assert_eq!((r.batch_size, r.epochs, r.total_steps, r.warmup_steps), (32, 4.0, 16, 0));
        assert_eq!((r.learning_rate, r.labels.clone()), (1e-3, vec!["even".to_owned(), "odd".to_owned()]));
        let MethodPart::Lora(part) = &r.methods[0] else { panic!("lora") };
        assert_eq!((part.rank, part.alpha, part.dropout), (Some(8), Some(16.0), Some(0.0)));
        assert_eq!(p.reply.trainable_parameters, p.spec.parameters(&table(true)));
        assert!(p.reply.memory.total() > 0);
        let mut limited = params(Task::SeqCls, lora());
        limited.hyper.max_steps = Some(7);
        assert_eq!(run(&limited, &lines(100), None).unwrap().reply.resolved.total_steps, 7);
        limited.hyper.epochs = Some(1.0);
        assert_eq!(run(&limited, &lines(100), None).unwrap().reply.resolved.total_steps, 4);
        let epochs = |task, methods| run(&params(task, methods), &lines(100), None).unwrap().reply.resolved.epochs;
        let bitfit = || MethodPart::Bitfit(BitfitPart::default());
        assert_eq!(epochs(Task::SeqCls, vec![bitfit()]), 8.0, "few numbers take more rounds");
        assert_eq!(epochs(Task::SeqCls, [lora(), vec![bitfit()]].concat()), 4.0);
    }

    #[test]
    fn a_fraction_is_held_out_by_the_seed() {
        let mut p = params(Task::SeqCls, lora());
        p.validation = Some(Validation::Fraction(0.2));
        let a = run(&p, &lines(50), None).unwrap();
        assert_eq!((a.train.len(), a.validation.len()), (40, 10));
        assert_eq!(a.validation, run(&p, &lines(50), None).unwrap().validation);
        p.hyper.seed = Some(9);
        assert_ne!(a.validation, run(&p, &lines(50), None).unwrap().validation);
        p.validation = Some(Validation::Fraction(0.9));
        assert_eq!(run(&p, &lines(50), None).unwrap_err()[0].field, "validation.fraction");
    }

    #[test]
    fn problems_of_request_training_and_validation_data_come_together() {
        let mut p = params(Task::SeqCls, lora());
        p.hyper.learning_rate = Some(f64::NAN);
        p.hyper.batch_size = Some(0);
        p.hyper.beta2 = Some(1.0);
        let bad = format!("{}nonsense\n", lines(4));
        let found = run(&p, &bad, Some("{\"text\": \"x\", \"label\": \"third\"}")).unwrap_err();
        let found: Vec<_> = found.iter().map(|v| (v.field.as_str(), v.code.as_str())).collect();
        let want = [
            ("hyper.learning_rate", ""),
            ("hyper.beta2", ""),
            ("hyper.batch_size", ""),
            ("data line 5", "NOT_JSON"),
            ("validation line 1 /label", "LABEL_UNKNOWN"),
        ];
        assert_eq!(found, want);
    }

    #[test]
    fn preferences_have_defaults_and_figures_of_their_own() {
        use crate::admission::train_params::{EvalMetric, PreferenceMethod, PreferenceParams};
        let texts = run(&params(Task::CausalLm, lora()), "{\"text\": \"one\"}\n{\"text\": \"two\"}", None).unwrap();
        let rate = texts.reply.resolved.learning_rate;
        let pair = |i: usize| format!("{{\"prompt\": \"p{i}\", \"chosen\": \"yes\", \"rejected\": \"n\"}}\n");
        let rated = |i: usize| {
            format!("{{\"prompt\": \"p{i}\", \"completion\": \"yes\", \"label\": {}}}\n", i.is_multiple_of(2))
        };
        let (pairs, rated): (String, String) = ((0..10).map(pair).collect(), (0..10).map(rated).collect());
        for (method, data, share) in [
            (PreferenceMethod::Dpo, &pairs, 0.1),
            (PreferenceMethod::Orpo, &pairs, 0.4),
            (PreferenceMethod::Kto, &rated, 0.1),
        ] {
            let mut p = params(Task::CausalLm, lora());
            p.preference = Some(PreferenceParams::of(method));
            p.validation = Some(Validation::Fraction(0.2));
            let planned = run(&p, data, None).unwrap();
            let r = &planned.reply.resolved;
            assert_eq!((r.preference, r.eval_metric), (p.preference.map(|p| p.resolve()), EvalMetric::Loss));
            assert!((r.learning_rate - share * rate).abs() < 1e-12, "{method:?} {}", r.learning_rate);
            assert_eq!((planned.train.len(), planned.validation.len()), (8, 2));
            assert!(planned.train.iter().chain(&*planned.validation).all(|e| e.sequences() == 2), "{method:?}");
            // the codec's start, two of the prompt, the answers and their ends
            let tokens = if method == PreferenceMethod::Kto { 7 + 7 } else { 7 + 5 };
            assert_eq!((planned.reply.train_tokens, planned.reply.longest_example), (8 * tokens, 7), "{method:?}");
            let learned = if method == PreferenceMethod::Kto { 4 } else { 4 + 2 };
            assert_eq!(planned.reply.supervised_tokens, 8 * learned);
            assert_eq!(
                run(&p, if method == PreferenceMethod::Kto { &pairs } else { &rated }, None).unwrap_err()[0].code,
                "WRONG_TASK"
            );
        }
    }

    #[test]
    fn an_empty_or_single_example_set_is_refused() {
        let p = params(Task::CausalLm, lora());
        assert_eq!(run(&p, "", None).unwrap_err()[0].code, "EMPTY_FILE");
        assert_eq!(run(&p, "{\"text\": \"one\"}", None).unwrap_err()[0].code, "TOO_FEW_EXAMPLES");
        assert_eq!(
            run(
                &params(Task::SeqCls, lora()),
                "{\"text\":\"a\",\"label\":\"x\"}\n{\"text\":\"b\",\"label\":\"x\"}",
                None
            )
            .unwrap_err()[0]
                .code,
            "ONE_LABEL"
        );
    }
}
