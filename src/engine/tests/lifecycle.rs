//! Ends: whatever happens to a request, its pages, lease and permit come back and the others go on.

use super::*;
use crate::model::testing::tiny_bert;

#[test]
fn a_client_that_leaves_frees_its_sequence() {
    let base = long_base();
    let engine = Engine::new(&base, endless(2));
    let stays = Job::new(prompt(1, 4), greedy(60)).with(&delta(&base, 1, 0));
    let leaves = Job::new(prompt(2, 4), greedy(ENDLESS)).with(&delta(&base, 2, 0));
    let permits = Arc::new(tokio::sync::Semaphore::new(1));
    let (mut request, mut events) = leaves.request();
    request.permit = Some(Permit::new(Arc::clone(&permits).try_acquire_owned().expect("permit")));
    engine.handle.submit(request).expect("taken");
    let stays_events = engine.submit(&stays);
    assert!(matches!(events.blocking_recv(), Some(Event::Token(..))));
    drop(events);
    until(|| Arc::strong_count(&leaves.lease) == 1 && permits.available_permits() == 1);
    assert_eq!(Answer::read(stays_events).tokens.len(), 60);
    engine.settle();
    until(|| Arc::strong_count(&stays.lease) == 1);
    assert!(engine.handle.stats().steps < ENDLESS as u64, "it ran to its end");
}

#[test]
fn a_tenants_sequences_end_and_its_pages_go_and_nobody_elses() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let end = |tenant: &str| engine.handle.end_tenant(&TenantId::new(tenant).expect("a name")).expect("there is room");
    let job = |tenant: &str| Job::new(prompt(6, 50), greedy(4)).of(tenant);
    let read = |tenant: &str| Answer::read(engine.submit(&job(tenant)));
    assert_eq!([read("a").cached(), read("b").cached()], [0, 0]);
    assert_eq!([read("a").cached(), read("b").cached()], [48, 48]);
    engine.settle();
    let both = engine.handle.stats().pages_cached;
    assert!(end("a").blocking_recv().is_err(), "the answer is that nobody will answer");
    until(|| engine.handle.stats().pages_cached == both / 2);
    assert_eq!([read("b").cached(), read("a").cached()], [48, 0]);
    // what waits or runs ends, and the next is served
    let held = engine.hold();
    let (own, other) = (engine.submit(&job("a")), engine.submit(&job("b")));
    let ended = end("a");
    drop(held);
    assert!(ended.blocking_recv().is_err());
    assert_eq!(Answer::read(own).failed, Some(EngineError::TenantEnded));
    assert_eq!((Answer::read(other).tokens.len(), read("a").tokens.len()), (4, 4));
    engine.settle();
}

#[test]
fn a_thousand_opens_and_cancels_leave_nothing_behind() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, EngineConfig { queue: 2000, kv_pages: 40, ..roomy() });
    let deltas: Vec<_> = (1..9).map(|n| delta(&base, n, 0)).collect();
    let lease = Arc::new(());
    for i in 0..1000usize {
        let mut job = Job::new(prompt(i as u64, 1 + i % 40), greedy(1 + i % 100)).with(&deltas[i % 8]);
        job.lease = Arc::clone(&lease);
        let mut events = engine.submit(&job);
        if i % 7 == 0 {
            events.blocking_recv();
        }
    }
    engine.settle();
    until(|| Arc::strong_count(&lease) == 1);
}

#[test]
fn a_request_past_its_deadline_never_starts() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let late = Job { deadline: Some(Instant::now()), ..Job::new(prompt(1, 4), greedy(9)) };
    let answer = Answer::read(engine.submit(&late));
    assert!(matches!(answer.failed, Some(EngineError::DeadlineExceeded(_))), "{answer:?}");
    assert_eq!(engine.handle.stats().steps, 0);
}

#[test]
fn a_running_request_ends_at_its_deadline() {
    let engine = Engine::new(&long_base(), endless(1));
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let answer = Answer::read(engine.submit(&Job { deadline, ..Job::new(prompt(1, 4), greedy(ENDLESS)) }));
    assert!(matches!(answer.failed, Some(EngineError::DeadlineExceeded(_))), "{:?}", answer.failed);
    assert!(answer.tokens.len() < ENDLESS);
    engine.settle();
}

#[test]
fn numbers_that_are_not_finite_fail_their_request_only() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let Some((id, good)) = delta(&base, 3, 0) else { unreachable!() };
    let sick = good.patches().iter().map(|(site, patch)| {
        let Patch::LowRank(l) = patch else { unreachable!() };
        (*site, Patch::LowRank(LowRank { scale: f64::NAN, ..l.clone() }))
    });
    let sick = Some((DeltaId::from_bytes([99; 32]), Arc::new(Delta::new(spec(Task::CausalLm), sick.collect(), None))));
    let well = Job::new(prompt(1, 9), greedy(8)).with(&Some((id, good)));
    let expected = Answer::read(engine.submit(&well));
    let jobs = [
        well,
        Job::new(prompt(1, 9), greedy(8)).with(&sick),
        Job::new(prompt(1, 9), Work::Score { from: 1 }).with(&sick),
        Job::new(prompt(1, 9), Work::Embed { pooling: Pooling::Mean, normalize: true }).with(&sick),
    ];
    let mut answers = engine.together(&jobs);
    for answer in answers.drain(1..) {
        assert_eq!(answer.failed, Some(EngineError::NonFinite));
    }
    assert_same(&answers, &[expected]);
    engine.settle();
}

