//! The scheduler: which rows of which sequences make up the next step. A pure state machine: no tensors, no clock.
//!
//! One rule for prefill and decode: every sequence has `computed < total` positions, and a step hands out a budget of
//! rows. First come sequences that miss one position (decode), then those that miss more (prefill, in chunks), then new
//! ones, which take turns by what their tenants were served (`fair`, `newcomers`). A new sequence gets the pages of all its
//! known positions at once, so only decode can run out of pages; it then takes those of the youngest, the one that began
//! last, which starts over later, ahead of all new ones. The oldest sequence can always go on, so everything ends.
//!
//! A sequence of an encoder-decoder has a source, too: its encoder runs whole in the step in which the sequence begins (again,
//! if it lost its pages), and the source's keys and values have pages of their own, for as long as the sequence runs.
//!
//! A beam search is one sequence with several branches: one while its prompt is computed, then one per open beam, each with
//! pages of its own. All of its branches are in a step or none is; it has as many places as it may have branches, and where it
//! loses its pages it starts over with one. What a source gives is read by all of them.
//!
//! A sequence may have drafts (`drafts`): guesses of its next tokens, whose rows go into the step behind that of its last known
//! position, where rows and free pages are left when all others have theirs, and where they are likely enough to be right.
//!
//! Pages may be shared (`pages`): a sequence begins behind the whole pages that are there of its tokens already, and only
//! counts as many pages as it takes from the pool. What is cached makes room before anybody waits or loses pages. One of whose
//! tokens another is filling pages right now waits for these (`followers`).
//!
//! Where outputs are constrained, their states take memory from when they begin, in all at most `constraint_bytes` (`constraints`).
//!
//! A step serves at most `max_deltas` distinct deltas. When more want to run, those that waited longest go first, counted
//! from their last step, or from when they could first have begun: each is served within a round, however many new ones come.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::{
    ids::DeltaId,
    kv::{PAGE_SIZE, PagePool, PageTable},
};

mod constraints;
mod drafts;
mod fair;
mod followers;
mod newcomers;
mod pages;
mod parts;

use fair::{Accounts, OUTPUT, Payer};

pub(super) use parts::{Chance, Claim, Demand, Names, NeverFits, Share, StepPlan};

/// The engine's own number of a sequence; never used twice. Smaller numbers arrived earlier.
pub(super) type SeqId = u64;

/// Limits of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Most rows of a step; an encoder's sequence that is longer runs alone.
    pub(super) max_batch_tokens: usize,
    /// Most sequences that hold pages at a time; a beam search counts as many as it may have branches.
    pub(super) max_sequences: usize,
    /// Most distinct deltas in a step; the bare base does not count.
    pub(super) max_deltas: usize,
    /// Most rows of one sequence in a step.
    pub(super) prefill_chunk: usize,
    /// Pages of the cache; `None` for a base without one (an encoder), whose sequences are never split.
    pub(super) pages: Option<usize>,
    /// Most bytes of all states of constraints.
    pub(super) constraint_bytes: u64,
    /// Most drafts of a step: each has a row of logits.
    pub(super) max_drafts: usize,
    /// What a step costs whatever is in it, in rows: a draft has to be the likelier the more rows there are beside these.
    pub(super) free_rows: usize,
}

impl Limits {
    /// Most positions that one sequence can have.
    pub(super) fn max_positions(&self) -> usize {
        self.pages.map_or(usize::MAX, |pages| pages.saturating_mul(PAGE_SIZE))
    }
}

