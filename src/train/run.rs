//! One job's training, a micro-step at a time.
//!
//! [`Run::advance`] does at most one forward and backward, so that whoever calls it can interleave jobs, cancel within a
//! micro-step, and lose one job to a panic without losing others. It knows nothing of threads, queues or the store.

mod autosave;
mod best;
mod evaluation;
mod generation;
mod held;
mod input;
mod outcome;
mod preference;
mod replay;
mod resume;
mod shared;
mod sweep;
mod telling;
mod work;

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use candle_core::{Result, Tensor};
use rand::rngs::StdRng;

use autosave::Autosave;
use best::Bests;
pub use best::Runner;
pub use input::RunInput;
pub use outcome::{Advance, Failed, Outcome, RunEvents, Saved, Trained};
pub use resume::ResumeError;
pub use shared::{Share, shared_pass};
pub use sweep::Sweep;
pub use work::Work;

use crate::{
    admission::train_params::{JobEventBody, MixEvent},
    delta::Delta,
    model::Base,
    pacing::Pacer,
    train::{
        batches::{self, Batches, Stream, micro_batches},
        encode::Encoded,
        eval::{Patience, Tally},
        ewc::{Fisher, Penalty},
        generate::Answering,
        gradients,
        metrics::TrainMetrics,
        optim::{AdamParams, AdamW, LrSchedule, clip_scale, global_norm},
        plan::{MICRO_TOKENS, micro_tokens_of_delta},
        start,
        trainable::{Snapshot, Trainable},
        transfer::Ewc,
        worst::Worst,
    },
};
use held::Held;
use preference::{References, Side};
use replay::Replay;

/// Weights beyond half precision's range are no delta any more: the run has diverged even if its loss is still a number.
const MAX_WEIGHT_NORM: f64 = 65_504.0;

/// Steps between good checkpoints that a failure falls back to.
pub(super) const KEEP_EVERY: u32 = 10;

/// A step under way: micro-batches to go and what was gathered so far.
#[derive(Debug, Default)]
struct Step {
    todo: VecDeque<Vec<usize>>,
    replay: Replay,
    weight: f64,
    loss: f64,
    tokens: usize,
    grads: Vec<Option<Tensor>>,
    busy: Duration,
    yielded: Duration,
    penalty: f64,
    /// The mean divergence from the bare base.
    kl: f64,
}

#[derive(Debug)]
enum Phase {
    Train(Step),
    Eval {
        todo: VecDeque<Vec<usize>>,
        tally: Tally,
        worst: Worst,
        /// Answers to prompts, once the losses are known.
        answers: Option<Box<Answering>>,
    },
    /// The losses of the training examples, after the last step.
    Worst {
        todo: VecDeque<Vec<usize>>,
        worst: Worst,
    },
    Held(Held),
}

/// One job under training.
#[derive(Debug)]
pub struct Run {
    base: Arc<Base>,
    pacer: Option<Arc<Pacer>>,
    metrics: TrainMetrics,
    input: RunInput,
    lens: Vec<usize>,
    /// Virtual rows ahead of each sequence.
    ahead: usize,
    references: References,
    trainable: Trainable,
    /// EWC's information, until it is complete.
    fisher: Option<Fisher>,
    penalty: Option<Penalty>,
    optimizer: AdamW,
    schedule: LrSchedule,
    batches: Batches,
    /// Texts that the divergence from the base is taken on.
    replays: Batches,
    dropout: StdRng,
    phase: Phase,
    step: u32,
    last_loss: f64,
    bests: Bests,
    patience: Patience,
    /// Whether the patience has run out.
    stopped: bool,
    /// Whether the losses of the training examples were told.
    told: bool,
    /// Weights that gave a finite loss.
    good: Option<(u32, Snapshot)>,
    /// Weights whose loss is not known yet.
    unproven: Option<(u32, Snapshot)>,
    started: Instant,
    /// The step that it was at when it started.
    begun: u32,
    last_metrics: Option<Instant>,
    autosave: Autosave,
    /// What a checkpoint of it says it belongs to.
    identity: OnceLock<resume::Identity>,
}