#[test]
fn a_step_that_fails_takes_only_its_own_requests_with_it() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let Some((_, good)) = delta(&base, 3, 0) else { unreachable!() };
    let mut rng = Rng(1);
    let misfit = LowRank { a: tensor(&mut rng, &[2, 5], 1.0), b: tensor(&mut rng, &[2, 3], 1.0), scale: 1.0 };
    let misfit = Delta::new(spec(Task::CausalLm), vec![(good.patches()[0].0, Patch::LowRank(misfit))], None);
    let broken = Job::new(prompt(1, 9), greedy(8)).with(&Some((DeltaId::from_bytes([98; 32]), Arc::new(misfit))));
    let answer = Answer::read(engine.submit(&broken));
    assert!(matches!(answer.failed, Some(EngineError::Internal(_))), "{answer:?}");
    engine.settle();
    until(|| Arc::strong_count(&broken.lease) == 1);
    assert!(engine.handle.is_alive());
    assert_eq!(Answer::read(engine.submit(&Job::new(prompt(1, 9), greedy(8)))).tokens.len(), 8);
}

#[test]
fn what_can_never_be_served_is_refused_at_once() {
    let llama = base(&tiny_llama());
    let engine = Engine::new(&llama, EngineConfig { kv_pages: 4, ..roomy() });
    let refused = |engine: &Engine, job: Job| match engine.handle.submit(job.request().0) {
        Err(SubmitError::Invalid(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(&engine, Job::new(vec![], greedy(1))).contains("no tokens"));
    assert!(refused(&engine, Job::new(vec![1, 128], greedy(1))).contains("128"));
    assert!(refused(&engine, Job::new(vec![u32::MAX], Work::Classify)).contains("vocabulary"));
    assert!(refused(&engine, Job::new(vec![1], greedy(0))).contains("at least 1"));
    assert!(refused(&engine, Job::new(vec![1], greedy(usize::MAX))).contains("exceed the 64 positions"));
    assert!(refused(&engine, Job::new(vec![1; 60], greedy(5))).contains("60 prompt tokens and 5"));
    assert!(refused(&engine, Job::new(vec![1], Work::Score { from: 1 })).contains("position 1"));
    assert!(refused(&engine, Job::new(vec![1, 2], Work::Score { from: 0 })).contains("position 0"));
    assert_eq!(Answer::read(engine.submit(&Job::new(vec![1; 60], greedy(4)))).tokens.len(), 4);
    let bert = base(&tiny_bert());
    let engine = Engine::new(&bert, roomy());
    assert!(refused(&engine, Job::new(vec![1], greedy(1))).contains("bert"));
    let types = Job { types: Some(vec![0, 2]), ..Job::new(vec![1, 2], Work::Classify) };
    assert!(refused(&engine, types).contains("token types"));
    assert!(refused(&engine, Job::new(vec![1; 65], Work::Classify)).contains("64 positions"));
}

#[test]
fn shutdown_lets_running_work_finish_and_takes_no_more() {
    let base = base(&tiny_llama());
    let mut engine = Engine::new(&base, roomy());
    let events = engine.submit(&Job::new(prompt(1, 4), greedy(100)));
    engine.handle.shutdown(Duration::from_secs(60));
    assert_eq!(engine.handle.submit(Job::new(vec![1], greedy(1)).request().0), Err(SubmitError::Draining));
    assert_eq!(Answer::read(events).tokens.len(), 100);
    engine.thread.take().map(JoinHandle::join).expect("once").expect("no panic");
    assert!(!engine.handle.is_alive());
    engine.thread = Some(std::thread::spawn(|| {}));
}

#[test]
fn shutdown_fails_what_is_left_at_the_end_of_grace() {
    let engine = Engine::new(&long_base(), EngineConfig { max_sequences: 1, ..endless(1) });
    let held = engine.hold();
    let running = engine.submit(&Job::new(prompt(1, 4), greedy(ENDLESS)));
    let waiting = engine.submit(&Job::new(prompt(2, 4), greedy(ENDLESS)));
    engine.handle.shutdown(Duration::from_millis(2));
    drop(held);
    assert_eq!(Answer::read(running).failed, Some(EngineError::Draining));
    assert_eq!(Answer::read(waiting).failed, Some(EngineError::Draining));
}

#[test]
fn a_full_queue_is_an_answer() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, EngineConfig { queue: 1, ..roomy() });
    let job = |i| Job::new(prompt(i, 30), greedy(1));
    let held = engine.hold();
    let first = engine.submit(&job(0));
    for i in 1..9 {
        assert_eq!(engine.handle.submit(job(i).request().0), Err(SubmitError::Overloaded(1)));
    }
    drop(held);
    assert!(Answer::read(first).finished.is_some());
    assert!(Answer::read(engine.submit(&job(9))).finished.is_some(), "there is room again");
}

#[test]
fn serving_marks_itself_busy_while_it_works() {
    let engine = Engine::new(&long_base(), endless(1));
    assert!(!engine.pacer.is_busy());
    let mut events = engine.submit(&Job::new(prompt(1, 4), greedy(ENDLESS)));
    events.blocking_recv();
    assert!(engine.pacer.is_busy());
    drop(events);
    engine.settle();
}

#[test]
fn what_may_be_computed_in_halves_is_told_to_the_steps() {
    let base = base(&tiny_llama());
    for (rows, halves) in [(241, Halves::Always), (239, Halves::Training)] {
        let engine = Engine::new(&base, EngineConfig { halves, ..roomy() });
        Answer::read(engine.submit(&Job::new(prompt(1, rows), greedy(1))));
        // steps of other tests may have as many rows, but they permit nothing
        assert!(crate::ops::asked::permitted(rows).contains(&halves), "{halves:?}");
    }
}
