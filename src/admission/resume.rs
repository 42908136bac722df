//! Pausing jobs, and letting them go on: after a pause, and after a restart of the server.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;

use super::{
    params::{DeltaInfo, PublishPolicy, ServeError, UploadParams},
    service::Service,
    train_params::{JobFailure, JobInfo},
    training::Sources,
};
use crate::{
    ids::TenantId,
    interop::{self, EncodeMeta},
    store::{Origin, StoreError},
    train::{
        KeptJob, Place, Prepared, Refusal, TrainError,
        joblog::LogError,
        publish_info,
        run::{ResumeError, RunInput, Work},
    },
};

/// Why a job does not go on.
enum Obstacle {
    /// The server has another base than the job was made for.
    Base(String),
    /// It cannot be prepared as it was, or its checkpoint is no use.
    Job(String),
    /// What it started from or its data is gone or damaged; both can be uploaded again.
    Mendable(String),
    /// Not now.
    Now(ServeError),
}

impl From<ServeError> for Obstacle {
    fn from(e: ServeError) -> Self {
        match e {
            ServeError::Invalid(_) | ServeError::BaseMismatch(_) | ServeError::WrongTask(_) => {
                Self::Job(format!("it cannot be prepared as it was: {e}"))
            }
            ServeError::DeltaNotFound(_) | ServeError::NotFound { .. } | ServeError::Corrupt(_) => {
                Self::Mendable(format!("it cannot be prepared as it was: {e}"))
            }
            other => Self::Now(other),
        }
    }
}

impl From<Obstacle> for ServeError {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Base(m) | Obstacle::Job(m) | Obstacle::Mendable(m) => Self::CannotResume(m),
            Obstacle::Now(e) => e,
        }
    }
}

impl From<Obstacle> for Refusal {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Job(message) => Self::Fails(JobFailure { code: "CANNOT_RESUME".into(), message }),
            Obstacle::Base(message) | Obstacle::Mendable(message) => Self::Pauses(message),
            Obstacle::Now(e) => Self::Pauses(e.to_string()),
        }
    }
}

