//! Drafts: rows of guessed tokens behind a sequence's last known position. They get what is left of a step when everybody has
//! what is theirs: rows of the budget and free pages, not cached ones, and nobody waits or loses pages for them. All of a
//! step are at most `max_drafts`, since each has a row of logits there. What of them turns out wrong is forgotten before anybody
//! could find it.
//!
//! A row more makes a step longer, also for all others. A step of `r` rows takes about as long as `r + free_rows` rows do, so that
//! its time gives `r / (r + free_rows)` tokens per row: a draft that is less likely to be right costs more than it gives. Alone, a
//! sequence has drafts that are right now and then; in a step that is full, only those that are nearly always right; beside a
//! long prompt, all but none. The likeliest of all sequences come first.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{Chance, Entry, OUTPUT, Scheduler, SeqId, Share, StepPlan};
use crate::kv::PAGE_SIZE;

impl Entry {
    /// Whether drafts may follow its last known position.
    fn has_drafts(&self) -> bool {
        self.generates && self.width == 1
    }
}

impl Scheduler {
    /// There are so many guesses of what follows a sequence's last known position, each of which is as likely right as said if
    /// those before it are.
    pub(in crate::engine) fn propose(&mut self, id: SeqId, drafts: usize, chance: Chance) {
        if let Some(entry) = self.running.get_mut(&id) {
            (entry.drafts, entry.chance) = (drafts, chance);
        }
    }

    /// Takes drafts however unlikely they are to be right.
    #[cfg(test)]
    pub(in crate::engine) fn trust_drafts(&mut self) {
        self.limits.free_rows = usize::MAX;
    }

    /// Puts drafts behind the shares that compute a last known position, with what is left.
    pub(super) fn plan_drafts(&mut self, budget: usize, plan: &mut StepPlan) {
        let counts = self.likeliest_drafts(budget.min(self.limits.max_drafts), plan);
        for (share, count) in plan.shares.iter_mut().zip(counts).filter(|(share, _)| share.completes) {
            let Some(entry) = self.running.get_mut(&share.id).filter(|e| e.has_drafts()) else { continue };
            entry.drafts = 0;
            let Some(pages) = entry.branches.first_mut() else { continue };
            let positions = (pages.len() + self.pool.free()) * PAGE_SIZE;
            let drafts = count.min(positions.saturating_sub(entry.total));
            if drafts > 0 && self.pool.cover(pages, entry.total + drafts) {
                (share.len, share.drafts) = (share.len + drafts, drafts);
            }
        }
    }

    /// How many drafts of each share go into the step: of all that there are, the likeliest ones that pay, at most `left`.
    fn likeliest_drafts(&self, mut left: usize, plan: &StepPlan) -> Vec<usize> {
        let mut rows = plan.rows();
        let mut counts = vec![0; plan.shares.len()];
        let entry = |share: &Share| self.running.get(&share.id).filter(|e| share.completes && e.has_drafts());
        // of equally likely ones, the earlier share's come first
        let first = plan.shares.iter().enumerate().filter_map(|(at, share)| Some((entry(share)?.chance, Reverse(at))));
        let mut next: BinaryHeap<(Chance, Reverse<usize>)> = first.collect();
        while let Some((chance, Reverse(at))) = next.pop() {
            if left == 0 || !chance.pays(rows, self.limits.free_rows) {
                break;
            }
            let (Some(share), Some(count)) = (plan.shares.get(at), counts.get_mut(at)) else { continue };
            let Some(entry) = entry(share) else { continue };
            let chunk = self.limits.prefill_chunk.saturating_sub(share.len);
            if *count < entry.drafts.min(chunk).min(entry.most.saturating_sub(entry.total)) {
                (*count, left, rows) = (*count + 1, left - 1, rows + 1);
                next.push((chance.and(entry.chance), Reverse(at)));
            }
        }
        counts
    }

