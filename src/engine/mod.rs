//! The engine: one thread that owns serving's compute.
//!
//! The async side submits a [`Request`] and reads [`Event`]s; the thread never awaits, does no IO, and shares nothing
//! with the trainer but the [`Pacer`]. Requests join and leave between steps (continuous batching); rows of different
//! deltas and of the bare base share one forward.

mod beam;
mod branches;
mod constraint;
mod drafts;
mod guard;
mod metrics;
mod request;
mod sampler;
mod scheduler;
mod sequence;
mod source;
mod step;
mod wanted;
mod worker;

pub use constraint::{Constraint, ConstraintFactory, Ending, TokenSet};
pub use request::{
    Beams, Began, EngineError, Event, Finished, Footprint, Generate, HeldDelta, Hypothesis, Output, Permit, Request,
    SubmitError, TokenOut, Work,
};

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use self::{
    metrics::Metrics,
    scheduler::{Limits, Scheduler},
    step::Stepper,
    worker::Worker,
};
use crate::{
    admission::params::Pooling,
    ids::TenantId,
    kv::{KvCache, PAGE_SIZE},
    model::{Architecture, Base},
    ops::{Activations, Halves},
    pacing::Pacer,
    rows::Ahead,
};

/// Sizes of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most rows of a step.
    pub max_batch_tokens: usize,
    /// Most sequences that hold cache pages at a time; at most `max_batch_tokens` count.
    pub max_sequences: usize,
    /// Most distinct deltas in a step.
    pub max_deltas: usize,
    /// Most prompt tokens of one sequence in a step: what a long prompt may cost the others.
    pub prefill_chunk: usize,
    /// Cache pages of [`PAGE_SIZE`] positions; unused by encoders.
    pub kv_pages: usize,
    /// Bytes that the states of constraints may take together. One that would take more alone is refused; others wait.
    pub constraint_bytes: u64,
    /// Which products of its steps may be computed in halves.
    pub halves: Halves,
    /// What products take of their input in its steps.
    pub activations: Activations,
    /// Requests that may wait to be taken by the engine thread. Admission's permits keep it from filling.
    pub queue: usize,
    /// Whether prompts begin behind what is cached of them; what a delta puts ahead is shared in any case.
    pub prefix_cache: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_tokens: 512,
            max_sequences: 64,
            max_deltas: 32,
            prefill_chunk: 256,
            kv_pages: 1024,
            constraint_bytes: 256 << 20,
            halves: Halves::Never,
            activations: Activations::F32,
            queue: 1024,
            prefix_cache: true,
        }
    }
}

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No memory for the cache.
    #[error("cannot allocate a cache of {positions} positions: {source}")]
    Cache {
        /// Positions asked for.
        positions: usize,
        /// Why.
        source: candle_core::Error,
    },
    /// No thread.
    #[error("cannot start the engine thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// The engine now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences that hold pages or are in a step.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Pages that sequences hold.
    pub pages_used: usize,
    /// Pages that nobody holds and that may be found again.
    pub pages_cached: usize,
    /// All pages.
    pub pages_total: usize,
    /// Steps since the start.
    pub steps: u64,
    /// Sequences that lost their pages and started over, since the start.
    pub preemptions: u64,
    /// Tokens of generating sequences that began whose keys and values were there, since the start.
    pub cache_hits: u64,
    /// Those that were not.
    pub cache_misses: u64,
    /// Cached pages that made room, since the start.
    pub cache_evictions: u64,
    /// Times that the cache was found damaged and emptied, since the start.
    pub integrity_failures: u64,
}

