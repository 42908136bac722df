//! Training messages: requests to the domain, examples to JSON lines.

use serde_json::json;

use crate::{
    admission::{
        check::Problems,
        params::{PublishPolicy, ServeError, Violation},
        train_params::{
            DatasetInfo, EwcParams, GenerationParams, HyperParams, JobState, MemoryEstimate, MixParams, PlanReply,
            ResolvedTraining, Schedule, StartedFrom, TrainData, TrainParams, Validation,
        },
    },
    delta::Problem,
    grpc::proto,
    ids::check_name,
};

/// What to train.
pub(in crate::grpc) fn train(
    spec: Option<proto::TrainingSpec>,
    idempotency_key: String,
) -> Result<TrainParams, ServeError> {
    let Some(spec) = spec else { return Err(ServeError::field("spec", "is required")) };
    let mut problems = Problems::default();
    let params = TrainParams {
        output_name: spec.output_name,
        task: super::task("spec.task", spec.task, &mut problems),
        problem: problem(spec.problem_type, &mut problems),
        data: data("spec.data", spec.data, &mut problems),
        validation: spec.validation.map(|v| validation(v, &mut problems)),
        methods: super::methods::from_wire(
            spec.methods,
            spec.from_delta.is_empty() && spec.mix.is_none(),
            &mut problems,
        ),
        labels: spec.labels,
        k_per_class: spec.k_per_class,
        forgetting: spec.forgetting.map(|m| data("spec.forgetting", Some(m), &mut problems)),
        replay: spec.replay.map(|m| data("spec.replay", Some(m), &mut problems)),
        hyper: hyper(spec.hyper.unwrap_or_default(), &mut problems),
        publish: super::policy("spec.publish", spec.publish, &mut problems),
        ewc: spec.ewc.map(|e| EwcParams {
            data: data("spec.ewc.data", e.data, &mut problems),
            lambda: e.lambda,
            max_examples: e.max_examples,
        }),
        preference: spec.preference.and_then(|p| super::preference::from_wire(p, &mut problems)),
        sweep: spec.sweep.map(super::sweep::from_wire),
        from_delta: (!spec.from_delta.is_empty()).then_some(spec.from_delta),
        mix: spec.mix.map(|m| MixParams { deltas: m.deltas, per_layer: m.per_layer }),
        idempotency_key: (!idempotency_key.is_empty()).then_some(idempotency_key),
    };
    problems.finish()?;
    params.check()?;
    Ok(params)
}

fn problem(value: i32, problems: &mut Problems) -> Problem {
    use proto::ProblemType as Wire;
    match Wire::try_from(value) {
        Ok(Wire::Unspecified | Wire::SingleLabel) => Problem::SingleLabel,
        Ok(Wire::MultiLabel) => Problem::MultiLabel,
        Ok(Wire::Regression) => Problem::Regression,
        Err(unknown) => {
            problems.push("spec.problem_type", unknown.to_string());
            Problem::SingleLabel
        }
    }
}

fn data(at: &str, message: Option<proto::TrainingData>, problems: &mut Problems) -> TrainData {
    use proto::training_data::Source;
    match message.and_then(|m| m.source) {
        Some(Source::DatasetId(id)) => TrainData::Dataset(id),
        Some(Source::Jsonl(text)) => TrainData::Jsonl(text),
        Some(Source::Examples(examples)) => TrainData::Jsonl(json_lines(at, examples.examples, problems)),
        None => {
            problems.push(at, "is required: one of dataset_id, jsonl, examples");
            TrainData::Jsonl(String::new())
        }
    }
}

fn validation(message: proto::training_spec::Validation, problems: &mut Problems) -> Validation {
    use proto::training_spec::Validation as Wire;
    match message {
        Wire::ValidationData(m) => Validation::Data(data("spec.validation_data", Some(m), problems)),
        Wire::ValidationFraction(share) => Validation::Fraction(share),
    }
}

