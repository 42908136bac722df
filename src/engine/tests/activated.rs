//! Activated LoRA: rows ahead of the call are the bare base's, those from it on the delta's, in any company, and pages ahead of it
//! are shared with the base.

use super::*;
use crate::{
    delta::DeltaBatch,
    model::{Input, testing::tiny_gpt2},
    nn::Cx,
    rows::RowLayout,
};

type Held = Option<(DeltaId, Arc<Delta>)>;

/// Tokens that no other prompt has: those are from 3 on and below 123.
const CALL: [u32; 2] = [124, 125];

/// The same low-rank pairs on all linears, called or not.
fn called(plain: &Held, n: u8) -> Held {
    let (_, delta) = plain.as_ref()?;
    let delta = delta.as_ref().clone().invoked_by(Some(Arc::from(CALL)));
    Some((DeltaId::from_bytes([n; 32]), Arc::new(delta)))
}

/// A prompt that calls at these places.
fn calling(n: u64, len: usize, places: &[usize]) -> Vec<u32> {
    let mut tokens = prompt(n, len);
    places.iter().for_each(|at| tokens[*at..at + CALL.len()].copy_from_slice(&CALL));
    tokens
}

/// What follows a prompt where the tokens from `from` on go through the delta and those ahead of it through the base, put together
/// of two forwards: the likeliest tokens with their log-probabilities.
fn composed(base: &Base, with: &Delta, tokens: &[u32], from: usize, new: usize) -> Vec<(u32, f32)> {
    let total = tokens.len() + new;
    let slots = total.next_multiple_of(PAGE_SIZE);
    let kv = KvCache::new(base.arch.layers, slots, base.arch.kv_width(), base.dtype, &base.device).expect("a cache");
    let with = Arc::new(with.clone().invoked_by(None));
    let forward = |tokens: &[u32], context: usize, with: Option<&Arc<Delta>>| -> Vec<f32> {
        let mut rows = RowLayout::default();
        rows.push(tokens.len(), context, (0..(context + tokens.len()) as u32).collect());
        let deltas = with.map(|with| DeltaBatch::single(Arc::clone(with), &rows, base.sites.len())).unwrap_or_default();
        let cx = Cx { kv: Some(&kv), ..Cx::new(&rows, &deltas) };
        let hidden = base.transformer.forward(&Input::tokens(tokens), &cx).expect("runs");
        let logits = base.transformer.logits(&hidden, &rows.last_rows(), &cx).expect("head");
        logits.flatten_all().and_then(|t| t.to_vec1()).expect("numbers")
    };
    let mut logits = vec![];
    if from > 0 {
        logits = forward(&tokens[..from], 0, None);
    }
    if from < tokens.len() {
        logits = forward(&tokens[from..], from, Some(&with));
    }
    let mut said = vec![];
    for i in 0..new {
        let (best, most) = logits
            .iter()
            .enumerate()
            .fold((0, f32::NEG_INFINITY), |best, (i, x)| if *x > best.1 { (i, *x) } else { best });
        let norm = logits.iter().map(|x| f64::from(x - most).exp()).sum::<f64>().ln();
        said.push((best as u32, -norm as f32));
        // one that was never called stays so, whatever is said
        let with = (from < tokens.len()).then_some(&with);
        logits = forward(&[best as u32], tokens.len() + i, with);
    }
    said
}

/// Prompts, and where the delta acts from in each.
fn cases() -> Vec<(Vec<u32>, usize)> {
    let places: [(&[usize], usize, usize); 8] = [
        (&[0], 0, 21),
        (&[16], 16, 40),
        (&[20], 20, 47),
        (&[5, 33], 33, 50),
        (&[31], 31, 60),
        (&[58], 58, 60),
        (&[1], 1, 5),
        (&[], 30, 30),
    ];
    (300..).zip(places).map(|(n, (places, from, len))| (calling(n, len, places), from)).collect()
}

