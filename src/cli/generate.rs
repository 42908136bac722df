//! `generate`: one prompt, streamed, or the rows of a JSON Lines file (`file`) with scores where references are given.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

mod file;
mod rows;
mod scores;

use super::{Common, client::Client, infer::argument_or_stdin, merge::choice, output};
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
    /// No run of so many tokens comes twice; 0 = off.
    #[arg(long, value_name = "N")]
    no_repeat_ngram_size: Option<u32>,
    /// Search with so many beams; the text comes at the end.
    #[arg(long, value_name = "N")]
    num_beams: Option<u32>,
    /// With beams: over 0 favours long outputs, below 0 short ones [default: 1].
    #[arg(long, value_name = "X", allow_negative_numbers = true, requires = "num_beams")]
    length_penalty: Option<f32>,
    /// With beams: when the search ends [default: heuristic].
    #[arg(long, requires = "num_beams")]
    early_stopping: Option<EarlyStoppingArg>,
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
    /// JSON Lines file with `prompt` or `messages`, and references to be scored against; `-` = standard input.
    #[arg(long, short, conflicts_with_all = ["prompt", "n", "logprobs", "chat"])]
    file: Option<PathBuf>,
    /// Where the rows go with their predictions; `-` = standard output.
    #[arg(long, short, default_value = "-", requires = "file")]
    out: PathBuf,
    /// Rows under way at a time.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256), requires = "file")]
    in_flight: u16,
}

/// When a beam search ends before the longest output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EarlyStoppingArg {
    /// When no open beam seems able to do better.
    Heuristic,
    /// As soon as as many outputs have ended as there are beams.
    Full,
    /// When no open beam can do better at any length.
    Never,
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
                no_repeat_ngram_size: self.no_repeat_ngram_size,
                seed: self.seed,
            }),
            stop: self.stop.clone(),
            stop_tokens: Vec::new(),
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs,
            n: Some(self.n),
            num_beams: self.num_beams,
            length_penalty: self.length_penalty,
            early_stopping: match self.early_stopping {
                None => proto::EarlyStopping::Unspecified,
                Some(EarlyStoppingArg::Heuristic) => proto::EarlyStopping::Heuristic,
                Some(EarlyStoppingArg::Full) => proto::EarlyStopping::Full,
                Some(EarlyStoppingArg::Never) => proto::EarlyStopping::Never,
            }
            .into(),
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
    if let Some(path) = &args.file {
        return file::generate(common, &args, path).await;
    }
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
