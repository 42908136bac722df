//! Where jobs and their events are kept. The one place of `train` that knows the store's form of them.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::{
    admission::train_params::{JobEventBody, JobEventInfo, JobInfo, JobState, ResolvedTraining, StateEvent},
    ids::{BlobId, TenantId},
};

/// Why the log could not answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// The idempotency key belongs to another request.
    #[error("idempotency key {0:?} was used with a different request")]
    IdempotencyConflict(String),
    /// The job is over: nothing may follow.
    #[error("job {0} has ended")]
    Ended(String),
    /// A task of the runtime ended early.
    #[error("{0}")]
    Runtime(String),
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
}

/// A job as stored.
#[derive(Debug, Clone)]
pub struct StoredJob {
    /// Whose.
    pub tenant: TenantId,
    /// What clients see.
    pub info: JobInfo,
}

#[derive(Debug)]
struct Kept {
    job: StoredJob,
    key: Option<(String, String)>,
    events: Vec<JobEventInfo>,
}

/// Jobs and events. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct JobLog {
    jobs: Arc<Mutex<BTreeMap<String, Kept>>>,
    blobs: Arc<Mutex<BTreeMap<String, Bytes>>>,
}

impl JobLog {
    /// Makes a job in state `queued`, or finds the one that the key made: (job, whether it is new).
    ///
    /// # Errors
    /// [`LogError::IdempotencyConflict`], or the store's.
    pub async fn create(&self, new: NewJob) -> Result<(StoredJob, bool), LogError> {
        let mut jobs = self.jobs.lock();
        let key = new.idempotency_key.map(|k| (k, new.request_digest));
        if let Some((name, digest)) = &key {
            let same = |k: &&Kept| k.job.tenant == new.tenant && k.key.as_ref().is_some_and(|(n, _)| n == name);
            if let Some(found) = jobs.values().find(same) {
                return match &found.key {
                    Some((_, d)) if d == digest => Ok((found.job.clone(), false)),
                    _ => Err(LogError::IdempotencyConflict(name.clone())),
                };
            }
        }
        let at = now_ms();
        let info = JobInfo {
            id: new.id.clone(),
            output_name: new.output_name,
            state: JobState::Queued,
            resolved: new.resolved,
            step: 0,
            created_ms: at,
            updated_ms: at,
            last_seq: 0,
            result: None,
            failure: None,
        };
        let job = StoredJob { tenant: new.tenant, info };
        jobs.insert(new.id, Kept { job: job.clone(), key, events: Vec::new() });
        Ok((job, true))
    }

    /// Appends an event; a state event also sets the job's state in the same transaction. Returns its number, which
    /// counts from 1 without gaps.
    ///
    /// # Errors
    /// [`LogError::Ended`] after a terminal state, or the store's.
    pub async fn append(&self, id: &str, step: u32, body: JobEventBody) -> Result<u64, LogError> {
        let mut jobs = self.jobs.lock();
        let kept = jobs.get_mut(id).ok_or_else(|| LogError::Runtime(format!("no job {id}")))?;
        let info = &mut kept.job.info;
        if info.state.is_terminal() {
            return Err(LogError::Ended(id.to_owned()));
        }
        let (seq, at_ms) = (info.last_seq + 1, now_ms());
        (info.last_seq, info.updated_ms, info.step) = (seq, at_ms, step);
        if let JobEventBody::State(StateEvent { state, result, failure }) = &body {
            (info.state, info.result, info.failure) = (*state, result.clone(), failure.clone());
        }
        kept.events.push(JobEventInfo { seq, at_ms, body });
        Ok(seq)
    }

    /// Events from a number on, at most `limit`.
    ///
    /// # Errors
    /// The store's.
    pub async fn events(&self, id: &str, from_seq: u64, limit: u32) -> Result<Vec<JobEventInfo>, LogError> {
        let jobs = self.jobs.lock();
        let events = jobs.get(id).map_or(&[][..], |k| k.events.as_slice());
        Ok(events.iter().filter(|e| e.seq >= from_seq).take(limit as usize).cloned().collect())
    }

    /// A tenant's job.
    ///
    /// # Errors
    /// The store's.
    pub async fn get(&self, tenant: &TenantId, id: &str) -> Result<Option<JobInfo>, LogError> {
        Ok(self.jobs.lock().get(id).filter(|k| k.job.tenant == *tenant).map(|k| k.job.info.clone()))
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
        let jobs = self.jobs.lock();
        let wanted = |k: &&Kept| {
            k.job.tenant == *tenant
                && state.is_none_or(|s| k.job.info.state == s)
                && token.is_none_or(|t| k.job.info.id.as_str() < t)
        };
        let page: Vec<JobInfo> =
            jobs.values().rev().filter(wanted).take(limit as usize + 1).map(|k| k.job.info.clone()).collect();
        let next = (page.len() > limit as usize).then(|| page[limit as usize - 1].id.clone());
        Ok((page.into_iter().take(limit as usize).collect(), next))
    }

    /// Jobs that have not ended: at start, those that an earlier process left.
    ///
    /// # Errors
    /// The store's.
    pub async fn unfinished(&self) -> Result<Vec<StoredJob>, LogError> {
        Ok(self.jobs.lock().values().filter(|k| !k.job.info.state.is_terminal()).map(|k| k.job.clone()).collect())
    }

    /// Keeps a checkpoint's bytes for as long as the job is kept.
    ///
    /// # Errors
    /// The store's.
    pub async fn keep_checkpoint(&self, _id: &str, bytes: Bytes) -> Result<BlobId, LogError> {
        let id = BlobId::of(&bytes);
        self.blobs.lock().insert(id.to_string(), bytes);
        Ok(id)
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
