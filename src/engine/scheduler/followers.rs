//! Prompts that begin alike and come together: the pages that they have in common are computed once.
//!
//! Pages can be found when they are whole. A newcomer that lacks pages which a running sequence is about to fill waits for them:
//! it would compute the same rows at the same time, and both would take longer. It begins as soon as they are there, or when
//! nobody fills them any more (who did so has failed, was cancelled or lost its pages). Names of pages are digests of everything
//! ahead of them, of the tenant and the delta, too: so whoever has a page's name has all those before it.
//!
//! Who fills them began earlier and so has its rows first in each step; that it is not done in twice the steps which the pages take
//! can only be because long prompts of others were before it. Then the newcomer begins on its own. This bound is set once.

use super::{Entry, Scheduler, SeqId};
use crate::kv::PAGE_SIZE;

/// Fewer pages than these are not waited for: a step lost costs as much as their rows.
const PAGES: usize = 2;
/// Steps that are waited at least.
const STEPS: usize = 8;

impl Scheduler {
    /// Until which step at most a newcomer waits for pages that a running sequence is about to fill; `None`: it does not.
    pub(super) fn follows(&self, id: SeqId) -> Option<u64> {
        let entry = self.waiting.get(&id).filter(|e| e.ticket.is_none() && self.limits.pages.is_some())?;
        // names are there to be shared: without any, nothing is looked for
        if entry.wanted().len() < PAGES || entry.follows.is_some_and(|until| until <= self.step) {
            return None;
        }
        let pages = self.coming(entry);
        let steps = STEPS + 2 * (pages * PAGE_SIZE).div_ceil(self.limits.prefill_chunk);
        let until = self.step.saturating_add(steps.saturating_mul(self.round()) as u64);
        (pages >= PAGES).then(|| entry.follows.unwrap_or(until))
    }

    /// It does.
    pub(super) fn follow(&mut self, id: SeqId, until: u64) {
        if let Some(entry) = self.waiting.get_mut(&id) {
            entry.follows.get_or_insert(until);
        }
    }

    /// How many of the pages that a waiting sequence lacks, from the first on, a running one is about to fill.
    fn coming(&self, waiting: &Entry) -> usize {
        let there = self.there(waiting) / PAGE_SIZE;
        let lacks = waiting.wanted().get(there..).unwrap_or_default();
        let of = |running: &Entry| {
            // what it has filled already, and nobody finds, it does not fill again
            let due = running.names.rows.get(there..).filter(|_| running.published <= there).unwrap_or_default();
            due.iter().zip(lacks).take_while(|(due, lacks)| due == lacks).count()
        };
        self.running.values().map(of).max().unwrap_or(0)
    }
}
