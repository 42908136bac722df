//! `generate`, `embed`, `score`, `info`.

use std::io::Read;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::{Common, client::Client, merge::choice, output};
use crate::grpc::proto;

/// Options of `generate`.
#[derive(Debug, Clone, Args)]
pub(super) struct GenerateArgs {
    /// What to continue; `-` or nothing = standard input.
    prompt: Option<String>,
    /// Delta: name, name@3 or name@DIGEST; nothing = the bare base. Several add up with weights: -d a=0.7 -d b@2=0.3.
    #[arg(long, short)]
    delta: Vec<String>,
    /// Treat the prompt as a user's message of a conversation.
    #[arg(long)]
    chat: bool,
    /// A system message for the conversation.
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// Most tokens to generate.
    #[arg(long, short = 'm', value_name = "N")]
    max_new_tokens: Option<u32>,
    /// 0 = greedy.
    #[arg(long, short = 't')]
    temperature: Option<f32>,
    /// Keep the k most likely tokens.
    #[arg(long)]
    top_k: Option<u32>,
    /// Keep the most likely tokens with this probability mass.
    #[arg(long)]
    top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one.
    #[arg(long)]
    min_p: Option<f32>,
    /// Penalty on tokens seen; 1 = off.
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Penalty per occurrence in the output.
    #[arg(long, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Penalty once a token is in the output.
    #[arg(long, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Seed of the sampling.
    #[arg(long)]
    seed: Option<u64>,
    /// Text that ends the output; may be repeated.
    #[arg(long)]
    stop: Vec<String>,
    /// Go on past the end-of-sequence token.
    #[arg(long)]
    ignore_eos: bool,
    /// Report log-probabilities with this many alternatives (with --json).
    #[arg(long)]
    logprobs: Option<u32>,
    /// Continuations.
    #[arg(long, short, default_value_t = 1)]
    n: u32,
}

impl GenerateArgs {
    fn options(&self) -> proto::GenerateOptions {
        proto::GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            sampling: Some(proto::Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                frequency_penalty: self.frequency_penalty,
                presence_penalty: self.presence_penalty,
                seed: self.seed,
            }),
            stop: self.stop.clone(),
            stop_tokens: Vec::new(),
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs,
            n: Some(self.n),
        }
    }

    fn prompt(&self) -> anyhow::Result<proto::Prompt> {
        use proto::prompt::Prompt;
        let text = argument_or_stdin(self.prompt.as_deref())?;
        let message = |role: &str, content: String| proto::ChatMessage { role: role.to_owned(), content };
        let prompt = if self.chat {
            let system = self.system.clone().map(|s| message("system", s));
            Prompt::Chat(proto::Chat { messages: system.into_iter().chain([message("user", text)]).collect() })
        } else {
            Prompt::Text(text)
        };
        Ok(proto::Prompt { prompt: Some(prompt) })
    }
}

/// Continues a prompt; streams to standard output.
pub(super) async fn generate(common: &Common, args: GenerateArgs) -> anyhow::Result<()> {
    let (prompt, options) = (args.prompt()?, args.options());
    let (delta, deltas) = choice(&args.delta)?;
    let mut client = Client::connect(common).await?.inference();
    if args.n > 1 && !common.json {
        let request = proto::GenerateBatchRequest { delta, deltas, prompts: vec![prompt], options: Some(options) };
        let reply = client.generate_batch(request).await?.into_inner();
        for g in &reply.generations {
            output::line(&format!("--- {} ---\n{}", g.index, g.text))?;
        }
        output::note(&output::summary(reply.served_by.as_ref(), reply.usage.as_ref(), reply.timings.as_ref()));
        return Ok(());
    }
    let request = proto::GenerateRequest { delta, deltas, prompt: Some(prompt), options: Some(options) };
    let mut stream = client.generate(request).await?.into_inner();
    while let Some(response) = stream.message().await? {
        use proto::generate_response::Event;
        match &response.event {
            _ if common.json => output::json(&response)?,
            Some(Event::Delta(delta)) => output::piece(&delta.text)?,
            Some(Event::Finished(f)) => {
                output::line("")?;
                output::note(&output::summary(f.served_by.as_ref(), f.usage.as_ref(), f.timings.as_ref()));
            }
            None => {}
        }
    }
    Ok(())
}

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
    let reply = client.score(proto::ScoreRequest { delta, deltas, inputs }).await?.into_inner();
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
            "base       {} ({}, {} layers x {}, {} parameters, {} on {})",
            base.name, base.family, base.layers, base.hidden_size, base.parameters, base.dtype, base.device
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

fn argument_or_stdin(argument: Option<&str>) -> anyhow::Result<String> {
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
