//! The trainer from outside: create, cancel, get, list and watch jobs. Cheap to clone; it computes nothing.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::{
    admission::{
        params::{Quota, QuotaItem},
        train_params::{JobEventBody, JobInfo, JobState, MethodPart, StateEvent, TrainParams},
    },
    ids::{BlobId, TenantId},
    model::Base,
    pacing::Pacer,
    train::{
        error::{SpawnError, TrainError},
        joblog::{JobLog, LogError, NewJob, StoredJob},
        left::Left,
        limits::TrainerConfig,
        memory::{MemoryProbe, Shortage},
        plan::Prepared,
        run::RunInput,
        servers::Keeper,
        supervisor::{Command, Parts, Pending, Publisher, Supervisor},
        watch::JobWatch,
        worker,
    },
};

/// A job that is not over: what watchers wait for.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) seq: watch::Sender<u64>,
    step: u32,
    pub(super) tenant: TenantId,
    /// Trains every weight.
    full: bool,
    /// Waits for nothing: it counts as no job of its tenant.
    pub(super) paused: bool,
}

/// What handles and the supervisor share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) log: JobLog,
    pub(super) live: Mutex<HashMap<String, Live>>,
    draining: AtomicBool,
    /// False once the trainer thread has ended by itself.
    pub(super) alive: watch::Sender<bool>,
    /// Jobs of an earlier process that are to be prepared again.
    pub(super) left: Mutex<Vec<(TenantId, String)>>,
    /// Told when there are more of them.
    pub(super) more_left: Notify,
}

impl Shared {
    pub(crate) fn new(log: JobLog) -> Self {
        Self {
            log,
            live: Mutex::default(),
            draining: AtomicBool::new(false),
            alive: watch::Sender::new(true),
            left: Mutex::default(),
            more_left: Notify::new(),
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub(crate) fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn progress(&self, id: &str, step: u32) {
        if let Some(live) = self.live.lock().get_mut(id) {
            live.step = step;
        }
    }

    pub(crate) fn step(&self, id: &str) -> u32 {
        self.live.lock().get(id).map_or(0, |l| l.step)
    }

    pub(crate) fn notify(&self, id: &str, seq: u64) {
        if let Some(live) = self.live.lock().get(id) {
            live.tell(seq);
        }
    }

    pub(crate) fn forget(&self, id: &str) {
        self.live.lock().remove(id);
    }

    /// Drops all others: what they wait for comes at the next start.
    pub(crate) fn forget_all_but(&self, ids: &[String]) {
        self.live.lock().retain(|id, _| ids.contains(id));
    }

    pub(crate) fn set_paused(&self, id: &str, paused: bool) {
        if let Some(live) = self.live.lock().get_mut(id) {
            live.paused = paused;
        }
    }

    /// Paused jobs.
    pub(crate) fn paused(&self) -> usize {
        self.live.lock().values().filter(|l| l.paused).count()
    }

    /// Enters a job of an earlier process, which has its tenant's place already.
    pub(super) fn enter_left(&self, job: &StoredJob, left: Left) {
        let (step, paused) = match left {
            Left::Ended => return,
            Left::Waits(step) => (step, false),
            Left::Paused(step) => (step, true),
        };
        let full = job.info.resolved.methods.contains(&MethodPart::Full);
        let entry = Live { seq: watch::Sender::new(0), step, tenant: job.tenant.clone(), full, paused };
        self.live.lock().insert(job.info.id.clone(), entry);
        if !paused {
            self.left.lock().push((job.tenant.clone(), job.info.id.clone()));
            self.more_left.notify_one();
        }
    }

    pub(super) fn subscribe(&self, id: &str) -> Option<watch::Receiver<u64>> {
        self.live.lock().get(id).map(|l| l.seq.subscribe())
    }

    /// Whether a job that trains every weight waits or runs.
    fn full_jobs(&self) -> bool {
        self.live.lock().values().any(|l| l.full && !l.paused)
    }

    /// Enters a job, a new one or a paused one, unless its tenant has too many.
    pub(super) fn enter(
        &self,
        id: &str,
        tenant: &TenantId,
        full: bool,
        (most, quota): (usize, Quota),
    ) -> Result<(), TrainError> {
        let mut live = self.live.lock();
        let own = live.values().filter(|l| l.tenant == *tenant && !l.paused).count();
        quota.check(QuotaItem::TrainJobs, own as u64, 1).map_err(TrainError::Quota)?;
        if own >= most {
            return Err(TrainError::Overloaded(format!(
                "{own} jobs of this tenant are waiting or running; at most {most}"
            )));
        }
        if let Some(known) = live.get_mut(id) {
            if !known.paused {
                // somebody else resumes it at this moment
                return Err(TrainError::State { id: id.to_owned(), state: JobState::Queued, wanted: "paused" });
            }
            known.paused = false;
            return Ok(());
        }
        let entry = Live { seq: watch::Sender::new(0), step: 0, tenant: tenant.clone(), full, paused: false };
        live.insert(id.to_owned(), entry);
        Ok(())
    }
}

/// What a job keeps beside its request, to be prepared again.
#[derive(Debug, Clone, Default)]
pub struct Kept {
    /// Fingerprint of its base.
    pub base: String,
    /// Blobs of the datasets that the request names, by their place in it.
    pub blobs: Vec<(String, BlobId)>,
}

/// What the trainer is made of.
pub struct TrainerParts {
    /// The resident weights.
    pub base: Arc<Base>,
    /// Shared with the engine.
    pub pacer: Arc<Pacer>,
    /// Where jobs are kept.
    pub log: JobLog,
    /// Makes versions of finished deltas.
    pub publisher: Publisher,
    /// What full fine-tuning may take.
    pub memory: MemoryProbe,
}

/// The trainer.
#[derive(Debug, Clone)]
pub struct TrainerHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) room: Arc<Semaphore>,
    memory: MemoryProbe,
    pub(super) config: TrainerConfig,
}

