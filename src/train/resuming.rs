//! The trainer from outside: pausing jobs and letting them go on, after a pause or a restart.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{
    error::TrainError,
    handle::{Live, Shared, TrainerHandle},
    joblog::{KeptJob, LogError},
    plan::Prepared,
    run::RunInput,
    supervisor::{Command, Pending, Refusal},
    watch::JobWatch,
};
use crate::{
    admission::train_params::{JobEventBody, JobEventInfo, JobInfo, JobState, MethodPart},
    ids::{BlobId, TenantId},
    store::CheckpointRecord,
};

/// Longest wait for another server to pause a job.
const ELSEWHERE: Duration = Duration::from_secs(30);

/// A place in the queue for a job that is being prepared again.
#[derive(Debug)]
pub struct Place {
    permit: Option<OwnedSemaphorePermit>,
    id: String,
    /// It is paused until it is queued.
    resumes: bool,
    shared: Arc<Shared>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.permit.is_some() && self.resumes {
            self.shared.set_paused(&self.id, true);
        }
    }
}

impl Shared {
    /// The trainer thread has ended by itself: nothing is trained until the server is restarted.
    pub(crate) fn set_down(&self) {
        self.alive.send_replace(false);
        self.set_draining();
    }

    /// Why no job is taken any more.
    pub(crate) fn gone(&self) -> TrainError {
        self.check_alive().err().unwrap_or(TrainError::Draining)
    }

    pub(super) fn check_alive(&self) -> Result<(), TrainError> {
        if *self.alive.borrow() { Ok(()) } else { Err(TrainError::Down) }
    }

    /// Other jobs of a job's tenant that are paused or, as these, about to be; one that is both counts once.
    pub(crate) fn paused_beside(&self, id: &str, about: &[&String]) -> usize {
        let live = self.live.lock();
        let Some(own) = live.get(id) else { return 0 };
        let paused = |other: &String, job: &Live| job.paused || about.contains(&other);
        live.iter().filter(|(other, l)| *other != id && l.tenant == own.tenant && paused(other, l)).count()
    }
}

