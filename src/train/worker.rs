//! The trainer thread: owns all training compute, interleaves its jobs fairly: in each round, one micro-step of each. Jobs may
//! do theirs in one pass (`shared`).
//!
//! It takes work and gives reports, nothing else: queueing, storing and publishing are the supervisor's. A panic in a job
//! ends that job only.

mod shared;
#[cfg(test)]
mod tests;

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    thread::JoinHandle,
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::mpsc::Sender;

use crate::{
    admission::train_params::{JobEventBody, NoteEvent},
    model::Base,
    ops::{self, Background},
    pacing::Pacer,
    train::{
        control::{Ask, Control},
        limits::TrainerConfig,
        metrics::SharedPasses,
        run::{Advance, Failed, Outcome, Run, RunInput, Saved, Trained, Work},
    },
};

/// Walking and dropping a graph recurses once per node.
const STACK: usize = 256 << 20;

/// A job to begin.
#[derive(Debug)]
pub(crate) struct Start {
    /// Job id.
    pub(crate) id: String,
    /// Data and choices.
    pub(crate) input: RunInput,
    /// The run's bytes, if it goes on.
    pub(crate) from: Option<Bytes>,
    /// What is asked of it; it does that within a micro-step.
    pub(crate) control: Arc<Control>,
    /// Slot of the loss metric.
    pub(crate) slot: usize,
}

/// What the thread tells.
#[derive(Debug)]
pub(crate) enum Report {
    /// Something happened in a job.
    Event(String, Box<JobEventBody>),
    /// A checkpoint of a job that goes on.
    Saved(String, Box<Saved>),
    /// A job is over; nothing follows.
    Ended(String, Box<End>),
}

/// How a job left the thread.
#[derive(Debug)]
pub(crate) enum End {
    Trained(Box<Trained>),
    Failed(Failed),
    Cancelled,
    /// With what it goes on from; `None`: it begins again.
    Paused(Option<Saved>),
}

/// Starts the thread. It ends when `starts` is closed and its jobs are over, or when nobody takes reports any more. What it computes is on threads of its own.
///
/// # Errors
/// The operating system's, if it gives no thread.
pub(crate) fn spawn(
    (base, pacer): (Arc<Base>, Arc<Pacer>),
    config: TrainerConfig,
    starts: Receiver<Start>,
    reports: Sender<Report>,
) -> io::Result<JoinHandle<()>> {
    let background = Arc::new(Background::new(config.priority, STACK)?);
    let worker = Worker::new((base, pacer), config.share, starts, reports);
    let worker = Worker { background: Some(Arc::clone(&background)), ..worker };
    let run = move || background.run(|| ops::permitting(config.halves, || worker.run()));
    std::thread::Builder::new().name("trainer".into()).spawn(run)
}

struct Active {
    id: String,
    control: Arc<Control>,
    stage: Stage,
    /// Whether it had its turn in this round.
    had: bool,
    /// Whether it shares no passes any more.
    apart: bool,
}

impl Active {
    fn run(&self) -> Option<&Run> {
        if let Stage::Run(work) = &self.stage { work.run() } else { None }
    }

    fn run_mut(&mut self) -> Option<&mut Run> {
        if let Stage::Run(work) = &mut self.stage { work.run_mut() } else { None }
    }
}

enum Stage {
    /// A thread of its own sets the run up.
    Setup(Receiver<Result<Work, String>>),
    Run(Work),
}

/// How long the thread rests when all of its jobs are being set up.
const REST: Duration = Duration::from_millis(5);

struct Worker {
    base: Arc<Base>,
    pacer: Arc<Pacer>,
    starts: Receiver<Start>,
    // blocking sends cannot deadlock: the supervisor never waits for this thread
    reports: Sender<Report>,
    active: Vec<Active>,
    /// Most jobs of a pass.
    share: usize,
    passes: SharedPasses,
    /// The threads that it is on, for those that it starts; `None`: it is on no special ones.
    background: Option<Arc<Background>>,
}

impl Worker {
    fn new(
        (base, pacer): (Arc<Base>, Arc<Pacer>),
        share: usize,
        starts: Receiver<Start>,
        reports: Sender<Report>,
    ) -> Self {
        Self { base, pacer, starts, reports, active: Vec::new(), share, passes: SharedPasses::new(), background: None }
    }

