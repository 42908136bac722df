//! The supervisor: one task that owns the queue and every job's state, writes every event, and publishes.
//!
//! All state changes of a job go through here, one after the other, so each job gets exactly one terminal state. It never
//! waits for the trainer thread and never computes.

mod pauses;
mod publishing;

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::{
    admission::{
        params::PublishPolicy,
        train_params::{
            EvalEvent, JobEventBody, JobFailure, JobResult, JobState, MemoryEstimate, ModelResult, ResumedEvent,
            StateEvent,
        },
    },
    delta::Delta,
    ids::{DeltaId, TenantId},
    model::ModelFolder,
    store::StoreError,
    train::{
        control::{Ask, Control},
        handle::{Live, Shared, TrainError},
        joblog::LogError,
        memory::{MemoryProbe, Shortage},
        metrics::JobGauges,
        run::RunInput,
        worker::{End, Report, Start},
    },
};

/// A finished job's delta, to be made a version.
#[derive(Debug)]
pub struct PublishJob {
    /// Which job.
    pub job: String,
    /// Whose.
    pub tenant: TenantId,
    /// Under which name.
    pub name: String,
    /// What may happen to an existing name.
    pub policy: PublishPolicy,
    /// Plain f32 tensors.
    pub delta: Delta,
    /// A whole model, to be kept instead of the delta.
    pub model: Option<ModelFolder>,
    /// How it was trained, for the version's files.
    pub input: PublishInfo,
}

/// What the files say about how a delta was trained.
#[derive(Debug, Clone, Copy, Default)]
pub struct PublishInfo {
    /// Scales are alpha / sqrt(rank).
    pub rslora: bool,
    /// LoRA dropout.
    pub dropout: f64,
}

/// What a publish made.
#[derive(Debug, Clone)]
pub enum Published {
    /// A version.
    Version {
        /// Number under the name.
        number: u64,
        /// Digest.
        id: DeltaId,
    },
    /// A model's folder.
    Model(ModelResult),
}

/// Why a publish failed.
#[derive(Debug, Clone)]
pub struct PublishFailure {
    /// Stable code.
    pub code: String,
    /// What happened.
    pub message: String,
}

/// Encodes a delta and makes it a version, all or nothing. Given by the composition root, so that training knows neither
/// file formats nor the registry.
pub type Publisher = Arc<dyn Fn(PublishJob) -> BoxFuture<'static, Result<Published, PublishFailure>> + Send + Sync>;

/// A job that waits.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) id: String,
    pub(crate) tenant: TenantId,
    pub(crate) name: String,
    pub(crate) policy: PublishPolicy,
    /// What it needs, if it trains every weight.
    pub(crate) memory: Option<MemoryEstimate>,
    pub(crate) input: RunInput,
    /// What it goes on from: the step and the run's bytes.
    pub(crate) from: Option<(u32, Bytes)>,
    /// It is paused, and to go on.
    pub(crate) resumes: bool,
    pub(crate) permit: OwnedSemaphorePermit,
}

/// What handles ask for.
#[derive(Debug)]
pub(crate) enum Command {
    /// Answered, if asked, once it waits for its turn.
    Enqueue(Box<Pending>, Option<oneshot::Sender<Result<(), TrainError>>>),
    /// Answered once the job is marked; it ends within a micro-step.
    Cancel(String, oneshot::Sender<()>),
    /// Answered once the job is marked, or paused if it had not begun.
    Pause(String, oneshot::Sender<Result<(), TrainError>>),
    /// A job of an earlier process that cannot go on.
    Refuse(String, Refusal),
    Published(String, Result<Published, PublishFailure>),
    /// A job's last checkpoint is stored, and it has left the trainer.
    Stopped(String, Result<u64, LogError>),
    /// No more starts; running jobs stop where they are, to go on at the next start; answered when none is left.
    Drain(oneshot::Sender<()>),
}

/// What becomes of a job that cannot go on.
#[derive(Debug)]
pub enum Refusal {
    /// It has failed.
    Fails(JobFailure),
    /// It is paused: another start of the server may be right for it.
    Pauses(String),
}

/// A job on the trainer thread or being published.
struct Running {
    tenant: TenantId,
    name: String,
    policy: PublishPolicy,
    info: PublishInfo,
    /// Trains every weight.
    full: bool,
    /// It began while a job that trains every weight had waited for longer.
    overtook: bool,
    slot: usize,
    control: Arc<Control>,
    phase: Phase,
    _permit: OwnedSemaphorePermit,
}