enum Command {
    Submit(Box<Request>),
    /// Look at `Shared`.
    Wake,
    /// End all of a tenant's sequences and forget its pages; answered by dropping the second.
    EndTenant(TenantId, oneshot::Sender<()>),
    /// Read to its end before anything else: a test's requests are all there when the first is taken.
    #[cfg(test)]
    Hold(mpsc::Receiver<()>),
    /// Breaks something.
    #[cfg(test)]
    Meddle(fn(&mut Scheduler, &mut Stepper)),
    /// Guesses tokens from now on; what is guessed is computed however unlikely it is to be right.
    #[cfg(test)]
    Guess(drafts::Guess),
    /// Guesses tokens from now on, as likely as they turn out to be.
    #[cfg(test)]
    GuessAsEver(drafts::Guess),
}

/// What handles and thread both see.
#[derive(Debug, Default)]
struct Shared {
    draining: AtomicBool,
    drain_deadline: Mutex<Option<Instant>>,
    running: AtomicUsize,
    waiting: AtomicUsize,
    pages_used: AtomicUsize,
    steps: AtomicU64,
    preemptions: AtomicU64,
    pages_cached: AtomicUsize,
    cache_hits: AtomicU64,
    cache_misses: AtomicU64,
    evictions: AtomicU64,
    integrity_failures: AtomicU64,
    stopped: AtomicBool,
}

/// Marks the engine as stopped when its thread ends, also by a panic.
struct Tombstone {
    shared: Arc<Shared>,
    pacer: Arc<Pacer>,
}

impl Drop for Tombstone {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.pacer.set_busy(false);
    }
}

/// The async side's access to the engine; cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::SyncSender<Command>,
    shared: Arc<Shared>,
    checks: Arc<Checks>,
}

/// What the engine refuses at once, so that one bad request never fails a step of others.
#[derive(Debug)]
struct Checks {
    arch: Architecture,
    /// Longest sequence of the bare base.
    positions: usize,
    /// Cache slots that one sequence can have.
    slots: usize,
    pages: usize,
    /// Sequences that may run at a time.
    sequences: usize,
    /// Bytes that the states of constraints may take.
    constraint_bytes: u64,
    queue: usize,
}

/// Starts the engine thread.
///
/// # Errors
/// No memory for the cache, or no thread.
pub fn spawn(
    base: Arc<Base>,
    config: EngineConfig,
    pacer: Arc<Pacer>,
) -> Result<(EngineHandle, JoinHandle<()>), SpawnError> {
    let arch = &base.arch;
    let pages = if arch.is_causal() { config.kv_pages.max(1) } else { 0 };
    let slots = pages * PAGE_SIZE;
    let kv = arch.is_causal().then(|| KvCache::new(arch.layers, slots, arch.kv_width(), base.dtype, &base.device));
    let kv = kv.transpose().map_err(|source| SpawnError::Cache { positions: slots, source })?;
    let limits = Limits {
        max_batch_tokens: config.max_batch_tokens,
        max_sequences: config.max_sequences,
        max_deltas: config.max_deltas,
        prefill_chunk: config.prefill_chunk,
        pages: arch.is_causal().then_some(pages),
        constraint_bytes: config.constraint_bytes,
        max_drafts: drafts::most(arch.vocab),
        free_rows: drafts::FREE_ROWS,
    };
    let queue = config.queue.max(1);
    let sequences = config.max_sequences.min(config.max_batch_tokens).max(1);
    // bounded; `submit` never waits: a full queue is an answer
    let (commands, receiver) = mpsc::sync_channel(queue);
    let shared = Arc::new(Shared::default());
    let positions = arch.max_positions.min(limits.max_positions());
    let checks = Arc::new(Checks {
        arch: arch.clone(),
        positions,
        slots: limits.max_positions(),
        pages,
        sequences,
        constraint_bytes: config.constraint_bytes,
        queue,
    });
    let worker = Worker {
        commands: receiver,
        shared: Arc::clone(&shared),
        scheduler: Scheduler::new(limits),
        stepper: Stepper::new(Arc::clone(&base), kv),
        base,
        pacer: Arc::clone(&pacer),
        metrics: Metrics::new(),
        sequences: HashMap::new(),
        next: 0,
        prefix_cache: config.prefix_cache,
        guess: drafts::lookup,
        halves: config.halves,
        activations: config.activations,
    };
    let tombstone = Tombstone { shared: Arc::clone(&shared), pacer };
    let thread = std::thread::Builder::new().name("engine".into()).stack_size(64 << 20).spawn(move || {
        let _tombstone = tombstone;
        worker.run();
    })?;
    Ok((EngineHandle { commands, shared, checks }, thread))
}

