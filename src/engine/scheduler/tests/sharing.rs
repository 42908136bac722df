//! Shared pages: what every sequence reads is what it would have written itself, and what is there is found.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::*;

/// What lies in each slot of the cache, as a digest of everything that it depends on.
pub(super) struct Contents(Vec<Option<u64>>);

impl Contents {
    pub(super) fn new(pages: usize) -> Self {
        Self(vec![None; pages * PAGE_SIZE])
    }

    /// What a delta puts ahead of all rows; what the row of a sequence's last token of these comes to.
    fn ahead(job: &Job, at: usize) -> u64 {
        digest((job.delta, "ahead", at))
    }

    fn row(job: &Job, tokens: &[u32]) -> u64 {
        digest((job.delta, tokens))
    }

    /// Writes what a step computes, then has every share read all that it sees.
    pub(super) fn compute(&mut self, s: &Scheduler, plan: &StepPlan, left: &Left) -> Result<(), TestCaseError> {
        let seen = |share: &Share| {
            let slots = s.slots(share.id, share.branch, share.context + share.len);
            left.get(&share.id).filter(|_| !slots.is_empty()).map(|(job, made, _)| (job, *made, slots))
        };
        let mut filled = HashSet::new();
        for share in &plan.shares {
            let Some((job, made, slots)) = seen(share) else { continue };
            if share.keys_due {
                for (at, slot) in slots[..job.reserved].iter().enumerate() {
                    prop_assert!(filled.insert(*slot), "keys ahead are written once");
                    self.0[*slot as usize] = Some(Self::ahead(job, at));
                }
            }
            let tokens = job.tokens(share.id, made + share.drafts);
            let certain = share.context + share.len - (share.drafts - right(share));
            for row in share.context..share.context + share.len {
                let slot = slots[job.reserved + row];
                prop_assert!(s.pool().is_private(slot / PAGE_SIZE as u32), "a page that others can find is written");
                // beams but the first go their own way, and wrong drafts are anything
                let own = if share.branch == 0 && row < certain { Some(Self::row(job, &tokens[..=row])) } else { None };
                self.0[slot as usize] = own;
            }
        }
        for share in &plan.shares {
            let Some((job, made, slots)) = seen(share) else { continue };
            let (ahead, rows) = slots.split_at(job.reserved);
            for (at, slot) in ahead.iter().enumerate() {
                prop_assert_eq!(self.0[*slot as usize], Some(Self::ahead(job, at)), "key {} ahead", at);
            }
            // what is copied between beams is not the scheduler's
            let wrong = share.drafts - right(share);
            let certain = if share.branch == 0 { rows.len() - wrong } else { s.common(share.id) - job.reserved };
            let tokens = job.tokens(share.id, made + share.drafts);
            for (row, slot) in rows.iter().enumerate().take(certain) {
                prop_assert_eq!(self.0[*slot as usize], Some(Self::row(job, &tokens[..=row])), "row {}", row);
            }
        }
        Ok(())
    }
}