impl TrainerHandle {
    /// Takes over the jobs that an earlier process left behind (those that had published succeed, those with nothing to go
    /// on from end, others are to be prepared again: [`Self::take_left`]) and removes models that no job made, then starts
    /// the trainer thread and its supervisor on this runtime. The thread ends after [`Self::drain`] or the last handle.
    ///
    /// # Errors
    /// The log's, or no thread.
    pub async fn spawn(parts: TrainerParts, config: TrainerConfig) -> Result<(Self, JoinHandle<()>), SpawnError> {
        let TrainerParts { base, pacer, log, publisher, memory } = parts;
        let shared = Arc::new(Shared::new(log));
        let fingerprint = base.fingerprint.to_string();
        shared.claim_left(&fingerprint, config.takes_over).await?;
        shared.log.sweep_models().await?;
        let max_running = config.max_concurrent_jobs.max(1);
        let (starts, starting) = std::sync::mpsc::sync_channel(max_running);
        let (report, reports) = mpsc::channel(256);
        let (commands, commanded) = mpsc::channel(64);
        let thread = worker::spawn((base, Arc::clone(&pacer)), config.clone(), starting, report)?;
        let supervisor = Supervisor::new(Parts {
            shared: Arc::clone(&shared),
            publisher,
            memory: memory.clone(),
            pacer,
            max_running,
            weights: Arc::clone(&config.weights),
            max_paused: config.max_paused_per_tenant,
            starts,
            commands: commanded,
            to_self: commands.downgrade(),
            reports,
        });
        tokio::spawn(supervisor.run());
        if shared.log.is_shared() {
            let (shared, commands) = (Arc::clone(&shared), commands.downgrade());
            let keeper = Keeper { shared, commands, base: fingerprint, takes_over: config.takes_over };
            tokio::spawn(keeper.run());
        }
        let room = Arc::new(Semaphore::new(config.max_jobs.max(1)));
        Ok((Self { shared, commands, room, memory, config }, thread))
    }