impl Service {
    /// Pauses a job, and answers when it is paused or has come to its end in the meantime.
    ///
    /// # Errors
    /// Unknown, or another tenant's; it has ended or is being published; full fine-tuning that has begun.
    pub async fn pause_job(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, ServeError> {
        Ok(self.parts().trainer.pause(tenant, id).await?)
    }

    /// Queues a paused job again, to go on from its checkpoint.
    ///
    /// # Errors
    /// Unknown, or another tenant's; it is not paused; it cannot go on as it was (it stays paused); too many jobs.
    pub async fn resume_job(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, ServeError> {
        self.check_trains()?;
        let trainer = &self.parts().trainer;
        let kept = trainer.kept(tenant, id).await?;
        let place = trainer.place(tenant, &kept.info)?;
        let (prepared, from) = self.prepare_again(tenant, &kept).await?;
        Ok(trainer.go_on(place, tenant, kept, &prepared, from).await?)
    }

    /// Publishes what a job has come to: the values of its last stored checkpoint, as a version of a name (of a sweep, those of
    /// the candidate with the best evaluation so far). The job goes on; one that failed or was interrupted has kept its last one.
    ///
    /// # Errors
    /// Unknown, or another tenant's; it has no checkpoint (also when it has succeeded or was cancelled); as [`Self::resume_job`] where it could
    /// not go on; as an upload of the same files.
    pub async fn publish_checkpoint(
        &self,
        tenant: &TenantId,
        id: &str,
        name: String,
        policy: PublishPolicy,
    ) -> Result<DeltaInfo, ServeError> {
        let kept = self.parts().trainer.kept(tenant, id).await?;
        let none = || ServeError::JobState(format!("job {id} is {} and has no checkpoint", kept.info.state.as_str()));
        if kept.checkpoint.is_none() {
            return Err(none());
        }
        // one at a time: each reads the job's data and makes its run again
        let turn = self.inner.publishing.acquire().await;
        let _turn = turn.map_err(|e| ServeError::Internal(format!("publishing a checkpoint: {e}")))?;
        let (prepared, from) = self.prepare_again(tenant, &kept).await?;
        let (step, bytes) = from.ok_or_else(none)?;
        let files = self.blocking(move |parts| {
            let internal = |what: String| ServeError::Internal(format!("the checkpoint of step {step}: {what}"));
            let input = RunInput::from(&prepared);
            let info = publish_info(&input);
            let work = Work::from_bytes(Arc::clone(&parts.base), None, input, &bytes);
            let delta = work.and_then(|work| work.delta()).map_err(|e| internal(e.to_string()))?;
            let unknown = || ServeError::JobState("no candidate of the sweep has been evaluated yet".to_owned());
            let delta = delta.ok_or_else(unknown)?;
            let base_name = parts.base_name.clone();
            let meta = EncodeMeta { base_name, rslora: info.rslora, dropout: info.dropout };
            interop::encode(&delta, &parts.base, &meta).map_err(|e| internal(e.to_string()))
        });
        let params = UploadParams { name, policy, labels: vec![], files: files.await?.files };
        let made = self.publish(tenant, params, Origin::Job(format!("{id}@{step}"))).await;
        made.map_err(|e| e.of_files("id"))
    }

    /// Prepares the jobs again that an earlier process left, one after the other, and queues them. One that cannot go on
    /// fails with the reason; where that lies with this server, it is paused.
    pub async fn take_up_jobs(&self) {
        if self.check_trains().is_err() {
            return; // they wait for a server that trains
        }
        for (tenant, id) in self.parts().trainer.take_left() {
            match self.take_up(&tenant, &id).await {
                Ok(()) | Err(Obstacle::Now(ServeError::Draining)) => {}
                Err(obstacle) => {
                    let refusal = Refusal::from(obstacle);
                    tracing::warn!(job = id, ?refusal, "a job of an earlier process does not go on");
                    self.parts().trainer.refuse(&id, refusal).await;
                }
            }
        }
    }

    async fn take_up(&self, tenant: &TenantId, id: &str) -> Result<(), Obstacle> {
        let trainer = &self.parts().trainer;
        let place = trainer.place_of_left(id).await.map_err(ServeError::from)?;
        trainer.begin_try(id).await.map_err(ServeError::from)?;
        let taken = self.take_up_in(place, tenant, id).await;
        trainer.end_try(id).await;
        taken
    }

    async fn take_up_in(&self, place: Place, tenant: &TenantId, id: &str) -> Result<(), Obstacle> {
        let trainer = &self.parts().trainer;
        let kept = trainer.kept(tenant, id).await.map_err(|e| match e {
            TrainError::Log(e @ LogError::Unreadable { .. }) => Obstacle::Job(e.to_string()),
            e => Obstacle::Now(e.into()),
        })?;
        let (prepared, from) = self.prepare_again(tenant, &kept).await?;
        match trainer.go_on(place, tenant, kept, &prepared, from).await {
            // cancelled or paused while it was being prepared
            Ok(_) | Err(TrainError::State { .. }) => Ok(()),
            Err(e) => Err(Obstacle::Now(e.into())),
        }
    }

    /// Resolves a job's request again, which must come to what it was, and fetches its checkpoint.
    async fn prepare_again(
        &self,
        tenant: &TenantId,
        kept: &KeptJob,
    ) -> Result<(Prepared, Option<(u32, Bytes)>), Obstacle> {
        let base = self.parts().base.fingerprint;
        if !kept.base.is_empty() && kept.base != base.to_string() {
            return Err(Obstacle::Base(format!("the job was made for the base {}; this server has {base}", kept.base)));
        }
        let mut params = kept.request.clone();
        if let Some(from) = &kept.info.resolved.started_from {
            params.from_delta = Some(from.name.clone()); // the version that it was then
        }
        let mut sources = Sources::kept(&kept.blobs);
        let prepared = self.prepare(tenant, Arc::new(params), &mut sources).await?;
        if prepared.reply.resolved.of_training() != kept.info.resolved.of_training() {
            return Err(Obstacle::Job(ResumeError::Hyper.to_string()));
        }
        let Some(bytes) = self.checkpoint(&kept.info.id).await? else { return Ok((prepared, None)) };
        let (input, read) = (RunInput::from(&prepared), bytes.clone());
        let checked = self.blocking(move |parts| Ok(input.check_resumes(&read, &parts.base.fingerprint))).await?;
        let step = checked.map_err(|e| Obstacle::Job(e.to_string()))?;
        Ok((prepared, Some((step, bytes))))
    }

    /// The bytes of a job's checkpoint, if it has one.
    async fn checkpoint(&self, id: &str) -> Result<Option<Bytes>, Obstacle> {
        const TRIES: u32 = 5;
        let trainer = &self.parts().trainer;
        let mut damage = String::new();
        for _ in 0..TRIES {
            let Some(found) = trainer.checkpoint(id).await.map_err(ServeError::from)? else { return Ok(None) };
            match trainer.blob(found.blob).await {
                Ok(bytes) => return Ok(Some(bytes)),
                // a job that trains replaces it: the next one is there by now
                Err(TrainError::Log(LogError::Store(e @ StoreError::Corrupt { .. }))) => damage = e.to_string(),
                Err(e) => return Err(Obstacle::Now(e.into())),
            }
        }
        Err(Obstacle::Job(format!("its checkpoint is damaged: {damage}")))
    }
}

impl Sources {
    fn kept(blobs: &HashMap<String, crate::ids::BlobId>) -> Self {
        Self { kept: blobs.clone(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_fails_only_where_nothing_can_be_mended() {
        let refusal = |e| Refusal::from(Obstacle::from(e));
        for cured in [
            ServeError::DeltaNotFound("start".into()),
            ServeError::Corrupt("start".into()),
            ServeError::Internal("for a moment".into()),
        ] {
            assert!(matches!(refusal(cured), Refusal::Pauses(_)));
        }
        assert!(
            matches!(refusal(ServeError::WrongTask("start".into())), Refusal::Fails(f) if f.code == "CANNOT_RESUME")
        );
    }
}
