//! A file through Classify: checked as a whole, sent in batches with several under way, written in order.

use std::{io::Write, path::Path};

use anyhow::Context as _;
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};
use tonic::Status;

use super::{
    ClassifyArgs,
    rows::{self, HeadInfo, Input, Row},
    scores::Scores,
};
use crate::{
    cli::{
        Common,
        client::Client,
        files::{Progress, Target, read, while_busy},
        merge::choice,
        output,
    },
    delta::Problem,
    grpc::proto,
};

/// Most bytes of texts in one request, well below a server's smallest message limit.
const BATCH_BYTES: usize = 512 << 10;
/// The tag of a word that has no token.
const OUTSIDE: &str = "O";

/// Classifies the rows of a file (`-` = standard input) and prints the scores.
pub(super) async fn classify(common: &Common, args: &ClassifyArgs, path: &Path) -> anyhow::Result<()> {
    let client = Client::connect(common).await?;
    let to_stdout = args.out.as_os_str() == "-";
    let scores = scored(&client, args, path, Target::open(&args.out, to_stdout)?).await?;
    output::say(&scores.lines(common.json)?, to_stdout)
}

/// Classifies the rows of a file and counts.
pub(super) async fn scored(
    client: &Client,
    args: &ClassifyArgs,
    path: &Path,
    mut out: Target,
) -> anyhow::Result<Scores> {
    let bytes = read(path).await?;
    let (delta, deltas) = choice(&args.delta)?;
    anyhow::ensure!(
        deltas.is_empty(),
        "--file takes one delta without a weight; texts as arguments may be labelled by several"
    );
    let head = head(client, &delta).await?;
    let rows = rows::parse(&bytes, &head).with_context(|| path.display().to_string())?;
    let mut progress = Progress::new(rows.len() as u64);
    let mut scores = Scores::default();
    let batches = batches(&rows, args.batch_size.into());
    let calls = stream::iter(batches).map(|batch| call(client, &head.reference, batch));
    let mut replies = calls.buffered(args.in_flight.into());
    while let Some(reply) = replies.next().await {
        let (batch, results) = reply?;
        let mut results = results.into_iter();
        for row in batch {
            let result = if row.input == Input::Nothing { None } else { results.next() };
            writeln!(out.to, "{}", answered(row, result, &head, args, &mut scores)?)?;
        }
        progress.advance(batch.len() as u64);
    }
    out.finish()?;
    progress.finish();
    Ok(scores)
}

/// The version that answers and what it labels; the base's own head is asked.
async fn head(client: &Client, delta: &str) -> anyhow::Result<HeadInfo> {
    if !delta.is_empty() {
        let (reference, delta) = client.version(delta).await?;
        return Ok(HeadInfo {
            reference,
            tokens: delta.task() == proto::Task::TokenCls,
            problem: Problem::from_name(&delta.problem_type).unwrap_or_default(),
            labels: delta.labels,
        });
    }
    let inputs = vec![proto::ClassifyInput { text: "a".into(), ..Default::default() }];
    let request = proto::ClassifyRequest { inputs, ..Default::default() };
    let mut reply = client.inference().classify(request).await?.into_inner();
    let problem = Problem::from_name(&reply.problem_type).unwrap_or_default();
    let result = reply.results.pop().unwrap_or_default();
    let mut labels = result.labels;
    labels.sort_by_key(|l| l.index);
    let labels = labels.into_iter().map(|l| l.label).collect();
    Ok(HeadInfo { reference: String::new(), labels, tokens: !result.tokens.is_empty(), problem })
}

