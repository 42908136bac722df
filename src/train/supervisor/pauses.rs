//! Jobs that wait, stop and go on: the queue's entrance, cancelling, pausing, checkpoints, the end of the process.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{Ask, Command, JobEventBody, JobFailure, JobState, Pending, Phase, Refusal, Running, Supervisor, state};
use crate::{
    admission::train_params::NoteEvent,
    train::{error::TrainError, joblog::LogError, run::Saved},
};

impl Supervisor {
    /// Takes a job into the queue, unless it has ended or was paused while it was being prepared.
    pub(super) async fn enqueue(&mut self, job: Pending) -> Result<(), TrainError> {
        let id = job.id.clone();
        let has = self.state_of(&id).await?;
        // its checkpoint is stored, which the message that comes says, too
        if has == JobState::Paused && matches!(self.running.get(&id), Some(Running { phase: Phase::Stopping, .. })) {
            let left = self.running.remove(&id);
            if left.is_some_and(|job| job.control.ask() == Ask::Cancel) {
                self.terminal(&id, JobState::Cancelled, None, None).await;
                return Err(TrainError::State { id, state: JobState::Cancelled, wanted: "paused" });
            }
        }
        if self.shared.log.is_shared() && !self.shared.knows(&id) {
            // the lease ran out while it was being prepared: it may be another server's
            return Err(LogError::NotOwner(id).into());
        }
        let waits = self.queue.iter().any(|j| j.id == id) || self.running.contains_key(&id);
        match has {
            JobState::Queued if waits => return Ok(()),
            JobState::Paused if self.shared.is_draining() => return Err(self.shared.gone()),
            // it stays queued, and is prepared again at the next start
            JobState::Queued if self.shared.is_draining() => {
                self.shared.forget(&id);
                return Err(TrainError::Draining);
            }
            JobState::Queued => {}
            JobState::Paused if job.resumes && !waits => {
                let seq = self.shared.log.append(&id, self.shared.step(&id), state(JobState::Queued)).await?;
                self.shared.notify(&id, seq);
            }
            other => return Err(TrainError::State { id, state: other, wanted: "queued or paused" }),
        }
        crate::failpoint!("job-before-queue");
        self.shared.set_paused(&id, false);
        if !self.queue.iter().any(|j| j.tenant == job.tenant) {
            self.turns.arrives(&job.tenant);
        }
        self.queue.push_back(job);
        Ok(())
    }

    /// A job hears what is asked of it between two micro-steps, and serving may hold it within one.
    fn hurry(&self, job: &Running) {
        if matches!(job.phase, Phase::Training) {
            self.pacer.hurry();
        }
    }

    fn is_loading(&self, id: &str) -> bool {
        self.running.get(id).is_some_and(|job| job.phase.is_loading())
    }

    async fn state_of(&self, id: &str) -> Result<JobState, TrainError> {
        self.shared.log.state(id).await?.ok_or_else(|| TrainError::NotFound(id.to_owned()))
    }

    pub(super) async fn cancel(&mut self, id: &str) {
        if let Some(at) = self.queue.iter().position(|j| j.id == id) {
            self.queue.remove(at);
            self.terminal(id, JobState::Cancelled, None, None).await;
        } else if self.is_loading(id) {
            self.running.remove(id);
            self.terminal(id, JobState::Cancelled, None, None).await;
        } else if let Some(job) = self.running.get(id) {
            // too late once it is being published: that ends by itself
            job.control.cancel();
            self.hurry(job);
        } else if let Ok(JobState::Queued | JobState::Paused) = self.state_of(id).await {
            // paused, or of an earlier process and being prepared
            self.terminal(id, JobState::Cancelled, None, None).await;
        }
    }

    /// As [`Self::pause`], unless the job's tenant has too many paused jobs already, those included that are about to be.
    pub(super) async fn pause_asked(&mut self, id: &str) -> Result<(), TrainError> {
        let asked = |job: &Running| job.control.ask() == Ask::Pause;
        let own = self.running.get(id);
        if own.is_some_and(asked) || (own.is_none() && self.state_of(id).await? == JobState::Paused) {
            return self.pause(id).await; // counted already
        }
        let about = self.running.iter().filter(|(_, job)| asked(job)).map(|(id, _)| id);
        let (paused, most) = (self.shared.paused_beside(id, &about.collect::<Vec<_>>()), self.max_paused);
        if paused >= most {
            let message =
                format!("{paused} jobs of this tenant are paused; at most {most} (resume or cancel one of them first)");
            return Err(TrainError::Overloaded(message));
        }
        self.pause(id).await
    }

    /// Pauses a job that waits; marks one that trains.
    pub(super) async fn pause(&mut self, id: &str) -> Result<(), TrainError> {
        if let Some(job) = self.running.get(id).filter(|job| !job.phase.is_loading()) {
            return match job.phase {
                Phase::Training if job.full => Err(TrainError::FullRuns(id.to_owned())),
                Phase::Loading { .. } | Phase::Training | Phase::Stopping => {
                    job.control.pause();
                    self.hurry(job);
                    Ok(())
                }
                Phase::Publishing { .. } => Err(TrainError::State {
                    id: id.to_owned(),
                    state: JobState::Publishing,
                    wanted: "queued or running",
                }),
            };
        }
        match self.state_of(id).await? {
            JobState::Paused => Ok(()),
            JobState::Queued => {
                let seq = self.shared.log.append(id, self.shared.step(id), state(JobState::Paused)).await?;
                self.queue.retain(|j| j.id != id);
                self.running.remove(id); // what it starts from was being loaded
                self.shared.set_paused(id, true);
                self.shared.notify(id, seq);
                Ok(())
            }
            state => Err(TrainError::State { id: id.to_owned(), state, wanted: "queued or running" }),
        }
    }

