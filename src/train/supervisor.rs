//! The supervisor: one task that owns the queue and every job's state, writes every event, and publishes.
//!
//! All state changes of a job go through here, one after the other, so each job gets exactly one terminal state. It never
//! waits for the trainer thread and never computes.

mod losing;
mod pauses;
mod publishing;
mod starting;
mod turns;

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, mpsc::SyncSender},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use self::turns::Turns;
use crate::{
    admission::{
        params::PublishPolicy,
        train_params::{
            EvalEvent, JobEventBody, JobFailure, JobResult, JobState, MemoryEstimate, ModelResult, StateEvent,
        },
    },
    delta::Delta,
    ids::{DeltaId, TenantId},
    model::ModelFolder,
    pacing::Pacer,
    train::{
        beginning::{Beginning, Shelved},
        control::{Ask, Control},
        error::TrainError,
        handle::{Live, Shared},
        joblog::LogError,
        memory::MemoryProbe,
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
    /// What `input` has let go of until the job starts.
    pub(crate) shelved: Option<Shelved>,
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
    /// What a job had let go of while it waited, or why that cannot be had.
    Loaded(String, Result<Box<Beginning>, String>),
    Published(String, Result<Published, PublishFailure>),
    /// A job's last checkpoint is stored, and it has left the trainer.
    Stopped(String, Result<u64, LogError>),
    /// This server's lease has run out or may have: its jobs stop here, and nothing is said of them.
    Fence,
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

/// A job that is about to be on the trainer thread, is on it, or is being published.
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
    /// It has its place, and what it had let go of while it waited is being loaded: as others see it, it waits.
    Loading {
        start: Box<Start>,
        /// The step of what it goes on from.
        step: Option<u32>,
        /// Ends with it.
        _task: AbortOnDropHandle<()>,
    },
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
    /// Holds training while serving is busy.
    pub(crate) pacer: Arc<Pacer>,
    pub(crate) max_running: usize,
    pub(crate) max_paused: usize,
    pub(crate) starts: Option<SyncSender<Start>>,
    pub(crate) commands: mpsc::Receiver<Command>,
    /// For the tasks that publish.
    pub(crate) to_self: mpsc::WeakSender<Command>,
    pub(crate) reports: mpsc::Receiver<Report>,
    queue: VecDeque<Pending>,
    turns: Turns,
    running: HashMap<String, Running>,
    gauges: JobGauges,
    drained: Option<oneshot::Sender<()>>,
}

/// The channels and parts of a supervisor.
pub(crate) struct Parts {
    pub(crate) shared: Arc<Shared>,
    pub(crate) publisher: Publisher,
    pub(crate) memory: MemoryProbe,
    /// Holds training while serving is busy.
    pub(crate) pacer: Arc<Pacer>,
    pub(crate) max_running: usize,
    /// Shares of tenants that have another than 1.
    pub(crate) weights: Arc<HashMap<TenantId, u32>>,
    /// Of one tenant.
    pub(crate) max_paused: usize,
    pub(crate) starts: SyncSender<Start>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) to_self: mpsc::WeakSender<Command>,
    pub(crate) reports: mpsc::Receiver<Report>,
}

impl Supervisor {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { shared, publisher, memory, pacer, max_running, weights, max_paused, starts, commands, .. } = parts;
        let (to_self, reports) = (parts.to_self, parts.reports);
        Self {
            shared,
            publisher,
            memory,
            pacer,
            max_running,
            max_paused,
            starts: Some(starts),
            commands,
            to_self,
            reports,
            queue: VecDeque::new(),
            turns: Turns::new(weights),
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
            Command::Loaded(id, result) => self.loaded(&id, result).await,
            Command::Published(id, result) => self.published(&id, result).await,
            Command::Stopped(id, result) => self.stopped(&id, result).await,
            Command::Fence => self.fence(),
            Command::Drain(done) => self.drain(done),
        }
    }

    async fn report(&mut self, report: Report) {
        match report {
            Report::Event(id, _) | Report::Saved(id, _) if self.is_lost(&id) => {}
            Report::Ended(id, _) if self.is_lost(&id) => self.leave(&id),
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

    async fn append(&self, id: &str, body: JobEventBody) {
        let step = self.shared.step(id);
        match self.shared.log.append(id, step, body).await {
            Ok(seq) => self.shared.notify(id, seq),
            Err(LogError::NotOwner(_)) => self.lose(id),
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
        crate::failpoint!("job-before-end");
        for attempt in 1..=TRIES {
            match self.shared.log.append(id, step, body.clone()).await {
                Ok(seq) => {
                    tracing::info!(job = id, state = to.as_str(), "training job ended");
                    self.shared.notify(id, seq);
                    self.gauges.ended(to);
                    break;
                }
                // whoever has it now writes its end, or has written it
                Err(e @ (LogError::NotOwner(_) | LogError::Ended(_))) => {
                    tracing::warn!(job = id, state = to.as_str(), error = %e, "a job's end was not stored");
                    break;
                }
                Err(e) => {
                    tracing::error!(job = id, attempt, error = %e, "a job's end could not be stored");
                    tokio::time::sleep(Duration::from_millis(50 << attempt)).await;
                }
            }
        }
        crate::failpoint!("job-ended");
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
