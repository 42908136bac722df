//! The engine thread: takes commands, asks the scheduler, runs steps, sends events. It holds no policy.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering, mpsc},
    time::Instant,
};

use super::{
    Command, Shared,
    drafts::Guess,
    guard::computed,
    metrics::Metrics,
    request::{EngineError, Request},
    scheduler::{Scheduler, SeqId, Share, StepPlan},
    sequence::{Begin, Fate, Sequence, Taken},
    step::{Got, Stepper, Task},
};
use crate::{
    ids::TenantId,
    kv::PageOwner,
    model::Base,
    ops::{self, Activations, Halves, each},
    pacing::Pacer,
};

/// Shared pages whose checksums are compared whenever the engine becomes idle: few, since the next request waits for them.
const AUDITED: usize = 2;

/// What a constrained sequence found out: whether it goes on.
type Look = Result<bool, EngineError>;

/// Everything that the engine thread owns.
pub(super) struct Worker {
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) shared: Arc<Shared>,
    pub(super) scheduler: Scheduler,
    pub(super) stepper: Stepper,
    pub(super) base: Arc<Base>,
    pub(super) pacer: Arc<Pacer>,
    pub(super) metrics: Metrics,
    pub(super) sequences: HashMap<SeqId, Sequence>,
    pub(super) next: SeqId,
    /// Which products of its steps may be computed in halves.
    pub(super) halves: Halves,
    /// What products take of their input in them.
    pub(super) activations: Activations,
    /// Whether prompts begin behind what is cached of them.
    pub(super) prefix_cache: bool,
    /// Who guesses the tokens of sequences that speculate.
    pub(super) guess: Guess,
}

impl Worker {
    /// Runs until the engine is shut down or all handles are gone.
    pub(super) fn run(mut self) {
        while self.turn() {}
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        let ids: Vec<SeqId> = self.sequences.keys().copied().collect();
        ids.into_iter().for_each(|id| self.fail(id, EngineError::Draining));
        self.rest();
    }

    /// Takes what came, then runs one step. `false`: nothing is left to do, ever.
    fn turn(&mut self) -> bool {
        if self.scheduler.is_idle() {
            self.rest();
            // read before the queue: what was submitted before the shutdown is taken
            let draining = self.shared.draining.load(Ordering::Acquire);
            let command = if draining { self.commands.try_recv().ok() } else { self.commands.recv().ok() };
            let Some(command) = command else { return false };
            self.obey(command);
            self.pacer.set_busy(true);
        }
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        self.sweep(Instant::now());
        if !self.scheduler.is_idle() {
            self.pacer.leave_floor();
            self.step();
        }
        let overdue = self.shared.drain_deadline.lock().is_some_and(|deadline| Instant::now() >= deadline);
        !overdue || self.scheduler.is_idle()
    }

    /// Idle: lets everything go and checks the books.
    fn rest(&mut self) {
        self.stepper.forget();
        self.audit();
        // who sees that nothing runs finds figures that say so
        self.observe();
        self.pacer.set_busy(false);
    }

