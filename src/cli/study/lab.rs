//! A server in this process, and what a study asks of it: train, score, clean up. All over gRPC, as any client would.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::Value;

use super::plan::{Kind, Plan, Task};
use crate::{
    app,
    cli::{Common, classify, client::Client, output, train},
    config::{Config, ServeArgs},
    grpc::proto,
};

/// Requests under way while a file is scored.
const IN_FLIGHT: usize = 4;
/// Evaluations on the validation rows over a job.
const EVALUATIONS: u32 = 10;
/// The tenant whose deltas a study's are.
const TENANT: &str = "study";

/// A server with a client.
pub(super) struct Lab {
    server: app::Server,
    pub(super) client: Client,
    common: Common,
    data_dir: PathBuf,
    /// Numbers of the base.
    pub(super) parameters: u64,
}

/// A finished job.
pub(super) struct Trained {
    id: String,
    /// Folder of the model that full fine-tuning made.
    pub(super) model: Option<PathBuf>,
    pub(super) trainable: u64,
    pub(super) steps: u32,
    pub(super) curve: Vec<(u32, f64)>,
    pub(super) seconds: f64,
    pub(super) step_ms: f64,
    datasets: Vec<String>,
}

impl Lab {
    /// Starts a server on a base.
    ///
    /// # Errors
    /// If it cannot start.
    pub(super) async fn open(base: &str, data_dir: &Path) -> anyhow::Result<Self> {
        let mut serve = ServeArgs::for_base(base);
        serve.data_dir = data_dir.to_path_buf();
        (serve.listen, serve.http) = ("127.0.0.1:0".into(), "off".into());
        let server = app::start(Config::try_from(serve)?, None).await?;
        let common =
            Common { server: format!("http://{}", server.grpc), tenant: TENANT.into(), timeout: None, json: true };
        let client = Client::connect(&common).await?;
        let info = client.server().get_server_info(proto::GetServerInfoRequest {}).await?.into_inner();
        let parameters = info.base.context("a reply without a base")?.parameters;
        Ok(Self { server, client, common, data_dir: data_dir.to_path_buf(), parameters })
    }

    pub(super) async fn close(self) -> anyhow::Result<()> {
        drop(self.client);
        self.server.stop().await
    }

    /// Whether a delta is there.
    pub(super) async fn has(&self, name: &str) -> anyhow::Result<bool> {
        match self.client.deltas().get_delta(proto::GetDeltaRequest { delta: name.to_owned() }).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == tonic::Code::NotFound => Ok(false),
            Err(status) => Err(status.into()),
        }
    }

    /// Trains with the options of `deltaserve train`, following the job to its end. With validation rows they are evaluated
    /// ten times and choose the best checkpoint by `metric`, unless the options say otherwise.
    ///
    /// # Errors
    /// Refused options and data; a job that does not succeed.
    pub(super) async fn train(&self, words: &[String], labels: &[String], metric: &str) -> anyhow::Result<Trained> {
        let args = train::TrainArgs::of_words(words)?;
        let mut spec = train::uploaded_spec(&self.common, &self.client, &args).await?;
        spec.labels = labels.to_vec();
        let datasets = datasets(&spec);
        let plan = proto::PlanRequest { spec: Some(spec.clone()) };
        let plan = self.client.training().plan(plan).await?.into_inner();
        let steps = plan.resolved.unwrap_or_default().total_steps;
        if let (Some(hyper), Some(_)) = (&mut spec.hyper, &spec.validation) {
            hyper.eval_every.get_or_insert(steps.div_ceil(EVALUATIONS).max(1));
            if metric != "macro_recall" {
                hyper.eval_metric.get_or_insert(metric.to_owned());
            }
        }
        let begun = Instant::now();
        let request = proto::CreateJobRequest { spec: Some(spec), idempotency_key: String::new() };
        let job =
            self.client.training().create_job(request).await?.into_inner().job.context("a reply without a job")?;
        let (mut curve, mut times) = (Vec::new(), Vec::new());
        let result = train::follow(&self.client, &job.id, 0, |event| {
            use proto::{JobState as State, job_event::Body};
            match &event.body {
                Some(Body::Metrics(m)) => times.push(m.step_ms),
                Some(Body::Eval(e)) => curve.extend(of_eval(e, metric).map(|v| (e.step, v))),
                Some(Body::State(change)) => match change.state() {
                    State::Succeeded => return Ok(Some(change.result.clone().unwrap_or_default())),
                    State::Failed | State::Cancelled | State::Interrupted => {
                        let failure = change.failure.clone().unwrap_or_default();
                        bail!("the job did not succeed: {} {}", failure.code, failure.message);
                    }
                    _ => {}
                },
                _ => {}
            }
            Ok(None)
        })
        .await?;
        times.sort_by(f64::total_cmp);
        Ok(Trained {
            id: job.id,
            model: result.model.map(|m| self.data_dir.join(m.path)),
            trainable: plan.trainable_parameters,
            steps,
            curve,
            seconds: begun.elapsed().as_secs_f64(),
            step_ms: times.get(times.len() / 2).copied().unwrap_or_default(),
            datasets,
        })
    }

    /// Figures of a task's test rows under a delta, or under the model that full fine-tuning made.
    ///
    /// # Errors
    /// Files that cannot be read, refused requests.
    pub(super) async fn score(
        &self,
        plan: &Plan,
        task: &Task,
        name: &str,
        trained: &Trained,
    ) -> anyhow::Result<serde_json::Map<String, Value>> {
        let Some(model) = &trained.model else { return figures(&self.client, plan, task, name).await };
        let dir = tempfile::tempdir().context("make a temporary data directory")?;
        let other = Self::open(&model.to_string_lossy(), dir.path()).await?;
        let scored = figures(&other.client, plan, task, "").await;
        other.close().await?;
        scored
    }

    /// Removes what a job has left that is not needed any more: its data, its model, and the delta unless it is `kept`.
    ///
    /// # Errors
    /// Refused calls.
    pub(super) async fn clear(&self, name: &str, trained: &Trained, kept: bool) -> anyhow::Result<()> {
        let mut training = self.client.training();
        for id in &trained.datasets {
            training.delete_dataset(proto::DeleteDatasetRequest { id: id.clone() }).await?;
        }
        if trained.model.is_some() {
            training.delete_model(proto::DeleteModelRequest { id: trained.id.clone() }).await?;
        } else if !kept {
            let request = proto::DeleteDeltaRequest { name: name.to_owned(), ..Default::default() };
            self.client.deltas().delete_delta(request).await?;
        }
        Ok(())
    }
}