impl TrainerHandle {
    /// Pauses a job: at once if it waits, within a micro-step if it trains; what it goes on from is stored then. Returns the
    /// job when that is done, or when it has come to its end in the meantime.
    ///
    /// # Errors
    /// [`TrainError::State`] if it has ended or is being published, [`TrainError::FullRuns`], [`TrainError::Overloaded`] if its
    /// tenant has too many paused jobs, [`TrainError::NotFound`], or the log's.
    pub async fn pause(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, TrainError> {
        let job = self.get(tenant, id).await?;
        // from here on: whoever resumes it at once does not hide that it was paused
        let mut news = self.watch(tenant, id, job.last_seq + 1).await?;
        if self.pause_elsewhere(tenant, &job).await? {
            let paused = tokio::time::timeout(ELSEWHERE, self.until_paused(tenant, id, &mut news)).await;
            return paused.unwrap_or_else(|_| Err(TrainError::Elsewhere(id.to_owned())));
        }
        let (done, marked) = oneshot::channel();
        self.commands.send(Command::Pause(id.to_owned(), done)).await.map_err(|_| self.shared.gone())?;
        marked.await.map_err(|_| self.shared.gone())??;
        self.until_paused(tenant, id, &mut news).await
    }

    /// The job when it is paused or has come to its end.
    async fn until_paused(&self, tenant: &TenantId, id: &str, news: &mut JobWatch) -> Result<JobInfo, TrainError> {
        loop {
            let job = self.get(tenant, id).await?;
            if !matches!(job.state, JobState::Queued | JobState::Running) {
                return Ok(job);
            }
            match news.next().await? {
                Some(JobEventInfo { body: JobEventBody::State(s), .. }) if s.state == JobState::Paused => {
                    return self.get(tenant, id).await;
                }
                Some(_) => {}
                None => return self.get(tenant, id).await,
            }
        }
    }

    /// Jobs of an earlier process that are to be prepared again, oldest first; once.
    pub fn take_left(&self) -> Vec<(TenantId, String)> {
        std::mem::take(&mut self.shared.left.lock())
    }

    /// Says that a job of [`Self::take_left`] is about to be prepared: if that brings the server down, it is counted.
    ///
    /// # Errors
    /// The log's.
    pub async fn begin_try(&self, id: &str) -> Result<(), TrainError> {
        Ok(self.shared.log.begin_try(id).await?)
    }

    /// Says that preparing it came to an end, whichever.
    pub async fn end_try(&self, id: &str) {
        if let Err(error) = self.shared.log.end_try(id).await {
            tracing::warn!(job = id, %error, "the tries of a job could not be set back");
        }
    }

    /// What a job keeps to be prepared again.
    ///
    /// # Errors
    /// [`TrainError::NotFound`] (also for another tenant's), or the log's.
    pub async fn kept(&self, tenant: &TenantId, id: &str) -> Result<KeptJob, TrainError> {
        self.shared.log.kept(tenant, id).await?.ok_or_else(|| TrainError::NotFound(id.to_owned()))
    }

    /// What a job goes on from, if there is something.
    ///
    /// # Errors
    /// The log's.
    pub async fn checkpoint(&self, id: &str) -> Result<Option<CheckpointRecord>, TrainError> {
        Ok(self.shared.log.checkpoint(id).await?)
    }

    /// A stored blob, verified.
    ///
    /// # Errors
    /// The log's.
    pub async fn blob(&self, blob: BlobId) -> Result<Bytes, TrainError> {
        Ok(self.shared.log.blob(blob).await?)
    }

    /// A place for a paused job, before it is prepared again.
    ///
    /// # Errors
    /// [`TrainError::Overloaded`]; [`TrainError::State`] if it is not paused.
    pub fn place(&self, tenant: &TenantId, job: &JobInfo) -> Result<Place, TrainError> {
        if self.shared.is_draining() {
            return Err(self.shared.gone());
        }
        let wanted = "paused";
        if job.state != JobState::Paused {
            return Err(TrainError::State { id: job.id.clone(), state: job.state, wanted });
        }
        let most = self.config.max_jobs;
        let permit = Arc::clone(&self.room).try_acquire_owned();
        let full = || TrainError::Overloaded(format!("{most} training jobs are waiting or running; at most {most}"));
        let permit = permit.map_err(|_| full())?;
        let whole = job.resolved.methods.contains(&MethodPart::Full);
        self.shared.enter(&job.id, tenant, whole, self.config.jobs_of(tenant))?;
        Ok(Place { permit: Some(permit), id: job.id.clone(), resumes: true, shared: Arc::clone(&self.shared) })
    }

    /// A place for a job of [`Self::take_left`]; waits for one.
    ///
    /// # Errors
    /// [`TrainError::Draining`].
    pub async fn place_of_left(&self, id: &str) -> Result<Place, TrainError> {
        let permit = Arc::clone(&self.room).acquire_owned().await.map_err(|_| TrainError::Draining)?;
        Ok(Place { permit: Some(permit), id: id.to_owned(), resumes: false, shared: Arc::clone(&self.shared) })
    }

    /// Queues a job that was prepared again; `from` is its checkpoint: the step and the run's bytes.
    ///
    /// # Errors
    /// [`TrainError`].
    pub async fn go_on(
        &self,
        mut place: Place,
        tenant: &TenantId,
        kept: KeptJob,
        prepared: &Prepared,
        from: Option<(u32, Bytes)>,
    ) -> Result<JobInfo, TrainError> {
        let Some(permit) = place.permit.take() else { return Err(TrainError::Draining) };
        let mut input = RunInput::from(prepared);
        let shelved = input.shelve();
        let pending = Pending {
            id: kept.info.id.clone(),
            tenant: tenant.clone(),
            name: kept.request.output_name,
            policy: kept.request.publish,
            memory: prepared.spec.full.map(|_| prepared.reply.memory),
            input,
            shelved,
            from,
            resumes: place.resumes,
            permit,
        };
        let (this, resumes, id) = (self.clone(), place.resumes, kept.info.id.clone());
        // a task of its own: a client that hangs up cannot leave the job half queued
        let queued = tokio::spawn(async move {
            let (done, queued) = oneshot::channel();
            let sent = this.commands.send(Command::Enqueue(Box::new(pending), Some(done))).await;
            sent.map_err(|_| this.shared.gone())?;
            let queued = queued.await.unwrap_or_else(|_| Err(this.shared.gone()));
            if queued.is_err() && resumes {
                this.shared.set_paused(&id, true);
            }
            queued
        });
        queued.await.map_err(|e| TrainError::from(LogError::Runtime(e.to_string())))??;
        self.get(tenant, &kept.info.id).await
    }

    /// Ends a job of [`Self::take_left`] that cannot go on, or pauses it where another start may be right for it.
    pub async fn refuse(&self, id: &str, refusal: Refusal) {
        // nobody takes it while the server goes down: it is found again at the next start
        let _ = self.commands.send(Command::Refuse(id.to_owned(), refusal)).await;
    }
}
