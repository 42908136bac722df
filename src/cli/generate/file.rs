//! A file through GenerateBatch: checked as a whole, a row per call with several under way, written in order.

use std::{io::Write, path::Path};

use anyhow::Context as _;
use futures::{StreamExt as _, stream};
use serde_json::Value;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{
    GenerateArgs,
    rows::{self, Row},
    scores::Scores,
};
use crate::{
    cli::{
        Common,
        client::{Client, describe},
        files::{Progress, Target, read, while_busy},
        merge::choice,
        output,
    },
    grpc::proto,
};

/// Continues the rows of a file; `-` = standard input.
///
/// # Errors
/// Bad lines, all of them, before anything is sent. What concerns all rows (no such delta, a bad option, no server), without
/// an output. Rows that failed alone, after the others were written.
pub(super) async fn generate(common: &Common, args: &GenerateArgs, path: &Path) -> anyhow::Result<()> {
    let rows = rows(args, path).await?;
    let client = Client::connect(common).await?;
    let to_stdout = args.out.as_os_str() == "-";
    let scores = scored(&client, args, &rows, Target::open(&args.out, to_stdout)?).await?;
    output::say(&scores.lines(common.json)?, to_stdout)?;
    scores.all_continued()
}

/// The rows of a file, as the options take them.
///
/// # Errors
/// Bad lines, all of them.
pub(super) async fn rows(args: &GenerateArgs, path: &Path) -> anyhow::Result<Vec<Row>> {
    parsed(args, &read(path).await?).with_context(|| path.display().to_string())
}

/// Rows of a file's bytes, as the options take them.
pub(super) fn parsed(args: &GenerateArgs, bytes: &[u8]) -> anyhow::Result<Vec<Row>> {
    rows::parse(bytes, args.chat, args.system.as_deref())
}

/// Continues rows, writes them in order with their predictions, and counts.
///
/// # Errors
/// What concerns all rows.
pub(super) async fn scored(
    client: &Client,
    args: &GenerateArgs,
    rows: &[Row],
    mut out: Target,
) -> anyhow::Result<Scores> {
    let (delta, deltas) = versions(client, &args.delta).await?;
    let mut progress = Progress::new(rows.len() as u64);
    let mut scores = Scores::default();
    let calls = stream::iter(rows).map(|row| {
        let request = proto::GenerateBatchRequest {
            delta: delta.clone(),
            deltas: deltas.clone(),
            prompts: vec![row.prompt.clone()],
            options: Some(args.options()),
        };
        call(client, row, request)
    });
    let mut replies = calls.buffered(args.in_flight.into());
    while let Some((row, reply)) = replies.next().await {
        scores.rows += 1;
        let mut fields = row.fields.clone();
        match reply {
            Ok(generation) => {
                scores.add(&generation.text, &row.references);
                scores.cut += u64::from(generation.reason() == proto::FinishReason::Length);
                fields.insert("prediction".into(), generation.text.into());
            }
            Err(status) if concerns_one(&status) => {
                let problem = describe(&status.into());
                output::note(&format!("line {}: {problem}", row.line));
                scores.failed += 1;
                fields.insert("prediction".into(), Value::Null);
                fields.insert("error".into(), problem.into());
            }
            Err(status) => return Err(status.into()),
        }
        writeln!(out.to, "{}", serde_json::to_string(&fields)?)?;
        progress.advance(1);
    }
    out.finish()?;
    progress.finish();
    Ok(scores)
}

/// The deltas of all requests by version, so that all rows of a file get the same.
async fn versions(client: &Client, given: &[String]) -> anyhow::Result<(String, Vec<proto::WeightedDelta>)> {
    let (mut delta, mut deltas) = choice(given)?;
    for name in deltas.iter_mut().map(|d| &mut d.delta).chain([&mut delta]).filter(|name| !name.is_empty()) {
        *name = client.version(name).await?.0;
    }
    Ok((delta, deltas))
}

async fn call<'a>(
    client: &Client,
    row: &'a Row,
    request: proto::GenerateBatchRequest,
) -> (&'a Row, Result<proto::Generation, Status>) {
    let ask = || async { client.inference().generate_batch(request.clone()).await };
    let reply = while_busy(ask).await.and_then(|reply| {
        let one = reply.into_inner().generations.pop();
        one.ok_or_else(|| Status::internal("a reply without a generation"))
    });
    (row, reply)
}

/// Whether an error is that of a row: its prompt is refused or too long, its time ran out, or its own numbers overflowed.
fn concerns_one(status: &Status) -> bool {
    let details = status.get_error_details();
    let fields = details.bad_request().map(|b| b.field_violations.as_slice()).unwrap_or_default();
    let of_prompt = |field: &str| field.starts_with("prompt") || field == "max_new_tokens";
    match status.code() {
        Code::InvalidArgument => !fields.is_empty() && fields.iter().all(|f| of_prompt(&f.field)),
        Code::FailedPrecondition => details.error_info().is_some_and(|info| info.reason == "NON_FINITE"),
        Code::DeadlineExceeded | Code::Internal | Code::OutOfRange => true,
        _ => false,
    }
}
