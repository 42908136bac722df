//! Tenants beside each other in the engine: a flood, more deltas than a step takes, priorities.

use super::*;

/// The order in which jobs that are all there at once have their first steps, by their indices. They arrive within
/// microseconds, and a step takes longer: it is that of their waits.
fn order(engine: &Engine, jobs: &[Job]) -> Vec<usize> {
    let held = engine.hold();
    let receivers: Vec<_> = jobs.iter().map(|job| engine.submit(job)).collect();
    drop(held);
    let wait = |(i, mut events): (usize, mpsc::Receiver<Event>)| match events.blocking_recv() {
        // the others' events stay in their channels
        Some(Event::Token(_, began)) => ((began.queue, i), events),
        other => panic!("request {i}: {other:?}"),
    };
    let mut waits: Vec<_> = receivers.into_iter().enumerate().map(wait).collect();
    waits.sort_unstable_by_key(|(wait, _)| *wait);
    waits.into_iter().map(|((_, i), _)| i).collect()
}

/// One place: a request waits until all before it have ended.
fn narrow() -> EngineConfig {
    EngineConfig { max_sequences: 1, ..roomy() }
}

#[test]
fn a_single_request_does_not_wait_for_the_flood_before_it() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, EngineConfig { max_sequences: 2, ..roomy() });
    let flood = |i: u64| Job::new(prompt(i, 5 + (i as usize) % 20), greedy(8)).of("flood");
    let mut jobs: Vec<Job> = (0..60).map(flood).collect();
    jobs.push(Job::new(prompt(99, 9), greedy(3)).of("single"));
    let alone = Answer::read(engine.submit(&jobs[60]));
    let answers = engine.together(&jobs);
    assert_same(&answers[60..], &[alone]);
    let queue = |answer: &Answer| answer.finished.as_ref().expect("it finished").timings.queue;
    let before = answers[..60].iter().filter(|flood| queue(flood) < queue(&answers[60])).count();
    assert!(before <= 4, "{before} of the flood began before it, of which two had places already");
    engine.settle();
}

#[test]
fn more_deltas_than_a_step_takes_wait_for_their_turns_and_say_what_they_say_alone() {
    let base = base(&tiny_llama());
    let job = |i: u64| {
        let job = Job::new(prompt(i, 3 + (i as usize * 5) % 30), greedy(6 + (i as usize) % 9));
        job.with(&delta(&base, 1 + i as u8, 0)).of(["a", "b", "c"][i as usize % 3])
    };
    let jobs: Vec<Job> = (0..24).map(job).collect();
    let engine = Engine::new(&base, roomy());
    let expected: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
    for max_deltas in [1, 3] {
        let engine = Engine::new(&base, EngineConfig { max_deltas, max_sequences: 9, kv_pages: 30, ..roomy() });
        assert_same(&engine.together(&jobs), &expected);
        engine.settle();
    }
}

#[test]
fn a_tenants_requests_begin_by_priority_and_another_tenants_do_not_care() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, narrow());
    let job = |i: u64, priority: i32| Job { priority, ..Job::new(prompt(i, 6), greedy(4)) };
    // equal ones of each tenant, so that they take turns
    let jobs: Vec<Job> = (0..4u64)
        .flat_map(|i| [job(i, i as i32 * 10 - 20).of("a"), job(10 + i, if i == 0 { 100 } else { 0 }).of("b")])
        .collect();
    let order = order(&engine, &jobs);
    let of = |even: bool| order.iter().copied().filter(|i| (i % 2 == 0) == even).collect::<Vec<_>>();
    assert_eq!(of(true), [6, 4, 2, 0]);
    assert_eq!(of(false), [1, 3, 5, 7]);
    let apart = order.windows(3).all(|w| w.iter().any(|i| i % 2 == 0) && w.iter().any(|i| i % 2 == 1));
    assert!(apart, "{order:?}: tenants take turns whatever their priorities are");
    engine.settle();
}

#[test]
fn what_leaves_while_it_waits_leaves_no_account_behind() {
    let engine = Engine::new(&long_base(), EngineConfig { max_sequences: 1, ..endless(1) });
    let mut running = engine.submit(&Job::new(prompt(1, 4), greedy(ENDLESS)).of("a"));
    assert!(matches!(running.blocking_recv(), Some(Event::Token(..))));
    let waiting: Vec<_> = (0..20).map(|i| engine.submit(&Job::new(prompt(i, 4), greedy(9)).of("b"))).collect();
    until(|| engine.handle.stats().waiting == 20);
    drop(waiting);
    until(|| engine.handle.stats().waiting == 0);
    // and the next one of that tenant is served as if nothing had been
    let late = engine.submit(&Job::new(prompt(3, 4), greedy(2)).of("b"));
    drop(running);
    assert_eq!(Answer::read(late).tokens.len(), 2);
    engine.settle();
}
