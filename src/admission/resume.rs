//! Pausing jobs, and letting them go on: after a pause, and after a restart of the server.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    params::{DeltaInfo, PublishPolicy, ServeError, UploadParams},
    service::Service,
    train_params::{JobFailure, JobInfo},
    training::{Sources, note_of},
};
use crate::{
    audit,
    ids::{BlobId, TenantId},
    interop::{self, EncodeMeta},
    store::{Origin, StoreError},
    train::{
        KeptJob, Place, Prepared, Refusal, TrainError,
        joblog::LogError,
        publish_info,
        run::{ResumeError, Run, RunInput, Work},
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

/// Which of a job's checkpoints is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// What it goes on from.
    Last,
    /// The weights of one of its best evaluations: the step, and their blob.
    Best(u32, BlobId),
}

impl Which {
    fn of(kept: &KeptJob, step: Option<u32>) -> Result<Self, ServeError> {
        let last = kept.checkpoint.map(|c| c.step);
        let Some(step) = step else { return last.map(|_| Self::Last).ok_or_else(|| no_checkpoint(kept)) };
        let best = kept.bests.iter().find(|(at, _)| *at == u64::from(step));
        match best {
            Some((_, blob)) => Ok(Self::Best(step, *blob)),
            None if last == Some(u64::from(step)) => Ok(Self::Last),
            None => Err(no_such(kept, last.as_slice(), step)),
        }
    }
}

/// A job has nothing to go on from.
fn no_checkpoint(kept: &KeptJob) -> ServeError {
    let (id, state) = (&kept.info.id, kept.info.state.as_str());
    let message = match steps(kept, &[]).as_slice() {
        [] => format!("job {id} is {state} and has no checkpoint"),
        some => {
            format!("job {id} is {state}; of its best evaluations it keeps the steps {}: name one", some.join(", "))
        }
    };
    ServeError::JobState(message)
}

/// A job has no checkpoint of this step; `last` is that of its last one.
fn no_such(kept: &KeptJob, last: &[u64], step: u32) -> ServeError {
    let id = &kept.info.id;
    let there = match steps(kept, last).as_slice() {
        [] => "it has none".to_owned(),
        some => format!("it has those of {}", some.join(", ")),
    };
    ServeError::NoCheckpoint(format!("job {id} has no checkpoint of step {step}; {there}"))
}

/// Steps of checkpoints that can be published.
fn steps(kept: &KeptJob, last: &[u64]) -> Vec<String> {
    let all: BTreeSet<u64> = kept.bests.iter().map(|(at, _)| *at).chain(last.iter().copied()).collect();
    all.iter().map(u64::to_string).collect()
}

impl Service {
    /// Pauses a job, and answers when it is paused or has come to its end in the meantime.
    ///
    /// # Errors
    /// Unknown, or another tenant's; it has ended or is being published; full fine-tuning that has begun.
    pub async fn pause_job(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, ServeError> {
        note_of(tenant, id);
        Ok(self.parts().trainer.pause(tenant, id).await?)
    }

    /// Queues a paused job again, to go on from its checkpoint.
    ///
    /// # Errors
    /// Unknown, or another tenant's; it is not paused; it cannot go on as it was (it stays paused); too many jobs.
    pub async fn resume_job(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, ServeError> {
        note_of(tenant, id);
        self.check_trains()?;
        let trainer = &self.parts().trainer;
        let kept = trainer.kept(tenant, id).await?;
        trainer.claim_paused(&kept.info).await?;
        let place = trainer.place(tenant, &kept.info)?;
        let (prepared, from) = self.prepare_again(tenant, &kept).await?;
        Ok(trainer.go_on(place, tenant, kept, &prepared, from).await?)
    }

    /// Publishes what a job has come to, the values of its last stored checkpoint (of a sweep, those of the candidate with the
    /// best evaluation so far), or those of a step that it keeps, as a version of a name. The job goes on; one that failed or
    /// was interrupted has kept its last one.
    ///
    /// # Errors
    /// Unknown, or another tenant's; it has no checkpoint (also when it has succeeded or was cancelled), or none of that step;
    /// as [`Self::resume_job`] where it could not go on; as an upload of the same files.
    pub async fn publish_checkpoint(
        &self,
        tenant: &TenantId,
        id: &str,
        step: Option<u32>,
        (name, policy): (String, PublishPolicy),
    ) -> Result<DeltaInfo, ServeError> {
        note_of(tenant, &name);
        audit::note(|note| note.job = Some(id.to_owned()));
        let kept = self.parts().trainer.kept(tenant, id).await?;
        let which = Which::of(&kept, step)?;
        // one at a time: each reads the job's data and makes its run again
        let turn = self.inner.publishing.acquire().await;
        let _turn = turn.map_err(|e| ServeError::Internal(format!("publishing a checkpoint: {e}")))?;
        let (prepared, at, bytes) = match which {
            Which::Best(at, blob) => {
                let prepared = self.prepare_as_it_was(tenant, &kept).await?;
                (prepared, at, self.parts().trainer.blob(blob).await?)
            }
            Which::Last => {
                let (prepared, from) = self.prepare_again(tenant, &kept).await?;
                let (at, bytes) = from.ok_or_else(|| no_checkpoint(&kept))?;
                if let Some(wanted) = step.filter(|wanted| *wanted != at) {
                    return Err(no_such(&kept, &[u64::from(at)], wanted)); // a job that trains has replaced it
                }
                (prepared, at, bytes)
            }
        };
        let files = self.blocking(move |parts| {
            let internal = |what: String| ServeError::Internal(format!("the checkpoint of step {at}: {what}"));
            let (base, input) = (Arc::clone(&parts.base), RunInput::from(&prepared));
            let info = publish_info(&input);
            let delta = match which {
                Which::Best(..) => Run::delta_of(base, input, &bytes).map(Some),
                Which::Last => Work::from_bytes(base, None, input, &bytes).and_then(|work| work.delta()),
            };
            let delta = delta.map_err(|e| internal(e.to_string()))?;
            let unknown = || ServeError::JobState("no candidate of the sweep has been evaluated yet".to_owned());
            let delta = delta.ok_or_else(unknown)?;
            let base_name = parts.base_name.clone();
            let meta = EncodeMeta { base_name, rslora: info.rslora, dropout: info.dropout };
            interop::encode(&delta, &parts.base, &meta).map_err(|e| internal(e.to_string()))
        });
        let params = UploadParams { name, policy, labels: vec![], files: files.await?.files };
        let made = self.publish(tenant, params, Origin::Job(format!("{id}@{at}"))).await;
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
                // the second: it ended meanwhile, or is another server's
                Ok(()) | Err(Obstacle::Now(ServeError::Draining | ServeError::Conflict(_))) => {}
                Err(obstacle) => {
                    let refusal = Refusal::from(obstacle);
                    tracing::warn!(job = id, ?refusal, "a job of an earlier process does not go on");
                    self.parts().trainer.refuse(&id, refusal).await;
                }
            }
        }
    }

    /// Waits until servers that are gone have left more jobs to [`Self::take_up_jobs`].
    pub async fn more_jobs_left(&self) {
        self.parts().trainer.more_left().await;
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

    /// Resolves a job's request again, which must come to what it was.
    async fn prepare_as_it_was(&self, tenant: &TenantId, kept: &KeptJob) -> Result<Prepared, Obstacle> {
        let base = self.parts().base.fingerprint;
        if !kept.base.is_empty() && kept.base != base.to_string() {
            return Err(Obstacle::Base(format!("the job was made for the base {}; this server has {base}", kept.base)));
        }
        let mut params = kept.request.clone();
        if let Some(from) = &kept.info.resolved.started_from {
            params.from_delta = Some(from.name.clone()); // the version that it was then
        }
        if let (Some(mix), Some(then)) = (&mut params.mix, &kept.info.resolved.mix) {
            mix.deltas = then.deltas.iter().map(|d| d.name.clone()).collect();
        }
        let mut sources = Sources::kept(&kept.blobs);
        let prepared = self.prepare(tenant, Arc::new(params), &mut sources).await?;
        if prepared.reply.resolved.of_training() != kept.info.resolved.of_training() {
            return Err(Obstacle::Job(ResumeError::Hyper.to_string()));
        }
        Ok(prepared)
    }

    /// As [`Self::prepare_as_it_was`]; and fetches the job's checkpoint.
    async fn prepare_again(
        &self,
        tenant: &TenantId,
        kept: &KeptJob,
    ) -> Result<(Prepared, Option<(u32, Bytes)>), Obstacle> {
        let prepared = self.prepare_as_it_was(tenant, kept).await?;
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
    fn kept(blobs: &HashMap<String, BlobId>) -> Self {
        Self { kept: blobs.clone(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_names_one_of_the_checkpoints_that_are_there() {
        use crate::{
            admission::train_params::{JobState, TrainParams},
            store::CheckpointRecord,
            train::plan::tests::params,
        };
        let request: TrainParams = params(crate::delta::Task::CausalLm, vec![]);
        let blob = |n: u8| BlobId::of(&[n]);
        let kept = |state, last: Option<u64>, bests: &[u64]| {
            let resolved = serde_json::from_value(serde_json::json!({
                "task": "causal_lm", "methods": [], "labels": [], "epochs": 1.0, "total_steps": 9, "batch_size": 1,
                "grad_accumulation": 1, "learning_rate": 0.1, "schedule": "linear", "warmup_steps": 0, "weight_decay": 0.0,
                "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "clip_norm": 1.0, "max_length": 8, "seed": 0, "eval_every": 0,
                "packing": false
            }));
            let info = JobInfo {
                id: "j1".into(),
                output_name: "out".into(),
                state,
                resolved: resolved.expect("a record"),
                step: 9,
                created_ms: 0,
                updated_ms: 0,
                last_seq: 1,
                result: None,
                failure: None,
            };
            let checkpoint = last.map(|step| CheckpointRecord { step, blob: blob(0), resumes: 0 });
            let bests = bests.iter().map(|step| (*step, blob(*step as u8))).collect();
            KeptJob { info, request: request.clone(), base: String::new(), blobs: HashMap::new(), checkpoint, bests }
        };
        let done = kept(JobState::Succeeded, None, &[4, 12]);
        assert!(matches!(Which::of(&done, Some(12)), Ok(Which::Best(12, b)) if b == blob(12)));
        let says = |kept: &KeptJob, step| match Which::of(kept, step) {
            Err(e) => (e.reason(), e.to_string()),
            Ok(which) => panic!("{which:?}"),
        };
        let (reason, text) = says(&done, Some(5));
        assert_eq!((reason, text.as_str()), ("NOT_FOUND", "job j1 has no checkpoint of step 5; it has those of 4, 12"));
        let (reason, text) = says(&done, None);
        assert!(reason == "JOB_STATE" && text.contains("4, 12"), "{text}");
        let paused = kept(JobState::Paused, Some(7), &[]);
        assert!(matches!(Which::of(&paused, None), Ok(Which::Last)));
        assert!(matches!(Which::of(&paused, Some(7)), Ok(Which::Last)));
        assert!(says(&paused, Some(6)).1.ends_with("step 6; it has those of 7"));
        let failed = kept(JobState::Failed, Some(9), &[9, 3]);
        assert!(matches!(Which::of(&failed, Some(9)), Ok(Which::Best(9, _))));
        assert!(says(&failed, Some(1)).1.ends_with("it has those of 3, 9"));
        let none = kept(JobState::Cancelled, None, &[]);
        assert_eq!((says(&none, None).0, says(&none, Some(1)).0), ("JOB_STATE", "NOT_FOUND"));
        assert!(says(&none, Some(1)).1.ends_with("it has none"));
    }

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
