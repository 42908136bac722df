//! `generate`: one prompt, streamed, or the rows of a JSON Lines file (`file`) with scores where references are given.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::{ArgGroup, Args, ValueEnum};

mod file;
mod rows;
mod scores;

use super::{Common, client::Client, files::Target, infer::argument_or_stdin, merge::choice, output};
use crate::grpc::proto;
pub(super) use {rows::references, scores::FIGURES};

/// Options of `generate`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("conversation").args(["chat", "file"]).multiple(true))]
pub(super) struct GenerateArgs {
    /// What to continue; `-` or nothing = standard input.
    prompt: Option<String>,
    /// Delta: name, name@3 or name@DIGEST; nothing = the bare base. Several add up with weights: -d a=0.7 -d b@2=0.3.
    #[arg(long, short)]
    delta: Vec<String>,
    /// Treat the prompt, or with --file each row's `prompt`, as a user's message of a conversation.
    #[arg(long)]
    chat: bool,
    /// A system message for the conversation; with --file, for each that has none.
    #[arg(long, requires = "conversation")]
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
    /// Tokens guessed ahead per step, from what was said before; changes the speed, not the text. 0 = none [default: the server's].
    #[arg(long, value_name = "N")]
    speculative_ngram: Option<u32>,
    /// JSON that is valid by the JSON schema in this file.
    #[arg(long, value_name = "FILE", value_parser = text_of, group = "constraint")]
    json_schema: Option<String>,
    /// A JSON object.
    #[arg(long, group = "constraint")]
    json_object: bool,
    /// A text that matches this regular expression as a whole.
    #[arg(long, group = "constraint")]
    regex: Option<String>,
    /// One of these texts, with commas between them; may be repeated.
    #[arg(long, value_name = "TEXT,...", value_delimiter = ',', group = "constraint")]
    choice: Vec<String>,
    /// A text of the Lark grammar in this file.
    #[arg(long, value_name = "FILE", value_parser = text_of, group = "constraint")]
    grammar: Option<String>,
    /// Continuations.
    #[arg(long, short, default_value_t = 1)]
    n: u32,
    /// Among this tenant's waiting requests, higher ones begin first; -100 to 100.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// JSON Lines file with `prompt` or `messages`, and references to be scored against; `-` = standard input.
    #[arg(long, short, conflicts_with_all = ["prompt", "n", "logprobs"])]
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
            priority: self.priority,
            speculative_ngram: self
                .speculative_ngram
                .map(|n| proto::NgramSpeculation { num_speculative_tokens: Some(n), ..Default::default() }),
            constraint: self.constraint(),
        }
    }

    /// What the output must be; clap takes one of them at most.
    fn constraint(&self) -> Option<proto::generate_options::Constraint> {
        use proto::generate_options::Constraint;
        let choice = (!self.choice.is_empty()).then(|| proto::Choice { texts: self.choice.clone() });
        let given = [
            self.json_schema.clone().map(Constraint::JsonSchema),
            self.json_object.then_some(Constraint::JsonObject(true)),
            self.regex.clone().map(Constraint::Regex),
            choice.map(Constraint::Choice),
            self.grammar.clone().map(Constraint::LarkGrammar),
        ];
        given.into_iter().flatten().next()
    }

    fn prompt(&self) -> anyhow::Result<proto::Prompt> {
        use proto::prompt::Prompt;
        let text = argument_or_stdin(self.prompt.as_deref())?;
        let prompt = if self.chat {
            rows::conversation(vec![rows::message("user", &text)], self.system.as_deref())
        } else {
            Prompt::Text(text)
        };
        Ok(proto::Prompt { prompt: Some(prompt) })
    }

    /// Options as they would stand after `deltaserve generate --file PATH`, without a delta and an output.
    ///
    /// # Errors
    /// What clap says of them; options that are not the caller's to give.
    fn of_file(words: &[String], path: &Path) -> anyhow::Result<Self> {
        #[derive(clap::Parser)]
        #[command(name = "generate", no_binary_name = true)]
        struct Only {
            #[command(flatten)]
            args: GenerateArgs,
        }
        let file = ["--file".into(), path.as_os_str().to_owned()];
        let words = words.iter().map(std::ffi::OsString::from).chain(file);
        let args = <Only as clap::Parser>::try_parse_from(words)?.args;
        ensure!(args.delta.is_empty() && args.out.as_os_str() == "-", "--delta and --out have no place here");
        Ok(args)
    }
}

/// What is in a file.
fn text_of(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|e| e.to_string())
}

/// Checks that a file can be continued and scored with the options `words` of `generate`.
///
/// # Errors
/// Refused options, bad lines, a file without references.
pub(super) fn check_file(words: &[String], path: &Path) -> anyhow::Result<()> {
    let args = GenerateArgs::of_file(words, path)?;
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let rows = file::parsed(&args, &bytes).with_context(|| path.display().to_string())?;
    ensure!(rows.iter().any(|row| !row.references.is_empty()), "{}: no row has references", path.display());
    Ok(())
}

/// Figures by name of a file's rows continued with the options `words` of `generate` under a delta (empty = the bare base).
///
/// # Errors
/// As of `generate --file`.
pub(super) async fn file_figures(
    client: &Client,
    words: &[String],
    delta: &str,
    path: &Path,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let mut args = GenerateArgs::of_file(words, path)?;
    args.delta.extend((!delta.is_empty()).then(|| delta.to_owned()));
    let scores = file::scored(client, &args, &file::rows(&args, path).await?, Target::nowhere()).await?;
    scores.all_continued()?;
    ensure!(scores.scored > 0, "{}: no row has references", path.display());
    Ok(scores.figures())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_file_are_those_of_the_command() {
        let of = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
            GenerateArgs::of_file(&words, Path::new("x.jsonl")).map_err(|e| e.to_string())
        };
        assert_eq!(of(&["--priority", "-7"]).unwrap().options().priority, -7);
        let drafts = |words: &[&str]| of(words).unwrap().options().speculative_ngram;
        assert_eq!(drafts(&["--speculative-ngram", "6"]).and_then(|s| s.num_speculative_tokens), Some(6));
        assert_eq!(drafts(&[]), None, "the server's default");
        let args = of(&["--max-new-tokens", "8", "--num-beams", "2", "--system", "s", "--chat"]).unwrap();
        assert_eq!((args.max_new_tokens, args.num_beams, args.chat), (Some(8), Some(2), true));
        assert_eq!((args.system.as_deref(), args.file.as_deref()), (Some("s"), Some(Path::new("x.jsonl"))));
        assert!(of(&["--system", "s"]).is_ok());
        let refused = [
            (&["--delta", "d"][..], "no place"),
            (&["--out", "o"], "no place"),
            (&["--file", "f"], "--file"),
            (&["a prompt"], "cannot be used with"),
            (&["--beams", "2"], "--beams"),
        ];
        assert_eq!(of(&["--json-object", "--regex", "a"]).unwrap_err().matches("cannot be used with").count(), 1);
        for (words, part) in refused {
            let error = of(words).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