/// Uploaded data of a spec.
fn datasets(spec: &proto::TrainingSpec) -> Vec<String> {
    use proto::{training_data::Source, training_spec::Validation};
    let validation = match &spec.validation {
        Some(Validation::ValidationData(data)) => Some(data),
        _ => None,
    };
    let held = spec.ewc.as_ref().and_then(|e| e.data.as_ref());
    let mut ids: Vec<String> = [spec.data.as_ref(), validation, spec.forgetting.as_ref(), held]
        .into_iter()
        .flatten()
        .filter_map(|data| match &data.source {
            Some(Source::DatasetId(id)) => Some(id.clone()),
            _ => None,
        })
        .collect();
    ids.sort();
    ids.dedup();
    ids
}

/// A figure of an evaluation by name.
fn of_eval(e: &proto::EvalResult, metric: &str) -> Option<f64> {
    match metric {
        "loss" => Some(e.loss),
        "perplexity" => e.perplexity,
        "accuracy" => e.accuracy,
        "macro_f1" => e.macro_f1,
        "mcc" => e.mcc,
        "span_f1" => e.span_f1,
        "span_precision" => e.span_precision,
        "span_recall" => e.span_recall,
        _ => None,
    }
}

async fn figures(
    client: &Client,
    plan: &Plan,
    task: &Task,
    delta: &str,
) -> anyhow::Result<serde_json::Map<String, Value>> {
    let path = plan.path(&task.test);
    let named = match task.kind {
        Kind::SeqCls | Kind::TokenCls => {
            let (figures, scored) = classify::file_figures(client, delta, &path).await?;
            ensure!(scored > 0, "{}: no row has gold", path.display());
            figures
        }
        Kind::CausalLm | Kind::Seq2Seq => likelihood(client, delta, &path).await?,
    };
    Ok(named.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect())
}

/// Loss and perplexity per token of the completions, or texts, of a file.
async fn likelihood(client: &Client, delta: &str, path: &Path) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let rows: Vec<proto::ScoreInput> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| score_input(line).with_context(|| format!("{} line {}", path.display(), i + 1)))
        .collect::<anyhow::Result<_>>()?;
    ensure!(!rows.is_empty(), "{} has no rows", path.display());
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

/// `prompt` with `completion` or the first of `references`; or `text`.
fn score_input(line: &str) -> anyhow::Result<proto::ScoreInput> {
    let row: serde_json::Map<String, Value> = serde_json::from_str(line)?;
    let string = |key: &str| row.get(key).and_then(Value::as_str).map(str::to_owned);
    let first = || Some(row.get("references")?.as_array()?.first()?.as_str()?.to_owned());
    match (string("prompt"), string("completion").or_else(first), string("text")) {
        (Some(prompt), Some(completion), _) => Ok(proto::ScoreInput { prompt, completion }),
        (None, None, Some(text)) => Ok(proto::ScoreInput { prompt: String::new(), completion: text }),
        _ => bail!("has neither prompt with completion or references, nor text"),
    }
}

/// Says how far a study is.
pub(super) fn say(done: usize, all: usize, text: &str) {
    output::note(&format!("[{done}/{all}] {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_scored_after_their_prompts() {
        let of = |line: &str| score_input(line).map(|i| (i.prompt, i.completion)).map_err(|e| e.to_string());
        let pair = |a: &str, b: &str| Ok((a.to_owned(), b.to_owned()));
        assert_eq!(of(r#"{"prompt":"a","completion":"b"}"#), pair("a", "b"));
        assert_eq!(of(r#"{"prompt":"a","references":["b","c"]}"#), pair("a", "b"));
        assert_eq!(of(r#"{"text":"b"}"#), pair("", "b"));
        assert!(of(r#"{"prompt":"a","references":[]}"#).unwrap_err().contains("neither"));
        assert!(of("[]").is_err());
    }
}