#[derive(Debug)]
struct Entry {
    delta: Option<DeltaId>,
    payer: Payer,
    priority: i32,
    /// Its place in the order in which sequences began; `None` until it has.
    ticket: Option<u64>,
    /// By which step those that overtake it must have ended, once it was held back.
    until: Option<u64>,
    /// Guesses of what follows its last known position; with its next share, as many of them as there is room for.
    drafts: usize,
    /// How likely each of them is right if those before it are.
    chance: Chance,
    /// By which step it begins on its own, once it waited for pages that another is about to fill.
    follows: Option<u64>,
    /// Whether its last known position gives a token.
    generates: bool,
    /// Known positions when its last charged token was generated.
    paid: usize,
    /// Positions that are known (virtual rows, prompt and output so far).
    total: usize,
    computed: usize,
    /// Cache slots ahead of theirs, which are in pages of their own.
    reserved: usize,
    /// Those pages.
    prefix: PageTable,
    /// Whether they are to be filled with its next share.
    keys_due: bool,
    /// Pages of each branch. One table, but for a beam search.
    branches: Vec<PageTable>,
    names: Names,
    /// Whole pages, from the first on, that have got their names, or need none.
    published: usize,
    /// Branches that it has now, or is to have with its next share.
    open: usize,
    /// Most of them.
    width: usize,
    /// Positions that were known at first.
    given: usize,
    /// Most positions that it may come to.
    most: usize,
    /// A beam search that lost its pages to an older sequence: begun again as soon as its prompt has room, it would lose
    /// them again.
    starts_over: bool,
    /// Positions of its encoder; 0 without one.
    source: usize,
    /// Cache slots ahead of theirs.
    source_reserved: usize,
    /// Pages of both.
    memory: PageTable,
    /// Bytes of its constraint's state, which is there from when it begins.
    constraint_bytes: u64,
}

impl Entry {
    /// Cache slots that its source needs.
    fn memory_slots(&self) -> usize {
        self.source_reserved + self.source
    }

    /// Pages that it holds.
    fn pages(&self) -> usize {
        self.branches.iter().chain([&self.memory, &self.prefix]).map(PageTable::len).sum()
    }
}

/// All sequences that are not finished.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: Limits,
    pool: PagePool,
    /// Hold pages, by arrival.
    running: BTreeMap<SeqId, Entry>,
    /// Hold none, by arrival.
    waiting: BTreeMap<SeqId, Entry>,
    /// Those of them that have begun and lost their pages, by ticket.
    returning: BTreeMap<u64, SeqId>,
    /// The next ticket.
    tickets: u64,
    fair: Accounts,
    /// When each delta was last in a step, or could first have been; only of deltas that sequences here use.
    served: HashMap<DeltaId, u64>,
    step: u64,
}

impl Scheduler {
    /// An empty scheduler.
    pub(super) fn new(limits: Limits) -> Self {
        let at_least_one = |n: usize| n.max(1);
        let limits = Limits {
            max_batch_tokens: at_least_one(limits.max_batch_tokens),
            // so decode alone never uses up the rows of a step
            max_sequences: limits.max_sequences.clamp(1, at_least_one(limits.max_batch_tokens)),
            max_deltas: at_least_one(limits.max_deltas),
            prefill_chunk: at_least_one(limits.prefill_chunk),
            pages: limits.pages,
            constraint_bytes: limits.constraint_bytes,
            max_drafts: limits.max_drafts,
            free_rows: limits.free_rows,
        };
        let pool = PagePool::new(limits.pages.unwrap_or(0));
        Self {
            limits,
            pool,
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            returning: BTreeMap::new(),
            tickets: 0,
            fair: Accounts::default(),
            served: HashMap::new(),
            step: 0,
        }
    }