impl EngineHandle {
    /// Hands a request over. Never waits.
    ///
    /// # Errors
    /// A request that can never be served, a full queue, an engine that stops or has stopped.
    pub fn submit(&self, mut request: Request) -> Result<(), SubmitError> {
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(SubmitError::Draining);
        }
        self.checks.check(&mut request).map_err(SubmitError::Invalid)?;
        let (bytes, limit) = (request.constraint.as_ref().map_or(0, |c| c.bytes()), self.checks.constraint_bytes);
        if bytes > limit {
            return Err(SubmitError::ConstraintTooLarge { bytes, limit });
        }
        self.commands.try_send(Command::Submit(Box::new(request))).map_err(|e| match e {
            mpsc::TrySendError::Full(_) => SubmitError::Overloaded(self.checks.queue),
            mpsc::TrySendError::Disconnected(_) if self.shared.draining.load(Ordering::Acquire) => {
                SubmitError::Draining
            }
            mpsc::TrySendError::Disconnected(_) => SubmitError::Stopped,
        })
    }

    /// Stops taking requests, lets those that were taken run for at most `grace`, fails the rest with
    /// [`EngineError::Draining`], and ends the thread.
    pub fn shutdown(&self, grace: Duration) {
        *self.shared.drain_deadline.lock() = Some(Instant::now() + grace);
        self.shared.draining.store(true, Ordering::Release);
        // a full queue means that the thread is awake anyway
        let _ = self.commands.try_send(Command::Wake);
    }

    /// Fails all sequences of a tenant with [`EngineError::TenantEnded`] and forgets what is cached of it; what comes later is
    /// served. The receiver is done once that is so, or the engine has ended. `None`: the queue is full, ask again.
    pub fn end_tenant(&self, tenant: &TenantId) -> Option<oneshot::Receiver<()>> {
        let (done, ended) = oneshot::channel();
        match self.commands.try_send(Command::EndTenant(tenant.clone(), done)) {
            Ok(()) | Err(mpsc::TrySendError::Disconnected(_)) => Some(ended),
            Err(mpsc::TrySendError::Full(_)) => None,
        }
    }

    /// Whether the engine thread runs. If it does not and nobody shut it down, the process should end.
    pub fn is_alive(&self) -> bool {
        !self.shared.stopped.load(Ordering::Acquire)
    }

    /// Longest sequence (prompt and output) that a request may come to.
    pub fn max_positions(&self) -> usize {
        self.checks.positions
    }

    /// Longest sequence (prompt and output) behind what a delta puts ahead of it.
    pub fn max_tokens(&self, ahead: Ahead) -> usize {
        self.checks.room(ahead)
    }

    /// Sequences that may run at a time; beams count.
    pub fn max_sequences(&self) -> usize {
        self.checks.sequences
    }

    /// The engine now.
    pub fn stats(&self) -> EngineStats {
        let shared = &self.shared;
        EngineStats {
            running: shared.running.load(Ordering::Relaxed),
            waiting: shared.waiting.load(Ordering::Relaxed),
            pages_used: shared.pages_used.load(Ordering::Relaxed),
            pages_total: self.checks.pages,
            steps: shared.steps.load(Ordering::Relaxed),
            preemptions: shared.preemptions.load(Ordering::Relaxed),
            pages_cached: shared.pages_cached.load(Ordering::Relaxed),
            cache_hits: shared.cache_hits.load(Ordering::Relaxed),
            cache_misses: shared.cache_misses.load(Ordering::Relaxed),
            cache_evictions: shared.evictions.load(Ordering::Relaxed),
            integrity_failures: shared.integrity_failures.load(Ordering::Relaxed),
        }
    }
}

