//! What test rows come to under a delta: labels against gold, the likelihood of references, continuations against them.

use std::path::Path;

use anyhow::{Context as _, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Map, Value};

use super::plan::{Kind, Plan, Task};
use crate::{
    cli::{classify, client::Client, files, generate},
    grpc::proto,
};

/// Requests under way while a file is scored.
const IN_FLIGHT: usize = 4;

/// Figures by name of a task's test rows under a delta (empty = the bare base).
///
/// # Errors
/// Files that cannot be read, refused requests, rows without gold.
pub(super) async fn figures(
    client: &Client,
    plan: &Plan,
    task: &Task,
    delta: &str,
) -> anyhow::Result<Map<String, Value>> {
    let path = plan.path(&task.test);
    let named = match task.kind {
        Kind::SeqCls | Kind::TokenCls => {
            let (figures, scored) = classify::file_figures(client, delta, &path).await?;
            ensure!(scored > 0, "{}: no row has gold", path.display());
            figures
        }
        Kind::CausalLm | Kind::Seq2Seq => {
            let mut figures = likelihood(client, delta, &path).await?;
            if let Some(words) = &task.generate {
                figures.extend(generate::file_figures(client, words, delta, &path).await?);
            }
            figures
        }
    };
    Ok(named.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect())
}

/// Loss and perplexity per token of the completions, or texts, of a file.
async fn likelihood(client: &Client, delta: &str, path: &Path) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let rows = inputs(&files::read(path).await?).with_context(|| path.display().to_string())?;
    let calls = stream::iter(rows).map(|row| {
        let request = proto::ScoreRequest { delta: delta.to_owned(), inputs: vec![row], ..Default::default() };
        async move { client.inference().score(request).await.map(tonic::Response::into_inner) }
    });
    let (sum, tokens) = calls
        .buffer_unordered(IN_FLIGHT)
        .try_fold((0.0, 0_usize), |(sum, tokens), reply| async move {
            let add = |(s, t): (f64, usize), r: &proto::Scored| (s + r.log_likelihood, t + r.tokens.len());
            Ok(reply.results.iter().fold((sum, tokens), add))
        })
        .await?;
    let loss = -sum / tokens.max(1) as f64;
    Ok(vec![("loss", loss), ("perplexity", loss.exp())])
}

/// What is scored of a file's rows.
///
/// # Errors
/// Every row that has nothing to score; a file without rows.
pub(super) fn inputs(bytes: &[u8]) -> anyhow::Result<Vec<proto::ScoreInput>> {
    let rows = files::rows(bytes, |_, fields| input(&fields))?;
    ensure!(!rows.is_empty(), "has no rows");
    Ok(rows)
}

/// `prompt` with its first reference; or `text`.
fn input(row: &Map<String, Value>) -> Result<proto::ScoreInput, String> {
    let string = |key: &str| row.get(key).and_then(Value::as_str).map(str::to_owned);
    match (string("prompt"), generate::references(row)?.into_iter().next(), string("text")) {
        (Some(prompt), Some(completion), _) => Ok(proto::ScoreInput { prompt, completion }),
        (None, None, Some(text)) => Ok(proto::ScoreInput { prompt: String::new(), completion: text }),
        _ => Err("has neither prompt with completion or references, nor text".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_scored_after_their_prompts() {
        let of = |line: &str| {
            let all = inputs(line.as_bytes()).map_err(|e| e.to_string())?;
            Ok::<_, String>(all.into_iter().map(|i| (i.prompt, i.completion)).collect::<Vec<_>>())
        };
        let pair = |a: &str, b: &str| Ok(vec![(a.to_owned(), b.to_owned())]);
        assert_eq!(of(r#"{"prompt":"a","completion":"b"}"#), pair("a", "b"));
        assert_eq!(of(r#"{"prompt":"a","completion":["b","c"]}"#), pair("a", "b"));
        assert_eq!(of(r#"{"prompt":"a","references":["b","c"]}"#), pair("a", "b"));
        assert_eq!(of(r#"{"text":"b"}"#), pair("", "b"));
        let bad = of("{\"text\":\"b\"}\n{\"prompt\":\"a\",\"references\":[]}\n[]").unwrap_err();
        assert!(bad.contains("line 2: has neither") && bad.contains("line 3: is not a JSON object"), "{bad}");
        assert_eq!(of("\n").unwrap_err(), "has no rows");
    }
}