enum Phase {
    Training,
    /// It has left the thread; its checkpoint is being written.
    Stopping,
    Publishing {
        final_loss: f64,
        best_eval: Option<Box<EvalEvent>>,
        checkpoint: Option<Bytes>,
    },
}

pub(crate) struct Supervisor {
    pub(crate) shared: Arc<Shared>,
    pub(crate) publisher: Publisher,
    pub(crate) memory: MemoryProbe,
    pub(crate) max_running: usize,
    pub(crate) max_paused: usize,
    pub(crate) starts: Option<SyncSender<Start>>,
    pub(crate) commands: mpsc::Receiver<Command>,
    /// For the tasks that publish.
    pub(crate) to_self: mpsc::WeakSender<Command>,
    pub(crate) reports: mpsc::Receiver<Report>,
    queue: VecDeque<Pending>,
    running: HashMap<String, Running>,
    gauges: JobGauges,
    drained: Option<oneshot::Sender<()>>,
}

/// The channels and parts of a supervisor.
pub(crate) struct Parts {
    pub(crate) shared: Arc<Shared>,
    pub(crate) publisher: Publisher,
    pub(crate) memory: MemoryProbe,
    pub(crate) max_running: usize,
    /// Of one tenant.
    pub(crate) max_paused: usize,
    pub(crate) starts: SyncSender<Start>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) to_self: mpsc::WeakSender<Command>,
    pub(crate) reports: mpsc::Receiver<Report>,
}