fn digest(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

/// A sequence of these tokens, of the tenant `t`.
struct Text {
    keys: PageKeys,
    tokens: Vec<u32>,
    reserved: usize,
}

impl Text {
    fn new(of: Option<DeltaId>, reserved: usize, tokens: Vec<u32>) -> Self {
        let tenant = TenantId::new("t").expect("a name");
        let keys = PageKeys::new(&tenant, of, Ahead { keys: reserved, ..Ahead::default() });
        Self { keys, tokens, reserved }
    }

    fn demand(&mut self, new: usize) -> Demand {
        let total = self.tokens.len();
        let names = Names { ahead: self.keys.ahead(), rows: self.keys.next(&self.tokens, total) };
        Demand { reserved: self.reserved, names, ..demand(total, total + new) }
    }
}

/// What a sequence of these tokens asks for, with names that others find.
pub(super) fn text_demand(tokens: &[u32], new: usize) -> Demand {
    Text::new(None, 0, tokens.to_vec()).demand(new)
}

/// Computes a step; no sequence has more names than it came with.
pub(super) fn step(s: &mut Scheduler) -> StepPlan {
    let plan = s.plan();
    for share in plan.shares.iter().filter(|share| share.branch == 0) {
        s.publish(share, vec![]);
        s.advance(share, share.completes);
    }
    assert_eq!(s.check(), Ok(()));
    plan
}

#[test]
fn a_newcomer_begins_behind_the_whole_pages_that_are_there() {
    let mut s = Scheduler::new(limits());
    let text = |tail: u32, len: usize| [vec![7; 40], vec![tail; len - 40]].concat();
    s.submit(1, None, Text::new(None, 0, text(1, 50)).demand(20)).expect("fits");
    let first = step(&mut s);
    assert_eq!((first.shares[0].context, first.shares[0].len), (0, 32));
    // half computed: what is whole is there already
    s.submit(2, None, Text::new(None, 0, text(2, 70)).demand(20)).expect("fits");
    s.submit(3, delta(1), Text::new(delta(1), 0, text(2, 41)).demand(20)).expect("fits");
    let plan = s.plan();
    let of = |id: SeqId| plan.shares.iter().find(|share| share.id == id).map(|share| (share.context, share.len));
    assert_eq!((of(2), of(3)), (Some((32, 32)), Some((0, 14))), "a delta's pages are not the base's");
    // 4 pages of the first, 5 of the second, of which 2 are the first's, 3 of the third
    assert_eq!(s.pool().used(), 4 + 5 - 2 + 3);
    s.remove(1);
    s.remove(2);
    s.remove(3);
    assert_eq!((s.pool().used(), s.pool().cached()), (0, 2));
}

#[test]
fn the_last_known_position_is_always_computed() {
    for (len, found) in [(1, 0), (15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (48, 32), (49, 48)] {
        let mut s = Scheduler::new(Limits { prefill_chunk: 64, ..limits() });
        for id in 1..3 {
            s.submit(id, None, Text::new(None, 0, vec![9; len]).demand(3)).expect("fits");
            let plan = step(&mut s);
            let share = plan.shares[0];
            assert_eq!((share.context, share.len), if id == 1 { (0, len) } else { (found, len - found) });
            assert!(share.completes);
            s.remove(id);
        }
    }
}

#[test]
fn keys_ahead_are_filled_once_for_all_sequences_of_a_delta() {
    let mut s = Scheduler::new(limits());
    let text = |n: u32| Text::new(delta(1), 20, vec![n; 5]).demand(20);
    (1..=4).for_each(|id| s.submit(id, delta(1), text(id as u32)).expect("fits"));
    let plan = step(&mut s);
    let due: Vec<bool> = plan.shares.iter().map(|share| share.keys_due).collect();
    assert_eq!(due, [true, false, false, false], "the first of a step fills them for all");
    assert_eq!(s.pool().used(), 2 + 4, "two pages of keys, and one each");
    let slots: Vec<Vec<u32>> = (1..=4).map(|id| s.slots(id, 0, 5)[..20].to_vec()).collect();
    assert!(slots.iter().all(|own| *own == slots[0]));
    assert!(step(&mut s).shares.iter().all(|share| !share.keys_due));
    (1..=4).for_each(|id| s.remove(id));
    assert_eq!((s.pool().used(), s.pool().cached()), (0, 2));
    s.submit(5, delta(1), text(5)).expect("fits");
    assert!(!step(&mut s).shares[0].keys_due, "they are there still");
    s.remove(5);
    // another takes all pages: they make room, and are filled anew
    s.submit(6, None, demand(64 * PAGE_SIZE, 64 * PAGE_SIZE)).expect("fits");
    assert_eq!(step(&mut s).shares.len(), 1);
    s.remove(6);
    s.submit(7, delta(1), text(7)).expect("fits");
    assert!(step(&mut s).shares[0].keys_due);
    assert_eq!(s.pool().evictions(), 2);
}

#[test]
fn a_step_that_fails_leaves_no_keys_ahead_to_be_found() {
    let mut s = Scheduler::new(limits());
    s.submit(1, delta(1), Text::new(delta(1), 20, vec![1; 5]).demand(20)).expect("fits");
    let plan = s.plan();
    assert!(plan.shares[0].keys_due);
    s.spoil(&plan.shares[0]);
    s.remove(1);
    assert_eq!((s.pool().cached(), s.check()), (0, Ok(())));
}

#[test]
fn what_is_cached_makes_room_before_anybody_waits_or_loses_pages() {
    let mut s = Scheduler::new(Limits { pages: Some(6), ..limits() });
    for id in 1..=3 {
        s.submit(id, None, Text::new(None, 0, vec![id as u32; 32]).demand(1)).expect("fits");
        step(&mut s);
        s.remove(id);
    }
    assert_eq!((s.pool().free(), s.pool().cached()), (0, 6));
    // two that need all pages between them, one of which begins behind a cached one
    s.submit(4, None, Text::new(None, 0, vec![2; 20]).demand(28)).expect("fits");
    s.submit(5, None, Text::new(None, 0, vec![8; 20]).demand(28)).expect("fits");
    let plan = step(&mut s);
    assert_eq!(plan.shares.iter().map(|share| (share.id, share.context)).collect::<Vec<_>>(), [(4, 16), (5, 0)]);
    for _ in 0..27 {
        let plan = step(&mut s);
        assert_eq!((ids(&plan), plan.preempted), (vec![4, 5], vec![]));
    }
    assert_eq!((s.pool().used(), s.pool().evictions()), (6, 5));
}

#[test]
fn a_sequence_that_lost_its_pages_finds_those_that_nobody_took() {
    let mut s = Scheduler::new(Limits { pages: Some(5), ..limits() });
    s.submit(1, None, Text::new(None, 0, vec![1; 16]).demand(48)).expect("fits");
    s.submit(2, None, Text::new(None, 0, vec![2; 48]).demand(16)).expect("fits");
    let mut back = None;
    for _ in 0..80 {
        let plan = step(&mut s);
        if plan.preempted.contains(&2) {
            s.remove(1);
            back = step(&mut s).shares.iter().find(|share| share.id == 2).map(|share| share.context);
            break;
        }
    }
    // its last page was taken first
    assert_eq!(back, Some(32));
}

#[test]
fn beams_read_the_prompts_whole_pages_together() {
    let mut s = Scheduler::new(limits());
    let search = Demand { width: 3, ..Text::new(None, 0, vec![5; 40]).demand(20) };
    s.submit(1, None, search).expect("fits");
    while !step(&mut s).shares[0].completes {}
    assert_eq!(s.pool().used(), 3);
    s.branch(1, 3);
    let plan = s.plan();
    assert_eq!(plan.shares.len(), 3);
    assert_eq!((s.pool().used(), s.common(1)), (2 + 3, 32));
    let slots: Vec<Vec<u32>> = (0..3).map(|branch| s.slots(1, branch, 41).to_vec()).collect();
    for (i, own) in slots.iter().enumerate() {
        assert_eq!(own[..32], slots[0][..32]);
        assert!(slots[..i].iter().all(|other| other[32..] != own[32..]));
    }
    assert_eq!(s.check(), Ok(()));
    s.branch(1, 2);
    s.trim(1);
    assert_eq!((s.pool().used(), s.check()), (2 + 2, Ok(())));
    s.remove(1);
    assert_eq!((s.pool().used(), s.pool().cached()), (0, 2));
}

#[test]
fn pages_that_others_hold_cost_a_newcomer_nothing() {
    for reserved in [0usize, 20] {
        let of = delta(1);
        let mut s = Scheduler::new(Limits { pages: Some(5 + reserved.div_ceil(PAGE_SIZE)), ..limits() });
        s.submit(1, of, Text::new(of, reserved, vec![4; 50]).demand(10)).expect("fits");
        while !step(&mut s).shares[0].completes {}
        // one page is free, and it needs no other
        s.submit(2, of, Text::new(of, reserved, vec![4; 52]).demand(10)).expect("fits");
        let plan = step(&mut s);
        assert_eq!(plan.shares.iter().map(|share| (share.id, share.context)).collect::<Vec<_>>(), [(1, 50), (2, 48)]);
        assert_eq!((s.pool().available(), plan.preempted), (0, vec![]));
    }
}

#[test]
fn cached_pages_of_one_that_is_passed_over_are_kept_for_it() {
    // rows that are cached, or keys ahead of them
    for (reserved, tokens) in [(0, 33), (32, 5)] {
        let (first, second) = (delta(1), delta(2));
        let mut s = Scheduler::new(Limits { pages: Some(8), max_deltas: 1, ..limits() });
        s.submit(0, second, Text::new(second, reserved, vec![3; tokens]).demand(10)).expect("fits");
        while !step(&mut s).shares[0].completes {}
        s.remove(0);
        assert_eq!(s.pool().cached(), 2);
        s.submit(1, first, demand(5, 30)).expect("fits");
        s.submit(2, second, demand(5, 30)).expect("fits");
        assert_eq!([ids(&step(&mut s)), ids(&step(&mut s))], [[1], [2]], "they take turns");
        // 6 pages can be had; it takes 3, of which 2 are cached
        s.submit(3, second, Text::new(second, reserved, vec![3; tokens]).demand(10)).expect("fits");
        s.submit(4, None, demand(60, 61)).expect("fits");
        assert_eq!(ids(&step(&mut s)), [1], "four would leave too few for the one whose delta waits");
        let plan = step(&mut s);
        let share = plan.shares.iter().find(|share| share.id == 3).expect("it begins");
        assert_eq!((share.context, share.keys_due), (if reserved == 0 { 32 } else { 0 }, false));
    }
}
