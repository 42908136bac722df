//! Jobs whose turn it is: which one, what stands against it, and what is loaded for it first.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures::FutureExt as _;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Command, Control, JobEventBody, JobFailure, JobState, Pending, Phase, Refusal, Running, Start, Supervisor,
    publish_info, state,
};
use crate::{
    admission::train_params::ResumedEvent,
    ids::TenantId,
    store::StoreError,
    train::{
        beginning::{Beginning, Shelved},
        memory::Shortage,
    },
};

impl Supervisor {
    /// The place in the queue of the job to start: of the tenant with the fewest running jobs, by its weight, then of the one
    /// whose turn it is, then the oldest. A
    /// job that trains every weight waits while another does, and while anything runs that it has no room beside.
    fn next(&self) -> Option<usize> {
        let full_runs = self.running.values().any(|r| r.full);
        let has_room = |job: &Pending| match &job.memory {
            Some(need) => !full_runs && (self.running.is_empty() || self.memory.now().check(need, false).is_ok()),
            None => true,
        };
        // small jobs may pass one that waits for memory, but those that begin anew must not keep it waiting for ever
        let passed = !full_runs && !self.running.is_empty() && self.running.values().all(|r| r.overtook);
        let waits = |job: &Pending| job.memory.is_some() && !has_room(job);
        let most = passed.then(|| self.queue.iter().position(waits)).flatten().unwrap_or(self.queue.len());
        let load = |tenant: &TenantId| self.running.values().filter(|r| r.tenant == *tenant).count();
        let jobs = self.queue.iter().enumerate().take(most).filter(|(_, job)| has_room(job));
        jobs.min_by_key(|(i, job)| (self.turns.place(&job.tenant, load(&job.tenant)), *i)).map(|(i, _)| i)
    }

    /// What stands against a job whose turn it is. Of one that trains every weight: memory that is not there though
    /// nothing else runs (other processes have it), and a disk that could not take its model in the end.
    fn obstacle(&self, job: &Pending) -> Option<JobFailure> {
        let need = job.memory?;
        // beside others it was asked a moment ago, and a job that waits does not fail
        if self.running.is_empty()
            && let Err(Shortage { message, .. }) = self.memory.now().check(&need, false)
        {
            return Some(JobFailure { code: "NOT_ENOUGH_MEMORY".into(), message });
        }
        let numbers = job.input.spec.full.unwrap_or(0);
        match self.shared.log.models().check_room(numbers.saturating_mul(size_of::<f32>() as u64)) {
            Err(e @ StoreError::DiskFull { .. }) => {
                Some(JobFailure { code: "DISK_FULL".into(), message: format!("the model would have no room: {e}") })
            }
            Err(e) => {
                tracing::warn!(job = job.id, error = %e, "the disk's free space is not known");
                None
            }
            Ok(()) => None,
        }
    }

    /// Starts what fits.
    pub(super) async fn start_waiting(&mut self) {
        while self.running.len() < self.max_running && !self.shared.is_draining() {
            let Some(at) = self.next() else { return };
            let overtook = self.queue.iter().take(at).any(|job| job.memory.is_some());
            let Some(job) = self.queue.remove(at) else { return };
            if let Some(failure) = self.obstacle(&job) {
                self.terminal(&job.id, JobState::Failed, None, Some(failure)).await;
                continue;
            }
            self.turns.starts(&job.tenant, self.queue.iter().map(|j| &j.tenant));
            let slot = (0..).find(|s| self.running.values().all(|r| r.slot != *s)).unwrap_or(0);
            let control = Arc::new(Control::default());
            let (step, from) = job.from.unzip();
            let start = Start { id: job.id.clone(), input: job.input, from, control: Arc::clone(&control), slot };
            let running = |phase| Running {
                info: publish_info(&start.input),
                full: job.memory.is_some(),
                overtook,
                tenant: job.tenant,
                name: job.name,
                policy: job.policy,
                slot,
                control,
                phase,
                _permit: job.permit,
            };
            match job.shelved {
                Some(shelved) => {
                    let mut running = running(Phase::Training);
                    let _task = self.load(&job.id, shelved);
                    running.phase = Phase::Loading { start: Box::new(start), step, _task };
                    self.running.insert(job.id, running);
                }
                None => {
                    self.running.insert(job.id, running(Phase::Training));
                    self.begin(start, step).await;
                }
            }
        }
    }

    /// Gives a job that has its place to the trainer thread.
    async fn begin(&mut self, start: Start, step: Option<u32>) {
        let id = start.id.clone();
        crate::failpoint!("job-before-start");
        self.append(&id, state(JobState::Running)).await;
        if let Some(step) = step {
            self.append(&id, JobEventBody::Resumed(ResumedEvent { step })).await;
        }
        // holds as many as may run at a time, so it is never full
        let sent = self.starts.as_ref().is_some_and(|s| s.try_send(start).is_ok());
        if !sent {
            self.running.remove(&id);
            let failure = JobFailure { code: "INTERNAL".into(), message: "the trainer thread has ended".into() };
            self.terminal(&id, JobState::Failed, None, Some(failure)).await;
        }
    }

    /// Loads what a job had let go of, on a task of its own: a slow disk delays no job that runs. The job takes a place among
    /// those meanwhile, and loads in turn with merges.
    fn load(&self, id: &str, shelved: Shelved) -> AbortOnDropHandle<()> {
        let (id, done) = (id.to_owned(), self.to_self.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let loaded = AssertUnwindSafe(shelved.load()).catch_unwind().await;
            let loaded = loaded.unwrap_or_else(|_| Err("loading them panicked".to_owned()));
            if let Some(done) = done.upgrade() {
                let _ = done.send(Command::Loaded(id, loaded.map(Box::new))).await;
            }
        }))
    }

    pub(super) async fn loaded(&mut self, id: &str, loaded: Result<Box<Beginning>, String>) {
        // cancelled or paused meanwhile, or left for the next start
        let Some(job) = self.running.get_mut(id).filter(|job| job.phase.is_loading()) else { return };
        match loaded {
            Ok(beginning) => {
                let Phase::Loading { mut start, step, .. } = std::mem::replace(&mut job.phase, Phase::Training) else {
                    return;
                };
                start.input.start = Some(*beginning);
                self.begin(*start, step).await;
            }
            Err(why) => {
                let message = format!("what the job starts from could not be loaded when its turn came: {why}");
                // one with a checkpoint has something to lose: it waits to be resumed
                if matches!(job.phase, Phase::Loading { step: Some(_), .. }) {
                    return self.refuse(id, Refusal::Pauses(message)).await;
                }
                self.running.remove(id);
                let failure = JobFailure { code: "CANNOT_START".into(), message };
                self.terminal(id, JobState::Failed, None, Some(failure)).await;
            }
        }
    }
}

impl Phase {
    /// Whether it waits for what it starts from.
    pub(super) fn is_loading(&self) -> bool {
        matches!(self, Self::Loading { .. })
    }
}