    /// A share was computed and gave so many tokens, the first of them as it would have without drafts. Rows of drafts that were
    /// not chosen count no more, and pages that only they needed go back. Returns what is kept of the share; the last token
    /// is still to be told by [`Self::advance`]. The tenant pays for what was chosen, as if one by one, and for nothing else.
    pub(in crate::engine) fn keep(&mut self, share: &Share, tokens: usize) -> Share {
        let chosen = tokens.saturating_sub(1).min(share.drafts);
        let kept = Share { len: share.len - (share.drafts - chosen), drafts: chosen, ..*share };
        if share.drafts > 0
            && let Some(entry) = self.running.get_mut(&share.id)
        {
            entry.total += chosen;
            entry.paid = entry.total;
            self.fair.charge(&entry.payer, OUTPUT * chosen as u64);
            entry.branches.iter_mut().for_each(|pages| self.pool.shrink(pages, entry.total));
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, tests::*};
    use super::*;

    /// Sequence 1 of `total` known positions, `most` in the end, that has computed all but the last.
    fn decoding(limits: Limits, total: usize, most: usize) -> Scheduler {
        let mut s = Scheduler::new(limits);
        s.submit(1, None, demand(total - 1, most)).expect("fits");
        go(&mut s);
        s
    }

    /// Rows and drafts of each share of the next step.
    fn planned(s: &mut Scheduler) -> Vec<(SeqId, usize, usize)> {
        s.plan().shares.iter().map(|share| (share.id, share.len, share.drafts)).collect()
    }

    #[test]
    fn drafts_get_what_is_left_of_rows_chunk_and_length() {
        for (limits, most, drafts) in [
            (limits(), 40, 5),
            (Limits { max_batch_tokens: 4, max_sequences: 4, ..limits() }, 40, 3),
            (Limits { prefill_chunk: 3, ..limits() }, 40, 2),
            (Limits { max_drafts: 1, ..limits() }, 40, 1),
            (limits(), 6, 2),
            (limits(), 4, 0),
        ] {
            let mut s = decoding(limits, 4, most);
            s.propose(1, 5, Chance::CERTAIN);
            assert_eq!(planned(&mut s), [(1, 1 + drafts, drafts)], "{limits:?} {most}");
        }
    }

    #[test]
    fn newcomers_and_chunks_go_ahead_of_drafts() {
        let mut s = decoding(Limits { max_batch_tokens: 10, ..limits() }, 4, 40);
        s.submit(2, None, demand(7, 20)).expect("fits");
        s.propose(1, 5, Chance::CERTAIN);
        assert_eq!(planned(&mut s), [(1, 3, 2), (2, 7, 0)]);
    }

    #[test]
    fn all_drafts_of_a_step_are_bounded_together() {
        let mut s = decoding(Limits { max_drafts: 7, ..limits() }, 4, 40);
        s.submit(2, None, demand(3, 40)).expect("fits");
        go(&mut s);
        (1..3).for_each(|id| s.propose(id, 5, Chance::CERTAIN));
        let drafts: Vec<usize> = planned(&mut s).into_iter().map(|(_, _, drafts)| drafts).collect();
        assert_eq!(drafts, [5, 2]);
    }

    #[test]
    fn no_page_is_taken_from_anybody_for_a_draft() {
        // its page has room for one more position, and the other page is the other's
        let mut s = decoding(Limits { pages: Some(2), ..limits() }, PAGE_SIZE - 1, 2 * PAGE_SIZE);
        s.submit(2, None, demand(4, 10)).expect("fits");
        s.propose(1, 5, Chance::CERTAIN);
        assert_eq!(planned(&mut s), [(1, 2, 1), (2, 4, 0)]);
        // nor from those that come next
        let mut s = decoding(Limits { pages: Some(2), ..limits() }, PAGE_SIZE - 1, 2 * PAGE_SIZE);
        s.propose(1, 5, Chance::CERTAIN);
        assert_eq!(planned(&mut s), [(1, 6, 5)]);
        assert_eq!(s.pool.used(), 2);
        let share = Share {
            id: 1,
            branch: 0,
            context: PAGE_SIZE - 2,
            len: 6,
            drafts: 5,
            encode: 0,
            keys_due: false,
            completes: true,
        };
        let kept = s.keep(&share, 2);
        assert_eq!((kept.len, kept.drafts), (2, 1));
        s.advance(&kept, true);
        assert_eq!((s.pool.used(), s.check()), (1, Ok(())), "the page of wrong drafts is back");
    }

    #[test]
    fn what_was_chosen_is_known_and_the_rest_never_was() {
        for (tokens, len) in [(1, 1), (3, 3), (6, 6)] {
            let mut s = decoding(limits(), 4, 40);
            s.propose(1, 5, Chance::CERTAIN);
            let plan = s.plan();
            let kept = s.keep(&plan.shares[0], tokens);
            assert_eq!((kept.context, kept.len, kept.drafts), (3, len, tokens - 1));
            s.advance(&kept, true);
            let next = s.plan();
            assert_eq!((next.shares[0].context, next.shares[0].len, next.shares[0].drafts), (3 + len, 1, 0));
        }
    }

    #[test]
    fn a_tenant_pays_for_tokens_and_not_for_drafts() {
        let paid = |steps: &[(usize, usize)]| {
            let mut s = Scheduler::new(limits());
            s.submit(1, None, super::super::Demand { claim: claim(Some("a")), ..demand(3, 40) }).expect("fits");
            go(&mut s);
            for (drafts, tokens) in steps {
                s.propose(1, *drafts, Chance::CERTAIN);
                let plan = s.plan();
                let kept = s.keep(&plan.shares[0], *tokens);
                s.advance(&kept, true);
            }
            s.fair.counter(&claim(Some("a")).tenant)
        };
        let one_by_one = paid(&[(0, 1); 7]);
        assert_eq!(one_by_one, Some(3.0 + 2.0 * 8.0));
        assert_eq!(paid(&[(5, 1), (4, 5), (3, 1)]), one_by_one);
    }

    #[test]
    fn drafts_are_computed_where_they_are_likely_enough_for_the_rows_beside_them() {
        let chances = |right: &[bool]| right.iter().fold(Chance::EVEN, |chance, right| chance.with(*right));
        let (poor, good) = (chances(&[false; 4]), chances(&[true; 4]));
        // alone, then beside seven others that have no drafts
        for (others, chance, drafts) in
            [(0, Chance::EVEN, 2), (0, poor, 1), (0, good, 4), (7, Chance::EVEN, 0), (7, poor, 0), (7, good, 2)]
        {
            let mut s = decoding(limits(), 4, 40);
            (0..others).for_each(|id| s.submit(2 + id, None, demand(3, 40)).expect("fits"));
            go(&mut s);
            s.propose(1, 5, chance);
            assert_eq!(planned(&mut s)[0], (1, 1 + drafts, drafts), "{chance:?} beside {others}");
        }
    }

    #[test]
    fn a_long_prompt_beside_them_leaves_only_drafts_that_are_nearly_certain() {
        for (chance, drafts) in [(Chance::EVEN.with(true).with(true), 0), (Chance::CERTAIN, 5)] {
            let mut s = decoding(limits(), 4, 40);
            s.submit(2, None, demand(32, 40)).expect("fits");
            s.propose(1, 5, chance);
            assert_eq!(planned(&mut s), [(1, 1 + drafts, drafts), (2, 32, 0)]);
        }
    }

    #[test]
    fn the_likeliest_drafts_of_all_sequences_come_first() {
        let mut s = decoding(Limits { max_drafts: 4, ..limits() }, 4, 40);
        s.submit(2, None, demand(3, 40)).expect("fits");
        s.submit(3, None, demand(3, 40)).expect("fits");
        go(&mut s);
        s.trust_drafts();
        s.propose(1, 5, Chance::EVEN.with(false));
        s.propose(2, 2, Chance::CERTAIN);
        s.propose(3, 5, Chance::EVEN.with(true));
        let drafts: Vec<usize> = planned(&mut s).into_iter().map(|(_, _, drafts)| drafts).collect();
        // 0.625 and 0.39 of the third come ahead of 0.375 of the first
        assert_eq!(drafts, [0, 2, 2]);
    }

    #[test]
    fn a_search_has_no_drafts() {
        let mut s = Scheduler::new(limits());
        s.submit(1, None, super::super::Demand { width: 2, ..demand(3, 40) }).expect("fits");
        go(&mut s);
        s.branch(1, 2);
        s.propose(1, 5, Chance::CERTAIN);
        assert_eq!(planned(&mut s), [(1, 1, 0), (1, 1, 0)]);
    }
}
