//! Jobs among servers that share a store: this server's lease is renewed, jobs of servers that are gone are taken over, and
//! what others were asked to do with this server's jobs is done. A server whose lease may have run out stops its jobs by
//! itself: another one may run them already.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    error::TrainError,
    handle::{Shared, TrainerHandle},
    joblog::LogError,
    left::take_over,
    supervisor::Command,
};
use crate::{
    admission::train_params::{JobInfo, JobState},
    ids::TenantId,
    store::{JobAsk, LEASE, RENEW},
};

/// Longest wait for an answer to a renewal.
const ANSWER: Duration = Duration::from_secs(2);
/// Without a renewal for so long, jobs are stopped: before the lease runs out, whenever that is noticed.
const STOP: Duration = LEASE.saturating_sub(RENEW.saturating_mul(2));

/// Keeps this server's lease, for as long as there is a handle of its trainer.
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) commands: mpsc::WeakSender<Command>,
    /// Fingerprint of the base.
    pub(super) base: String,
    /// Whether jobs of other servers are taken over.
    pub(super) takes_over: bool,
}

impl Keeper {
    /// Returns when the trainer is gone, the store is closed, or another process has taken this server's place.
    pub(super) async fn run(self) {
        let (mut renewed, mut stopped) = (Instant::now(), false);
        loop {
            tokio::time::sleep(RENEW).await;
            let Some(commands) = self.commands.upgrade() else { return };
            if self.shared.log.is_closed() {
                return;
            }
            // counted from before the question: the lease runs from some time after that
            let asked = Instant::now();
            match tokio::time::timeout(ANSWER, self.shared.log.renew_lease()).await {
                Ok(Ok(true)) => {
                    if stopped {
                        tracing::info!("the lease on training jobs is renewed: they go on where nobody has them");
                    }
                    (renewed, stopped) = (asked, false);
                }
                Ok(Ok(false)) => {
                    tracing::error!("another process has taken this server's place; it trains no more");
                    self.shared.set_down();
                    let _ = commands.send(Command::Fence).await;
                    return;
                }
                failed => {
                    tracing::warn!(?failed, "the lease on training jobs could not be renewed");
                    if !stopped && renewed.elapsed() >= STOP {
                        tracing::error!("the lease on training jobs runs out: they are stopped here");
                        stopped = commands.send(Command::Fence).await.is_ok();
                    }
                    continue;
                }
            }
            if !self.shared.is_draining()
                && let Err(error) = self.follow(&commands).await
            {
                tracing::warn!(%error, "jobs of other servers could not be looked at");
            }
        }
    }

    async fn follow(&self, commands: &mpsc::Sender<Command>) -> Result<(), LogError> {
        let log = &self.shared.log;
        if self.takes_over {
            self.shared.claim_left(&self.base, true).await?;
        }
        self.shared.forget_paused_but(&log.owned().await?);
        for (id, ask) in log.take_asks().await? {
            let command = match ask {
                JobAsk::Cancel => Command::Cancel(id, oneshot::channel().0),
                JobAsk::Pause => Command::Pause(id, oneshot::channel().0),
            };
            let _ = commands.send(command).await;
        }
        Ok(())
    }
}

impl Shared {
    /// Jobs that are not over, as this server knows them.
    fn live_ids(&self) -> BTreeSet<String> {
        self.live.lock().keys().cloned().collect()
    }

    /// Takes over the jobs that were left behind: by an earlier process of this server, or by one that is gone.
    pub(super) async fn claim_left(&self, base: &str, takes_over: bool) -> Result<(), LogError> {
        if !takes_over && self.log.is_shared() {
            return Ok(()); // they are for servers that train
        }
        // it may have run out while the store was verified, and what is taken now must not be taken back
        self.log.renew_lease().await?;
        for job in self.log.claim(base, &self.live_ids()).await? {
            // one that is being made was entered before its row was written
            if !self.knows(&job.info.id) {
                let left = take_over(&self.log, &job).await?;
                self.enter_left(&job, left);
            }
        }
        Ok(())
    }

    pub(crate) fn knows(&self, id: &str) -> bool {
        self.live.lock().contains_key(id)
    }

    /// Drops paused jobs that are no longer this server's.
    fn forget_paused_but(&self, owned: &BTreeSet<String>) {
        self.live.lock().retain(|id, job| !job.paused || owned.contains(id));
    }

    /// Whether another server has this job. One that this server knows may have been taken a moment ago.
    async fn is_elsewhere(&self, id: &str) -> Result<bool, LogError> {
        if !self.log.is_shared() {
            return Ok(false);
        }
        let owned = self.log.owns(id).await?;
        if !owned {
            self.forget(id);
        }
        Ok(!owned || !self.knows(id))
    }
}

impl TrainerHandle {
    /// Waits until there are more jobs for [`Self::take_left`]; for ever, where no other server can leave any.
    pub async fn more_left(&self) {
        self.shared.more_left.notified().await;
    }

    /// Hands a cancel on to the server that has the job, if that is another one: whether it did.
    pub(super) async fn cancel_elsewhere(&self, tenant: &TenantId, id: &str) -> Result<bool, TrainError> {
        let elsewhere = self.shared.is_elsewhere(id).await?;
        if elsewhere {
            self.shared.log.ask(tenant, id, JobAsk::Cancel).await?;
        }
        Ok(elsewhere)
    }

    /// Hands a pause on to the server that has the job, if that is another one: whether it did.
    pub(super) async fn pause_elsewhere(&self, tenant: &TenantId, job: &JobInfo) -> Result<bool, TrainError> {
        if !self.shared.is_elsewhere(&job.id).await? {
            return Ok(false);
        }
        let full = job.resolved.methods.contains(&crate::admission::train_params::MethodPart::Full);
        match job.state {
            JobState::Paused => {}
            JobState::Queued => self.shared.log.ask(tenant, &job.id, JobAsk::Pause).await?,
            JobState::Running if full => return Err(TrainError::FullRuns(job.id.clone())),
            JobState::Running => self.shared.log.ask(tenant, &job.id, JobAsk::Pause).await?,
            state => return Err(TrainError::State { id: job.id.clone(), state, wanted: "queued or running" }),
        }
        Ok(true)
    }

    /// Takes a paused job over that another server has paused, before it is resumed here.
    ///
    /// # Errors
    /// The log's.
    pub async fn claim_paused(&self, job: &JobInfo) -> Result<(), TrainError> {
        if job.state == JobState::Paused && self.shared.is_elsewhere(&job.id).await? {
            self.shared.log.claim_paused(&job.id).await?;
        }
        Ok(())
    }
}
