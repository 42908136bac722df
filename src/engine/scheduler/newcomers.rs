//! Who begins: the line of those that wait, the deltas of a step, and what happens behind one that has no room yet.
//!
//! Ahead of all come sequences that lost their pages, then newcomers as [`super::fair`] orders them. One whose delta has no
//! turn in this step is passed over, and its pages and places are kept for it: its turn comes within a round of the deltas.
//!
//! One that lacks places or pages is held back. By the draining rule, it is then overtaken only by those that end within
//! 1.2 times what the running ones that it waits for take anyway, and that fit with all they may grow to. This time is
//! counted once, from when it was first held back, so that a stream of short ones cannot stretch it; after it nobody
//! overtakes, and what runs drains. Nobody ever overtakes one that lost its pages.
//!
//! One that waits for pages that another is filling ([`super::followers`]) is passed over like one that has no turn, and nothing
//! is kept for it.

use std::collections::{HashMap, HashSet};

use super::{Entry, Scheduler, SeqId, StepPlan, may_run, pages};
use crate::{ids::DeltaId, kv::pages_for};

/// Sequences that are looked at beyond those for which there may be places: behind one that is held back.
const LOOKAHEAD: usize = 16;

impl Entry {
    /// What it is charged when it begins: the tokens of its input that are not there already.
    fn input(&self, there: usize) -> u64 {
        (self.source + self.total.saturating_sub(there)) as u64
    }
}

impl Scheduler {
    /// Those that may begin in this step, in the order in which they do; newcomers whose constraints' states have no room are none,
    /// nor are those that wait for pages that another is filling.
    pub(super) fn line(&mut self) -> Vec<SeqId> {
        let mut following = Vec::new();
        let line = {
            let places = self.places();
            let returning = self.returning.values().copied();
            let most = if places == 0 { 1 } else { places + LOOKAHEAD };
            let cost = |id: SeqId| self.waiting.get(&id).map_or(0, |e| e.input(self.there(e)));
            let mut room = self.room_for_constraints();
            let may = |id: SeqId| match self.follows(id) {
                Some(until) => {
                    following.push((id, until));
                    false
                }
                None => room(id),
            };
            returning.chain(self.fair.line(most, may, cost)).take(most).collect()
        };
        following.into_iter().for_each(|(id, until)| self.follow(id, until));
        line
    }

    /// Deltas of this step: all that want to run, or those that waited longest.
    pub(super) fn allowed_deltas(&mut self, line: &[SeqId]) -> HashSet<DeltaId> {
        let (mut places, mut free) = (self.places(), self.pool.available());
        let waiting = line.iter().filter_map(|id| self.waiting.get_key_value(id));
        let admissible = waiting.take_while(|(_, e)| {
            let need = self.need(e);
            let fits = need <= free && e.width <= places;
            (free, places) = (free.saturating_sub(need), places.saturating_sub(e.width));
            fits
        });
        // delta -> its oldest sequence
        let mut wanted: HashMap<DeltaId, SeqId> = HashMap::new();
        for (&id, entry) in self.running.iter().chain(admissible) {
            if let Some(delta) = entry.delta {
                let oldest = wanted.entry(delta).or_insert(id);
                *oldest = id.min(*oldest);
            }
        }
        // one that is new here waits from now on, behind all that have waited longer
        let new = self.step.saturating_sub(1);
        let mut order: Vec<(u64, SeqId, DeltaId)> =
            wanted.into_iter().map(|(d, id)| (*self.served.entry(d).or_insert(new), id, d)).collect();
        if order.len() > self.limits.max_deltas {
            order.sort_unstable();
            order.truncate(self.limits.max_deltas);
        }
        order.into_iter().map(|(_, _, d)| d).collect()
    }

