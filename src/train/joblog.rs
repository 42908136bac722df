//! Jobs and their events in the store. The one place of `train` that knows the store's form of them: rows with JSON.

mod resume;
mod servers;

use std::collections::BTreeSet;

use bytes::Bytes;
pub use resume::KeptJob;
use serde::{Deserialize, Serialize};

use crate::{
    admission::train_params::{
        CheckpointEvent, JobEventBody, JobEventInfo, JobFailure, JobInfo, JobResult, JobState, ResolvedTraining,
    },
    ids::{BlobId, TenantId},
    store::{CreateJob, EventRecord, JobRecord, Models, Store, StoreError},
    train::run::Runner,
};

/// Why the log could not answer.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The idempotency key belongs to another request.
    #[error("idempotency key {0:?} was used with a different request")]
    IdempotencyConflict(String),
    /// The job is over: nothing may follow.
    #[error("job {0} has ended")]
    Ended(String),
    /// The job is another server's now.
    #[error("job {0} belongs to another server")]
    NotOwner(String),
    /// A stored row cannot be read.
    #[error("job {id}: stored {what} is unreadable: {message}")]
    Unreadable {
        /// Which job.
        id: String,
        /// Which part.
        what: &'static str,
        /// Why.
        message: String,
    },
    /// A task of the runtime ended early.
    #[error("{0}")]
    Runtime(String),
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
}

impl From<StoreError> for LogError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::IdempotencyConflict(key) => Self::IdempotencyConflict(key),
            StoreError::JobEnded { id, .. } => Self::Ended(id),
            StoreError::NotOwner(id) => Self::NotOwner(id),
            other => Self::Store(other),
        }
    }
}

/// A job to be made.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// UUID v7.
    pub id: String,
    /// Whose.
    pub tenant: TenantId,
    /// What it publishes.
    pub output_name: String,
    /// The request as JSON.
    pub request_json: String,
    /// Hyper-parameters as used.
    pub resolved: ResolvedTraining,
    /// Two creates with one key are one job.
    pub idempotency_key: Option<String>,
    /// Digest of the request and its data: what "the same request" means.
    pub request_digest: String,
    /// Fingerprint of the base that it is for.
    pub base: String,
    /// Blobs of the datasets that it names, by their place in the request.
    pub blobs: Vec<(String, BlobId)>,
}

/// A job as stored.
#[derive(Debug, Clone)]
pub struct StoredJob {
    /// Whose.
    pub tenant: TenantId,
    /// What clients see.
    pub info: JobInfo,
}

/// What is known at a job's change of state, stored beside it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct StoredEnd {
    step: u32,
    result: Option<JobResult>,
    failure: Option<JobFailure>,
}

/// Jobs and events. Clones share them.
#[derive(Clone)]
pub struct JobLog {
    store: Store,
}

impl std::fmt::Debug for JobLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JobLog")
    }
}

impl JobLog {
    /// The jobs of a store.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Where whole models are.
    pub fn models(&self) -> Models {
        self.store.models()
    }

    /// Makes a job in state `queued`, or finds the one that the key made: (job, whether it is new).
    ///
    /// # Errors
    /// [`LogError::IdempotencyConflict`], or the store's.
    pub async fn create(&self, new: NewJob) -> Result<(StoredJob, bool), LogError> {
        let resolved_json = to_json(&new.id, "hyper-parameters", &new.resolved)?;
        let created = self.store.create_job(crate::store::NewJob {
            id: new.id,
            tenant: new.tenant,
            output_name: new.output_name,
            request_json: new.request_json,
            resolved_json,
            idempotency_key: new.idempotency_key,
            request_digest: new.request_digest,
            base: new.base,
            blobs: new.blobs,
        });
        match created.await? {
            CreateJob::Created(record) => Ok((stored(record)?, true)),
            CreateJob::Existing(record) => Ok((stored(record)?, false)),
        }
    }

