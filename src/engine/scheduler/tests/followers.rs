//! Prompts that begin alike: who waits for whose pages, and for how long.

use super::{sharing::step, *};

/// Most rows of a sequence in a step.
const CHUNK: usize = 64;

fn wide() -> Limits {
    Limits { max_batch_tokens: 4 * CHUNK, prefill_chunk: CHUNK, ..limits() }
}

fn named(tenant: &str, of: Option<DeltaId>, tokens: &[u32]) -> Demand {
    let mut keys = PageKeys::new(&TenantId::new(tenant).expect("a name"), of, Ahead::default());
    let names = Names { ahead: vec![], rows: keys.next(tokens, tokens.len()) };
    Demand { names, claim: claim(Some(tenant)), ..demand(tokens.len(), tokens.len() + 8) }
}

/// So many tokens that are the same for all, and some of its own.
fn text(common: usize, own: u32, len: usize) -> Vec<u32> {
    [vec![7; common], vec![own; len - common]].concat()
}

/// Sequence, rows before and rows of each share.
fn shares(plan: &StepPlan) -> Vec<(SeqId, usize, usize)> {
    plan.shares.iter().map(|share| (share.id, share.context, share.len)).collect()
}

#[test]
fn of_prompts_that_begin_alike_the_first_is_computed_and_the_others_begin_behind_it() {
    let mut s = Scheduler::new(wide());
    for id in 1..=4 {
        s.submit(id, None, named("t", None, &text(64, id as u32, 70))).expect("fits");
    }
    s.submit(5, None, named("t", None, &text(0, 9, 30))).expect("fits");
    assert_eq!(shares(&step(&mut s)), [(1, 0, 64), (5, 0, 30)], "who shares nothing waits for nobody");
    let plan = step(&mut s);
    let begun: Vec<_> = shares(&plan).into_iter().filter(|share| share.0 != 5).collect();
    assert_eq!(begun, [(1, 64, 6), (2, 64, 6), (3, 64, 6), (4, 64, 6)]);
    assert_eq!(s.pool().used(), 4 + 4 + 2, "four pages of all, one each, two of the other");
}

#[test]
fn a_long_beginning_is_waited_for_until_its_last_pages() {
    let mut s = Scheduler::new(wide());
    let (long, branch) = (text(200, 1, 220), text(150, 2, 160));
    s.submit(1, None, named("t", None, &long)).expect("fits");
    s.submit(2, None, named("t", None, &branch)).expect("fits");
    assert_eq!(shares(&step(&mut s)), [(1, 0, 64)]);
    assert_eq!(shares(&step(&mut s)), [(1, 64, 64)]);
    // 144 tokens are whole pages of both, of which 128 are there: one page is not worth a step
    assert_eq!(shares(&step(&mut s)), [(1, 128, 64), (2, 128, 32)]);
}

#[test]
fn other_tenants_and_deltas_wait_for_nobody() {
    let mut s = Scheduler::new(wide());
    let tokens = text(60, 1, 60);
    s.submit(1, None, named("a", None, &tokens)).expect("fits");
    s.submit(2, None, named("b", None, &tokens)).expect("fits");
    s.submit(3, delta(1), named("a", delta(1), &tokens)).expect("fits");
    s.submit(4, delta(1), named("a", delta(1), &tokens)).expect("fits");
    // no names: its pages are nobody else's
    s.submit(5, None, demand(60, 70)).expect("fits");
    let mut begun = ids(&step(&mut s));
    begun.sort_unstable();
    assert_eq!(begun, [1, 2, 3, 5]);
}

#[test]
fn where_nobody_fills_them_any_more_the_next_one_does() {
    for preempted in [false, true] {
        let mut s = Scheduler::new(Limits { prefill_chunk: 32, ..wide() });
        s.submit(1, None, named("t", None, &text(100, 1, 110))).expect("fits");
        s.submit(2, None, named("t", None, &text(100, 2, 110))).expect("fits");
        s.submit(3, None, named("t", None, &text(100, 3, 110))).expect("fits");
        assert_eq!(shares(&step(&mut s)), [(1, 0, 32)]);
        if preempted {
            s.preempt(1, &mut StepPlan::default());
            // it comes back first, and they wait again
            assert_eq!(shares(&step(&mut s)), [(1, 32, 32)]);
        } else {
            s.remove(1);
            assert_eq!(shares(&step(&mut s)), [(2, 32, 32)], "behind what was filled, and the third waits for it now");
            s.remove(2);
            assert_eq!(shares(&step(&mut s)), [(3, 64, 32)]);
        }
    }
}

#[test]
fn it_waits_for_a_bounded_time() {
    let mut s = Scheduler::new(wide());
    s.submit(1, None, named("t", None, &text(64, 1, 70))).expect("fits");
    s.submit(2, None, named("t", None, &text(64, 2, 70))).expect("fits");
    // as if the first one never got anywhere
    let waited = (0..100).take_while(|_| !ids(&s.plan()).contains(&2)).count();
    assert!((2..=12).contains(&waited), "{waited}");
}

#[test]
fn one_that_waits_for_pages_keeps_no_place_and_no_page() {
    let mut s = Scheduler::new(Limits { pages: Some(9), max_sequences: 2, ..wide() });
    s.submit(1, None, named("t", None, &text(64, 1, 70))).expect("fits");
    s.submit(2, None, named("t", None, &text(64, 2, 70))).expect("fits");
    s.submit(3, None, Demand { claim: claim(Some("t")), ..demand(40, 41) }).expect("fits");
    assert_eq!(ids(&step(&mut s)), [1, 3], "the third takes the other place and three of four pages");
    s.remove(3);
    assert_eq!(shares(&step(&mut s)), [(1, 64, 6), (2, 64, 6)]);
}
