//! The scheduler's laws, on random loads.

use proptest::prelude::*;

use super::*;
use crate::{
    ids::TenantId,
    kv::{PAGE_SIZE, PageKey, PageKeys},
    rows::Ahead,
};

mod constraints;
mod fair;
mod followers;
mod held;
mod sharing;

fn delta(n: u8) -> Option<DeltaId> {
    (n > 0).then(|| DeltaId::from_bytes([n; 32]))
}

pub(super) fn demand(total: usize, most: usize) -> Demand {
    let (names, claim) = (Names::default(), claim(None));
    Demand {
        total,
        most,
        reserved: 0,
        source: 0,
        source_reserved: 0,
        width: 1,
        names,
        generates: true,
        constraint_bytes: 0,
        claim,
    }
}

pub(super) fn claim(tenant: Option<&str>) -> Claim {
    let tenant = tenant.map(|name| TenantId::new(name).expect("a name"));
    Claim { tenant, weight: 1, priority: 0 }
}

pub(super) fn limits() -> Limits {
    Limits {
        max_batch_tokens: 64,
        max_sequences: 8,
        max_deltas: 4,
        prefill_chunk: 32,
        pages: Some(64),
        constraint_bytes: 100,
        max_drafts: 64,
        free_rows: 6,
    }
}

/// One request of a random load: when it comes, its delta, its prompt and how many tokens it generates.
#[derive(Debug, Clone)]
struct Job {
    at: u64,
    delta: u8,
    prompt: usize,
    new: usize,
    source: usize,
    /// Cache slots ahead, as the delta has it.
    reserved: usize,
    /// Beams; 1 = none.
    width: usize,
    /// What its first tokens are, like those of all others of this number; 0 = it shares no page.
    stem: u8,
}

impl Job {
    /// A prefix of this many keys is ahead of a source, too.
    fn source_reserved(&self) -> usize {
        if self.source > 0 { self.reserved } else { 0 }
    }

    /// Its tokens when it has generated so many; a search is named by those of its prompt.
    fn tokens(&self, id: SeqId, made: usize) -> Vec<u32> {
        let token = |at: usize| if at < 37 { u32::from(self.stem) } else { 1000 + id as u32 * 100 + at as u32 };
        (0..self.prompt + made).map(token).collect()
    }

    fn keys(&self) -> Option<PageKeys> {
        let tenant = TenantId::new(if self.stem == 1 { "a" } else { "b" }).ok()?;
        let ahead = Ahead { keys: self.reserved, ..Ahead::default() };
        (self.stem > 0).then(|| PageKeys::new(&tenant, delta(self.delta), ahead))
    }

    /// Some tenants have more than one stem, some jobs none.
    fn claim(&self) -> Claim {
        let tenant = [None, Some("a"), Some("b"), Some("b")][usize::from(self.stem)];
        Claim { weight: 1 + u32::from(self.stem), priority: self.prompt as i32 % 3 - 1, ..claim(tenant) }
    }

    /// Names of whole pages that were not named before; those of rows behind an encoder have none.
    fn next_keys(&self, keys: &mut Option<PageKeys>, id: SeqId, made: usize, rows: usize) -> Vec<PageKey> {
        let made = if self.width > 1 { 0 } else { made };
        let keys = keys.as_mut().filter(|_| self.source == 0);
        keys.map(|keys| keys.next(&self.tokens(id, made), rows)).unwrap_or_default()
    }
}

fn jobs() -> impl Strategy<Value = Vec<Job>> {
    let source = prop_oneof![Just(0), 1usize..60];
    let width = prop_oneof![Just(1), Just(1), 2usize..5];
    let job = (0u64..30, 0u8..6, 1usize..70, 0usize..30, source, width, 0u8..4);
    let job = job.prop_map(|(at, delta, prompt, new, source, width, stem)| {
        // some deltas have a prefix
        let reserved = [0, 0, 3, 16, 0, 18][usize::from(delta)];
        Job { at, delta, prompt, new, source, reserved, width, stem }
    });
    proptest::collection::vec(job, 1..25)
}

