//! What the log keeps so that a job can go on: its request and data, and its last checkpoint.

use std::collections::HashMap;

use bytes::Bytes;

use super::{JobLog, LogError, StoredEnd, from_json, stored, to_json};
use crate::{
    admission::train_params::{CheckpointEvent, JobEventBody, JobInfo, JobState, StateEvent, TrainParams},
    ids::{BlobId, TenantId},
    store::{CheckpointRecord, JobChange, StoreError},
};

/// What is needed to prepare a job again.
#[derive(Debug, Clone)]
pub struct KeptJob {
    /// As clients see it.
    pub info: JobInfo,
    /// The request as it came.
    pub request: TrainParams,
    /// Fingerprint of its base; empty: not known.
    pub base: String,
    /// Blobs of the datasets that the request names, by their place in it.
    pub blobs: HashMap<String, BlobId>,
    /// What it goes on from; without one, it begins.
    pub checkpoint: Option<CheckpointRecord>,
    /// The weights of its best evaluations beside the one that it published, by step.
    pub bests: Vec<(u64, BlobId)>,
}

impl JobLog {
    /// A tenant's job with all that preparing it again takes.
    ///
    /// # Errors
    /// The store's, or a request that cannot be read.
    pub async fn kept(&self, tenant: &TenantId, id: &str) -> Result<Option<KeptJob>, LogError> {
        let record = match self.store.get_job(tenant, id).await {
            Ok(record) => record,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let request = from_json(id, "request", &record.request_json)?;
        let blobs = self.store.job_blobs(id).await?.into_iter().collect();
        let checkpoint = self.store.job_checkpoint(id).await?;
        let bests = self.store.job_bests(id).await?;
        let base = record.base.clone();
        Ok(Some(KeptJob { info: stored(record)?.info, request, base, blobs, checkpoint, bests }))
    }

    /// The state of a job, whosever it is.
    ///
    /// # Errors
    /// The store's.
    pub async fn state(&self, id: &str) -> Result<Option<JobState>, LogError> {
        Ok(self.store.any_job(id).await?.map(stored).transpose()?.map(|job| job.info.state))
    }

    /// What a job goes on from.
    ///
    /// # Errors
    /// The store's.
    pub async fn checkpoint(&self, id: &str) -> Result<Option<CheckpointRecord>, LogError> {
        Ok(self.store.job_checkpoint(id).await?)
    }

    /// A stored blob, verified.
    ///
    /// # Errors
    /// The store's.
    pub async fn blob(&self, blob: BlobId) -> Result<Bytes, LogError> {
        Ok(self.store.get_blob(blob).await?)
    }

    /// Makes this what the job goes on from, in place of what was, with its event and, if given, the new state, in one
    /// transaction. An older one than it has changes nothing. Returns the number of the last event.
    ///
    /// # Errors
    /// [`LogError::Ended`] after a terminal state, or the store's.
    pub async fn save(&self, id: &str, step: u32, bytes: Bytes, then: Option<JobState>) -> Result<u64, LogError> {
        crate::failpoint!("checkpoint-before-write");
        // held until its row is there: the same run of another job has the same bytes, and replaces them
        let (blob, hold) = self.store.put_held(bytes).await?;
        crate::failpoint!("checkpoint-written");
        let saved = JobEventBody::Checkpoint(CheckpointEvent { step, blob: blob.to_string(), ..Default::default() });
        let mut change = JobChange {
            events: vec![to_json(id, "event", &saved)?],
            checkpoint: Some((step.into(), blob)),
            ..JobChange::default()
        };
        if let Some(state) = then {
            let event = JobEventBody::State(StateEvent { state, result: None, failure: None });
            change.events.push(to_json(id, "event", &event)?);
            change.state = Some(state.as_str().to_owned());
            change.result_json = Some(to_json(id, "result", &StoredEnd { step, result: None, failure: None })?);
        }
        let saved = self.store.change_job(id, change).await;
        if let Err(StoreError::JobEnded { .. } | StoreError::NotFound { .. }) = &saved {
            // it ended, or its tenant was deleted, while the bytes were written: nobody goes on from them
            drop(hold);
            self.store.free(blob).await;
        }
        let seq = saved?;
        crate::failpoint!("checkpoint-named");
        Ok(seq)
    }

    /// Counts that a waiting job is about to be prepared again at a start of the server.
    ///
    /// # Errors
    /// The store's.
    pub async fn begin_try(&self, id: &str) -> Result<(), LogError> {
        self.store.count_try(id, true).await?;
        Ok(())
    }

    /// Forgets the tries: preparing it came to an end, whichever.
    ///
    /// # Errors
    /// The store's.
    pub async fn end_try(&self, id: &str) -> Result<(), LogError> {
        self.store.count_try(id, false).await?;
        Ok(())
    }

    /// Tries that did not come to an end.
    ///
    /// # Errors
    /// The store's.
    pub async fn tries(&self, id: &str) -> Result<u64, LogError> {
        Ok(self.store.job_tries(id).await?)
    }

    /// Queues a job of an earlier process again. `counts`: it had not stopped by itself.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub async fn queue_again(&self, id: &str, step: u32, counts: bool) -> Result<u64, LogError> {
        let event = JobEventBody::State(StateEvent { state: JobState::Queued, result: None, failure: None });
        let end = StoredEnd { step, result: None, failure: None };
        let change = JobChange {
            events: vec![to_json(id, "event", &event)?],
            state: Some(JobState::Queued.as_str().to_owned()),
            result_json: Some(to_json(id, "result", &end)?),
            resumes: counts,
            ..JobChange::default()
        };
        Ok(self.store.change_job(id, change).await?)
    }
}
