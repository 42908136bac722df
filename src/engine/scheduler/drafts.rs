//! Drafts: rows of guessed tokens behind a sequence's last known position. They get what is left of a step when everybody has
//! what is theirs: rows of the budget and free pages, not cached ones, and nobody waits or loses pages for them. All of a
//! step are at most `max_drafts`, since each has a row of logits there. What of them turns out wrong is forgotten before anybody
//! could find it.

use super::{OUTPUT, Scheduler, SeqId, Share, StepPlan};
use crate::kv::PAGE_SIZE;

impl Scheduler {
    /// There are so many guesses of what follows a sequence's last known position.
    pub(in crate::engine) fn propose(&mut self, id: SeqId, drafts: usize) {
        if let Some(entry) = self.running.get_mut(&id) {
            entry.drafts = drafts;
        }
    }

    /// Puts drafts behind the shares that compute a last known position, in the order of the shares, with what is left.
    pub(super) fn plan_drafts(&mut self, budget: usize, plan: &mut StepPlan) {
        let mut budget = budget.min(self.limits.max_drafts);
        let prefill_chunk = self.limits.prefill_chunk;
        for share in plan.shares.iter_mut().filter(|share| share.completes) {
            let Some(entry) = self.running.get_mut(&share.id).filter(|e| e.generates && e.width == 1) else { continue };
            let Some(pages) = entry.branches.first_mut() else { continue };
            let positions = (pages.len() + self.pool.free()) * PAGE_SIZE;
            let room = positions.min(entry.most).saturating_sub(entry.total);
            let most = room.min(budget).min(prefill_chunk.saturating_sub(share.len));
            let drafts = std::mem::take(&mut entry.drafts).min(most);
            if drafts > 0 && self.pool.cover(pages, entry.total + drafts) {
                (share.len, share.drafts) = (share.len + drafts, drafts);
                budget -= drafts;
            }
        }
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
            s.propose(1, 5);
            assert_eq!(planned(&mut s), [(1, 1 + drafts, drafts)], "{limits:?} {most}");
        }
    }

    #[test]
    fn newcomers_and_chunks_go_ahead_of_drafts() {
        let mut s = decoding(Limits { max_batch_tokens: 10, ..limits() }, 4, 40);
        s.submit(2, None, demand(7, 20)).expect("fits");
        s.propose(1, 5);
        assert_eq!(planned(&mut s), [(1, 3, 2), (2, 7, 0)]);
    }

    #[test]
    fn all_drafts_of_a_step_are_bounded_together() {
        let mut s = decoding(Limits { max_drafts: 7, ..limits() }, 4, 40);
        s.submit(2, None, demand(3, 40)).expect("fits");
        go(&mut s);
        (1..3).for_each(|id| s.propose(id, 5));
        let drafts: Vec<usize> = planned(&mut s).into_iter().map(|(_, _, drafts)| drafts).collect();
        assert_eq!(drafts, [5, 2]);
    }

    #[test]
    fn no_page_is_taken_from_anybody_for_a_draft() {
        // its page has room for one more position, and the other page is the other's
        let mut s = decoding(Limits { pages: Some(2), ..limits() }, PAGE_SIZE - 1, 2 * PAGE_SIZE);
        s.submit(2, None, demand(4, 10)).expect("fits");
        s.propose(1, 5);
        assert_eq!(planned(&mut s), [(1, 2, 1), (2, 4, 0)]);
        // nor from those that come next
        let mut s = decoding(Limits { pages: Some(2), ..limits() }, PAGE_SIZE - 1, 2 * PAGE_SIZE);
        s.propose(1, 5);
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
            s.propose(1, 5);
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
                s.propose(1, *drafts);
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
    fn a_search_has_no_drafts() {
        let mut s = Scheduler::new(limits());
        s.submit(1, None, super::super::Demand { width: 2, ..demand(3, 40) }).expect("fits");
        go(&mut s);
        s.branch(1, 2);
        s.propose(1, 5);
        assert_eq!(planned(&mut s), [(1, 1, 0), (1, 1, 0)]);
    }
}