impl Run {
    /// Sets a run up: variables, optimizer, order of the data.
    ///
    /// # Errors
    /// The device.
    pub fn new(base: Arc<Base>, pacer: Option<Arc<Pacer>>, mut input: RunInput) -> Result<Self> {
        let seed = input.resolved.seed;
        if let Some(start) = input.start.take() {
            let (trainable, ewc) = start.begin(&input.spec, &base, seed)?;
            let mut run = Self::with_trainable(base, pacer, input, trainable)?;
            ewc.map(|ewc| run.hold_on_to(ewc)).transpose()?;
            return Ok(run);
        }
        let trainable = Trainable::init_on(&input.spec, &base, seed)?;
        start::from_base(&trainable, &input.spec, &base, &input.train, seed)?;
        Self::with_trainable(base, pacer, input, trainable)
    }

    /// As [`Self::new`], from given variables (an existing delta).
    ///
    /// # Errors
    /// The device.
    pub fn with_trainable(
        base: Arc<Base>,
        pacer: Option<Arc<Pacer>>,
        input: RunInput,
        trainable: Trainable,
    ) -> Result<Self> {
        let r = &input.resolved;
        let lens: Vec<usize> = input.train.iter().map(Encoded::rows).collect();
        let size = r.batch_size as usize * r.grad_accumulation as usize;
        let pack_to = r.packing.then_some(r.max_length as usize);
        let adam = AdamParams { beta1: r.beta1, beta2: r.beta2, eps: r.eps, weight_decay: r.weight_decay };
        let schedule =
            LrSchedule { peak: r.learning_rate, kind: r.schedule, warmup: r.warmup_steps, total: r.total_steps };
        let vars = trainable.vars();
        Ok(Self {
            optimizer: AdamW::new(adam, vars.iter().map(|v| (v.var.clone(), v.decays)))?
                .with_rates(vars.iter().map(|v| v.rate)),
            batches: Batches::new(&lens, size, pack_to, r.seed),
            replays: replay::batches(&input),
            dropout: batches::rng_at(r.seed, Stream::Dropout, 0),
            // a whole model is too large to be kept on the way
            good: if trainable.is_full() { None } else { Some((0, trainable.snapshot()?)) },
            metrics: TrainMetrics::in_slot(usize::MAX),
            phase: Phase::Train(Step::default()),
            step: 0,
            last_loss: f64::NAN,
            bests: Bests::of(&input),
            patience: Patience::new(r.eval_metric, r.patience, r.min_delta),
            stopped: false,
            told: false,
            unproven: None,
            started: Instant::now(),
            begun: 0,
            last_metrics: None,
            autosave: Autosave::from_step(0),
            identity: OnceLock::new(),
            ahead: trainable.ahead().rows,
            references: References::none_yet(&input),
            fisher: None,
            penalty: None,
            schedule,
            trainable,
            lens,
            input,
            pacer,
            base,
        })
    }

    /// Takes the old task's Fisher information before the first step, and the penalty into every step.
    ///
    /// # Errors
    /// The device.
    pub(crate) fn hold_on_to(&mut self, ewc: Ewc) -> Result<()> {
        self.fisher = Some(Fisher::new(ewc, &self.base)?);
        Ok(())
    }