#[test]
fn rows_ahead_of_the_call_are_the_bases_and_those_behind_it_the_deltas_in_any_company() {
    for config in [tiny_llama(), tiny_gpt2()] {
        let base = base(&config);
        let plain = delta(&base, 3, 0);
        let with = called(&plain, 103);
        let new = 12;
        let jobs: Vec<Job> =
            cases().iter().map(|(tokens, _)| Job::new(tokens.clone(), greedy(new)).with(&with)).collect();
        // beside them: the base, the same pairs on all tokens, another delta
        let others: Vec<Job> = (cases().iter().zip([None, plain.clone(), delta(&base, 2, 0)].iter().cycle()))
            .map(|((tokens, _), held)| Job::new(tokens.clone(), greedy(new)).with(held))
            .collect();
        let alone = Engine::new(&base, EngineConfig { prefix_cache: false, ..roomy() });
        let beside: Vec<Answer> = others.iter().map(|job| Answer::read(alone.submit(job))).collect();
        let all: Vec<Job> = jobs.iter().chain(&others).cloned().collect();
        let narrow =
            EngineConfig { max_batch_tokens: 24, max_sequences: 6, max_deltas: 2, prefill_chunk: 7, ..roomy() };
        let (_, low) = plain.as_ref().expect("a delta");
        for config in [roomy(), narrow, EngineConfig { kv_pages: 14, ..roomy() }] {
            let engine = Engine::new(&base, config);
            let mut answers = engine.together(&all);
            assert_same(&answers.split_off(jobs.len()), &beside);
            for ((tokens, from), answer) in cases().iter().zip(&answers) {
                let want = composed(&base, low, tokens, *from, new);
                assert_eq!(answer.ids(), want.iter().map(|(id, _)| *id).collect::<Vec<_>>(), "called at {from}");
                for (got, (_, logprob)) in answer.tokens.iter().zip(&want) {
                    assert!((got.logprob - logprob).abs() < 1e-4, "called at {from}: {got:?}, {logprob}");
                }
            }
            engine.settle();
        }
    }
}

#[test]
fn a_prompt_without_the_call_is_the_bases() {
    let base = base(&tiny_llama());
    let with = called(&delta(&base, 3, 0), 103);
    let engine = Engine::new(&base, roomy());
    for work in [greedy(10), Work::Score { from: 1 }, Work::Embed { pooling: Pooling::Mean, normalize: false }] {
        // parts of the call are none
        let tokens = [prompt(1, 20), vec![CALL[0]], prompt(2, 9), vec![CALL[1], CALL[0]]].concat();
        let jobs = [Job::new(tokens.clone(), work.clone()).with(&with), Job::new(tokens, work)];
        let answers = engine.together(&jobs);
        assert_same(&answers[..1], &answers[1..]);
    }
    engine.settle();
}

#[test]
fn scores_are_put_together_in_the_same_way() {
    let base = base(&tiny_llama());
    let (plain, len, from) = (delta(&base, 3, 0), 40, 18);
    let with = called(&plain, 103);
    let tokens = calling(7, len, &[4, from]);
    let engine = Engine::new(&base, EngineConfig { prefill_chunk: 5, ..roomy() });
    let scores = |held: &Held| {
        Answer::read(engine.submit(&Job::new(tokens.clone(), Work::Score { from: 1 }).with(held))).numbers()
    };
    let (bare, own) = (scores(&None), scores(&with));
    // score `i` is that of token `i + 1`, which row `i` gives
    assert_close(&own[..from], &bare[..from]);
    assert!(own[from..].iter().zip(&bare[from..]).any(|(a, b)| (a - b).abs() > 1e-2), "it acts");
    let (_, low) = plain.as_ref().expect("a delta");
    let (best, logprob) = composed(&base, low, &tokens, from, 1)[0];
    let longer = Job::new([&tokens[..], &[best]].concat(), Work::Score { from: len }).with(&with);
    assert_close(&Answer::read(engine.submit(&longer)).numbers(), &[logprob]);
    engine.settle();
}

#[test]
fn pages_ahead_of_the_call_are_the_bases_and_found_by_both() {
    let base = base(&tiny_llama());
    let plain = delta(&base, 3, 0);
    let [first, second] = [called(&plain, 103), called(&plain, 104)];
    let tokens = calling(9, 60, &[40]);
    let later = [&tokens[..], &prompt(10, 10), &CALL, &prompt(11, 5)].concat();
    let job = |held: &Held, tokens: &[u32]| Job::new(tokens.to_vec(), greedy(4)).with(held);
    // whole pages of 60 tokens: three; ahead of 40: two; of the longer prompt, which calls at 70: four, of which three were read
    let rounds = [
        (job(&None, &tokens), 0),
        (job(&first, &tokens), 32),
        (job(&first, &tokens), 48),
        (job(&second, &tokens), 32),
        (job(&plain, &tokens), 0),
        (job(&first, &later), 48),
        (job(&None, &later), 64),
    ];
    let alone = Engine::new(&base, EngineConfig { prefix_cache: false, ..roomy() });
    let engine = Engine::new(&base, roomy());
    for (i, (job, found)) in rounds.iter().enumerate() {
        let answer = Answer::read(engine.submit(job));
        assert_eq!(answer.cached(), *found, "request {i}");
        assert_same(&[answer], &[Answer::read(alone.submit(job))]);
    }
    engine.settle();
    // the other way round, and at once: the base's pages come from whoever is first
    let engine = Engine::new(&base, roomy());
    let answers = engine.together(&[job(&first, &tokens), job(&None, &tokens), job(&second, &tokens)]);
    assert_eq!(answers.iter().map(Answer::cached).collect::<Vec<_>>(), [0, 32, 32]);
    engine.settle();
}