    /// Begins those of the line that have a turn and room.
    pub(super) fn admit(
        &mut self,
        line: &[SeqId],
        allowed: &mut HashSet<DeltaId>,
        budget: &mut usize,
        plan: &mut StepPlan,
    ) {
        // pages just taken away must not be handed to newcomers before their owner is back
        if !plan.preempted.is_empty() {
            return;
        }
        let split = self.limits.pages.is_some();
        let (mut places, mut kept) = (self.places(), 0);
        // by which step those that overtake must have ended
        let mut until = None;
        for &id in line {
            // the one that it waits for may have begun just now
            if let Some(until) = self.follows(id) {
                self.follow(id, until);
                continue;
            }
            let Some(entry) = self.waiting.get(&id) else { continue };
            if *budget == 0 {
                return;
            }
            let (width, free) = (entry.width, self.pool.available().saturating_sub(kept));
            if let Some(until) = until {
                let turn = may_run(entry, allowed) || allowed.len() < self.limits.max_deltas;
                let room = turn && width <= places && self.grown(entry) <= free;
                if !room || self.step + self.steps_left(entry, self.round()) > until {
                    continue;
                }
                allowed.extend(entry.delta);
                places -= width;
            } else {
                let pages = self.need(entry);
                if width > places || pages > free {
                    if entry.ticket.is_some() || !split {
                        return;
                    }
                    until = Some(self.hold_back(id));
                    continue;
                }
                places -= width;
                if !may_run(entry, allowed) {
                    kept += pages;
                    continue;
                }
            }
            if !split && entry.total > *budget && !plan.shares.is_empty() {
                return;
            }
            // a source is not split either: one in a step may go over the budget, so that none waits for ever
            if split && entry.source >= *budget && plan.shares.iter().any(|s| s.encode > 0) {
                return;
            }
            let Some(entry) = self.waiting.get_mut(&id) else { continue };
            if split && !pages::begin(&mut self.pool, entry) {
                return;
            }
            self.begin(id);
            self.share(id, budget, plan);
        }
    }

    /// A sequence has got its pages. What is there of its input already is not charged, nor is what it computes again.
    fn begin(&mut self, id: SeqId) {
        let Some(mut entry) = self.waiting.remove(&id) else { return };
        match entry.ticket {
            Some(ticket) => drop(self.returning.remove(&ticket)),
            None => {
                entry.ticket = Some(self.tickets);
                self.tickets += 1;
                self.fair.begin(&entry.payer, (entry.priority, id));
                self.fair.charge(&entry.payer, entry.input(entry.computed));
            }
        }
        self.running.insert(id, entry);
    }

    /// By which step those that overtake a sequence without room must have ended.
    fn hold_back(&mut self, id: SeqId) -> u64 {
        let Some(entry) = self.waiting.get(&id) else { return self.step };
        if let Some(until) = entry.until {
            return until;
        }
        let (need, round) = (self.need(entry), self.round());
        let mut ends: Vec<(u64, usize, usize)> =
            self.running.values().map(|e| (self.steps_left(e, round), e.width, e.pages())).collect();
        ends.sort_unstable();
        let (mut places, mut free, mut wait) = (self.places(), self.pool.available(), 0);
        for (steps, width, pages) in ends {
            if places >= entry.width && free >= need {
                break;
            }
            (places, free, wait) = (places + width, free + pages, steps);
        }
        let until = self.step + wait + wait / 5;
        if let Some(entry) = self.waiting.get_mut(&id) {
            entry.until = Some(until);
        }
        until
    }

    /// Steps in which each delta that runs now has a turn.
    pub(super) fn round(&self) -> usize {
        let distinct: HashSet<DeltaId> = self.running.values().filter_map(|e| e.delta).collect();
        distinct.len().div_ceil(self.limits.max_deltas).max(1)
    }

    /// Steps that a sequence takes at most from now on, this one included, with so many to a round.
    fn steps_left(&self, e: &Entry, round: usize) -> u64 {
        let chunks = e.total.saturating_sub(e.computed).div_ceil(self.limits.prefill_chunk);
        round.saturating_mul(chunks.saturating_add(e.most.saturating_sub(e.total))) as u64
    }

    /// Pages that a waiting sequence takes at most until it ends.
    fn grown(&self, e: &Entry) -> usize {
        e.width * pages_for(e.most) + pages_for(e.reserved) + pages_for(e.memory_slots())
    }
}