fn any_limits() -> impl Strategy<Value = Limits> {
    let pages = prop_oneof![Just(None), (7usize..30).prop_map(Some)];
    (1usize..80, 1usize..9, 1usize..4, 1usize..40, pages, 0usize..20).prop_map(
        |(max_batch_tokens, max_sequences, max_deltas, prefill_chunk, pages, max_drafts)| Limits {
            max_batch_tokens,
            max_sequences,
            max_deltas,
            prefill_chunk,
            pages,
            constraint_bytes: 100,
            max_drafts,
            free_rows: 2 * max_drafts,
        },
    )
}

/// What a random load comes to.
#[derive(Debug, Clone, Copy, Default)]
struct Trouble {
    /// Every so many steps, one fails; 0 = none.
    fails: u64,
    /// Every so many steps, the oldest sequence's client leaves; 0 = never.
    leaves: u64,
}

fn trouble() -> impl Strategy<Value = Trouble> {
    let every = || prop_oneof![Just(0), 5u64..40];
    (every(), every()).prop_map(|(fails, leaves)| Trouble { fails, leaves })
}

/// An unfinished job: how many tokens it has made, and what names its pages.
type Left = BTreeMap<SeqId, (Job, usize, Option<PageKeys>)>;

/// Runs a load to its end and checks every step, and what lies in the pages.
fn run(limits: Limits, jobs: &[Job], trouble: Trouble) -> Result<(), TestCaseError> {
    let mut scheduler = Scheduler::new(limits);
    let mut cache = sharing::Contents::new(limits.pages.unwrap_or(0));
    let mut left = Left::new();
    let mut arrivals: Vec<(SeqId, Job)> = jobs.iter().cloned().enumerate().map(|(i, j)| (i as SeqId, j)).collect();
    arrivals.sort_by_key(|(_, j)| j.at);
    let mut arrivals: std::collections::VecDeque<Job> = arrivals.into_iter().map(|(_, j)| j).collect();
    let mut next = 0;
    for step in 0..20_000u64 {
        while arrivals.front().is_some_and(|j| j.at <= step) {
            let Some(mut job) = arrivals.pop_front() else { break };
            if limits.pages.is_none() {
                (job.new, job.source, job.width, job.stem) = (0, 0, 1, 0);
            }
            let most = job.prompt + job.new.saturating_sub(1);
            let (reserved, source, source_reserved) = (job.reserved, job.source, job.source_reserved());
            let (width, mut keys) = (job.width, job.keys());
            let ahead = keys.as_ref().map(PageKeys::ahead).unwrap_or_default();
            let names = Names { ahead, rows: job.next_keys(&mut keys, next, 0, job.prompt) };
            let (total, generates, claim) = (job.prompt, job.new > 0, job.claim());
            // every third is constrained
            let constraint_bytes = if job.prompt.is_multiple_of(3) { job.prompt as u64 } else { 0 };
            let demand = Demand {
                total,
                most,
                reserved,
                source,
                source_reserved,
                width,
                names,
                generates,
                constraint_bytes,
                claim,
            };
            match scheduler.submit(next, delta(job.delta), demand) {
                Ok(()) => drop(left.insert(next, (job, 0, keys))),
                Err(NeverFits::Positions { positions, limit }) => prop_assert!(positions > limit),
                Err(NeverFits::Width { width, limit }) => prop_assert!(width > limit),
                Err(NeverFits::Constraint { bytes, limit }) => prop_assert!(bytes > limit),
            }
            next += 1;
        }
        if scheduler.is_idle() {
            prop_assert_eq!(scheduler.pool().used(), 0);
            prop_assert_eq!(scheduler.check(), Ok(()));
            if arrivals.is_empty() {
                prop_assert!(left.is_empty());
                prop_assert!(scheduler.served.is_empty());
                prop_assert!(scheduler.returning.is_empty());
                prop_assert!(scheduler.fair.is_empty());
                return Ok(());
            }
            continue;
        }
        let plan = scheduler.plan();
        for id in &plan.preempted {
            // a search starts over
            left.get_mut(id).filter(|(job, ..)| job.width > 1).into_iter().for_each(|(_, made, _)| *made = 0);
        }
        check_step(&scheduler, &plan, limits, &left)?;
        if trouble.fails > 0 && step % trouble.fails == trouble.fails - 1 {
            // nothing of it was computed: nobody may find any of it
            plan.shares.iter().for_each(|share| scheduler.spoil(share));
            for share in &plan.shares {
                scheduler.remove(share.id);
                left.remove(&share.id);
            }
            prop_assert_eq!(scheduler.check(), Ok(()));
            continue;
        }
        cache.compute(&scheduler, &plan, &left)?;
        // the branches of a search go on, and end, together
        for share in plan.shares.iter().filter(|share| share.branch == 0) {
            let Some((job, made, keys)) = left.get_mut(&share.id) else {
                return Err(TestCaseError::fail("unknown id"));
            };
            let right = right(share);
            let share = &scheduler.keep(share, 1 + right);
            let more = job.next_keys(keys, share.id, *made + right, share.context + share.len);
            scheduler.publish(share, more);
            if !share.completes {
                scheduler.advance(share, false);
                continue;
            }
            *made += 1 + right;
            scheduler.trim(share.id);
            // now all beams go on, now fewer
            scheduler.branch(share.id, job.width - usize::from(*made % 5 == 4 && job.width > 1));
            let done = *made >= job.new.max(1);
            scheduler.advance(share, !done);
            let chance = if step % 3 == 0 { Chance::EVEN } else { Chance::CERTAIN };
            scheduler.propose(share.id, (step as usize + share.context) % 6, chance);
            if done {
                scheduler.remove(share.id);
                left.remove(&share.id);
            }
        }
        if trouble.leaves > 0 && step % trouble.leaves == trouble.leaves - 1 {
            left.pop_first().into_iter().for_each(|(id, _)| scheduler.remove(id));
        }
        prop_assert_eq!(scheduler.check(), Ok(()));
    }
    Err(TestCaseError::fail(format!("{} sequences never finish", left.len())))
}

