//! Forced tokens: where a constraint leaves no choice, several tokens come in a step, and nothing else is different.

use super::{
    constraint::{Allow, constrained},
    *,
};
use crate::{admission::params::NgramSpeculation, model::testing::tiny_gpt2};

/// One row to a step: no draft ever finds room, so that each token has a step of its own.
fn one_by_one() -> EngineConfig {
    EngineConfig { max_batch_tokens: 1, max_sequences: 1, prefix_cache: false, ..roomy() }
}

/// Runs of tokens without a choice between tokens with one.
fn mixed(said: &[u32]) -> Result<(Ending, Vec<u32>), String> {
    Ok((Ending::No, if said.len().is_multiple_of(5) { (20..60).collect() } else { vec![60 + said.len() as u32] }))
}

/// Ends by itself behind ten tokens, of which only the first had others beside it.
fn ends(said: &[u32]) -> Result<(Ending, Vec<u32>), String> {
    match said.len() {
        0 => Ok((Ending::No, (20..60).collect())),
        10 => Ok((Ending::Must, vec![])),
        n => Ok((Ending::No, vec![70 + n as u32])),
    }
}

/// May end behind six, with a stop token.
fn may_end(said: &[u32]) -> Result<(Ending, Vec<u32>), String> {
    Ok((if said.len() == 6 { Ending::May } else { Ending::No }, if said.len() == 6 { vec![] } else { vec![80] }))
}

/// Cannot be kept to behind seven.
fn fails(said: &[u32]) -> Result<(Ending, Vec<u32>), String> {
    if said.len() < 7 { Ok((Ending::No, vec![90])) } else { Err("later".into()) }
}

fn work(seed: u64, stop_tokens: Vec<u32>) -> Work {
    let sampling = Sampling {
        temperature: if seed.is_multiple_of(2) { 0.0 } else { 1.1 },
        repetition_penalty: if seed % 3 == 1 { 1.2 } else { 1.0 },
        no_repeat_ngram_size: 2 * u32::from(seed % 3 == 2),
        seed: Some(seed),
        ..Sampling::default()
    };
    let logprobs = (!seed.is_multiple_of(4)).then_some(2);
    Work::Generate(Generate { sampling, max_new_tokens: 23, stop_tokens, logprobs, beams: None, speculation: None })
}

fn jobs(base: &Base) -> Vec<Job> {
    let ways: [(Allow, Vec<u32>); 4] = [(mixed, vec![]), (ends, vec![]), (may_end, vec![9]), (fails, vec![])];
    let job = |(i, (allow, stops)): (u64, &(Allow, Vec<u32>))| {
        let job = Job::new(prompt(200 + i, 4 + (i as usize * 7) % 30), work(i, stops.clone()));
        let job = if i.is_multiple_of(3) { job } else { job.with(&delta(base, (i % 3) as u8, 0)) };
        constrained(job, *allow)
    };
    (0..).zip(ways.iter().cycle().take(12)).map(job).collect()
}

#[test]
fn outputs_log_probabilities_ends_and_usage_are_those_of_one_token_a_step() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let jobs = jobs(&base);
        let expected = Engine::new(&base, one_by_one()).together(&jobs);
        assert_eq!(expected.iter().filter(|answer| answer.failed.is_some()).count(), 3);
        let narrow = EngineConfig { max_batch_tokens: 9, max_sequences: 4, prefill_chunk: 5, ..roomy() };
        // pages run out
        let tight = EngineConfig { kv_pages: 8, ..roomy() };
        for config in [roomy(), narrow, tight] {
            let engine = Engine::new(&base, EngineConfig { prefix_cache: false, ..config });
            let answers = engine.together(&jobs);
            assert_same(&answers, &expected);
            for (i, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
                let told = |a: &Answer| a.finished.as_ref().map(|end| (end.reason, end.usage));
                assert_eq!(told(answer), told(expected), "request {i}");
            }
            engine.settle();
        }
    }
}

#[test]
fn a_run_without_a_choice_takes_a_step() {
    let base = base(&tiny_llama());
    let steps = |allow: Allow, new: usize| {
        let engine = Engine::new(&base, roomy());
        let answer = Answer::read(engine.submit(&constrained(Job::new(prompt(1, 9), greedy(new)), allow)));
        engine.settle();
        (answer.tokens.len(), engine.handle.stats().steps)
    };
    // the prompt's step gives the first token, the next one all others
    assert_eq!(steps(|_| Ok((Ending::No, vec![60])), 21), (21, 2));
    assert_eq!(steps(ends, 21), (10, 2));
    // one with a choice and four without, over and over
    assert_eq!(steps(mixed, 25), (25, 6));
}

#[test]
fn what_is_forced_is_no_guess_in_usage() {
    let base = base(&tiny_llama());
    let Work::Generate(how) = greedy(21) else { unreachable!() };
    let speculation = Some(NgramSpeculation { tokens: 5, longest: 3, shortest: 1 });
    let job = Job::new(prompt(1, 9), Work::Generate(Generate { speculation, ..how }));
    let engine = Engine::new(&base, roomy());
    let answer = Answer::read(engine.submit(&constrained(job, |_| Ok((Ending::No, vec![60])))));
    let usage = answer.finished.expect("it ends").usage;
    assert_eq!((usage.completion_tokens, usage.drafted_tokens, usage.accepted_tokens), (21, 0, 0));
    engine.settle();
    assert_eq!(engine.handle.stats().steps, 2);
}
