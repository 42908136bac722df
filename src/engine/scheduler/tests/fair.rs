//! Tenants beside each other: service within a bounded difference, bounded waits, and nobody's queue jumped.

use super::*;
use crate::model::testing::Rng;

/// A load that never ends: what is asked next, and by whom, follows from a seed.
struct Load {
    s: Scheduler,
    rng: Rng,
    next: SeqId,
    /// Unfinished: tenant, tokens that are still to be generated, the step it came in.
    left: BTreeMap<SeqId, (String, usize, u64)>,
    /// Served to each tenant: input tokens and twice the generated ones.
    served: BTreeMap<String, u64>,
    /// The step in which each began.
    began: BTreeMap<SeqId, u64>,
    step: u64,
}

impl Load {
    fn new(limits: Limits, seed: u64) -> Self {
        let s = Scheduler::new(limits);
        let (left, served, began) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { s, rng: Rng(seed * 7919 + 1), next: 0, left, served, began, step: 0 }
    }

    /// A number from `low` to `high`.
    fn any(&mut self, low: usize, high: usize) -> usize {
        low + (self.rng.uniform() * (high - low + 1) as f32) as usize
    }

    fn ask(&mut self, claim: Claim, of: Option<DeltaId>, prompt: usize, new: usize) -> SeqId {
        let id = self.next;
        self.next += 1;
        let name = claim.tenant.as_ref().map(ToString::to_string).unwrap_or_default();
        self.s.submit(id, of, Demand { claim, ..demand(prompt, prompt + new - 1) }).expect("fits");
        self.left.insert(id, (name, new, self.step));
        id
    }

    /// Requests of a tenant that have not begun.
    fn waiting(&self, name: &str) -> usize {
        self.left.iter().filter(|(id, (of, ..))| of == name && !self.began.contains_key(id)).count()
    }

    /// One step; the sequences that were in it.
    fn step(&mut self) -> Vec<SeqId> {
        self.step += 1;
        let plan = self.s.plan();
        assert!(!plan.shares.is_empty(), "an unfinished load always has a step");
        for share in &plan.shares {
            let (name, new, _) = self.left.get_mut(&share.id).expect("unfinished");
            let served = self.served.entry(name.clone()).or_default();
            if !self.began.contains_key(&share.id) {
                *served += (share.len + share.context) as u64;
                if !share.completes {
                    // the rest of its prompt is charged when it begins
                    *served += self.s.running[&share.id].total as u64 - share.len as u64;
                }
                self.began.insert(share.id, self.step);
            }
            if !share.completes {
                self.s.advance(share, false);
                continue;
            }
            *served += OUTPUT;
            *new -= 1;
            let done = *new == 0;
            self.s.advance(share, !done);
            if done {
                self.s.remove(share.id);
                self.left.remove(&share.id);
            }
        }
        assert_eq!(self.s.check(), Ok(()));
        ids(&plan)
    }
}

/// Places for four, pages for all that comes.
fn four() -> Limits {
    Limits { max_sequences: 4, pages: Some(400), ..limits() }
}

/// The most that a tenant can be ahead of another that always waits, too: its longest input, and all places full of it to
/// the last token, over its weight (twice what VTC's theorem has for one of both).
fn bound(prompt: usize, new: usize) -> f64 {
    2.0 * (prompt + 4 * OUTPUT as usize * new) as f64
}

#[test]
fn tenants_that_always_wait_are_served_alike_whatever_they_ask_for() {
    for seed in 0..8 {
        let mut load = Load::new(four(), seed);
        let (prompt, new) = (60, 24);
        for step in 0..1500 {
            // long ones of the first come first, and there are three times as many
            while load.waiting("long") < 12 {
                let (p, n) = (load.any(20, prompt), load.any(8, new));
                load.ask(claim(Some("long")), None, p, n);
            }
            while load.waiting("short") < 4 {
                let (p, n) = (load.any(1, 6), load.any(1, 3));
                load.ask(claim(Some("short")), None, p, n);
            }
            load.step();
            let of = |name: &str| load.served.get(name).copied().unwrap_or(0) as f64;
            let apart = (of("long") - of("short")).abs();
            assert!(apart <= bound(prompt, new), "seed {seed}, step {step}: {apart} apart, {:?}", load.served);
        }
        let all: u64 = load.served.values().sum();
        assert!(all as f64 > 8.0 * bound(prompt, new), "{all}: too little to tell");
    }
}