    /// Appends an event; a state event also sets the job's state in the same transaction. Returns its number, which
    /// counts from 1 without gaps.
    ///
    /// # Errors
    /// [`LogError::Ended`] after a terminal state, or the store's.
    pub async fn append(&self, id: &str, step: u32, body: JobEventBody) -> Result<u64, LogError> {
        let json = to_json(id, "event", &body)?;
        let (state, end) = match body {
            JobEventBody::State(s) => {
                let end = StoredEnd { step, result: s.result, failure: s.failure };
                (Some(s.state.as_str()), Some(to_json(id, "result", &end)?))
            }
            _ => (None, None),
        };
        Ok(self.store.append_event(id, json, state, end).await?)
    }

    /// Events from a number on, at most `limit`.
    ///
    /// # Errors
    /// The store's.
    pub async fn events(&self, id: &str, from_seq: u64, limit: u32) -> Result<Vec<JobEventInfo>, LogError> {
        let read = |EventRecord { seq, at_ms, body_json }: EventRecord| {
            Ok(JobEventInfo { seq, at_ms, body: from_json(id, "event", &body_json)? })
        };
        self.store.events(id, from_seq, limit).await?.into_iter().map(read).collect()
    }

    /// A tenant's job.
    ///
    /// # Errors
    /// The store's.
    pub async fn get(&self, tenant: &TenantId, id: &str) -> Result<Option<JobInfo>, LogError> {
        match self.store.get_job(tenant, id).await {
            Ok(record) => Ok(Some(stored(record)?.info)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// A tenant's jobs, newest first, from after `token` on; and the next token.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(
        &self,
        tenant: &TenantId,
        token: Option<&str>,
        limit: u32,
        state: Option<JobState>,
    ) -> Result<(Vec<JobInfo>, Option<String>), LogError> {
        let page = self.store.list_jobs(tenant, token.unwrap_or_default(), limit, state.map(JobState::as_str)).await?;
        let jobs = page.jobs.into_iter().map(|r| stored(r).map(|s| s.info)).collect::<Result<_, _>>()?;
        Ok((jobs, Some(page.next_page_token).filter(|t| !t.is_empty())))
    }

    /// Jobs that have not ended, oldest first: at start, those that an earlier process left. One that cannot be read does not
    /// hide the others.
    ///
    /// # Errors
    /// The store's.
    pub async fn unfinished(&self) -> Result<Vec<StoredJob>, LogError> {
        let readable = |record: JobRecord| {
            let id = record.id.clone();
            stored(record).inspect_err(|error| tracing::error!(job = id, %error, "a stored job is unreadable")).ok()
        };
        Ok(self.store.unfinished_jobs().await?.into_iter().filter_map(readable).collect())
    }

    /// The job that an idempotency key made, if the request was the same.
    ///
    /// # Errors
    /// [`LogError::IdempotencyConflict`] for another request, or the store's.
    pub async fn made_with(&self, tenant: &TenantId, key: &str, digest: &str) -> Result<Option<StoredJob>, LogError> {
        self.store.job_made_with(tenant, key, digest).await?.map(stored).transpose()
    }

    /// What an unfinished job had published before its process died, if it came so far: the version and the move of the
    /// name are one transaction, a model is whole when it has its record, and the job's end comes after either.
    ///
    /// # Errors
    /// The store's.
    pub async fn published(&self, job: &StoredJob) -> Result<Option<JobResult>, LogError> {
        let StoredJob { tenant, info } = job;
        // a record is written by publishing only, so it also speaks for a job whose change of state was lost
        let (models, id) = (self.models(), info.id.clone());
        let model = blocking(move || models.find(&id)).await?;
        let (number, version) = match (&model, info.state) {
            (Some(_), _) => (0, String::new()),
            (None, JobState::Publishing) => {
                match self.store.version_of_job(tenant, &info.output_name, &info.id).await? {
                    Some((number, version)) => (number, version.to_string()),
                    None => return Ok(None),
                }
            }
            (None, _) => return Ok(None),
        };
        // stays 0 where no event could be stored: a number that is none would not be read again
        let (mut final_loss, mut best_eval, mut from) = (0.0, None, 1);
        loop {
            let page = self.events(&info.id, from, 1000).await?;
            let Some(last) = page.last() else { break };
            from = last.seq + 1;
            for event in page {
                match event.body {
                    JobEventBody::Metrics(m) => final_loss = m.loss,
                    JobEventBody::Eval(e) if e.best => best_eval = Some(e),
                    _ => {}
                }
            }
        }
        Ok(Some(JobResult { name: info.output_name.clone(), number, id: version, final_loss, best_eval, model }))
    }

    /// Removes the models that no succeeded job made, and half-written ones: for the start, when no job publishes.
    ///
    /// # Errors
    /// The store's.
    pub async fn sweep_models(&self) -> Result<(), LogError> {
        let models = self.models();
        let named = {
            let models = models.clone();
            blocking(move || models.jobs()).await?
        };
        let mut keep = BTreeSet::new();
        for id in named {
            let job = self.store.any_job(&id).await?.map(stored).transpose()?;
            if job.is_some_and(|job| job.info.result.is_some_and(|r| r.model.is_some())) {
                keep.insert(id);
            }
        }
        blocking(move || models.sweep(&keep)).await
    }

    /// Keeps a checkpoint's bytes for as long as the job is kept.
    ///
    /// # Errors
    /// The store's.
    pub async fn keep_checkpoint(&self, id: &str, bytes: Bytes) -> Result<BlobId, LogError> {
        let blob = self.store.put_blob(bytes).await?;
        self.store.set_job_blob(id, "checkpoint", blob).await?;
        Ok(blob)
    }

    /// Keeps the weights of one of a job's best evaluations, and tells so; returns the event's number.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub async fn keep_best(&self, id: &str, best: Runner) -> Result<u64, LogError> {
        let Runner { step, figure, bytes } = best;
        // held until its row is there: another job may have made the same weights
        let (blob, hold) = self.store.put_held(bytes.into()).await?;
        if let Err(error) = self.store.keep_best(id, step.into(), blob).await {
            drop(hold);
            self.store.free(blob).await; // of a job that is gone, nobody asks for it
            return Err(error.into());
        }
        let event = CheckpointEvent { step, blob: blob.to_string(), best: true, figure };
        self.append(id, step, JobEventBody::Checkpoint(event)).await
    }
}

/// Runs what waits for the disk beside the async threads.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, LogError> {
    let done = tokio::task::spawn_blocking(f).await.map_err(|e| LogError::Runtime(e.to_string()))?;
    done.map_err(LogError::from)
}