impl Supervisor {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { shared, publisher, memory, max_running, max_paused, starts, commands, to_self, reports } = parts;
        Self {
            shared,
            publisher,
            memory,
            max_running,
            max_paused,
            starts: Some(starts),
            commands,
            to_self,
            reports,
            queue: VecDeque::new(),
            running: HashMap::new(),
            gauges: JobGauges::new(),
            drained: None,
        }
    }

    pub(crate) async fn run(mut self) {
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return, // every handle is gone
                },
                report = self.reports.recv() => match report {
                    Some(report) => self.report(report).await,
                    None => return self.trainer_died(),
                },
            }
            self.start_waiting().await;
            let publishing = self.running.values().filter(|r| matches!(r.phase, Phase::Publishing { .. })).count();
            self.gauges.set(self.queue.len(), self.running.len() - publishing, publishing, self.shared.paused());
            if self.running.is_empty()
                && let Some(done) = self.drained.take()
            {
                self.starts = None; // the trainer thread ends
                let _ = done.send(());
            }
        }
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Enqueue(job, done) => {
                let id = job.id.clone();
                let result = self.enqueue(*job).await;
                match done {
                    Some(done) => drop(done.send(result)),
                    None => result.unwrap_or_else(|e| tracing::warn!(job = id, error = %e, "a job was not queued")),
                }
            }
            Command::Cancel(id, done) => {
                self.cancel(&id).await;
                let _ = done.send(());
            }
            Command::Pause(id, done) => {
                let _ = done.send(self.pause_asked(&id).await);
            }
            Command::Refuse(id, failure) => self.refuse(&id, failure).await,
            Command::Published(id, result) => self.published(&id, result).await,
            Command::Stopped(id, result) => self.stopped(&id, result).await,
            Command::Drain(done) => self.drain(done),
        }
    }

    async fn report(&mut self, report: Report) {
        match report {
            Report::Event(id, body) => {
                match body.as_ref() {
                    JobEventBody::Metrics(m) => self.shared.progress(&id, m.step),
                    JobEventBody::Eval(e) => self.shared.progress(&id, e.step),
                    _ => {}
                }
                self.append(&id, *body).await;
            }
            Report::Saved(id, saved) => self.save(&id, *saved),
            Report::Ended(id, end) => match *end {
                End::Trained(trained) => self.publish(&id, *trained).await,
                End::Failed(failed) => self.failed(&id, failed).await,
                End::Paused(saved) => self.stop(&id, saved),
                End::Cancelled => {
                    // of a whole model nothing is kept to go on from
                    let stopped = self.running.remove(&id).is_some_and(|job| job.control.ask() == Ask::Stop);
                    if stopped {
                        let failure = interrupted("the server shut down");
                        self.terminal(&id, JobState::Interrupted, None, Some(failure)).await;
                    } else {
                        self.terminal(&id, JobState::Cancelled, None, None).await;
                    }
                }
            },
        }
    }

    /// The place in the queue of the job to start: of the tenant with the fewest running jobs, the oldest among equals. A
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
        jobs.min_by_key(|(i, job)| (load(&job.tenant), *i)).map(|(i, _)| i)
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
    async fn start_waiting(&mut self) {
        while self.running.len() < self.max_running && !self.shared.is_draining() {
            let Some(at) = self.next() else { return };
            let overtook = self.queue.iter().take(at).any(|job| job.memory.is_some());
            let Some(job) = self.queue.remove(at) else { return };
            if let Some(failure) = self.obstacle(&job) {
                self.terminal(&job.id, JobState::Failed, None, Some(failure)).await;
                continue;
            }
            let slot = (0..).find(|s| self.running.values().all(|r| r.slot != *s)).unwrap_or(0);
            let control = Arc::new(Control::default());
            let (step, from) = job.from.unzip();
            let start = Start { id: job.id.clone(), input: job.input, from, control: Arc::clone(&control), slot };
            let running = Running {
                info: publish_info(&start.input),
                full: job.memory.is_some(),
                overtook,
                tenant: job.tenant,
                name: job.name,
                policy: job.policy,
                slot,
                control,
                phase: Phase::Training,
                _permit: job.permit,
            };
            self.append(&job.id, state(JobState::Running)).await;
            if let Some(step) = step {
                self.append(&job.id, JobEventBody::Resumed(ResumedEvent { step })).await;
            }
            self.running.insert(job.id.clone(), running);
            // holds as many as may run at a time, so it is never full
            let sent = self.starts.as_ref().is_some_and(|s| s.try_send(start).is_ok());
            if !sent {
                self.running.remove(&job.id);
                let failure = JobFailure { code: "INTERNAL".into(), message: "the trainer thread has ended".into() };
                self.terminal(&job.id, JobState::Failed, None, Some(failure)).await;
            }
        }
    }

    async fn append(&self, id: &str, body: JobEventBody) {
        let step = self.shared.step(id);
        match self.shared.log.append(id, step, body).await {
            Ok(seq) => self.shared.notify(id, seq),
            // progress is lost, the job is not: its end is tried again
            Err(e) => tracing::error!(job = id, error = %e, "a training event could not be stored"),
        }
    }

    /// Writes the one terminal state. A store that fails for a moment is tried again; after that the job is found
    /// unfinished at the next start and ends there.
    async fn terminal(&self, id: &str, to: JobState, result: Option<JobResult>, failure: Option<JobFailure>) {
        const TRIES: u32 = 5;
        let step = self.shared.step(id);
        let body = JobEventBody::State(StateEvent { state: to, result, failure });
        for attempt in 1..=TRIES {
            match self.shared.log.append(id, step, body.clone()).await {
                Ok(seq) => {
                    tracing::info!(job = id, state = to.as_str(), "training job ended");
                    self.shared.notify(id, seq);
                    break;
                }
                Err(e) => {
                    tracing::error!(job = id, attempt, error = %e, "a job's end could not be stored");
                    tokio::time::sleep(Duration::from_millis(50 << attempt)).await;
                }
            }
        }
        self.gauges.ended(to);
        self.shared.forget(id);
    }

    /// Writes nothing: as after a kill, the next start finds what each job goes on from.
    fn trainer_died(&self) {
        if !self.shared.is_draining() {
            tracing::error!("the trainer thread ended; jobs go on at the next start of the server");
            self.shared.set_down();
        }
        self.shared.forget_all_but(&[]);
    }
}

fn state(state: JobState) -> JobEventBody {
    JobEventBody::State(StateEvent { state, result: None, failure: None })
}

pub(crate) fn interrupted(message: &str) -> JobFailure {
    JobFailure { code: "INTERRUPTED".into(), message: message.to_owned() }
}

/// What the files of a run's delta say.
pub fn publish_info(input: &RunInput) -> PublishInfo {
    use crate::admission::train_params::MethodPart;
    let lora = input.resolved.methods.iter().find_map(|m| match m {
        MethodPart::Lora(p) => Some(p),
        _ => None,
    });
    lora.map_or(PublishInfo::default(), |p| PublishInfo { rslora: p.rslora, dropout: p.dropout.unwrap_or(0.0) })
}

impl Live {
    /// Tells watchers that there is an event up to this number.
    pub(crate) fn tell(&self, seq: u64) {
        self.seq.send_modify(|s| *s = seq.max(*s));
    }
}
