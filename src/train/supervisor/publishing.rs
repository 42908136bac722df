//! What becomes of a run that is over: a version, a model, or a failure with the weights that are left.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Command, JobEventBody, JobFailure, JobResult, JobState, Phase, PublishFailure, PublishJob, Published, Running,
    Supervisor, state,
};
use crate::{
    admission::train_params::{CheckpointEvent, NoteEvent},
    train::{
        handle::Shared,
        run::{Failed, Runner, Trained},
    },
};

/// Stores the weights of one of a job's best evaluations. Without them the job is still what was asked for.
async fn keep_best(shared: &Shared, id: &str, best: Runner) {
    let step = best.step;
    let told = match shared.log.keep_best(id, best).await {
        Ok(seq) => Ok(seq),
        Err(error) => {
            tracing::error!(job = id, step, %error, "the weights of an evaluation could not be kept");
            let message = format!("the weights of the evaluation at step {step} could not be kept: {error}");
            let note = JobEventBody::Warning(NoteEvent { code: "CHECKPOINT_LOST".into(), message });
            shared.log.append(id, shared.step(id), note).await
        }
    };
    if let Ok(seq) = told {
        shared.notify(id, seq);
    }
}

impl Supervisor {
    pub(super) async fn publish(&mut self, id: &str, trained: Trained) {
        crate::failpoint!("job-before-publishing");
        self.append(id, state(JobState::Publishing)).await;
        let Some(job) = self.running.get_mut(id) else { return };
        let Trained { delta, model, checkpoint, final_loss, best_eval, runners, mix: _ } = trained;
        let best_eval = best_eval.map(Box::new);
        job.phase = Phase::Publishing { final_loss, best_eval, checkpoint: checkpoint.map(Bytes::from) };
        let request = PublishJob {
            job: id.to_owned(),
            tenant: job.tenant.clone(),
            name: job.name.clone(),
            policy: job.policy,
            delta,
            model,
            input: job.info,
        };
        let (publisher, id, done) = (Arc::clone(&self.publisher), id.to_owned(), self.to_self.clone());
        let shared = Arc::clone(&self.shared);
        // a task of its own, so that a slow disk delays no other job's events; a panic in it is an answer, too
        tokio::spawn(async move {
            // before the version: a job that has published has all that it keeps
            for best in runners {
                keep_best(&shared, &id, best).await;
            }
            let result = tokio::spawn(async move { publisher(request).await }).await.unwrap_or_else(|e| {
                Err(PublishFailure { code: "INTERNAL".into(), message: format!("publishing: {e}") })
            });
            if let Some(done) = done.upgrade() {
                let _ = done.send(Command::Published(id, result)).await;
            }
        });
    }

    pub(super) async fn published(&mut self, id: &str, result: Result<Published, PublishFailure>) {
        if self.is_lost(id) {
            return self.leave(id);
        }
        let Some(Running { name, phase: Phase::Publishing { final_loss, best_eval, checkpoint }, .. }) =
            self.running.remove(id)
        else {
            return;
        };
        crate::failpoint!("job-published");
        match result {
            Ok(published) => {
                let (number, version, model) = match published {
                    Published::Version { number, id } => (number, id.to_string(), None),
                    Published::Model(model) => (0, String::new(), Some(model)),
                };
                let best_eval = best_eval.map(|e| *e);
                let result = JobResult { name, number, id: version, final_loss, best_eval, model };
                self.terminal(id, JobState::Succeeded, Some(result), None).await;
            }
            Err(PublishFailure { code, message }) => {
                let step = self.shared.step(id);
                if let Some(bytes) = checkpoint {
                    self.keep_checkpoint(id, step, bytes).await;
                }
                self.terminal(id, JobState::Failed, None, Some(JobFailure { code, message })).await;
            }
        }
    }

    pub(super) async fn failed(&mut self, id: &str, failed: Failed) {
        self.running.remove(id);
        if let Some((step, bytes)) = failed.checkpoint {
            self.keep_checkpoint(id, step, bytes.into()).await;
        }
        let failure = JobFailure { code: failed.code.into(), message: failed.message };
        self.terminal(id, JobState::Failed, None, Some(failure)).await;
    }

    async fn keep_checkpoint(&mut self, id: &str, step: u32, bytes: Bytes) {
        let event = match self.shared.log.keep_checkpoint(id, bytes).await {
            Ok(blob) => {
                JobEventBody::Checkpoint(CheckpointEvent { step, blob: blob.to_string(), ..Default::default() })
            }
            Err(e) => {
                let message = format!("the last good checkpoint (step {step}) could not be kept: {e}");
                JobEventBody::Warning(NoteEvent { code: "CHECKPOINT_LOST".into(), message })
            }
        };
        self.append(id, event).await;
    }
}
