//! Constrained outputs: only what is allowed is said, and nobody else notices.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::model::testing::{tiny_gpt2, tiny_llama};

/// What may come next after some tokens.
pub(super) type Allow = fn(&[u32]) -> Result<(Ending, Vec<u32>), String>;

/// Allows tokens by what was accepted.
#[derive(Debug)]
struct Steps {
    accepted: Vec<u32>,
    allow: Allow,
}

impl Constraint for Steps {
    fn allowed(&mut self, allowed: &mut TokenSet) -> Result<Ending, String> {
        assert!(allowed.is_empty());
        let (ending, ids) = (self.allow)(&self.accepted)?;
        ids.into_iter().for_each(|id| allowed.insert(id));
        Ok(ending)
    }

    fn accept(&mut self, token: u32) -> Result<bool, String> {
        let (_, ids) = (self.allow)(&self.accepted)?;
        assert!(ids.contains(&token), "{token} after {:?}", self.accepted);
        self.accepted.push(token);
        Ok(self.accepted.len() == 30)
    }

    fn bytes(&self) -> u64 {
        1
    }
}

/// Begins with nothing accepted.
#[derive(Debug)]
struct Factory(Allow);

impl ConstraintFactory for Factory {
    fn bytes(&self) -> u64 {
        1
    }

    fn begin(&self) -> Box<dyn Constraint> {
        Box::new(Steps { accepted: vec![], allow: self.0 })
    }
}

/// Ids with one remainder by 7 that goes up with every token.
pub(super) fn by_sevens(said: &[u32]) -> Result<(Ending, Vec<u32>), String> {
    Ok((Ending::No, (0..120).filter(|id| id % 7 == (said.len() % 7) as u32).collect()))
}

pub(super) fn constrained(job: Job, allow: Allow) -> Job {
    Job { constraint: Some(allow), ..job }
}

pub(super) fn factory(allow: Allow) -> Arc<dyn ConstraintFactory> {
    Arc::new(Factory(allow))
}

fn work(seed: u64, max_new_tokens: usize) -> Work {
    // every third greedy, every third penalised
    let sampling = Sampling {
        temperature: if seed.is_multiple_of(3) { 0.0 } else { 1.2 },
        repetition_penalty: if seed % 3 == 1 { 1.3 } else { 1.0 },
        no_repeat_ngram_size: 3 * u32::from(seed % 3 == 1),
        top_p: 0.95,
        seed: Some(seed),
        ..Sampling::default()
    };
    Work::Generate(Generate {
        sampling,
        max_new_tokens,
        stop_tokens: vec![],
        logprobs: Some(2),
        beams: None,
        speculation: None,
    })
}

/// Constrained ones and free ones, bare and with deltas.
fn jobs(base: &Base) -> Vec<Job> {
    let job = |i: u64| {
        let job = Job::new(prompt(i, 5 + (i as usize * 11) % 40), work(i, 40));
        let job = if i.is_multiple_of(4) { job } else { job.with(&delta(base, (i % 4) as u8, 0)) };
        if i.is_multiple_of(2) { constrained(job, by_sevens) } else { job }
    };
    (0..12).map(job).collect()
}

fn free(jobs: &[Job]) -> Vec<Job> {
    jobs.iter().filter(|job| job.constraint.is_none()).cloned().collect()
}

#[test]
fn in_company_each_says_what_it_says_alone_and_only_what_it_may() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let jobs = jobs(&base);
        let engine = Engine::new(&base, roomy());
        let alone: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
        let together = engine.together(&jobs);
        assert_same(&together, &alone);
        // the free ones as if there were no constrained ones at all
        let only_free = Engine::new(&base, roomy()).together(&free(&jobs));
        let of_all: Vec<Vec<u32>> =
            jobs.iter().zip(&together).filter(|(job, _)| job.constraint.is_none()).map(|(_, a)| a.ids()).collect();
        assert_eq!(of_all, only_free.iter().map(Answer::ids).collect::<Vec<_>>());
        for (job, answer) in jobs.iter().zip(&together).filter(|(job, _)| job.constraint.is_some()) {
            assert!(answer.ids().iter().zip(0u32..).all(|(id, i)| id % 7 == i % 7), "{:?}", answer.ids());
            let end = answer.finished.as_ref().expect("finishes");
            assert_eq!((end.reason, end.usage.completion_tokens), (FinishReason::StopToken, 30), "{:?}", job.work);
            let unbound = Job { constraint: None, ..job.clone() };
            let unbound = Answer::read(engine.submit(&unbound));
            assert_ne!(unbound.ids(), answer.ids(), "the constraint does something");
            // the model's opinion of the first place is the same
            assert_eq!(answer.tokens[0].top.len(), 2);
            for (a, b) in answer.tokens[0].top.iter().zip(&unbound.tokens[0].top) {
                assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-4, "{a:?} {b:?}");
            }
        }
        engine.settle();
    }
}

