//! Prompts that begin alike and come at once: computed once, and everybody says what they would have said.

use super::*;

/// Fifty tokens that all have, and some of its own.
fn text(n: u64) -> Vec<u32> {
    [prompt(2000, 50), prompt(n, 6)].concat()
}

fn cached(answers: &[Answer]) -> Vec<u32> {
    answers.iter().map(Answer::cached).collect()
}

#[test]
fn those_that_come_at_once_with_one_beginning_compute_it_once() {
    let base = base(&tiny_llama());
    let with = delta(&base, 1, 0);
    let jobs: Vec<Job> = (0..6)
        .map(|n| Job::new(text(n), greedy(12)))
        .map(|job| job.with(&with))
        .chain([Job::new(text(9), greedy(12))])
        .collect();
    let alone = Engine::new(&base, EngineConfig { prefix_cache: false, ..roomy() });
    let expected: Vec<Answer> = jobs.iter().map(|job| Answer::read(alone.submit(job))).collect();
    let narrow = EngineConfig { max_batch_tokens: 16, max_sequences: 5, prefill_chunk: 7, ..roomy() };
    for config in [roomy(), narrow] {
        let engine = Engine::new(&base, config);
        let answers = engine.together(&jobs);
        assert_same(&answers, &expected);
        engine.settle();
        let stats = engine.handle.stats();
        if config == roomy() {
            // 48 of 56 tokens are whole pages; the bare base's are its own
            assert_eq!(cached(&answers), [0, 48, 48, 48, 48, 48, 0]);
            assert_eq!((stats.cache_hits, stats.cache_misses), (5 * 48, 7 * 56 - 5 * 48));
        } else {
            // who begins when two of the pages are there does not wait for the third
            assert!(cached(&answers)[1..6].iter().all(|found| *found >= 32), "{:?}", cached(&answers));
        }
    }
}

#[test]
fn where_the_first_one_leaves_another_goes_on() {
    let base = base(&tiny_llama());
    let jobs: Vec<Job> = (0..3).map(|n| Job::new(text(n), greedy(8))).collect();
    let expected = Engine::new(&base, roomy()).together(&jobs);
    let engine = Engine::new(&base, EngineConfig { prefill_chunk: 4, ..roomy() });
    let held = engine.hold();
    let mut events: Vec<_> = jobs.iter().map(|job| engine.submit(job)).collect();
    drop(held);
    // it may have ended by then, which is as good
    drop(events.remove(0));
    let answers: Vec<Answer> = events.into_iter().map(Answer::read).collect();
    assert_same(&answers, &expected[1..]);
    engine.settle();
}

#[test]
fn a_first_one_that_fails_takes_nobody_with_it() {
    let base = base(&tiny_llama());
    let broken = constraint::constrained(Job::new(text(1), greedy(8)), |_| Err("at once".into()));
    let jobs = [broken, Job::new(text(2), greedy(8)), Job::new(text(3), greedy(8))];
    let engine = Engine::new(&base, roomy());
    let answers = engine.together(&jobs);
    assert!(matches!(answers[0].failed, Some(EngineError::Constraint(_))));
    let alone = Engine::new(&base, EngineConfig { prefix_cache: false, ..roomy() });
    let expected: Vec<Answer> = jobs[1..].iter().map(|job| Answer::read(alone.submit(job))).collect();
    assert_same(&answers[1..], &expected);
    assert_eq!(cached(&answers[1..]), [48, 48], "what it filled is as good as any");
    engine.settle();
}
