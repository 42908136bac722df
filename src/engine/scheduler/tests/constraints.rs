//! Room for the states of constraints.

use super::*;

fn submit(s: &mut Scheduler, id: SeqId, constraint_bytes: u64) {
    s.submit(id, None, Demand { constraint_bytes, ..demand(10, 30) }).expect("fits");
}

fn ids(plan: &StepPlan) -> Vec<SeqId> {
    let mut ids: Vec<SeqId> = plan.shares.iter().map(|share| share.id).collect();
    ids.sort_unstable();
    ids
}

#[test]
fn a_state_without_room_waits_and_only_those_without_one_pass() {
    let mut s = Scheduler::new(limits());
    // 100 are there
    for (id, bytes) in [(0, 60), (1, 50), (2, 30), (3, 0)] {
        submit(&mut s, id, bytes);
    }
    assert_eq!((ids(&s.plan()), s.constraint_bytes()), (vec![0, 3], 60), "30 would fit, but 50 came first");
    s.remove(0);
    assert_eq!((ids(&s.plan())[..2].to_vec(), s.constraint_bytes()), (vec![1, 2], 80));
    submit(&mut s, 4, 100);
    s.remove(3);
    s.remove(1);
    s.plan();
    assert_eq!(s.constraint_bytes(), 30);
    s.remove(2);
    assert_eq!((ids(&s.plan()), s.constraint_bytes()), (vec![4], 100));
    let never = s.submit(5, None, Demand { constraint_bytes: 101, ..demand(10, 30) });
    assert_eq!(never, Err(NeverFits::Constraint { bytes: 101, limit: 100 }));
}

#[test]
fn the_largest_goes_where_all_have_grown_over_the_limit() {
    let mut s = Scheduler::new(limits());
    submit(&mut s, 0, 40);
    submit(&mut s, 1, 40);
    s.plan();
    assert_eq!(s.largest_constraint(), None);
    s.set_constraint_bytes(1, 61);
    assert_eq!(s.largest_constraint(), Some((1, 61, 100)));
    submit(&mut s, 2, 1);
    s.plan();
    assert_eq!(s.waiting(), 1, "nothing begins beside too much");
    s.remove(1);
    assert_eq!(s.largest_constraint(), None);
    s.plan();
    assert_eq!((s.waiting(), s.constraint_bytes()), (0, 41));
}

#[test]
fn a_sequence_that_lost_its_pages_still_has_its_state() {
    let mut s = Scheduler::new(Limits { pages: Some(2), ..limits() });
    for id in [0, 1] {
        s.submit(id, None, Demand { constraint_bytes: 50, ..demand(PAGE_SIZE, PAGE_SIZE + 4) }).expect("fits");
    }
    let plan = s.plan();
    assert_eq!(ids(&plan), [0, 1]);
    plan.shares.iter().for_each(|share| s.advance(share, true));
    assert_eq!(s.plan().preempted, [1], "the older one took its page");
    submit(&mut s, 2, 1);
    assert_eq!((s.constraint_bytes(), s.waiting()), (100, 2));
}

#[test]
fn those_without_a_state_pass_however_many_wait_for_room() {
    let mut s = Scheduler::new(Limits { max_batch_tokens: 512, ..limits() });
    // more than the line has
    (0..60).for_each(|id| submit(&mut s, id, 50));
    (60..63).for_each(|id| submit(&mut s, id, 0));
    assert_eq!((ids(&s.plan()), s.constraint_bytes()), (vec![0, 1, 60, 61, 62], 100));
    // with all places taken, and then one
    (63..67).for_each(|id| submit(&mut s, id, 0));
    s.plan();
    assert_eq!((s.running(), s.waiting()), (8, 59));
    s.remove(62);
    assert!(ids(&s.plan()).contains(&66));
    // room goes to the one that came first
    s.remove(0);
    let begun = ids(&s.plan());
    assert!(begun.contains(&2) && s.constraint_bytes() == 100, "{begun:?}");
}