#[test]
fn service_is_shared_by_weight() {
    for (seed, weight) in [(1, 2), (2, 3), (3, 7)] {
        let mut load = Load::new(four(), seed);
        let (prompt, new) = (30, 12);
        for _ in 0..2000 {
            for (name, weight) in [("heavy", weight), ("light", 1)] {
                while load.waiting(name) < 5 {
                    let (p, n) = (load.any(1, prompt), load.any(1, new));
                    load.ask(Claim { weight, ..claim(Some(name)) }, None, p, n);
                }
            }
            load.step();
            let of = |name: &str, weight: u32| load.served.get(name).copied().unwrap_or(0) as f64 / f64::from(weight);
            let apart = (of("heavy", weight) - of("light", 1)).abs();
            assert!(apart <= bound(prompt, new), "{apart} apart, {:?}", load.served);
        }
        assert!(load.served["light"] as f64 > 3.0 * bound(prompt, new), "{:?}: too little to tell", load.served);
    }
}

#[test]
fn a_flood_of_one_tenant_delays_anothers_request_by_one_turn() {
    for (seed, before) in [(1, 0), (2, 7), (3, 150)] {
        let mut load = Load::new(four(), seed);
        let (prompt, new) = (64, 20);
        for _ in 0..1000 {
            let (p, n) = (load.any(1, prompt), load.any(1, new));
            load.ask(claim(Some("flood")), None, p, n);
        }
        (0..before).for_each(|_| drop(load.step()));
        let single = load.ask(claim(Some("single")), None, 5, 3);
        while !load.began.contains_key(&single) {
            load.step();
        }
        // a place gets free when one of four has come to its end: its chunks and its tokens
        let waited = load.began[&single] - load.step.min(before);
        let most = (prompt / 32 + 1 + new) as u64;
        assert!(waited <= most, "waited {waited} steps of {most}");
        assert!(load.waiting("flood") > 700, "the flood has gone by");
        while load.left.contains_key(&single) {
            assert!(load.step().contains(&single), "it runs on in each step");
        }
    }
}

/// The stream of new tenants never ends, and each of them has been served nothing yet. Who was served ahead of them, because
/// it was alone, waits for its turn as long as they catch up, and no longer.
#[test]
fn a_stream_of_ever_new_tenants_keeps_nobody_back_for_ever() {
    for seed in 0..4 {
        let mut load = Load::new(four(), seed);
        for _ in 0..4 {
            load.ask(claim(Some("first")), None, 60, 60);
        }
        (0..70).for_each(|_| {
            if !load.left.is_empty() {
                load.step();
            }
        });
        let ahead = load.served["first"];
        // it still has some when the stream begins, so its counter is known
        for _ in 0..4 {
            load.ask(claim(Some("first")), None, 60, 60);
        }
        load.step();
        let mut name = 0;
        let mut last = None;
        for _ in 0..4000 {
            while load.s.waiting() < 8 {
                name += 1;
                let (p, n) = (load.any(1, 4), load.any(1, 2));
                load.ask(claim(Some(&format!("new{name}"))), None, p, n);
            }
            if last.is_none() {
                last = Some(load.ask(claim(Some("first")), None, 1, 1));
            }
            load.step();
            if last.is_some_and(|id| load.began.contains_key(&id)) {
                break;
            }
        }
        assert!(last.is_some_and(|id| load.began.contains_key(&id)), "{ahead} served before, and starved ever since");
    }
}

#[test]
fn nobody_waits_for_ever_in_any_load() {
    for seed in 0..12 {
        let pages = if seed % 2 == 0 { 14 } else { 60 };
        let mut load = Load::new(Limits { max_deltas: 2, pages: Some(pages), ..four() }, seed);
        let mut longest = 0;
        for _ in 0..3000 {
            while load.s.waiting() < 10 {
                let tenant = format!("t{}", load.any(0, 5));
                let of = delta(load.any(0, 7) as u8);
                // one in ten takes most of the cache
                let p = if load.any(0, 9) == 0 { load.any(100, 180) } else { load.any(1, 40) };
                let n = load.any(1, 24);
                load.ask(claim(Some(&tenant)), of, p, n);
            }
            load.step();
            let waits = load.left.iter().filter(|(id, _)| !load.began.contains_key(id));
            longest = waits.map(|(_, (.., came))| load.step - came).chain([longest]).max().unwrap_or(0);
        }
        // fourteen are ahead of it at most when it comes, one at a time, two turns to a round
        assert!(longest < 14 * 2 * (180 / 32 + 1 + 24), "seed {seed}: a wait of {longest} steps");
    }
}