#[test]
fn a_preempted_constrained_sequence_says_what_it_would_have_said() {
    let base = base(&tiny_llama());
    let jobs: Vec<Job> = (0..6)
        .map(|i| constrained(Job::new(prompt(i, 40), work(i, 60)).with(&delta(&base, 1, 0)), by_sevens))
        .collect();
    let expected = Engine::new(&base, roomy()).together(&jobs);
    let engine = Engine::new(&base, EngineConfig { kv_pages: 12, prefill_chunk: 9, ..roomy() });
    assert_same(&engine.together(&jobs), &expected);
    engine.settle();
    assert!(engine.handle.stats().preemptions > 0, "12 pages cannot hold six sequences of five pages");
}

#[test]
fn a_constraint_that_allows_everything_changes_nothing() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    for seed in 0..6 {
        let job = Job::new(prompt(seed, 12), work(seed, 25));
        let all = constrained(job.clone(), |_| Ok((Ending::No, (0..4096).collect())));
        assert_same(&[Answer::read(engine.submit(&all))], &[Answer::read(engine.submit(&job))]);
    }
}

#[test]
fn the_greedy_choice_is_the_likeliest_of_the_allowed() {
    let base = base(&tiny_gpt2());
    let engine = Engine::new(&base, roomy());
    let greedy = |logprobs| {
        let work = Generate {
            sampling: Sampling::default(),
            max_new_tokens: 1,
            stop_tokens: vec![],
            logprobs,
            beams: None,
            speculation: None,
        };
        Job::new(prompt(8, 10), Work::Generate(work))
    };
    let ranked = Answer::read(engine.submit(&greedy(Some(4096)))).tokens[0].top.clone();
    let best = ranked.iter().map(|(id, _)| *id).find(|id| id % 7 == 0 && *id < 120);
    let chosen = Answer::read(engine.submit(&constrained(greedy(None), by_sevens))).ids();
    assert_eq!(chosen.first(), best.as_ref());
}

#[test]
fn an_output_ends_where_its_constraint_says() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let ended = |allow: Allow, stop_tokens: Vec<u32>| {
        let work = Generate {
            sampling: Sampling::default(),
            max_new_tokens: 9,
            stop_tokens,
            logprobs: None,
            beams: None,
            speculation: None,
        };
        let answer = Answer::read(engine.submit(&constrained(Job::new(prompt(1, 9), Work::Generate(work)), allow)));
        let end = answer.finished.clone().unwrap_or_else(|| panic!("{answer:?}"));
        (answer.ids(), end.reason, end.usage.completion_tokens)
    };
    // where it may end and nothing may follow, by a stop token that is not sent
    let two: Allow = |said| match said.len() {
        2 => Ok((Ending::May, vec![])),
        n => Ok((Ending::No, vec![5 + n as u32])),
    };
    assert_eq!(ended(two, vec![9]), (vec![5, 6], FinishReason::StopToken, 3));
    // a stop token is not chosen before
    assert_eq!(ended(|_| Ok((Ending::No, vec![5])), vec![9]), (vec![5; 9], FinishReason::Length, 9));
    // without one it ends by itself
    let three: Allow = |said| Ok((if said.len() == 3 { Ending::Must } else { Ending::No }, vec![5]));
    assert_eq!(ended(three, vec![]), (vec![5; 3], FinishReason::StopToken, 3));
    let nothing: Allow = |_| Ok((Ending::Must, vec![]));
    assert_eq!(ended(nothing, vec![9]), (vec![], FinishReason::StopToken, 0));
    engine.settle();
}

#[test]
fn a_constraint_that_fails_fails_its_request_alone() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let healthy = Job::new(prompt(2, 9), work(0, 20));
    let expected = Answer::read(engine.submit(&healthy));
    let fails: [Allow; 4] = [
        |_| Err("at once".into()),
        |said| if said.len() < 4 { Ok((Ending::No, vec![5])) } else { Err("later".into()) },
        |said| if said.len() < 4 { Ok((Ending::No, vec![5])) } else { panic!("it breaks") },
        |_| Ok((Ending::No, vec![])),
    ];
    let mut jobs: Vec<Job> = fails.into_iter().map(|f| constrained(healthy.clone(), f)).collect();
    jobs.push(healthy.clone());
    let answers = engine.together(&jobs);
    for (answer, said) in answers.iter().zip([0, 4, 4, 0]) {
        assert!(matches!(answer.failed, Some(EngineError::Constraint(_))), "{answer:?}");
        assert_eq!(answer.tokens.len(), said, "what was said before stays");
    }
    assert_same(&answers[4..], &[expected]);
    engine.settle();
}