    /// Nobody holds a page now: all must be there, and shared ones must hold what they held when they were first shared. If
    /// not, nothing that is cached can be trusted, and a lost page would shrink the cache for ever: all are freed.
    fn audit(&mut self) {
        let mut problem = self.scheduler.check().err();
        if problem.is_none() {
            let changed =
                |(page, sum): (u32, u64)| self.stepper.checksum(page).is_some_and(|now| now != sum).then_some(page);
            let changed = self.scheduler.sealed(AUDITED).into_iter().find_map(changed);
            problem = changed.map(|page| format!("page {page} was written after it had been shared"));
        }
        let Some(problem) = problem else { return };
        tracing::error!(problem, "the key-value cache is not as it must be; it is emptied");
        self.metrics.integrity_failures.increment(1);
        self.shared.integrity_failures.fetch_add(1, Ordering::Relaxed);
        self.scheduler.reset_pages();
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(request) => self.take(*request),
            Command::Wake => {}
            Command::EndTenant(tenant, _done) => self.end_tenant(&tenant),
            #[cfg(test)]
            Command::Hold(gate) => gate.into_iter().for_each(drop),
            #[cfg(test)]
            Command::Meddle(meddle) => meddle(&mut self.scheduler, &mut self.stepper),
            #[cfg(test)]
            Command::Guess(guess) => {
                self.guess = guess;
                self.scheduler.trust_drafts();
            }
            #[cfg(test)]
            Command::GuessAsEver(guess) => self.guess = guess,
        }
    }

    fn end_tenant(&mut self, tenant: &TenantId) {
        let own = |s: &Sequence| s.request.tenant.as_ref() == Some(tenant);
        let ids: Vec<SeqId> = self.sequences.iter().filter(|(_, s)| own(s)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.fail(id, EngineError::TenantEnded));
        self.scheduler.forget_pages(PageOwner::of(tenant));
    }

    fn take(&mut self, request: Request) {
        let id = self.next;
        self.next += 1;
        let mut sequence = Sequence::new(request, &self.base.sites, self.prefix_cache);
        match self.scheduler.submit(id, sequence.delta_id(), sequence.demand()) {
            Ok(()) => drop(self.sequences.insert(id, sequence)),
            Err(e) => sequence.fail(EngineError::Internal(e.to_string())),
        }
    }

    /// Drops sequences that nobody waits for and fails those whose deadline passed, waiting or running.
    fn sweep(&mut self, now: Instant) {
        let gone: Vec<SeqId> =
            self.sequences.iter().filter(|(_, s)| s.request.events.is_closed()).map(|(id, _)| *id).collect();
        gone.into_iter().for_each(|id| drop(self.retire(id)));
        let late: Vec<SeqId> = self
            .sequences
            .iter()
            .filter(|(_, s)| s.request.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            let waited = self.sequences.get(&id).map(|s| now.saturating_duration_since(s.request.arrived));
            self.fail(id, EngineError::DeadlineExceeded(waited.unwrap_or_default()));
        }
    }

    /// The one way out: pages go back, lease and permit fall with the sequence.
    fn retire(&mut self, id: SeqId) -> Option<Sequence> {
        self.scheduler.remove(id);
        let sequence = self.sequences.remove(&id);
        if sequence.as_ref().is_some_and(|s| s.request.delta.is_some()) {
            self.stepper.forget();
        }
        sequence
    }

    fn fail(&mut self, id: SeqId, error: EngineError) {
        if let Some(sequence) = self.retire(id) {
            tracing::debug!(request = sequence.request.id, %error, "request failed");
            sequence.fail(error);
        }
    }

    fn step(&mut self) {
        let start = Instant::now();
        let mut plan = self.scheduler.plan();
        for id in &plan.preempted {
            self.metrics.preemptions.increment(1);
            self.shared.preemptions.fetch_add(1, Ordering::Relaxed);
            self.sequences.get_mut(id).into_iter().for_each(Sequence::restart);
        }
        if plan.shares.is_empty() {
            // cannot be, says the scheduler's property test; if it were, this thread would spin
            tracing::error!("no sequence can go on");
            let ids: Vec<SeqId> = self.sequences.keys().copied().collect();
            ids.into_iter().for_each(|id| self.fail(id, EngineError::Internal("no sequence can go on".into())));
            return;
        }
        let over = self.begin_constraints(&plan.shares);
        self.group_by_delta(&mut plan);
        let mut next_tokens = 0;
        for share in &plan.shares {
            if let Some(sequence) = self.sequences.get_mut(&share.id)
                && let Some(Begin { first, shares, found, missing }) = sequence.begin(share.context, start)
            {
                if first {
                    let waited = start.saturating_duration_since(sequence.request.arrived);
                    self.metrics.queue_wait.record(waited.as_secs_f64());
                }
                let prompt = if first { sequence.prompt_tokens() } else { 0 };
                self.metrics.prompt_tokens.increment(prompt as u64);
                if shares {
                    self.metrics.cache_hits.increment(found as u64);
                    self.metrics.cache_misses.increment(missing as u64);
                    self.shared.cache_hits.fetch_add(found as u64, Ordering::Relaxed);
                    self.shared.cache_misses.fetch_add(missing as u64, Ordering::Relaxed);
                }
            }
        }
        match self.compute(&plan.shares) {
            Ok((got, distinct)) => {
                self.metrics.distinct_deltas.record(distinct as f64);
                next_tokens = self.settle(&plan.shares, got, over);
                self.look_ahead();
                self.draft(&plan.shares);
            }
            Err(reason) => {
                tracing::error!(reason, sequences = plan.shares.len(), "a step failed");
                self.stepper.forget();
                plan.shares.iter().for_each(|share| self.scheduler.spoil(share));
                for share in &plan.shares {
                    self.fail(share.id, EngineError::Internal(reason.clone()));
                }
            }
        }
        self.metrics.batch_rows.record(plan.rows() as f64);
        self.metrics.step_seconds.record(start.elapsed().as_secs_f64());
        self.pacer.stepped(plan.rows(), next_tokens);
        self.shared.steps.fetch_add(1, Ordering::Relaxed);
        self.observe();
    }

    /// Puts rows of one delta side by side, so that they make one range; order is otherwise kept.
    fn group_by_delta(&self, plan: &mut StepPlan) {
        let delta = |share: &Share| self.sequences.get(&share.id).and_then(Sequence::delta_id);
        let mut first = HashMap::new();
        for (i, share) in plan.shares.iter().enumerate() {
            first.entry(delta(share)).or_insert(i);
        }
        plan.shares.sort_by_key(|share| first.get(&delta(share)).copied());
    }

    /// Runs the forward. A panic in it is an error of this step.
    fn compute(&mut self, shares: &[Share]) -> Result<(Vec<Got>, usize), String> {
        self.reorder(shares)?;
        let (scheduler, sequences) = (&self.scheduler, &self.sequences);
        let task = |share: &Share| {
            let sequence = sequences.get(&share.id).ok_or_else(|| format!("sequence {} is unknown", share.id))?;
            let slots = scheduler.slots(share.id, share.branch, share.context + share.len);
            Ok(Task { share: *share, sequence, slots, memory: scheduler.memory_slots(share.id) })
        };
        let tasks = shares.iter().map(task).collect::<Result<Vec<_>, String>>()?;
        let (stepper, device) = (&mut self.stepper, &self.base.device);
        let (halves, activations) = (self.halves, self.activations);
        let run = || ops::permitting(halves, || ops::with_activations(activations, || stepper.run(&tasks)));
        // a torn value could only be the compiled batch, which is forgotten after an error
        // a device's context may be another thread, so what is permitted is said inside
        computed(|| device.with_context(run))
    }

    /// Gives the beams of this step the keys and values that they go on from, and takes pages back of beams that are no more.
    fn reorder(&mut self, shares: &[Share]) -> Result<(), String> {
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for share in shares.iter().filter(|share| share.branch == 0) {
            let Some(sequence) = self.sequences.get_mut(&share.id).filter(|s| s.candidates().is_some()) else {
                continue;
            };
            let (moves, own) = sequence.moves();
            let common = self.scheduler.common(share.id);
            for each in moves {
                let slots = |branch| self.scheduler.slots(share.id, branch, share.context);
                let skipped = if each.whole { common } else { own };
                from.extend(slots(each.from).iter().skip(skipped));
                to.extend(slots(each.to).iter().skip(skipped));
            }
            sequence.moved();
        }
        let (stepper, device) = (&self.stepper, &self.base.device);
        computed(|| device.with_context(|| stepper.copy(&from, &to)))?;
        shares.iter().filter(|share| share.branch == 0).for_each(|share| self.scheduler.trim(share.id));
        Ok(())
    }

    /// Hands results to their sequences, and ends those whose constraints were `over` at their beginning. How many have another
    /// token now.
    fn settle(&mut self, shares: &[Share], mut got: Vec<Got>, mut over: HashMap<SeqId, Look>) -> usize {
        let now = Instant::now();
        let mut ahead = self.take_drafts(shares, &mut got, now);
        let mut next_tokens = 0;
        for (share, got) in shares.iter().zip(got) {
            let Some(sequence) = self.sequences.get_mut(&share.id) else { continue };
            if let Some(look) = over.remove(&share.id) {
                let share = self.scheduler.keep(share, 0);
                self.publish(&share);
                self.conclude(share.id, look);
                continue;
            }
            let (forced, taken) = (sequence.is_forced(), ahead.remove(&share.id));
            match taken.unwrap_or_else(|| sequence.take(got, share.completes, now)) {
                Ok((fate, tick)) => {
                    let tokens = tick.map_or(0, |tick| tick.tokens);
                    let whole = share;
                    let share = &self.scheduler.keep(whole, tokens);
                    if forced {
                        self.metrics.drafts_forced.increment(share.drafts as u64);
                    } else {
                        self.metrics.drafts_accepted.increment(share.drafts as u64);
                        self.metrics.drafts_rejected.increment((whole.drafts - share.drafts) as u64);
                    }
                    // what a failure left in its pages nobody else is to find
                    if !matches!(fate, Fate::Fails(_)) {
                        self.publish(share);
                    }
                    match tick {
                        Some(tick) if tick.first => self.metrics.time_to_first_token.record(tick.seconds),
                        // tokens that come together took a part of the time each
                        Some(tick) => {
                            self.metrics.inter_token.record_many(tick.seconds / tokens as f64, tokens);
                            next_tokens += 1;
                        }
                        None => {}
                    }
                    self.metrics.completion_tokens.increment(tokens as u64);
                    match fate {
                        Fate::GoesOn { grew } => self.scheduler.advance(share, grew),
                        Fate::Waits => {}
                        Fate::Branches(open) => {
                            self.scheduler.advance(share, true);
                            self.scheduler.branch(share.id, open);
                        }
                        Fate::Ends => drop(self.retire(share.id)),
                        Fate::Fails(error) => self.fail(share.id, error),
                    }
                }
                Err(error) => self.fail(share.id, error),
            }
        }
        next_tokens
    }

    /// What became of the constrained sequences of which a draft was right. Each looks and chooses for every token more, so they do
    /// it side by side.
    fn take_drafts(&mut self, shares: &[Share], got: &mut [Got], now: Instant) -> HashMap<SeqId, Taken> {
        let open = shares.iter().zip(got).filter(|(_, got)| got.is_open());
        let mut open: HashMap<SeqId, Got> =
            open.map(|(share, got)| (share.id, std::mem::replace(got, Got::Nothing))).collect();
        let due = self.sequences.iter_mut().filter_map(|(id, sequence)| Some((*id, sequence, open.remove(id)?, None)));
        let mut due: Vec<_> = due.collect();
        each(due.iter_mut().collect(), |(_, sequence, got, taken)| {
            // only of one that had its last known position computed there are tokens
            *taken = Some(sequence.take(std::mem::replace(got, Got::Nothing), true, now));
        });
        due.into_iter().filter_map(|(id, _, _, taken)| Some((id, taken?))).collect()
    }

    /// Pages that a share has filled can be found from now on.
    fn publish(&mut self, share: &Share) {
        let Some(sequence) = self.sequences.get_mut(&share.id).filter(|_| share.branch == 0) else { return };
        let more = sequence.next_keys(share.context + share.len);
        for page in self.scheduler.publish(share, more) {
            let sum = self.stepper.checksum(page);
            sum.into_iter().for_each(|sum| self.scheduler.seal(page, sum));
        }
    }

    /// Makes the states of constrained sequences that begin with this step. Those that cannot go on take part in it all the same:
    /// others may read pages that they fill.
    fn begin_constraints(&mut self, shares: &[Share]) -> HashMap<SeqId, Look> {
        let beginning: HashSet<SeqId> = shares.iter().map(|share| share.id).collect();
        let looks = self.look(|id, sequence| beginning.contains(&id) && sequence.is_due(false));
        looks.into_iter().filter(|(_, look)| *look != Ok(true)).collect()
    }

    /// Finds out what constrained sequences may say next: at once for all that got a token in this step. One whose constraint
    /// cannot be kept fails alone, and so does the one with the largest state where all together have grown too large.
    fn look_ahead(&mut self) {
        for (id, look) in self.look(|_, sequence| sequence.is_due(true)) {
            if let Some(sequence) = self.sequences.get(&id) {
                self.scheduler.set_constraint_bytes(id, sequence.constraint_bytes());
            }
            self.conclude(id, look);
        }
        while let Some((id, bytes, limit)) = self.scheduler.largest_constraint() {
            self.fail(id, EngineError::ConstraintMemory { bytes, limit });
        }
    }

    /// Looks at those that are meant, side by side.
    fn look(&mut self, meant: impl Fn(SeqId, &Sequence) -> bool) -> Vec<(SeqId, Look)> {
        let due = self.sequences.iter_mut().filter(|(id, sequence)| meant(**id, sequence));
        let mut looks: Vec<_> = due.map(|(id, sequence)| (*id, sequence, Ok(true))).collect();
        each(looks.iter_mut().collect(), |(_, sequence, look)| *look = sequence.look());
        looks.into_iter().map(|(id, _, look)| (id, look)).collect()
    }

    /// Ends a sequence that has nothing left to say, or cannot know what.
    fn conclude(&mut self, id: SeqId, look: Look) {
        match look {
            Ok(true) => {}
            Ok(false) => self.retire(id).into_iter().for_each(Sequence::end),
            Err(error) => self.fail(id, error),
        }
    }

    /// Finds out or guesses what sequences say next, where they go on; side by side.
    fn draft(&mut self, shares: &[Share]) {
        let go_on: HashSet<SeqId> = shares.iter().filter(|share| share.completes).map(|share| share.id).collect();
        let speculate = self.sequences.iter_mut().filter(|(id, s)| go_on.contains(id) && s.speculates());
        let mut drafts: Vec<_> = speculate.map(|(id, sequence)| (*id, sequence, None)).collect();
        let guess = self.guess;
        each(drafts.iter_mut().collect(), |(_, sequence, drafts)| *drafts = Some(sequence.draft(guess)));
        for (id, _, found) in drafts {
            if let Some((drafts, chance)) = found.filter(|(drafts, _)| *drafts > 0) {
                self.scheduler.propose(id, drafts, chance);
            }
        }
    }

    fn observe(&self) {
        self.metrics.observe(&self.scheduler, &self.pacer);
        let shared = &self.shared;
        shared.running.store(self.scheduler.running(), Ordering::Relaxed);
        shared.waiting.store(self.scheduler.waiting(), Ordering::Relaxed);
        let pool = self.scheduler.pool();
        shared.pages_used.store(pool.used(), Ordering::Relaxed);
        shared.pages_cached.store(pool.cached(), Ordering::Relaxed);
        let before = shared.evictions.swap(pool.evictions(), Ordering::Relaxed);
        self.metrics.cache_evictions.increment(pool.evictions().saturating_sub(before));
    }
}