    fn run(mut self) {
        /// Serving waits for no trainer that is gone, however it went.
        struct Gone(Arc<Pacer>);
        impl Drop for Gone {
            fn drop(&mut self) {
                self.0.set_training(false);
            }
        }
        let _gone = Gone(Arc::clone(&self.pacer));
        loop {
            if self.active.is_empty() {
                self.pacer.set_training(false);
                match self.starts.recv() {
                    Ok(start) => self.begin(start),
                    Err(_) => return,
                }
            }
            // a closed channel ends the loop too: what is active is finished first
            while let Ok(start) = self.starts.try_recv() {
                self.begin(start);
            }
            // one that is being set up passes no yield points
            self.pacer.set_training(self.active.iter().any(|job| matches!(job.stage, Stage::Run(_))));
            if !self.round() {
                return;
            }
            if !self.active.is_empty() && self.active.iter().all(|a| matches!(a.stage, Stage::Setup(_))) {
                std::thread::sleep(REST);
            }
        }
    }

    /// A micro-step of every job; false if nobody listens.
    fn round(&mut self) -> bool {
        self.active.iter_mut().for_each(|job| job.had = false);
        while let Some(at) = self.active.iter().position(|job| !job.had) {
            self.calm();
            let jobs = self.company(at);
            let turns = if jobs.len() > 1 { self.turn_together(&jobs) } else { vec![self.turn(at)] };
            // from the last, so that places stay right
            for (at, turn) in jobs.into_iter().zip(turns).rev() {
                match turn {
                    Turn::Again => self.active[at].had = true,
                    Turn::Over(end) => {
                        // its memory is free before anyone hears of its end and starts another
                        let id = self.active.remove(at).id;
                        if !self.end(id, end) {
                            return false;
                        }
                    }
                    Turn::Deaf => return false,
                }
            }
        }
        true
    }

    /// Lets training be held again, unless a job has still to hear what is asked of it.
    fn calm(&self) {
        // first this: what is asked after the look hurries it anew
        self.pacer.calm();
        let asked = |job: &Active| matches!(job.stage, Stage::Run(_)) && job.control.ask() != Ask::GoOn;
        if self.active.iter().any(asked) {
            self.pacer.hurry();
        }
    }

    fn begin(&mut self, start: Start) {
        let Start { id, input, from, control, slot } = start;
        // a whole model is read from the disk and hashed, a sweep is several runs: too long for the others to wait
        let apart = input.spec.full.is_some() || !input.candidates.is_empty();
        let (base, pacer) = (Arc::clone(&self.base), Arc::clone(&self.pacer));
        let new = move || set_up(base, pacer, (input, from), slot);
        let stage = match (apart, &self.background) {
            (true, Some(background)) => match background.another() {
                Ok(threads) => set_up_apart(move || threads.run(new)),
                Err(e) => Err(format!("no thread to set up: {e}")),
            },
            (true, None) => set_up_apart(new),
            (false, _) => new().map(Stage::Run),
        };
        match stage {
            Ok(stage) => self.active.push(Active { id, control, stage, had: false, apart: false }),
            Err(message) => {
                self.end(id, End::Failed(internal(message)));
            }
        }
    }

    /// One micro-step of one job.
    fn turn(&mut self, at: usize) -> Turn {
        let Active { id, control, stage, .. } = &mut self.active[at];
        let run = match stage {
            Stage::Run(run) => run,
            // also if it is cancelled: the thread ends by itself, and until then has the run's memory
            Stage::Setup(made) => match made.try_recv() {
                Err(TryRecvError::Empty) => return Turn::Again,
                Err(TryRecvError::Disconnected) => return Turn::Over(End::Failed(internal("setting up ended".into()))),
                Ok(Err(message)) => return Turn::Over(End::Failed(internal(message))),
                Ok(Ok(run)) => {
                    *stage = Stage::Run(run);
                    return Turn::Again;
                }
            },
        };
        let id = id.clone();
        // before it asks: it may be held for long, and what ends that is often that something is asked
        self.pacer.yield_now();
        match control.ask() {
            Ask::GoOn => {}
            Ask::Cancel => return Turn::Over(End::Cancelled),
            Ask::Stop if run.is_full() => return Turn::Over(End::Cancelled),
            Ask::Pause | Ask::Stop => {
                let (end, note) = leave(run);
                if note.is_some_and(|note| self.reports.blocking_send(Report::Event(id, Box::new(note))).is_err()) {
                    return Turn::Deaf;
                }
                return Turn::Over(end);
            }
        }
        let came = guarded(run.step() + 1, || run.advance());
        self.told(at, came)
    }

