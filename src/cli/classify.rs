//! `classify`: texts from the command line, or the rows of a JSON Lines file (`file`) with scores where gold is given.

use std::path::PathBuf;

use clap::Args;

mod file;
mod rows;
mod scores;

use super::{Common, client::Client, files::Target, infer::arguments_or_lines, merge::choice, output};
use crate::{delta::Problem, grpc::proto};

/// Options of `classify`.
#[derive(Debug, Clone, Args)]
pub(super) struct ClassifyArgs {
    /// Texts; none = one per line of standard input.
    texts: Vec<String>,
    /// Delta whose head is used; nothing = the base's own. Several add up: -d a -d b=0.3; one of them brings the head.
    #[arg(long, short)]
    delta: Vec<String>,
    /// JSON Lines file with `text`, or `tokens` for heads that label tokens; `-` = standard input.
    #[arg(long, short, conflicts_with = "texts")]
    file: Option<PathBuf>,
    /// Where the rows go with their predictions; `-` = standard output.
    #[arg(long, short, default_value = "-", requires = "file")]
    out: PathBuf,
    /// Labels in `probabilities`, the best ones; 0 = all.
    #[arg(long, default_value_t = 0, requires = "file")]
    top_k: usize,
    /// Heads with several labels per text: a label applies from this probability on.
    #[arg(long, default_value_t = 0.5, value_name = "P")]
    threshold: f32,
    /// Rows in one request.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024), requires = "file")]
    batch_size: u16,
    /// Requests under way at a time.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256), requires = "file")]
    in_flight: u16,
}

/// Figures by name of a labelled file under a delta (empty = the base's own head), the most telling last, and how many rows
/// have gold.
///
/// # Errors
/// As of `classify --file`.
pub(super) async fn file_figures(
    client: &Client,
    delta: &str,
    path: &std::path::Path,
) -> anyhow::Result<(Vec<(&'static str, f64)>, u64)> {
    let args = ClassifyArgs {
        texts: vec![],
        delta: (!delta.is_empty()).then(|| delta.to_owned()).into_iter().collect(),
        file: None,
        out: PathBuf::from("-"),
        top_k: 1,
        threshold: 0.5,
        batch_size: 32,
        in_flight: 4,
    };
    let scores = file::scored(client, &args, path, Target::nowhere()).await?;
    Ok((scores.figures(), scores.scored))
}

/// Labels texts.
pub(super) async fn classify(common: &Common, args: ClassifyArgs) -> anyhow::Result<()> {
    if let Some(path) = &args.file {
        return file::classify(common, &args, path).await;
    }
    let texts = arguments_or_lines(args.texts)?;
    let inputs = texts.iter().map(|text| proto::ClassifyInput { text: text.clone(), ..Default::default() }).collect();
    let mut client = Client::connect(common).await?.inference();
    let (delta, deltas) = choice(&args.delta)?;
    let request = proto::ClassifyRequest { delta, deltas, inputs, ..Default::default() };
    let reply = client.classify(request).await?.into_inner();
    if common.json {
        return output::json(&reply);
    }
    let several = reply.problem_type == Problem::MultiLabel.as_str();
    for (text, result) in texts.iter().zip(&reply.results) {
        let applies = |l: &&proto::LabelScore| !several || l.probability >= args.threshold;
        let shown = if several { result.labels.len() } else { 1 };
        for label in result.labels.iter().take(shown).filter(applies) {
            output::line(&format!("{:<20} {:.3}  {text}", label.label, label.probability))?;
        }
        if let Some(value) = result.value {
            output::line(&format!("{value:<20} {text}"))?;
        }
        for token in &result.tokens {
            let label = token.label.clone().unwrap_or_default();
            output::line(&format!("{:<20} {:.3}  {}", label.label, label.probability, token.text))?;
        }
    }
    output::note(&output::summary(reply.served_by.as_ref(), reply.usage.as_ref(), reply.timings.as_ref()));
    Ok(())
}