    /// Enqueues a prepared job; with an idempotency key that was used for the same request, returns that job.
    ///
    /// # Errors
    /// [`TrainError`].
    pub async fn create(
        &self,
        tenant: &TenantId,
        params: &TrainParams,
        prepared: &Prepared,
        kept: Kept,
    ) -> Result<JobInfo, TrainError> {
        if self.shared.is_draining() {
            return Err(self.shared.gone());
        }
        let id = uuid::Uuid::now_v7().to_string();
        let most = self.config.jobs_of(tenant);
        let entered = match Arc::clone(&self.room).try_acquire_owned() {
            Ok(permit) => self.shared.enter(&id, tenant, prepared.spec.full.is_some(), most).map(|()| permit),
            Err(_) => {
                let most = self.config.max_jobs;
                Err(TrainError::Overloaded(format!("{most} training jobs are waiting or running; at most {most}")))
            }
        };
        let permit = match entered {
            Ok(permit) => permit,
            // a retry asks for no place: its job has one already
            Err(full) => return self.made_before(tenant, params).await?.ok_or(full),
        };
        let (this, tenant) = (self.clone(), tenant.clone());
        let (params, prepared) = (params.clone(), prepared.clone());
        // a task of its own: a client that hangs up cannot leave a job half made
        let made = tokio::spawn(async move { this.make(id, tenant, (params, prepared, kept), permit).await });
        made.await.unwrap_or_else(|e| Err(LogError::Runtime(e.to_string()).into()))
    }

    /// The job that this very request made earlier with its idempotency key, whatever has become of its data since.
    ///
    /// # Errors
    /// [`LogError::IdempotencyConflict`] for another request, or the log's.
    pub async fn made_before(&self, tenant: &TenantId, params: &TrainParams) -> Result<Option<JobInfo>, TrainError> {
        let Some(key) = &params.idempotency_key else { return Ok(None) };
        let found = self.shared.log.made_with(tenant, key, &request_digest(params)?).await?;
        Ok(found.map(|job| job.info))
    }

    /// Makes a prepared job fit into the memory of this moment ([`Prepared::fit`]), and says whether it will have it. One
    /// that trains every weight needs what is available now, unless another such job waits or runs: it will start after
    /// that, and is asked again then. A delta is not asked, but the candidates of a sweep must not need more than there is in all.
    ///
    /// # Errors
    /// [`TrainError::Memory`].
    pub fn fit(&self, prepared: &mut Prepared) -> Result<(), TrainError> {
        let now = self.memory.now();
        if let Some(room) = now.room() {
            prepared.fit(room);
        }
        if prepared.spec.full.is_none() {
            return match now.total.filter(|total| prepared.reply.memory.total() > *total) {
                Some(total) if !prepared.candidates.is_empty() => {
                    let (n, need) = (prepared.candidates.len(), prepared.reply.memory.total());
                    let message = format!("the {n} candidates of the sweep need about {need} bytes, of {total} in all");
                    Err(TrainError::Memory(Shortage { message, lasting: true }))
                }
                _ => Ok(()),
            };
        }
        Ok(now.check(&prepared.reply.memory, self.shared.full_jobs())?)
    }

    async fn make(
        &self,
        id: String,
        tenant: TenantId,
        (params, prepared, kept): (TrainParams, Prepared, Kept),
        permit: OwnedSemaphorePermit,
    ) -> Result<JobInfo, TrainError> {
        let new = NewJob {
            id: id.clone(),
            tenant: tenant.clone(),
            output_name: params.output_name.clone(),
            request_json: serde_json::to_string(&params).map_err(|e| LogError::Runtime(e.to_string()))?,
            resolved: prepared.reply.resolved.clone(),
            idempotency_key: params.idempotency_key.clone(),
            request_digest: request_digest(&params)?,
            base: kept.base,
            blobs: kept.blobs,
        };
        let job = match self.shared.log.create(new).await {
            Ok((job, true)) => job,
            Ok((job, false)) => {
                self.shared.forget(&id);
                return Ok(job.info);
            }
            Err(e) => {
                self.shared.forget(&id);
                return Err(e.into());
            }
        };
        let queued = JobEventBody::State(StateEvent { state: JobState::Queued, result: None, failure: None });
        let seq = match self.shared.log.append(&id, 0, queued).await {
            Ok(seq) => seq,
            Err(e) => {
                self.shared.forget(&id); // found unfinished at the next start
                return Err(e.into());
            }
        };
        self.shared.notify(&id, seq);
        let mut input = RunInput::from(&prepared);
        let shelved = input.shelve();
        let memory = prepared.spec.full.map(|_| prepared.reply.memory);
        let (name, policy) = (params.output_name, params.publish);
        let pending = Pending { id, name, policy, tenant, memory, input, shelved, from: None, resumes: false, permit };
        drop(prepared); // also the deltas that it mixes
        let sent = self.commands.send(Command::Enqueue(Box::new(pending), None)).await;
        sent.map_err(|_| self.shared.gone())?;
        Ok(JobInfo { last_seq: seq, ..job.info })
    }