    /// Shows this run's loss in a slot of the loss metric.
    pub(crate) fn show_in_slot(&mut self, slot: usize) {
        self.metrics = TrainMetrics::in_slot(slot);
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// The variables.
    pub fn trainable(&self) -> &Trainable {
        &self.trainable
    }

    /// What the variables form now, as it would be published: independent of them.
    ///
    /// # Errors
    /// The device.
    pub fn delta(&self) -> Result<Delta> {
        self.trainable.publishable(&self.trainable.snapshot()?)
    }

    /// Loss of the last finished step.
    pub fn last_loss(&self) -> f64 {
        self.last_loss
    }

    /// Does one micro-step.
    pub fn advance(&mut self) -> Advance {
        let mut events = Vec::new();
        let came = self.try_advance(&mut events);
        self.came_to(came, events)
    }

    fn try_advance(&mut self, events: &mut RunEvents) -> Result<Option<Outcome>> {
        if let Some(mut fisher) = self.fisher.take() {
            match fisher.advance(&self.base, self.pacer.as_ref())? {
                true => self.fisher = Some(fisher),
                false => {
                    self.penalty = Some(fisher.penalty(self.trainable.vars())?);
                    self.started = Instant::now(); // what is expected of the steps goes by the steps
                }
            }
            return Ok(None);
        }
        if let Phase::Eval { todo, .. } = &mut self.phase {
            return match todo.pop_front() {
                Some(batch) => self.eval_micro(batch).map(|()| None),
                None if self.answer_micro()? => Ok(None),
                None => self.finish_eval(events),
            };
        }
        if let Phase::Held(held) = &mut self.phase {
            return match held.todo.pop_front() {
                Some(batch) => self.held_micro(&batch).map(|()| None),
                None => self.finish_held(events).map(Some),
            };
        }
        if let Phase::Worst { todo, .. } = &mut self.phase {
            match todo.pop_front() {
                Some(batch) => self.worst_micro(batch)?,
                None => self.finish_worst(events),
            }
            return Ok(None);
        }
        if self.stopped || self.step >= self.input.resolved.total_steps {
            if self.worst_due() {
                self.phase = self.begin_worst();
                return Ok(None);
            }
            return if self.input.held.is_empty() {
                self.trained().map(Some)
            } else {
                self.begin_held().map(|()| None)
            };
        }
        self.train_micro(events)
    }

    fn train_micro(&mut self, events: &mut RunEvents) -> Result<Option<Outcome>> {
        let start = Instant::now();
        let yielded = self.pacer.as_ref().map(|p| p.yielded());
        let mut step = match &mut self.phase {
            Phase::Train(step) if !step.is_over() => std::mem::take(step),
            _ => self.begin_step(),
        };
        let loss = match step.todo.pop_front() {
            Some(batch) if self.refer(Side::Train, &batch)? => {
                step.todo.push_front(batch);
                step.busy += start.elapsed();
                self.phase = Phase::Train(step);
                return Ok(None);
            }
            Some(batch) => self.forward_backward(&mut step, &batch)?,
            None => self.replay_micro(&mut step)?,
        };
        step.loss += loss;
        if !loss.is_finite() {
            let message = format!("the loss of step {} is {loss}", self.step + 1);
            return Ok(Some(self.fail("NON_FINITE_LOSS", message)));
        }
        step.busy += start.elapsed();
        if let (Some(p), Some(before)) = (&self.pacer, yielded) {
            step.yielded += p.yielded().saturating_sub(before);
        }
        if step.is_over() {
            return self.finish_step(step, events);
        }
        self.phase = Phase::Train(step);
        Ok(None)
    }

    fn begin_step(&mut self) -> Step {
        let (batch, replay) = (self.batches.next_batch(), self.next_replay());
        let r = &self.input.resolved;
        // by step, so that a run that goes on from a checkpoint draws what it would have drawn
        self.dropout = batches::rng_at(r.seed, Stream::Dropout, self.step);
        // with packing, a batch counts packs; the token bound alone decides how they are cut
        let examples = if r.packing { usize::MAX } else { r.batch_size as usize };
        let of_delta = micro_tokens_of_delta(self.base.device.is_cpu());
        let most = if self.trainable.is_full() { MICRO_TOKENS } else { of_delta };
        let todo: VecDeque<_> = micro_batches(&batch, &self.rows(&self.input.train), examples, most).into();
        let weight = batch.iter().map(|i| self.input.train[*i].weight()).sum::<usize>().max(1) as f64;
        let tokens = batch.iter().map(|i| self.lens[*i]).sum();
        Step { todo, replay, weight, tokens, grads: vec![None; self.trainable.vars().len()], ..Step::default() }
    }

    /// Rows that these examples take.
    fn rows(&self, examples: &[Encoded]) -> Vec<usize> {
        examples.iter().map(|e| e.rows() + e.sequences() * self.ahead).collect()
    }

    /// Adds a micro-batch's share of the step's loss and gradients: normalised by the whole step's losses, not a mean
    /// of means, so that accumulation equals one large batch.
    fn forward_backward(&mut self, step: &mut Step, batch: &[usize]) -> Result<f64> {
        let (loss, found, kl) = self.gradients(batch, step.weight)?;
        step.kl += kl;
        for (sum, grad) in step.grads.iter_mut().zip(found) {
            gradients::add(sum, grad)?;
        }
        Ok(loss)
    }

    fn finish_step(&mut self, mut step: Step, events: &mut RunEvents) -> Result<Option<Outcome>> {
        let start = Instant::now();
        if let Some(proven) = self.unproven.take() {
            self.good = Some(proven);
        }
        let vars = self.trainable.vars();
        let mut grads: Vec<Tensor> = (std::mem::take(&mut step.grads).into_iter().zip(vars))
            .map(|(grad, v)| grad.map_or_else(|| v.var.zeros_like().map(|z| z.detach()), Ok))
            .collect::<Result<_>>()?;
        if let Some(penalty) = &self.penalty {
            step.penalty = penalty.add_to(vars, &mut grads)?;
        }
        let norm = global_norm(&grads)?;
        if !norm.is_finite() {
            let message = format!("the gradient of step {} is not finite (loss {})", self.step + 1, step.loss);
            return Ok(Some(self.fail("NON_FINITE_LOSS", message)));
        }
        let lr = self.schedule.at(self.step);
        self.optimizer.step(&grads, lr, clip_scale(norm, self.input.resolved.clip_norm))?;
        let weights = global_norm(vars.iter().map(|v| v.var.as_tensor()))?;
        if weights.is_nan() || weights > MAX_WEIGHT_NORM {
            let message =
                format!("the weights diverged in step {} (norm {weights:.3e}, learning rate {lr})", self.step + 1);
            return Ok(Some(self.fail("DIVERGED", message)));
        }
        self.step += 1;
        self.last_loss = step.loss;
        if self.step.is_multiple_of(KEEP_EVERY) && !self.trainable.is_full() {
            self.unproven = Some((self.step, self.trainable.snapshot()?));
        }
        let busy = step.busy + start.elapsed();
        let event = self.metrics_event(&step, (lr, norm), busy);
        self.metrics.step(&event, step.tokens);
        if let Some(event) = self.due(event) {
            events.push(JobEventBody::Metrics(event));
        }
        self.phase = if self.eval_due() { self.begin_eval() } else { Phase::Train(Step::default()) };
        Ok(None)
    }

    fn trained(&self) -> Result<Outcome> {
        let runners = self.bests.runners()?;
        let (snapshot, best_eval) = match self.bests.first() {
            Some(best) => (best.snapshot.clone(), Some(best.eval.clone())),
            None => (self.trainable.snapshot()?, None),
        };
        let delta = self.trainable.publishable(&snapshot)?;
        let model = self.trainable.model(&snapshot)?;
        let checkpoint = self.trainable.checkpoint_bytes(&snapshot)?;
        let rows = self.trainable.mix_rows(&snapshot)?;
        let mix = self
            .input
            .resolved
            .mix
            .as_ref()
            .map(|mix| MixEvent { deltas: mix.deltas.iter().map(|d| d.name.clone()).collect(), rows });
        let final_loss = self.last_loss;
        Ok(Outcome::Trained(Box::new(Trained { delta, model, final_loss, best_eval, mix, checkpoint, runners })))
    }

    fn fail(&self, code: &'static str, message: String) -> Outcome {
        let kept = match self.bests.first() {
            Some(best) => Some((best.eval.step, &best.snapshot)),
            None => self.good.as_ref().map(|(step, snapshot)| (*step, snapshot)),
        };
        let checkpoint = kept.and_then(|(step, snapshot)| {
            let bytes = self.trainable.checkpoint_bytes(snapshot);
            bytes
                .inspect_err(|e| tracing::warn!(error = %e, "the last good checkpoint could not be kept"))
                .ok()
                .flatten()
                .map(|bytes| (step, bytes))
        });
        Outcome::Failed(Failed { code, message, checkpoint })
    }
}

/// The code of a job that an error ends.
fn code_of(error: &candle_core::Error) -> &'static str {
    let text = error.to_string().to_ascii_lowercase();
    if text.contains("out of memory") { "OUT_OF_MEMORY" } else { "INTERNAL" }
}