    /// A job of an earlier process cannot go on.
    pub(super) async fn refuse(&mut self, id: &str, refusal: Refusal) {
        // cancelled or paused in the meantime, or left for the next start
        if self.shared.is_draining() || !matches!(self.state_of(id).await, Ok(JobState::Queued)) {
            return;
        }
        match refusal {
            Refusal::Fails(failure) => self.terminal(id, JobState::Failed, None, Some(failure)).await,
            Refusal::Pauses(message) => {
                let note = NoteEvent { code: "CANNOT_RESUME".into(), message };
                self.append(id, JobEventBody::Warning(note)).await;
                if let Err(error) = self.pause(id).await {
                    tracing::error!(job = id, %error, "a job could not be paused");
                }
            }
        }
    }

    /// Writes a checkpoint of a job that trains on. A task of its own: a slow disk delays no other job's events.
    pub(super) fn save(&mut self, id: &str, saved: Saved) {
        let Some(job) = self.running.get(id) else { return };
        let (shared, control, id) = (Arc::clone(&self.shared), Arc::clone(&job.control), id.to_owned());
        tokio::spawn(async move {
            match shared.log.save(&id, saved.step, saved.bytes.into(), None).await {
                Ok(seq) => shared.notify(&id, seq),
                Err(LogError::Ended(_)) => {}
                Err(LogError::NotOwner(_)) => control.lose(),
                Err(error) => {
                    tracing::error!(job = id, %error, "a checkpoint could not be stored");
                    let message = format!("the checkpoint of step {} could not be stored: {error}", saved.step);
                    let note = JobEventBody::Warning(NoteEvent { code: "CHECKPOINT_LOST".into(), message });
                    if let Ok(seq) = shared.log.append(&id, saved.step, note).await {
                        shared.notify(&id, seq);
                    }
                }
            }
            control.set_saving(false);
        });
    }

    /// A run has left the thread with what it goes on from: writes that, with the state that the job has then.
    pub(super) fn stop(&mut self, id: &str, saved: Option<Saved>) {
        let Some(job) = self.running.get_mut(id) else { return };
        job.phase = Phase::Stopping;
        crate::failpoint!("job-stopping");
        // one that was to pause before the server stops is paused at the next start, too
        let to = if job.control.ask() == Ask::Stop { JobState::Queued } else { JobState::Paused };
        let (shared, id, done) = (Arc::clone(&self.shared), id.to_owned(), self.to_self.clone());
        tokio::spawn(async move {
            let stored = match saved {
                Some(Saved { step, bytes }) => {
                    shared.progress(&id, step);
                    shared.log.save(&id, step, Bytes::from(bytes), Some(to)).await
                }
                // it begins again, or goes on from the checkpoint before
                None => shared.log.append(&id, shared.step(&id), state(to)).await,
            };
            // whoever sees that it is paused may let it go on
            if stored.is_ok() && to == JobState::Paused {
                shared.set_paused(&id, true);
            }
            if let Some(done) = done.upgrade() {
                let _ = done.send(Command::Stopped(id, stored)).await;
            }
        });
    }

    pub(super) async fn stopped(&mut self, id: &str, stored: Result<u64, LogError>) {
        // one that was resumed meanwhile runs again
        if !matches!(self.running.get(id), Some(Running { phase: Phase::Stopping, .. })) {
            return;
        }
        if self.is_lost(id) {
            return self.leave(id);
        }
        let Some(Running { control, .. }) = self.running.remove(id) else { return };
        let draining = self.shared.is_draining();
        match stored {
            Ok(seq) => {
                self.shared.set_paused(id, true);
                self.shared.notify(id, seq);
                if control.ask() == Ask::Cancel {
                    self.terminal(id, JobState::Cancelled, None, None).await;
                } else if draining {
                    self.shared.forget(id);
                }
            }
            // what was stored before is still there for the next start
            Err(error) if draining => {
                tracing::error!(job = id, %error, "a job's checkpoint could not be stored");
                self.shared.forget(id);
            }
            Err(_) if control.ask() == Ask::Cancel => self.terminal(id, JobState::Cancelled, None, None).await,
            // its end would take the checkpoint before with it
            Err(error) if matches!(self.shared.log.checkpoint(id).await, Ok(Some(_))) => {
                let message =
                    format!("the last checkpoint could not be stored; the job goes on from the one before: {error}");
                let note = NoteEvent { code: "CHECKPOINT_LOST".into(), message };
                self.append(id, JobEventBody::Warning(note)).await;
                self.append(id, state(JobState::Paused)).await;
                self.shared.set_paused(id, true);
            }
            Err(error) => {
                let message = format!("the job could not be paused: {error}");
                let failure = JobFailure { code: "CHECKPOINT_LOST".into(), message };
                self.terminal(id, JobState::Failed, None, Some(failure)).await;
            }
        }
    }

    pub(super) fn drain(&mut self, done: oneshot::Sender<()>) {
        self.shared.set_draining();
        // those that wait stay queued, and are prepared again at the next start
        self.queue.clear();
        self.running.retain(|_, job| !job.phase.is_loading());
        for job in self.running.values() {
            job.control.stop();
            self.hurry(job);
        }
        let running: Vec<String> = self.running.keys().cloned().collect();
        self.shared.forget_all_but(&running);
        self.drained = Some(done);
    }
}