    /// Jobs that are queued, running or publishing.
    pub fn unfinished(&self) -> usize {
        self.shared.live.lock().values().filter(|l| !l.paused).count()
    }

    /// False from when the trainer thread has ended by itself: nothing is trained until the server is restarted.
    pub fn alive(&self) -> watch::Receiver<bool> {
        self.shared.alive.subscribe()
    }

    /// Ends a job: at once if it waits, within a micro-step if it trains, not at all if it is being published. Returns
    /// the job as it is then; its terminal event follows.
    ///
    /// # Errors
    /// [`TrainError::NotFound`], [`TrainError::Down`], or the log's.
    pub async fn cancel(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, TrainError> {
        let job = self.get(tenant, id).await?;
        if job.state.is_terminal() {
            return Ok(job);
        }
        if self.cancel_elsewhere(tenant, id).await? {
            return self.get(tenant, id).await;
        }
        self.shared.check_alive()?; // asked first: where nothing trains, no cancel is half taken
        let (done, marked) = oneshot::channel();
        if self.commands.send(Command::Cancel(id.to_owned(), done)).await.is_ok() {
            let _ = marked.await;
        }
        self.shared.check_alive()?;
        self.get(tenant, id).await
    }

    /// A job.
    ///
    /// # Errors
    /// [`TrainError::NotFound`] (also for another tenant's), or the log's.
    pub async fn get(&self, tenant: &TenantId, id: &str) -> Result<JobInfo, TrainError> {
        let mut job = self.shared.log.get(tenant, id).await?.ok_or_else(|| TrainError::NotFound(id.to_owned()))?;
        job.step = job.step.max(self.shared.step(id));
        Ok(job)
    }

    /// A tenant's jobs, newest first; and the token of the next page.
    ///
    /// # Errors
    /// The log's.
    pub async fn list(
        &self,
        tenant: &TenantId,
        token: Option<&str>,
        limit: u32,
        state: Option<JobState>,
    ) -> Result<(Vec<JobInfo>, Option<String>), TrainError> {
        let (mut jobs, next) = self.shared.log.list(tenant, token, limit, state).await?;
        jobs.iter_mut().for_each(|j| j.step = j.step.max(self.shared.step(&j.id)));
        Ok((jobs, next))
    }

    /// Events from a number on (0 and 1: all), live until the terminal one.
    ///
    /// # Errors
    /// [`TrainError::NotFound`], or the log's.
    pub async fn watch(&self, tenant: &TenantId, id: &str, from_seq: u64) -> Result<JobWatch, TrainError> {
        // subscribe first, then read: what is written in between wakes the watcher
        let news = self.shared.subscribe(id);
        self.get(tenant, id).await?;
        let (shared, id) = (Arc::clone(&self.shared), id.to_owned());
        Ok(JobWatch { shared, id, next: from_seq.max(1), ready: VecDeque::new(), news, ended: false, over: false })
    }

    /// Stops taking jobs, stops what runs, to go on at the next start, and waits until all of it is written, at most `grace`.
    pub async fn drain(&self, grace: Duration) {
        self.shared.set_draining();
        let (done, drained) = oneshot::channel();
        if self.commands.send(Command::Drain(done)).await.is_ok() && tokio::time::timeout(grace, drained).await.is_err()
        {
            tracing::warn!("training jobs were still running when the grace time was over");
        }
    }
}

/// What "the same request" means for an idempotency key: the request as it came. What its names stand for may change.
fn request_digest(params: &TrainParams) -> Result<String, LogError> {
    let request = serde_json::to_vec(&TrainParams { idempotency_key: None, ..params.clone() });
    Ok(hex::encode(Sha256::digest(request.map_err(|e| LogError::Runtime(e.to_string()))?)))
}