fn stored(record: JobRecord) -> Result<StoredJob, LogError> {
    let id = record.id;
    let unreadable = |what, message: String| LogError::Unreadable { id: id.clone(), what, message };
    let state = JobState::parse(&record.state).ok_or_else(|| unreadable("state", record.state.clone()))?;
    let resolved = from_json(&id, "hyper-parameters", &record.resolved_json)?;
    let end: StoredEnd = match &record.result_json {
        Some(json) => from_json(&id, "result", json)?,
        None => StoredEnd::default(),
    };
    let info = JobInfo {
        id,
        output_name: record.output_name,
        state,
        resolved,
        step: end.step,
        created_ms: record.created_ms,
        updated_ms: record.updated_ms,
        last_seq: record.last_seq,
        result: end.result,
        failure: end.failure,
    };
    Ok(StoredJob { tenant: record.tenant, info })
}

fn to_json(id: &str, what: &'static str, value: &impl Serialize) -> Result<String, LogError> {
    serde_json::to_string(value).map_err(|e| LogError::Unreadable { id: id.to_owned(), what, message: e.to_string() })
}

fn from_json<T: serde::de::DeserializeOwned>(id: &str, what: &'static str, json: &str) -> Result<T, LogError> {
    serde_json::from_str(json).map_err(|e| LogError::Unreadable { id: id.to_owned(), what, message: e.to_string() })
}