    /// Tells what a micro-step of a job came to, and keeps a checkpoint where one is due.
    fn told(&mut self, at: usize, came: Advance) -> Turn {
        let Active { id, control, stage: Stage::Run(run), .. } = &mut self.active[at] else { return Turn::Again };
        let (events, outcome) = match came {
            Advance::More(events) => (events, None),
            Advance::Done(events, outcome) => (events, Some(*outcome)),
        };
        for event in events {
            if self.reports.blocking_send(Report::Event(id.clone(), Box::new(event))).is_err() {
                return Turn::Deaf;
            }
        }
        if outcome.is_none() && !control.is_saving() {
            let saved = catch_unwind(AssertUnwindSafe(|| run.autosave().map_err(|e| e.to_string())));
            let report = match saved.unwrap_or_else(|panic| Err(panic_text(panic.as_ref()))) {
                Ok(None) => None,
                Ok(Some(saved)) => {
                    control.set_saving(true);
                    Some(Report::Saved(id.clone(), Box::new(saved)))
                }
                Err(e) => Some(Report::Event(id.clone(), Box::new(lost(run.step(), &e)))),
            };
            if report.is_some_and(|report| self.reports.blocking_send(report).is_err()) {
                return Turn::Deaf;
            }
        }
        match outcome {
            None => Turn::Again,
            Some(Outcome::Trained(trained)) => Turn::Over(End::Trained(trained)),
            Some(Outcome::Failed(failed)) => Turn::Over(End::Failed(failed)),
        }
    }

    /// False if nobody listens.
    fn end(&self, id: String, end: End) -> bool {
        self.reports.blocking_send(Report::Ended(id, Box::new(end))).is_ok()
    }
}

/// Makes a run; a panic is a message, too.
fn set_up(
    base: Arc<Base>,
    pacer: Arc<Pacer>,
    (input, from): (RunInput, Option<Bytes>),
    slot: usize,
) -> Result<Work, String> {
    let new = || {
        let mut run = match from {
            Some(bytes) => Work::from_bytes(base, Some(pacer), input, &bytes)?,
            None => Work::new(base, Some(pacer), input)?,
        };
        run.show_in_slot(slot);
        Ok::<_, candle_core::Error>(run)
    };
    match catch_unwind(AssertUnwindSafe(new)) {
        Ok(made) => made.map_err(|e| format!("setting up: {e}")),
        Err(panic) => Err(panic_text(panic.as_ref())),
    }
}

/// The same on a thread of its own.
fn set_up_apart(new: impl FnOnce() -> Result<Work, String> + Send + 'static) -> Result<Stage, String> {
    let (send, made) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("trainer-setup".into()).spawn(move || {
        // nobody takes it if the trainer thread has ended
        let _ = send.send(new());
    });
    thread.map(|_| Stage::Setup(made)).map_err(|e| format!("no thread to set up: {e}"))
}

/// How a run leaves that is to pause. Where no checkpoint can be made, it goes on from the one before.
fn leave(run: &Work) -> (End, Option<JobEventBody>) {
    let made = catch_unwind(AssertUnwindSafe(|| run.to_bytes().map_err(|e| e.to_string())));
    match made.unwrap_or_else(|panic| Err(panic_text(panic.as_ref()))) {
        Ok(bytes) => (End::Paused(bytes.map(|bytes| Saved { step: run.step(), bytes })), None),
        Err(e) => (End::Paused(None), Some(lost(run.step(), &e))),
    }
}

fn lost(step: u32, why: &str) -> JobEventBody {
    let message = format!("no checkpoint after step {step}: {why}");
    JobEventBody::Warning(NoteEvent { code: "CHECKPOINT_LOST".into(), message })
}

/// A micro-step, whose panic is the failure of the job.
fn guarded(step: u32, advance: impl FnOnce() -> Advance) -> Advance {
    catch_unwind(AssertUnwindSafe(advance)).unwrap_or_else(|panic| {
        let failed = internal(format!("step {step}: {}", panic_text(panic.as_ref())));
        Advance::Done(Vec::new(), Box::new(Outcome::Failed(failed)))
    })
}

enum Turn {
    Again,
    Over(End),
    /// Nobody listens: the process is going down.
    Deaf,
}

fn internal(message: String) -> Failed {
    Failed { code: "INTERNAL", message, checkpoint: None }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panicked: {}", text.unwrap_or_else(|| "without a message".to_owned()))
}