    /// Queues a sequence. Ids must grow.
    ///
    /// # Errors
    /// A sequence that the cache can never hold.
    pub(super) fn submit(&mut self, id: SeqId, delta: Option<DeltaId>, demand: Demand) -> Result<(), NeverFits> {
        let Demand { total, most, reserved, source, source_reserved, width, names, generates, constraint_bytes, claim } =
            demand;
        debug_assert!(total > 0 && total <= most && width > 0);
        let limit = self.limits.max_positions();
        let memory = source.saturating_add(source_reserved).next_multiple_of(PAGE_SIZE);
        let mut own = most;
        if width > 1 {
            own = own.div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE).saturating_mul(width);
        }
        let positions = own.saturating_add(reserved.next_multiple_of(PAGE_SIZE)).saturating_add(memory);
        if positions > limit {
            return Err(NeverFits::Positions { positions, limit });
        }
        if width > self.limits.max_sequences {
            return Err(NeverFits::Width { width, limit: self.limits.max_sequences });
        }
        if constraint_bytes > self.limits.constraint_bytes {
            return Err(NeverFits::Constraint { bytes: constraint_bytes, limit: self.limits.constraint_bytes });
        }
        let (branches, memory) = (vec![PageTable::default()], PageTable::default());
        self.fair.join(&claim.tenant, claim.weight, (claim.priority, id));
        let entry = Entry {
            delta,
            payer: claim.tenant,
            priority: claim.priority,
            ticket: None,
            until: None,
            drafts: 0,
            chance: Chance::EVEN,
            follows: None,
            generates,
            paid: 0,
            total,
            computed: 0,
            reserved,
            prefix: PageTable::default(),
            keys_due: false,
            branches,
            names,
            published: 0,
            open: 1,
            width,
            given: total,
            most,
            starts_over: false,
            source,
            source_reserved,
            memory,
            constraint_bytes,
        };
        self.waiting.insert(id, entry);
        Ok(())
    }

    /// Sequences that hold pages; branches count.
    pub(super) fn running(&self) -> usize {
        self.running.values().map(|e| e.open).sum()
    }

    /// Places that nobody has.
    fn places(&self) -> usize {
        self.limits.max_sequences.saturating_sub(self.running.values().map(|e| e.width).sum())
    }

    /// Sequences that wait for admission.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Tenants that have sequences among those.
    pub(super) fn waiting_tenants(&self) -> usize {
        self.fair.waiting_tenants()
    }

    /// Whether nothing is left to do.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// All pages.
    pub(super) fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// A beam search has so many open beams now: its next share has a row of each. Pages of those that are no more are
    /// kept until [`Self::trim`].
    pub(super) fn branch(&mut self, id: SeqId, open: usize) {
        if let Some(entry) = self.running.get_mut(&id) {
            entry.open = open.clamp(1, entry.width);
        }
    }

    /// Chooses the next step's rows and takes the pages they need.
    pub(super) fn plan(&mut self) -> StepPlan {
        let mut plan = StepPlan::default();
        // with more deltas than places, a turn may fall to sequences that all lack pages; the oldest one never does
        for _ in 0..=self.running.len() + self.waiting.len() {
            self.plan_turn(&mut plan);
            if !plan.shares.is_empty() {
                break;
            }
        }
        plan
    }

    fn plan_turn(&mut self, plan: &mut StepPlan) {
        self.step += 1;
        let line = self.line();
        let mut allowed = self.allowed_deltas(&line);
        let mut budget = self.limits.max_batch_tokens;
        self.plan_decode(&allowed, &mut budget, plan);
        self.plan_prefill(&allowed, &mut budget, plan);
        self.admit(&line, &mut allowed, &mut budget, plan);
        // last: what is known goes ahead of what is guessed
        self.plan_drafts(budget, plan);
        self.served.extend(allowed.into_iter().map(|delta| (delta, self.step)));
    }

    /// A share was computed, of which everything is kept; `grew` says that a token was appended to the sequence.
    pub(super) fn advance(&mut self, share: &Share, grew: bool) {
        if let Some(entry) = self.running.get_mut(&share.id) {
            entry.computed = share.context + share.len;
            entry.total += usize::from(grew);
            debug_assert!(entry.computed <= entry.total);
        }
    }

    /// Forgets a sequence and takes its pages back.
    pub(super) fn remove(&mut self, id: SeqId) {
        let removed = self.running.remove(&id).or_else(|| self.waiting.remove(&id));
        let Some(mut entry) = removed else { return };
        match entry.ticket {
            Some(ticket) => {
                self.returning.remove(&ticket);
                self.fair.end(&entry.payer);
            }
            None => self.fair.give_up(&entry.payer, (entry.priority, id)),
        }
        pages::release(&mut self.pool, &mut entry);
        if let Some(delta) = entry.delta {
            let mut all = self.running.values().chain(self.waiting.values());
            if !all.any(|e| e.delta == Some(delta)) {
                self.served.remove(&delta);
            }
        }
    }

    /// Those of the running sequences that are meant, in the order in which they began.
    fn in_order(&self, meant: impl Fn(&Entry) -> bool) -> Vec<SeqId> {
        let mut found: Vec<_> = self.running.iter().filter(|(_, e)| meant(e)).map(|(id, e)| (e.ticket, *id)).collect();
        found.sort_unstable();
        found.into_iter().map(|(_, id)| id).collect()
    }

    /// Sequences that miss one position, oldest first; each may need one more page.
    fn plan_decode(&mut self, allowed: &HashSet<DeltaId>, budget: &mut usize, plan: &mut StepPlan) {
        let decoding = |e: &Entry| e.computed > 0 && e.total - e.computed == 1;
        for id in self.in_order(decoding) {
            if *budget == 0 {
                return;
            }
            // an older sequence may have taken its pages just now
            let Some(entry) = self.running.get(&id) else { continue };
            if !may_run(entry, allowed) || !self.cover(id, plan) {
                continue;
            }
            self.share(id, budget, plan);
            // all branches have a row: places keep decode within a step
            let Some(entry) = self.running.get(&id) else { continue };
            let Some(first) = plan.shares.last().copied() else { continue };
            plan.shares.extend((1..entry.open).map(|branch| Share { branch, ..first }));
            *budget = budget.saturating_sub(entry.open - 1);
        }
    }

    /// Sequences that miss more than one position, oldest first. Their pages were taken at admission.
    fn plan_prefill(&mut self, allowed: &HashSet<DeltaId>, budget: &mut usize, plan: &mut StepPlan) {
        let missing = |e: &Entry| e.total > e.computed && !(e.computed > 0 && e.total - e.computed == 1);
        for id in self.in_order(|e| missing(e) && may_run(e, allowed)) {
            if *budget == 0 {
                return;
            }
            self.share(id, budget, plan);
        }
    }

    /// Gives a running sequence its rows of this step.
    fn share(&mut self, id: SeqId, budget: &mut usize, plan: &mut StepPlan) {
        let Some(entry) = self.running.get_mut(&id) else { return };
        let missing = entry.total - entry.computed;
        let encode = if entry.computed == 0 { entry.source } else { 0 };
        *budget = budget.saturating_sub(encode);
        let len = match self.limits.pages {
            Some(_) => missing.min(self.limits.prefill_chunk).min((*budget).max(1)),
            None => missing,
        };
        *budget = budget.saturating_sub(len);
        let (context, keys_due) = (entry.computed, std::mem::take(&mut entry.keys_due));
        let completes = len == missing;
        plan.shares.push(Share { id, branch: 0, context, len, drafts: 0, encode, keys_due, completes });
        // a search that starts over is charged for what is new
        if len == missing && entry.generates && entry.total > entry.paid {
            entry.paid = entry.total;
            self.fair.charge(&entry.payer, OUTPUT * entry.open as u64);
        }
    }

    fn preempt(&mut self, id: SeqId, plan: &mut StepPlan) {
        let Some(mut entry) = self.running.remove(&id) else { return };
        pages::release(&mut self.pool, &mut entry);
        if entry.width > 1 {
            // nothing of a search was told yet: it starts over
            (entry.total, entry.open, entry.starts_over) = (entry.given, 1, true);
        }
        if let Some(ticket) = entry.ticket {
            self.returning.insert(ticket, id);
        }
        self.waiting.insert(id, entry);
        plan.preempted.push(id);
    }
}

fn may_run(entry: &Entry, allowed: &HashSet<DeltaId>) -> bool {
    entry.delta.is_none_or(|d| allowed.contains(&d))
}

#[cfg(test)]
mod tests;
