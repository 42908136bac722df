//! A server in this process, and what a study asks of it: train, score, clean up. All over gRPC, as any client would.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::{
    metric,
    plan::{Plan, Task},
    score,
};
use crate::{
    app,
    cli::{Common, client::Client, output, train},
    config::{Config, ServeArgs},
    grpc::proto,
};

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
    /// The base's fingerprint.
    pub(super) fingerprint: String,
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
        // nothing is served beside the jobs
        serve.train_nice = "0".into();
        let server = app::start(Config::try_from(serve)?, None).await?;
        let common = Common::plain(format!("http://{}", server.grpc), TENANT, true);
        let client = Client::connect(&common).await?;
        let info = client.server().get_server_info(proto::GetServerInfoRequest {}).await?.into_inner();
        let proto::BaseInfo { parameters, fingerprint, .. } = info.base.context("a reply without a base")?;
        let lab = Self { server, client, common, data_dir: data_dir.to_path_buf(), parameters, fingerprint };
        lab.end_jobs().await?;
        lab.clear_data().await?;
        Ok(lab)
    }

    /// Ends what a study that was stopped in the middle of a job has left: it would run beside the jobs that are measured.
    async fn end_jobs(&self) -> anyhow::Result<()> {
        use proto::{JobState as State, job_event::Body};
        for state in [State::Queued, State::Running, State::Publishing, State::Paused] {
            let request = proto::ListJobsRequest { page_size: 1000, state: state.into(), ..Default::default() };
            for job in self.client.training().list_jobs(request).await?.into_inner().jobs {
                // one that ends meanwhile refuses, and has ended
                let _ = self.client.training().cancel_job(proto::CancelJobRequest { id: job.id.clone() }).await;
                let ended = |event: &proto::JobEvent| {
                    let Some(Body::State(change)) = &event.body else { return Ok(None) };
                    let terminal = [State::Succeeded, State::Failed, State::Cancelled, State::Interrupted];
                    Ok(terminal.contains(&change.state()).then_some(()))
                };
                train::follow(&self.client, &job.id, 0, ended).await?;
            }
        }
        Ok(())
    }

    /// Removes all uploaded data: between jobs none is needed, whatever became of the last one.
    async fn clear_data(&self) -> anyhow::Result<()> {
        let mut training = self.client.training();
        loop {
            let request = proto::ListDatasetsRequest { page_size: 1000, page_token: String::new() };
            let found = training.list_datasets(request).await?.into_inner().datasets;
            if found.is_empty() {
                return Ok(());
            }
            for dataset in found {
                training.delete_dataset(proto::DeleteDatasetRequest { id: dataset.id }).await?;
            }
        }
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
    /// ten times, the curve is of their `watched` figure, and it chooses the best checkpoint if it can, unless the options
    /// say otherwise. `accepts` sees what the server makes of the options before the job is created.
    ///
    /// # Errors
    /// Refused options and data; a job that does not succeed. No uploaded data stays in any case.
    pub(super) async fn train(
        &self,
        words: &[String],
        labels: &[String],
        watched: &str,
        accepts: impl Fn(&proto::PlanResponse) -> anyhow::Result<()>,
    ) -> anyhow::Result<Trained> {
        let ended = self.job(words, labels, watched, accepts).await;
        let cleared = self.clear_data().await;
        let trained = ended?;
        cleared?;
        Ok(trained)
    }

    async fn job(
        &self,
        words: &[String],
        labels: &[String],
        watched: &str,
        accepts: impl Fn(&proto::PlanResponse) -> anyhow::Result<()>,
    ) -> anyhow::Result<Trained> {
        let args = train::TrainArgs::of_words(words)?;
        let mut spec = train::uploaded_spec(&self.common, &self.client, &args).await?;
        spec.labels = labels.to_vec();
        let plan = proto::PlanRequest { spec: Some(spec.clone()) };
        let plan = self.client.training().plan(plan).await?.into_inner();
        accepts(&plan)?;
        let steps = plan.resolved.unwrap_or_default().total_steps;
        if let (Some(hyper), Some(_)) = (&mut spec.hyper, &spec.validation) {
            hyper.eval_every.get_or_insert(steps.div_ceil(EVALUATIONS).max(1));
            if metric::chooses(watched) {
                hyper.eval_metric.get_or_insert(watched.to_owned());
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
                Some(Body::Eval(e)) => curve.extend(metric::of_eval(e, watched).map(|v| (e.step, v))),
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
        let Some(model) = &trained.model else { return score::figures(&self.client, plan, task, name).await };
        let dir = tempfile::tempdir().context("make a temporary data directory")?;
        let other = Self::open(&model.to_string_lossy(), dir.path()).await?;
        let scored = score::figures(&other.client, plan, task, "").await;
        other.close().await?;
        scored
    }

    /// Removes what a job has made that is not needed any more: its model, or the delta unless it is `kept`.
    ///
    /// # Errors
    /// Refused calls.
    pub(super) async fn clear(&self, name: &str, trained: &Trained, kept: bool) -> anyhow::Result<()> {
        let mut training = self.client.training();
        if trained.model.is_some() {
            training.delete_model(proto::DeleteModelRequest { id: trained.id.clone() }).await?;
        } else if !kept {
            let request = proto::DeleteDeltaRequest { name: name.to_owned(), ..Default::default() };
            self.client.deltas().delete_delta(request).await?;
        }
        Ok(())
    }
}

/// Says how far a study is.
pub(super) fn say(done: usize, all: usize, text: &str) {
    output::note(&format!("[{done}/{all}] {text}"));
}