impl Checks {
    /// Most tokens behind what a delta puts ahead of them; its keys without rows have pages of their own.
    fn room(&self, ahead: Ahead) -> usize {
        let unused = ahead.keys.next_multiple_of(PAGE_SIZE) - ahead.keys;
        ahead.room(self.arch.max_positions, self.slots.saturating_sub(unused))
    }

    fn check(&self, request: &mut Request) -> Result<(), String> {
        let arch = &self.arch;
        let len = request.tokens.len();
        if len == 0 {
            return Err("the request has no tokens".into());
        }
        if let Some(id) = request.tokens.iter().find(|&&t| t as usize >= arch.vocab) {
            return Err(format!("token {id} is outside the vocabulary of {}", arch.vocab));
        }
        if let Some(types) = &request.token_types {
            let known = arch.token_types.max(1);
            if types.len() != len || types.iter().any(|&t| t as usize >= known) {
                return Err(format!("token types must be {len} numbers below {known}"));
            }
        }
        if let Some(id) = request.source.iter().find(|&&t| t as usize >= arch.vocab) {
            return Err(format!("token {id} of the source is outside the vocabulary of {}", arch.vocab));
        }
        let source = request.source.len();
        if arch.is_encoder_decoder() != (source > 0) {
            return Err(format!("{} takes {}", arch.kind(), if source > 0 { "no source" } else { "a source" }));
        }
        let generates = arch.is_causal() && !arch.names.lm_head.is_empty();
        let new = match &mut request.work {
            Work::Generate(_) | Work::Score { .. } if !generates => {
                return Err(format!("the base is {}, which does not generate or score", arch.kind()));
            }
            Work::Generate(g) if g.max_new_tokens == 0 => return Err("max_new_tokens must be at least 1".into()),
            Work::Generate(g) => g.max_new_tokens,
            Work::Score { from } if *from == 0 || *from >= len => {
                return Err(format!("scores from position {from} of {len} tokens: accepted are 1 to the last one"));
            }
            Work::Embed { pooling, .. } => {
                if *pooling == Pooling::Default {
                    let last = arch.is_causal() && !arch.is_encoder_decoder();
                    *pooling = if last { Pooling::Last } else { Pooling::Mean };
                }
                0
            }
            Work::Score { .. } | Work::Classify | Work::ClassifyTokens => 0,
        };
        if request.constraint.is_some() && !matches!(&request.work, Work::Generate(Generate { beams: None, .. })) {
            return Err("only an output whose tokens are chosen one by one can be constrained".into());
        }
        let source = request.source_rows();
        if source > self.positions {
            return Err(format!(
                "{source} source tokens (virtual ones among them) exceed the {} positions of the encoder",
                self.positions
            ));
        }
        let ahead = request.ahead();
        if len.saturating_add(new) > self.room(ahead) {
            return Err(format!(
                "{} virtual positions, {len} prompt tokens and {new} new ones exceed the {} positions",
                ahead.slots(),
                self.positions
            ));
        }
        let (footprint, most) = (request.footprint(new), self.pages);
        if let Work::Generate(Generate { beams: Some(Beams { search, told }), .. }) = &request.work {
            let beams = search.beams as usize;
            if beams == 0 || beams > self.sequences || *told > beams {
                return Err(format!("{beams} beams, {told} told: accepted are 1 to {}", self.sequences));
            }
            if footprint.pages(beams) > most {
                let limit = most * PAGE_SIZE;
                return Err(format!("{beams} beams of {len} + {new} positions exceed the cache of {limit} positions"));
            }
        }
        if source > 0 && footprint.pages(1) > most {
            let (memory, limit) = (footprint.memory, most * PAGE_SIZE);
            return Err(format!(
                "{memory} positions of the source and {len} + {new} others exceed the cache of {limit} positions"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