#[test]
fn ever_new_deltas_leave_a_running_one_its_turns() {
    for cap in 1..4usize {
        let mut load = Load::new(Limits { max_deltas: cap, ..four() }, 1);
        let first = load.ask(claim(None), delta(1), 4, 50);
        let (mut gap, mut n) = (0, 1);
        while load.left.contains_key(&first) {
            while load.s.waiting() < 6 {
                n += 1;
                load.ask(claim(None), Some(DeltaId::from_bytes([n; 32])), 3, 1);
            }
            gap = if load.step().contains(&first) { 0 } else { gap + 1 };
            // those that were there before its last turn, three beside it
            assert!(gap <= 4usize.div_ceil(cap), "{gap} steps without a turn");
        }
        assert!(n > 20);
    }
}

#[test]
fn priorities_order_a_tenants_own_requests_and_no_others() {
    let mut s = Scheduler::new(Limits { max_sequences: 1, ..limits() });
    let mut ask = |id: SeqId, tenant: &str, priority: i32| {
        let claim = Claim { priority, ..claim(Some(tenant)) };
        s.submit(id, None, Demand { claim, ..demand(10, 10) }).expect("fits");
    };
    (0..3).for_each(|id| ask(id, "a", 0));
    (3..6).for_each(|id| ask(id, "b", 0));
    ask(6, "a", 5);
    ask(7, "a", -5);
    ask(8, "a", 100);
    ask(9, "a", 5);
    let mut order = vec![];
    while !s.is_idle() {
        let plan = s.plan();
        plan.shares.iter().for_each(|share| s.remove(share.id));
        order.extend(ids(&plan));
    }
    let of = |tenant: &[SeqId]| order.iter().copied().filter(|id| tenant.contains(id)).collect::<Vec<_>>();
    assert_eq!(of(&[0, 1, 2, 6, 7, 8, 9]), [8, 6, 9, 0, 1, 2, 7], "higher ones first, then as they came");
    assert_eq!(of(&[3, 4, 5]), [3, 4, 5]);
    // the other's come in between, one each, whatever number is on these
    assert_eq!(order[..6].iter().filter(|id| [3, 4, 5].contains(id)).count(), 3, "{order:?}");
}

#[test]
fn what_is_cached_or_computed_again_is_not_charged() {
    let mut s = Scheduler::new(Limits { pages: Some(6), ..limits() });
    let (a, b) = (claim(Some("a")), claim(Some("b")));
    let count = |s: &Scheduler, c: &Claim| s.fair.counter(&c.tenant).unwrap_or(0.0);
    s.submit(1, None, Demand { claim: a.clone(), ..sharing::text_demand(&[7; 40], 40) }).expect("fits");
    while !sharing::step(&mut s).shares[0].completes {}
    assert_eq!(count(&s, &a), 40.0 + 2.0, "a prompt and its first token");
    // the other tenant has 32 of these tokens already, only by way of this test
    s.submit(2, None, Demand { claim: b.clone(), ..sharing::text_demand(&[7; 44], 36) }).expect("fits");
    let before = count(&s, &b);
    let plan = sharing::step(&mut s);
    assert!(plan.shares.iter().any(|share| (share.id, share.context) == (2, 32)), "{plan:?}");
    assert_eq!(count(&s, &b) - before, 12.0 + 2.0);
    let (mut lost, mut tokens) = (0, 1.0);
    while lost == 0 {
        let plan = sharing::step(&mut s);
        lost = plan.preempted.iter().filter(|id| **id == 2).count();
        tokens += f64::from(u8::from(plan.shares.iter().any(|share| share.id == 2 && share.completes)));
    }
    s.remove(1);
    while !s.is_idle() {
        let plan = sharing::step(&mut s);
        tokens += f64::from(u8::from(plan.shares.iter().any(|share| share.completes)));
        if tokens == 36.0 {
            break;
        }
    }
    assert_eq!(count(&s, &b) - before, 12.0 + 2.0 * tokens, "what it computed again was on us");
}