fn batches(rows: &[Row], most: usize) -> Vec<&[Row]> {
    let (mut out, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, row) in rows.iter().enumerate() {
        if i > start && (i - start >= most || bytes + row.input.bytes() > BATCH_BYTES) {
            out.push(&rows[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += row.input.bytes();
    }
    if start < rows.len() {
        out.push(&rows[start..]);
    }
    out
}

/// Results of a batch's inputs.
async fn call<'a>(
    client: &Client,
    reference: &str,
    batch: &'a [Row],
) -> Result<(&'a [Row], Vec<proto::Classification>), Status> {
    let inputs: Vec<_> = batch.iter().filter_map(|row| wire(&row.input)).collect();
    if inputs.is_empty() {
        return Ok((batch, Vec::new()));
    }
    let count = inputs.len();
    let request = proto::ClassifyRequest { delta: reference.to_owned(), inputs, truncate: true, ..Default::default() };
    let ask = || async { client.inference().classify(request.clone()).await };
    let results = while_busy(ask).await?.into_inner().results;
    if results.len() == count { Ok((batch, results)) } else { Err(Status::internal("a reply without all results")) }
}

fn wire(input: &Input) -> Option<proto::ClassifyInput> {
    match input {
        Input::Nothing => None,
        Input::Text(text, pair) => {
            Some(proto::ClassifyInput { text: text.clone(), pair: pair.clone(), words: Vec::new() })
        }
        Input::Words(words) => Some(proto::ClassifyInput { words: words.clone(), ..Default::default() }),
    }
}

/// The row with its prediction, counted.
fn answered(
    row: &Row,
    result: Option<proto::Classification>,
    head: &HeadInfo,
    args: &ClassifyArgs,
    scores: &mut Scores,
) -> anyhow::Result<String> {
    scores.rows += 1;
    scores.empty += u64::from(row.input == Input::Nothing);
    let result = result.unwrap_or_default();
    scores.cut += u64::from(result.cut);
    let mut fields = row.fields.clone();
    let predicted: Vec<String>;
    if head.tokens {
        let labels: Vec<_> = (0..row.words.len()).map(|i| result.tokens.get(i).and_then(|t| t.label.clone())).collect();
        predicted = labels.iter().map(|l| l.as_ref().map_or_else(|| OUTSIDE.to_owned(), |l| l.label.clone())).collect();
        fields.entry("tokens").or_insert_with(|| json!(row.words));
        fields.insert("prediction".into(), json!(predicted));
        let probabilities = labels.iter().map(|l| l.as_ref().map_or(Value::Null, |l| probability(l.probability)));
        fields.insert("probabilities".into(), probabilities.collect());
    } else if head.problem == Problem::Regression {
        predicted = result.value.map(|v| v.to_string()).into_iter().collect();
        fields.insert("prediction".into(), json!(result.value));
    } else if head.problem == Problem::MultiLabel {
        let applies = result.labels.iter().filter(|l| l.probability >= args.threshold);
        predicted = applies.map(|l| l.label.clone()).collect();
        fields.insert("prediction".into(), json!(predicted));
        fields.insert("probabilities".into(), probabilities(&result.labels, args.top_k));
    } else {
        predicted = result.labels.first().map(|l| l.label.clone()).into_iter().collect();
        fields.insert("prediction".into(), json!(predicted.first()));
        fields.insert("probabilities".into(), probabilities(&result.labels, args.top_k));
    }
    if let Some(gold) = &row.gold {
        scores.add(gold, &predicted);
    }
    Ok(serde_json::to_string(&fields)?)
}

/// The best labels with their probabilities.
fn probabilities(labels: &[proto::LabelScore], top_k: usize) -> Value {
    let shown = if top_k == 0 { labels.len() } else { top_k };
    Value::Object(labels.iter().take(shown).map(|l| (l.label.clone(), probability(l.probability))).collect())
}

/// Six digits are all that a probability in f32 has.
fn probability(p: f32) -> Value {
    json!((f64::from(p) * 1e6).round() / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_all_rows_in_order_within_both_limits() -> anyhow::Result<()> {
        let long = "x".repeat(BATCH_BYTES / 2);
        let lines: Vec<String> =
            (0..10).map(|i| json!({"text": if i == 3 || i == 4 { &long } else { "a" }}).to_string()).collect();
        let rows = rows::parse(lines.join("\n").as_bytes(), &HeadInfo::default())?;
        let lens: Vec<usize> = batches(&rows, 4).iter().map(|b| b.len()).collect();
        assert_eq!(lens, [4, 4, 2]);
        let lens: Vec<usize> = batches(&rows, 100).iter().map(|b| b.len()).collect();
        assert_eq!(lens, [4, 6]);
        assert!(batches(&[], 4).is_empty());
        Ok(())
    }
}
