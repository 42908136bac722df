//! `train`: upload the data, create the job, watch it with a progress bar (or plain lines, or JSON).

use std::{path::Path, time::Duration};

mod methods;
mod preference;
mod start;
mod sweep;
#[cfg(test)]
mod testing;
mod view;
pub(super) mod worst;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use tonic::Code;

use super::{Common, client::Client, deltas::PublishArgs, output};
use crate::grpc::proto;
use methods::{MethodArg, MethodArgs};
use preference::PreferenceArgs;
use start::StartArgs;
use sweep::SweepArgs;
use view::View;

const CHUNK: usize = 256 * 1024;
/// A lost watch is taken up again this often in a row.
const RECONNECTS: u32 = 5;

/// Options of `train`.
#[derive(Debug, Clone, Args)]
pub(super) struct TrainArgs {
    /// Name to publish under.
    name: String,
    /// JSON Lines file with examples.
    #[arg(long, short, required_unless_present = "dataset")]
    file: Option<std::path::PathBuf>,
    /// Id of an uploaded dataset, instead of a file.
    #[arg(long, conflicts_with = "file")]
    dataset: Option<String>,
    /// JSON Lines file with examples for evaluation.
    #[arg(long, conflicts_with = "validation_fraction")]
    validation: Option<std::path::PathBuf>,
    /// Share of the examples for evaluation.
    #[arg(long, value_name = "SHARE")]
    validation_fraction: Option<f64>,
    /// What the delta is for; dpo, orpo and kto learn preferences on a decoder.
    #[arg(long, default_value = "causal-lm")]
    task: TaskArg,
    /// What a text head's outputs are: with multi-label, rows have `labels`; with regression, `label` is a number.
    #[arg(long, default_value = "single-label")]
    problem_type: ProblemArg,
    /// What is trained; may be repeated. Default: lora, or what --from-delta is made of.
    #[arg(long)]
    method: Vec<MethodArg>,
    #[command(flatten)]
    start: StartArgs,
    #[command(flatten)]
    methods: MethodArgs,
    #[command(flatten)]
    positions: super::train_positions::PositionArgs,
    #[command(flatten)]
    preference: PreferenceArgs,
    #[command(flatten)]
    sweep: SweepArgs,
    #[command(flatten)]
    hyper: HyperArgs,
    #[command(flatten)]
    publish: PublishArgs,
    /// Label names in index order, separated by commas.
    #[arg(long, value_delimiter = ',')]
    labels: Vec<String>,
    /// JSON Lines file with a held text, whose loss with and without the delta is compared at the end.
    #[arg(long, value_name = "FILE")]
    forgetting: Option<std::path::PathBuf>,
    /// JSON Lines file with texts that stand for what the base is not to unlearn: --kl-to-base is taken on them, not on the
    /// job's own.
    #[arg(long, value_name = "FILE", requires = "kl_to_base")]
    kl_texts: Option<std::path::PathBuf>,
    /// Train on this many examples of each label only, drawn by the seed.
    #[arg(long, value_name = "K")]
    k_per_class: Option<u32>,
    /// Makes retries safe: the same key is the same job.
    #[arg(long, default_value = "")]
    idempotency_key: String,
    /// Only say what would be done.
    #[arg(long)]
    plan: bool,
    /// Do not wait for the job.
    #[arg(long, conflicts_with = "plan")]
    detach: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TaskArg {
    CausalLm,
    SeqCls,
    TokenCls,
    #[value(name = "seq2seq")]
    Seq2Seq,
    Dpo,
    Orpo,
    Kto,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProblemArg {
    SingleLabel,
    MultiLabel,
    Regression,
}

#[derive(Debug, Clone, Args)]
struct HyperArgs {
    /// Passes over the data.
    #[arg(long)]
    epochs: Option<f64>,
    /// Optimizer steps.
    #[arg(long)]
    max_steps: Option<u32>,
    /// Examples in a micro-batch.
    #[arg(long)]
    batch_size: Option<u32>,
    /// Micro-batches in a step.
    #[arg(long)]
    grad_accumulation: Option<u32>,
    /// Peak learning rate.
    #[arg(long)]
    lr: Option<f64>,
    /// Learning-rate schedule.
    #[arg(long)]
    schedule: Option<ScheduleArg>,
    /// Optimizer steps between checkpoints, from which a job goes on after a stop of the server [default: every 30 s].
    #[arg(long, value_name = "STEPS")]
    checkpoint_every: Option<u32>,
    /// Tell this many of the examples with the highest loss at the end: of those for evaluation, else of the training data.
    #[arg(long, value_name = "K")]
    worst: Option<u32>,
    /// Share of the steps with rising learning rate.
    #[arg(long)]
    warmup_ratio: Option<f64>,
    /// Weight decay.
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Largest gradient norm; 0 = no clipping.
    #[arg(long)]
    clip_norm: Option<f64>,
    /// Longest example in tokens.
    #[arg(long)]
    max_length: Option<u32>,
    /// Seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between evaluations.
    #[arg(long)]
    eval_every: Option<u32>,
    /// Put short examples together.
    #[arg(long)]
    packing: Option<bool>,
    /// Keep only the layers' inputs for the backward pass: less memory, more time. Unset: where the memory asks for it.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    gradient_checkpointing: Option<bool>,
    /// Share of a target's weight that all labels or tokens share; with DPO, of pairs that are the wrong way round.
    #[arg(long, value_name = "X")]
    label_smoothing: Option<f64>,
    /// Figure that chooses the best checkpoint: loss, perplexity, accuracy, macro_f1, mcc, span_f1, reward_accuracy ...
    /// exact_match, bleu and rouge_l are those of answers to the validation rows' prompts.
    #[arg(long, value_name = "NAME")]
    eval_metric: Option<String>,
    /// Answer prompts at each evaluation also where another figure decides.
    #[arg(long)]
    eval_generate: bool,
    /// Most new tokens of an answer [default: the longest gold completion and 8 more].
    #[arg(long, value_name = "N")]
    eval_new_tokens: Option<u32>,
    /// How many validation rows are answered [default: 100].
    #[arg(long, value_name = "N")]
    eval_examples: Option<u32>,
    /// Publish the last checkpoint, not the best: validation rows are only watched.
    #[arg(long)]
    keep_last: bool,
    /// Keep the weights of this many of the best evaluations; the job publishes the best, `jobs publish --step` another.
    #[arg(long, value_name = "K")]
    keep_best: Option<u32>,
    /// Hold on to the base: add so many times the divergence from its predictions to the loss; for tasks that generate.
    #[arg(long, value_name = "X")]
    kl_to_base: Option<f64>,
    /// End after this many evaluations without a gain.
    #[arg(long, value_name = "N")]
    patience: Option<u32>,
    /// A gain is more than this.
    #[arg(long, value_name = "X", requires = "patience")]
    min_delta: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ScheduleArg {
    Linear,
    Cosine,
    Constant,
}

/// Trains a delta.
pub(super) async fn run(common: &Common, args: TrainArgs) -> anyhow::Result<()> {
    let client = Client::connect(common).await?;
    let spec = uploaded_spec(common, &client, &args).await?;
    if args.plan {
        return plan(common, &client, spec).await;
    }
    let request = proto::CreateJobRequest { spec: Some(spec), idempotency_key: args.idempotency_key };
    let job = client.training().create_job(request).await?.into_inner().job.context("a reply without a job")?;
    if common.json {
        output::json(&job)?;
    } else if args.detach {
        output::line(&job.id)?;
    } else {
        output::note(&format!("job {} (watch again with: deltaserve jobs watch {})", job.id, job.id));
    }
    if args.detach {
        return Ok(());
    }
    let ended = watch(common, &client, &job.id, 0).await;
    if args.hyper.worst.is_some_and(|k| k > 0) && !common.json {
        worst::print(common, &client, &job.id).await?;
    }
    ended
}

impl TrainArgs {
    /// Options as they would stand after `deltaserve train`; one that is given twice has its last value.
    ///
    /// # Errors
    /// What clap says of them.
    pub(super) fn of_words(words: &[String]) -> Result<Self, clap::Error> {
        #[derive(clap::Parser)]
        #[command(name = "train", no_binary_name = true, args_override_self = true)]
        struct Only {
            #[command(flatten)]
            args: TrainArgs,
        }
        <Only as clap::Parser>::try_parse_from(words).map(|only| only.args)
    }
}

/// What `args` ask for, with their files uploaded.
///
/// # Errors
/// Files that cannot be read, refused uploads, options that do not go together.
pub(super) async fn uploaded_spec(
    common: &Common,
    client: &Client,
    args: &TrainArgs,
) -> anyhow::Result<proto::TrainingSpec> {
    let dataset = match (&args.file, &args.dataset) {
        (Some(file), _) => upload(common, client, file).await?,
        (None, Some(id)) => id.clone(),
        (None, None) => bail!("one of --file and --dataset is required"),
    };
    let validation = match &args.validation {
        Some(file) => Some(upload(common, client, file).await?),
        None => None,
    };
    let held = match &args.forgetting {
        Some(file) => Some(upload(common, client, file).await?),
        None => None,
    };
    let replay = match &args.kl_texts {
        Some(file) => Some(upload(common, client, file).await?),
        None => None,
    };
    let ewc = args.start.ewc(common, client).await?;
    let (forgetting, replay) = (held.map(source), replay.map(source));
    Ok(proto::TrainingSpec { ewc, forgetting, replay, ..spec(args, dataset, validation)? })
}

async fn upload(common: &Common, client: &Client, file: &Path) -> anyhow::Result<String> {
    use proto::upload_dataset_request::Message;
    let data = Bytes::from(tokio::fs::read(file).await.with_context(|| format!("read {}", file.display()))?);
    let name = file.file_name().map(|n| n.to_string_lossy().chars().take(100).collect()).unwrap_or_default();
    let chunks = (0..data.len().div_ceil(CHUNK)).map(|i| data.slice(i * CHUNK..data.len().min((i + 1) * CHUNK)));
    let head = std::iter::once(Message::Header(proto::DatasetHeader { name }));
    let messages: Vec<_> =
        head.chain(chunks.map(Message::Data)).map(|m| proto::UploadDatasetRequest { message: Some(m) }).collect();
    let reply = client.training().upload_dataset(futures::stream::iter(messages)).await?.into_inner();
    let dataset = reply.dataset.context("a reply without a dataset")?;
    if !common.json {
        output::note(&format!("{}: {} examples ({})", file.display(), dataset.rows, dataset.format));
    }
    Ok(dataset.id)
}

fn source(id: String) -> proto::TrainingData {
    proto::TrainingData { source: Some(proto::training_data::Source::DatasetId(id)) }
}

fn spec(args: &TrainArgs, dataset: String, validation: Option<String>) -> anyhow::Result<proto::TrainingSpec> {
    use proto::training_spec::Validation;
    let task = match args.task {
        TaskArg::CausalLm | TaskArg::Dpo | TaskArg::Orpo | TaskArg::Kto => proto::Task::CausalLm,
        TaskArg::SeqCls => proto::Task::SeqCls,
        TaskArg::TokenCls => proto::Task::TokenCls,
        TaskArg::Seq2Seq => proto::Task::Seq2seq,
    };
    let start = &args.start;
    let methods = match args.method.as_slice() {
        [] if start.from_delta.is_none() && start.mix.is_empty() => &[MethodArg::Lora],
        given => given,
    };
    let preference = args.preference.message(args.task, args.hyper.label_smoothing)?;
    let mut hyper = hyper(&args.hyper);
    if preference.is_some() {
        hyper.label_smoothing = None;
    }
    Ok(proto::TrainingSpec {
        output_name: args.name.clone(),
        task: task.into(),
        data: Some(source(dataset)),
        validation: validation
            .map(|id| Validation::ValidationData(source(id)))
            .or(args.validation_fraction.map(Validation::ValidationFraction)),
        methods: methods.iter().map(|m| args.methods.part(*m, &args.positions)).collect::<anyhow::Result<_>>()?,
        labels: args.labels.clone(),
        k_per_class: args.k_per_class,
        hyper: Some(hyper),
        preference,
        sweep: args.sweep.message(),
        publish: Some(args.publish.policy()),
        from_delta: start.from_delta.clone().unwrap_or_default(),
        mix: (!start.mix.is_empty()).then(|| proto::Mix { deltas: start.mix.clone(), per_layer: start.mix_per_layer }),
        ewc: None,
        forgetting: None,
        replay: None,
        problem_type: match args.problem_type {
            ProblemArg::SingleLabel => proto::ProblemType::SingleLabel,
            ProblemArg::MultiLabel => proto::ProblemType::MultiLabel,
            ProblemArg::Regression => proto::ProblemType::Regression,
        }
        .into(),
    })
}

fn hyper(args: &HyperArgs) -> proto::HyperParameters {
    let schedule = match args.schedule {
        None => proto::Schedule::Unspecified,
        Some(ScheduleArg::Linear) => proto::Schedule::Linear,
        Some(ScheduleArg::Cosine) => proto::Schedule::Cosine,
        Some(ScheduleArg::Constant) => proto::Schedule::Constant,
    };
    proto::HyperParameters {
        epochs: args.epochs,
        max_steps: args.max_steps,
        batch_size: args.batch_size,
        grad_accumulation: args.grad_accumulation,
        learning_rate: args.lr,
        schedule: schedule.into(),
        warmup_ratio: args.warmup_ratio,
        weight_decay: args.weight_decay,
        clip_norm: args.clip_norm,
        max_length: args.max_length,
        seed: args.seed,
        eval_every: args.eval_every,
        packing: args.packing,
        label_smoothing: args.label_smoothing,
        checkpoint_every: args.checkpoint_every,
        keep_last: args.keep_last,
        worst_examples: args.worst,
        gradient_checkpointing: args.gradient_checkpointing,
        kl_to_base: args.kl_to_base,
        keep_best: args.keep_best,
        eval_metric: args.eval_metric.clone(),
        patience: args.patience,
        min_delta: args.min_delta,
        eval_generate: args.eval_generate,
        eval_new_tokens: args.eval_new_tokens,
        eval_examples: args.eval_examples,
        ..Default::default()
    }
}

async fn plan(common: &Common, client: &Client, spec: proto::TrainingSpec) -> anyhow::Result<()> {
    let plan = client.training().plan(proto::PlanRequest { spec: Some(spec) }).await?.into_inner();
    if common.json {
        return output::json(&plan);
    }
    let r = plan.resolved.clone().unwrap_or_default();
    let memory = plan.memory.unwrap_or_default();
    let lines = [
        format!("trains      {} parameters", plan.trainable_parameters),
        format!(
            "data        {} examples, {} tokens ({} with loss), longest {}; {} for evaluation",
            plan.train_examples,
            plan.train_tokens,
            plan.supervised_tokens,
            plan.longest_example,
            plan.validation_examples
        ),
        format!(
            "steps       {} of {} x {} examples, {} epochs, {} warmup",
            r.total_steps, r.batch_size, r.grad_accumulation, r.epochs, r.warmup_steps
        ),
        format!("optimizer   AdamW, lr {}, weight decay {}, clip {}", r.learning_rate, r.weight_decay, r.clip_norm),
        format!(
            "memory      about {} ({} activations{})",
            output::bytes(memory.total),
            output::bytes(memory.activations),
            if r.gradient_checkpointing { ", layer by layer" } else { "" }
        ),
    ];
    lines.iter().try_for_each(|l| output::line(l))?;
    if let Some(p) = &r.preference {
        let name = p.method().as_str_name().trim_start_matches("PREFERENCE_METHOD_").to_lowercase();
        output::line(&format!("preferences {name}, beta {}", p.beta))?;
    }
    if r.eval_examples > 0 {
        let (examples, tokens) = (r.eval_examples, r.eval_new_tokens);
        output::line(&format!("evaluation  {examples} prompts answered, up to {tokens} new tokens each"))?;
    }
    if r.kl_to_base > 0.0 {
        let on = match r.replay_examples {
            0 => String::new(),
            n => format!(" on {n} texts"),
        };
        output::line(&format!("holds on to the base: {} times the divergence from it{on}", r.kl_to_base))?;
    }
    if r.keep_best > 1 {
        output::line(&format!("keeps       the {} best evaluations by {}", r.keep_best, r.eval_metric))?;
    }
    sweep::plan_lines(&r).iter().try_for_each(|l| output::line(l))?;
    plan.warnings.iter().for_each(|w| output::note(&format!("warning: {}: {} {}", w.field, w.code, w.message)));
    Ok(())
}

/// Follows a job to its end; an error if it did not succeed.
pub(super) async fn watch(common: &Common, client: &Client, id: &str, from: u64) -> anyhow::Result<()> {
    let mut view = View::new(common);
    if !common.json {
        let request = proto::GetJobRequest { id: id.to_owned() };
        let job = client.training().get_job(request).await?.into_inner().job.unwrap_or_default();
        view.expect(&job.resolved.unwrap_or_default());
    }
    follow(client, id, from, |event| view.show(event)).await?
}

/// Gives a job's events from number `from` on to `each` until that returns something; a lost stream is taken up again.
///
/// # Errors
/// Those of `each`; a stream that stays lost.
pub(super) async fn follow<R>(
    client: &Client,
    id: &str,
    from: u64,
    mut each: impl FnMut(&proto::JobEvent) -> anyhow::Result<Option<R>>,
) -> anyhow::Result<R> {
    let mut next = from;
    let mut failures = 0;
    loop {
        let request = proto::WatchJobRequest { id: id.to_owned(), from_seq: next };
        let broken = match client.training().watch_job(request).await {
            Ok(reply) => {
                let mut stream = reply.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(event)) => {
                            (next, failures) = (event.seq + 1, 0);
                            if let Some(end) = each(&event)? {
                                return Ok(end);
                            }
                        }
                        Ok(None) => break None,
                        Err(status) => break Some(status),
                    }
                }
            }
            Err(status) => Some(status),
        };
        match broken {
            Some(status) if status.code() != Code::Unavailable || failures >= RECONNECTS => return Err(status.into()),
            None if failures >= RECONNECTS => bail!("the event stream ended before the job did"),
            Some(_) | None => {
                failures += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