/// Line i is example i: the trainer validates examples and files alike.
fn json_lines(at: &str, examples: Vec<proto::Example>, problems: &mut Problems) -> String {
    use proto::example::Example as Form;
    let mut out = String::new();
    for (i, example) in examples.into_iter().enumerate() {
        let value = match example.example {
            Some(Form::Text(text)) => json!({ "text": text }),
            Some(Form::PromptCompletion(e)) => json!({ "prompt": e.prompt, "completion": e.completion }),
            Some(Form::Chat(chat)) => {
                json!({ "messages": chat.messages.into_iter().map(super::inference::chat_message).collect::<Vec<_>>() })
            }
            Some(Form::Labelled(e)) => json!({ "text": e.text, "label": e.label }),
            Some(Form::Tagged(e)) => json!({ "tokens": e.tokens, "labels": e.labels }),
            Some(Form::Preferred(e)) => json!({ "prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected }),
            Some(Form::Rated(e)) => json!({ "prompt": e.prompt, "completion": e.completion, "label": e.label }),
            None => {
                problems.push(format!("{at}.examples[{i}]"), "is empty; one form is required");
                continue;
            }
        };
        out.push_str(&value.to_string());
        out.push('\n');
    }
    out
}

fn hyper(m: proto::HyperParameters, problems: &mut Problems) -> HyperParams {
    use proto::Schedule as Wire;
    let schedule = match Wire::try_from(m.schedule) {
        Ok(Wire::Unspecified) => None,
        Ok(Wire::Linear) => Some(Schedule::Linear),
        Ok(Wire::Cosine) => Some(Schedule::Cosine),
        Ok(Wire::Constant) => Some(Schedule::Constant),
        Err(unknown) => {
            problems.push("spec.hyper.schedule", unknown.to_string());
            None
        }
    };
    HyperParams {
        epochs: m.epochs,
        max_steps: m.max_steps,
        batch_size: m.batch_size,
        grad_accumulation: m.grad_accumulation,
        learning_rate: m.learning_rate,
        schedule,
        warmup_ratio: m.warmup_ratio,
        weight_decay: m.weight_decay,
        beta1: m.beta1,
        beta2: m.beta2,
        eps: m.eps,
        clip_norm: m.clip_norm,
        max_length: m.max_length,
        seed: m.seed,
        eval_every: m.eval_every,
        packing: m.packing,
        eval_metric: m.eval_metric,
        patience: m.patience,
        min_delta: m.min_delta,
        label_smoothing: m.label_smoothing,
        checkpoint_every: m.checkpoint_every,
        keep_last: m.keep_last,
        worst_examples: m.worst_examples,
        gradient_checkpointing: m.gradient_checkpointing,
        generation: GenerationParams {
            wanted: m.eval_generate,
            new_tokens: m.eval_new_tokens,
            examples: m.eval_examples,
        },
        kl_to_base: m.kl_to_base,
        keep_best: m.keep_best,
    }
}

/// A name and what may happen to it.
pub(in crate::grpc) fn publish_target(
    name: String,
    policy: Option<proto::PublishPolicy>,
) -> Result<(String, PublishPolicy), ServeError> {
    let mut problems = Problems::default();
    if let Err(error) = check_name(&name) {
        problems.push("name", error.to_string());
    }
    let policy = super::policy("policy", policy, &mut problems);
    problems.finish().map(|()| (name, policy))
}

/// A dataset to the wire.
pub(in crate::grpc) fn dataset(d: DatasetInfo) -> proto::Dataset {
    proto::Dataset {
        id: d.id,
        name: d.name.unwrap_or_default(),
        format: d.format,
        rows: d.rows,
        bytes: d.bytes,
        digest: d.digest,
        created_ms: d.created_ms,
    }
}

/// The reply of Plan.
pub(in crate::grpc) fn plan_response(p: PlanReply) -> proto::PlanResponse {
    proto::PlanResponse {
        resolved: Some(resolved(p.resolved)),
        trainable_parameters: p.trainable_parameters,
        train_examples: p.train_examples,
        validation_examples: p.validation_examples,
        train_tokens: p.train_tokens,
        supervised_tokens: p.supervised_tokens,
        longest_example: p.longest_example,
        memory: Some(memory(p.memory)),
        warnings: p.warnings.into_iter().map(issue).collect(),
    }
}

fn memory(m: MemoryEstimate) -> proto::MemoryEstimate {
    proto::MemoryEstimate {
        parameters: m.parameters,
        gradients: m.gradients,
        optimizer: m.optimizer,
        activations: m.activations,
        total: m.total(),
    }
}

fn issue(v: Violation) -> proto::Issue {
    proto::Issue { field: v.field, code: v.code, message: v.message }
}

fn started_from(s: StartedFrom) -> proto::StartedFrom {
    proto::StartedFrom { name: s.name, id: s.id, head: s.head }
}

pub(super) fn resolved(r: ResolvedTraining) -> proto::ResolvedTraining {
    proto::ResolvedTraining {
        task: super::task_to_wire(r.task),
        methods: r.methods.into_iter().map(super::methods::to_wire).collect(),
        labels: r.labels,
        epochs: r.epochs,
        total_steps: r.total_steps,
        batch_size: r.batch_size,
        grad_accumulation: r.grad_accumulation,
        learning_rate: r.learning_rate,
        schedule: match r.schedule {
            Schedule::Linear => proto::Schedule::Linear,
            Schedule::Cosine => proto::Schedule::Cosine,
            Schedule::Constant => proto::Schedule::Constant,
        }
        .into(),
        warmup_steps: r.warmup_steps,
        weight_decay: r.weight_decay,
        beta1: r.beta1,
        beta2: r.beta2,
        eps: r.eps,
        clip_norm: r.clip_norm,
        max_length: r.max_length,
        seed: r.seed,
        eval_every: r.eval_every,
        packing: r.packing,
        started_from: r.started_from.map(started_from),
        mix: r.mix.map(|m| proto::ResolvedMix {
            deltas: m.deltas.into_iter().map(started_from).collect(),
            per_layer: m.per_layer,
        }),
        ewc_lambda: r.ewc.map_or(0.0, |e| e.lambda),
        ewc_examples: r.ewc.map_or(0, |e| e.examples),
        problem_type: match r.problem {
            Problem::SingleLabel => proto::ProblemType::SingleLabel,
            Problem::MultiLabel => proto::ProblemType::MultiLabel,
            Problem::Regression => proto::ProblemType::Regression,
        }
        .into(),
        eval_metric: r.eval_metric.as_str().to_owned(),
        patience: r.patience,
        min_delta: r.min_delta,
        label_smoothing: r.label_smoothing,
        checkpoint_every: r.checkpoint_every,
        keep_last: r.keep_last,
        worst_examples: r.worst_examples,
        gradient_checkpointing: r.gradient_checkpointing,
        preference: r.preference.map(super::preference::to_wire),
        eval_new_tokens: r.generation.map_or(0, |g| g.new_tokens),
        eval_examples: r.generation.map_or(0, |g| g.examples),
        kl_to_base: r.kl_to_base,
        replay_examples: r.replay_examples,
        keep_best: r.keep_best,
        sweep: r.sweep.into_iter().map(super::sweep::candidate).collect(),
    }
}

/// A job's state to the wire.
pub(super) fn state_to_wire(state: JobState) -> i32 {
    use proto::JobState as Wire;
    match state {
        JobState::Queued => Wire::Queued,
        JobState::Running => Wire::Running,
        JobState::Publishing => Wire::Publishing,
        JobState::Succeeded => Wire::Succeeded,
        JobState::Failed => Wire::Failed,
        JobState::Cancelled => Wire::Cancelled,
        JobState::Interrupted => Wire::Interrupted,
        JobState::Paused => Wire::Paused,
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::train_params::{LoraPart, MethodPart};

    fn fields(error: ServeError) -> Vec<String> {
        match error {
            ServeError::Invalid(all) => all.into_iter().map(|v| v.field).collect(),
            other => panic!("{other}"),
        }
    }

    fn spec() -> proto::TrainingSpec {
        let source = proto::training_data::Source::Jsonl("{\"text\":\"a\"}\n".into());
        proto::TrainingSpec {
            output_name: "style".into(),
            task: proto::Task::CausalLm.into(),
            data: Some(proto::TrainingData { source: Some(source) }),
            ..Default::default()
        }
    }

    #[test]
    fn a_bare_spec_is_lora_with_defaults() -> Result<(), ServeError> {
        let params = train(Some(spec()), String::new())?;
        assert_eq!(params.methods, [MethodPart::Lora(LoraPart::default())]);
        assert_eq!(params.hyper, HyperParams::default());
        assert_eq!((params.publish, params.idempotency_key), (PublishPolicy::Upsert, None));
        Ok(())
    }

    #[test]
    fn every_bad_hyper_parameter_is_named_at_once() {
        let hyper = proto::HyperParameters {
            epochs: Some(f64::NAN),
            max_steps: Some(0),
            batch_size: Some(1_000_000),
            learning_rate: Some(0.0),
            warmup_ratio: Some(1.0),
            weight_decay: Some(-0.1),
            beta2: Some(1.0),
            eps: Some(0.0),
            clip_norm: Some(f64::INFINITY),
            ..Default::default()
        };
        let lora = proto::Lora { rank: Some(0), alpha: Some(f64::NAN), dropout: Some(1.0), ..Default::default() };
        let part = proto::MethodPart { part: Some(proto::method_part::Part::Lora(lora)) };
        let bad = proto::TrainingSpec {
            output_name: "a/b".into(),
            methods: vec![part.clone(), part],
            labels: vec!["x".into(), "x".into()],
            hyper: Some(hyper),
            validation: Some(proto::training_spec::Validation::ValidationFraction(0.9)),
            ..spec()
        };
        let got = fields(train(Some(bad), "k".repeat(129)).expect_err("all of it is bad"));
        for field in [
            "spec.output_name",
            "spec.validation_fraction",
            "spec.methods[0].lora.rank",
            "spec.methods[0].lora.alpha",
            "spec.methods[0].lora.dropout",
            "spec.methods[1]",
            "spec.labels[1]",
            "spec.hyper.epochs",
            "spec.hyper.max_steps",
            "spec.hyper.batch_size",
            "spec.hyper.learning_rate",
            "spec.hyper.warmup_ratio",
            "spec.hyper.weight_decay",
            "spec.hyper.beta2",
            "spec.hyper.eps",
            "spec.hyper.clip_norm",
            "idempotency_key",
        ] {
            assert!(got.iter().any(|f| f == field), "{field} is not among {got:?}");
        }
    }

    #[test]
    fn contradictions_and_gaps_are_refused() {
        let all_linear = proto::Lora { targets: Some(proto::lora::Targets::AllLinear(false)), ..Default::default() };
        let bad = proto::TrainingSpec {
            task: 0,
            data: None,
            methods: vec![
                proto::MethodPart { part: None },
                proto::MethodPart { part: Some(proto::method_part::Part::Lora(all_linear)) },
            ],
            publish: Some(proto::PublishPolicy { mode: 1, expected_id: "ab".into() }),
            ..spec()
        };
        let got = fields(train(Some(bad), String::new()).expect_err("all of it is bad"));
        let expected = [
            "spec.task",
            "spec.data",
            "spec.methods[0]",
            "spec.methods[1].lora.all_linear",
            "spec.publish.expected_id",
        ];
        assert_eq!(got, expected);
        assert_eq!(fields(train(None, String::new()).expect_err("no spec")), ["spec"]);
    }

    #[test]
    fn examples_become_json_lines_in_order() -> Result<(), Box<dyn std::error::Error>> {
        use proto::example::Example as Form;
        let examples = [
            Form::Text("a\nb".into()),
            Form::PromptCompletion(proto::PromptCompletion { prompt: "p".into(), completion: "c".into() }),
            Form::Labelled(proto::LabelledText { text: "t".into(), label: "l".into() }),
        ]
        .map(|e| proto::Example { example: Some(e) });
        let mut problems = Problems::default();
        let lines = json_lines("d", examples.to_vec(), &mut problems);
        let values: Vec<serde_json::Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        assert_eq!(values[0]["text"], "a\nb");
        assert_eq!(values[1]["completion"], "c");
        assert_eq!(values[2], json!({"text": "t", "label": "l"}));
        problems.finish()?;
        Ok(())
    }
}