#[test]
fn a_search_that_starts_over_is_charged_for_its_tokens_once() {
    let mut s = Scheduler::new(Limits { pages: Some(8), ..limits() });
    for (id, tenant) in [(1, "a"), (2, "b")] {
        let search = Demand { width: 3, claim: claim(Some(tenant)), ..demand(PAGE_SIZE - 1, 2 * PAGE_SIZE) };
        s.submit(id, None, search).expect("fits");
    }
    let payer = claim(Some("b")).tenant;
    let (mut tokens, mut lost, mut before) = (BTreeMap::new(), 0, None);
    while !tokens.contains_key(&(2 * PAGE_SIZE - 1, 0)) {
        if lost > 0 {
            s.remove(1);
        }
        before = before.or(s.fair.counter(&payer));
        let plan = s.plan();
        lost += plan.preempted.len();
        for share in &plan.shares {
            if share.id == 2 && share.completes {
                tokens.insert((share.context + share.len, share.branch), ());
            }
            if share.branch == 0 {
                s.advance(share, share.completes);
            }
        }
        [1, 2].into_iter().for_each(|id| s.branch(id, 3));
    }
    let charged = s.fair.counter(&payer).zip(before).map(|(now, before)| now - before);
    assert_eq!(lost, 1);
    assert_eq!(charged, Some((PAGE_SIZE - 1 + 2 * tokens.len()) as f64), "{tokens:?}");
}

#[test]
fn work_that_generates_nothing_is_charged_its_input() {
    let mut s = Scheduler::new(limits());
    let read = Demand { generates: false, claim: claim(Some("a")), ..demand(50, 50) };
    s.submit(1, None, read).expect("fits");
    while !s.plan().shares.iter().any(|share| share.completes) {
        s.advance(
            &Share { id: 1, branch: 0, context: 0, len: 32, drafts: 0, encode: 0, keys_due: false, completes: false },
            false,
        );
    }
    assert_eq!(s.fair.counter(&claim(Some("a")).tenant), Some(50.0));
}

#[test]
fn tenants_that_went_away_are_forgotten() {
    let mut accounts = Accounts::default();
    let of = |n: usize| TenantId::new(&format!("t{n}")).ok();
    accounts.join(&of(0), 1, (0, 0));
    for n in 1..5000 {
        let id = n as SeqId;
        accounts.join(&of(n), 1, (0, id));
        accounts.begin(&of(n), (0, id));
        // each far ahead of the one that always waits, so there is something to remember
        accounts.charge(&of(n), 1000 * n as u64);
        accounts.end(&of(n));
        assert!(accounts.len() <= 1100, "{} accounts", accounts.len());
    }
    assert!(accounts.len() > 1);
    accounts.give_up(&of(0), (0, 0));
    assert!(accounts.is_empty());
}

#[test]
fn who_asks_one_by_one_keeps_its_count_while_others_wait() {
    let mut accounts = Accounts::default();
    let (busy, one) = (TenantId::new("busy").ok(), TenantId::new("one").ok());
    (0..3).for_each(|id| accounts.join(&busy, 1, (0, id)));
    accounts.join(&one, 1, (0, 3));
    accounts.begin(&one, (0, 3));
    accounts.charge(&one, 500);
    accounts.end(&one);
    accounts.join(&one, 1, (0, 4));
    assert_eq!(accounts.counter(&one), Some(500.0), "coming back does not make it new");
    assert_eq!(accounts.line(4, |_| true, |_| 100), [0, 1, 2, 4]);
    assert_eq!(accounts.line(2, |id| id != 0, |_| 600), [1, 4], "who may not begin takes no place and costs nothing");
    // and whoever comes now begins between them
    let new = TenantId::new("new").ok();
    accounts.join(&new, 1, (0, 5));
    let counter = accounts.counter(&new).expect("it is there");
    assert!((0.0..=500.0).contains(&counter) && counter > 0.0, "{counter}");
}
