//! `embed`, `score`, `info`.

use std::io::Read;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::{Common, client::Client, merge::choice, output};
use crate::grpc::proto;

/// How to pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PoolingArg {
    Default,
    Mean,
    Cls,
    Last,
}

/// Options of `embed`.
#[derive(Debug, Clone, Args)]
pub(super) struct EmbedArgs {
    /// Texts; none = one per line of standard input.
    texts: Vec<String>,
    /// Delta; nothing = the bare base. Several add up with weights: -d a=0.7 -d b=0.3.
    #[arg(long, short)]
    delta: Vec<String>,
    /// How to pool.
    #[arg(long, default_value = "default")]
    pooling: PoolingArg,
    /// Do not scale to unit length.
    #[arg(long)]
    no_normalize: bool,
}

/// Turns texts into vectors; one line of numbers each.
pub(super) async fn embed(common: &Common, args: EmbedArgs) -> anyhow::Result<()> {
    let pooling = match args.pooling {
        PoolingArg::Default => proto::Pooling::Unspecified,
        PoolingArg::Mean => proto::Pooling::Mean,
        PoolingArg::Cls => proto::Pooling::Cls,
        PoolingArg::Last => proto::Pooling::Last,
    };
    let (delta, deltas) = choice(&args.delta)?;
    let request = proto::EmbedRequest {
        delta,
        deltas,
        inputs: arguments_or_lines(args.texts)?,
        pooling: pooling.into(),
        normalize: Some(!args.no_normalize),
        ..Default::default()
    };
    let reply = Client::connect(common).await?.inference().embed(request).await?.into_inner();
    if common.json {
        return output::json(&reply);
    }
    for embedding in &reply.embeddings {
        let numbers: Vec<String> = embedding.values.iter().map(|v| format!("{v:.6}")).collect();
        output::line(&numbers.join(" "))?;
    }
    output::note(&output::summary(reply.served_by.as_ref(), reply.usage.as_ref(), reply.timings.as_ref()));
    Ok(())
}

/// Options of `score`.
#[derive(Debug, Clone, Args)]
pub(super) struct ScoreArgs {
    /// The text that is scored.
    completion: String,
    /// Context that is not scored.
    #[arg(long, short, default_value = "")]
    prompt: String,
    /// Delta; nothing = the bare base. Several add up with weights: -d a=0.7 -d b=0.3.
    #[arg(long, short)]
    delta: Vec<String>,
}

/// Log-likelihood of a text.
pub(super) async fn score(common: &Common, args: ScoreArgs) -> anyhow::Result<()> {
    let inputs = vec![proto::ScoreInput { prompt: args.prompt, completion: args.completion }];
    let mut client = Client::connect(common).await?.inference();
    let (delta, deltas) = choice(&args.delta)?;
    let reply = client.score(proto::ScoreRequest { delta, deltas, inputs, ..Default::default() }).await?.into_inner();
    if common.json {
        return output::json(&reply);
    }
    for result in &reply.results {
        let count = result.tokens.len().max(1) as f64;
        let perplexity = (-result.log_likelihood / count).exp();
        output::line(&format!(
            "log-likelihood {:.4} over {} tokens, perplexity {perplexity:.3}",
            result.log_likelihood,
            result.tokens.len()
        ))?;
    }
    output::note(&output::summary(reply.served_by.as_ref(), reply.usage.as_ref(), reply.timings.as_ref()));
    Ok(())
}

/// What the server is and does.
pub(super) async fn info(common: &Common) -> anyhow::Result<()> {
    let mut client = Client::connect(common).await?.server();
    let info = client.get_server_info(proto::GetServerInfoRequest {}).await?.into_inner();
    if common.json {
        return output::json(&info);
    }
    let base = info.base.clone().unwrap_or_default();
    let (limits, load) = (info.limits.unwrap_or_default(), info.load.unwrap_or_default());
    let residency = info.residency.unwrap_or_default();
    let lines = [
        format!("deltaserve {}, up {} s", info.version, info.uptime_seconds),
        format!(
            "base       {} ({}, {} layers x {}, {} parameters, {} of {} on {})",
            base.name,
            base.family,
            base.layers,
            base.hidden_size,
            base.parameters,
            output::bytes(base.weight_bytes),
            base.dtype,
            base.device
        ),
        format!("           fingerprint {}, context {}", output::short(&base.fingerprint), base.context_length),
        format!("targets    {}", base.target_modules.join(" ")),
        format!("methods    serves {}; trains {}", info.serving_methods.join(" "), info.training_methods.join(" ")),
        format!(
            "deltas     {} resident ({} in use), {} of {}; {} hits, {} misses, {} evictions",
            residency.resident,
            residency.leased,
            output::bytes(residency.bytes),
            output::bytes(residency.budget_bytes),
            residency.hits,
            residency.misses,
            residency.evictions
        ),
        format!(
            "load       {} running (of {}), {} queued (of {}), {} of {} positions, {} jobs",
            load.running,
            limits.max_sequences,
            load.queued,
            limits.max_queue,
            load.kv_positions_used,
            limits.kv_positions,
            load.train_jobs
        ),
    ];
    lines.iter().try_for_each(|l| output::line(l))
}

/// The argument; `-` or nothing = standard input.
pub(super) fn argument_or_stdin(argument: Option<&str>) -> anyhow::Result<String> {
    match argument {
        Some(text) if text != "-" => Ok(text.to_owned()),
        _ => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("read the prompt from standard input")?;
            Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
        }
    }
}

/// The texts, or the lines of standard input.
pub(super) fn arguments_or_lines(texts: Vec<String>) -> anyhow::Result<Vec<String>> {
    if texts.is_empty() {
        return Ok(argument_or_stdin(None)?.lines().map(str::to_owned).collect());
    }
    Ok(texts)
}