#[test]
fn only_what_is_chosen_token_by_token_can_be_constrained() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, roomy());
    let Work::Generate(how) = greedy(5) else { unreachable!() };
    let search =
        crate::admission::params::BeamParams { beams: 2, length_penalty: 1.0, early_stopping: Default::default() };
    let beams = Work::Generate(Generate { beams: Some(Beams { search, told: 1 }), logprobs: None, ..how });
    for work in [beams, Work::Score { from: 1 }] {
        let (request, _events) = constrained(Job::new(prompt(1, 9), work), by_sevens).request();
        assert!(matches!(engine.handle.submit(request), Err(SubmitError::Invalid(_))));
    }
}

/// States that are counted; each takes as many bytes as its factory says, and so many more with every token.
#[derive(Debug, Clone)]
struct Counted {
    now: Arc<AtomicU64>,
    most: Arc<AtomicU64>,
    bytes: u64,
    growth: u64,
}

#[derive(Debug)]
struct State(Counted, u64);

impl Counted {
    fn new(bytes: u64, growth: u64) -> Self {
        Self { now: Arc::default(), most: Arc::default(), bytes, growth }
    }

    fn submit(&self, engine: &Engine, bytes: u64, growth: u64) -> Result<mpsc::Receiver<Event>, SubmitError> {
        let (mut request, events) = Job::new(prompt(bytes, 9), work(0, 20)).request();
        request.constraint = Some(Arc::new(Self { bytes, growth, ..self.clone() }));
        engine.handle.submit(request).map(|()| events)
    }
}

impl ConstraintFactory for Counted {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn begin(&self) -> Box<dyn Constraint> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        Box::new(State(self.clone(), 0))
    }
}

impl Constraint for State {
    fn allowed(&mut self, allowed: &mut TokenSet) -> Result<Ending, String> {
        (0..100).for_each(|id| allowed.insert(id));
        Ok(Ending::No)
    }

    fn accept(&mut self, _: u32) -> Result<bool, String> {
        self.1 += self.0.growth;
        Ok(false)
    }

    fn bytes(&self) -> u64 {
        self.0.bytes + self.1
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn only_sequences_that_have_begun_have_states_and_together_no_more_than_there_is_room_for() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, EngineConfig { constraint_bytes: 250, ..roomy() });
    let counted = Counted::new(0, 0);
    let held = engine.hold();
    let all: Vec<_> = (0..7).map(|_| counted.submit(&engine, 100, 0).expect("taken")).collect();
    let small = counted.submit(&engine, 1, 0).expect("taken");
    let free = engine.submit(&Job::new(prompt(3, 9), work(0, 20)));
    let refused = counted.submit(&engine, 251, 0).map(drop);
    assert_eq!(refused, Err(SubmitError::ConstraintTooLarge { bytes: 251, limit: 250 }));
    drop(held);
    for events in all.into_iter().chain([small, free]) {
        let answer = Answer::read(events);
        assert_eq!(answer.finished.map(|end| end.usage.completion_tokens), Some(20), "{:?}", answer.failed);
    }
    engine.settle();
    let (now, most) = (counted.now.load(Ordering::SeqCst), counted.most.load(Ordering::SeqCst));
    // the small one may have begun beside the last of the others
    assert!(now == 0 && (2..=3).contains(&most), "{now} are left, {most} were there at a time");
}

#[test]
fn a_state_that_grows_too_large_ends_its_own_sequence() {
    let base = base(&tiny_llama());
    let engine = Engine::new(&base, EngineConfig { constraint_bytes: 250, ..roomy() });
    let counted = Counted::new(0, 0);
    let held = engine.hold();
    let grows = counted.submit(&engine, 40, 20).expect("taken");
    let stays = counted.submit(&engine, 100, 0).expect("taken");
    drop(held);
    let grown = Answer::read(grows);
    // 140 with the fifth token, 160 with the sixth: over 250 beside the other's 100
    assert_eq!(grown.failed, Some(EngineError::ConstraintMemory { bytes: 160, limit: 250 }));
    assert_eq!(grown.tokens.len(), 6, "what was said stays");
    assert_eq!(Answer::read(stays).tokens.len(), 20);
    engine.settle();
    assert_eq!(counted.now.load(Ordering::SeqCst), 0);
}
