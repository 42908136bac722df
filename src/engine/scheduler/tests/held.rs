//! Behind a sequence that has no room: who overtakes it, and for how long.

use super::*;

/// A request of its own tenant.
fn ask(s: &mut Scheduler, id: SeqId, total: usize, most: usize) {
    let claim = claim(Some(&format!("t{id}")));
    s.submit(id, None, Demand { claim, ..demand(total, most) }).expect("fits");
}

#[test]
fn only_who_ends_in_time_overtakes_one_that_has_no_room() {
    let mut s = Scheduler::new(Limits { pages: Some(10), ..limits() });
    // six pages until 20 steps from now, and four are free
    ask(&mut s, 1, 90, 90 + 6);
    ask(&mut s, 2, 4, 4 + 40);
    go(&mut s);
    let (left, free) = (6 + 2, s.pool().available());
    assert_eq!(free, 3);
    ask(&mut s, 3, 80, 85); // five pages: waits for the first to end
    ask(&mut s, 4, 4, 4 + 30); // longer than that takes
    ask(&mut s, 5, 4, 4 + left / 2); // ends before
    ask(&mut s, 6, 30, 60); // too large
    let plan = go(&mut s);
    let begun: Vec<SeqId> = ids(&plan).into_iter().filter(|id| *id > 2).collect();
    assert_eq!(begun, [5]);
    let mut step = 0;
    loop {
        for share in go(&mut s).shares {
            let entry = &s.running[&share.id];
            if entry.computed == entry.most {
                s.remove(share.id);
            }
        }
        if s.running.contains_key(&3) {
            break;
        }
        step += 1;
        assert!(step <= left + left / 5, "it should have begun");
        assert!(!s.running.contains_key(&4) && !s.running.contains_key(&6));
    }
}

/// It needs all pages, and of a stream of short requests, one a step, one would always be about to begin while another that
/// takes as long has only just begun.
#[test]
fn a_stream_of_short_ones_does_not_stretch_the_wait() {
    for long in [10, 20, 40] {
        let mut s = Scheduler::new(Limits { pages: Some(12), ..limits() });
        let same = |total: usize, most: usize| Demand { claim: claim(Some("a")), ..demand(total, most) };
        s.submit(0, None, same(60, 60 + long)).expect("fits");
        go(&mut s);
        s.submit(1, None, same(12 * PAGE_SIZE - 3, 12 * PAGE_SIZE)).expect("fits");
        let (mut id, mut overtook, mut steps) = (2, 0, 0);
        while !s.running.contains_key(&1) {
            s.submit(id, None, same(3, 8)).expect("fits");
            id += 1;
            for share in go(&mut s).shares {
                let entry = &s.running[&share.id];
                if entry.computed == entry.most {
                    overtook += usize::from(share.id > 1);
                    s.remove(share.id);
                }
            }
            steps += 1;
            // two chunks and its tokens, and a fifth
            assert!(steps <= (2 + long) * 6 / 5 + 1, "{steps} steps and it has not begun");
        }
        assert!(overtook > 2, "room that it cannot use is used");
    }
}

#[test]
fn nobody_overtakes_one_that_lost_its_pages() {
    let mut s = Scheduler::new(Limits { pages: Some(4), ..limits() });
    ask(&mut s, 1, PAGE_SIZE, 4 * PAGE_SIZE);
    ask(&mut s, 2, 2 * PAGE_SIZE, 4 * PAGE_SIZE);
    go(&mut s);
    let mut lost = false;
    while !lost {
        lost = go(&mut s).preempted == [2];
    }
    ask(&mut s, 3, 1, 1);
    assert!(s.pool().available() > 0, "it would fit");
    assert_eq!(ids(&go(&mut s)), [1]);
    s.remove(1);
    assert_eq!(ids(&go(&mut s)), [2, 3]);
}

/// Who began last gives its pages, however early it came.
#[test]
fn the_one_that_began_last_gives_its_pages() {
    let mut s = Scheduler::new(Limits { pages: Some(4), max_sequences: 2, ..limits() });
    let of = |tenant, total: usize, most: usize| Demand { claim: claim(Some(tenant)), ..demand(total, most) };
    s.submit(0, None, of("flood", 1, 1)).expect("fits");
    s.submit(1, None, of("flood", 1, 20)).expect("fits");
    s.submit(2, None, of("flood", PAGE_SIZE, 3 * PAGE_SIZE)).expect("fits");
    let plan = s.plan();
    assert_eq!(ids(&plan), [0, 1]);
    s.advance(&plan.shares[1], true);
    s.submit(3, None, of("other", PAGE_SIZE, 3 * PAGE_SIZE)).expect("fits");
    s.remove(0);
    // it came last and begins ahead of the flood's third
    let plan = go(&mut s);
    assert_eq!(ids(&plan), [1, 3]);
    s.remove(1);
    assert_eq!(ids(&go(&mut s)), [3, 2]);
    let mut lost = vec![];
    while lost.is_empty() {
        lost = go(&mut s).preempted;
    }
    assert_eq!(lost, [2]);
}