/// How many of a share's drafts are right, from the first.
fn right(share: &Share) -> usize {
    (share.context + share.id as usize) % (share.drafts + 1)
}

fn check_step(s: &Scheduler, plan: &StepPlan, l: Limits, left: &Left) -> Result<(), TestCaseError> {
    prop_assert!(!plan.shares.is_empty(), "an unfinished load always has a step");
    prop_assert!(s.constraint_bytes() <= l.constraint_bytes);
    let over = plan.shares.iter().map(|s| s.encode).max().unwrap_or(0);
    prop_assert!(plan.rows() <= l.max_batch_tokens + over || (l.pages.is_none() && plan.shares.len() == 1));
    prop_assert!(s.running() <= l.max_sequences);
    prop_assert_eq!(s.check(), Ok(()));
    let mut parts: Vec<(SeqId, usize)> = plan.shares.iter().map(|s| (s.id, s.branch)).collect();
    parts.sort_unstable();
    parts.dedup();
    prop_assert_eq!(parts.len(), plan.shares.len(), "one share per branch");
    let mut ids: Vec<SeqId> = parts.iter().map(|p| p.0).collect();
    ids.dedup();
    for id in &ids {
        let (job, made, _) = &left[id];
        let all = if *made == 0 { 1 } else { job.width - usize::from(made % 5 == 4 && job.width > 1) };
        prop_assert_eq!(parts.iter().filter(|p| p.0 == *id).count(), all, "all branches or none");
    }
    prop_assert!(plan.preempted.iter().all(|p| !ids.contains(p)));
    let deltas: HashSet<u8> = ids.iter().map(|id| left[id].0.delta).filter(|d| *d > 0).collect();
    prop_assert!(deltas.len() <= l.max_deltas);
    for share in &plan.shares {
        prop_assert!(share.len > 0);
        let (job, made, _) = &left[&share.id];
        let total = job.prompt + made;
        prop_assert_eq!(share.completes, share.context + share.len - share.drafts == total);
        prop_assert!(
            share.drafts == 0 || total + share.drafts < job.prompt + job.new,
            "a draft that could never count"
        );
        match l.pages {
            None => prop_assert!(share.context == 0 && share.completes, "an encoder's sequence is never split"),
            Some(_) => {
                prop_assert!(share.len <= l.prefill_chunk);
                prop_assert_eq!(share.encode, if share.context == 0 { job.source } else { 0 }, "once per start");
                prop_assert!(!share.keys_due || job.reserved > 0);
                prop_assert_eq!(s.memory_slots(share.id).len(), job.source_reserved() + job.source);
                let slots = s.slots(share.id, share.branch, share.context + share.len);
                prop_assert_eq!(slots.len(), job.reserved + share.context + share.len);
                let others = plan.shares.iter().filter(|o| (o.id, o.branch) != (share.id, share.branch));
                let taken: HashSet<u32> =
                    others.flat_map(|o| s.slots(o.id, o.branch, o.context + o.len).to_vec()).collect();
                let written = &slots[job.reserved + share.context..];
                prop_assert!(written.iter().all(|slot| !taken.contains(slot)), "nobody else reads what is written");
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_step_keeps_the_limits_and_every_admitted_sequence_finishes(
        limits in any_limits(), jobs in jobs(), trouble in trouble(),
    ) {
        run(limits, &jobs, trouble)?;
    }

    #[test]
    fn no_delta_waits_longer_than_a_round(deltas in proptest::collection::vec(1u8..12, 2..12), cap in 1usize..5) {
        let mut s = Scheduler::new(Limits { max_deltas: cap, max_sequences: 64, pages: Some(640), ..limits() });
        for (id, d) in deltas.iter().enumerate() {
            prop_assert!(s.submit(id as SeqId, delta(*d), demand(4, 100)).is_ok());
        }
        let distinct = deltas.iter().collect::<HashSet<_>>().len();
        let mut last = vec![0; deltas.len()];
        for step in 1..60 {
            let plan = s.plan();
            for share in &plan.shares {
                last[share.id as usize] = step;
                s.advance(share, share.completes);
            }
            for (id, last) in last.iter().enumerate() {
                prop_assert!(step - last <= distinct.div_ceil(cap), "sequence {id} waits since step {last}");
            }
        }
    }
}

fn ids(plan: &StepPlan) -> Vec<SeqId> {
    plan.shares.iter().map(|s| s.id).collect()
}

pub(super) fn go(s: &mut Scheduler) -> StepPlan {
    let plan = s.plan();
    plan.shares.iter().for_each(|share| s.advance(share, share.completes));
    plan
}

#[test]
fn decode_comes_first_then_chunks_then_newcomers() {
    let mut s = Scheduler::new(limits());
    s.submit(1, None, demand(4, 20)).expect("fits");
    go(&mut s);
    s.submit(2, None, demand(100, 200)).expect("fits");
    s.submit(3, None, demand(50, 60)).expect("fits");
    let plan = go(&mut s);
    assert_eq!(plan.shares.iter().map(|s| (s.id, s.len)).collect::<Vec<_>>(), vec![(1, 1), (2, 32), (3, 31)]);
    let plan = go(&mut s);
    assert_eq!(
        plan.shares.iter().map(|s| (s.id, s.context, s.len, s.completes)).collect::<Vec<_>>(),
        vec![(1, 5, 1, true), (2, 32, 32, false), (3, 31, 19, true)]
    );
}

#[test]
fn the_youngest_gives_its_pages_and_comes_back_first() {
    let mut s = Scheduler::new(Limits { pages: Some(3), ..limits() });
    s.submit(1, None, demand(PAGE_SIZE, 3 * PAGE_SIZE)).expect("fits");
    s.submit(2, None, demand(PAGE_SIZE, 2 * PAGE_SIZE)).expect("fits");
    assert_eq!(ids(&go(&mut s)), vec![1, 2]);
    s.submit(3, None, demand(1, 2)).expect("fits");
    // both grow over a page border: the older takes the last free page, then the younger's
    let plan = go(&mut s);
    assert_eq!((ids(&plan), plan.preempted), (vec![1], vec![]));
    assert_eq!(s.running(), 2);
    for _ in 0..PAGE_SIZE - 1 {
        assert_eq!(ids(&go(&mut s)), vec![1], "the younger waits with its pages, newcomers behind it");
    }
    let plan = go(&mut s);
    assert_eq!((ids(&plan), plan.preempted), (vec![1], vec![2]));
    s.remove(1);
    let plan = go(&mut s);
    assert_eq!(
        plan.shares[0],
        Share {
            id: 2,
            branch: 0,
            context: 0,
            len: PAGE_SIZE + 1,
            drafts: 0,
            encode: 0,
            keys_due: false,
            completes: true
        }
    );
    assert_eq!(ids(&plan), vec![2, 3]);
}

#[test]
fn a_request_beyond_the_cache_is_refused_with_the_numbers() {
    let mut s = Scheduler::new(Limits { pages: Some(2), ..limits() });
    let limit = 2 * PAGE_SIZE;
    assert_eq!(s.submit(1, None, demand(1, limit + 1)), Err(NeverFits::Positions { positions: limit + 1, limit }));
    assert_eq!(s.submit(1, None, demand(1, limit)), Ok(()));
}

#[test]
fn an_encoder_request_over_the_budget_runs_alone() {
    let mut s = Scheduler::new(Limits { pages: None, ..limits() });
    s.submit(1, None, demand(10, 10)).expect("fits");
    s.submit(2, None, demand(500, 500)).expect("fits");
    s.submit(3, None, demand(10, 10)).expect("fits");
    let mut step = || {
        let plan = s.plan();
        ids(&plan).into_iter().for_each(|id| s.remove(id));
        ids(&plan)
    };
    assert_eq!((step(), step(), step()), (vec![1], vec![2], vec![3]));
}

#[test]
fn one_delta_more_than_places_is_served_in_turn() {
    let mut s = Scheduler::new(Limits { max_deltas: 2, ..limits() });
    for id in 1..=3u8 {
        s.submit(u64::from(id), delta(id), demand(2, 50)).expect("fits");
    }
    s.submit(9, None, demand(2, 50)).expect("fits");
    assert_eq!(ids(&go(&mut s)), vec![1, 2, 9]);
    assert_eq!(ids(&go(&mut s)), vec![1, 9, 3], "the one that was passed over is first");
}

#[test]
fn a_search_that_lost_its_pages_begins_again_when_all_its_beams_have_room() {
    let mut s = Scheduler::new(Limits { pages: Some(8), ..limits() });
    let search = Demand { width: 3, ..demand(PAGE_SIZE - 1, 2 * PAGE_SIZE) }; // 6 pages at its end
    s.submit(1, None, search.clone()).expect("fits");
    s.submit(2, None, search).expect("fits");
    let (mut lost, mut again) = (0, None);
    for step in 0..PAGE_SIZE + 8 {
        let plan = go(&mut s);
        lost += plan.preempted.len();
        again = again.or(plan.shares.iter().any(|share| share.id == 2 && lost > 0).then_some(step));
        [1, 2].into_iter().for_each(|id| s.branch(id, 3));
    }
    assert_eq!((lost, again), (1, None), "two pages are free, which would do for its prompt");
    s.remove(1);
    assert!(ids(&go(&mut s)).contains(&2));
}
